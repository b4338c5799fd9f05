"""Initial images and masks as the web UI uses them.

    resize_mode     0 stretches to the size generated, 1 crops, 2 repeats the edges; 3 is 0 with latents: 0 is used
    mask            white is generated; of an image with transparent parts, what is opaque
    whole picture   the result has the size generated
    only masked     the result has the size of the image; only the region around the mask is generated

Source: AUTOMATIC1111/stable-diffusion-webui modules/processing.py (`StableDiffusionProcessingImg2Img.init`,
`create_binary_mask`) and modules/images.py (`resize_image`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from PIL import Image, ImageOps

from ...imaging.tensors import fit, frame, resize
from ..http import ApiError
from ..incoming import image_of
from .errors import field_error
from .fields import Given

MODES = ("stretched", "cropped", "filled", "stretched")
LATENTS = 3
CONTENTS = {0: "fill", 1: "original", 2: "noise", 3: "fill"}
OPAQUE = 128  # of 255
Note = Callable[[str], object]


class Masked(NamedTuple):
    """A mask (mode L, white is generated), and the settings of `Inpaint` that it comes with."""

    mask: Image.Image
    settings: dict[str, Any]


class Budget:
    """Decodes the images of a request, as long as they have not too many pixels: each of them, and all together."""

    def __init__(self, most: int, together: int | None = None) -> None:
        """`most` pixels of an image; `together` those of all, by default four times as many."""
        self.most, self.left = most, 4 * most if together is None else together

    def decoded(self, text: object, name: str) -> Image.Image:
        """The image in a text in base64. Raises ApiError, with the name."""
        try:
            image = image_of(text, min(self.most, self.left), name)  # type: ignore[arg-type]
        except ValueError as error:
            raise ApiError(422, str(error)) from None
        self.left -= image.width * image.height
        return image


def initial_images(given: Given, budget: Budget) -> list[Image.Image]:
    """The images of a request. Raises ApiError if there is none, and for what is no image."""
    images = given["init_images"]
    if not images:
        raise ApiError(404, "Init image not found: init_images must have an image as base64")
    if len(images) > max(given["batch_size"], 1):
        raise field_error("init_images", f"{len(images)} images are more than batch_size {given['batch_size']}")
    return [budget.decoded(image, f"init_images[{i}]") for i, image in enumerate(images)]


def to_size(image: Image.Image, width: int | None, height: int | None, mode: int) -> Image.Image:
    """An image at the size generated; unchanged if a side is not given, which the model then chooses."""
    if width is None or height is None or image.size == (width, height):
        return image
    how = MODES[mode]
    return (
        fit(image, width, height)
        if how == "cropped"
        else frame(image, width, height)[0]
        if how == "filled"
        else resize(image, width, height)
    )


def resize_mode(given: Given, note: Note) -> int:
    """The resize mode of a request. Raises ApiError for an unknown one."""
    mode = int(given["resize_mode"])
    if not 0 <= mode < len(MODES):
        raise field_error("resize_mode", f"expected 0 to {len(MODES) - 1}, got {mode}")
    if mode == LATENTS:
        note("resize_mode 3: the image is enlarged, not its latents")
    return mode


def masked(given: Given, budget: Budget, note: Note) -> Masked | None:
    """The mask of a request; None without one."""
    if not given["mask"]:
        return None
    mask = _grey(budget.decoded(given["mask"], "mask"))
    if given["inpainting_mask_invert"]:
        mask = ImageOps.invert(mask)
    blur = given["mask_blur"]
    if blur is None:
        blur = max(given["mask_blur_x"], given["mask_blur_y"])
        if given["mask_blur_x"] != given["mask_blur_y"]:
            note(f"mask_blur_x and mask_blur_y differ: {blur:g} is used for both")
    content = given["inpainting_fill"]
    if content not in CONTENTS:
        raise field_error("inpainting_fill", f"expected 0 to {len(CONTENTS) - 1}, got {content}")
    if content == 3:
        note("inpainting_fill 3, latent nothing, is not available: the part is filled with the colours around it")
    margin = given["inpaint_full_res_padding"] if given["inpaint_full_res"] else None
    return Masked(mask, {"blur": max(blur, 0.0), "content": CONTENTS[content], "margin": margin})


def _grey(mask: Image.Image) -> Image.Image:
    if mask.mode == "RGBA":  # strokes on a transparent layer
        return mask.getchannel("A").point([0] * (OPAQUE + 1) + [255] * (255 - OPAQUE))
    return mask.convert("L")
