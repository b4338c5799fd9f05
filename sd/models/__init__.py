"""The networks, as the papers draw them: text encoder, VAE, U-Net, and the layers they share."""
