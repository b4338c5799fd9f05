"""Checkpoint files: what people have, read without trusting it, under our names, and written for other programs.

Three questions, one after the other. Nothing here needs the networks, and what only looks at files needs no torch.

    which bytes are which tensor?    checkpoint <- torch_files <- pickles; safetensors_files; folders; numbers
    which model is it?               identity <- prediction, other_models, diffusers_config; census says all of it
    which weight is which of ours?   keys -> layouts -> convert, complete by weight_shapes; export is the way back

Read `keys` first: it has the tables that everything else looks up in.
"""
