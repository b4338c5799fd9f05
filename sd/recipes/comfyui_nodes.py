"""A node of ComfyUI's graph, and what the inputs of many kinds of nodes mean: LoRAs, texts, sizes.

Nodes of extensions are known by the names of their inputs, since many of them have the same ones:

    lora_name, strength_model                        ComfyUI's LoraLoader, Efficient Loader, easy-use, pysssss
    lora_name_1, lora_wt_1, model_weight_1           LoRA Stacker, CR LoRA Stack; "lora_count", "switch_1"
    lora_01, strength_01                             Lora Loader Stack (rgthree)
    lora_1: {"on", "lora", "strength"}               Power Lora Loader (rgthree)
    loras: [{"name", "strength", "active"}]          LoRA Manager
    populated_text, value, string, text, prompt      nodes that provide a text
    empty_latent_width, width, resolution            nodes that provide an empty latent

>>> node = Node("1", "Efficient Loader", {"lora_name": "ink.pt", "lora_model_strength": 0.7, "clip_skip": -2})
>>> lora_entries(node)
[('ink.pt', 0.7, None)]
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import TypeGuard

DRAWN = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
PIPES = ("pipe", "basic_pipe", "detailer_pipe", "base_ctx", "context")  # inputs that carry several things at once
IMAGES = ("image", "images", "pixels")
LATENTS = ("latent_image", "latent", "samples")  # inputs of a sampler
TEXTS = ("populated_text", "value", "string", "text", "prompt", "String", "Text", "Value", "text_0")
MAX_NODES = 5000  # of a graph

# (name of the LoRA, weight in the U-Net, weight in the text encoder), as they are written
Entry = tuple[str, Any, Any]


class Node:
    """A node of the graph: its class and inputs."""

    def __init__(self, key: str, kind: str, inputs: dict[str, Any]) -> None:
        self.key, self.kind, self.inputs = key, kind, inputs

    def links(self, *names: str) -> list[str]:
        """The nodes that these inputs are linked to, or all inputs if there are no names."""
        values = [self.inputs.get(name) for name in names] if names else list(self.inputs.values())
        return [str(value[0]) for value in values if is_link(value)]

    def above(self) -> list[str]:
        """The nodes that its picture comes from: none of a sampler, of a composition what lies underneath."""
        under = self.links("samples_to", "destination")
        return [] if self.samples else under or self.links()

    def before(self) -> list[str]:
        """The nodes that the picture comes from which a sampler continues."""
        return self.links(*LATENTS) or self.links(*PIPES) or self.links(*IMAGES)

    @property
    def samples(self) -> bool:
        """Whether it is a sampler, of ComfyUI or with the same inputs."""
        return self.kind in DRAWN or {"steps", "cfg", "sampler_name"} <= self.inputs.keys()

    def encodes(self, side: str) -> bool:
        """Whether it turns a text into the conditioning `side`, "positive" or "negative"."""
        if self.kind.startswith("CLIPTextEncode") or isinstance(self.inputs.get(side), str):
            return True
        if "ckpt_name" in self.inputs and side in self.inputs:  # a loader whose prompt comes from another node
            return True
        return "clip" in self.inputs and any(name in self.inputs for name in ("text", "prompt", "populated_text"))

    def conditioning(self, side: str) -> list[str]:
        """The nodes that the conditioning `side` comes from, of a node that passes it on."""
        if side in self.inputs:
            return self.links(side)
        others = [name for name in self.inputs if re.match(r"conditioning|cond|positive|negative|$", name)]
        return self.links(*others) if any(is_link(self.inputs[name]) for name in others) else self.links()


def is_link(value: object) -> TypeGuard[list[Any]]:
    """Whether an input is the output of another node."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int) and isinstance(value[1], int)


def plain(value: Any) -> Any:
    """A value of an input; some extensions wrap it: {"content": ...}."""
    return value.get("content") if isinstance(value, dict) else value


def _rows(inputs: dict[str, Any]) -> Iterator[Entry]:
    """The LoRAs of a node that has several, in rows of numbered inputs."""
    count = inputs.get("lora_count", inputs.get("num_loras"))
    simple = inputs.get("input_mode", inputs.get("mode")) == "simple"
    for name, value in list(inputs.items())[:1000]:
        found = re.fullmatch(r"lora_(?:name_)?0*(\d{1,3})(?:_name)?", name, re.ASCII)
        if found is None:
            continue
        i = found[1]
        if isinstance(value, dict):
            if value.get("on") is True and isinstance(value.get("lora"), str):
                yield value["lora"], value.get("strength", 1.0), value.get("strengthTwo")
            continue
        off = str(inputs.get(f"switch_{i}", "On")).lower() == "off"
        if off or (isinstance(count, int) and int(i) > count) or not isinstance(value, str):
            continue
        first = ("lora_wt_{}", "lora_{}_strength") if simple else ("model_str_{}", "lora_{}_model_strength")
        model = (*first, "model_weight_{}", "strength_{}", "strength_0{}", "lora_wt_{}", "model_str_{}")
        clip = () if simple else ("clip_weight_{}", "clip_str_{}", "lora_{}_clip_strength")
        yield value, _first(inputs, model, i, 1.0), _first(inputs, clip, i, None)


def _first(inputs: dict[str, Any], names: tuple[str, ...], i: str, default: Any) -> Any:
    return next((inputs[key] for name in names if (key := name.format(i)) in inputs), default)


def lora_entries(node: Node) -> list[Entry]:
    """The LoRAs that a node merges, without those that are switched off."""
    inputs = node.inputs
    found = list(_rows(inputs))
    if isinstance(name := plain(inputs.get("lora_name")), str):
        model = next((inputs[key] for key in ("strength_model", "lora_model_strength", "strength") if key in inputs), 1)
        clip = next((inputs[key] for key in ("strength_clip", "lora_clip_strength") if key in inputs), None)
        found.append((name, model, clip))
    listed = inputs.get("loras")
    listed = listed.get("__value__") if isinstance(listed, dict) else listed
    for entry in listed if isinstance(listed, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("name"), str) and entry.get("active") is not False:
            found.append((entry["name"], entry.get("strength", 1.0), entry.get("clipStrength")))
    return [entry for entry in found if entry[0] not in ("", "None")]


def reads_tags(node: Node) -> bool:
    """Whether a node merges the LoRAs that tags in its text name; for all others, tags are text."""
    return bool(re.search(r"wildcard|lora.?tag|loramanager|lora manager", node.kind, re.IGNORECASE))
