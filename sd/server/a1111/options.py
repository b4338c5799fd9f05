"""The web UI's options: those that have an effect here, kept in memory until the server ends.

    sd_model_checkpoint        the current model: by its name, title or hash
    sd_vae                     "Automatic" and "None" are the model's own
    CLIP_stop_at_last_layers   1 is the model's own layer
    eta_noise_seed_delta       added to the seed of the noise of steps
    randn_source               CPU (here the default), GPU or NV, which are the same
    tiling                     of requests that do not say
    img2img_color_correction   results get the colours of the initial image
    live_previews_enable       whether /sdapi/v1/progress has an image

All clients share them, as in the web UI. `override_settings` of a request has the same, for this request alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...messages import one_line
from ..catalogue import UnknownName
from ..engine import Engine
from ..http import ApiError
from .errors import field_error
from .fields import Field, value_of

OWN_VAE = ("", "automatic", "none")
RNGS = {"CPU": "torch-cpu", "GPU": "nv", "NV": "nv"}
OPTIONS: dict[str, Field] = {
    "sd_vae": Field("text", "Automatic"),
    "CLIP_stop_at_last_layers": Field("whole", 1),
    "eta_noise_seed_delta": Field("whole", 0),
    "randn_source": Field("text", "CPU"),
    "tiling": Field("flag", False),
    "img2img_color_correction": Field("flag", False),
    "live_previews_enable": Field("flag", True),
}
# what clients look at and cannot change here
FIXED: dict[str, Any] = {
    "samples_format": "png",
    "samples_save": False,
    "return_grid": False,
    "grid_save": False,
    "enable_pnginfo": True,
    "show_progress_every_n_steps": 1,
    "live_previews_image_format": "png",
    "save_images_add_number": False,
    "upscaler_for_img2img": "Lanczos",
    "initial_noise_multiplier": 1.0,
    "img2img_fix_steps": False,
}


class Options:
    """The options of an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._values = {name: field.default for name, field in OPTIONS.items()}

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def shown(self) -> dict[str, Any]:
        """All of them, and those that are fixed."""
        current = self._engine.current
        known = {"sd_model_checkpoint": current.title, "sd_checkpoint_hash": current.sha256() if current.hash else ""}
        return {**known, **self._values, **FIXED}

    def checked(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Those of the given values that have an effect, and the names of the others.

        Not to be called in the event loop, as finding a model by its hash reads files. Raises ApiError for a value of
        the wrong type, and for a model or VAE that is not there.
        """
        values, ignored = dict[str, Any](), list[str]()
        for name, value in given.items():
            if name == "sd_model_checkpoint":
                if value not in (None, "", "None"):
                    values[name] = self._entry("model", name, value)
            elif name in OPTIONS and value is not None:
                values[name] = _checked(name, value_of(name, OPTIONS[name].kind, value))
                if name == "sd_vae" and values[name].lower() not in OWN_VAE:
                    self._entry("vae", name, value)
            elif name not in OPTIONS and (name not in FIXED or FIXED[name] != value) and name != "sd_checkpoint_hash":
                ignored.append(one_line(name, 60))
        return values, ignored

    def update(self, values: Mapping[str, Any]) -> None:
        """Keep values that were checked; a model becomes the current one."""
        if "sd_model_checkpoint" in values:
            self._engine.current = values["sd_model_checkpoint"]
        self._values |= {name: value for name, value in values.items() if name in OPTIONS}

    def with_(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The options with some replaced by checked values."""
        return {**self._values, **values}

    def _entry(self, kind: Any, name: str, value: object) -> Any:
        try:
            return self._engine.catalogue.find(kind, str(value_of(name, "text", value)))
        except UnknownName as error:
            raise ApiError(404, f"{name}: {error}") from None


def _checked(name: str, value: Any) -> Any:
    if name == "randn_source" and value.upper() not in RNGS:
        raise field_error(name, f"expected one of {', '.join(RNGS)}, got {one_line(value)!r}")
    if name == "CLIP_stop_at_last_layers" and not -100 <= value <= 100:
        raise field_error(name, f"expected a layer counted from the end, from 1 on, got {value}")
    if name == "eta_noise_seed_delta" and abs(value) >= 2**63:
        raise field_error(name, "too large")
    return value
