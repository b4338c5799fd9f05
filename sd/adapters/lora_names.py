"""The names that LoRA files use for the layers of a model: generated from the key maps and looked up, not parsed.

A layer has a path in diffusers' modules, one in the original's, and a place in cloneofsimo's count. Each tool writes
one of them in its own way, after prefixes of its own:

    kohya          lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q, lora_te_text_model_encoder_...;
                   for SDXL lora_te1_, lora_te2_, and the original's paths, lora_unet_input_blocks_4_1_...
    LyCORIS        lycoris_ in place of lora_unet_
    OneTrainer     lora_unet.down_blocks.0..., lora_te.text_model...
    diffusers      unet.down_blocks.0..., text_encoder.text_model..., text_encoder_2.text_model...;
                   also ...attn1.processor.to_q_lora
    PEFT           base_model.model.down_blocks.0...
    ComfyUI        diffusion_model.input_blocks.1.1..., text_encoders.clip_l.transformer.text_model..., clip_l....,
                   clip_g....
    torch.compile  _orig_mod. at any place
    cloneofsimo    unet:0, text_encoder:7: the linear layers of attentions, counted

So names are compared without these prefixes, and with "_" in place of every dot and colon. Layers of SDXL's two text
encoders have the same paths, and only the prefixes tell them apart: a text encoder without a number is the first.

>>> from sd.config import SD1
>>> names = LayerNames(SD1, [("unet", "mid.attn.blocks.0.attn1.out"), ("text_encoder", "blocks.5.fc2")])
>>> names.find("lora_unet_middle_block_1_transformer_blocks_0_attn1_to_out_0")
('unet', 'mid.attn.blocks.0.attn1.out')
>>> names.find("clip_l.text_model.encoder.layers.5.mlp.fc2")
('text_encoder', 'blocks.5.fc2')
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain

from ..checkpoints.key_maps import UNET, diffusers_sources, original_sources
from ..config import Config

Layer = tuple[str, str]  # network ("unet", "text_encoder", "text_encoder_2") and our name of a layer in it

# Prefix that a tool puts before a path -> the network that it stands for; TEXT is any text encoder.
TEXT = "text"
PREFIXES = {
    "lora_": None, "lycoris_": None, "base_model_": None, "model_": None, "module_": None,
    "unet_": "unet", "diffusion_model_": "unet",
    **dict.fromkeys(("te_", "text_encoder_", "text_encoders_", "clip_h_", "clip_", "transformer_", "cond_stage_model_",
                     "text_model_"), TEXT),
}  # fmt: skip
# Those of OpenAI's ViT-L/14, and of SDXL's second text encoder, OpenCLIP's ViT-bigG/14.
FIRST_PREFIXES = ("te1_", "clip_l_")
SECOND_PREFIXES = ("te2_", "text_encoder_2_", "clip_g_")
COMPILED = "_orig_mod_"
# In attention processors of diffusers before PEFT, the layers of an attention have other names.
PROCESSORS = {
    "to_q": ("processor_to_q",),
    "to_k": ("processor_to_k",),
    "to_v": ("processor_to_v",),
    "to_out_0": ("to_out", "processor_to_out", "processor_to_out_0"),
    "q_proj": ("to_q",),
    "k_proj": ("to_k",),
    "v_proj": ("to_v",),
    "out_proj": ("to_out",),
}
AFTER_PATH = ("_lora_linear_layer", "_lora", "_lora_A", "_lora_down")  # what diffusers appends

NUMBERED = re.compile(r"(unet|text_encoder):(\d{1,5}):(up|down|alpha)")
# The linear layers of a transformer block in the order of diffusers' modules in 2022, and from 2023 on.
ATTENTION = ("q", "k", "v", "out")
ORDERS = (("attn1", "ff", "attn2"), ("attn1", "attn2", "ff"))
RESBLOCK = ("conv1", "time", "conv2", "skip")  # not every block has a skip layer
CLASSES = {"unet": frozenset({"CrossAttention", "Attention", "GEGLU"}), "text_encoder": frozenset({"CLIPAttention"})}
MAX_CLASSES = 1000  # characters of their list in a file's metadata


def flat(name: str) -> str:
    """A name with "_" in place of dots and colons, and without torch.compile's prefix."""
    return re.sub("[.:]", "_", name).replace(COMPILED, "")


def prefixes_of(config: Config) -> dict[str, str | None]:
    """The prefixes of paths in LoRA files for a model, and the network that each stands for.

    The only text encoder of SDXL's refiner is SDXL's second one, and has its prefixes.
    """
    first = {} if config.is_refiner else dict.fromkeys(FIRST_PREFIXES, config.text_names[0])
    second = dict.fromkeys(SECOND_PREFIXES, config.text_names[-1]) if config.sizes else {}
    return {**PREFIXES, **first, **second}


