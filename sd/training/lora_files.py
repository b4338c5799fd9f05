"""The contents of LoRA files that other programs read: tensors and metadata, in two namings.

"kohya", of kohya's scripts, for the web UI, ComfyUI, diffusers and this project:

    lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight    A (r, in)
                                                                        .lora_up.weight      B (out, r)
                                                                        .alpha               a number
                                                                        .dora_scale          m (out, 1), of DoRA

For SDXL, the U-Net's layers are named as in the original, lora_unet_input_blocks_4_1_..., and those of the two text
encoders lora_te1_... and lora_te2_.... The metadata are "ss_..." of kohya's scripts and "modelspec...." of Stability
AI's; each is written only if it is true and known.

"peft", of diffusers' `save_lora_weights` and PEFT, for diffusers and this project; diffusers reads a DoRA only in it:

    unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight            A (r, in)
                                                                   .lora_B.weight            B (out, r)
                                                                   .lora_magnitude_vector    m (out,), of DoRA

The ranks and alphas are in the metadata, as settings of PEFT.

All of these programs compute a LoRA alike, but not a DoRA: LyCORIS and this project compute it as it was trained, in
both namings; diffusers ignores `dora_scale`; ComfyUI divides by |W| instead of |W + s B A|; and the web UI takes norms
of inputs only. For these two, merge it into a checkpoint (scripts/convert.py --lora).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence

import safetensors.torch
import torch
from torch import Tensor

from ..checkpoints.key_maps import UNET, Source, diffusers_sources, original_sources
from ..config import Config
from .lora import LoraLayer, TrainableLora

NAMINGS = ("kohya", "peft")

# The other metadata of kohya's scripts about a training, without "ss_"; their README explains them.
FACTS = frozenset({
    "adaptive_noise_scale", "batch_size_per_device", "bucket_info", "cache_latents", "caption_dropout_rate",
    "clip_skip", "color_aug", "dataset_dirs", "debiased_estimation", "enable_bucket", "epoch", "flip_aug",
    "gradient_accumulation_steps", "gradient_checkpointing", "huber_c", "huber_schedule", "keep_tokens",
    "learning_rate", "loss_type", "lr_scheduler", "lr_warmup_steps", "max_bucket_reso", "max_grad_norm",
    "max_token_length", "max_train_steps", "min_bucket_reso", "min_snr_gamma", "mixed_precision",
    "multires_noise_discount", "multires_noise_iterations", "new_sd_model_hash", "noise_offset",
    "num_batches_per_epoch", "num_epochs", "num_reg_images", "num_train_images", "optimizer", "output_name",
    "prior_loss_weight", "reg_dataset_dirs", "resolution", "sd_model_hash", "sd_model_name", "seed", "session_id",
    "shuffle_caption", "steps", "tag_frequency", "text_encoder_lr", "total_batch_size", "training_comment",
    "training_finished_at", "training_started_at", "unet_lr", "vae_name", "zero_terminal_snr",
})  # fmt: skip
# The width of the context -> kohya's name of a model, and Stability AI's of its architecture.
FAMILIES = {768: ("sd_v1", "stable-diffusion-v1"), 1024: ("sd_v2", "stable-diffusion-v2-512")}
V2_V = ("sd_v2_v", "stable-diffusion-v2-768-v")
XL = ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base")
XL_CONTEXT = 2048


def lora_tensors(
    loras: Mapping[str, TrainableLora], config: Config, dtype: torch.dtype = torch.float32, naming: str = "kohya"
) -> dict[str, Tensor]:
    """The tensors of a LoRA file, on the CPU.

    loras    by network: "unet", "text_encoder", "text_encoder_2"
    config   of the model: where its files have 1x1 convolutions for linear layers, so has the LoRA
    dtype    of A, B and m; alpha is float32

    Raises ValueError for an unknown naming.
    """
    if naming not in NAMINGS:
        raise ValueError(f"{naming!r} is no naming of LoRA files: choose {' or '.join(NAMINGS)}")
    make = _kohya_tensors if naming == "kohya" else _peft_tensors
    return {
        key: tensor.detach().to("cpu", torch.float32 if key.endswith(".alpha") else dtype).contiguous()
        for network, lora in loras.items()
        for key, tensor in make(network, lora, config).items()
    }


def _kohya_tensors(network: str, lora: TrainableLora, config: Config) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for source, layer in zip(_kohya(network, lora.names, config), lora.layers, strict=True):
        name = source.key.removesuffix(".weight").replace(".", "_")
        down, up = _pair(layer, source)
        # diffusers misreads files in which attentions have several alphas: all have one, and B what is missing
        up = up * (layer.alpha / layer.usual_alpha) if layer.is_limited else up
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(layer.usual_alpha)
        if layer.magnitude is not None:  # as LyCORIS has the norms of outputs
            tensors[f"{name}.dora_scale"] = layer.magnitude.view(-1, *[1] * (down.dim() - 1))
    return tensors


def _peft_tensors(network: str, lora: TrainableLora, config: Config) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    prefix = network if network == "unet" else f"{network}.text_model"
    for source, layer in zip(_diffusers(network, lora.names, config), lora.layers, strict=True):
        name = f"{prefix}.{source.key.removesuffix('.weight')}"
        down, up = _pair(layer, source)
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        if layer.magnitude is not None:  # as PEFT's layers have it
            shape = (-1,) if down.dim() == 2 else (1, -1, 1, 1)
            # PEFT writes it without ".weight"; transformers 5 finds that of its text encoders only with it
            end = "lora_magnitude_vector" if network == "unet" else "lora_magnitude_vector.weight"
            tensors[f"{name}.{end}"] = layer.magnitude.view(shape)
    return tensors


def _pair(layer: LoraLayer, source: Source) -> tuple[Tensor, Tensor]:
    """A and B with as many dimensions as the weight has in files."""
    down, up = (x.reshape(x.shape + (1,) * source.ones) for x in (layer.down, layer.up))
    return down, up


def _diffusers(network: str, names: Sequence[str], config: Config) -> list[Source]:
    """The sources of some layers of a network in diffusers' and transformers' modules."""
    return list(diffusers_sources(config, {network: [f"{name}.weight" for name in names]})[network].values())


def _kohya(network: str, names: Sequence[str], config: Config) -> list[Source]:
    """The sources of some layers of a network in kohya's LoRA files, with the prefixes that these have."""
    if network == "unet":
        found = _diffusers(network, names, config)
        if config.sizes:
            found = list(original_sources(config, {network: [f"{name}.weight" for name in names]})[network].values())
        return [source._replace(key=f"lora_unet_{source.key.removeprefix(UNET)}") for source in found]
    prefix = f"lora_te{_number(network, config)}_text_model_"
    return [source._replace(key=prefix + source.key) for source in _diffusers(network, names, config)]


