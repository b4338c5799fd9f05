"""Random numbers: the noise of a run, and the generators of other programs that it can come from.

    rng         initial noise                                    noise of the steps
    torch-cpu   torch's CPU generator, one per image             goes on with the same generators
    nv          CUDA's generator, one per image                  goes on with the same generators
    comfy       torch's CPU generator, one for the whole batch   CUDA's generator, one for the whole batch

`torch-cpu` is the default; the web UI (AUTOMATIC1111) gives the same initial noise with its setting "RNG: CPU". `nv` is
the web UI's "RNG: NV", and its default "RNG: GPU" on NVIDIA cards. `comfy` is ComfyUI on an NVIDIA card: its initial
noise comes from the CPU generator (comfy/sample.py), its step noise from that of the device, with the same seed (comfy/
k_diffusion/sampling.py). Without a GPU, ComfyUI draws the step noise from the CPU generator of seed + 1: that is not
reproduced here. DPM++ SDE and DPM++ 2M SDE draw theirs from a Brownian tree in both programs, so only the initial noise
is the same.

CUDA's generator (`Philox`) is Philox4x32-10 of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", with
the Box-Muller transform of cuRAND. It needs no GPU. torch.randn on a GPU gives the same numbers, to rounding, up to as
many as the card runs threads at once: 43,008 on an RTX 3060, enough for 820x820 pixels. Above, what a card gives
depends on the card (pytorch#196613); `nv` gives the web UI's "NV" for any size.

Seeds: image k of a request has seed + k (modulo 2^64), and does not depend on its batch or on the device. Two settings
change that. With a variation, all images have the seed itself and image k has variation_seed + k, as in the web UI.
With `comfy` all images share the generator of the seed: an image can only be generated again in the same batch.

Order: the generators draw float32 tensors of the shape of the latents (C, h, w). With `torch-cpu` they first draw the
noise of the posterior sample of the encoded image, if there is one, and that of the image with its masked part hidden,
if the model has 9 channels; then the initial noise, then that of the steps. In the other programs the initial noise
comes first, and their posterior samples have no seed: here they come from generators of their own.

>>> source = NoiseSource(SamplingParams(seed=7, n=2), 2)
>>> source.seeds, torch.equal(source.initial((4, 8, 8))[1:], draw(generators(8, 1), (4, 8, 8), torch.device("cpu")))
([7, 8], True)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .params import MAX_SEED, SamplingParams

Shape = Sequence[int]
Stream = Callable[[Shape], Tensor]  # unit normal noise of this shape, float32 on the CPU; continues with each call
CPU = torch.device("cpu")

# ------------------------------------------------------------------------------------------- torch's CPU generator


def generators(seed: int, n: int) -> list[torch.Generator]:
    """One CPU generator per image, seeded with seed, seed + 1, ... (modulo 2^64)."""
    return [torch.Generator("cpu").manual_seed((seed + i) % (MAX_SEED + 1)) for i in range(n)]


def torch_cpu(seed: int) -> Stream:
    """The numbers of torch's CPU generator (a Mersenne Twister) for a seed."""
    generator = torch.Generator("cpu").manual_seed(seed % (MAX_SEED + 1))
    return partial(torch.randn, generator=generator, device="cpu", dtype=torch.float32)


def draw(rngs: Sequence[torch.Generator], shape: Shape, device: torch.device) -> Tensor:
    """Unit normal noise (B, *shape) in float32, with one CPU generator per image.

    Drawn one by one and on the CPU: a slice of a batch's noise is not the noise of that image alone, and CUDA's
    generator gives other numbers.
    """
    each = [torch.randn(tuple(shape), generator=rng, device="cpu", dtype=torch.float32) for rng in rngs]
    return to_device(torch.stack(each), device)


def to_device(noise: Tensor, device: torch.device) -> Tensor:
    """Move noise from the CPU to a device."""
    if device.type == "cuda":  # a copy from pinned memory does not wait for the steps that are still running
        return noise.pin_memory().to(device, non_blocking=True)
    return noise.to(device)


# ------------------------------------------------------------------------------------------- CUDA's generator

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57  # Salmon et al. 2011, section 5 (Random123)
WEYL = 0x9E3779B9, 0xBB67AE85  # added to the key in each round: fractions of the golden ratio and of sqrt(3)
ROUNDS = 10
WORD = 0xFFFFFFFF
TWO_PI = float(np.float32(2 * math.pi))  # as cuRAND has it


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10: counters (4, N) and a key, all of 32 bits -> random words (4, N) of 32 bits, as uint64.

    >>> [f"{word:08x}" for word in philox4x32(np.zeros((4, 1)), (0, 0))[:, 0].tolist()]  # from Random123's test vectors
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    a, b, c, d = counter.astype(np.uint64)
    word, half = np.uint64(WORD), np.uint64(32)
    for i in range(ROUNDS):
        first, second = ((key[j] + i * WEYL[j]) & WORD for j in (0, 1))
        p, q = a * np.uint64(MULTIPLIERS[0]), c * np.uint64(MULTIPLIERS[1])
        a, b, c, d = (q >> half) ^ b ^ np.uint64(first), q & word, (p >> half) ^ d ^ np.uint64(second), p & word
    return np.stack([a, b, c, d])


