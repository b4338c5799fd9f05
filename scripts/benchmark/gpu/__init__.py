"""The parts of `bench.py --check`: one command that shows what works on a GPU, and how fast it is.

items     the registry of checks
models    the models that checks use: reference weights at full size, the embedded model
networks  checks of the networks against the recorded outputs of the original code
images    checks of whole images, which must not depend on how they are computed
others    a check that runs the other tests marked gpu
table     the times of 50 steps, the decoder and the text encoder, ours and diffusers
plan      all parts in order, each in its own process, within a time limit
results   the targets, and the results as text
"""
