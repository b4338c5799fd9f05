"""The control networks of a model: adding and removing them, and the hints of a request at work.

    model.add_control("control_sd15_canny.safetensors", "canny")
    model.txt2img("a castle", controls=[Control("canny", edges, scale=0.8)])

Control networks stay on the device beside the U-Net, also with `low_memory`: both are needed in every step.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageChops, ImageFilter, ImageOps

from .config import Config
from .control import AppliedControl
from .control_config import ControlConfig
from .control_params import Control
from .files import user_path
from .imaging.hints import hint_image, looks_inverted, looks_shaded, placed
from .imaging.tensors import CROP_NOTE, kept_by_crop, to_tensor
from .models.controlnet import ControlNet
from .resources import EMBEDDED_CONTROLS, resource
from .runtime.cuda_graphs import Recorded
from .runtime.optimize import optimize
from .text.tokenizer import Note, warn

OF_LINES = re.compile(r"edges|canny|scribble|mlsd", re.IGNORECASE)  # in names of networks whose hints are pure lines
BORDER = 5  # pixels across a border that hold the edges found there


class LoadedControl(NamedTuple):
    """A control network of a model: itself, and recorded where the U-Net is."""

    network: ControlNet
    fast: Callable[..., Any]


class Controllable:
    """A model to which control networks can be added."""

    config: Config
    device: torch.device
    dtype: torch.dtype
    unet: torch.nn.Module
    _controls: dict[str, LoadedControl]

    @property
    def controls(self) -> dict[str, ControlConfig]:
        """The control networks that were added: name -> config."""
        return {name: loaded.network.control_config for name, loaded in self._controls.items()}

    def add_control(
        self, control: str | os.PathLike[str] | ControlNet, name: str | None = None, *, note: Note = warn
    ) -> str:
        """Add a control network, for the `controls` of requests; returns its name.

        control   a file or folder as other programs and this one write them, a network, or the name of one that comes
                  with the embedded model: "edges". Of a network that is being trained, or is elsewhere or in another
                  precision than the model, a copy is used
        name      that of the network from then on; by default the file's
        note      receives lines on what was found and chosen; they are UserWarnings if it is not given

        Raises CheckpointError for a file that is not a control network, or one for another family of models;
        ValueError if the name is taken.
        """
        if isinstance(control, ControlNet):
            network, name = control, name or control.control_config.name
            if not network.control_config.fits(self.config.unet):
                raise ValueError(f"the {network.control_config.name} is for another U-Net than {self.config.name}'s")
        else:
            from .checkpoints.control_detect import control_name

            path = _path(control)
            name = name or (str(control) if str(control) in EMBEDDED_CONTROLS else control_name(path))
        if name in self._controls:
            raise ValueError(f"there is a control network {name!r} already: give this one another name")
        if not isinstance(control, ControlNet):
            from .checkpoints.control_files import load_control

            network, notes = load_control(path, self.config, self.device, self.dtype, lambda: self.unet.state_dict())
            for line in notes:
                note(line)
        elif not self._can_use(control):
            network = copy.deepcopy(control).to(self.device, self.dtype)
        if network.control_config.factor != self.config.vae.factor:
            raise ValueError(
                f"control {name}: its hint block reduces hints to 1/{network.control_config.factor}, the model's VAE "
                f"images to 1/{self.config.vae.factor}"
            )
        network = optimize(network.requires_grad_(False).eval())  # type: ignore[assignment]
        fast: Callable[..., Any] = network
        if self.device.type == "cuda" and isinstance(getattr(self, "_fast_unet", None), Recorded):
            fast = Recorded(network, what=f"control network {name}")
        self._controls[name] = LoadedControl(network, fast)
        return name

    def _can_use(self, network: ControlNet) -> bool:
        """Whether a network can be used as it is."""
        trained = network.training or any(weight.requires_grad for weight in network.parameters())
        bias = network.zero_mid.bias
        return not trained and bias is not None and (bias.device, bias.dtype) == (self.device, self.dtype)

    def remove_control(self, *names: str) -> None:
        """Remove control networks, all if no name is given. Raises ValueError for an unknown name."""
        for name in names or [*self._controls]:
            self.control_network(name)
            del self._controls[name]

    def control_network(self, name: str) -> LoadedControl:
        """The control network of this name. Raises ValueError, which lists those there are, for an unknown one."""
        if name not in self._controls:
            known = ", ".join(self._controls) or "none"
            raise ValueError(f"the model has no control network {name!r} (it has {known}): add it with add_control")
        return self._controls[name]


def _path(control: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The path of a control network, or of the embedded one of this name."""
    name = str(control)
    return resource(EMBEDDED_CONTROLS[name]) if name in EMBEDDED_CONTROLS else user_path(control)