class Philox:
    """CUDA's generator, computed on the CPU: the numbers of torch.randn(..., device="cuda") after a seed.

    Number i of call k comes from the counter (k, 0, i, 0) and the seed as key. cuRAND makes four normal numbers of the
    four words, of which torch uses the first for tensors of this size. Computed in float64 and rounded, so that the
    result does not depend on the processor; CUDA computes in float32, which differs by about 1e-6.
    """

    def __init__(self, seed: int) -> None:
        seed %= MAX_SEED + 1
        self.key, self.calls = (seed & WORD, seed >> 32), 0

    def __call__(self, shape: Shape) -> Tensor:
        """Unit normal noise of this shape, float32 on the CPU."""
        counter = np.zeros((4, math.prod(shape)), dtype=np.uint64)
        counter[0], counter[2] = self.calls, np.arange(counter.shape[1])
        self.calls += 1
        # Box-Muller: uniform numbers in (0, 1] and (0, 2 pi], from the middles of 2^32 intervals
        u, v = (philox4x32(counter, self.key)[:2] + 0.5) * 2.0**-32
        normal = np.sqrt(-2 * np.log(u)) * np.sin(TWO_PI * v)
        return torch.from_numpy(normal.astype(np.float32)).reshape(tuple(shape))


# ------------------------------------------------------------------------------------------- the noise of a run


class Kind(NamedTuple):
    """Which generators a value of `rng` stands for."""

    initial: Callable[[int], Stream]  # of the initial noise, by seed
    steps: Callable[[int], Stream]  # of the noise of the steps
    shared: bool = False  # one generator for the whole batch
    posterior_first: bool = False  # the noise of posterior samples comes from the generators of the initial noise


KINDS = {
    "torch-cpu": Kind(torch_cpu, torch_cpu, posterior_first=True),
    "nv": Kind(Philox, Philox),
    "comfy": Kind(torch_cpu, Philox, shared=True),
}


class NoiseSource:
    """All random numbers of a run of B images: float32 tensors (B, C, h, w) on a device, for (C, h, w).

    seeds            of each image
    variation_seeds  of each image; None without a variation
    """

    def __init__(self, params: SamplingParams, images: int, device: torch.device = CPU) -> None:
        self.images, self.device = images, device
        kind, share, delta = KINDS[params.rng], params.variation_strength, params.noise_seed_delta
        offsets = [0] * images if kind.shared else range(images)
        self.seeds = [(params.seed + (0 if share > 0 else k)) % (MAX_SEED + 1) for k in offsets]
        self.variation_seeds: list[int] | None = None
        streams = slice(1 if kind.shared else images)  # one for the whole batch, or one for each image
        own = [kind.initial(seed) for seed in self.seeds[streams]]
        self._initial = self._posterior = self._step = own
        if share > 0:
            self.variation_seeds = [((params.variation_seed or 0) + k) % (MAX_SEED + 1) for k in offsets]
            others = [kind.initial(seed) for seed in self.variation_seeds[streams]]
            self._initial = [mixed(a, b, share) for a, b in zip(own, others, strict=True)]
        if delta or kind.steps is not kind.initial:
            self._step = [kind.steps(seed + delta) for seed in self.seeds[streams]]
        if not kind.posterior_first:
            # counted from the other end: with the same seed they would give the numbers of the initial noise
            self._posterior = [torch_cpu(MAX_SEED - params.seed - k) for k in range(images)]

    def initial(self, shape: Shape) -> Tensor:
        """The initial noise, mixed with that of the variation seed."""
        return self._draw(self._initial, shape)

    def step(self, shape: Shape) -> Tensor:
        """The noise of the next step of a stochastic sampler."""
        return self._draw(self._step, shape)

    def posterior(self, shape: Shape) -> Tensor:
        """The noise of a sample from the encoder's distribution."""
        return self._draw(self._posterior, shape)

    def _draw(self, streams: Sequence[Stream], shape: Shape) -> Tensor:
        if len(streams) < self.images:  # they share one
            noise = streams[0]((self.images, *shape))
        else:
            noise = torch.stack([stream(shape) for stream in streams])
        return to_device(noise, self.device)


def mixed(a: Stream, b: Stream, share: float) -> Stream:
    """The numbers of two streams, interpolated from a (share 0) to b (1)."""
    return lambda shape: slerp(a(shape), b(shape), share)


PARALLEL = 1e-3  # sine of the angle below which two columns of noise count as parallel


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Spherical interpolation of two noises (..., h, w), from a (share 0) to b (1), which stays unit normal noise.

    Shoemake 1985, "Animating rotation with quaternion curves". Each column (h,) of the tensors is one vector, as in the
    web UI. Columns that are nearly parallel, which have no arc between them, are interpolated linearly.
    """
    cos = (a / a.norm(dim=-2, keepdim=True) * (b / b.norm(dim=-2, keepdim=True))).sum(dim=-2, keepdim=True)
    angle = cos.clamp(-1, 1).acos()
    sin = angle.sin()
    arc = (((1 - share) * angle).sin() / sin) * a + ((share * angle).sin() / sin) * b
    return torch.where(sin < PARALLEL, torch.lerp(a, b, share), arc)
