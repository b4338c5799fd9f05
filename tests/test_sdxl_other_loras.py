"""LoRA files that are for another model than SDXL or for more than it: refused by name, or taken in part."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sdxl_common import (
    FC1,
    pair,
)
from test_lora import saved
from torch import Tensor

from sd.adapters.lora_formats import read_lora
from sd.checkpoints.checkpoint import CheckpointError
from sd.config import SD1, SD2, SDXL, SDXL_REFINER, Config
from sd.models.build import build

K = "lora_unet_{}_transformer_blocks_0_attn2_to_k"
Q = "lora_unet_{}_transformer_blocks_0_attn1_to_q"
REFUSED: list[tuple[Config, dict[str, Tensor], str]] = [
    (SDXL, pair(K.format("down_blocks_1_attentions_0"), 768, 640), "made for Stable Diffusion 1.x, whose U-Net"),
    (SDXL, pair(K.format("down_blocks_1_attentions_0"), 1024, 640), "made for Stable Diffusion 2.x, .* not 2048"),
    (SDXL, pair(K.format("down_blocks_2_attentions_0"), 1280, 1280), "made for SDXL's refiner, .* 1280 wide, not 2048"),
    (SDXL, pair(Q.format("down_blocks_0_attentions_0"), 320, 320) | pair(Q.format("mid_block_attentions_0"), 1280, 9),
     r"a LoRA for Stable Diffusion 1.x or 2.x \(lora_unet_down_blocks_0_.*\), not for this model \(SDXL base\): take"),
    (SDXL, pair("unet.up_blocks.3.attentions.0.proj_in", 320, 320), "a LoRA for Stable Diffusion 1.x or 2.x "),
    (SDXL, pair(Q.format("input_blocks_1_1"), 320, 320), "a LoRA for Stable Diffusion 1.x or 2.x "),
    (SDXL, pair("lora_te_text_model_encoder_layers_0_mlp_fc1", 1024, 9), "made for Stable Diffusion 2.x, whose text"),
    (SD1, pair(K.format("input_blocks_4_1"), 2048, 640), "made for SDXL, whose U-Net expects texts 2048 wide, not 768"),
    (SD1, pair(f"lora_te2_text_model_{FC1}", 9, 9), r"a LoRA for SDXL .*, not for this model .Stable Diffusion 1"),
    (SD2, pair("unet.down_blocks.1.attentions.0.transformer_blocks.1.ff.net.2", 9, 9), "a LoRA for SDXL .*: take one"),
    (SDXL_REFINER, pair(K.format("input_blocks_4_1"), 2048, 768), "made for SDXL, .* 2048 wide, not 1280"),
    (SDXL, pair("lora_unet_double_blocks_0_img_attn_qkv", 4, 4), r"a LoRA for Flux .*\(only .* 1.x, 2.x and XL\)"),
    (SDXL, pair("lora_te3_encoder_block_0", 4, 4), r"a LoRA for SD 3 or Flux, which is not supported \(only"),
]  # fmt: skip


@pytest.mark.parametrize("config, tensors, message", REFUSED)
def test_other_families_are_refused(config, tensors, message, tmp_path):
    with pytest.raises(CheckpointError, match=message) as refused:
        read_lora(saved(tmp_path, tensors), config, build(config))
    assert "\n" not in str(refused.value)


def test_a_smaller_u_net_takes_what_it_has(tmp_path):
    """SSD-1B has no attention in the middle: a LoRA of SDXL is not one for another family."""
    small = replace(SDXL, unet=replace(SDXL.unet, depth=(0, 2, 4), up_depth=((0, 0, 0), (2, 1, 1), (4, 4, 10)),
                                       middle_depth=0))  # fmt: skip
    tensors = pair(Q.format("middle_block_1"), 1280, 1280) | pair(Q.format("input_blocks_7_1"), 1280, 1280)
    lora = read_lora(saved(tmp_path, tensors), small, build(small))
    assert [*lora.changes] == [("unet", "down.2.attn.0.blocks.0.attn1.q.weight")]
    assert "of layers that this model does not have" in lora.notes[0]


def test_a_layer_of_clip_that_is_not_run(tmp_path):
    """SDXL does not run the last layer of CLIP-L, which files of kohya's trainer have."""
    name = "lora_te1_text_model_encoder_layers_11_mlp_fc1"
    unrun = pair(name, 768, 3072)
    run = pair(name.replace("_11_", "_10_"), 768, 3072)
    lora = read_lora(saved(tmp_path, unrun | run), SDXL, build(SDXL))
    assert [*lora.changes] == [("text_encoder", "blocks.10.fc1.weight")]
    assert "2 of 4 tensors have no effect: 2 of text encoder layers after the last one that is run" in lora.notes[0]
