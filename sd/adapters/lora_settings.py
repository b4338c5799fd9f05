"""alpha where a LoRA file has none beside its matrices: PEFT's settings, in the metadata or beside the file.

Settings with which the matrices mean something else are refused here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ..checkpoints.checkpoint import Checkpoint, CheckpointError
from ..checkpoints.folders import model_name

MAX_SETTINGS = 1 << 20  # bytes of an adapter_config.json, or the same in metadata
CHANGE_THE_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that also change the base weights
# the regular expressions that are supported
PATTERN = re.compile(r"(?P<begin>\^|\.\*)?(?P<name>(?:[\w-]|\\?\.)+)\$?")
PARTS = re.compile(r"\.(?:lora|hada|lokr|oft)_")  # where the name of a layer ends


def read_settings(file: Checkpoint) -> dict[str, Any]:
    """PEFT's settings, from the file's metadata or an adapter_config.json beside it."""
    text = file.metadata.get("lora_adapter_metadata")
    beside = file.path.with_name("adapter_config.json")
    try:
        if text is None and model_name(file.path) == "adapter_model" and beside.is_file():
            with open(beside, "rb") as stream:
                text = stream.read(MAX_SETTINGS + 1).removeprefix(b"\xef\xbb\xbf").decode()
        if text is not None and len(text) > MAX_SETTINGS:
            raise ValueError(f"{len(text)} characters")
        found = json.loads(text) if text is not None else {}
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"the settings of its adapter cannot be read: {error!s:.100}") from None
    settings = found if isinstance(found, dict) else {}
    for network in ("", "unet.", "text_encoder.", "text_encoder_2."):
        start = settings.get(f"{network}init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(CHANGE_THE_MODEL):
            what = f"the settings of its adapter say init_lora_weights {start!r:.50}"
            raise CheckpointError(f"{what}, which changes the model's weights, too: save it as a plain LoRA with PEFT")
    return settings


def alpha_of(settings: Mapping[str, Any], key: str, network: str) -> tuple[float | None, bool]:
    """alpha of a layer by PEFT's settings, None if they have none, and whether the root of the rank divides it.

    key   of one of its matrices
    """

    def get(*names: str) -> Any:
        found = (settings.get(f"{network}.{name}", settings.get(name)) for name in names)
        return next((value for value in found if value is not None), None)

    alpha = _of_layer(get("alpha_pattern"), key, network, get("lora_alpha", "alpha"))  # of LoRA, of LoHa and LoKr
    return _number("lora_alpha", alpha), get("use_rslora") is True


def lokr_scale(settings: Mapping[str, Any], key: str, network: str) -> float | None:
    """The scale of a LoKr of PEFT, which is alpha / r also where LyCORIS's is 1; None for other adapters."""
    if settings.get("peft_type") != "LOKR":
        return None
    alpha, _ = alpha_of(settings, key, network)
    rank = _number("r", _of_layer(settings.get("rank_pattern"), key, network, settings.get("r")))
    return alpha / rank if alpha is not None and rank else None


def _of_layer(patterns: Any, key: str, network: str, usual: Any) -> Any:
    """What the settings say for the layer of a key: the first pattern that matches counts, as in PEFT."""
    name = PARTS.split(key)[0].removeprefix("base_model.model.").removeprefix(f"{network}.")
    for pattern, own in patterns.items() if isinstance(patterns, dict) else ():
        if (match := PATTERN.fullmatch(pattern)) is None:
            what = f"the settings of its adapter have the pattern {pattern!r:.50}"
            raise CheckpointError(f"{what}, which is not supported: expected the name of a layer")
        layer, begin = match["name"].replace("\\", ""), match["begin"]
        ends = name.endswith(layer if begin == ".*" else f".{layer}")
        if name == layer or (begin != "^" and ends):
            return own
    return usual


def _number(setting: str, value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= 1e6:
        raise CheckpointError(f"the settings of its adapter say {setting} {value!r:.50}, expected a number")
    return float(value)
