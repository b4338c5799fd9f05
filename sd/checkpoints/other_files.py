"""Files and folders that are not weights in a format read here, recognised by their names so as to say what they are.

The table is looked at only after a file could not be read, or where a folder has no weights that can be: a name is no
proof of anything. `other_models.py` has the weights of other models, which can be read.

>>> other_file("unet/model.onnx")
'an ONNX model; give the PyTorch files of the same model (.safetensors, .bin or .ckpt)'
>>> other_file("model.safetensors") is None
True
"""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

PYTORCH = "give the PyTorch files of the same model (.safetensors, .bin or .ckpt)"
WHOLE = "give the folder of the whole model"
MAX_NAMES = 2000  # looked at in a folder

Names = tuple[tuple[tuple[str, ...], str], ...]  # patterns of a name, what it is and what to do; the first match counts

# Formats: of a file, or of a file or folder in a folder.
FORMATS: Names = (
    (("*.part", "*.partial", "*.crdownload", "*.aria2", "*.incomplete", "*.download"),
     "an unfinished download; wait for its end, or download it again"),
    (("*.onnx", "*.onnx_data", "*.onnx.data", "weights.pb"), f"an ONNX model; {PYTORCH}"),
    (("*.msgpack",), f"weights of Flax (JAX); {PYTORCH}"),
    (("openvino_*.xml", "openvino_*.bin", "ov_*.xml"), f"an OpenVINO model; {PYTORCH}"),
    (("*.engine", "*.plan", "*.trt"), f"a TensorRT engine, which runs on one kind of GPU; {PYTORCH}"),
    (("*.mlmodel", "*.mlmodelc", "*.mlpackage", "*.espresso.*"), f"a Core ML model; {PYTORCH}"),
    (("*.gguf", "*.ggml"), f"weights quantised for other programs (GGUF); {PYTORCH}"),
    (("*.h5", "*.keras", "saved_model.pb", "*.tflite"), f"a TensorFlow model; {PYTORCH}"),
    (("*.mnn", "*.ncnn.*", "*.tnnmodel", "*.dlc", "*.rknn"), f"a model for phones; {PYTORCH}"),
    (("data.pkl",),
     "a checkpoint that was unpacked (data.pkl beside data/); give the file that it was, or pack the folder again, "
     "uncompressed: `zip -0 -r model.ckpt FOLDER`"),
    (("*.npz", "*.npy"), "arrays of NumPy, not a checkpoint; give a .safetensors or .ckpt file"),
)  # fmt: skip
# What else a folder may be for, by the files in it. A damaged file of these names is damaged, whatever it is for.
PURPOSES: Names = (
    (("pytorch_lora_weights.*", "adapter_model.*", "adapter_config.json"),
     "a LoRA, not a checkpoint; give the file of its weights with --lora"),
    (("learned_embeds*",), "a textual inversion embedding, not a checkpoint; give its file with --embedding"),
    (("*.distcp", "*_optim_states.pt", "*_model_states.pt"),
     "a sharded training checkpoint; merge it with the tool of its trainer first"),
    (("optimizer.*", "*.optim", "random_states_*.pkl", "rng_state*", "scaler.pt", "training_args.bin"),
     "the state of a training run, not a model; give the model that it wrote"),
    (("merges.txt", "vocab.json", "tokenizer.json"), f"a tokenizer, not a model; {WHOLE}"),
    (("scheduler_config.json",), f"a noise schedule, not a model; {WHOLE}"),
    (("preprocessor_config.json",), f"the settings of an image processor, not a model; {WHOLE}"),
)  # fmt: skip
# Texts, which say nothing about the folder that they are in.
TEXTS: Names = (
    (("model_index.json",), "the list of the parts of a model; give the folder that it is in"),
    (("merges.txt", "vocab.json", "tokenizer*.json", "special_tokens_map.json"), f"a tokenizer, not a model; {WHOLE}"),
    (("*config.json",), f"the settings of a part of a model, not its weights; {WHOLE}"),
    (("*.yaml", "*.yml", "*.toml", "*.json", "*.txt", "*.md"),
     "a text about a model; give the model itself, a .safetensors or .ckpt file or a diffusers folder"),
)  # fmt: skip


def other_file(path: str | os.PathLike[str]) -> str | None:
    """What a file is by its name, and what to do; None for a name that says nothing."""
    return _by_name({Path(path).name.lower()}, FORMATS + TEXTS)


def other_folder(folder: Path, whole: bool = False) -> str | None:
    """What a folder holds by the names in it and in the folders in it, and what to do; None if they say nothing.

    whole   whether it is the folder of a whole model, which also has a tokenizer and the like
    """
    inside = [entry for entry in islice(folder.iterdir(), MAX_NAMES) if not entry.name.startswith(".")]
    names = {entry.name.lower() for entry in inside}
    for entry in inside:
        if entry.is_dir():
            names |= {file.name.lower() for file in islice(entry.iterdir(), MAX_NAMES)}
    what = _by_name(names, FORMATS if whole else FORMATS + PURPOSES)
    return what and f"this folder holds {what}"


def _by_name(names: set[str], table: Names) -> str | None:
    return next(
        (what for patterns, what in table if any(fnmatchcase(name, p) for p in patterns for name in names)), None
    )
