"""A file's weights under our names: everything that a model needs, in the right shapes, or an error.

`layouts.py` finds out which names a file uses, `key_maps.py` has the key of each weight, `matching.py` chooses between
copies of a network; here all are applied. Every weight that a network needs must be present in the right shape, and
every tensor of the file must be used, be a copy of what is used, or be on the list of known leftovers (names.py):
anything else is an error that names it. A 1x1 convolution and a linear layer hold the same numbers, so shapes are
compared without trailing ones. The way back is in export.py.

>>> from sd.checkpoints.checkpoint import load_checkpoint
>>> from sd.resources import resource
>>> with load_checkpoint(resource("weights/pocket.safetensors")) as file:
...     states = convert(file, identify(file).config)
...     print(*states, states["unet"]["conv_in.weight"].shape)
text_encoder vae unet torch.Size([96, 4, 3, 3])
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ..config import Config
from ..messages import counted, listed
from .checkpoint import CheckpointError, shapes
from .detect import identify, no_unet
from .key_maps import EMA, Source
from .layouts import AVERAGE, SECOND, TOKENS, Layout, alone_as, find_layouts, usual_layout
from .matching import NAMES, copies, describe_copies, expected_shapes, match_layouts, table_faults, unrun, where
from .matching import shape_text as shape_text
from .matching import squeezed as squeezed
from .names import ignored, plainly_named

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = ("auto", "raw", "ema")  # which of the two U-Nets of a training checkpoint to take
# Options that supply a network missing from a file
FLAGS = {"text_encoder": "--text-encoder", SECOND: "--text-encoder-2", "vae": "--vae"}


class StateDict(Mapping[str, "Tensor"]):
    """One network's weights under our names, read from `tensors` one at a time, on demand.

    notes   what was chosen for this network, one line each
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        sources: Mapping[str, Source],
        shapes: Mapping[str, tuple[int, ...]],
        notes: Sequence[str] = (),
    ) -> None:
        self._tensors, self._sources, self._shapes = tensors, sources, shapes
        self.notes = tuple(notes)

    def origin(self, key: str) -> str:
        """The name of a weight in the file."""
        return self._sources[key].key

    def __getitem__(self, key: str) -> Tensor:
        source = self._sources[key]
        tensor = self._tensors[source.key]
        if source.third is not None:
            tensor = tensor.chunk(3)[source.third].clone()  # a view would keep all three in memory
        elif source.transposed:
            tensor = tensor.T.contiguous()
        elif key == TOKENS:
            tensor = tensor[: self._shapes[key][0]]
        return tensor.reshape(self._shapes[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def convert(
    tensors: Mapping[str, Tensor],
    config: Config | None = None,
    weights: str = "auto",
    parts: Collection[str] | None = None,
) -> dict[str, StateDict]:
    """Checkpoint -> {"text_encoder", "vae", "unet", ...}: state dicts under our names, complete, of the right shapes.

    tensors   a `Checkpoint` (weights are read on demand) or any mapping of names to tensors, in one of the layouts of
              layouts.py
    config    the model in the file; by default `identify` finds out
    weights   a training checkpoint may hold the U-Net twice: as trained ("raw") and its moving average ("ema"). "auto"
              takes what other tools take: raw from a file, ema from a diffusers folder, or the only one there is
    parts     the networks to convert, of `Config.networks` and "unet_ema", the moving average; the others are ignored.
              By default all networks

    Raises CheckpointError that counts and names what is missing, unknown or of the wrong shape.
    """
    tensors = plainly_named(tensors)
    config = config or identify(tensors).config
    parts = config.networks if parts is None else parts
    found, expected = shapes(tensors), expected_shapes(config)
    layouts = match_layouts(found, config)
    if len(parts) == 1:
        layouts = alone_as(next(iter(parts)), layouts, found, config)
    of_unet = choose_weights(tensors, weights) if "unet" in parts else "unet"
    tables = {
        name: layout.sources(config, expected[name], found) for name, layout in layouts.items() if layout.fits(config)
    }
    used = {source.key for table in tables.values() for source in table.values()}
    wanted = {part: of_unet if part == "unet" else part for part in parts}
    for name in wanted.values():
        if name not in tables:
            layouts[name] = usual_layout(name, config)
            tables[name] = layouts[name].sources(config, expected[name], found)
    if of_unet in wanted.values() and not any(source.key in found for source in tables[of_unet].values()):
        raise CheckpointError(no_unet(find_layouts(tensors), found))
    left = [key for key in found if key not in used and not ignored(key)]
    empty = [key for key in left if 0 in found[key]]
    left = [key for key in left if key not in empty]
    _check_complete(found, {name: tables[name] for name in wanted.values()}, config, layouts, left)
    others = [
        layout.prefix
        for name, layout in layouts.items()
        if name not in wanted.values() and layout.prefix and (layout.fits(config) or len(parts) == 1)
    ]
    others += [usual_layout(name, config).prefix for name in config.networks if name not in parts]
    fewest = min(text.layers for text in config.text)
    extra = [key for key in left if not key.startswith(tuple(others)) and not unrun(key, fewest)]
    copied = copies(extra, config) if extra else {}
    known = {key for keys in copied.values() for key in keys}
    if unknown := [key for key in extra if key not in known]:
        raise CheckpointError(
            f"{counted(len(unknown), 'weight')} in the file that {config.name} does not have: {listed(unknown)}"
        )
    states = {
        part: StateDict(
            tensors,
            tables[name],
            expected[name],
            [line for each in dict.fromkeys((part, name)) for line in describe_copies(layouts, each, config, copied)],
        )
        for part, name in wanted.items()
    }
    if empty and states:
        next(iter(states.values())).notes += (f"left out, because they are empty: {listed(empty)}",)
    return states


def choose_weights(tensors: Mapping[str, Tensor], weights: str = "auto") -> str:
    """Which U-Net of a file to take for `weights` ("auto", "raw", "ema"): "unet", as trained, or "unet_ema".

    Raises CheckpointError if the file does not have the one that is asked for.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"unknown weights {weights!r}, expected one of {', '.join(WEIGHTS)}")
    layouts = find_layouts(tensors)
    if weights == "ema" and AVERAGE not in layouts:
        raise CheckpointError("no moving average (EMA) of the U-Net in this file: use weights auto or raw (--weights)")
    if weights == "raw" and "unet" not in layouts and AVERAGE in layouts:
        raise CheckpointError("only the moving average (EMA) of the U-Net is in this file: use weights auto or ema")
    if AVERAGE not in layouts or weights == "raw":
        return "unet"
    folder = getattr(tensors, "kind", None) == "diffusers folder"  # of which diffusers takes the average
    return AVERAGE if weights == "ema" or folder or "unet" not in layouts else "unet"


def describe_weights(tensors: Mapping[str, Tensor], weights: str = "auto") -> str:
    """Which of a file's two U-Nets is taken, in one line; empty if there is no choice."""
    layouts = find_layouts(tensors)
    if AVERAGE not in layouts:
        left = [key for key in tensors if key.startswith(EMA) and key.removeprefix(EMA) not in ("decay", "num_updates")]
        count = counted(len(left), "weight")
        return f"U-Net: no complete moving average (EMA); left out: {count} of one ({left[0]}, ...)" if left else ""
    taken = choose_weights(tensors, weights)
    if "unet" not in layouts:
        return "U-Net: its moving average (EMA), the only one in the file"
    if taken == AVERAGE:
        return "U-Net: its moving average (EMA); --weights raw takes it as trained"
    return "U-Net: as trained (raw); --weights ema takes its moving average"


def _check_complete(
    found: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, Mapping[str, Source]],
    config: Config,
    layouts: Mapping[str, Layout],
    left: Sequence[str],
) -> None:
    expected = expected_shapes(config)
    missing, misshapen, absent, faulty = [], [], [], []
    for network, table in sources.items():
        gone, odd = table_faults(found, table, expected[network])
        if len(gone) == len(table):
            absent.append(network)
            continue
        missing += gone
        misshapen += odd
        faulty += [network] if gone or odd else []
    if absent:
        names = " and ".join(f"no {NAMES[network]}" for network in absent)
        flags = " and ".join(FLAGS[network] for network in absent if network in FLAGS)
        raise CheckpointError(f"the file has {names}" + (f": give it with {flags}" if flags else ""))
    if not faulty:
        return
    twice = "".join(
        f"; it has {counted(len(keys), 'weight')} of a second {NAMES[layout.network]} {where(layout)}, also incomplete"
        for layout, keys in copies(left, config).items()
        if layout.network in faulty and layout.prefix != layouts[layout.network].prefix
    )
    if missing:
        total = sum(map(len, sources.values()))
        raise CheckpointError(
            f"{counted(len(missing), 'weight')} of {total} missing from the file: {listed(missing)}{twice}"
        )
    raise CheckpointError(f"{counted(len(misshapen), 'weight')} of the wrong shape: {listed(misshapen, '; ')}{twice}")
