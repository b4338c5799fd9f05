"""The settings in a diffusers folder's JSON files: one that changes a network is refused by name, others are said."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
from common import TINY, tiny_state
from safetensors.torch import save_file
from test_folders import edit, write_folder

from sd import StableDiffusion
from sd.checkpoints import supported_settings
from sd.checkpoints.checkpoint import CheckpointError, load_checkpoint
from sd.checkpoints.diffusers_config import from_diffusers, schedule_from_diffusers
from sd.checkpoints.diffusers_export import to_diffusers_configs
from sd.checkpoints.inspect import inspect as inspect_file
from sd.checkpoints.supported_settings import ignored_settings
from sd.config import SD1, Config
from sd.schedule import to_zero_snr

OTHER_SETTINGS = [
    *(("unet", {key: value}, f"unet/config.json has {key} {value!r}, which is not supported: expected ")
      for key, value in {
          "act_fn": "gelu", "norm_num_groups": 16, "norm_eps": 1e-6, "flip_sin_to_cos": False, "freq_shift": 1,
          "center_input_sample": True, "time_embedding_type": "fourier", "time_embedding_dim": 64,
          "time_embedding_act_fn": "silu", "timestep_post_act": "silu", "resnet_time_scale_shift": "scale_shift",
          "resnet_skip_time_act": True, "resnet_out_scale_factor": 1.4, "conv_in_kernel": 5, "conv_out_kernel": 1,
          "downsample_padding": 0, "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "mid_block_scale_factor": 1.5,
          "only_cross_attention": [True, True, False], "mid_block_only_cross_attention": True,
          "dual_cross_attention": True, "cross_attention_norm": "layer_norm", "class_embeddings_concat": True,
          "encoder_hid_dim_type": "text_proj",
      }.items()),
    ("unet", {"reverse_transformer_layers_per_block": [1, 1, 1]}, "expected one entry for each of 4 levels"),
    ("unet", {"norm_num_groups": None}, "unet/config.json has norm_num_groups None, which is not supported"),
    ("unet", {"time_cond_proj_dim": 255}, "UNetConfig.guidance: got 255, expected an even number from 4"),
    ("unet", {"time_cond_proj_dim": "wide"}, "UNetConfig.guidance: got 'wide', expected whole numbers"),
    ("unet", {"attention_type": "gated"}, "a GLIGEN model"),
    ("unet", {"encoder_hid_dim": 4096}, "whose text encoder is another one"),
    ("unet", {"addition_embed_type": "image"}, "conditioned on images"),
    ("unet", {"quantization_config": {"quant_method": "bitsandbytes"}}, "a quantised model"),
    ("unet", {"_class_name": "UNet3DConditionModel"}, "a video model"),
    ("unet", {"_class_name": "Kandinsky3UNet"}, "another network than Stable Diffusion's U-Net"),
    ("unet", {"up_block_types": ["UpBlock2D"] * 3}, "has up_block_types"),
    *(("vae", {key: value}, f"vae/config.json has {key} {value!r}, which is not supported: expected ")
      for key, value in {
          "act_fn": "relu", "norm_num_groups": 16, "mid_block_add_attention": False, "use_quant_conv": False,
          "use_post_quant_conv": False, "shift_factor": 0.1159, "latents_mean": [0.1] * 4, "latents_std": [2.0] * 4,
          "out_channels": 4, "down_block_types": ["AttnDownEncoderBlock2D"],
      }.items()),
    ("vae", {"_class_name": "AutoencoderTiny"}, "vae/config.json has scaling_factor 0.18215, which is not supported"),
    ("vae", {"_class_name": "VQModel"}, "another autoencoder than Stable Diffusion's VAE"),
    ("text_encoder", {"hidden_act": "gelu_new"}, "text_encoder/config.json has hidden_act 'gelu_new'"),
    ("text_encoder", {"layer_norm_eps": 1e-6}, "text_encoder/config.json has layer_norm_eps 1e-06"),
    ("text_encoder", {"max_position_embeddings": 248}, "a text encoder with 248 positions (Long-CLIP)"),
    ("text_encoder", {"max_position_embeddings": 64}, "text_encoder/config.json has max_position_embeddings 64"),
    ("text_encoder", {"architectures": ["T5EncoderModel"]}, "another text encoder than CLIP's"),
    ("text_encoder", {"model_type": "roberta"}, "text_encoder/config.json has model_type 'roberta'"),
    ("scheduler", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "a flow model"),
    ("scheduler", {"_class_name": "EDMEulerScheduler"}, "the EDM noise schedule"),
    ("scheduler", {"beta_schedule": "squaredcos_cap_v2"}, "has beta_schedule 'squaredcos_cap_v2'"),
    ("scheduler", {"use_flow_sigmas": True}, "scheduler/scheduler_config.json has use_flow_sigmas True"),
]  # fmt: skip


def settings_of(config: Config) -> dict[str, dict]:
    files = json.loads(json.dumps(to_diffusers_configs(config)))
    configs = {name: files[f"{name}/config.json"] for name in ("unet", "vae", "text_encoder")}
    return {**configs, "scheduler": files["scheduler/scheduler_config.json"]}


@pytest.mark.parametrize("part, changes, words", OTHER_SETTINGS)
def test_a_setting_that_changes_a_network_is_refused_by_name(part, changes, words):
    configs = settings_of(SD1)
    assert from_diffusers(configs) == SD1
    with pytest.raises(CheckpointError) as caught:
        from_diffusers(configs | {part: configs[part] | changes})
    assert words in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize(
    "part, same",
    [
        ("unet", {
            "act_fn": "swish", "only_cross_attention": [False] * 4, "freq_shift": 0.0, "mid_block_scale_factor": 1.0,
            "class_embed_type": None, "num_class_embeds": None, "attention_type": "default", "upcast_attention": True,
            "dropout": 0.1, "time_embedding_dim": 1280, "encoder_hid_dim": None, "cross_attention_norm": None,
            "_class_name": "FlaxUNet2DConditionModel", "time_cond_proj_dim": None, "addition_time_embed_dim": None,
            "mid_block_only_cross_attention": None, "norm_eps": None, "resnet_out_scale_factor": 1,
        }),
        ("vae", {
            "act_fn": "swish", "shift_factor": None, "force_upcast": False, "latents_mean": [0.0] * 4,
            "latents_std": [1.0] * 4, "use_quant_conv": True,
        }),
        ("text_encoder", {
            "projection_dim": 512, "architectures": ["CLIPTextModelWithProjection"], "eos_token_id": 2,
            "attention_dropout": 0.1, "torch_dtype": "float16",
        }),
        ("scheduler", {
            "_class_name": "PNDMScheduler", "clip_sample": True, "skip_prk_steps": True, "timestep_spacing": "trailing",
            "use_karras_sigmas": True, "trained_betas": None, "set_alpha_to_one": True, "steps_offset": 0,
        }),
    ],
)  # fmt: skip
def test_settings_that_change_nothing_here(part, same):
    configs = settings_of(SD1)
    assert from_diffusers(configs | {part: configs[part] | same}) == SD1
    assert list(ignored_settings(configs | {part: configs[part] | same})) == []


def test_every_argument_of_diffusers_is_known():
    """Those that a later version adds show up here: each is a size, a setting with a supported value, or free."""
    diffusers = pytest.importorskip("diffusers")
    for part, network, table in (
        ("unet", diffusers.UNet2DConditionModel, supported_settings.UNET),
        ("vae", diffusers.AutoencoderKL, supported_settings.VAE),
    ):
        arguments = set(inspect.signature(network.__init__).parameters) - {"self"}
        assert arguments <= {*table, *supported_settings.FREE[part].split()}


def test_unknown_settings_are_said(tmp_path):
    folder = write_folder(tmp_path / "model", tiny_state(), TINY)
    edit(folder / "unet/config.json", new_attention="linear", off=False, nothing=None)
    edit(folder / "scheduler/scheduler_config.json", thresholding=True)
    model = StableDiffusion.load(folder, device="cpu", dtype="float32")
    said = ("unet/config.json has new_attention 'linear', which is unknown and ignored",
            "scheduler/scheduler_config.json asks for thresholding, which no sampler here has: ignored")  # fmt: skip
    assert model.about[-2:] == said
    with load_checkpoint(folder) as checkpoint:
        assert tuple(inspect_file(checkpoint).notes[-2:]) == said


def test_a_linear_schedule_with_zero_terminal_snr():
    raw = {"beta_schedule": "linear", "beta_start": 0.1, "beta_end": 0.3, "num_train_timesteps": 3}
    schedule = schedule_from_diffusers({**raw, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    assert schedule.alpha_bar == pytest.approx(tuple(to_zero_snr(np.array([0.9, 0.72, 0.504]))))
    assert schedule.alpha_bar[-1] == 0 and schedule.to_noise


OPTIONS = {"device": "cpu", "dtype": "float32"}


@pytest.mark.parametrize(
    "part, changes, words",
    [
        ("unet", {"norm_eps": 1e-6}, "norm_eps"),
        ("vae", {"act_fn": "relu"}, "act_fn"),
        ("text_encoder", {"layer_norm_eps": 1e-6}, "layer_norm_eps"),
    ],
)
def test_settings_count_whatever_model_is_given(tmp_path, part, changes, words):
    """Also where the config is the caller's, and for a folder without the U-Net's settings."""
    folder = write_folder(tmp_path / "model", tiny_state(), TINY)
    edit(folder / part / "config.json", **changes)
    with pytest.raises(CheckpointError, match=f"model: {part}/config.json has {words}"):
        StableDiffusion.load(folder, config=TINY, **OPTIONS)
    if part != "unet":
        (folder / "unet/config.json").unlink()
        with pytest.raises(CheckpointError, match=f"model: {part}/config.json has {words}"):
            StableDiffusion.load(folder, **OPTIONS)


@pytest.mark.parametrize(
    "part, changes",
    [("vae", {"_class_name": "VQModel"}), ("text_encoder", {"max_position_embeddings": 248})],
)
def test_another_file_in_place_of_what_is_not_supported(tmp_path, part, changes):
    """What the message says to do works."""
    folder = write_folder(tmp_path / "model", tiny_state(), TINY)
    edit(folder / part / "config.json", **changes)
    save_file(tiny_state(), tmp_path / "whole.safetensors")
    option = part.replace("_", "-")
    with pytest.raises(CheckpointError, match=f"give .* --{option}"):
        StableDiffusion.load(folder, config=TINY, **OPTIONS)
    model = StableDiffusion.load(folder, config=TINY, **OPTIONS, **{part: tmp_path / "whole.safetensors"})
    assert model.config == TINY
