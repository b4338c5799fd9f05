"""What is added to a model: LoRA and textual inversion, in the files that people have."""
