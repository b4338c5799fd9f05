"""The study toolkit: what happens inside, as data and as pictures. Nothing that paints imports it.

Every figure is two functions: one that returns data (tensors, pictures, numbers) and one that draws it. Reading order,
which is the order of docs/:

    text          words, tokens, embeddings; what word order changes
    latent        the latent's channels, the VAE's round trip
    noising       the forward process, the schedule's curves
    network       the U-Net's parts: shapes, parameters, FLOPs
    attention     where each word is listened to, where a place looks; the hook that `editing` uses as well
    influence     what a word changes, and where
    denoising     the reverse process: x_t and x0, as a strip and as a film
    convergence   samplers against the exact solution
    guidance      sweeps; both predictions side by side
    grids         pictures over any two settings
    mixing        between two prompts, between two noises
    editing       prompt-to-prompt: other words in the same places
    steering      the gradient of a loss on the picture
    runs, drawing how the studies paint, and how they draw

`python scripts/study.py all` makes every figure.
"""
