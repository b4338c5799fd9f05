"""Loading a control network from a file or folder, for a model.

    control, notes = load_control("control_v11p_sd15_canny.pth", model.config, model.device, model.dtype)
    network = with_control(model.unet, control, hint)

control_detect.py says which files these can be, and refuses others by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ..config import Config
from ..control_config import ControlConfig
from ..files import user_path
from ..messages import printable
from ..models.build import build_control, control_shapes
from ..models.controlnet import ControlNet
from .checkpoint import CheckpointError, load_checkpoint, naming
from .control_detect import FoundControl, check_fits, control_state, identify_control
from .convert import StateDict
from .loading import Report, load_weights
from .matching import shape_text
from .names import plainly_named

FOLDER = "controlnet"  # of a control network in the folder of a whole pipeline
Weights = Callable[[], Mapping[str, Tensor]]


class Sums(StateDict):
    """The weights of a "difference" file, each with that of a U-Net added to it if it has one of the same name.

    Where the file has no difference, the U-Net's own weight is it.
    """

    def __init__(self, differences: StateDict, unet: Mapping[str, Tensor], config: ControlConfig) -> None:
        self._differences, self._unet, self._shapes = differences, unet, control_shapes(config)
        self.notes, self._different = differences.notes, frozenset(differences)
        for key in self._shapes:
            if key not in unet:
                if key not in self._different:
                    raise CheckpointError(f"differences from another U-Net: the model has no {key}")
            elif tuple(self._of_unet(key).shape) != self._shapes[key]:
                found, expected = shape_text(tuple(unet[key].shape)), shape_text(self._shapes[key])
                raise CheckpointError(
                    f"differences from another U-Net: {key} is {found} in the model, expected {expected}"
                )

    def origin(self, key: str) -> str:
        """The name of a weight in the file; of one without a difference, ours."""
        return self._differences.origin(key) if key in self._different else key

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._unet:
            return self._differences[key]
        own = self._of_unet(key).to("cpu", torch.float32)
        return self._differences[key].float() + own if key in self._different else own

    def _of_unet(self, key: str) -> Tensor:
        """A weight of the U-Net. That of an inpainting model takes a mask as well, behind the latents."""
        weight = self._unet[key]
        return weight[:, : self._shapes[key][1]] if key == "conv_in.weight" else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


@contextmanager
def open_control(
    path: str | os.PathLike[str], base: Config, variant: str | None = None
) -> Iterator[tuple[FoundControl, StateDict, tuple[str, ...]]]:
    """The control network in a file or folder, checked by its names and shapes: what it is, its weights, which can be
    read within the context, and lines on what was found and chosen.

    base      the config of the model that it is for
    variant   of a diffusers folder: "fp16", ...

    Raises CheckpointError, one line with the path, for a file of something else, incomplete, or for another family; and
    gives that form to one that is raised within the context.
    """
    whole, path = user_path(path), control_path(path)
    with load_checkpoint(path, variant, mapped=True) as file, naming(path):
        found = identify_control(file, base.unet)
        check_fits(found.config, base.unet, base.name)
        inside = [f"the folder of a whole model: its {FOLDER}/ is read"] if path != whole else []
        yield found, control_state(file, found), tuple(map(printable, (*inside, *found.notes)))


def control_path(path: str | os.PathLike[str]) -> Path:
    """The file or folder of a control network; of the folder of a whole model, the folder inside."""
    path = user_path(path)
    inside = os.path.isdir(path / FOLDER) and not os.path.isfile(path / "config.json")
    return path / FOLDER if inside else path


def load_control(
    path: str | os.PathLike[str],
    base: Config,
    device: torch.device,
    dtype: torch.dtype,
    unet: Weights | None = None,
    *,
    variant: str | None = None,
    progress: Report = lambda numbers: None,
) -> tuple[ControlNet, tuple[str, ...]]:
    """The control network in a file or folder, for a model of this config; and lines on what was found and chosen.

    unet      returns the weights of the model's U-Net as they are, for example `model.unet.state_dict`: called for
              files of differences only. A LoRA that is merged into them is then in the control network as well
    variant   of a diffusers folder: "fp16", ...
    progress  called with the number of elements of each weight that was read

    Raises CheckpointError, one line with the path, for a file of something else, damaged, or for another family.
    """
    with open_control(path, base, variant) as (found, state, notes):
        if found.difference:
            if unet is None:
                raise CheckpointError("its weights are differences from those of a U-Net: load it into a model")
            state = Sums(state, plainly_named(unet()), found.config)
        network = cast(ControlNet, load_weights(build_control(found.config), state, device, dtype, progress))
    return network, notes
