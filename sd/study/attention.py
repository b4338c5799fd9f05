"""Attention made visible: where each word is listened to, where a place looks, and a hook to change it.

In the U-Net's cross-attention every place of the picture asks (q) and every token of the prompt answers (k, v):

    weights = softmax(q kᵀ / sqrt(d))    (heads, N places, M tokens)      Vaswani et al. 2017, eq. 1
    out     = weights v

A column of the weights is a map of the picture that says where its token is listened to: Tang et al. 2023, "What the
DAAM: interpreting Stable Diffusion using cross attention". In self-attention, tokens are places as well, and a row
says where one place looks.

The network's kernels (kernels.py) never hold these weights as a whole, and some not even their softmax. Here a forward
hook, put on each attention layer for the length of a `with` block, computes them once more from the layer's input:
whichever kernel the network uses, its output is what it was, to the bit, unless the hook is there to change it.
Afterwards nothing is left. Steps that are played back as CUDA graphs (capture.py) are computed anew while there is a
hook, and networks that take turns in memory (turns.py) keep their hooks.

    with recording(model.unet, tokens=find_word(model.tokenizer, prompt, "red")) as maps:
        for step in run(model, model.encode_prompt([prompt])): ...
    heat = maps.mean().sum(0)                                           # (h, w)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..models.layers import Attention
from ..models.unet import TransformerBlock, UNet
from ..params import SamplingParams
from ..pipeline import StableDiffusion
from .drawing import above, beside, boxed, captioned, dotted, figure, overlay, scaled, strip
from .runs import SETTINGS, run
from .text import Word, words

KINDS = ("cross", "self")
WORDS_A_LINE = 7  # of a figure


class Site(NamedTuple):
    """One attention layer of the U-Net."""

    name: str  # its transformer: "down.1.attn.0", "mid.attn", ...
    part: str  # "down", "mid" or "up"
    level: int  # 0 is the finest; the middle's is the coarsest
    kind: str  # "cross" (to the text) or "self" (among places)
    heads: int


class Call(NamedTuple):
    """One use of an attention layer: what it was given, with the means to compute it by the formula."""

    site: Site
    layer: Attention
    x: Tensor  # (B, N, D)
    context: Tensor  # (B, M, context width); x itself in self-attention

    def weights(self, rows: Sequence[int] | None = None) -> Tensor:
        """softmax(q kᵀ / sqrt(d)) in float32: (B, heads, N, M), or only these rows of the N."""
        x = self.x if rows is None else self.x[:, list(rows)]
        q, k = (self._heads(y).float() for y in (self.layer.q(x), self.layer.k(self.context)))
        kind = q.device.type
        # autocast would make the product a rough one
        exact = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
        with exact:
            return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)

    def output(self, weights: Tensor) -> Tensor:
        """What the layer would give with these weights (B, heads, N, M): (B, N, D)."""
        v = self._heads(self.layer.v(self.context))
        return self.layer.out((weights.to(v.dtype) @ v).transpose(1, 2).flatten(-2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.layer.heads, -1)).transpose(1, 2)


See = Callable[[Call], Tensor | None]


def check_plain(network: nn.Module) -> None:
    """ValueError for a network whose layers are not called one by one, so that hooks on them are run past."""
    if not isinstance(network, nn.Module):
        raise ValueError(f"attention is looked at in a U-Net, got {type(network).__name__}")
    if any(
        hasattr(module, "_orig_mod")
        or isinstance(module, torch.jit.ScriptModule)  # torch.compile(module)
        or module._compiled_call_impl is not None  # module.compile()
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")  # forward = torch.compile(forward)
        for module in network.modules()
    ):
        raise ValueError(
            "the U-Net is compiled, which runs past hooks: give the network as it was before torch.compile"
        )


def sites(unet: UNet) -> list[tuple[Site, Attention]]:
    """Every attention layer of a U-Net, in the order of its forward pass."""
    found = []
    for path, module in unet.named_modules():
        if isinstance(module, TransformerBlock):
            name = path.rpartition(".blocks.")[0]
            part = name.split(".")[0]
            level = len(unet.config.channels) - 1 if part == "mid" else int(name.split(".")[1])
            for kind, layer in (("self", module.attn1), ("cross", module.attn2)):
                found.append((Site(name, part, level, kind, layer.heads), layer))
    # the way up goes from the coarsest level to the finest, while its stages are numbered the other way
    order = {"down": 0, "mid": 1, "up": 2}
    return sorted(found, key=lambda pair: (order[pair[0].part], pair[0].level * (-1 if pair[0].part == "up" else 1)))


@contextmanager
def watching(unet: UNet, see: See, kinds: Collection[str] = KINDS) -> Iterator[None]:
    """For the length of a `with` block, `see` is called with every use of the U-Net's attention layers.

    What it returns takes the place of the layer's output; None leaves the output as it is. Raises ValueError, in one
    line, for a network that is compiled.
    """
    check_plain(unet)
    with ExitStack() as stack:
        for site, layer in sites(unet):
            if site.kind in kinds:
                stack.enter_context(_hooked(site, layer, see))
        yield


@contextmanager
def _hooked(site: Site, layer: Attention, see: See) -> Iterator[None]:
    def hook(layer: Attention, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Tensor) -> Tensor | None:
        x = args[0] if args else kwargs["x"]
        context = args[1] if len(args) > 1 else kwargs.get("context")
        return see(Call(site, layer, x, x if context is None else context))

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class Record(NamedTuple):
    """The maps of one layer in one evaluation of the network."""

    site: Site
    call: int  # the network's evaluations, from 0
    t: float
    maps: Tensor  # (heads, K, h, w): for each token or point asked for, how much of its attention is where


class AttentionMaps:
    """What `recording` saw, layer by layer and evaluation by evaluation."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.size = (0, 0)  # of the latent

    @property
    def calls(self) -> int:
        """Evaluations of the network that were seen."""
        return 1 + max((record.call for record in self.records), default=-1)

    @property
    def sites(self) -> list[Site]:
        """The layers that were seen, in the order of the forward pass."""
        return list(dict.fromkeys(record.site for record in self.records))

    def mean(
        self,
        *,
        site: str | None = None,
        parts: Collection[str] | None = None,
        levels: Collection[int] | None = None,
        heads: Collection[int] | None = None,
        calls: Collection[int] | None = None,
    ) -> Tensor:
        """The mean map (K, h, w) at the latent's size of all records that fit; all there are if nothing is asked."""
        fitting = [
            record
            for record in self.records
            if (site is None or record.site.name == site)
            and (parts is None or record.site.part in parts)
            and (levels is None or record.site.level in levels)
            and (calls is None or record.call in calls)
        ]
        if not fitting:
            raise ValueError("no attention was recorded that fits: run the network inside of the with block")
        shared = range(min(len(record.maps) for record in fitting))
        if heads is not None and not (heads and set(heads) <= set(shared)):
            raise ValueError(f"heads are 0 to {shared[-1]} in all layers that fit, got {list(heads)}")
        total: Tensor | float = 0.0
        for record in fitting:
            maps = record.maps if heads is None else record.maps[list(heads)]
            total = total + F.interpolate(maps.mean(0)[None], self.size, mode="bilinear", align_corners=False)[0]
        return total / len(fitting)


