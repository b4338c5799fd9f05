"""train.py --control: a control network for a model that stays as it is (Zhang et al. 2023).

It starts as a copy of the U-Net's first half, and its zero convolutions add nothing. The loss is that of the U-Net,
whose input now includes a hint; gradients flow through the U-Net's second half only. Half of the prompts are dropped,
as in the paper, so that the network learns to see in the hint itself what is drawn.

Each line of train.jsonl has the mean absolute weight of the zero convolutions, in the order of `Residuals`: those of
the skip connections, from fine to coarse, then the middle.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from sd.checkpoints.control_export import control_files
from sd.conditioning import Conditioning
from sd.config import UNetConfig
from sd.control_config import ControlConfig, own_half
from sd.files import replaced_file
from sd.imaging.tensors import grid, to_pil
from sd.models.controlnet import ControlNet
from sd.models.unet import UNet
from sd.params import Control, SamplingParams
from sd.pipeline import StableDiffusion
from sd.runtime.device import find_dtype
from sd.training import channels_last, checkpoint_activations, diffusion_loss, erase_parts, initialise_control

from ..common.cli import Parser
from ..toy_world.hints import HINTS
from . import loop, models
from .batches import Batch, Batches, BatchOptions
from .captions import Captions, text_encoders
from .hints import find_hinted
from .latents import latents
from .objective import USUAL
from .options import BUCKETED, FINE_TUNING
from .processes import Processes
from .samples import sample_prompts, some_captions
from .state import save_tensors

# for the embedded model, and for a checkpoint
RECIPE = loop.Recipe(
    steps=4000, batch=16, lr=2e-3, weight_decay=0.0, beta2=0.99, optimizer="muon", ema=0.998, log_every=50
)
CHECKPOINT = loop.Recipe(steps=10000, batch=4, lr=1e-5)  # learning rate and batch of the paper
DROP, ERASE = 0.5, 0.15
PAIRS = 3  # of hint and image, in a row of a sample sheet
# options that are for control networks only, and those that are not, with their values where they are not given
OWN = {"hint": None, "small": False, "hint_widths": None, "control_name": None, "hint_erase": None}
OTHERS: dict[str, object] = {
    "vae": None, "text": None, "train_text": False, "text_lr": None, "inpaint": False, "validate": None, "shard": False,
    "estimate_memory": False, "lora": None, "train_word": None, "class_prompt": None, "class_prompts": None,
}  # fmt: skip
OTHERS |= {**USUAL, **BUCKETED, **FINE_TUNING}  # hints are square


def add_control_arguments(parser: Parser) -> None:
    """Add --control and its related options."""
    add = parser.add_argument_group("control network").add_argument
    add(
        "--control", action="store_true",
        help=f"train a control network for the model (default: the embedded model); {RECIPE.steps} steps of "
        f"{RECIPE.batch} at {RECIPE.lr:g} by default, with --ckpt {CHECKPOINT.steps} of {CHECKPOINT.batch} at "
        f"{CHECKPOINT.lr:g}",
    )  # fmt: skip
    add("--hint", choices=HINTS, help=f"kind of hint for drawn scenes (default: {HINTS[0]})")
    add("--small", action="store_true", help="leave out its transformers, which read the prompt")
    add(
        "--hint-widths", type=int, nargs="+", metavar="N",
        help="channels of its hint block, one for each level from the image to the latents (default: 16 32 96 256)",
    )  # fmt: skip
    add("--control-name", metavar="TEXT", help="what messages call it (default: the kind of hint)")
    add("--hint-erase", type=float, metavar="P", help=f"share of hints that lose a part (default: {ERASE})")


def check_unused(args: argparse.Namespace) -> None:
    """Raise ValueError for options of control networks without --control."""
    for name, usual in OWN.items():
        if getattr(args, name) != usual:
            raise ValueError(f"--{name.replace('_', '-')} goes with --control")


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that do not go with --control or are out of range; fill in the defaults."""
    for name, usual in OTHERS.items():
        if getattr(args, name) != usual:
            raise ValueError(f"--{name.replace('_', '-')} does not go with --control, which leaves the model as it is")
    args.drop = DROP if args.drop is None else args.drop
    args.hint_erase = ERASE if args.hint_erase is None else args.hint_erase
    if not (0 <= args.drop <= 1 and 0 <= args.hint_erase <= 1 and args.phrasings >= 1 and args.samples >= 0):
        raise ValueError("--drop and --hint-erase must be from 0 to 1, --phrasings at least 1, --samples at least 0")
    SamplingParams(steps=args.sample_steps, guidance=args.sample_guidance)


