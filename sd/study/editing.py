"""Editing a picture by editing its prompt: attention of one run used in another.

Hertz et al. 2022, "Prompt-to-prompt image editing with cross attention control". The layout of a picture is in its
attention: which place listens to which token. Two prompts are painted side by side from the same noise, and the
second one takes over the weights of the first where the prompts agree, so it paints other things in the same places:

    replace    "a red house" -> "a blue house": token j of the second takes the weights of its partner in the first
    refine     added words keep their own weights, the others take over
    reweight   the weights of a word times a factor: more or less of it
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

CROSS, OWN = 0.8, 0.3  # of the way, beginning with noise, on which attention is taken over
FINEST = 32 * 32  # places up to which self-attention is: finer layers hold texture, not layout (their code: 16x16)


class Edited(NamedTuple):
    """The source, what the target's prompt gives by itself, and the target with the source's attention."""

    source: Image.Image
    alone: Image.Image
    edited: Image.Image


def partners(source: list[int], target: list[int]) -> list[int | None]:
    """For each token of the target the position of the one in the source it stands for, None where it is new.

    Equal stretches are paired, and so are stretches of equal length between them, which are words replaced.

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


def taken_over(weights: Tensor, pairs: list[int | None]) -> Tensor:
    """Cross-attention (2, heads, N, M) of source and target -> the target's (heads, N, M), the source's at pairs."""
    source, target = weights
    columns = [j for j, partner in enumerate(pairs) if partner is not None]
    target = target.clone()
    target[..., columns] = source[..., [pairs[j] for j in columns]]
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
    """The target's picture in the layout of the source's.

    cross    on how much of the way the target's cross-attention is taken from the source: 0 not at all, 1 all the way
    own      the same for self-attention: more of it keeps shapes and ground, less allows for other shapes
    factors  words of the target with what their attention is multiplied by, all the way
    """
    for name, share in (("cross", cross), ("own", own)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is a part of the way, from 0 to 1, got {share}")
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
        weights = call.weights()  # the batch ends with source and target, both with their prompts
        mine = weights[-1]
        if takes:
            mine = taken_over(weights[-2:], pairs) if crossing else weights[-2]
        if crossing:
            mine = mine * scale
        return call.output(torch.cat([weights[:-1], mine[None]]))

    context = model.encode_prompt([source, target])
    plain = model.decode(last(run(model, context, settings)))
    handle = model.unet.register_forward_pre_hook(before)
    try:
        with watching(model.unet, see):
            changed = model.decode(last(run(model, context, settings)))
    finally:
        handle.remove()
    return Edited(plain[0], plain[1], changed[1])


def draw_edits(edits: Mapping[str, Edited], width: int = 170) -> Image.Image:
    """A row for each edit, named by what it does: source, the new prompt alone, and edited."""
    rows = [list(edit) for edit in edits.values()]
    body = above(
        [strip(rows, ("source", "new prompt, same noise", "new prompt, source's attention"), list(edits), width)]
    )
    return figure(
        "Prompt-to-prompt: editing attention",
        body,
        "From the same noise, the new prompt alone may paint another picture. With the attention of the source's run "
        "it keeps the layout and changes what the words say.",
    )
