"""Files that `torch.save` wrote of something else than named weights, recognised by the keys of the pickled dict."""

from __future__ import annotations

import re

# Regular expressions that match the keys, one a line -> what the file is and what to do; the first match counts.
OTHERS: tuple[tuple[str, str], ...] = (
    (r"^(320|640|768|1024|1280|layer_structure)$", "a hypernetwork of the web UI, an addition to a checkpoint that is "
     "not supported; LoRAs are (--lora)"),
    (r"^(param_groups|optimizer_state_dict)$", "the state of an optimizer, not a model; give the model that was "
     "trained with it"),
    (r"^(_last_lr|base_lrs|torch_manual_seed|numpy_random_seed|random_state|python_rng_state)$", "the state of a "
     "training run, not a model; give the model that it wrote"),
)  # fmt: skip
MAX_KEYS = 1000  # looked at


def other_pickle(content: object) -> str | None:
    """What an unpickled dict without named tensors is, and what to do; None if its keys say nothing."""
    keys = [str(key)[:100] for key in list(content)[:MAX_KEYS]] if isinstance(content, dict) else []
    return next((what for pattern, what in OTHERS if any(re.search(pattern, key) for key in keys)), None)
