"""What train.py and train_vae.py share: the data, the loop, its state and log. Nothing that paints imports it.

data       pictures with captions, from a folder or drawn        latents    the U-Net's: encoded once
models     which networks are trained, and writing them          loop       recipe, optimizer, steps; many processes
processes  who this process is among torchrun's                  state      stopping and going on    log  and curve
"""
