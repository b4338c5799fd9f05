"""The text in the "parameters" chunk of an image of a run: everything that its pixels depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from ..params import ImageToImage, Inpaint, TextToImage
from .fields import describe
from .infotext import written

if TYPE_CHECKING:
    from ..run import Result, Run


def effective(run: Run) -> TextToImage:
    """The request of a run, without its negative prompt if that has no effect."""
    guided = run.is_guided or any(guide.uncond is not None for guide in run.guides)
    return run.request if guided else replace(run.request, negative="", negative_2=None)


def image_text(
    run: Run, result: Result, i: int, more: Mapping[str, object], end: Mapping[str, object], tags: Sequence[str] = ()
) -> str:
    """The text for image i of a run of one prompt, in the form of the web UI: `sd.read_request` reads it.

    more   entries about the initial image and the like, after the settings
    end    entries about the model and its adapters, and others that come last
    tags   the LoRAs that are merged, `<lora:name:0.8>`
    """
    request, image = effective(run), result.images[i]
    assert not isinstance(request.prompt, Tensor) and not isinstance(request.negative, Tensor)
    (prompt,) = request.prompt
    negative = request.negative if isinstance(request.negative, str) else (list(request.negative or ()) or [""])[0]
    batch, params = len(result.images), replace(run.params, seed=result.seeds[i])
    if run.source.variation_seeds:
        params = replace(params, variation_seed=run.source.variation_seeds[i])
    size = image.size
    if not isinstance(run.request, ImageToImage | Inpaint):  # what comes after sampling may enlarge the image
        _, h, w = run.model.latent_shape(run.params.height, run.params.width)
        size = (w * run.model.config.vae.factor, h * run.model.config.vae.factor)
    values = {
        **describe(run.request, params, size),
        **({"Batch size": batch, "Batch pos": i} if batch > 1 else {}),
        **more,
        **end,
    }
    return written(prompt, negative, values, tags)
