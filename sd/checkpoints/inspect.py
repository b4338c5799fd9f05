"""What a file holds, without reading its weights: model, prediction, precision, missing and unknown weights.

Names, shapes and types are at the beginning of a file (in a zip, at its end), so 8 GB take no longer than 8 MB. The
SHA-256 needs the whole file and is computed for small ones (`SMALL`) or on request. If nothing says whether an SD 2.x
U-Net predicts eps or v, only running it can tell.

>>> from sd.checkpoints.checkpoint import load_checkpoint
>>> from sd.resources import resource
>>> with load_checkpoint(resource("weights/pocket.safetensors")) as file:
...     inspect(file).model
'pocket, 128x128'
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..config import SD1, SD2, SDXL, SDXL_REFINER, Config
from ..messages import listed, one_line, printable
from .checkpoint import Checkpoint, CheckpointError, shapes
from .control_detect import control_shapes, control_table, family, has_control, identify_control, unknown_keys
from .control_maps import OWN
from .convert import FLAGS
from .detect import damaged_position_ids, identify, with_autoencoder
from .few_step_files import notes_on_scheduler
from .layouts import AVERAGE, SECOND, TOKENS, find_layouts, usual_layout
from .matching import NAMES, copies, describe_copies, expected_shapes, match_layouts, table_faults, unrun
from .names import ignored
from .supported_settings import ignored_settings
from .tiny_vae import is_tiny
from .tokenizer_files import describe_words
from .vae_files import describe_whose

SMALL = 256 << 20  # bytes: their SHA-256 takes less than half a second
SHORT_HASH = (0x100000, 0x10000)  # "model hash" of older tools: 64 KB after the first megabyte


@dataclass
class Report:
    """What is in a file; `lines()` is all of it as text."""

    path: Path
    kind: str
    size: int  # bytes
    tensors: int
    model: str  # its family, or why it is not supported
    supported: bool
    prediction: str = ""
    channels: str = ""
    networks: dict[str, str] = field(default_factory=dict)  # name -> its weights, precision and layout
    ema: str = "no"
    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    short_hash: str | None = None
    sha256: str | None = None

    def lines(self) -> list[str]:
        """Lines of text: what, and the answer."""
        rows = [
            ("file", f"{self.path} ({self.kind}, {self.size:,} bytes, {self.tensors} tensors)"),
            ("model", self.model),
            ("predicts", self.prediction),
            ("channels", self.channels),
            *self.networks.items(),
            ("EMA", self.ema if self.networks else ""),
            ("missing", "; ".join(self.missing) or ("nothing" if self.supported else "")),
            ("unknown", _listed(self.unknown) or "nothing"),
            *(("note", note) for note in self.notes),
            ("metadata", ", ".join(f"{key}: {value}" for key, value in self.metadata.items())),
            ("short hash", f"{self.short_hash} (of 64 KB, as older tools name models)" if self.short_hash else ""),
            (
                "SHA-256",
                self.sha256 or ("" if not self.short_hash else "not computed: reads all of the file (--sha256)"),
            ),
        ]
        return [printable(f"{name + ':':<13} {value}") for name, value in rows if value]


def inspect(tensors: Checkpoint, config: Config | None = None, *, sha256: bool | None = None) -> Report:
    """Look at what an opened checkpoint holds. Of its tensors, only two small tables are read.

    config   which model it is, if known
    sha256   whether to compute the SHA-256, which reads the whole file; by default of small files only
    """
    found, layouts = shapes(tensors), find_layouts(tensors)
    files = [file.path for file in tensors.files]
    size = sum(path.stat().st_size for path in files)
    out = Report(tensors.path, tensors.kind, size, len(tensors), "", supported=False)
    out.notes += [*tensors.notes, *ignored_settings(tensors.configs), *notes_on_scheduler(tensors.configs)]
    out.metadata = {key: one_line(value, 60) for key, value in tensors.metadata.items() if not key.startswith("sd.")}
    if has_control(tensors):
        _describe_control(out, tensors, config)
        return _hashed(out, files, sha256)
    try:
        identity = identify(tensors, config)
        config, out.supported = identity.config, True
        out.model = f"{config.name}, {config.size}x{config.size}"
        said = f"{config.schedule.prediction}: {identity.reason or 'its own config says so'}"
        open_question = "eps or v: nothing says which; the U-Net is run once at loading to tell (--prediction sets it)"
        out.prediction = said if identity.decided else open_question
        out.notes += [identity.few_step] if identity.few_step else []
        inpaints = config.is_inpainting
        out.channels = f"{config.unet.in_channels} ({'inpainting' if inpaints else 'text to image'})"
    except CheckpointError as error:
        out.model = str(error)
        if not layouts:
            return _hashed(out, files, sha256)
        # a network alone: compared with the model that it most likely belongs to
        widths = {shape[-1] for key, shape in found.items() if "token_embedding" in key and shape}
        likely = {model.text[0].width: model for model in (SDXL_REFINER, SD2)}
        config = config or (SDXL if SECOND in layouts else next((likely[w] for w in widths if w in likely), SD1))
        config = with_autoencoder(config, found, match_layouts(found, config))
        if layouts.keys() == {"vae"} and not is_tiny(layouts["vae"].name):
            out.notes.append(describe_whose(tensors))
    _count(out, tensors, config)
    if damaged := damaged_position_ids(tensors):
        out.notes.append(
            f"{damaged} is damaged, as happens in merging: not used here, but other programs may misread prompts"
        )
    return _hashed(out, files, sha256)


def _count(out: Report, tensors: Checkpoint, config: Config) -> None:
    found, expected = shapes(tensors), expected_shapes(config)
    layouts = match_layouts(found, config)
    used: set[str] = set()
    for name in (*config.networks, AVERAGE):
        layout = layouts.get(name)
        if layout is None:
            if name != AVERAGE:
                out.missing.append(f"the {NAMES[name]}" + (f" ({FLAGS[name]} gives it)" if name in FLAGS else ""))
            continue
        keys = {source.key for source in layout.sources(config, expected[name], found).values()}
        here = [key for key in keys if key in found]
        gone = sorted(keys - set(here))
        used |= keys
        numbers = sum(math.prod(found[key]) for key in here)
        usual = usual_layout(name, config)
        prefixed = f" with the prefix {layout.prefix!r}" if layout.prefix else ""
        names = "" if layout == usual else f", {layout.name} names{prefixed}"
        text = f"{len(here)} weights, {numbers / 1e6:.1f} M, {_precision(tensors, here)}{names}"
        if name == AVERAGE:
            out.ema = text if not gone else f"incomplete: {len(gone)} of {len(keys)} weights missing"
            continue
        out.networks[NAMES[name]] = text
        if gone:
            out.missing.append(f"of the {NAMES[name]} {len(gone)} of {len(keys)} weights: {_listed(gone)}")
    if AVERAGE not in layouts and any(key.startswith("model_ema.") for key in found):
        out.ema = "no, only its counters"
    for name, words in zip(config.text_names, config.text, strict=True):
        if (encoder := layouts.get(name)) is not None:
            (source,) = encoder.sources(config, [TOKENS], found).values()
            own = replace(words, vocab=found[source.key][0]) if source.key in found else words
            out.notes += [line for line in describe_words(own) if line not in out.notes]  # of both encoders, once
    fewest = min(text.layers for text in config.text)
    left = [key for key in found if key not in used and not ignored(key) and not unrun(key, fewest)]
    copied = copies(left, config) if left else {}
    named = (*config.networks, AVERAGE)
    out.notes += [line for name in named for line in describe_copies(layouts, name, config, copied)]
    known = {key for keys in copied.values() for key in keys}
    out.unknown = [key for key in left if key not in known]


def _describe_control(out: Report, tensors: Checkpoint, base: Config | None) -> None:
    """A control network: which models it is for, and its weights."""
    try:
        found = identify_control(tensors, base.unet if base else None)
    except CheckpointError as error:
        out.model = str(error)
        return
    config, unet, expected = found.config, found.config.unet, control_shapes(found.config)
    sizes = f"{', '.join(map(str, unet.channels))} channels, context {unet.context}"
    kind = "a ControlNet" if not found.difference else "a ControlNet as differences from a U-Net,"
    model = family(unet, config.attends) or f"another model ({sizes})"
    out.model, out.supported = f"{kind} for {model}: give it with --control", True
    table = control_table(tensors, found)
    here = [source.key for source in table.values() if source.key in tensors]
    gone, misshapen = table_faults(shapes(tensors), table, expected)
    if gone:
        out.missing.append(f"{len(gone)} of {len(expected)} weights: {_listed(gone)}")
    out.missing += misshapen
    numbers = sum(math.prod(tensors.shape(key)) for key in here)
    prefixed = f" with the prefix {found.layout.prefix!r}" if found.layout.prefix else ""
    names = "" if found.layout.name == OWN else f", {found.layout.name} names{prefixed}"
    out.networks["control"] = f"{len(here)} weights, {numbers / 1e6:.1f} M, {_precision(tensors, here)}{names}"
    out.ema, out.unknown = "", unknown_keys(tensors, found)
    out.notes = [*found.notes, *(line for line in out.notes if line not in found.notes)]
    out.notes += ["hints have blue first"] if config.bgr else []
    averaged = config.pooled and not any("averaged" in note for note in found.notes)
    out.notes += ["its residuals are averaged over all positions"] if averaged else []


def _precision(tensors: Checkpoint, keys: list[str]) -> str:
    counts = Counter(tensors.number_type(key).name for key in keys)
    kinds = [f"{name} ({count})" if len(counts) > 1 else name for name, count in counts.most_common()]
    return " and ".join(kinds) or "none"


def _hashed(out: Report, files: list[Path], sha256: bool | None) -> Report:
    """Add the hashes of a single file; folders have none."""
    if len(files) == 1:
        out.short_hash = short_hash(files[0])
        if sha256 or (sha256 is None and out.size <= SMALL):
            with open(files[0], "rb") as stream:
                digest = hashlib.sha256()
                while block := stream.read(1 << 20):
                    digest.update(block)
            out.sha256 = digest.hexdigest()
    return out


def short_hash(path: Path) -> str:
    """Eight digits of the SHA-256 of 64 KB: the "model hash" of tools before 2023, such as 7460a6fa for sd-v1-4.ckpt.

    Quick, but files that differ elsewhere share it.
    """
    start, count = SHORT_HASH
    with open(path, "rb") as stream:
        stream.seek(start)
        return hashlib.sha256(stream.read(count)).hexdigest()[:8]


def _listed(keys: list[str]) -> str:
    return f"{len(keys)}: {listed(one_line(key, 100) for key in keys)}" if keys else ""
