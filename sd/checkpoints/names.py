"""Names of tensors in a file, before it is known what they are for: what wrappers add to them, and which nobody needs.

>>> plain_name("model._orig_mod.diffusion_model.module.out.2.bias")
'model.diffusion_model.out.2.bias'
>>> ignored("cond_stage_model.transformer.text_model.embeddings.position_ids"), ignored("out.2.bias")
(True, False)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from .key_maps import EMA

EXTRA = "extra."  # in files of ours: tensors that only other programs need, under their original names

# What modules around a network, or around a part of it, put into the names of its weights: DistributedDataParallel,
# torch.compile, FullyShardedDataParallel, activation checkpointing, and Lightning Fabric.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
WRAPPER = re.compile(rf"(?<![^.])(?:{'|'.join(WRAPPERS)})\.")

# What a checkpoint may hold besides the weights of its networks. Anything else is an error.
IGNORED_PREFIXES = (
    EMA, EXTRA, "unet_ema.", "loss.", "first_stage_model.loss.", "first_stage_model.model_ema.", "vae.loss.",
    "embedding_manager.", "safety_checker.", "edm_", "denoiser.", "optimizer_states", "lr_schedulers",
)  # fmt: skip
IGNORED_SUFFIXES = (
    "position_ids", "logit_scale", "logit_bias", "text_projection", "text_projection.weight", "attn_mask",
    "vae_scale", "vae_shift",
)  # fmt: skip
# The part for images of a whole CLIP, in transformers and in OpenCLIP, wherever the text encoder stands.
IGNORED_PARTS = re.compile(r"(?<![^.])(?:vision_model|visual_projection|visual)\.")
IGNORED_KEYS = frozenset(
    {
        *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
        *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
        *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
        *("logvar", "lvlb_weights", "scale_factor", "v_pred", "ztsnr", "global_step", "epoch", "lr", "num_updates"),
    }
)

Value = TypeVar("Value")


def ignored(key: str) -> bool:
    """Whether a key is a known leftover: checkpoints may hold it, and no network needs it."""
    return (
        key in IGNORED_KEYS
        or key.startswith(IGNORED_PREFIXES)
        or key.endswith(IGNORED_SUFFIXES)
        or IGNORED_PARTS.search(key) is not None
    )


def plain_name(key: str) -> str:
    """A name without those of wrappers, wherever they stand in it."""
    if key.startswith(EMA):  # whose names have no dots inside
        return key.replace("_orig_mod", "")
    return WRAPPER.sub("", key)


def plain_names(keys: Iterable[str]) -> dict[str, str]:
    """Each key -> its plain name. A key stays as it is where another one has its plain name."""
    names = {key: plain_name(key) for key in keys}
    taken = {key for key, plain in names.items() if key == plain}
    for key, plain in names.items():
        if key != plain:
            if plain in taken:
                names[key] = key
            taken.add(plain)
    return names


class PlainNames(Mapping[str, Value]):
    """A mapping by the plain names of its keys."""

    def __init__(self, values: Mapping[str, Value], names: Mapping[str, str]) -> None:
        self._values, self._keys = values, {plain: key for key, plain in names.items()}

    def __getitem__(self, name: str) -> Value:
        return self._values[self._keys[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def plainly_named(values: Mapping[str, Value]) -> Mapping[str, Value]:
    """The mapping itself if all of its names are plain, or a view of it by plain names."""
    names = plain_names(values)
    return values if all(key == plain for key, plain in names.items()) else PlainNames(values, names)
