"""Training data for tests, made without files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from scripts.training.batches import Batch
from scripts.training.dataset import TrainingData
from sd.pipeline import StableDiffusion


def random_data(
    model: StableDiffusion,
    counts: Mapping[tuple[int, int], int],
    repeats: Sequence[int] | None = None,
    regular: Sequence[int] = (),
    more: Mapping[str, tuple[int, ...]] | None = None,
) -> TrainingData:
    """Random latents in buckets: (h, w) -> number of images. Every image has two captions of its own.

    regular   the numbers of the images of the class
    more      other tensors of a bucket, uint8: name -> shape of a row
    """
    rng = torch.Generator().manual_seed(0)
    channels, factor = model.config.vae.latent_channels, model.config.vae.factor
    buckets, bucket, row, sizes = [], [], [], []
    for number, ((h, w), count) in enumerate(counts.items()):
        shape = (count, channels, h, w)
        tensors = {"mean": torch.randn(shape, generator=rng).half(), "std": torch.rand(shape, generator=rng).half()}
        for name, of_row in (more or {}).items():
            tensors[name] = torch.randint(1, 256, (count, *of_row), generator=rng, dtype=torch.uint8)
        buckets.append(tensors)
        bucket += [number] * count
        row += range(count)
        sizes += [[h * factor + i, w * factor, i, 0, h * factor, w * factor] for i in range(count)]
    n = len(bucket)
    texts = [text for i in range(n) for text in (f"a picture {i}", f"a photo {i}, red, green, blue")]
    return TrainingData(
        names=[f"{i}.png" for i in range(n)],
        images=list(range(n)),
        bucket=torch.tensor(bucket),
        row=torch.tensor(row),
        repeats=torch.tensor(repeats or [1] * n),
        regular=torch.tensor([i in regular for i in range(n)]),
        sizes=torch.tensor(sizes, dtype=torch.float32),
        choices=[[2 * i, 2 * i + 1] for i in range(n)],
        texts=texts,
        ids=model.tokenizer(texts).int(),
        buckets=buckets,
    )


def batch_of(x0: Tensor, ids: Tensor, t: Tensor, noise: Tensor, **more: Tensor) -> Batch:
    """A batch whose items all have weight 1."""
    return Batch(x0, noise, t, torch.ones(len(x0)), ids, **more)
