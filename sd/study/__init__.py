"""The study toolkit: what happens inside the model, as data and as figures. The pipeline never imports it.

Each figure has two functions: one returns data (tensors, images, numbers) and one draws it. Reading order, which is
also the order of docs/:

    text          words, tokens, embeddings; the effect of word order
    latent        the channels of the latent, the round trip through the VAE
    noising       the forward process, the curves of the schedule
    network       the parts of the U-Net: shapes, parameters, FLOPs
    attention     maps of cross-attention and self-attention, which attention_figures draws; the hook that `editing`
                  uses too
    influence     which parts of the image a word changes
    denoising     the reverse process: x_t and x0, as a strip and as an animation
    convergence   samplers compared with the exact solution
    guidance      sweeps; both predictions side by side
    grids         images over any two settings
    mixing        interpolation between two prompts and between two noises
    editing       prompt-to-prompt: different words, same layout
    steering      guidance by the gradient of a loss on the image
    consistency   few-step models: the prediction at every point of a curve, images in few steps
    control       control networks: images by scale, steps and mode; residuals; the zero convolutions in training
    runs, drawing shared sampling and plotting code

`python scripts/study.py all` makes every figure.
"""