# an RGB hint and its `fit` -> the hint at the size generated, and the share of it that is kept
Place = Callable[[Image.Image, str], tuple[Image.Image, float]]


def applied(
    model: Controllable, controls: Sequence[Control], place: Place, images: int, note: Note
) -> list[AppliedControl]:
    """The hints of a request for a batch of so many images, with their control networks.

    place   puts a hint where the image is
    note    receives lines on hints that are cropped, or look as if they were inverted

    Raises ValueError if the model has no control network of a name.
    """
    found = []
    for control in controls:
        network, fast = model.control_network(control.name)
        hint = _read(control)
        if control.annotate == "none" and looks_inverted(hint):
            note(
                f"control {control.name}: the hint looks like black lines on white; control networks expect white "
                'lines on black: invert it (annotate "invert")'
            )
        elif control.annotate == "none" and OF_LINES.search(control.name) and looks_shaded(hint):
            note(
                f"control {control.name}: the hint looks like a picture, not like lines: if it is one, its edges are "
                'the hint (annotate "canny")'
            )
        image, kept = place(hint, control.fit)
        if kept < CROP_NOTE:
            note(f"control {control.name}: {100 - 100 * kept:.0f} % of the hint is cut off")
        pixels = (to_tensor(_annotated(control, image, hint.size, place)) + 1) / 2
        found.append(
            AppliedControl(
                fast, network.embed, pixels.to(model.device),  # now: no step must wait for it
                control.scale, soft=control.mode != "balanced",
                guess=control.mode == "control" or network.control_config.pooled, images=images, first=network.first,
            )
        )  # fmt: skip
    return found


def hint_at(control: Control, place: Place) -> Image.Image:
    """The RGB hint of a control where the image is: its own image, or the edges of the picture that it has.

    Raises ValueError for an image that cannot be read, and if what finds edges is not installed.
    """
    hint = _read(control)
    return _annotated(control, place(hint, control.fit)[0], hint.size, place)


def _read(control: Control) -> Image.Image:
    """The image of a control in RGB. Colour profiles apply to pictures only: a hint's values are data."""
    try:
        return hint_image(control.image, managed=control.annotate != "none")
    except ValueError as error:
        raise ValueError(f"control {control.name}: the hint: {error}") from None


def _annotated(control: Control, image: Image.Image, size: tuple[int, int], place: Place) -> Image.Image:
    """The hint in its place, or what is made of the image in its place, which had this size."""
    if control.annotate == "none":
        return image
    inside = place(Image.new("RGB", size, "white"), control.fit)[0]
    if control.annotate == "invert":
        return ImageChops.multiply(ImageOps.invert(image), inside)
    from .imaging.annotate import canny  # what it needs is optional

    # where the picture ends within the image is no edge of anything in it
    return ImageChops.multiply(canny(image, control.low, control.high), inside.filter(ImageFilter.MinFilter(BORDER)))


def at_size(width: int, height: int) -> Place:
    """Places hints on an image that is generated at this size, cropped or padded as they ask for."""

    def place(hint: Image.Image, how: str) -> tuple[Image.Image, float]:
        return placed(hint, width, height, how), kept_by_crop(hint.size, (width, height)) if how == "crop" else 1.0

    return place


def like_image(size: tuple[int, int], width: int, height: int, how: str, region: Sequence[int] | None = None) -> Place:
    """Places hints like an initial image of a size (width, height): cropped to a region of it, if there is one; then
    cropped or padded, as the image is, to the size generated at."""

    def place(hint: Image.Image, _: str) -> tuple[Image.Image, float]:
        whole, kept = placed(hint, *size, "crop"), kept_by_crop(hint.size, size)
        part = whole if region is None else whole.crop(tuple(region))  # type: ignore[arg-type]
        return placed(part, width, height, how), kept

    return place
