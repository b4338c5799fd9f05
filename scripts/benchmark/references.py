"""Reference networks: those of diffusers and transformers with our weights, for comparison.

They are built from a config; nothing is downloaded. They share the tensors of our networks where the memory layout
permits it, so that both together need little more memory than one. Each is called like ours:
`unet(x, t, conditioning)`, `vae.moments(image)`, `vae.decode(z)`, `text_encoder(ids).hidden`,
of which the reference returns the tensor, and `encode(ids)` both outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from sd.checkpoints.control_export import control_to_diffusers
from sd.checkpoints.control_maps import DIFFUSERS, ControlLayout
from sd.checkpoints.diffusers_export import unet_to_diffusers, vae_to_diffusers
from sd.checkpoints.key_maps import diffusers_sources, text_of
from sd.conditioning import Conditioning, TextOutput
from sd.config import SIZE_WIDTH, Config, TextConfig, TinyVAEConfig
from sd.control_config import ControlConfig

REQUIRED = ("diffusers", "transformers")
LAYOUTS = {"channels_last": torch.channels_last, "default": torch.contiguous_format}


class ReferenceUNet(nn.Module):
    """diffusers' UNet2DConditionModel with the signature of ours."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        conditioning: Conditioning,
        down: Sequence[Tensor] | None = None,
        middle: Tensor | None = None,
    ) -> Tensor:
        """x (B, C, H, W), t (B,), context (B, M, D), vector and extra channels -> (B, C_out, H, W).

        down, middle   residuals of a control network
        """
        x = x if conditioning.concat is None else torch.cat([x, conditioning.concat], dim=1)
        return self.model(
            x, t, conditioning.context, added_cond_kwargs=_added(conditioning), return_dict=False,
            down_block_additional_residuals=down, mid_block_additional_residual=middle,
        )[0]  # fmt: skip


