"""Recipes: how an image was made, read from its file, whichever program wrote it.

    containers.py   the texts in PNG, JPEG, WebP and text files; hidden_texts.py: those in pixels
    infotext.py     the text of the web UI and of ours: prompt, negative prompt, pairs "key: value"
    webui.py        what its keys mean, in each of the programs that write it
    comfyui.py      ComfyUI's graph of nodes; comfyui_nodes.py: the nodes of it and of extensions,
                    comfyui_workflow.py: the graph as the editor saves it
    json_texts.py   Fooocus, InvokeAI; other_programs.py: NovelAI, Easy Diffusion, Draw Things, SwarmUI
    fields.py       setting <-> key: the table from which images are written and read
    recipe.py       what is found, as a value

>>> recipe = read_parameters("a red house\\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 5, Size: 512x768")
>>> recipe.request.prompt, recipe.request.params.seed, recipe.request.params.spacing, recipe.request.params.rng
(('a red house',), 5, 'karras', 'nv')
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ..imaging.files import ImageFileError, read_bytes
from ..messages import one_line
from .comfyui import is_graph, read_graph
from .comfyui_workflow import is_workflow, to_graph
from .containers import read_texts
from .fields import describe
from .hidden_texts import hidden_texts
from .infotext import written
from .json_texts import load_json, mapping, read_dream, read_fooocus, read_invokeai, read_sd_metadata
from .other_programs import easy_lines, read_draw_things, read_easy_diffusion, read_novelai, read_swarm, xmp_json
from .recipe import Addon, Recipe
from .webui import read_parameters

__all__ = ["Addon", "Recipe", "describe", "read_parameters", "read_request", "written"]

# the keywords of settings; where there are none of them, the pixels are looked at
KEYWORDS = {
    "parameters", "prompt", "workflow", "invokeai_metadata", "sd-metadata", "Dream", "Comment", "XML:com.adobe.xmp",
}  # fmt: skip
SETTINGS = re.compile(r"^Steps: \d+, (?:Sampler|Size|Seed|CFG scale|Schedule type): ", re.MULTILINE)
NOTHING = (
    "no generation settings found: the image was saved without metadata (--no-metadata), a program or website removed "
    "them, or it is a grid of images"
)


def read_request(path: str | os.PathLike[str]) -> Recipe:
    """Read how an image was made from its file: PNG, JPEG or WebP; a .txt file with the text of the web UI or of
    Easy Diffusion; or a .json file of ComfyUI (API format, or as the editor saves it) or of Easy Diffusion.

    Programs: this one, AUTOMATIC1111's web UI, Forge, SD.Next, ComfyUI, InvokeAI, Fooocus, SwarmUI, Draw Things, Easy
    Diffusion, NovelAI. `Recipe.notes` says what cannot be reproduced. Nothing in the file is executed, and no other
    file is read.

    Raises ImageFileError, a ValueError whose message is one line, if the file cannot be read or has no settings.
    """
    texts = read_texts(path)
    if not texts.keys() & KEYWORDS and Path(path).suffix.lower() not in (".txt", ".json"):
        texts |= hidden_texts(read_bytes(path))
    try:
        return _recipe(texts)
    except ValueError as error:
        raise ImageFileError(f"{path}: {one_line(error, 300)}") from None


def _graph(values: dict[str, Any]) -> Recipe:
    """The recipe in a graph of ComfyUI, or in a workflow of its editor."""
    if is_workflow(values):
        values = to_graph(values)
    elif {"num_inference_steps", "guidance_scale"} <= values.keys():
        return read_easy_diffusion(values)
    elif is_graph(mapping(values.get("prompt"))):  # as it is sent to ComfyUI
        values = values["prompt"]
    elif not is_graph(values):
        raise ValueError("its JSON is not a ComfyUI graph")
    return read_graph(values)


def _recipe(texts: dict[str, str]) -> Recipe:
    parameters, graph = texts.get("parameters", "").strip("\0"), texts.get("prompt", "").strip()
    if parameters.lstrip().startswith("{") and "Steps: " not in parameters:
        values = load_json(parameters)
        if is_graph(values) or is_graph(mapping(values.get("prompt"))) or is_workflow(values):
            return _graph(values)
        if "sui_image_params" in values:
            return read_swarm(mapping(values["sui_image_params"]))
        if {"c", "seed", "sampler"} <= values.keys():
            return read_draw_things(values)
        if "fooocus_scheme" in texts or {"guidance_scale", "base_model"} & values.keys():
            return read_fooocus(values)
        raise ValueError(f"settings in JSON of an unknown program ({one_line(', '.join(values))})")
    if lines := easy_lines(parameters):
        return read_easy_diffusion(lines)
    if parameters.strip():
        try:
            return read_parameters(parameters, "ComfyUI" if graph.startswith("{") else "the web UI")
        except ValueError:
            if not (graph or texts.keys() & {"invokeai_metadata", "sd-metadata", "Dream"}):
                raise
    for name, read in (("invokeai_metadata", read_invokeai), ("sd-metadata", read_sd_metadata)):
        if name in texts:
            return read(load_json(texts[name]))
    if "Dream" in texts:
        return read_dream(texts["Dream"])
    if graph.startswith("{"):
        return _graph(load_json(graph))
    if texts.get("workflow", "").lstrip().startswith("{"):
        return _graph(load_json(texts["workflow"]))
    if "num_inference_steps" in texts and "guidance_scale" in texts:
        return read_easy_diffusion(texts)
    if texts.get("Software") == "NovelAI" and "Comment" in texts:
        return read_novelai(texts)
    if text := next((text for text in texts.values() if SETTINGS.search(text)), ""):  # under another keyword
        return read_parameters(text)
    if found := xmp_json(texts.get("XML:com.adobe.xmp", "")):
        return read_draw_things(load_json(found))
    raise ValueError(NOTHING)
