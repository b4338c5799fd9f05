"""Images: to and from tensors, read safely from any file, masks, previews of latents."""