class ReferenceControlNet(nn.Module):
    """diffusers' ControlNetModel; its hint is an image, which is embedded at each call."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, x: Tensor, t: Tensor, conditioning: Conditioning, hint: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """x (B, C, h, w), t (B,), the conditioning, hint (B, 3, H, W) in [0, 1] -> residuals (down, middle)."""
        x = x[:, : self.model.config.in_channels]  # without those of a mask
        down, middle = self.model(
            x, t, conditioning.context, hint, added_cond_kwargs=_added(conditioning), return_dict=False
        )
        return tuple(down), middle


def _added(conditioning: Conditioning) -> dict[str, Tensor] | None:
    """A vector as diffusers takes it; the sizes in it are embedded already (`_without_sizes`)."""
    if conditioning.vector is None:
        return None
    return {"text_embeds": conditioning.vector[:, :1], "time_ids": conditioning.vector[:, 1:]}


class ReferenceVAE(nn.Module):
    """diffusers' AutoencoderKL, or its AutoencoderTiny, with the signature of ours, which includes the scale factor."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, 3, H, W) in [-1, 1] -> mean and log variance of the unscaled latent, each (B, 4, h, w)."""
        gaussian = self.model.encode(image, return_dict=False)[0]
        return gaussian.mean, gaussian.logvar

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w) -> image (B, 3, H, W)."""
        return self.model.decode(z / self.model.config.scaling_factor, return_dict=False)[0]


class ReferenceTextEncoder(nn.Module):
    """transformers' CLIPTextModel, with or without a projection."""

    def __init__(self, model: Any, config: TextConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, M) -> hidden (B, M, D)."""
        return self.encode(ids).hidden

    def encode(self, ids: Tensor) -> TextOutput:
        """ids (B, M) -> hidden (B, M, D) and, if the model uses it, pooled (B, P)."""
        config = self.config
        out = self.model(ids) if config.hidden_norm else self.model(ids, output_hidden_states=True)
        hidden = out.last_hidden_state if config.hidden_norm else out.hidden_states[config.hidden_layer]
        if not config.pooled:
            return TextOutput(hidden)
        return TextOutput(hidden, out.text_embeds if config.projection else out.pooler_output)


def missing() -> list[str]:
    """The required packages that are not installed."""
    return [name for name in REQUIRED if find_spec(name) is None]


def require() -> None:
    """Raise ValueError, in one line, if diffusers or transformers is not installed."""
    if gone := missing():
        raise ValueError(f"comparing needs {' and '.join(REQUIRED)}: pip install {' '.join(gone)}")


def libraries() -> None:
    """Import the packages, and silence their log messages and progress bars."""
    require()
    import diffusers
    import transformers
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel  # noqa: F401

    for package in (diffusers, transformers):
        package.utils.logging.set_verbosity_error()
        package.utils.logging.disable_progress_bar()


def peers(
    networks: Mapping[str, nn.Module], config: Config, dtype: torch.dtype, layout: str = "channels_last"
) -> dict[str, nn.Module]:
    """Reference networks for ours (`Config.networks`), with their weights, on their device, in `dtype`.

    "control" is a control network for the U-Net, a `ControlNet` with all of its first half.

    layout   of convolution kernels: "channels_last" like ours, or "default" as diffusers loads them

    Raises ValueError if diffusers or transformers is not installed.
    """
    require()
    states = {name: network.state_dict() for name, network in networks.items()}
    sources = diffusers_sources(config, {name: keys for name, keys in states.items() if name != "control"})
    if "control" in states:
        sources["control"] = ControlLayout(DIFFUSERS, "").sources(ControlConfig.of(config.unet), states["control"])
    makers = {"vae": _vae, "unet": _unet, "control": _control}
    texts = {name: text_of(config, name) for name in config.text_names if name in networks}
    with torch.device("meta"):
        built = {name: _text_encoder(texts[name]) if name in texts else makers[name](config) for name in networks}
    for name, model in built.items():
        has = model.state_dict()
        state = {}
        for key, source in sources[name].items():
            tensor = states[name][key].to(dtype)
            tensor = tensor.reshape(tensor.shape + (1,) * source.ones)
            kind = LAYOUTS[layout] if tensor.dim() == 4 else torch.contiguous_format
            key = source.key if source.key in has else f"text_model.{source.key}"
            state[key] = tensor.contiguous(memory_format=kind)
        model.load_state_dict(state, strict=True, assign=True)
        model.requires_grad_(False).eval()
    for name, text in texts.items():  # their position ids are on the meta device and not in the state dict
        embeddings = next(module for module in built[name].modules() if hasattr(module, "position_ids"))
        device = next(iter(states[name].values())).device
        embeddings.position_ids = torch.arange(text.length, device=device).unsqueeze(0)
    wrapped: dict[str, nn.Module] = {name: ReferenceTextEncoder(built[name], text) for name, text in texts.items()}
    kinds: dict[str, Callable[[Any], nn.Module]] = {
        "vae": ReferenceVAE, "unet": ReferenceUNet, "control": ReferenceControlNet,
    }  # fmt: skip
    wrapped |= {name: kinds[name](model) for name, model in built.items() if name in kinds}
    return {name: wrapped[name].eval() for name in built}


def scheduler(config: Config, kind: str = "DDIMScheduler", **options: Any) -> Any:
    """A scheduler of diffusers, by class name, for the noise schedule of a config; `options` are passed to it."""
    require()
    import diffusers

    predictions = {"eps": "epsilon", "v": "v_prediction"}
    return getattr(diffusers, kind)(
        num_train_timesteps=config.schedule.steps,
        beta_start=config.schedule.beta_start,
        beta_end=config.schedule.beta_end,
        beta_schedule="scaled_linear",
        prediction_type=predictions[config.schedule.prediction],
        clip_sample=False,
        **options,
    )


def pipeline(built: Mapping[str, nn.Module], config: Config) -> Any:
    """diffusers' pipeline of `peers` with DDIM on the original's step grid; takes encoded prompts.

    It is a StableDiffusionPipeline, or a StableDiffusionXLPipeline for a model with two text encoders. The latter tells
    the U-Net the sizes themselves, so `built["unet"]` can no longer be called with a vector in which they are embedded.
    """
    require()
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from diffusers.models.embeddings import Timesteps

    parts: dict[str, Any] = {name: built[name].model for name in config.networks}
    parts |= {name.replace("text_encoder", "tokenizer"): None for name in config.text_names}
    parts["scheduler"] = scheduler(config, steps_offset=1, set_alpha_to_one=False, timestep_spacing="leading")
    pipe: Any
    if len(config.text) > 1:
        parts["unet"].add_time_proj = Timesteps(SIZE_WIDTH, flip_sin_to_cos=True, downscale_freq_shift=0)
        options = {"force_zeros_for_empty_prompt": config.zero_empty, "add_watermarker": False}
        parts["vae"].register_to_config(force_upcast=False)  # decode in the given precision, as ours does
        pipe = StableDiffusionXLPipeline(**parts, **options)
    else:
        pipe = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _unet(config: Config) -> Any:
    from diffusers import UNet2DConditionModel

    return _without_sizes(UNet2DConditionModel(**unet_to_diffusers(config)), config)


def _control(config: Config) -> Any:
    from diffusers import ControlNetModel

    return _without_sizes(ControlNetModel(**control_to_diffusers(ControlConfig.of(config.unet))), config)


def _without_sizes(model: Any, config: Config) -> Any:
    if config.unet.vector is not None:
        model.add_time_proj = nn.Identity()  # ours is told the embedded sizes
    return model


def _vae(config: Config) -> Any:
    from diffusers import AutoencoderKL, AutoencoderTiny

    kind = AutoencoderTiny if isinstance(config.vae, TinyVAEConfig) else AutoencoderKL
    return kind(**vae_to_diffusers(config))


def _text_encoder(cfg: TextConfig) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if cfg.projection else CLIPTextModel
    return kind(
        CLIPTextConfig(
            vocab_size=cfg.vocab,
            hidden_size=cfg.width,
            intermediate_size=4 * cfg.width,
            num_hidden_layers=cfg.layers,
            num_attention_heads=cfg.heads,
            max_position_embeddings=cfg.length,
            hidden_act=cfg.activation,
            projection_dim=cfg.projection or cfg.width,
        )
    )