class LayerNames:
    """Finds layers by the names that LoRA files use for them."""

    def __init__(self, config: Config, layers: Iterable[Layer]) -> None:
        keys: dict[str, list[str]] = {network: [] for network in config.networks}
        for network, layer in layers:
            keys[network].append(f"{layer}.weight")
        try:
            diffusers = diffusers_sources(config, keys)
            original = original_sources(config, {**keys, **{network: [] for network in config.text_names}})
        except KeyError as error:
            raise ValueError(
                f"the network has a layer {error.args[0]!r} that does not belong to this model, so no LoRA can be "
                "merged: use the plain network, without wrappers or added layers"
            ) from None
        self.first_text = config.text_names[0]
        self.prefixes = prefixes_of(config)
        self.longest_first = sorted(self.prefixes, key=len, reverse=True)
        self.paths: dict[str, dict[str, Layer]] = {}  # flat path -> network -> layer
        for network, theirs in chain(diffusers.items(), original.items()):
            for key, source in theirs.items():
                path = source.key.removesuffix(".weight").removeprefix(UNET)
                for name in _ways(flat(path).removeprefix("text_model_")):
                    self.paths.setdefault(name, {})[network] = network, key.removesuffix(".weight")

    def find(self, name: str) -> Layer | None:
        """The layer of this name, without the ending that says which part of an adapter a tensor is."""
        name = flat(name)
        for end in AFTER_PATH:
            name = name.removesuffix(end)
        network = None
        while name not in self.paths:
            prefix = next((prefix for prefix in self.longest_first if name.startswith(prefix)), None)
            if prefix is None or not _agree(network, meant := self.prefixes[prefix]):
                return None
            network = meant if network is None or (network == TEXT and meant) else network
            name = name.removeprefix(prefix)
        found = self.paths[name]
        if network is None:
            network = "unet" if "unet" in found else TEXT
        return found.get(self.first_text if network == TEXT else network)


def _agree(one: str | None, other: str | None) -> bool:
    """Whether two prefixes can stand for the same network."""
    if one is None or other is None or one == other:
        return True
    return TEXT in (one, other) and "unet" not in (one, other)


def _ways(path: str) -> Iterator[str]:
    """The ways in which diffusers has written a path."""
    yield path
    for layer, others in PROCESSORS.items():
        if path.endswith(f"_{layer}"):
            yield from (path.removesuffix(layer) + other for other in others)


def numbered_layers(config: Config, layers: Collection[Layer], metadata: Mapping[str, str]) -> list[dict[str, Layer]]:
    """The layers as cloneofsimo's files count them, "unet:0", in each of the orders that there have been.

    layers     all of the model
    metadata   of the file: names the classes of modules whose layers were counted
    """
    classes = {network: _classes(metadata.get(network), usual) for network, usual in CLASSES.items()}
    text = [f"blocks.{i}.attn.{name}" for i in range(config.text[0].layers) for name in ("k", "v", "q", "out")]
    found = []
    for order in ORDERS:
        counted = {
            "unet": _counted_unet(config, order, classes["unet"]),
            "text_encoder": text if "CLIPAttention" in classes["text_encoder"] else [],
        }
        table: dict[str, Layer] = {}
        for network, names in counted.items():
            there = [(network, name) for name in names if (network, name) in layers]
            table |= {f"{network}:{i}": layer for i, layer in enumerate(there)}
        found.append(table)
    return found


def _counted_unet(config: Config, order: tuple[str, ...], classes: frozenset[str]) -> Iterator[str]:
    """Our names of the counted layers, some of which may not exist: down, up, and then the middle, as in diffusers."""
    cfg = config.unet
    leaves = []
    for part in order:
        if part == "ff":
            leaves += ["ff.proj"] if "GEGLU" in classes else []
        elif classes & {"CrossAttention", "Attention"}:
            leaves += [f"{part}.{name}" for name in ATTENTION]
    levels = range(len(cfg.channels))
    blocks = [(f"down.{i}", cfg.depth[i], cfg.blocks) for i in levels]
    blocks += [(f"up.{i}", cfg.depth[i], cfg.blocks + 1) for i in reversed(levels)]
    blocks += [] if cfg.middle_depth is None else [("mid", cfg.middle_depth, 1)]
    for name, depth, count in blocks:
        for i in range(count):
            place = "mid.attn" if name == "mid" else f"{name}.attn.{i}"
            yield from (f"{place}.blocks.{block}.{leaf}" for block in range(depth) for leaf in leaves)
        if "ResnetBlock2D" in classes:
            for i in range(2 if name == "mid" else count):
                yield from (f"{name}.res.{i}.{leaf}" for leaf in RESBLOCK)


def _classes(text: str | None, usual: frozenset[str]) -> frozenset[str]:
    """The classes that a file names, as JSON; those that were usual if it names none."""
    try:
        found = json.loads(text) if text is not None and len(text) <= MAX_CLASSES else None
    except (ValueError, RecursionError):
        found = None
    return frozenset(map(str, found)) if isinstance(found, list) else usual
