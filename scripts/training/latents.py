"""Training data of the U-Net: latents and caption ids of all images, computed once, and the batches of a step."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sd.imaging.masks import latent_mask, mask_channels, masked_image
from sd.pipeline import StableDiffusion
from sd.text.tokenizer import Tokenizer
from sd.training import drop_prompts, random_masks

from .data import Order, Source, cached, digest, examples, generator, hints, pixels, to_floats
from .loop import Recipe
from .models import fitting
from .processes import Processes

PART = 512 * 512 * 2  # pixels per batch of the encoder: a few full-size images, or many small ones


def latents(
    path: Path, source: Source, model: StableDiffusion, processes: Processes, workers: int, keep_pixels: bool = False
) -> dict[str, Tensor]:
    """Encode all data, or load it from the cache file `path`.

    mean, std (n, C, h, w)   float16; every use of an image samples its Gaussian again
    ids (N, M)               of all captions; image i has `count[i]` of them, from `first[i]`
    pixels (n, 3, H, W)      uint8, only with `keep_pixels`, for inpainting
    hint (n, 1 or 3, H, W)   uint8, only of a source with hints, for a control network
    """
    weights = hashlib.sha256()
    for value in model.vae.state_dict().values():
        weights.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    fingerprint = digest(
        [source.fingerprint(), weights.hexdigest(), repr(model.config.text), repr(model.config.vae), str(keep_pixels)]
    )
    return cached(path, fingerprint, processes, lambda: _encode(source, model, workers, keep_pixels, processes.main))


@torch.no_grad()
def _encode(source: Source, model: StableDiffusion, workers: int, keep_pixels: bool, main: bool) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {"mean": [], "std": [], "count": []}
    captions: list[str] = []
    for _, chunk in examples(source, workers, main):
        images = pixels(chunk)
        side = max(1, PART // images[0, 0].numel())
        for part in images.split(side):
            gaussian = model.encode(to_floats(part.to(model.device)).contiguous(memory_format=torch.channels_last))
            found["mean"].append(gaussian.mean.half().cpu())
            found["std"].append(gaussian.std.half().cpu())
        if keep_pixels:
            found.setdefault("pixels", []).append(images)
        if chunk[0].hint is not None:
            found.setdefault("hint", []).append(hints(chunk))
        found["count"].append(torch.tensor([len(example.captions) for example in chunk]))
        for example in chunk:
            captions += example.captions
    out = {name: torch.cat(parts) for name, parts in found.items()}
    return out | {"first": out["count"].cumsum(0) - out["count"], "ids": _tokens(model.tokenizer, captions, main)}


def _tokens(tokenizer: Tokenizer, captions: list[str], main: bool) -> Tensor:
    rows = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        bar = tqdm(range(0, len(captions), 1000), desc="reading captions", disable=None if main else True, leave=False)
        for start in bar:
            rows.append(tokenizer(captions[start : start + 1000]).int())
    if said and main:
        warnings.warn(f"{len(said)} captions are truncated, first: {said[0].message}", stacklevel=2)
    return torch.cat(rows)


class Batches:
    """The batches of each step for the objective of train.py: a function of seed and step."""

    def __init__(
        self,
        data: dict[str, Tensor],
        model: StableDiffusion,
        recipe: Recipe,
        processes: Processes,
        drop: float = 0.0,
        inpaint: bool = False,
        trained: int = 0,
        group: int = 1,
    ) -> None:
        """`trained` is the number of trained parameters, which need memory; `group` consecutive items stay together."""
        self.data = fitting(data, processes.device, trained)
        self.vae = model.vae
        self.steps, self.factor = model.schedule.steps, model.config.vae.factor
        self.recipe, self.processes, self.drop, self.inpaint = recipe, processes, drop, inpaint
        self.group, self.order = group, Order(len(data["mean"]) // group, recipe.seed)
        self.empty = model.tokenizer([""])[0].to(processes.device)

    def _take(self, name: str, index: Tensor) -> Tensor:
        """Rows of the data, on the device of this process."""
        stored = self.data[name]
        index = index.to(stored.device, non_blocking=stored.is_cuda)  # copies to the CPU must block
        return stored[index].to(self.processes.device, non_blocking=True)

    def _mask(self, step: int, item: int, height: int, width: int) -> Tensor:
        """The mask of one item. Masks take much memory, so they are made only for this part and process."""
        rng = generator(self.processes.device, self.recipe.seed, "mask", step, item)
        return random_masks(1, height, width, rng)

    @property
    def total(self) -> int:
        """Items of a step, in all parts of all processes."""
        return self.recipe.batch * self.recipe.accumulate * self.processes.count

    def share(self, part: int) -> slice:
        """The items of a part of a step that are this process's."""
        start = (part * self.processes.count + self.processes.rank) * self.recipe.batch
        return slice(start, start + self.recipe.batch)

    @torch.no_grad()
    def __call__(self, step: int) -> Iterator[dict[str, Tensor]]:
        """The parts of a step for this process. Random numbers are drawn for all parts of all processes."""
        recipe, device, total = self.recipe, self.processes.device, self.total
        rng = generator(device, recipe.seed, "step", step)
        groups = self.order(step * total // self.group, total // self.group)
        chosen = (groups[:, None] * self.group + torch.arange(self.group)).flatten()
        shape = (total, *self.data["mean"].shape[1:])
        noise, sampled = torch.randn(2, *shape, generator=rng, device=device)
        t = torch.randint(0, self.steps, (total,), generator=rng, device=device)
        phrasing = torch.rand(total, generator=rng, device=device)
        caption = self._take("first", chosen) + (phrasing * self._take("count", chosen)).long()
        ids = drop_prompts(self._take("ids", caption).long(), self.empty, self.drop, rng)
        for k in range(recipe.accumulate):
            mine = self.share(k)
            x0 = self._take("mean", chosen[mine]).float() + self._take("std", chosen[mine]).float() * sampled[mine]
            part = {"x0": x0, "ids": ids[mine], "t": t[mine], "noise": noise[mine]}
            if "hint" in self.data:
                part["hint"] = self._take("hint", chosen[mine])
            if self.inpaint:
                images = to_floats(self._take("pixels", chosen[mine]))
                height, width = images.shape[2:]
                masks = torch.cat([self._mask(step, mine.start + i, height, width) for i in range(recipe.batch)])
                masked = self.vae.encode(masked_image(images, masks)).mode()
                part["concat"] = mask_channels(latent_mask(masks, self.factor), masked)
            yield part
