"""Shared parts of the training programs: data, loop, state and log. The programs that generate never import it.

data       images with captions, from a folder or drawn          latents    encoded once, for the U-Net
models     new or loaded networks, and saving them               loop       recipe, optimizer, steps; many processes
processes  rank and communication under torchrun                 state      save and resume      log  and loss curve
"""
