"""Attention maps of the U-Net, and a hook that can change attention.

In cross-attention every position of the latent is a query (q) and every token of the prompt a key and a value (k, v):

    weights = softmax(q kᵀ / sqrt(d))    (heads, N positions, M tokens)   Vaswani et al. 2017, eq. 1
    out     = weights v

A column of the weights is a map of the image that shows where its token is attended to: Tang et al. 2023, "What the
DAAM: interpreting Stable Diffusion using cross attention". In self-attention the keys are positions too, and a row
shows where one position attends.

Fused kernels never hold these weights in memory. Here a forward hook on each attention layer, active inside a `with`
block, computes them again from the input of the layer. The output of the network stays the same to the bit, unless
the hook returns another one. Leaving the block removes the hooks. CUDA graphs (runtime/cuda_graphs.py) are not
replayed while there is a hook, and offloaded networks (runtime/offload.py) keep their hooks.

    with recording(model.unet, tokens=find_word(model.tokenizer, prompt, "red")) as maps:
        for step in run(model, model.conditioning([prompt])): ...
    heat = maps.mean().sum(0)                                           # (h, w)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..models.layers import Attention
from ..models.unet import TransformerBlock, UNet
from ..params import SamplingParams
from ..pipeline import StableDiffusion
from .runs import SETTINGS, last, run
from .text import Word, words

KINDS = ("cross", "self")


class Site(NamedTuple):
    """One attention layer of the U-Net."""

    name: str  # its transformer: "down.1.attn.0", "mid.attn", ...
    part: str  # "down", "mid" or "up"
    level: int  # 0 is the finest; the middle's is the coarsest
    kind: str  # "cross" (to the text) or "self" (among positions)
    heads: int
    block: int = 0  # place in its transformer, which for SDXL has up to ten blocks one after another


class Call(NamedTuple):
    """One call of an attention layer: its inputs, and methods that compute it by the formula."""

    site: Site
    layer: Attention
    x: Tensor  # (B, N, D)
    context: Tensor  # (B, M, context width); x itself in self-attention

    def weights(self, rows: Sequence[int] | None = None) -> Tensor:
        """softmax(q kᵀ / sqrt(d)) in float32: (B, heads, N, M), or only the given rows of N."""
        x = self.x if rows is None else self.x[:, list(rows)]
        q, k = (self._heads(y).float() for y in (self.layer.q(x), self.layer.k(self.context)))
        kind = q.device.type
        # autocast would compute the product in half precision
        exact = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
        with exact:
            return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)

    def output(self, weights: Tensor) -> Tensor:
        """The output of the layer (B, N, D) for other weights (B, heads, N, M)."""
        v = self._heads(self.layer.v(self.context))
        return self.layer.out((weights.to(v.dtype) @ v).transpose(1, 2).flatten(-2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.layer.heads, -1)).transpose(1, 2)


Hook = Callable[[Call], Tensor | None]


def check_plain(network: nn.Module) -> None:
    """Raise ValueError for a compiled network: it does not call the forward hooks of its layers."""
    if not isinstance(network, nn.Module):
        raise ValueError(f"expected a U-Net to record attention in, got {type(network).__name__}")
    if any(
        hasattr(module, "_orig_mod")
        or isinstance(module, torch.jit.ScriptModule)  # torch.compile(module)
        or module._compiled_call_impl is not None  # module.compile()
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")  # forward = torch.compile(forward)
        for module in network.modules()
    ):
        raise ValueError("the U-Net is compiled and skips hooks: pass the network from before torch.compile")


def sites(unet: UNet) -> list[tuple[Site, Attention]]:
    """All attention layers of a U-Net, in the order of its forward pass."""
    found: list[tuple[Site, Attention]] = []
    for path, module in unet.named_modules():
        if isinstance(module, TransformerBlock):
            name, _, block = path.rpartition(".blocks.")
            part = name.split(".")[0]
            level = len(unet.config.channels) - 1 if part == "mid" else int(name.split(".")[1])
            for kind, layer in (("self", module.attn1), ("cross", module.attn2)):
                found.append((Site(name, part, level, kind, layer.heads, int(block)), layer))
    # the decoder runs from the coarsest level to the finest, but its stages are numbered from the finest
    order = {"down": 0, "mid": 1, "up": 2}
    return sorted(found, key=lambda pair: (order[pair[0].part], pair[0].level * (-1 if pair[0].part == "up" else 1)))


@contextmanager
def watching(unet: UNet, see: Hook, kinds: Collection[str] = KINDS) -> Iterator[None]:
    """Inside a `with` block, call `see` for every call of the U-Net's attention layers of these kinds.

    A tensor that `see` returns replaces the output of the layer; None keeps it. Raises ValueError for a compiled
    network.
    """
    check_plain(unet)
    with ExitStack() as stack:
        for site, layer in sites(unet):
            if site.kind in kinds:
                stack.enter_context(_hooked(site, layer, see))
        yield


@contextmanager
def _hooked(site: Site, layer: Attention, see: Hook) -> Iterator[None]:
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
    """The maps of one layer in one forward pass of the network."""

    site: Site
    call: int  # which forward pass, from 0
    t: float
    maps: Tensor  # (heads, K, h, w): one map for each of the K tokens or points


class AttentionMaps:
    """The maps that `recording` collected, by layer and by forward pass."""

    def __init__(self, network: str = "") -> None:
        self.network = network  # name of the U-Net's model, for figures
        self.records: list[Record] = []
        self.size = (0, 0)  # height and width of the latent

    @property
    def calls(self) -> int:
        """Number of recorded forward passes."""
        return 1 + max((record.call for record in self.records), default=-1)

    @property
    def sites(self) -> list[Site]:
        """The recorded layers, in the order of the forward pass."""
        return list(dict.fromkeys(record.site for record in self.records))

    def mean(
        self,
        *,
        site: str | None = None,
        parts: Collection[str] | None = None,
        levels: Collection[int] | None = None,
        blocks: Collection[int] | None = None,
        heads: Collection[int] | None = None,
        calls: Collection[int] | None = None,
    ) -> Tensor:
        """Mean map (K, h, w), at the size of the latent, over all records that match; without filters, over all."""
        matching = [
            record
            for record in self.records
            if (site is None or record.site.name == site)
            and (parts is None or record.site.part in parts)
            and (levels is None or record.site.level in levels)
            and (blocks is None or record.site.block in blocks)
            and (calls is None or record.call in calls)
        ]
        if not matching:
            raise ValueError("no recorded attention matches: run the network inside the with block")
        shared = range(min(len(record.maps) for record in matching))
        if heads is not None and not (heads and set(heads) <= set(shared)):
            raise ValueError(f"the matching layers have heads 0 to {shared[-1]}, got {list(heads)}")
        total = torch.zeros(())
        for record in matching:
            maps = record.maps if heads is None else record.maps[list(heads)]
            total = total + F.interpolate(maps.mean(0)[None], self.size, mode="bilinear", align_corners=False)[0]
        return total / len(matching)


@contextmanager
def recording(
    unet: UNet,
    kind: str = "cross",
    *,
    tokens: Sequence[int] | None = None,
    points: Sequence[tuple[float, float]] = ((0.5, 0.5),),
    item: int = -1,
    network: str = "",
) -> Iterator[AttentionMaps]:
    """Record the attention maps of every forward pass of the U-Net inside a `with` block.

    kind    "cross": one map for each of `tokens` (positions in the prompt; default: all), where it is attended to
            "self": one map for each of `points` (x, y as fractions of width and height), where it attends
    item    index into the batch; with guidance the batch is [uncond, cond], so the last item, -1, has the prompt
    network name of the model, which figures show

    Memory: one float32 per token or point, head and position, for each layer and forward pass: of SDXL at 1024x1024,
    7 MB for each token and forward pass.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of attention {kind!r}, expected one of {', '.join(KINDS)}")
    check_plain(unet)
    maps = AttentionMaps(network)
    call_number, timestep = -1, 0.0  # of the current forward pass

    def before(unet: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        nonlocal call_number, timestep
        x, t = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("x", "t")))
        call_number, timestep = call_number + 1, float(t[item])
        maps.size = x.shape[-2], x.shape[-1]

    def see(call: Call) -> None:
        h, w = (-(-side // 2**call.site.level) for side in maps.size)  # halving rounds up
        with torch.no_grad():
            one = call._replace(x=call.x[item, None], context=call.context[item, None])
            if kind == "cross":
                weights = one.weights()[0]  # (heads, N, M)
                chosen = weights if tokens is None else weights[..., list(tokens)]
                found = chosen.transpose(1, 2)
            else:
                places = [min(int(y * h), h - 1) * w + min(int(x * w), w - 1) for x, y in points]
                found = one.weights(places)[0]  # (heads, K, N)
        maps.records.append(Record(call.site, call_number, timestep, found.unflatten(-1, (h, w)).cpu()))

    handle = unet.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with watching(unet, see, (kind,)):
            yield maps
    finally:
        handle.remove()


def mass_inside(values: Tensor, box: tuple[float, float, float, float]) -> float:
    """Share, 0 to 1, of a map (h, w) >= 0 that lies in a box (left, top, right, bottom as fractions of the sides).

    A cell that the box cuts counts by the area inside. For a uniform map this is the area of the box.

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


class WordMaps(NamedTuple):
    """A generated image with the attention maps of the words of its prompt."""

    image: Image.Image
    words: list[Word]
    maps: AttentionMaps  # K is the position in the prompt

    def of(self, word: int, **which: Any) -> Tensor:
        """Map (h, w) of the word with this index: the mean of `AttentionMaps.mean(**which)`, summed over its tokens."""
        return self.maps.mean(**which)[self.words[word].positions].sum(0)


def word_maps(model: StableDiffusion, prompt: str, settings: SamplingParams = SETTINGS) -> WordMaps:
    """Generate an image and record its cross-attention."""
    found = words(model.tokenizer, prompt)
    tokens = range(max((max(word.positions) for word in found), default=0) + 1)
    with recording(model.unet, tokens=tokens, network=model.config.name) as maps:
        x = last(run(model, model.conditioning([prompt]), settings))
    return WordMaps(model.decode(x)[0], found, maps)


def self_maps(
    model: StableDiffusion, prompt: str, points: Sequence[tuple[float, float]], settings: SamplingParams = SETTINGS
) -> tuple[Image.Image, AttentionMaps]:
    """Generate an image and record the self-attention of points (x, y as fractions of width and height)."""
    with recording(model.unet, "self", points=points, network=model.config.name) as maps:
        x = last(run(model, model.conditioning([prompt]), settings))
    return model.decode(x)[0], maps
