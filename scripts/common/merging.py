"""LoRAs merged into a checkpoint for good: the options, the weights, and what the metadata say of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sd.adapters.added import LoraFile
from sd.adapters.lora import Lora, merged_weight
from sd.adapters.lora_formats import read_lora
from sd.checkpoints.hashes import ModelHash
from sd.config import Config
from sd.few_step import named
from sd.messages import listed, printable
from sd.models.build import build

MERGED_KEY = "merged_loras"  # in the metadata of a file: JSON, the name, weight and hash of each


class Merging(NamedTuple):
    """LoRAs that fit a model, and their weights.

    config   of the merged model: a few-step LoRA makes its settings the defaults
    about    what is to be said of them, one line each
    """

    config: Config
    loras: tuple[tuple[Lora, float], ...]
    about: tuple[str, ...]

    def weight(self, network: str, key: str, before: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A weight of a network with the changes, in this precision or its own. ValueError if it is not finite."""
        if not any((network, key) in lora.changes for lora, _ in self.loras):
            return before
        return merged_weight(before, self.loras, (network, key), dtype)

    def metadata(self, before: Mapping[str, str]) -> dict[str, str]:
        """What was merged, after what the metadata of the checkpoint say was merged into it before."""
        merged = [{"name": lora.name, "weight": weight, "hash": hash_of(lora)} for lora, weight in self.loras]
        try:
            earlier = json.loads(before.get(MERGED_KEY, "[]"))
        except (ValueError, RecursionError):
            earlier = []
        merged = [*(earlier if isinstance(earlier, list) else []), *merged]
        return {MERGED_KEY: json.dumps(merged)} if merged else {}


def read_merging(files: Sequence[LoraFile], config: Config) -> Merging:
    """Read LoRA files for a model. Raises CheckpointError for one that is for another model, or damaged."""
    with torch.device("meta"):
        networks = build(config)
    loras, about = list[tuple[Lora, float]](), list[str]()
    for file in files:
        lora = read_lora(file.path, config, networks)
        loras.append((lora, file.weight))
        about += [f"LoRA {lora.name}, weight {file.weight:g}", *lora.notes]
        if lora.words:
            about.append(f"{lora.name}: its words are not merged, as a checkpoint has none: {listed(lora.words)}")
        kind = lora.few_step or named(lora.name)
        if kind is not None and file.weight > 0 and config.unet.guidance is None:
            config = kind.applied(config)
            about.append(kind.introduced(lora.name))
    return Merging(config, tuple(loras), tuple(map(printable, about)))


def hash_of(lora: Lora) -> str | None:
    """The hash of a LoRA's file that the metadata of images have, too."""
    assert lora.file is not None  # it was read
    return ModelHash(lora.file, digits=12, tensors_only=lora.file.suffix == ".safetensors").digits()