def _number(network: str, config: Config) -> str:
    """The number of a text encoder in names of kohya's: none for models with one; the refiner has SDXL's second."""
    return str(2 - len(config.text) + config.text_names.index(network) + 1) if config.sizes else ""


def lora_metadata(
    loras: Mapping[str, TrainableLora],
    config: Config,
    title: str,
    facts: Mapping[str, object] | None = None,
    naming: str = "kohya",
) -> dict[str, str]:
    """The metadata of a LoRA file.

    title   names the LoRA
    facts   what is known about the training, by kohya's names without "ss_": {"learning_rate": 1e-4}. Dictionaries are
            written as JSON, None is left out

    Raises ValueError for unknown facts and for an unknown naming.
    """
    if naming not in NAMINGS:
        raise ValueError(f"{naming!r} is no naming of LoRA files: choose {' or '.join(NAMINGS)}")
    if unknown := sorted(set(facts or {}) - FACTS):
        raise ValueError(f"no facts of a training that LoRA files have: {', '.join(unknown)}")
    metadata = {"format": "pt", **_spec(config, title, naming)}
    if naming == "peft":
        settings = [_peft_settings(network, lora, config) for network, lora in loras.items()]
        return metadata | {"lora_adapter_metadata": json.dumps({k: v for each in settings for k, v in each.items()})}
    known = {name: value for name, value in (facts or {}).items() if value is not None}
    texts = {name: json.dumps(value) if isinstance(value, Mapping) else str(value) for name, value in known.items()}
    return metadata | {f"ss_{name}": text for name, text in (_kohya_facts(loras, config) | texts).items()}


