"""Latents of all images, computed once and kept in a file, by the contents of the images.

The file has rows for the images of a run, each with its key, a SHA-256 of the image's contents, its mask and hint, and
the sizes that it may get. When images are added or removed, the rows of the others are used again. They are all made
anew for another VAE.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from sd.pipeline import StableDiffusion

from .buckets import Placement, Shape, place, summary
from .data import Example, Record, Source, World, digest, examples, pixels, to_floats
from .dataset import FLIPPED, TrainingData
from .processes import Processes
from .state import save_tensors
from .texts import tokens, weights_digest

PART = 512 * 512 * 2  # pixels per batch of the encoder: a few full-size images, or many small ones
VERSION = "2"  # of the file
SECONDS = 300  # after which what is encoded is saved, so that a run that is stopped does not begin from nothing
KEY = 32  # bytes of a key

Row = tuple[Shape, int]  # the bucket and the row in it


class Stored:
    """What a file of latents has: for each bucket (H, W) tensors with a row for each image.

    Besides the tensors of `TrainingData.buckets`: key (m, 32) and sizes (m, 6); and where captions come with the
    pixels, they are in `captions`.
    """

    def __init__(self) -> None:
        self.buckets: dict[Shape, dict[str, Tensor]] = {}
        self.captions: dict[Shape, list[list[str]]] = {}
        self.items: list[str] = []  # the key of each item of the run; "" for one that cannot be read

    @classmethod
    def of(cls, parts: Mapping[Shape, Mapping[str, list[Tensor]]], captions: dict[Shape, list[list[str]]]) -> Stored:
        """From the tensors of several batches of each bucket."""
        found = cls()
        found.captions = captions
        for shape, bucket in parts.items():
            found.buckets[shape] = {name: torch.cat(tensors) for name, tensors in bucket.items()}
        return found

    @classmethod
    def read(cls, path: Path, settings: str) -> Stored:
        """The contents of a file; nothing if it is missing, damaged or made with other settings."""
        found = cls()
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("settings") != settings:
                    return found
                found.items = _keys(file.get_tensor("items"))
                for name in file.keys():  # noqa: SIM118
                    where, _, what = name.partition(".")
                    if not what:
                        continue
                    height, _, width = where.partition("x")
                    shape = int(height), int(width)
                    tensor = file.get_tensor(name)
                    if what == "captions":
                        found.captions[shape] = json.loads(tensor.numpy().tobytes())
                    else:
                        found.buckets.setdefault(shape, {})[what] = tensor
        except (OSError, SafetensorError, ValueError):
            return cls()
        return found

    def write(self, path: Path, settings: str) -> None:
        """Write the file, atomically."""
        tensors = {"items": _bytes(self.items)}
        for (height, width), bucket in self.buckets.items():
            tensors |= {f"{height}x{width}.{name}": tensor for name, tensor in bucket.items()}
        for (height, width), captions in self.captions.items():
            text = np.frombuffer(json.dumps(captions).encode(), np.uint8)
            tensors[f"{height}x{width}.captions"] = torch.from_numpy(text.copy())
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, path, {"settings": settings})

    @property
    def rows(self) -> dict[str, Row]:
        """Where each key is."""
        return {
            key: (shape, row) for shape, bucket in self.buckets.items() for row, key in enumerate(_keys(bucket["key"]))
        }

    def only(self, keys: Iterable[str]) -> Stored:
        """The rows of some of the keys."""
        rows, kept = self.rows, dict[Shape, list[int]]()
        for key in dict.fromkeys(keys):
            if key in rows:
                kept.setdefault(rows[key][0], []).append(rows[key][1])
        found = Stored()
        for shape, chosen in kept.items():
            found.buckets[shape] = {name: tensor[chosen] for name, tensor in self.buckets[shape].items()}
            if shape in self.captions:
                found.captions[shape] = [self.captions[shape][row] for row in chosen]
        return found

    def joined(self, other: Stored) -> Stored:
        """The rows of both, which have the same kinds of tensors."""
        found = Stored()
        for shape in sorted({*self.buckets, *other.buckets}):
            parts = [each.buckets[shape] for each in (self, other) if shape in each.buckets]
            found.buckets[shape] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            if captions := [each.captions[shape] for each in (self, other) if shape in each.captions]:
                found.captions[shape] = [texts for part in captions for texts in part]
        return found


def latents(
    path: Path,
    source: Source,
    model: StableDiffusion,
    processes: Processes,
    workers: int,
    keep_pixels: bool = False,
    flip: bool = False,
) -> TrainingData:
    """Encode all data, or load it from the cache file `path`; only what is not in it is encoded.

    keep_pixels   for inpainting
    flip          encode mirrored images too
    """
    settings = digest([VERSION, weights_digest(model.vae), repr(model.config.vae), str(keep_pixels), str(flip)])
    if processes.local == 0:
        keys = _all_keys(source, workers, processes.main)
        stored = Stored.read(path, settings)
        rows = stored.rows
        wanted = [i for i, key in enumerate(keys) if key not in rows]
        found = stored.only(keys) if rows.keys() - set(keys) else stored
        if wanted:
            for made in _encode(source, model, workers, (keep_pixels, flip, processes.main), (wanted, keys)):
                found = found.joined(made)
                found.write(path, settings)
        known = found.rows
        items = [key if key in known else "" for key in keys]
        if items != found.items:
            found.items = items
            found.write(path, settings)
        del stored, found
    processes.wait()
    data = _assembled(source, Stored.read(path, settings), model, processes.main)
    if processes.main and not isinstance(source, World):
        print(_described(data))
    return data


def _all_keys(source: Source, workers: int, main: bool) -> list[str]:
    """The key of each item; files are read in several threads."""
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        found = pool.map(source.key, range(len(source)))
        return list(tqdm(found, "checking images", len(source), disable=None if main else True, leave=False))


@torch.no_grad()
def _encode(
    source: Source,
    model: StableDiffusion,
    workers: int,
    flags: tuple[bool, bool, bool],
    items: tuple[Sequence[int], Sequence[str]],
) -> Iterator[Stored]:
    """Encode items (their numbers, and the keys of all), and yield the new rows every few minutes.

    flags   `keep_pixels`, `flip`, and whether to report
    """
    (keep_pixels, flip, main), (new, keys) = flags, items
    parts: dict[Shape, dict[str, list[Tensor]]] = {}
    captions: dict[Shape, list[list[str]]] = {}
    known = set[str]()
    saved = time.monotonic()
    for numbers, chunk in examples(source, workers, main, new):
        fresh = {keys[i]: k for k, i in reversed(list(enumerate(numbers))) if keys[i] not in known}  # each image once
        known |= fresh.keys()
        numbers, chunk = [numbers[k] for k in sorted(fresh.values())], [chunk[k] for k in sorted(fresh.values())]
        shapes = [example.pixels.shape[:2] for example in chunk if example.pixels is not None]
        for shape in sorted(set(shapes)):
            chosen = [k for k, each in enumerate(shapes) if each == shape]
            group = [chunk[k] for k in chosen]
            bucket = parts.setdefault((shape[0], shape[1]), {})
            made = _bucket(group, model, keep_pixels, flip)
            made["key"] = _bytes([keys[numbers[k]] for k in chosen])
            for name, tensor in made.items():
                bucket.setdefault(name, []).append(tensor)
            own = [(k, source.record(numbers[k])) for k in chosen]
            if any(record.captions is None for _, record in own):
                captions.setdefault((shape[0], shape[1]), []).extend(list(chunk[k].captions) for k, _ in own)
        if time.monotonic() - saved > SECONDS:
            yield Stored.of(parts, captions)
            parts, captions, saved = {}, {}, time.monotonic()
    if parts:
        yield Stored.of(parts, captions)


def _bucket(group: Sequence[Example], model: StableDiffusion, keep_pixels: bool, flip: bool) -> dict[str, Tensor]:
    """The rows of some examples of one size."""
    images = pixels(group)
    found: dict[str, list[Tensor]] = {}
    for part in images.split(max(1, PART // images[0, 0].numel())):
        for prefix, shown in (("", part), (FLIPPED, part.flip(-1)))[: 1 + flip]:
            floats = to_floats(shown.to(model.device)).contiguous(memory_format=torch.channels_last)
            gaussian = model.encode(floats)
            found.setdefault(f"{prefix}mean", []).append(gaussian.mean.half().cpu())
            found.setdefault(f"{prefix}std", []).append(gaussian.std.half().cpu())
    out = {name: torch.cat(parts) for name, parts in found.items()}
    places = [each.place or _whole(images) for each in group]
    out["sizes"] = torch.tensor([each.sizes for each in places], dtype=torch.float32)
    if keep_pixels:
        out["pixels"] = images
    if group[0].hint is not None:
        out["hint"] = _stacked([example.hint for example in group])
    if group[0].mask is not None:
        masks = _stacked([example.mask for example in group]).float() / 255
        out["mask"] = F.avg_pool2d(masks, model.config.vae.factor).half()
    return out


def _whole(images: Tensor) -> Placement:
    height, width = images.shape[-2:]
    return place((width, height), [(height, width)])


def _stacked(arrays: Sequence[np.ndarray | None]) -> Tensor:
    """Arrays (H, W) or (H, W, C) -> (B, 1 or C, H, W), uint8."""
    stacked = np.stack([np.atleast_3d(array) for array in arrays if array is not None])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2)


def _assembled(source: Source, stored: Stored, model: StableDiffusion, main: bool) -> TrainingData:
    """The data of the items that the file has."""
    rows, shapes = stored.rows, sorted(stored.buckets)
    numbers = {key: number for number, key in enumerate(dict.fromkeys(stored.items))}
    records: list[Record] = []
    places: list[tuple[int, int]] = []
    images, captions = [], []
    for i, key in enumerate(stored.items):
        if not key:
            continue
        record, (shape, row) = source.record(i), rows[key]
        records.append(record)
        places.append((shapes.index(shape), row))
        images.append(numbers[key])
        captions.append(stored.captions[shape][row] if record.captions is None else list(record.captions))
    texts = list(dict.fromkeys(text for each in captions for text in each))
    index = {text: k for k, text in enumerate(texts)}
    buckets = [stored.buckets[shape] for shape in shapes]
    return TrainingData(
        names=[record.name for record in records],
        images=images,
        bucket=torch.tensor([bucket for bucket, _ in places]),
        row=torch.tensor([row for _, row in places]),
        repeats=torch.tensor([record.repeats for record in records]),
        regular=torch.tensor([record.regular for record in records]),
        sizes=torch.stack([buckets[bucket]["sizes"][row] for bucket, row in places]),
        choices=[[index[text] for text in each] for each in captions],
        texts=texts,
        ids=tokens(model.tokenizer, texts, main),
        buckets=[{name: value for name, value in each.items() if name not in ("key", "sizes")} for each in buckets],
    )


def _described(data: TrainingData) -> str:
    """One line on the images of folders: sizes and crops; images of the class, repeats and masks if there are any."""
    places = []
    for height, width, _, _, *target in data.sizes.int().tolist():
        places.append(place((width, height), [(target[0], target[1])]))
    parts = [summary(data.names, places)]
    if regular := int(data.regular.sum()):
        parts.append(f"{regular} of them class images")
    if (shown := int(data.repeats[~data.regular].sum())) != len(data) - regular:
        parts.append(f"{shown} shown per epoch")
    if all("mask" in bucket for bucket in data.buckets):
        masked = sum(bool((data.take("mask", [i]) < 1).any()) for i in range(len(data)))
        parts.append(f"{masked} with a mask" if masked else "no masks found for --masked: whole images are learned")
    return "; ".join(parts)


def _bytes(keys: Sequence[str]) -> Tensor:
    """Keys -> (n, 32), uint8; "" is zeros."""
    joined = b"".join(bytes.fromhex(key or "00" * KEY) for key in keys)
    return torch.from_numpy(np.frombuffer(joined, np.uint8).copy()).reshape(-1, KEY)


def _keys(stored: Tensor) -> list[str]:
    """The reverse of `_bytes`."""
    found = [bytes(row).hex() for row in stored.numpy()]
    return ["" if not int(key, 16) else key for key in found]
