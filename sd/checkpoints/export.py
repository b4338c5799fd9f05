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
from .diffusers_export import text_folders, to_diffusers_configs
from .folders import EXTRA_FILE, RAW_VARIANT
from .key_maps import EMA, OPENCLIP, diffusers_sources, original_sources, original_text, text_of
from .layouts import AVERAGE
from .matching import match_layouts
from .names import EXTRA
from .prediction import PREDICTION_KEY
from .tiny_files import check_writable

States = Mapping[str, Mapping[str, Tensor]]  # network -> weights under our names; the networks, and maybe "unet_ema"
V_MARKER, ZERO_SNR_MARKER = "v_pred", "ztsnr"  # empty tensors that say what an SDXL model predicts, and its schedule
AVERAGE_SCALARS = ("decay", "num_updates")
DIFFUSERS_FILES = {
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
}


def extras(tensors: Mapping[str, Tensor], config: Config) -> list[tuple[str, str]]:
    """The tensors of a file beside its networks that are kept: (key in the file, key in an original file)."""
    kept = [(key, key.removeprefix(EXTRA)) for key in tensors if key.startswith(EXTRA)]
    layouts = match_layouts(shapes(tensors), config)
    for network, text in zip(config.text_names, config.text, strict=True):
        layout = layouts.get(network)
        if layout is None or layout.name != text.names:
            continue
        _, usual = original_text(config, network)
        unused = ("logit_scale",) if text.projection else ("logit_scale", "text_projection")
        names = [layout.prefix + name for name in unused if layout.name == "openclip"]
        kept += [
            (key, usual + key.removeprefix(layout.prefix))
            for key in tensors
            if layout.unrun_layer(key, text.layers) or key in names
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
    an unusual noise schedule `alphas_cumprod`; an SDXL model that predicts v gets ComfyUI's markers. `more` are extras
    by their original names.
    """
    check_writable(config.vae, "original")
    more = {key: tensor for key, tensor in (more or {}).items() if AVERAGE in states or not key.startswith(EMA)}
    written: dict[str, dict[str, Tensor]] = {}
    for network, table in original_sources(config, states).items():
        out = written[network] = {}
        fused: dict[str, list[Tensor]] = {}
        for key, source in table.items():
            tensor = states[network][key]
            if source.transposed:
                out[source.key] = tensor.T.contiguous()
            elif source.third is None:
                out[source.key] = tensor.reshape(tensor.shape + (1,) * source.ones)
            else:
                fused.setdefault(source.key, []).append(tensor)  # q, k, v in this order in the network
        out |= {key: torch.cat(parts) for key, parts in fused.items()}
    for network, text in zip(config.text_names, config.text, strict=True):
        if text.names == "clip" and network in written:
            _, prefix = original_text(config, network)
            written[network][prefix + "embeddings.position_ids"] = torch.arange(text.length).unsqueeze(0)
    if config.sizes and config.schedule.prediction == "v":  # by which other programs recognise it
        more |= {key: torch.empty(0) for key in (V_MARKER, *([ZERO_SNR_MARKER] if config.schedule.zero_snr else []))}
    if has_own_schedule(config) and "alphas_cumprod" not in more and ZERO_SNR_MARKER not in more:
        more["alphas_cumprod"] = torch.from_numpy(Schedule(config.schedule).alpha_bar).float()
    order = ("unet", AVERAGE, "vae", *config.text_names)  # the original's
    if config.sizes:
        order = ("unet", AVERAGE, *config.text_names, "vae")
    return {key: tensor for network in order for key, tensor in written.get(network, {}).items()} | more


def unrun_layer(out: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The weights of text encoders that other programs expect and `out`, an original state dict, lacks.

    They load one more layer of SD 2's OpenCLIP and of SDXL's CLIP-L, and never run it: here it is a copy of the last
    one. SD 2's projection is the identity, and its logit scale OpenCLIP's initial value (1 / 0.07).
    """
    if config.sizes:
        return _made_layer(out, config)
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
    folders = dict(zip(config.text_names, text_folders(config), strict=True))
    names = DIFFUSERS_FILES | {name: f"{folder}/model.safetensors" for name, folder in folders.items()}
    more = dict(more or {})
    for network, state in states.items():
        part = network.removesuffix("_ema")
        name = names[part]
        if network == "unet" and AVERAGE in states:
            name = name.replace(".safetensors", f".{RAW_VARIANT}.safetensors")
        table = diffusers_sources(config, {part: state})[part]
        files[name] = {
            _before(part, key) + source.key: state[key].reshape(state[key].shape + (1,) * source.ones)
            for key, source in table.items()
        }
        if config.sizes and part in config.text_names:
            files[name] |= _last_layer(config, part, more) or _made_last_layer(files[name], config, part)
    kept = {EXTRA + key: tensor for key, tensor in more.items() if AVERAGE in states or not key.startswith(EMA)}
    return files | ({EXTRA_FILE: kept} if kept else {})


def lacks_last_layer(config: Config, more: Mapping[str, Tensor]) -> bool:
    """Whether the extras lack the last layer of SDXL's first text encoder, so that a folder gets a copy for it."""
    if not config.sizes or config.text[0].pooled:
        return False
    _, prefix = original_text(config, "text_encoder")
    return not any(key.startswith(f"{prefix}encoder.layers.{config.text[0].layers}.") for key in more)


def _last_layer(config: Config, network: str, more: dict[str, Tensor]) -> dict[str, Tensor]:
    """The last layer of SDXL's first text encoder, which diffusers loads and never uses: taken from the extras."""
    text = text_of(config, network)
    _, prefix = original_text(config, network)
    here = [key for key in more if key.startswith(f"{prefix}encoder.layers.{text.layers}.")]
    return {"text_model." + key.removeprefix(prefix): more.pop(key) for key in here}


def _made_last_layer(file: Mapping[str, Tensor], config: Config, network: str) -> dict[str, Tensor]:
    """This layer as a copy of the one before it, for a folder's file of this text encoder."""
    text = text_of(config, network)
    return {} if text.pooled else _copied(file, "text_model.encoder.layers.", text.layers)


def _made_layer(out: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """This layer as a copy of the one before it, for an original file of SDXL."""
    made: dict[str, Tensor] = {}
    for network, text in zip(config.text_names, config.text, strict=True):
        names, prefix = original_text(config, network)
        stem = prefix + {"clip": "encoder.layers.", "openclip": "transformer.resblocks."}[names]
        if not text.pooled and not any(key.startswith(f"{stem}{text.layers}.") for key in out):
            made |= _copied(out, stem, text.layers)
    return made


def _copied(out: Mapping[str, Tensor], stem: str, layers: int) -> dict[str, Tensor]:
    """The layer with this number as a copy of the one before it."""
    last = f"{stem}{layers - 1}."
    keys = [key for key in out if key.startswith(last)]
    return {f"{stem}{layers}.{key.removeprefix(last)}": out[key].clone() for key in keys}


def _before(network: str, key: str) -> str:
    """The prefix of a weight's name in transformers before 5.6."""
    return "text_model." if network.startswith("text_encoder") and key != "projection.weight" else ""


def diffusers_texts(config: Config) -> dict[str, str]:
    """The JSON and text files of a diffusers folder by their paths in it: configs and the tokenizer's tables."""
    configs: dict[str, dict[str, Any]] = to_diffusers_configs(config)
    texts = {path: json.dumps(content, indent=2) + "\n" for path, content in configs.items()}
    vocab, merges = Tokenizer().tables()
    for folder in text_folders(config):
        tokenizer = folder.replace("text_encoder", "tokenizer")
        texts[f"{tokenizer}/vocab.json"] = json.dumps(vocab, ensure_ascii=False) + "\n"
        texts[f"{tokenizer}/merges.txt"] = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    return texts