class Objective(nn.Module):
    """The control network with the diffusion loss of the controlled U-Net; U-Net and text encoders are frozen."""

    def __init__(self, control: ControlNet, model: StableDiffusion) -> None:
        super().__init__()
        for name, encoder in text_encoders(model).items():
            self.add_module(name, encoder.requires_grad_(False))
        self.control, self.unet = control, model.unet.requires_grad_(False)
        self.captions, self.schedule = Captions(model), model.schedule

    def forward(self, batch: Batch, hint: Tensor) -> Tensor:
        """A batch and its hints (B, 3, H, W) in [0, 1] -> the loss, a scalar."""

        def network(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
            down, middle = self.control(x, t, conditioning, self.control.embed(hint))
            return self.unet(x, t, conditioning, down, middle)

        cond = self.captions(batch)
        return diffusion_loss(network, self.schedule, batch.x0, cond, batch.t, batch.noise, batch.weight)


class HintBatches:
    """The batches of each step with hints as floats, some of which lose a part (`--hint-erase`)."""

    def __init__(self, batches: Batches, erase: float) -> None:
        self.batches, self.erase = batches, erase

    def names(self, step: int) -> list[str]:
        """The names of all images of a step."""
        return self.batches.names(step)

    def __call__(self, step: int) -> Iterator[dict[str, Any]]:
        """The parts of a step for this process: see `Objective.forward`."""
        for number, part in enumerate(self.batches(step), step * self.batches.recipe.accumulate):
            hints = to_hints(part["batch"].hint)
            rngs = self.batches.generators(number, "hint")
            erased = [erase_parts(each, self.erase, rng) for each, rng in zip(hints.split(1), rngs, strict=True)]
            yield {**part, "hint": torch.cat(erased)}


def to_hints(images: Tensor) -> Tensor:
    """Hints (B, 1 or 3, H, W), uint8 -> (B, 3, H, W) in [0, 1]."""
    return (images.float() / 255).expand(-1, 3, -1, -1)


def find_model(args: argparse.Namespace, device: torch.device) -> StableDiffusion:
    """The model to control, in float32."""
    config = models.find_config(args.model) if args.model else None
    model = StableDiffusion.load(
        args.ckpt, config=config, weights=args.weights, device=device, dtype="float32", offload_text_encoders=False
    )
    if model.is_inpainting:
        raise ValueError(
            f"{model.config.name} is an inpainting model: train the control network on the ordinary model; it also "
            "controls this one"
        )
    return model


def control_config(args: argparse.Namespace, unet: UNetConfig, factor: int) -> ControlConfig:
    """The config of the control network; `factor` is the number of pixels per position of the latents."""
    own = own_half(unet)
    if args.small:
        own = replace(own, depth=(0,) * len(own.depth), middle_depth=None if own.middle_depth is None else 0)
    name = args.control_name or (args.hint or HINTS[0] if args.data in (None, "world") else "control network")
    config = ControlConfig(own, name=name)
    config = replace(config, hint=tuple(args.hint_widths)) if args.hint_widths else config
    if config.factor != factor:
        needed = factor.bit_length()
        raise ValueError(
            f"--hint-widths: this model needs {needed} widths, because its latents are {factor} times smaller"
        )
    return config


def initial_control(config: ControlConfig, unet: UNet, seed: int) -> ControlNet:
    """A control network that changes nothing yet, a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        control = ControlNet(config)
    initialise_control(control, unet)
    return control.to(unet.conv_in.weight.device)


def zero_weights(control: ControlNet) -> list[float]:
    """The mean absolute weight of each zero convolution, in the order of `Residuals`."""
    means = torch.stack([layer.weight.detach().abs().mean() for layer in (*control.zero, control.zero_mid)])
    return [round(value, 6) for value in means.tolist()]


def write_control(control: ControlNet, path: Path, dtype: torch.dtype) -> None:
    """Write a control network in our layout with its config. Raises ArithmeticError if weights are not finite."""
    state = {name: weight.detach().to("cpu", dtype) for name, weight in control.state_dict().items()}
    if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
        raise ArithmeticError(f"{path}: not written, because weights are not finite: try a lower --lr")
    tensors, metadata = control_files("sd", state, control.control_config)
    save_tensors(tensors, path, metadata)


def write_sheet(
    path: Path,
    model: StableDiffusion,
    control: ControlNet,
    prompts: Sequence[str],
    hints: Sequence[Image.Image],
    **settings: Any,
) -> None:
    """Write the hint and the image of each prompt side by side, with seeds 0, 1, ... `settings`: as for `txt2img`."""
    images: list[Image.Image] = []
    name = model.add_control(control, "in training")
    for seed, (prompt, hint) in enumerate(zip(prompts, hints, strict=True)):
        images += [hint, *model.txt2img(prompt, seed=seed, controls=Control(name, hint), **settings)]
    with replaced_file(path) as partial:
        grid(images, 2 * PAIRS).save(partial, "PNG")


def train(args: argparse.Namespace, processes: Processes) -> None:
    """Run the training of a control network."""
    check(args)
    args.recipes = (RECIPE, CHECKPOINT)
    recipe = loop.Recipe.of(args)
    prompts, device = sample_prompts(args), processes.device
    model = find_model(args, device)
    size = args.size or model.config.size
    model.latent_shape(size, size)  # refuses what cannot be
    config = control_config(args, model.config.unet, model.config.vae.factor)
    path = args.out / "cache" / "latents.safetensors"
    data = latents(path, find_hinted(args, size), model, processes, args.workers)
    if unknown := models.unknown_words(model, data.ids):
        warnings.warn(f"the model does not know these words: {unknown}", stacklevel=1)
    if args.samples and not prompts:
        prompts = some_captions(args.samples, model, data)
    shown = [i * len(data) // len(prompts) for i in range(len(prompts))]

    control = initial_control(config, model.unet, recipe.seed)
    objective = Objective(control, model)
    channels_last(objective, device)
    if args.checkpointing:
        checkpoint_activations(objective)
    if args.compile:
        control.compile()
        model.unet.compile()
    trainer = loop.Trainer(objective, recipe, processes, args)
    trained = sum(p.numel() for p in trainer.trained.values())
    batches = Batches(data, model, recipe, processes, BatchOptions(args.drop, trained=trained))
    written = args.out / "control.safetensors"

    def present() -> ControlNet:
        with torch.device("meta"):
            other = ControlNet(config)
        own: Mapping[str, Tensor] = trainer.weights()
        names = {name: own[f"control.{name}"] for name in other.state_dict()}
        other.load_state_dict(names, assign=True)
        return other.requires_grad_(False).eval()

    def write() -> str:
        write_control(present(), written, find_dtype(args.export_dtype))
        opened = zero_weights(control)
        return f", zero convolutions {opened[0]:.2g} (finest) to {opened[-1]:.2g} (middle)"

    def show(step: int) -> None:
        settings = {"steps": args.sample_steps, "guidance": args.sample_guidance, "height": size, "width": size}
        hints = to_pil(2 * to_hints(data.take("hint", shown)) - 1)
        plain = models.averaged(model, trainer.weights())  # neither compiled nor recorded
        write_sheet(args.out / f"samples-{step:06d}.png", plain, present(), prompts, hints, **settings)

    trainer.describe(f"{config.name}, a control network for {model.config.name}", len(data))
    positions = (size // model.config.vae.factor) ** 2
    timed = HintBatches(batches, args.hint_erase)
    trainer.run(timed, write, positions, show if prompts else None, lambda: {"zero": zero_weights(control)})
    if processes.main:
        print(f"{written}: {config.name}, a control network for {model.config.name}, for --control of every program")
