"""The denoiser: a network, its prediction type and classifier-free guidance as one function (x_t, level) -> x0.

Ho and Salimans 2022, "Classifier-free diffusion guidance": with predictions c (with the prompt) and u (without, or
with the negative prompt)

    guided = u + guidance (c - u)

Composable diffusion (Liu et al. 2022, "Compositional visual generation with composable diffusion models", eq. 11) has
several predictions c_k with weights w_k in place of c:

    c = u + sum_k w_k (c_k - u)

Guidance raises the contrast of predictions. Lin et al. 2024, "Common diffusion noise schedules and sample steps are
flawed", section 3.4 (eq. 15 and 16) take a share phi of that back: with the standard deviations of each image,

    rescaled = guided std(c) / std(guided),   phi rescaled + (1 - phi) guided

This is applied to the output of the network (noise or velocity), as in the paper and in diffusers. Models with zero
terminal SNR need it: the paper recommends phi 0.7 at guidance 7.5.

The batch order [uncond, cond], or [uncond, c_1, c_2, ...], is known only here. Since x0 is linear in the prediction, it
makes no difference whether guidance, without this rescaling, is applied to the noise, the velocity or x0. Any callable
with the signature of the U-Net can replace the network, and any callable with the signature of the denoiser can replace
the denoiser: `keep_known` and `by_step` are such wrappers.

>>> level = Schedule().level(500)
>>> x0, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
>>> cond = Conditioning(torch.zeros(1, 77, 16))
>>> denoise = Denoiser(lambda x, t, conditioning: noise, Schedule(), cond)  # knows the noise
>>> torch.allclose(denoise(Schedule().add_noise(x0, noise, level), level), x0, atol=1e-5)
True
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor

from .conditioning import Composition, Conditioning, Network
from .samplers import Denoise
from .schedule import Level, Schedule


class Denoiser:
    """Guided prediction of the clean data.

    network    predicts; called in the dtype of `cond.context`
    schedule   defines what the prediction means: the noise or the velocity
    cond       the prompts, for B images, or for one if all images share it; or a `Composition` of several for each
    uncond     the empty or negative prompt, likewise; its context has the same length. Not needed at guidance 1,
               except with a `Composition`
    guidance   0 ignores the prompt, 1 is the plain prediction (at half the cost), above 1 exaggerates the prompt. A
               network that is told its guidance (`Conditioning.guidance`) has it in the prediction: 1 here
    rescale    phi, 0 to 1: the share of the contrast that guidance adds to take back

    Raises ValueError for guidance without `uncond`, and if `cond` and `uncond` do not match.
    """

    def __init__(
        self,
        network: Network,
        schedule: Schedule,
        cond: Conditioning | Composition,
        uncond: Conditioning | None = None,
        guidance: float = 1.0,
        rescale: float = 0.0,
    ) -> None:
        self.network, self.schedule, self.guidance, self.rescale = network, schedule, guidance, rescale
        self.weights: Tensor | None = None  # (K, B, 1, 1, 1)
        conds = [cond] if isinstance(cond, Conditioning) else list(cond.parts)
        if isinstance(cond, Composition):
            self.weights = cond.weights[:, :, None, None, None]
        if guidance == 1.0 and self.weights is None:
            self.parts = conds
        elif uncond is not None:
            self.parts = [uncond, *conds]
        else:
            raise ValueError(f"guidance {guidance} needs `uncond`, the conditioning to steer away from")
        # concatenated once, not in every step; again only for another batch size
        self._images = max(len(x) for part in self.parts for x in part if x is not None)
        self._conditioning = concatenate(self.parts, self._images)

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        """x (B, C, h, w) at a level -> x0 (B, C, h, w) in the precision of x."""
        if x.shape[0] != self._images:
            self._conditioning = concatenate(self.parts, x.shape[0])
            self._images = x.shape[0]
        inputs = x.to(self._conditioning.context.dtype).repeat(len(self.parts), 1, 1, 1)
        t = torch.full((inputs.shape[0],), level.t, device=x.device, dtype=torch.float32)
        out = self.network(inputs, t, self._conditioning).to(x.dtype)
        if len(self.parts) > 1:
            uncond, cond, *others = out.chunk(len(self.parts))
            if self.weights is not None:
                cond = uncond + (self.weights * (torch.stack([cond, *others]) - uncond)).sum(dim=0)
            out = uncond + self.guidance * (cond - uncond)
            if self.rescale > 0:
                out = rescaled(out, cond, self.rescale)
        return self.schedule.to_x0(out, x, level)


def concatenate(parts: Sequence[Conditioning], batch: int | None = None) -> Conditioning:
    """Concatenate conditionings along the batch, in their order.

    batch   expand each part to this many images first: a part with one image is shared by all, without a copy

    Raises ValueError if a part has another number of images, if contexts differ in length, or if only some
    parts have a vector, a concat or a guidance.
    """
    fields: list[Tensor | None] = []
    for name, values in zip(Conditioning._fields, zip(*parts, strict=True), strict=True):
        given = [x for x in values if x is not None]
        shapes = [x.shape[1:] for x in given]
        if given and len(given) < len(parts):
            raise ValueError(f"{len(given)} of {len(parts)} conditionings have a {name}: give it to all or none")
        lengths = [shape[0] for shape in shapes] if name == "context" else []
        if len(set(lengths)) > 1:
            raise ValueError(
                f"contexts must be of one length, got {' and '.join(map(str, lengths))}: pad the shorter ones with the "
                "empty prompt's (StableDiffusion.same_length)"
            )
        if len(set(shapes)) > 1:
            each = " and ".join(str(tuple(x.shape)) for x in given)
            raise ValueError(f"the conditionings' {name}s must be of one shape, got {each}")
        if batch is not None:
            for x in given:
                if x.shape[0] not in (1, batch):
                    raise ValueError(f"a {name} for {x.shape[0]} images, but there are {batch}")
            given = [x.expand(batch, *x.shape[1:]) for x in given]
        fields.append(torch.cat(given) if given else None)
    context, *others = fields
    assert context is not None
    return Conditioning(context, *others)


def rescaled(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """Lin et al. 2024, eq. 15 and 16: guided (B, C, h, w), its standard deviation moved to that of cond by a share phi.

    A prediction that is constant stays as it is.
    """
    of_cond, of_guided = (out.std(dim=(1, 2, 3), keepdim=True) for out in (cond, guided))
    factor = torch.where(of_guided > 0, of_cond / of_guided, 1.0)
    return torch.lerp(guided, guided * factor, phi)


def conditional(batch: int, images: int) -> slice:
    """Which entries of a batch are predictions with a prompt: all, or those after the first `images` with guidance."""
    return slice(images if batch > images else 0, None)


def one_by_one(networks: Sequence[Network]) -> Network:
    """A network for B images that calls the i-th network for image i alone, with all its parts [uncond, cond, ...].

    Kernels choose how they split their sums by the size of the batch, so in a batch an image is rounded differently
    than alone. With this wrapper it is bit-identical, and batches save no time.
    """

    def run(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        outputs = []
        for i, network in enumerate(networks):
            own = slice(i, None, len(networks))  # the batch has part after part, with all images in each
            outputs.append(network(x[own], t[own], conditioning.of_images(own)))
        return torch.stack(outputs, dim=1).flatten(0, 1)

    return run


def keep_known(denoise: Denoise, known: Tensor, mask: Tensor) -> Denoise:
    """A denoiser for data that is partly known: x0 is `known` (B, C, h, w) wherever mask (B, 1, h, w) is 0.

    With it, any sampler moves the known part from its noise straight to `known`, at the noise level of each step, while
    the network sees both parts and makes what it generates, where mask is 1, fit the rest.
    """
    return lambda x, level: torch.lerp(known, denoise(x, level), mask)


def by_step(denoisers: Sequence[Denoise], levels: Sequence[Level]) -> Denoise:
    """A denoiser that is another one in each step: `denoisers[i]` from `levels[i]` on, until `levels[i + 1]`.

    levels   from noisy to clean, at least as many as there are denoisers

    Samplers do not tell which step they are in, and some evaluate twice in a step. So the noise level decides: one
    between two levels of the grid belongs to the step that goes from the first to the second.
    """
    starts = [-level.ratio for level in levels[: len(denoisers)]]  # ascending
    return lambda x, level: denoisers[max(bisect_right(starts, -level.ratio) - 1, 0)](x, level)
