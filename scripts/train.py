"""Train a U-Net, optionally with its text encoder; or train a LoRA, a new word or a control network for a model.

    python scripts/train.py --lora 16 --ckpt v1-5.ckpt --data photos --out outputs/mine         a LoRA; also for SDXL
    python scripts/train.py --train-word "<cat-toy>" --init-word toy --ckpt v1-5.ckpt --data photos --out outputs/toy
    python scripts/train.py --ckpt v1-5.ckpt --data photos --out outputs/mine                   the whole U-Net
    python scripts/train.py --ckpt v1-5.ckpt --data photos --inpaint --out outputs/inpainting   9 channels
    python scripts/train.py --control --ckpt v1-5.ckpt --data drawings --out outputs/scribbles  a control network
    python scripts/train.py --vae outputs/vae/vae.safetensors --text outputs/text/text_encoder.safetensors \\
        --out outputs/pocket                                                                    the embedded model
    python scripts/train.py --out outputs/mine --resume                                         continue a stopped run
    torchrun --nproc-per-node 4 scripts/train.py ...                                            on four GPUs

The caption of name.png is in name.txt beside it, or in metadata.jsonl. Without --ckpt, LoRAs, words and control
networks are for the embedded model. A new model needs three programs: train_vae.py, train_text.py, train.py. Guides:
docs/fine-tuning.md, docs/training.md.

Writes lora.safetensors (use it with --lora), WORD.safetensors (--embedding), control.safetensors (--control) or
model.safetensors (--ckpt) to OUT; convert.py converts models to other layouts, and merges LoRAs into them. The log is
in train.jsonl and loss.png, samples are in samples-STEP.png, and --resume needs state.pt.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

if not __package__:  # run as a file: see bootstrap.py
    import bootstrap

    __package__ = bootstrap.PACKAGE

import torch

from sd.checkpoints.convert import WEIGHTS
from sd.config import PRECISIONS, SHORT_PRECISIONS
from sd.messages import counted
from sd.params import SamplingParams
from sd.pipeline import StableDiffusion
from sd.runtime.device import dtype_name
from sd.training import channels_last, checkpoint_activations

from .common import cli
from .training import accounting, adapters, class_images, control, loop, models
from .training.adapters import Adapters, add_adapter_arguments
from .training.batches import Batches, BatchOptions
from .training.captions import text_encoders
from .training.dataset import TrainingData, split
from .training.latents import latents
from .training.models import Resting
from .training.objective import (
    LossParams,
    Objective,
    add_objective_arguments,
    loss_params,
    noise_shape,
    retargeted,
    timesteps,
)
from .training.options import add_data_arguments, batch_options, data_options, find_source
from .training.processes import Processes
from .training.recipe import Recipe, add_loop_arguments, find_precision
from .training.samples import add_sample_arguments, sample_prompts, some_captions, write_sheet
from .training.target import Target
from .training.texts import with_encoded_text
from .training.validation import Validation
from .training.whole import WholeModel

# for the embedded model, and for fine-tuning a checkpoint
RECIPE = Recipe(
    steps=24000, batch=32, lr=1.5e-3, weight_decay=0.0, beta2=0.99, optimizer="muon", ema=0.998, log_every=50
)
FINE_TUNING = Recipe(steps=1000, batch=4, lr=1e-5, save_every=250)


def parser() -> cli.Parser:
    """The arguments; the defaults are the recipe of the embedded model."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=cli.file_path, default=Path("outputs/training"), help="output folder (default: %(default)s)")
    add(
        "--export-dtype",
        choices=(*PRECISIONS, *SHORT_PRECISIONS),
        default="float16",
        help="precision of the weights in the file that is written (default: %(default)s)",
    )
    add(
        "--vae",
        type=cli.file_path,
        metavar="FILE",
        help="output of train_vae.py, or a checkpoint; replaces the VAE of --ckpt",
    )
    add(
        "--text",
        type=cli.file_path,
        metavar="FILE",
        help="for a new model: output of train_text.py (default: a new encoder)",
    )
    add(
        "--weights",
        choices=WEIGHTS,
        default="auto",
        help="which U-Net of a checkpoint with two: plain (raw) or averaged (ema)",
    )
    add("--train-text", action="store_true", help="train the text encoders too; always on for a new model")
    add("--text-lr", type=float, metavar="LR", help="learning rate of the text encoders (default: --lr)")
    add("--inpaint", action="store_true", help="train a U-Net with 9 input channels for inpainting, on random masks")
    add(
        "--drop", type=float, metavar="P",
        help="share of prompts that are dropped, for guidance (default: 0.1; --control 0.5; --lora, --train-word 0)",
    )  # fmt: skip
    add("--phrasings", type=int, default=8, metavar="N", help="captions per drawn scene (default: %(default)s)")
    add(
        "--validate",
        type=float,
        metavar="SHARE",
        help="hold out this share of the images, such as 0.1, and log their loss, which shows overfitting",
    )
    add("--estimate-memory", action="store_true", help="say how much memory a step takes on a GPU, and stop")
    add_sample_arguments(parser, steps=25)
    add(
        "--sample-guidance",
        type=float,
        metavar="SCALE",
        help="guidance of samples and class images (default: the model's own)",
    )
    add_adapter_arguments(parser)
    class_images.add_class_arguments(parser)
    add_objective_arguments(parser)
    control.add_control_arguments(parser)
    models.add_model_arguments(parser)
    add_data_arguments(parser, scenes=24000, bucketed=True, fine_tuning=True)
    add_loop_arguments(parser, RECIPE, with_ckpt=FINE_TUNING)
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that do not go together or are out of range; fill in the defaults."""
    control.check_unused(args)
    if adapters.wanted(args):
        adapters.check(args)
        args.recipes = adapters.recipes(args)
    if args.drop is None:
        args.drop = 0.0 if adapters.wanted(args) else 0.1
    if args.phrasings < 1 or args.samples < 0:
        raise ValueError("--phrasings must be at least 1, --samples at least 0")
    if args.validate is not None and not 0 < args.validate < 1:
        raise ValueError(f"--validate must be above 0 and below 1, got {args.validate}")
    trains_text = args.train_text or not (args.ckpt or adapters.wanted(args))
    if args.text_lr is not None and not trains_text:
        raise ValueError("--text-lr goes with --train-text")
    if args.text_lr is not None and not 0 < args.text_lr < math.inf:
        raise ValueError(f"--text-lr must be above 0, got {args.text_lr}")
    SamplingParams(steps=args.sample_steps, guidance=args.sample_guidance)


def find_model(args: argparse.Namespace, recipe: Recipe, device: torch.device) -> StableDiffusion:
    """The model of the checkpoint, or new networks with a trained VAE; for adapters also the embedded model."""
    if adapters.wanted(args):
        return adapters.find_model(args, device)
    if args.ckpt:
        if args.text:
            raise ValueError("--text is for new models: a checkpoint has its own")
        model = models.load_plain(args, device, torch.float32)
        if args.vae:
            model = models.with_vae(model, args.vae)
    else:
        model = models.find_new(args, recipe.seed, device)
    if model.config.unet.guidance is not None:
        raise ValueError(f"{model.config.name} was distilled and is told its guidance: train its ordinary model")
    model = models.with_networks(model, retargeted(model.config, args))
    if args.inpaint:
        return models.for_inpainting(model)
    if model.is_inpainting:
        raise ValueError(f"{model.config.name} has a U-Net of 9 channels: train it with --inpaint")
    return model


def find_data(args: argparse.Namespace, model: StableDiffusion, target: Target, processes: Processes) -> TrainingData:
    """The data of the options, encoded; of text encoders that stay as they are also the text."""
    options = data_options(args, model.config, target.caption)
    reg = class_images.find(args, options.size, model, processes) if class_images.wanted(args) else args.reg
    source = target.told(find_source(args, options, reg=reg))
    folder, precision = args.out / "cache", find_precision(args.precision, processes.device)
    data = latents(folder / "latents.safetensors", source, model, processes, args.workers, args.inpaint, args.flip)
    if not caches_text(args, target):
        return data
    return with_encoded_text(folder / "text.safetensors", data, model, processes, precision or torch.float32)


def caches_text(args: argparse.Namespace, target: Target) -> bool:
    """Whether captions are encoded once: if they and the text encoders stay as they are."""
    return not (target.trains_text or batch_options(args).tags.change or args.data in (None, "world"))


def tell_memory(args: argparse.Namespace, model: StableDiffusion, target: Target, losses: LossParams) -> None:
    """Print how much memory a step takes on a GPU."""
    recipe, size, precision = (
        Recipe.of(args),
        args.size or model.config.size,
        find_precision(args.precision, model.device),
    )
    encoded = caches_text(args, target)
    objective = Objective(model, losses, target.modules, with_text=not encoded)
    if args.checkpointing:
        checkpoint_activations(objective, target.is_random)
    batch = accounting.blank_batch(model, size, recipe.batch, encoded)
    beside = accounting.bytes_of([*model.vae.parameters()]) if args.inpaint else 0  # it encodes what masks leave
    found = accounting.estimate(objective, target, recipe, precision, batch, beside)
    print(f"{target.describe()}, {recipe.batch} of {size}x{size} pixels, {dtype_name(precision or torch.float32)}")
    print("\n".join(found.lines()))


def train(args: argparse.Namespace, processes: Processes) -> None:
    """Run the training."""
    adapters.check_unused(args)
    class_images.check(args)
    if args.control:
        control.train(args, processes)
        return
    check(args)
    if args.estimate_memory and args.precision == "auto":
        args.precision = "bfloat16"  # as on GPUs of the last years, wherever this runs
    recipe, device = Recipe.of(args), processes.device
    prompts, losses = sample_prompts(args), loss_params(args)
    noise = noise_shape(args)
    precision = find_precision(args.precision, device)
    model = find_model(args, recipe, device)
    size = args.size or model.config.size
    model.latent_shape(size, size)  # refuses what cannot be
    target: Target = Adapters(args, model, recipe) if adapters.wanted(args) else WholeModel(args, model)
    timesteps(args, model.config, model.schedule)
    target.set_trainable()
    if args.estimate_memory:
        tell_memory(args, model, target, losses)
        return
    data = find_data(args, model, target, processes)
    prompts = prompts or some_captions(args.samples, model, data)
    held = None
    if args.validate is not None:
        data, held = split(data, args.validate, recipe.seed)
        if processes.main:
            print(f"{counted(len(held), 'image')} held out for validation")
    target.prepare(data)
    target.attach()
    idle = ([] if args.inpaint else ["vae"]) + ([] if data.text is None else list(text_encoders(model)))
    resting = Resting([getattr(model, name) for name in idle], device)
    objective = Objective(model, losses, target.modules, with_text=data.text is None)
    channels_last(objective, device)
    if args.checkpointing:
        checkpoint_activations(objective, target.is_random)
    if args.compile:
        model.unet.compile()
        for encoder in text_encoders(model).values():
            encoder.compile()
    trainer = loop.Trainer(objective, recipe, processes, args, target.rates(recipe.lr))
    making = replace(
        batch_options(args),
        noise=noise,
        inpaint=args.inpaint,
        timesteps=timesteps(args, model.config, model.schedule),
        trained=sum(p.numel() for p in trainer.trained.values()),
    )
    batches = Batches(data, model, recipe, processes, making)
    validate = None
    if held is not None:
        held = replace(held, repeats=torch.ones_like(held.repeats))
        one = replace(recipe, batch=1, accumulate=1)
        alone = Batches(held, model, one, Processes(device), BatchOptions(inpaint=args.inpaint))
        validate = Validation(objective, alone, len(held), precision, trainer.ema)

    def write() -> str:
        target.write(trainer.weights(), trainer.step)
        return ""

    def show(step: int) -> None:
        settings = {"steps": args.sample_steps, "guidance": args.sample_guidance}
        with resting.awake(), target.sampling(trainer.weights()) as present:
            write_sheet(args.out / f"samples-{step:06d}.png", present, prompts, size, **settings)

    trainer.describe(target.describe(), len(data))
    positions = max(height * width for height, width in data.shapes)
    trainer.run(batches, write, positions, show if prompts else None, validate=validate)
    if processes.main:
        print(target.written())


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return loop.main(train, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
