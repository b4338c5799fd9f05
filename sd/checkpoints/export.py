"""Export: from our names back to the layouts that other programs read, bit for bit.

    own         one file, text_encoder.*, vae.*, unet.*, with the config in its metadata
    original    one file, as CompVis', Stability's and most other programs read it
    diffusers   a folder

An original file holds tensors that no network here needs: OpenCLIP's layer after the last one that is run, its
projection, a noise schedule. Other programs require some of them, and a lossless round trip can be tested. So they are
carried along (`extras`) under their original names: in our file with the prefix "extra.", in a folder in
sd_extra.safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..schedule import Schedule
from ..text.tokenizer import Tokenizer
from .checkpoint import shapes
from .detect import CONFIG_KEY, FORMAT, FORMAT_KEY
from .diffusers_config import to_diffusers_configs
from .folders import EXTRA_FILE, RAW_VARIANT
from .key_maps import CLIP, EMA, OPENCLIP, TEXT, diffusers_sources, original_sources
from .layouts import AVERAGE
from .matching import match_layouts
from .names import EXTRA
from .prediction import PREDICTION_KEY
from .tiny_files import check_writable

States = Mapping[str, Mapping[str, Tensor]]  # network -> weights under our names; the networks, and maybe "unet_ema"
AVERAGE_SCALARS = ("decay", "num_updates")
DIFFUSERS_FILES = {
    "text_encoder": "text_encoder/model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
}


def extras(tensors: Mapping[str, Tensor], config: Config) -> list[tuple[str, str]]:
    """The tensors of a file beside its networks that are kept: (key in the file, key in an original file)."""
    kept = [(key, key.removeprefix(EXTRA)) for key in tensors if key.startswith(EXTRA)]
    text = match_layouts(shapes(tensors), config).get("text_encoder")
    if text is not None and text.name == config.text[0].names:
        usual = TEXT[text.name]
        names = (f"{text.prefix}logit_scale", f"{text.prefix}text_projection")
        kept += [
            (key, usual + key.removeprefix(text.prefix))
            for key in tensors
            if text.unrun_layer(key, config.text[0].layers) or (text.name == "openclip" and key in names)
        ]
    if has_own_schedule(config) and "alphas_cumprod" in tensors:
        kept.append(("alphas_cumprod", "alphas_cumprod"))
    return kept + [(key, key) for key in (EMA + name for name in AVERAGE_SCALARS) if key in tensors]


def has_own_schedule(config: Config) -> bool:
    """Whether the noise schedule differs from the one that every program assumes."""
    return config.schedule.zero_snr or config.schedule.alpha_bar is not None


def metadata(config: Config) -> dict[str, str]:
    """Metadata of a safetensors file: the config, and the prediction in the form that other programs look for."""
    prediction = {"eps": "epsilon", "v": "v"}[config.schedule.prediction]
    return {"format": "pt", PREDICTION_KEY: prediction, CONFIG_KEY: config.to_json(), FORMAT_KEY: FORMAT}


def to_own(states: States, more: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Per-network state dicts -> one flat state dict in our layout; `more` are extras by their original names."""
    out = {f"{network}.{key}": tensor for network, state in states.items() for key, tensor in state.items()}
    return out | {EXTRA + key: tensor for key, tensor in (more or {}).items()}


def to_original(states: States, config: Config, more: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Per-network state dicts under our names -> one state dict in the original layout.

    Weights are bit-identical. Models with transformers' names get the `position_ids` that old tools require, those with
    an unusual noise schedule `alphas_cumprod`. `more` are extras by their original names.
    """
    check_writable(config.vae, "original")
    more = {key: tensor for key, tensor in (more or {}).items() if AVERAGE in states or not key.startswith(EMA)}
    written: dict[str, dict[str, Tensor]] = {}
    for network, table in original_sources(config, states).items():
        out = written[network] = {}
        fused: dict[str, list[Tensor]] = {}
        for key, source in table.items():
            tensor = states[network][key]
            if source.third is None:
                out[source.key] = tensor.reshape(tensor.shape + (1,) * source.ones)
            else:
                fused.setdefault(source.key, []).append(tensor)  # q, k, v in this order in the network
        out |= {key: torch.cat(parts) for key, parts in fused.items()}
    if config.text[0].names == "clip" and "text_encoder" in written:
        written["text_encoder"][CLIP + "embeddings.position_ids"] = torch.arange(config.text[0].length).unsqueeze(0)
    if has_own_schedule(config) and "alphas_cumprod" not in more:
        more["alphas_cumprod"] = torch.from_numpy(Schedule(config.schedule).alpha_bar).float()
    order = ("unet", AVERAGE, "vae", "text_encoder")  # the original's
    return {key: tensor for network in order for key, tensor in written.get(network, {}).items()} | more


def unrun_layer(out: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """What other programs expect of an OpenCLIP text encoder and `out`, an original state dict, lacks.

    They load one more layer, which they never run: it becomes a copy of the last one, the projection the identity, and
    the scale OpenCLIP's initial value (1 / 0.07).
    """
    text, stem = config.text[0], f"{OPENCLIP}transformer.resblocks."
    last, after = f"{stem}{text.layers - 1}.", f"{stem}{text.layers}."
    first = OPENCLIP + "token_embedding.weight"
    if text.names != "openclip" or first not in out or any(key.startswith(after) for key in out):
        return {}
    made = {after + key.removeprefix(last): tensor.clone() for key, tensor in out.items() if key.startswith(last)}
    dtype = out[first].dtype
    made[OPENCLIP + "text_projection"] = torch.eye(text.width, dtype=dtype)
    made[OPENCLIP + "logit_scale"] = torch.tensor(1 / 0.07, dtype=dtype).log()
    return {key: tensor for key, tensor in made.items() if key not in out}


def to_diffusers(
    states: States, config: Config, more: Mapping[str, Tensor] | None = None
) -> dict[str, dict[str, Tensor]]:
    """Per-network state dicts under our names -> the weight files of a diffusers folder, by their paths in it.

    The text encoder's names are those of transformers before 5.6, which later versions read as well. With a moving
    average, the average is the main file and the U-Net as trained the variant "non_ema", as in published folders.
    """
    check_writable(config.vae, "diffusers")
    files: dict[str, dict[str, Tensor]] = {}
    for network, state in states.items():
        part = network.removesuffix("_ema")
        name = DIFFUSERS_FILES[part]
        if network == "unet" and AVERAGE in states:
            name = name.replace(".safetensors", f".{RAW_VARIANT}.safetensors")
        before = "text_model." if part == "text_encoder" else ""
        table = diffusers_sources(config, {part: state})[part]
        files[name] = {
            before + source.key: state[key].reshape(state[key].shape + (1,) * source.ones)
            for key, source in table.items()
        }
    kept = {EXTRA + key: tensor for key, tensor in (more or {}).items() if AVERAGE in states or not key.startswith(EMA)}
    return files | ({EXTRA_FILE: kept} if kept else {})


def diffusers_texts(config: Config) -> dict[str, str]:
    """The JSON and text files of a diffusers folder by their paths in it: configs and the tokenizer's tables."""
    configs: dict[str, dict[str, Any]] = to_diffusers_configs(config)
    texts = {path: json.dumps(content, indent=2) + "\n" for path, content in configs.items()}
    vocab, merges = Tokenizer().tables()
    texts["tokenizer/vocab.json"] = json.dumps(vocab, ensure_ascii=False) + "\n"
    texts["tokenizer/merges.txt"] = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges)
    return texts
