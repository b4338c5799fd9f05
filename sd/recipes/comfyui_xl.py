"""SDXL in ComfyUI's graphs: two texts and the sizes of CLIPTextEncodeSDXL, and a refiner as a second sampler.

    CLIPTextEncodeSDXL          text_l, text_g; width, height; crop_w, crop_h; target_width, target_height
    CLIPTextEncodeSDXLRefiner   text; width, height; ascore
    KSamplerAdvanced            end_at_step of the base, which leaves its noise, is start_at_step of the refiner, which
                                adds none

Sources: comfy_extras/nodes_clip_sdxl.py, comfy/model_base.py (SDXL, SDXLRefiner) and nodes.py of ComfyUI.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..messages import one_line
from .comfyui_nodes import LATENTS, Node
from .recipe import Draft, file_name

if TYPE_CHECKING:
    from .comfyui import Graph

ENCODERS = ("CLIPTextEncodeSDXL", "CLIPTextEncodeSDXLRefiner")
# our settings -> inputs of these nodes
SIZES = {
    "original_width": "width", "original_height": "height", "crop_left": "crop_w", "crop_top": "crop_h",
    "target_width": "target_width", "target_height": "target_height",
}  # fmt: skip
SCORES = {"positive": "aesthetic_score", "negative": "negative_aesthetic_score"}
SECOND = {"positive": "prompt_2", "negative": "negative_2"}
EMPTY_NEGATIVE = "Empty negative"  # entry of the recipe: "encoded" where no ConditioningZeroOut makes it zeros
ALIKE = ("cfg", "sampler_name", "scheduler")  # inputs in which a refiner has to agree with its base

Text = Callable[[str], str | None]  # name of an input -> its text


def read_encoder(draft: Draft, graph: Graph, node: Node, side: str) -> None:
    """Record the sizes that an encoder's node is given, unless they are those of the image.

    Here both prompts share them: if those of the negative prompt differ, a note says so.
    """
    if node.kind not in ENCODERS:
        return
    values = {name: graph.value(node, key) for name, key in SIZES.items()}
    for name, value in values.items():
        own = draft.settings.get(name.rpartition("_")[2]) if "crop" not in name else 0
        if value is None or value == draft.settings.get(name, own):
            continue
        if side == "positive":
            draft.put(name, value)
        else:
            draft.note(f"not reproduced: {one_line(SIZES[name])} {one_line(value)} of the negative prompt alone")
    if (score := graph.value(node, "ascore")) is not None:
        draft.put(SCORES[side], score, "ascore")


def read_texts(draft: Draft, node: Node, side: str, text: Text) -> str | None:
    """The text for the first encoder of a node with two texts; that for the second is recorded if it differs."""
    if node.kind != "CLIPTextEncodeSDXL":
        return None
    first, second = text("text_l"), text("text_g")
    if first is None or second is None:
        return first if second is None else second
    if first.strip() != second.strip():
        draft.put(SECOND[side], second)
    return first


def continued_at(graph: Graph, chain: Sequence[Node]) -> int | None:
    """The step at which the second sampler of a chain continues the first on the same noise levels; None if not."""
    if len(chain) < 2:
        return None
    first, second = chain[:2]
    steps, end = graph.value(first, "steps"), graph.value(first, "end_at_step")
    same = steps == graph.value(second, "steps") and end == graph.value(second, "start_at_step")
    direct = first.key in second.links(*LATENTS) and {first.kind, second.kind} == {"KSamplerAdvanced"}
    noisy = first.inputs.get("return_with_leftover_noise") in ("enable", True)  # else its last step removes all of it
    silent = second.inputs.get("add_noise") in ("disable", False) and _model(graph, second)
    if not (
        direct and same and noisy and silent and isinstance(steps, int) and isinstance(end, int) and 0 < end < steps
    ):
        return None
    return end


def read_refiner(draft: Draft, graph: Graph, chain: Sequence[Node], texts: Sequence[str]) -> None:
    """Record the model of the second sampler as the refiner, and note the settings in which that sampler differs.

    texts   the prompt and the negative prompt of the first sampler
    """
    first, second = chain[:2]
    others = [key for key in ALIKE if graph.value(first, key) != graph.value(second, key)]
    for key in others:
        draft.note(f"not reproduced: {key} {one_line(graph.value(second, key))} of the second sampler alone")
    for side, text in zip(("positive", "negative"), texts, strict=True):
        node = graph.first(second, (side,), *ENCODERS, "CLIPTextEncode")
        if node is None:
            continue
        if (score := graph.value(node, "ascore")) is not None:
            draft.put(SCORES[side], score, "ascore")
        for name in ("width", "height") if node.kind == "CLIPTextEncodeSDXLRefiner" else ():
            told, value = draft.settings.get(f"original_{name}", draft.settings.get(name)), graph.value(node, name)
            if value not in (None, told):
                draft.note(f"not reproduced: {name} {one_line(value)} of the refiner alone")
        own = next((found for key in ("text", "text_g") if (found := graph.text(node.inputs.get(key), side, key))), "")
        if own.strip() not in (text.strip(), draft.settings.get(SECOND[side], text).strip()):
            draft.note(f"not reproduced: the {side} prompt of the second sampler, {one_line(own)!r}")
    if (name := _model(graph, second)) != draft.model.name:  # else the same model takes all steps
        draft.put("refiner_from", graph.value(first, "end_at_step") / graph.value(first, "steps"))
        draft.info["Refiner"] = name


def _model(graph: Graph, sampler: Node) -> str:
    """The name of a sampler's model, "" if it is not known."""
    names = (_checkpoint(graph, node) for node in graph.upstream(sampler.links("model")))
    return file_name(next((name for name in names if name), ""))


def _checkpoint(graph: Graph, node: Node) -> Any:
    """The name of the file that a node loads, None for others."""
    return graph.value(node, "ckpt_name", "unet_name")
