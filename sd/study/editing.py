"""Prompt-to-prompt: edit an image by editing its prompt, with the attention of the original run.

Hertz et al. 2022, "Prompt-to-prompt image editing with cross attention control". Attention determines the layout of an
image. Source and target prompt run in one batch from the same noise, and the target uses the attention weights of the
source where the prompts agree, so that it shows different things in the same layout:

    replace    "a red house" -> "a blue house": each token of the target uses the weights of its partner in the source
    refine     added words keep their own weights; all other tokens use those of the source
    reweight   the weights of a word times a factor, for more or less of it
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..params import SamplingParams
from ..pipeline import StableDiffusion
from .attention import Call, watching
from .drawing import above, figure, strip
from .runs import SETTINGS, last, run
from .text import find_word

CROSS, OWN = 0.8, 0.3  # share of the run, from its start, that uses the source's cross- and self-attention
# positions of the finest layer whose self-attention is replaced: finer layers hold texture, not layout (their code:
# 16x16)
FINEST = 32 * 32


class Edited(NamedTuple):
    """The source image, the target's image without editing, and the target's image with the source's attention."""

    source: Image.Image
    alone: Image.Image
    edited: Image.Image


def partners(source: list[int], target: list[int]) -> list[int | None]:
    """For each token of the target, the position of its partner in the source; None for an added token.

    Equal runs of tokens are paired. So are different runs of equal length between them: those are replaced words.

    >>> partners([1, 10, 20, 2], [1, 10, 30, 2])
    [0, 1, 2, 3]
    >>> partners([1, 20, 2], [1, 10, 20, 2])
    [0, None, 1, 2]
    """
    pairs: list[int | None] = [None] * len(target)
    for _, a, a_end, b, b_end in SequenceMatcher(None, source, target, autojunk=False).get_opcodes():
        if a_end - a == b_end - b:
            pairs[b:b_end] = range(a, a_end)
    return pairs


def replace_weights(weights: Tensor, pairs: list[int | None]) -> Tensor:
    """Cross-attention (2, heads, N, M) of source and target -> the target's (heads, N, M), from the source at pairs."""
    source, target = weights
    known = [(j, partner) for j, partner in enumerate(pairs) if partner is not None]
    target = target.clone()
    target[..., [j for j, _ in known]] = source[..., [partner for _, partner in known]]
    return target


def prompt_to_prompt(
    model: StableDiffusion,
    source: str,
    target: str,
    settings: SamplingParams = SETTINGS,
    *,
    cross: float = CROSS,
    own: float = OWN,
    factors: Mapping[str, float] | None = None,
) -> Edited:
    """Generate the target's image in the layout of the source's image.

    cross    share of the run, 0 to 1, in which the target uses the source's cross-attention
    own      the same for self-attention: more of it preserves shapes and background, less permits other shapes
    factors  words of the target, each with a factor for its attention during the whole run
    """
    for name, share in (("cross", cross), ("own", own)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is a share of the run, from 0 to 1, got {share}")
    ids = model.tokenizer([source, target]).tolist()
    pairs = partners(*ids)
    scale = torch.ones(len(ids[1]), device=model.device)
    for word, factor in (factors or {}).items():
        scale[find_word(model.tokenizer, target, word)] = factor
    now = {"t": 0.0}

    def before(unet: object, args: tuple[Tensor, ...]) -> None:
        now["t"] = float(args[1][-1])

    def see(call: Call) -> Tensor | None:
        done = 1 - (now["t"] + 1) / model.schedule.steps
        crossing = call.site.kind == "cross"
        takes = done < (cross if crossing else own) and (crossing or call.x.shape[1] <= FINEST)
        if not (takes or (crossing and factors)):
            return None
        weights = call.weights()  # the last two items of the batch are source and target with their prompts
        edited = weights[-1]
        if takes:
            edited = replace_weights(weights[-2:], pairs) if crossing else weights[-2]
        if crossing:
            edited = edited * scale
        return call.output(torch.cat([weights[:-1], edited[None]]))

    cond = model.conditioning([source, target])
    plain = model.decode(last(run(model, cond, settings)))
    handle = model.unet.register_forward_pre_hook(before)
    try:
        with watching(model.unet, see):
            changed = model.decode(last(run(model, cond, settings)))
    finally:
        handle.remove()
    return Edited(plain[0], plain[1], changed[1])


def draw_edits(edits: Mapping[str, Edited], width: int = 170) -> Image.Image:
    """One row per edit, labelled with its name: source, target without editing, target edited."""
    rows = [list(edit) for edit in edits.values()]
    body = above(
        [strip(rows, ("source", "new prompt, same noise", "new prompt, source's attention"), list(edits), width)]
    )
    return figure(
        "Prompt-to-prompt: editing attention",
        body,
        "From the same noise, the new prompt alone may give a different layout. With the attention of the source's run "
        "the layout stays, and only what the words describe changes.",
    )
