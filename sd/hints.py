"""What to use here for methods that models of torch and pipelines of diffusers have.

>>> Hints().to("cuda")
Traceback (most recent call last):
AttributeError: 'Hints' has no 'to': device and precision are arguments of StableDiffusion.load(path, device=, dtype=)
"""

from __future__ import annotations

from typing import Any

LOAD = "device and precision are arguments of StableDiffusion.load(path, device=, dtype=)"
NETWORKS = "the networks have it: model.unet, model.vae, model.text_encoder"
LOW_MEMORY = "StableDiffusion.load(path, low_memory=True) keeps one network at a time on the device"
HINTS = {
    **dict.fromkeys(("to", "cpu", "cuda", "half", "float", "double", "bfloat16"), LOAD),
    **dict.fromkeys(("parameters", "named_parameters", "modules", "state_dict", "load_state_dict"), NETWORKS),
    **dict.fromkeys(("train", "eval", "requires_grad_", "components"), NETWORKS),
    **dict.fromkeys(("enable_model_cpu_offload", "enable_sequential_cpu_offload"), LOW_MEMORY),
    "compile": "model.unet = torch.compile(model.unet), or StableDiffusion.load(path, compile=True)",
    "scheduler": 'the sampler is a setting of each image: model.txt2img(..., sampler="euler")',
    "load_lora_weights": "model.add_lora(path, weight)",
    "load_textual_inversion": "model.add_embedding(path)",
    "save_pretrained": "scripts/convert.py writes checkpoints",
}


SETTLED = dict.fromkeys(("device", "dtype"), LOAD)  # fixed by load: the networks already have them


class Hints:
    """An object whose AttributeErrors say what to use for the usual names, also where they are assigned to."""

    def __getattr__(self, name: str) -> Any:
        """Called for attributes that are not there."""
        hint = f": {HINTS[name]}" if name in HINTS else ""
        raise AttributeError(f"{type(self).__name__!r} has no {name!r}{hint}", name=name, obj=self)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse what would have no effect: `model.scheduler = ...`, `model.dtype = ...`."""
        hint = SETTLED.get(name) if name in self.__dict__ else HINTS.get(name)
        if hint is not None:
            raise AttributeError(f"{name!r} of {type(self).__name__!r} cannot be set: {hint}", name=name, obj=self)
        super().__setattr__(name, value)
