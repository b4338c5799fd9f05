"""Checkpoint files in common formats: read without being trusted, under our names, and written for other programs.

Three questions, in this order. Code that only looks at files does not import torch.

    which bytes are which tensor?    checkpoint <- folders, formats/
    which model is it?               detect <- prediction, other_models, diffusers_config; inspect reports all of it
    which of ours is each weight?    key_maps -> layouts -> convert -> loading; export is the way back

Control networks have files of their own: control_maps -> control_detect -> control_files, control_export.

Read `key_maps` first: it has the tables that everything else looks up.
"""
