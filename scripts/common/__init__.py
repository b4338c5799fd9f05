"""What the programs share: arguments, output files, generating image after image."""
