"""Where the state dict is in what trainers save: at the top, or below one of some customary names."""

from __future__ import annotations

from typing import Any

from .pickles import Stateful

MAX_NESTING = 8  # of "state_dict" in "state_dict"
# Other names of a state dict, and of those of a pipeline's networks. Of equally large ones, the first is taken.
STATE_DICTS = ("model", "module", "model_state_dict", "params", "net", "generator", "weights", "ema", "params_ema")
NETWORK_DICTS = ("text_encoder", "vae", "unet")


def inside_state_dict(content: object) -> object:
    """What is called "state_dict" in an object, or in that again; the object itself if nothing is."""
    for _ in range(MAX_NESTING):
        if isinstance(content, dict) and "state_dict" in content:
            content = content["state_dict"]
    return content


def find_state_dict(content: object, kinds: tuple[type, ...]) -> dict[str, Any]:
    """The largest dict of named objects of these kinds: trainers add a few of them, a step, the state of a generator.

    The state dicts of several networks become one, with their names as prefixes. If there is none of a customary name,
    it is the only one of another name. Empty if there is none at all.
    """
    tensors = _tensors(content, kinds)
    if not isinstance(content, dict):
        return tensors
    inner = {name: _tensors(inside_state_dict(content.get(name)), kinds) for name in (*STATE_DICTS, *NETWORK_DICTS)}
    networks = {f"{name}.{key}": tensor for name in NETWORK_DICTS for key, tensor in inner[name].items()}
    largest = max((tensors, *(inner[name] for name in STATE_DICTS), networks), key=len)
    if largest := largest or _parameters(content, "string_to_param", kinds):
        return largest
    others = [found for value in content.values() if (found := _tensors(inside_state_dict(value), kinds))]
    return others[0] if len(others) == 1 else {}


def plain_values(content: object) -> dict[str, str]:
    """Strings and numbers beside the tensors, as text; from inner state dicts, those named as parts of layers are."""
    if not isinstance(content, dict):
        return {}
    inner = [("", inside_state_dict(content)), *((f"{name}.", content.get(name)) for name in NETWORK_DICTS)]
    inner += [("", content.get(name)) for name in STATE_DICTS]
    found = {
        f"{prefix}{key}": text
        for prefix, values in inner
        for key, text in _plain(inside_state_dict(values)).items()
        if "." in key
    }
    return found | _plain(content)


def _plain(content: object) -> dict[str, str]:
    """The plain values of a dict."""
    return {
        key: str(value)
        for key, value in (content.items() if isinstance(content, dict) else ())
        if isinstance(key, str)
        and (isinstance(value, (str, float)) or (isinstance(value, int) and value.bit_length() <= 64))
    }


def _tensors(content: object, kinds: tuple[type, ...]) -> dict[str, Any]:
    """The named tensors in a dict."""
    items = content.items() if isinstance(content, dict) else ()
    return {key: value for key, value in items if isinstance(key, str) and isinstance(value, kinds)}


def _parameters(content: dict[Any, Any], name: str, kinds: tuple[type, ...]) -> dict[str, Any]:
    """The tensors in a dict or a ParameterDict inside a dict, as in textual inversion: "name.key"."""
    inner = content.get(name)
    if isinstance(inner, Stateful) and isinstance(inner.state, dict):
        inner = inner.state.get("_parameters")
    return {f"{name}.{key}": tensor for key, tensor in _tensors(inner, kinds).items()}
