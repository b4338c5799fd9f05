"""Recipes: how an image was made, read from its file, whichever program wrote it.

    containers.py   the texts in PNG, JPEG, WebP and text files; hidden_texts.py: those in pixels
    infotext.py     the text of the web UI and of ours: prompt, negative prompt, pairs "key: value"
    webui.py        what its keys mean, in each of the programs that write it
    comfyui.py      ComfyUI's graph of nodes; comfyui_nodes.py: the nodes of it and of extensions,
                    comfyui_workflow.py: the graph as the editor saves it
    json_texts.py   Fooocus, InvokeAI; other_programs.py: NovelAI, Easy Diffusion, Draw Things, SwarmUI
    control_entries.py  the control networks in the text of the web UI
    fields.py       setting <-> key: the table from which images are written and read
    recipe.py       what is found, as a value

>>> recipe = read_parameters("a red house\\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 5, Size: 512x768")
>>> recipe.request.prompt, recipe.request.params.seed, recipe.request.params.spacing, recipe.request.params.rng
(('a red house',), 5, 'karras', 'nv')
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..imaging.files import ImageFileError, read_bytes
from ..messages import one_line
from .comfyui import is_graph, read_graph
from .comfyui_workflow import is_workflow, to_graph
from .containers import image_texts, read_texts
from .control_entries import written_controls
from .fields import describe
from .hidden_texts import hidden_texts
from .infotext import written
from .json_texts import load_json, mapping, read_dream, read_fooocus, read_invokeai, read_sd_metadata
from .other_programs import easy_lines, read_draw_things, read_easy_diffusion, read_novelai, read_swarm, xmp_json
from .recipe import Addon, ControlUse, Recipe
from .webui import read_parameters

__all__ = [
    "Addon",
    "ControlUse",
    "Recipe",
    "describe",
    "read_parameters",
    "read_request",
    "read_request_bytes",
    "written",
    "written_controls",
]

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
    return _read(read_texts(path), lambda: _hidden(path), str(path))


def read_request_bytes(data: bytes, name: str = "image") -> Recipe:
    """The same from the contents of an image file, called `name` in errors."""
    return _read(image_texts(data, name), lambda: hidden_texts(data), name)


def _read(texts: Mapping[str, str], hidden: Callable[[], Mapping[str, str]], name: str) -> Recipe:
    """The recipe in these texts, or else in those hidden in pixels."""
    try:
        try:
            return _recipe(texts)
        except ValueError:
            if not (others := hidden()):
                raise
            return _recipe(others)
    except ValueError as error:
        raise ImageFileError(f"{name}: {one_line(error, 300)}") from None


def _hidden(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts in the pixels of a file; none of a text, or if the file can no longer be read."""
    try:
        return hidden_texts(read_bytes(path))
    except (OSError, ImageFileError):
        return {}


def _recipe(texts: Mapping[str, str]) -> Recipe:
    """The recipe in the first of these texts that has one.

    A text that looks like that of one program may be a prompt of another: if it cannot be read, the others are. Raises
    ValueError, with what is wrong with the first text, if none can.
    """
    failure = ValueError(NOTHING)
    for read in _readers(texts):
        try:
            return read()
        except ValueError as error:
            failure = failure if str(failure) != NOTHING else error
    raise failure


def _readers(texts: Mapping[str, str]) -> Iterator[Callable[[], Recipe]]:
    """How the texts may be read, the most likely way first."""
    parameters, graph = texts.get("parameters", "").strip("\0"), texts.get("prompt", "").strip()
    if parameters.strip():
        program = "ComfyUI" if graph.startswith("{") else "the web UI"
        yield lambda: _from_parameters(parameters, program, "fooocus_scheme" in texts)
    if (text := texts.get("invokeai_metadata")) is not None:
        yield lambda: read_invokeai(load_json(text))
    if (old := texts.get("sd-metadata")) is not None:
        yield lambda: read_sd_metadata(load_json(old))
    if "Dream" in texts:
        yield lambda: read_dream(texts["Dream"])
    if graph.startswith("{"):
        yield lambda: _from_json(load_json(graph))
    if (workflow := texts.get("workflow", "")).lstrip().startswith("{"):
        yield lambda: _from_json(load_json(workflow))
    if "num_inference_steps" in texts and "guidance_scale" in texts:
        yield lambda: read_easy_diffusion(texts)
    if texts.get("Software") == "NovelAI" and "Comment" in texts:
        yield lambda: read_novelai(texts)
    others = (text for name, text in texts.items() if name != "parameters")
    if found := next((text for text in others if SETTINGS.search(text)), ""):  # under another keyword
        yield lambda: read_parameters(found)
    if packet := xmp_json(texts.get("XML:com.adobe.xmp", "")):
        yield lambda: _from_json(load_json(packet))


def _from_parameters(text: str, program: str, fooocus: bool) -> Recipe:
    """The recipe in "parameters", which many programs write: JSON, lines, or the text of the web UI by `program`."""
    if text.lstrip().startswith("{"):
        try:
            values = load_json(text)
        except ValueError:
            if "Steps: " not in text:
                raise  # else it may be a prompt that begins with a bracket
        else:
            return read_fooocus(values) if fooocus else _from_json(values)
    lines = easy_lines(text)
    return read_easy_diffusion(lines) if lines else read_parameters(text, program)


def _from_json(values: dict[str, Any]) -> Recipe:
    """The recipe in a JSON object, whichever program wrote it and wherever it stands. Raises ValueError."""
    if is_workflow(values):
        return read_graph(to_graph(values))
    if is_graph(values) or is_graph(mapping(values.get("prompt"))):  # the second as it is sent to ComfyUI
        return read_graph(values if is_graph(values) else values["prompt"])
    if "sui_image_params" in values:
        return read_swarm(mapping(values["sui_image_params"]))
    if {"c", "seed", "sampler"} <= values.keys():
        return read_draw_things(values)
    if {"num_inference_steps", "guidance_scale"} <= values.keys():
        return read_easy_diffusion(values)
    if {"guidance_scale", "base_model"} & values.keys():
        return read_fooocus(values)
    names = one_line(", ".join(values)) or "none"
    raise ValueError(f"its JSON is neither a ComfyUI graph nor the settings of a known program (its keys: {names})")
