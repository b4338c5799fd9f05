"""Recipes: how an image was made, read from its file, whichever program wrote it.

    containers.py   the texts in PNG, JPEG, WebP and text files
    infotext.py     the text of the web UI and of ours: prompt, negative prompt, pairs "key: value"
    webui.py        what its keys mean, in each of the programs that write it
    comfyui.py      ComfyUI's graph of nodes
    json_texts.py   Fooocus, InvokeAI
    fields.py       setting <-> key: the table from which images are written and read
    recipe.py       what is found, as a value

>>> recipe = read_parameters("a red house\\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 5, Size: 512x768")
>>> recipe.request.prompt, recipe.request.params.seed, recipe.request.params.spacing, recipe.request.params.rng
(('a red house',), 5, 'karras', 'nv')
"""

from __future__ import annotations

import os

from ..imaging.files import ImageFileError
from .comfyui import is_graph, read_graph
from .containers import read_texts
from .fields import describe
from .infotext import written
from .json_texts import load_json, read_dream, read_fooocus, read_invokeai, read_sd_metadata
from .recipe import Addon, Recipe, shown
from .webui import read_parameters

__all__ = ["Addon", "Recipe", "describe", "read_parameters", "read_request", "written"]

NOTHING = (
    "no generation settings found: the image was saved without metadata (--no-metadata), or a program or website "
    "removed them"
)


def read_request(path: str | os.PathLike[str]) -> Recipe:
    """Read how an image was made, from its file: PNG, JPEG, WebP; or a .txt file with the text of the
    web UI, or a .json file with a graph of ComfyUI (API format).

    Programs: this one, AUTOMATIC1111's web UI, Forge, SD.Next, ComfyUI, InvokeAI, Fooocus. `Recipe.notes` says what
    cannot be reproduced. Nothing in the file is executed, and no other file is read.

    Raises ImageFileError, a ValueError whose message is one line, if the file cannot be read or has no settings.
    """
    texts = read_texts(path)
    try:
        return _recipe(texts)
    except ValueError as error:
        raise ImageFileError(f"{path}: {shown(error, 300)}") from None


def _recipe(texts: dict[str, str]) -> Recipe:
    parameters, graph = texts.get("parameters", "").strip(" \0"), texts.get("prompt", "").strip()
    if parameters.lstrip().startswith("{") and "Steps: " not in parameters:
        values = load_json(parameters)
        if is_graph(values):
            return read_graph(values)
        if "fooocus_scheme" in texts or {"guidance_scale", "base_model"} & values.keys():
            return read_fooocus(values)
        raise ValueError(f"settings in JSON of an unknown program ({shown(', '.join(values))})")
    if parameters:
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
        values = load_json(graph)
        if not is_graph(values):
            raise ValueError("its JSON is no graph of ComfyUI")
        return read_graph(values)
    if texts.get("Software") == "NovelAI":
        raise ValueError("written by NovelAI, whose settings are not read")
    raise ValueError(NOTHING)
