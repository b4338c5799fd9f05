"""Images and their latents: sizes, and the VAE for images of any size in any precision.

Large images pass through the VAE in strips. Its activations can exceed float16, so an output that is not finite is
computed again in float32: a black image is never returned. SDXL's original VAE always exceeds it: what has exceeded it
once is computed in float32 from then on (`VAE.overflows`). The VAE of Stable Diffusion is tried again each time, as it
only does for few images.

>>> from sd.config import SD1
>>> latent_shape(SD1), latent_shape(SD1, height=768), image_size(SD1, (1000, 700))
((4, 64, 64), (4, 96, 64), (424, 608))
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import cache

import torch
from PIL import Image
from torch import Tensor

from .config import SDXL, Config, TinyVAEConfig, VAEConfig
from .imaging.tensors import to_pil
from .models.build import Autoencoder
from .models.taesd import NO_ENCODER
from .models.vae import VAE, Gaussian
from .runtime.device import dtype_name
from .runtime.tiny_vae_tiling import decode_tiny_in_strips, encode_tiny_in_strips
from .runtime.vae_tiling import decode_in_strips, encode_in_strips
from .settings import whole
from .text.tokenizer import Note

# Pixels above which the VAE works in strips. On the CPU they take a few percent longer, and 1024x1024 pixels need 1 GB
# instead of 2.5 to 3.3 (docs/performance.md); on a GPU, more and smaller kernels count for more
LARGE = 1024 * 1024
LARGE_ON_CPU = 768 * 1024
MAX_SIDE = 16384  # pixels
ENCODE_IN_STRIPS: Mapping[type, Callable[..., Gaussian]] = {
    VAEConfig: encode_in_strips, TinyVAEConfig: encode_tiny_in_strips,
}  # fmt: skip
DECODE_IN_STRIPS: Mapping[type, Callable[..., Tensor]] = {
    VAEConfig: decode_in_strips, TinyVAEConfig: decode_tiny_in_strips,
}  # fmt: skip


def latent_shape(config: Config, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
    """(C, h, w) of the latents of an image, with the native size of the model for a side that is None.

    Raises ValueError, with the nearest valid sizes, for a side that is not a multiple of the VAE's factor.
    """
    factor = config.vae.factor
    sides = []
    for name, given in (("height", height), ("width", width)):
        side = config.size if given is None else whole(name, given)
        if side > MAX_SIDE:
            raise ValueError(f"{name} must be at most {MAX_SIDE}, got {side}")
        if side % factor or side < factor:
            lower, upper = max(side // factor, 1) * factor, max(-(-side // factor), 1) * factor
            near = f"{lower} or {upper}" if lower != upper else f"{lower}"
            raise ValueError(f"{name} must be a multiple of {factor}, got {side}: try {near}")
        sides.append(side // factor)
    return config.vae.latent_channels, sides[0], sides[1]


def image_size(
    config: Config, size: tuple[int, int], height: int | None = None, width: int | None = None, *, up: bool = False
) -> tuple[int, int]:
    """The (height, width) at which to generate an image of the given (width, height).

    Multiples of 8 with about the same proportions. The size of the image itself if that has from half to twice as many
    pixels as the native size, at which the model works best; otherwise as many pixels as the native size. A side that
    is given is used as it is. Sides are rounded down, so the image is cropped, or up, for an image that is padded.
    """
    factor, native = config.vae.factor, config.size
    wide, high = size
    if height is not None and width is not None:
        scale = 1.0
    elif height is not None:
        scale = height / high
    elif width is not None:
        scale = width / wide
    else:
        share = wide * high / native**2
        scale = 1.0 if 0.5 <= share <= 2 else share**-0.5

    def rounded(side: float) -> int:
        multiples = math.ceil(side / factor - 1e-6) if up else math.floor(side / factor + 1e-6)
        return min(max(multiples, 1), MAX_SIDE // factor) * factor

    height = rounded(high * scale) if height is None else height
    width = rounded(wide * scale) if width is None else width
    latent_shape(config, height, width)  # raises for a given side that is invalid
    return height, width


def check_encoder(config: Config) -> None:
    """Raise ValueError for a model whose VAE can only decode, before that is found out in the middle of a run."""
    if isinstance(config.vae, TinyVAEConfig) and not config.vae.encoder:
        raise ValueError(NO_ENCODER)


def most_at_once(config: VAEConfig | TinyVAEConfig, device: torch.device, exact: bool = False) -> int:
    """How many pixels an autoencoder takes as a whole; larger images pass through it in strips.

    exact   in float32 although the model is in half precision: maps are twice as large
    """
    most = LARGE_ON_CPU if device.type == "cpu" and isinstance(config, VAEConfig) else LARGE
    return most // 2 if exact else most


@torch.no_grad()
def encode(vae: Autoencoder, pixels: Tensor, note: Note) -> Gaussian:
    """pixels (B, 3, H, W) in [-1, 1] -> Gaussian over the latents (B, C, h, w) in float32. See `decode`."""
    count = pixels.shape[-2] * pixels.shape[-1]

    def run(vae: Autoencoder, x: Tensor, most: int) -> Tensor:
        return torch.stack(ENCODE_IN_STRIPS[type(vae.config)](vae, x) if count > most else vae.encode(x))

    if vae.overflows:
        _note_known("latent", vae, note)
    mean, std = _finite("latent", run, vae, lambda: copy.deepcopy(vae).float(), pixels, note)
    return Gaussian(mean, std)


@torch.no_grad()
def decode(vae: Autoencoder, z: Tensor, note: Note) -> list[Image.Image]:
    """Latents (B, C, h, w) -> RGB images, one at a time, which needs the memory of one.

    Large images are decoded in strips (`most_at_once`), which saves memory and changes only rounding. `note`
    receives a line if an image is computed again in float32. Raises ArithmeticError if it is not finite even then.
    """
    count = z.shape[-2] * z.shape[-1] * vae.config.factor**2

    # in float32, if it is needed: one copy for all images, as other threads may be using the VAE
    exact = cache(lambda: copy.deepcopy(vae).float())

    def run(vae: Autoencoder, x: Tensor, most: int) -> Tensor:
        return DECODE_IN_STRIPS[type(vae.config)](vae, x) if count > most else vae.decode(x)

    if vae.overflows:
        _note_known("image", vae, note)
    return [image for one in z.split(1) for image in to_pil(_finite("image", run, vae, exact, one, note))]


def _note_known(what: str, vae: Autoencoder, note: Note) -> None:
    """Say that an output is computed in float32, if that was found out in a run and not in loading, which says so."""
    found_out = not (isinstance(vae, VAE) and vae.known_to_overflow)
    bias = vae.decoder.conv_out.bias
    if found_out and what in vae.overflows and bias is not None and bias.dtype == torch.float16:
        note(f"the {what} is computed in float32: an earlier one was not finite in float16")


def _finite(
    what: str,
    run: Callable[[Autoencoder, Tensor, int], Tensor],
    vae: Autoencoder,
    exact: Callable[[], Autoencoder],
    x: Tensor,
    note: Note,
) -> Tensor:
    """The output of the VAE in float32; computed by the `exact` one if it is not finite in half precision.

    run   the VAE, its input, the number of pixels above which it works in strips -> its output
    """
    bias = vae.decoder.conv_out.bias  # a weight may be packed (runtime/packing.py), a bias never is
    assert bias is not None
    dtype, device = bias.dtype, bias.device
    known = dtype == torch.float16 and what in vae.overflows
    if known:
        out = run(exact(), x.float(), most_at_once(vae.config, device, exact=True))
    else:
        out = run(vae, x.to(dtype), most_at_once(vae.config, device))
    again = not known and dtype != torch.float32 and not out.isfinite().all()
    if again:
        note(f"the {what} is not finite in {dtype_name(dtype)}: computing it again in float32")
        out = run(exact(), x.float(), most_at_once(vae.config, device, exact=True))
    if not out.isfinite().all():
        raise ArithmeticError(
            f"the {what} is not finite (NaN) even in float32: the checkpoint or its copy in the cache folder is "
            "damaged (try --no-cache), the guidance is too large, or the U-Net overflows in half precision (try "
            "--dtype float32)"
        )
    if again and dtype == torch.float16 and isinstance(vae.config, VAEConfig) and vae.config.scale == SDXL.vae.scale:
        vae.overflows.add(what)
    return out.float()
