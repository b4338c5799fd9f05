"""The networks to train: new ones from a config or those of a checkpoint; and saving the trained model."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from sd.checkpoints.checkpoint import CheckpointError, load_checkpoint, named, naming
from sd.checkpoints.convert import convert
from sd.checkpoints.detect import CONFIG_KEY, detect
from sd.checkpoints.export import to_own
from sd.checkpoints.layouts import find_layouts
from sd.checkpoints.loading import load_weights, with_part
from sd.config import MODELS, Config, TinyVAEConfig
from sd.models.build import build
from sd.models.text_encoder import TextEncoder
from sd.models.unet import UNet
from sd.models.vae import VAE
from sd.pipeline import StableDiffusion
from sd.runtime.optimize import restore
from sd.training import initialise_text_encoder, initialise_unet, widen_input

from ..common.cli import Parser, file_path, home
from ..common.prompts import utf8_text
from .state import save_tensors

# output of train_vae.py and train_text.py: the weights of a network under their names in a whole model
VAE_FILE, TEXT_FILE = "vae.safetensors", "text_encoder.safetensors"


Network = TypeVar("Network", TextEncoder, VAE, UNet)


def add_model_arguments(parser: Parser) -> None:
    """Add --ckpt and --model."""
    add = parser.add_argument_group("model").add_argument
    add("--ckpt", type=file_path, metavar="FILE", help="start from this checkpoint (default: new networks)")
    add(
        "--model",
        type=home,
        metavar="NAME",
        help=f"{', '.join(MODELS)}, or a JSON file with a config (default: pocket; detected for a checkpoint)",
    )


def find_config(name: str) -> Config:
    """The config of this name or in this file. Raises ValueError if there is none."""
    if name in MODELS:
        return MODELS[name]
    path = Path(name)
    if path.suffix != ".json":
        raise ValueError(f"--model {name}: expected one of {', '.join(MODELS)}, or a .json file with a config")
    text = utf8_text(path.read_bytes(), path)
    try:
        return Config.from_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_vae(
    path: Path, device: torch.device, model: str | None = None, goes_with: Config | None = None
) -> tuple[Config, VAE]:
    """Load the VAE from a file of train_vae.py, a VAE file or folder, or a whole checkpoint, in float32.

    Also returns the config of its model: that named `model`, else that of the file, else `goes_with`. Raises
    CheckpointError in one line for anything else.
    """
    with load_checkpoint(path) as checkpoint, naming(path):
        if "vae" not in find_layouts(checkpoint):
            raise CheckpointError("no VAE in it: expected what train_vae.py writes, a VAE or a whole checkpoint")
        alone = find_layouts(checkpoint).keys() == {"vae"} and CONFIG_KEY not in checkpoint.metadata
        if alone and not model and not goes_with:
            raise ValueError(f"a VAE alone: give the model that it belongs to (--model {', '.join(MODELS)})")
        config = find_config(model) if model else goes_with if alone and goes_with else detect(checkpoint)
        config = with_part(config, "vae", checkpoint)
        if isinstance(config.vae, TinyVAEConfig):
            raise CheckpointError(
                "a tiny autoencoder (TAESD), which is for decoding: models are trained with a whole VAE (give that one)"
            )
        state = convert(checkpoint, config, parts=["vae"])["vae"]
        vae = load_weights(build(config)["vae"], state, device, torch.float32)
        return config, cast(VAE, vae)


def find_new(args: argparse.Namespace, seed: int, device: torch.device) -> StableDiffusion:
    """New networks of --model with the trained VAE of --vae."""
    if not args.vae:
        raise ValueError("a new model needs a VAE (--vae): train one with train_vae.py, or use that of a checkpoint")
    trained, vae = load_vae(args.vae, device, goes_with=find_config(args.model) if args.model else None)
    config = replace(find_config(args.model or "pocket"), vae=trained.vae)
    return new_model(config, vae, seed, device)


def new_model(config: Config, vae: VAE, seed: int, device: torch.device) -> StableDiffusion:
    """Text encoder and U-Net with initial weights, a function of the seed, and a trained VAE.

    Raises ValueError for a config with two text encoders, which train_text.py cannot train.
    """
    if len(config.text) > 1:
        raise ValueError(
            f"{config.name} has {len(config.text)} text encoders, and a new model can have one: fine-tune a checkpoint "
            "with train.py --ckpt"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder, unet = TextEncoder(config.text[0]), UNet(config.unet)
        initialise_text_encoder(text_encoder)
        initialise_unet(unet)
    return StableDiffusion(config, text_encoder.to(device), vae, unet.to(device))


def load_text_encoder(path: Path, model: StableDiffusion) -> TextEncoder:
    """Load the text encoder of train_text.py in float32. Raises CheckpointError in one line for anything else."""
    with load_checkpoint(path) as checkpoint:
        prefix = "text_encoder."
        state = {key.removeprefix(prefix): checkpoint[key] for key in checkpoint if key.startswith(prefix)}
        try:
            if not state:
                raise CheckpointError("no text encoder in it: expected what train_text.py writes")
            network = load_weights(build(model.config)["text_encoder"], state, model.device, torch.float32)
            return cast(TextEncoder, network)
        except ValueError as error:
            raise named(path, error) from None


@torch.no_grad()
def forget_unused(text_encoder: TextEncoder, ids: Tensor) -> None:
    """Set the embeddings of tokens that no caption contains to zero, so that unknown words have no random meaning.

    They get no gradient, so they stay zero.
    """
    used = ids.unique().to(text_encoder.token.weight.device).long()
    kept = text_encoder.token.weight[used].clone()
    text_encoder.token.weight.zero_()
    text_encoder.token.weight[used] = kept


def unknown_words(model: StableDiffusion, ids: Tensor) -> str:
    """The words in these captions whose embeddings are zero, because of `forget_unused`; "" if none."""
    known = model.text_encoder.token.weight.abs().sum(dim=-1).cpu() > 0
    captions = ids[~known[ids.long()].all(dim=-1)].long().unique(dim=0)
    decode = model.tokenizer.decode
    return ", ".join(sorted({word for each in captions for word in decode(each[~known[each]].tolist()).split()}))


def whole_model(path: Path, model: str | None) -> StableDiffusion | None:
    """The model in a checkpoint, in float32 on the CPU; None if it has only a VAE."""
    with load_checkpoint(path) as checkpoint:
        if all(key.startswith("vae.") for key in checkpoint):
            return None
    return StableDiffusion.load(path, config=find_config(model) if model else None, device="cpu", dtype="float32")


def with_networks(model: StableDiffusion, config: Config, **networks: nn.Module) -> StableDiffusion:
    """A model of this config with the networks of another, except those that are given."""
    parts: dict[str, Any] = {name: getattr(model, name) for name in model.config.networks}
    return StableDiffusion(config, **(parts | networks))


def with_vae(model: StableDiffusion, path: Path) -> StableDiffusion:
    """The model with the VAE of train_vae.py or of another checkpoint."""
    trained, vae = load_vae(path, model.device, goes_with=model.config)
    return with_networks(model, replace(model.config, vae=trained.vae), vae=vae)


def for_inpainting(model: StableDiffusion) -> StableDiffusion:
    """The model with a U-Net for inpainting, which also takes mask and masked latent; the same object if it has one."""
    if model.is_inpainting:
        return model
    unet_config = replace(model.config.unet, in_channels=2 * model.config.vae.latent_channels + 1)
    config = replace(model.config, name=f"{model.config.name} inpainting"[:100], unet=unet_config)
    return with_networks(model, config, unet=widen_input(model.unet, unet_config))


def with_weights(network: Network, weights: Mapping[str, Tensor], prefix: str) -> Network:
    """A network of the same class for inference, with the weights whose names begin with `prefix`, not copied."""
    with torch.device("meta"):
        other = type(network)(network.config)
    own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    other.load_state_dict(own, assign=True)
    return other.requires_grad_(False).eval()


def averaged(model: StableDiffusion, weights: Mapping[str, Tensor]) -> StableDiffusion:
    """The model with trained weights, "unet.conv_in.weight" and so on; text encoders without any are as they are."""
    names = [name for name in model.config.text_names if any(key.startswith(f"{name}.") for key in weights)]
    trained: dict[str, TextEncoder] = {name: getattr(model, name) for name in names}
    encoders = {name: with_weights(encoder, weights, f"{name}.") for name, encoder in trained.items()}
    return with_networks(model, model.config, unet=with_weights(model.unet, weights, "unet."), **encoders)


def write_model(model: StableDiffusion, path: Path, dtype: torch.dtype) -> None:
    """Write a checkpoint in our layout with its config, which every program loads without options.

    A model with weights beyond 65504, the maximum of float16, is written in float32. Raises ArithmeticError if weights
    are not finite.
    """
    networks = {name: getattr(model, name) for name in model.config.networks}
    tensors = to_own({name: network.state_dict() for name, network in networks.items()})
    written = {key: tensor.detach().to("cpu", dtype) for key, tensor in tensors.items()}
    if not all(bool(tensor.isfinite().all()) for tensor in written.values()):
        written = {key: tensor.detach().cpu() for key, tensor in tensors.items()}
        if not all(bool(tensor.isfinite().all()) for tensor in written.values()):
            raise ArithmeticError(f"{path}: not written, because weights are not finite: try a lower --lr")
    save_tensors(written, path, {CONFIG_KEY: model.config.to_json(), "format": "pt"})


def fitting(data: Mapping[str, Tensor], device: torch.device, trained: int) -> dict[str, Tensor]:
    """The data, moved to the device if it needs less than a third of the memory that training leaves free.

    Gradients and optimizer need 12 bytes for each of the `trained` parameters.
    """
    if device.type != "cuda":
        return dict(data)
    free, _ = torch.cuda.mem_get_info(device)
    fits = sum(value.nbytes for value in data.values()) < (free - 12 * trained) / 3
    return {name: value.to(device) if fits else value for name, value in data.items()}


class Resting:
    """Networks that training steps do not need: they leave the memory of a GPU, and return to generate samples."""

    def __init__(self, networks: Sequence[nn.Module], device: torch.device) -> None:
        self.networks, self.device = networks, device
        self._move(torch.device("cpu"))

    def _move(self, device: torch.device) -> None:
        if self.device.type != "cpu":
            for network in self.networks:
                network.to(device)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Within the block, the networks are on the device."""
        self._move(self.device)
        try:
            yield
        finally:
            self._move(torch.device("cpu"))


def load_plain(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> StableDiffusion:
    """The model of --ckpt, or the embedded one, with plain layers, which can be trained."""
    config = find_config(args.model) if args.model else None
    model = StableDiffusion.load(
        args.ckpt, config=config, weights=args.weights, device=device, dtype=dtype, offload_text_encoders=False
    )
    for name in ("unet", *model.config.text_names):
        restore(getattr(model, name))
    return model
