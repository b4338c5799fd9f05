"""Which of a file's tensors are the weights of a network, if several could be.

Merging scripts copy whatever only one of two models has, so a file may hold a network twice: the text encoder with and
without "text_model." in its names, a VAE without a prefix beside the real one. The one that the original code reads is
taken, or else the first one that is complete.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache

from ..config import Config
from ..messages import counted
from .key_maps import Source
from .layouts import (
    AVERAGE,
    CLIP_PREFIXES,
    LAYOUTS,
    OPENCLIP_PREFIXES,
    SECOND,
    SECOND_CLIP_PREFIXES,
    SECOND_OPENCLIP_PREFIXES,
    TOKENS,
    Layout,
    all_layouts,
)  # fmt: skip

NAMES = {
    "text_encoder": "text encoder",
    SECOND: "second text encoder",
    "vae": "vae",
    "unet": "U-Net",
    AVERAGE: "moving average (EMA) of the U-Net",
}

# Published text encoders, by their width
TEXTS = {768: "CLIP ViT-L/14", 1024: "OpenCLIP ViT-H/14", 1280: "OpenCLIP ViT-bigG/14"}

# A weight in one of the text encoder's layers: prefix, layout's name of the layers, number.
TEXT_LAYER = re.compile(r"(.*?)(encoder\.layers|transformer\.resblocks)\.(\d{1,4})\.")
LAYER_PREFIXES = {
    "encoder.layers": CLIP_PREFIXES + SECOND_CLIP_PREFIXES,
    "transformer.resblocks": OPENCLIP_PREFIXES + SECOND_OPENCLIP_PREFIXES,
}

Shapes = Mapping[str, tuple[int, ...]]


def expected_shapes(config: Config) -> dict[str, Shapes]:
    """The name and shape of every weight of every network of a config, and of the U-Net's average."""
    from ..models.build import weight_shapes  # not at the top: torch is slow to import, and not everything needs it

    shapes = dict(weight_shapes(config))
    return {**shapes, AVERAGE: shapes["unet"]}


def match_layouts(found: Shapes, config: Config) -> dict[str, Layout]:
    """The layout of each network in a file of these shapes: of several the first complete one, else the fullest."""
    layouts = {}
    for network, several in all_layouts(found).items():
        several = [layout for layout in several if layout.fits(config)] or several[:1]
        if len(several) > 1 and several[0].fits(config):
            expected = expected_shapes(config)[network]
            several.sort(key=lambda layout: sum(map(len, faults(found, layout, config, expected))))
        layouts[network] = several[0]
    return layouts


def faults(found: Shapes, layout: Layout, config: Config, expected: Shapes) -> tuple[list[str], list[str]]:
    """The weights of a network that a file lacks, and those of another shape, each with both shapes."""
    return table_faults(found, layout.sources(config, expected, found), expected)


def table_faults(found: Shapes, table: Mapping[str, Source], expected: Shapes) -> tuple[list[str], list[str]]:
    """The same for the sources of the weights."""
    missing, misshapen = [], []
    for key, source in table.items():
        want, have = expected[key], found.get(source.key)
        if have is None:
            missing.append(source.key)
            continue
        if source.third is not None:
            want = (3 * want[0], *want[1:])
        if source.transposed:
            want = want[::-1]
        if key == TOKENS and len(have) == 2 and have[0] > want[0]:
            have = (want[0], have[1])  # fine-tuning added words that no prompt can contain
        if squeezed(have) != squeezed(want):
            misshapen.append(f"{source.key} is {shape_text(have)}, expected {shape_text(want)}")
    return missing, misshapen


def copies(others: Collection[str], config: Config) -> dict[Layout, list[str]]:
    """The keys among `others`, which are not used, that name weights of the config's networks in any layout."""
    left, copied = set(others), {}
    for network in (*config.networks, AVERAGE):
        for name, _, prefixes in LAYOUTS[network]:
            for prefix in sorted(prefixes, key=len, reverse=True):
                if not any(key.startswith(prefix) for key in left):
                    continue
                layout = Layout(network, name, prefix)
                if not layout.fits(config):
                    continue
                keys = _all_keys(layout, config)
                if here := [key for key in others if key in left & keys]:
                    copied[layout] = here
                    left -= keys
    return copied


@lru_cache(maxsize=256)
def _all_keys(layout: Layout, config: Config) -> frozenset[str]:
    """The keys that weights of a network may have in a layout."""
    expected = expected_shapes(config)[layout.network]
    keys = {source.key for source in layout.sources(config, expected).values()}
    for other in layout.other_names(config):
        keys |= {source.key for key in expected if (source := other(key)) is not None}
    return frozenset(keys)


def describe_copies(
    layouts: Mapping[str, Layout], network: str, config: Config, copied: Mapping[Layout, Sequence[str]]
) -> list[str]:
    """Notes on the copies of a network that are not used, one line each."""
    if not copied or network not in layouts:
        return []
    taken, total = layouts[network], len(expected_shapes(config)[network])
    lines = []
    places: dict[str, tuple[Layout, list[str]]] = {}  # copies with one prefix may mix several layouts
    for layout, keys in copied.items():
        if layout.network == taken.network:
            places.setdefault(layout.prefix, (layout, []))[1].extend(keys)
    for layout, keys in places.values():
        count = counted(len(keys), "weight")
        if layout.prefix == taken.prefix:
            lines.append(
                f"{NAMES[taken.network]}: {count} in the file under two names: {keys[0]} and the like are not used"
            )
        else:
            lines.append(
                f"{NAMES[taken.network]}: found twice in the file; the one {where(taken)} is used, {count} "
                f"(of {total}) {where(layout)} {'are' if len(keys) > 1 else 'is'} not"
            )
    return lines


def where(layout: Layout) -> str:
    """The place of a layout in the file, as text."""
    return f"with the prefix {layout.prefix!r}" if layout.prefix else "without a prefix"


def unrun(key: str, layers: int) -> bool:
    """Whether a key belongs to a layer after the first `layers` of a text encoder, in any layout."""
    match = TEXT_LAYER.match(key)
    return match is not None and int(match[3]) >= layers and match[1] in LAYER_PREFIXES[match[2]]


def squeezed(shape: tuple[int, ...], least: int = 1) -> tuple[int, ...]:
    """A shape without its last dimensions of size 1, but at least this many dimensions."""
    while len(shape) > least and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def shape_text(shape: Sequence[int]) -> str:
    """A shape as text: "320x4x3x3"."""
    return "x".join(map(str, shape)) or "a scalar"