@contextmanager
def recording(
    unet: UNet,
    kind: str = "cross",
    *,
    tokens: Sequence[int] | None = None,
    points: Sequence[tuple[float, float]] = ((0.5, 0.5),),
    picture: int = -1,
) -> Iterator[AttentionMaps]:
    """Keep the attention maps of all that the U-Net does in a `with` block.

    kind     "cross": a map for each of `tokens` (positions in the prompt; all if not given): where it is listened to.
             "self": a map for each of `points` (x, y in parts of the picture's sides): where it looks
    picture  which of the network's batch; the last, -1, is one with the prompt also where guidance doubles the batch

    Memory: a number for each token or point, head and place in each layer and evaluation.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of attention {kind!r}, expected one of {', '.join(KINDS)}")
    check_plain(unet)
    maps = AttentionMaps()
    now = {"call": -1, "t": 0.0}

    def before(unet: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x, t = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("x", "t")))
        now.update(call=now["call"] + 1, t=float(t[picture]))
        maps.size = tuple(x.shape[-2:])

    def see(call: Call) -> None:
        h, w = (-(-side // 2**call.site.level) for side in maps.size)  # halving rounds up
        with torch.no_grad():
            one = call._replace(x=call.x[picture, None], context=call.context[picture, None])
            if kind == "cross":
                weights = one.weights()[0]  # (heads, N, M)
                chosen = weights if tokens is None else weights[..., list(tokens)]
                found = chosen.transpose(1, 2)
            else:
                places = [min(int(y * h), h - 1) * w + min(int(x * w), w - 1) for x, y in points]
                found = one.weights(places)[0]  # (heads, K, N)
        maps.records.append(Record(call.site, now["call"], now["t"], found.unflatten(-1, (h, w)).cpu()))

    handle = unet.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with watching(unet, see, (kind,)):
            yield maps
    finally:
        handle.remove()


def mass_inside(values: Tensor, box: tuple[float, float, float, float]) -> float:
    """How much of a map (h, w), which is >= 0, lies in a box (left, top, right, bottom in parts of the sides): 0 to 1.

    A place that the box cuts counts with the part that is inside. An even map has the box's share of the area.

    >>> mass_inside(torch.ones(8, 8), (0.0, 0.0, 0.5, 0.5))
    0.25
    """
    left, top, right, bottom = box

    def inside(n: int, low: float, high: float) -> Tensor:
        edges = torch.arange(n + 1, dtype=torch.float64) / n
        return (edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)).clamp(min=0) * n

    h, w = values.shape
    part = inside(h, top, bottom)[:, None] * inside(w, left, right)[None]
    return float((values.double().cpu() * part).sum() / values.double().sum())


# ------------------------------------------------------------------------------------- figures


class WordMaps(NamedTuple):
    """A picture of a prompt with the attention that each of its words got."""

    picture: Image.Image
    words: list[Word]
    maps: AttentionMaps  # K is the position in the prompt

    def of(self, word: int, **which: object) -> Tensor:
        """The map (h, w) of a word, by its number: the sum over its tokens of what `AttentionMaps.mean` gives."""
        return self.maps.mean(**which)[self.words[word].positions].sum(0)


def word_maps(model: StableDiffusion, prompt: str, settings: SamplingParams = SETTINGS) -> WordMaps:
    """Paint a prompt and keep all its cross-attention."""
    found = words(model.tokenizer, prompt)
    with recording(model.unet, tokens=range(max((max(word.positions) for word in found), default=0) + 1)) as maps:
        x = None
        for step in run(model, model.encode_prompt([prompt]), settings):
            x = step.x
    return WordMaps(model.decode(x)[0], found, maps)


def self_maps(
    model: StableDiffusion, prompt: str, points: Sequence[tuple[float, float]], settings: SamplingParams = SETTINGS
) -> tuple[Image.Image, AttentionMaps]:
    """Paint a prompt; where each of the points (x, y in parts of the sides) looked in self-attention."""
    with recording(model.unet, "self", points=points) as maps:
        x = None
        for step in run(model, model.encode_prompt([prompt]), settings):
            x = step.x
    return model.decode(x)[0], maps


def places(maps: AttentionMaps) -> list[tuple[str, int]]:
    """The parts and levels that attend, in the order of the forward pass: ("down", 1), ("mid", 1), ..."""
    return list(dict.fromkeys((site.part, site.level) for site in maps.sites))


def _grid_size(maps: AttentionMaps, level: int) -> str:
    h, w = (-(-side // 2**level) for side in maps.size)
    return f"{h}x{w}"


def draw_words(
    picture: Image.Image,
    names: Sequence[str],
    maps: Sequence[Tensor],
    title: str,
    note: str,
    boxes: Mapping[int, tuple[float, float, float, float]] | None = None,
    width: int = 150,
) -> Image.Image:
    """The picture, then one heat map (h, w) with its name for each word; `boxes` are drawn into those they name.

    Each map is as bright as it can be: brightness compares places, not words.
    """
    cells = [captioned(scaled(picture, width), "the picture")]
    for i, (name, values) in enumerate(zip(names, maps, strict=True)):
        heat = overlay(picture, values, width)
        cells.append(captioned(boxed(heat, boxes[i]) if boxes and i in boxes else heat, name))
    lines = -(-len(cells) // WORDS_A_LINE)
    columns = -(-len(cells) // lines)
    rows = [beside(cells[i : i + columns], gap=10) for i in range(0, len(cells), columns)]
    return figure(title, above(rows, gap=14), note)


def draw_word_maps(
    seen: WordMaps,
    prompt: str,
    notes: Mapping[int, str] | None = None,
    boxes: Mapping[int, tuple[float, float, float, float]] | None = None,
) -> Image.Image:
    """The picture and the attention that each word got; `notes` are added to the names of the words they number."""
    return draw_words(
        seen.picture,
        noted(seen.words, notes),
        [seen.of(i) for i in range(len(seen.words))],
        "Cross-attention: where each word is listened to",
        f'"{prompt}": the mean over all steps, layers and heads, each map from none (dark) to its most (light).',
        boxes,
    )


def noted(words: Sequence[Word], notes: Mapping[int, str] | None) -> list[str]:
    """The words, each with its note in the lines below."""
    return [word.text + (f"\n{notes[i]}" if notes and i in notes else "") for i, word in enumerate(words)]


def draw_breakdown(seen: WordMaps, word: int, moments: int = 5, width: int = 110) -> Image.Image:
    """One word's maps apart: by step (columns) and place in the U-Net (rows), and by head at each place."""
    calls = seen.maps.calls
    moments = min(moments, calls)
    chunks = [range(i * calls // moments, (i + 1) * calls // moments) for i in range(moments)]
    rows = places(seen.maps)
    names = [f"{part}, level {level}\n{_grid_size(seen.maps, level)} places" for part, level in rows]

    def cell(**which: object) -> Image.Image:
        return overlay(seen.picture, seen.of(word, **which), width)

    by_step = [[cell(parts=(part,), levels=(level,), calls=chunk) for chunk in chunks] for part, level in rows]
    heads = min(max(site.heads for site in seen.maps.sites), 8)
    by_head = [
        [
            cell(parts=(part,), levels=(level,), heads=(head,))
            for head in range(min(heads, *(s.heads for s in seen.maps.sites if (s.part, s.level) == (part, level)), 8))
        ]
        for part, level in rows
    ]
    body = above(
        [
            strip(by_step, [f"steps {chunk[0] + 1} to {chunk[-1] + 1}" for chunk in chunks], names, width),
            strip(by_head, [f"head {head + 1}" for head in range(heads)], names, width),
        ],
        gap=26,
    )
    return figure(
        f'One word, "{seen.words[word].text}", by step, level and head',
        body,
        "Above: the mean over the heads, early steps on the left. Below: the mean over the steps, head by head; the "
        "heads of a layer look for different things.",
    )


def draw_self_maps(
    picture: Image.Image, maps: AttentionMaps, points: Sequence[tuple[float, float]], width: int = 150
) -> Image.Image:
    """For each point the picture with a ring around it, and where that place looks, by place in the U-Net."""
    rows = [[dotted(scaled(picture, width), point) for point in points]]
    names = ["the place"]
    for part, level in places(maps):
        mean = maps.mean(parts=(part,), levels=(level,))
        rows.append([dotted(overlay(picture, mean[i], width), point) for i, point in enumerate(points)])
        names.append(f"{part}, level {level}\n{_grid_size(maps, level)} places")
    return figure(
        "Self-attention: where a place looks",
        strip(rows, [f"place {i + 1}" for i in range(len(points))], names, width),
        "Every place of the picture looks at all of them. Light is where the ringed place looks most: the mean over "
        "all steps and heads, at each level of the U-Net.",
    )
