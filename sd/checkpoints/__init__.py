"""Checkpoint files: what people have, read without trusting it, under our names, and written for other programs.

Three questions, in this order. Code that only looks at files does not import torch.

    which bytes are which tensor?    checkpoint <- folders, formats/
    which model is it?               detect <- prediction, other_models, diffusers_config; inspect reports all of it
    which weight is which of ours?   key_maps -> layouts -> convert -> loading; export is the way back

Read `key_maps` first: it has the tables that everything else looks up.
"""
