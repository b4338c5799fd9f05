"""alpha where a LoRA file has none beside its matrices: PEFT's settings, in the metadata or beside the file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ..checkpoints.checkpoint import Checkpoint, CheckpointError
from ..checkpoints.folders import model_name

MAX_SETTINGS = 1 << 20  # bytes of an adapter_config.json, or the same in metadata
PARTS = re.compile(r"\.(?:lora|hada|lokr|oft)_")  # where the name of a layer ends


def read_settings(file: Checkpoint) -> dict[str, Any]:
    """PEFT's settings, from the file's metadata or an adapter_config.json beside it."""
    text = file.metadata.get("lora_adapter_metadata")
    beside = file.path.with_name("adapter_config.json")
    try:
        if text is None and model_name(file.path) == "adapter_model" and beside.is_file():
            with open(beside, "rb") as stream:
                text = stream.read(MAX_SETTINGS + 1).decode()
        if text is not None and len(text) > MAX_SETTINGS:
            raise ValueError(f"{len(text)} characters")
        found = json.loads(text) if text is not None else {}
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"the settings of its adapter cannot be read: {error!s:.100}") from None
    return found if isinstance(found, dict) else {}


def alpha_of(settings: Mapping[str, Any], key: str, network: str) -> tuple[float | None, bool]:
    """alpha of a layer by PEFT's settings, None if they have none, and whether the root of the rank divides it.

    key   of one of its matrices
    """

    def get(*names: str) -> Any:
        found = (settings.get(f"{network}.{name}", settings.get(name)) for name in names)
        return next((value for value in found if value is not None), None)

    name = PARTS.split(key)[0]
    alpha = get("lora_alpha", "alpha")  # of LoRA, and of LoHa and LoKr
    patterns = get("alpha_pattern")
    for layer, own in patterns.items() if isinstance(patterns, dict) else ():
        if not re.fullmatch(r"[\w.-]+", layer):  # PEFT takes any regular expression
            what = f"the settings of its adapter have the pattern {layer!r:.50}"
            raise CheckpointError(f"{what}, which is not supported: expected the name of a layer")
        if name == layer or name.endswith(f".{layer}"):
            alpha = own
            break  # the first match counts, as in PEFT
    if alpha is None:
        return None, False
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or abs(alpha) > 1e6:
        raise CheckpointError(f"the settings of its adapter say lora_alpha {alpha!r:.50}, expected a number")
    return float(alpha), get("use_rslora") is True
