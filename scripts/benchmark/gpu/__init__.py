"""The parts of `bench.py --check`: one command that shows what works on a GPU, and how fast it is.

items     what is done: the registry of checks, and the part of the plan that each belongs to
models    the models that checks use: reference weights at full size, the embedded model
networks  checks of the networks against the recorded outputs of the original code
images    checks of whole images: the same in every way of running
others    a check that runs the other tests marked gpu
table     the times of 50 steps, the decoder and the text encoder, ours and diffusers
plan      all parts in their order, each in its own process, within a budget of time
results   the targets, and the results as text
"""
