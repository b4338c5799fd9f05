"""Captions as token ids; and their encoded text, computed once where text encoders and captions stay as they are.

The file has a row for each caption and one for the empty prompt, by a key: a SHA-256 of its token ids, the vectors of
added words, and the weights of the text encoders. Rows are used again while these are the same.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from sd.adapters.words import WordTable
from sd.pipeline import StableDiffusion
from sd.text.tokenizer import Tokenizer

from .captions import Captions, text_encoders
from .data import digest
from .dataset import EncodedTexts, TrainingData
from .processes import Processes
from .state import save_tensors

MOST = 2 << 30  # bytes of encoded text that are kept; more is encoded in each step
PART = 64  # captions encoded at once
VERSION = "1"  # of the file


def tokens(tokenizer: Tokenizer, captions: Sequence[str], main: bool) -> Tensor:
    """Token ids (N, M), int32, of captions. Warns of those that are truncated."""
    rows: list[Tensor] = []
    said: list[str] = []
    bar = tqdm(range(0, len(captions), 1000), desc="reading captions", disable=None if main else True, leave=False)
    for start in bar:
        rows.append(tokenizer(captions[start : start + 1000], said.append).int())
    if said and main:
        warnings.warn(f"{len(said)} captions are truncated, first: {said[0]}", stacklevel=2)
    return torch.cat(rows)


def weights_digest(network: nn.Module) -> str:
    """A SHA-256 of the weights of a network, as they are, and of the vectors of words that were added to it."""
    found = hashlib.sha256()
    words = {f"word {name}": each.more for name, each in network.named_modules() if isinstance(each, WordTable)}
    for name, value in {**network.state_dict(), **words}.items():
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def text_size(data: TrainingData, model: StableDiffusion, dtype: torch.dtype = torch.float16) -> int:
    """The bytes that the encoded text of the data needs."""
    length, pooled = data.ids.shape[1], model.config.text[-1].pooled_width or 0
    return (len(data.ids) + 1) * (length * model.config.unet.context + pooled) * dtype.itemsize


@torch.no_grad()
def with_encoded_text(
    path: Path, data: TrainingData, model: StableDiffusion, processes: Processes, dtype: torch.dtype = torch.float16
) -> TrainingData:
    """The data with the encoded text of all captions, which is kept in the file `path`.

    The same data where the text needs more than `MOST` bytes. Text encoders and captions must stay as they are in
    training (`Tags.change`); afterwards the text encoders are not needed.
    """
    if text_size(data, model, dtype) > MOST:
        return data
    ids = torch.cat([data.ids.long(), model.tokenizer([""]).long()])
    encoders = [weights_digest(encoder) for encoder in text_encoders(model).values()]
    settings = digest([VERSION, *encoders, repr(model.config.text), str(model.config.zero_empty), str(dtype)])
    keys = torch.stack([_key(row) for row in ids])
    if processes.local == 0:
        kept = _read(path, settings)
        known = {} if kept is None else {tuple(key): i for i, key in enumerate(kept["keys"].tolist())}
        if kept is None or not torch.equal(kept["keys"], keys):
            listed = [tuple(key) for key in keys.tolist()]
            found = _encode(ids, [i for i, key in enumerate(listed) if key not in known], model, processes.main, dtype)
            if kept is not None:
                rows = [i for i, key in enumerate(listed) if key in known]
                stored = [known[listed[i]] for i in rows]
                for name, value in found.items():
                    value[rows] = kept[name][stored]
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(found | {"keys": keys}, path, {"settings": settings})
    processes.wait()
    stored_text = _read(path, settings)
    if stored_text is None:
        raise OSError(f"{path}: cannot be read back; is the disk full, or another run writing to the same --out?")
    return replace(data, text=EncodedTexts(stored_text["context"], stored_text.get("pooled")))


def _key(ids: Tensor) -> Tensor:
    """The key (32,) of a caption, uint8."""
    found = hashlib.sha256(ids.numpy().tobytes()).digest()
    return torch.tensor(list(found), dtype=torch.uint8)


def _read(path: Path, settings: str) -> dict[str, Tensor] | None:
    """The contents of a file; None if it is missing, damaged or made with other weights."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("settings") != settings:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


def _encode(
    ids: Tensor, chosen: Sequence[int], model: StableDiffusion, main: bool, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The encoded text of all captions, on the CPU, of which only the `chosen` rows are computed."""
    captions = Captions(model)
    config = model.config
    found = {"context": torch.zeros(len(ids), ids.shape[1], config.unet.context, dtype=dtype)}
    if pooled := config.text[-1].pooled_width:
        found["pooled"] = torch.zeros(len(ids), pooled, dtype=dtype)
    starts = range(0, len(chosen), PART)
    for start in tqdm(starts, "encoding captions", disable=None if main else True, leave=False):
        rows = list(chosen[start : start + PART])
        text = captions.encode(ids[rows].to(model.device))
        found["context"][rows] = text.hidden.to("cpu", dtype)
        if text.pooled is not None:
            found["pooled"][rows] = text.pooled.to("cpu", dtype)
    return found
