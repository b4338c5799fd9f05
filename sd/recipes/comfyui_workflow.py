"""ComfyUI's workflow, as its editor saves it, turned into the graph that comfyui.py reads.

    {"nodes": [{"id", "type", "mode", "inputs": [{"name", "link"}], "outputs", "widgets_values"}, ...],
     "links": [[link, from node, from output, to node, to input, type], ...]}

The values of a node are a list without names. They come from `WIDGETS` for common nodes, and from the node itself in
files of later editors. Nodes that are muted (mode 2) are taken out; those that are bypassed (mode 4) and those that
only pass something on (Reroute, PrimitiveNode, SetNode and GetNode) are replaced by what they are linked to.

>>> node = {"id": 1, "type": "CLIPTextEncode", "inputs": [{"name": "clip", "link": None}], "widgets_values": ["a cat"]}
>>> to_graph({"nodes": [node], "links": []})
{'1': {'class_type': 'CLIPTextEncode', 'inputs': {'text': 'a cat'}}}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .comfyui_nodes import MAX_NODES

MAX_HOPS = 50
MUTED, BYPASSED = 2, 4
CONTROL = "control_after_generate"  # a value without an input, after each seed
CONTROLS = ("fixed", "increment", "decrement", "randomize")
SEEDS = ("seed", "noise_seed")
SAMPLING = ("steps", "cfg", "sampler_name", "scheduler")
LORA = ("lora_name", "strength_model", "strength_clip")
WIDGETS = {
    "KSampler": ("seed", CONTROL, *SAMPLING, "denoise"),
    "KSampler (Efficient)": ("seed", CONTROL, *SAMPLING, "denoise", "preview_method", "vae_decode"),
    "KSamplerAdvanced": (
        "add_noise", "noise_seed", CONTROL, *SAMPLING, "start_at_step", "end_at_step", "return_with_leftover_noise",
    ),
    "SamplerCustom": ("add_noise", "noise_seed", CONTROL, "cfg"),
    "RandomNoise": ("noise_seed", CONTROL),
    "KSamplerSelect": ("sampler_name",),
    "BasicScheduler": ("scheduler", "steps", "denoise"),
    "KarrasScheduler": ("steps", "sigma_max", "sigma_min", "rho"),
    "CFGGuider": ("cfg",),
    "CLIPTextEncode": ("text",),
    "CLIPSetLastLayer": ("stop_at_clip_layer",),
    "CheckpointLoaderSimple": ("ckpt_name",),
    "CheckpointLoader": ("config_name", "ckpt_name"),
    "UNETLoader": ("unet_name", "weight_dtype"),
    "VAELoader": ("vae_name",),
    "LoraLoader": LORA,
    "LoraLoaderModelOnly": LORA[:2],
    "EmptyLatentImage": ("width", "height", "batch_size"),
    "LatentUpscale": ("upscale_method", "width", "height", "crop"),
    "LatentUpscaleBy": ("upscale_method", "scale_by"),
    "ImageScale": ("upscale_method", "width", "height", "crop"),
    "ImageScaleBy": ("upscale_method", "scale_by"),
    "RescaleCFG": ("multiplier",),
    "LoadImage": ("image",),
    "Efficient Loader": (
        "ckpt_name", "vae_name", "clip_skip", "lora_name", "lora_model_strength", "lora_clip_strength", "positive",
        "negative", "token_normalization", "weight_interpretation", "empty_latent_width", "empty_latent_height",
        "batch_size",
    ),
}  # fmt: skip


class Link(NamedTuple):
    """Where a link comes from."""

    node: str
    output: int


def is_workflow(values: Mapping[str, Any]) -> bool:
    """Whether a JSON object is such a workflow."""
    nodes = values.get("nodes")
    return isinstance(nodes, list) and any(isinstance(node, dict) and "type" in node for node in nodes)


def to_graph(values: Mapping[str, Any]) -> dict[str, Any]:
    """The graph of a workflow: node -> class and inputs. Raises ValueError if it is too large."""
    found = [node for node in values["nodes"] if isinstance(node, dict) and isinstance(node.get("type"), str)]
    if len(found) > MAX_NODES:
        raise ValueError(f"its workflow has {len(found)} nodes, more than {MAX_NODES}")
    return _Workflow({str(node.get("id")): node for node in found}, _links(values.get("links"))).graph()


def _links(values: object) -> dict[object, Link]:
    """The links by their numbers; early editors write lists, later ones objects."""
    found: dict[object, Link] = {}
    for entry in values[: 10 * MAX_NODES] if isinstance(values, list) else ():
        if isinstance(entry, dict):
            entry = [entry.get(name) for name in ("id", "origin_id", "origin_slot")]
        if isinstance(entry, list) and len(entry) >= 3:
            number, node, output = entry[:3]
            if isinstance(number, int) and isinstance(output, int) and output >= 0:
                found[number] = Link(str(node), output)
    return found


class _Workflow:
    def __init__(self, nodes: dict[str, dict[str, Any]], links: dict[object, Link]) -> None:
        self.nodes, self.links = nodes, links
        self.sets = {
            _first_value(node): key for key, node in nodes.items() if node["type"] == "SetNode" and _first_value(node)
        }

    def graph(self) -> dict[str, Any]:
        """The graph: node -> class and inputs, without the nodes that do nothing."""
        graph: dict[str, Any] = {}
        for key, node in self.nodes.items():
            if node.get("mode") in (MUTED, BYPASSED) or node["type"] in ("Reroute", "PrimitiveNode", "Note"):
                continue
            inputs = _values(node)
            for entry in _slots(node):
                if (found := self.source(entry.get("link"))) is not None:
                    inputs[str(entry.get("name"))] = found
            graph[key] = {"class_type": node["type"], "inputs": inputs}
        return graph

    def source(self, number: object) -> Any:
        """What a link leads to: a value, or [node, output]; None if it leads nowhere."""
        for _ in range(MAX_HOPS):
            link = self.links.get(number) if isinstance(number, int) else None
            node = self.nodes.get(link.node) if link is not None else None
            if link is None or node is None or node.get("mode") == MUTED:
                return None
            if node["type"] == "PrimitiveNode":
                return _first_value(node)
            slots = _slots(node)
            if node["type"] == "GetNode":
                slots = _slots(self.nodes.get(self.sets.get(_first_value(node), ""), {}))
            elif node.get("mode") == BYPASSED:
                slots = _bypass(node, link.output)
            elif node["type"] not in ("Reroute", "SetNode"):
                return [link.node, link.output]
            number = slots[0].get("link") if slots else None
        return None


def _bypass(node: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
    """The inputs that leave a bypassed node at this output: that at the same place, or the first of the same type."""
    slots, outputs = _slots(node), node.get("outputs")
    output = outputs[number] if isinstance(outputs, list) and number < len(outputs) else {}
    kind = output.get("type") if isinstance(output, dict) else None
    if number < len(slots) and slots[number].get("type") == kind:
        return [slots[number]]
    return [slot for slot in slots if slot.get("type") == kind and slot.get("link") is not None]


def _slots(node: Mapping[str, Any]) -> list[dict[str, Any]]:
    slots = node.get("inputs")
    return [slot for slot in slots[:1000] if isinstance(slot, dict)] if isinstance(slots, list) else []


def _first_value(node: Mapping[str, Any]) -> Any:
    """The first value of a node, if it is a text or a number."""
    values = node.get("widgets_values")
    value = values[0] if isinstance(values, list) and values else None
    return value if isinstance(value, str | int | float) else None


def _values(node: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a node by the names of its inputs."""
    values = node.get("widgets_values")
    if isinstance(values, dict):
        return {str(name): value for name, value in list(values.items())[:1000] if not isinstance(value, list)}
    if not isinstance(values, list):
        return {}
    names = list(WIDGETS.get(node["type"], ()))
    if not names:
        own = [slot["widget"].get("name") for slot in _slots(node) if isinstance(slot.get("widget"), dict)]
        for name in own:
            names.append(str(name))
            if name in SEEDS and len(values) > len(names) and values[len(names)] in CONTROLS:
                names.append(CONTROL)
    found = {name: value for name, value in zip(names, values, strict=False) if not isinstance(value, list)}
    rows = [
        value for value in values[:1000] if isinstance(value, dict) and "lora" in value
    ]  # rgthree's Power Lora Loader
    return found | {f"lora_{i}": value for i, value in enumerate(rows, start=1)}