def _family(config: Config) -> tuple[str, str] | None:
    """The model in kohya's words, and its architecture in Stability AI's; None for one of other sizes."""
    context = config.unet.context
    if config.sizes:
        return XL if context == XL_CONTEXT else None
    return V2_V if context == 1024 and config.schedule.prediction == "v" else FAMILIES.get(context)


def _spec(config: Config, title: str, naming: str) -> dict[str, str]:
    """Stability AI's model specification (github.com/Stability-AI/ModelSpec)."""
    spec = {"title": title, "prediction_type": {"eps": "epsilon", "v": "v"}[config.schedule.prediction]}
    if (family := _family(config)) is not None:
        original = config.sizes and naming == "kohya"  # whose names the layers have
        implementation = "https://github.com/Stability-AI/generative-models" if original else "diffusers"
        spec |= {
            "sai_model_spec": "1.0.0", "architecture": f"{family[1]}/lora", "implementation": implementation,
        }  # fmt: skip
    return {f"modelspec.{name}": text for name, text in spec.items()}


def _kohya_facts(loras: Mapping[str, TrainableLora], config: Config) -> dict[str, str]:
    """What kohya's scripts write about the network itself."""
    first, *others = (lora.params for lora in loras.values())
    args: dict[str, str] = {}
    if first.conv_rank is not None or first.conv_alpha is not None:
        rank = first.rank if first.conv_rank is None else first.conv_rank
        alpha = rank * (first.alpha or first.rank) / first.rank if first.conv_alpha is None else first.conv_alpha
        args |= {"conv_dim": str(rank), "conv_alpha": str(float(alpha))}
    if first.dora:
        args |= {"algo": "lora", "dora_wd": "True", "wd_on_output": "True"}
    same = all(other == first for other in others)
    facts = {
        "network_module": "lycoris.kohya" if first.dora else "networks.lora",
        # "Dynamic" is what kohya's scripts write of files with several ranks
        "network_dim": str(first.rank) if same else "Dynamic",
        "network_alpha": str(float(first.alpha or first.rank)) if same else "Dynamic",
        "v2": str(config.unet.context == 1024 and not config.sizes),
    }
    facts |= {"network_args": json.dumps(args)} if args else {}
    facts |= {"network_dropout": str(first.dropout)} if first.dropout else {}
    family = _family(config)
    return facts if family is None else facts | {"base_model_version": family[0]}


def _peft_settings(network: str, lora: TrainableLora, config: Config) -> dict[str, object]:
    """PEFT's LoraConfig of a network, as diffusers keeps it in files; the most frequent rank and alpha are the usual.

    Layers of text encoders have the end of their name that all versions of transformers have in common.
    """
    names = [source.key.removesuffix(".weight") for source in _diffusers(network, lora.names, config)]
    ranks = {name: layer.rank for name, layer in zip(names, lora.layers, strict=True)}
    alphas = {name: layer.alpha for name, layer in zip(names, lora.layers, strict=True)}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    settings = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
        "target_modules": names,
        "lora_dropout": lora.params.dropout,
        "use_dora": lora.params.dora,
        "bias": "none",
        "peft_type": "LORA",
    }
    return {f"{network}.{name}": value for name, value in settings.items()}


def lora_hash(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata by which the web UI knows a LoRA: the SHA-256 of all that follows the header of its file."""
    data = safetensors.torch.save({key: tensor.contiguous() for key, tensor in tensors.items()})
    start = 8 + int.from_bytes(data[:8], "little")
    return {"sshs_model_hash": hashlib.sha256(memoryview(data)[start:]).hexdigest()}
