"""Names and contents of the original layout, against diffusers' converter of single files.

Each tensor of a full-size checkpoint is one number, its own, in the shape of the tensor, which takes no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from common import manifest
from torch import Tensor

from sd.checkpoints.convert import convert
from sd.checkpoints.diffusers_export import unet_to_diffusers, vae_to_diffusers
from sd.checkpoints.export import to_diffusers
from sd.checkpoints.key_maps import text_of
from sd.config import SD1, SD1_INPAINT, SD2, SD2_V, SDXL, SDXL_REFINER, Config
from sd.models.build import weight_shapes

FILES = {
    "sd-v1": SD1, "sd-v1-inpainting": SD1_INPAINT, "sd-v2-base": SD2, "sd-v2-768-v": SD2_V, "sdxl-base": SDXL,
    "sdxl-refiner": SDXL_REFINER,
}  # fmt: skip
UNUSED = {"text_model.embeddings.position_ids", "logit_scale"}


def numbered(name: str) -> dict[str, Tensor]:
    """A checkpoint whose tensors are their numbers; q, k and v of one tensor have three."""
    state = {}
    for i, (key, (shape, _)) in enumerate(manifest(name).items()):
        value = torch.tensor(3 * i, dtype=torch.int16)
        if "in_proj" in key:
            third = torch.arange(3, dtype=torch.int16).repeat_interleave(shape[0] // 3)
            value = value + third.reshape(-1, *[1] * (len(shape) - 1))
        state[key] = value.expand(shape)
    return state


def theirs(tool: Any, state: dict[str, Tensor], config: Config) -> dict[str, Mapping[str, Tensor]]:
    """What diffusers makes of a checkpoint, by our networks' names."""
    found = {
        "unet": tool.convert_ldm_unet_checkpoint(dict(state), unet_to_diffusers(config)),
        "vae": tool.convert_ldm_vae_checkpoint(dict(state), vae_to_diffusers(config)),
    }
    for i, name in enumerate(config.text_names):
        if text_of(config, name).names == "openclip":
            prefix = f"conditioner.embedders.{i}.model." if config.sizes else "cond_stage_model.model."
            found[name] = tool.convert_open_clip_checkpoint(None, dict(state), prefix)
        else:
            prefix = f"conditioner.embedders.{i}.transformer." if config.sizes else "cond_stage_model.transformer."
            found[name] = tool.convert_ldm_clip_checkpoint(dict(state), prefix)
    return found


@pytest.mark.parametrize("name", FILES)
def test_diffusers_converts_the_same_tensors_to_the_same_names(name):
    tool = pytest.importorskip("diffusers.loaders.single_file_utils")
    config = FILES[name]
    state = numbered(name)
    states = convert(state, config)
    ours = dict(zip(states, to_diffusers(states, config).values(), strict=False))
    for network, expected in theirs(tool, state, config).items():
        found = ours[network]
        if network in config.text_names:
            expected = {key if key.startswith("text_") else f"text_model.{key}": x for key, x in expected.items()}
        missing = expected.keys() - found.keys() - UNUSED
        assert not found.keys() - expected.keys()
        assert all(is_unrun(key, config, network) for key in missing), sorted(missing)
        for key in found:
            assert found[key].shape == expected[key].shape, key
            if not is_unrun(key, config, network):  # of which the folder has a copy of the layer before it
                assert found[key].flatten()[0] == expected[key].flatten()[0], key
    assert set(weight_shapes(config)) == set(ours)


def is_unrun(key: str, config: Config, network: str) -> bool:
    """Whether a tensor is of the last layer of SD 2's or SDXL's text encoder, or of SD 2's projection."""
    if network not in config.text_names:
        return False
    text = text_of(config, network)
    return f"layers.{text.layers}." in key or (not text.pooled and "projection" in key)
