"""Train a U-Net and optionally the text encoder: a new model, or fine-tune a checkpoint, on a folder or drawn scenes.

    python scripts/train.py --vae outputs/vae/vae.safetensors --text outputs/text/text_encoder.safetensors \
        --out outputs/pocket                                                                    the embedded model
    python scripts/train.py --ckpt v1-5.ckpt --data photos --out outputs/mine                   fine-tuning; or SDXL
    python scripts/train.py --ckpt v1-5.ckpt --data photos --inpaint --out outputs/inpainting   9 channels
    python scripts/train.py --out outputs/mine --resume                                         continue a stopped run
    python scripts/train.py --control --ckpt v1-5.ckpt --data drawings --out outputs/scribbles  a control network
    torchrun --nproc-per-node 4 scripts/train.py ...                                            on four GPUs

Captions of a folder's images are in name.txt beside name.png, or in metadata.jsonl. A new model needs three steps:
train_vae.py, train_text.py, train.py. Writes OUT/model.safetensors, which every program loads (--ckpt), in our layout;
convert.py converts it to the original one. Also writes train.jsonl, loss.png, samples-STEP.png, state.pt. With
--control the model stays as it is, and OUT/control.safetensors is a network that makes it obey hints, such as edges.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

if not __package__:  # run as a file: see bootstrap.py
    import bootstrap

    __package__ = bootstrap.PACKAGE

import torch
from torch import Tensor, nn

from sd.checkpoints.convert import WEIGHTS
from sd.config import PRECISIONS, PREDICTIONS, SHORT_PRECISIONS
from sd.params import SamplingParams
from sd.pipeline import StableDiffusion
from sd.runtime.device import find_dtype
from sd.schedule import Schedule
from sd.training import (
    channels_last,
    checkpoint_activations,
    diffusion_loss,
    level_batch,
    min_snr_weight,
    velocity_weight,
)

from .common import cli
from .training import control, loop, models
from .training.batches import Batch, Batches
from .training.captions import Captions, text_encoders
from .training.latents import latents
from .training.options import add_data_arguments, batch_options, data_options, find_source
from .training.processes import Processes
from .training.samples import add_sample_arguments, sample_prompts, some_captions, write_sheet

# for the embedded model, and for fine-tuning a checkpoint
RECIPE = loop.Recipe(
    steps=24000, batch=32, lr=1.5e-3, weight_decay=0.0, beta2=0.99, optimizer="muon", ema=0.998, log_every=50
)
FINE_TUNING = loop.Recipe(steps=1000, batch=4, lr=1e-5, save_every=250)
WEIGHTINGS: dict[str, Callable[[Schedule, Tensor], Tensor]] = {"min-snr": min_snr_weight, "velocity": velocity_weight}


def parser() -> cli.Parser:
    """The arguments; the defaults are the recipe of the embedded model."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=cli.file_path, default=Path("outputs/training"), help="output folder (default: %(default)s)")
    add(
        "--export-dtype",
        choices=(*PRECISIONS, *SHORT_PRECISIONS),
        default="float16",
        help="of model.safetensors (default: %(default)s)",
    )
    add(
        "--vae",
        type=cli.file_path,
        metavar="FILE",
        help="file of train_vae.py, or a checkpoint; replaces the VAE of --ckpt",
    )
    add("--text", type=cli.file_path, metavar="FILE", help="new model: file of train_text.py (default: a new encoder)")
    add("--weights", choices=WEIGHTS, default="auto", help="of a checkpoint with both: plain or averaged (EMA) U-Net")
    add("--prediction", choices=PREDICTIONS, help="new model: predict the noise or the velocity")
    add("--train-text", action="store_true", help="train the text encoders too; always on for a new model")
    add("--inpaint", action="store_true", help="train a U-Net of 9 channels for inpainting, on random masks")
    add("--weighting", choices=("none", *WEIGHTINGS), default="none", help="loss weight of timesteps (default: none)")
    add("--drop", type=float, help="share of dropped prompts, for guidance (default: 0.1, with --control 0.5)")
    add("--phrasings", type=int, default=8, help="captions per drawn scene (default: %(default)s)")
    add_sample_arguments(parser, steps=25)
    add("--sample-guidance", type=float, help="default: the model's own")
    control.add_control_arguments(parser)
    models.add_model_arguments(parser)
    add_data_arguments(parser, scenes=24000, bucketed=True, fine_tuning=True)
    loop.add_loop_arguments(parser, RECIPE, with_ckpt=FINE_TUNING)
    return parser


class Objective(nn.Module):
    """Text encoders and U-Net with the diffusion loss, as one module for DistributedDataParallel."""

    def __init__(self, model: StableDiffusion, weighting: str) -> None:
        super().__init__()
        for name, encoder in text_encoders(model).items():
            self.add_module(name, encoder)
        self.unet, self.captions = model.unet, Captions(model)
        self.schedule, self.weight = model.schedule, WEIGHTINGS.get(weighting)

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch, a scalar."""
        x0, noise, t, weight = batch[:4]
        weight = weight * self.weight(self.schedule, t) if self.weight else weight
        cond = self.captions(batch)
        if batch.mask is None:
            return diffusion_loss(self.unet, self.schedule, x0, cond, t, noise, weight)
        level = level_batch(self.schedule, t)
        out = self.unet(self.schedule.add_noise(x0, noise, level), t, cond).float()
        error = (out - self.schedule.target(x0, noise, level)).square().mean(1, keepdim=True)
        return (weight * (error * batch.mask).sum((1, 2, 3)) / batch.mask.sum((1, 2, 3))).mean()


def find_model(args: argparse.Namespace, seed: int, device: torch.device) -> StableDiffusion:
    """The model of the checkpoint, or new networks with a trained VAE."""
    if args.ckpt:
        if args.text or args.prediction:
            raise ValueError("--text and --prediction are for new models: a checkpoint has its own")
        config = models.find_config(args.model) if args.model else None
        model = StableDiffusion.load(
            args.ckpt, config=config, weights=args.weights, device=device, dtype="float32", offload_text_encoders=False
        )
        if args.vae:
            model = models.with_vae(model, args.vae)
    else:
        model = models.find_new(args, seed, device)
    if args.inpaint:
        return models.for_inpainting(model)
    if model.is_inpainting:
        raise ValueError(f"{model.config.name} has a U-Net of 9 channels: train it with --inpaint")
    return model


def train(args: argparse.Namespace, processes: Processes) -> None:
    """Run the training."""
    if args.control:
        control.train(args, processes)
        return
    control.check_unused(args)
    args.drop = 0.1 if args.drop is None else args.drop
    recipe = loop.Recipe.of(args)
    if not 0 <= args.drop <= 1 or args.phrasings < 1 or args.samples < 0:
        raise ValueError("--drop must be from 0 to 1, --phrasings at least 1, --samples at least 0")
    SamplingParams(steps=args.sample_steps, guidance=args.sample_guidance)
    prompts = sample_prompts(args)
    device = processes.device
    model = find_model(args, recipe.seed, device)
    size = args.size or model.config.size
    model.latent_shape(size, size)  # refuses what cannot be
    path = args.out / "cache" / "latents.safetensors"
    how, batch_how = data_options(args, model.config), batch_options(args)
    data = latents(path, find_source(args, how), model, processes, args.workers, args.inpaint, how.flip)
    if args.samples and not prompts:
        prompts = some_captions(args.samples, model, data)

    if args.ckpt and not args.train_text and (unknown := models.unknown_words(model, data.ids)):
        warnings.warn(f"the model does not know these words: {unknown} (--train-text learns them)", stacklevel=1)
    model.unet.requires_grad_(True)
    if args.train_text or not args.ckpt:
        for encoder in text_encoders(model).values():
            encoder.requires_grad_(True)
            if not (encoder.config.hidden_norm or encoder.config.pooled):  # nothing uses it: SDXL's first encoder
                encoder.norm.requires_grad_(False)
    if not args.ckpt:
        if args.text:
            model.text_encoder.load_state_dict(models.load_text_encoder(args.text, model).state_dict())
        models.forget_unused(model.text_encoder, torch.cat([data.ids.long(), model.tokenizer([""])]))
    objective = Objective(model, args.weighting)
    channels_last(objective, device)
    if args.checkpointing:
        checkpoint_activations(objective)
    if args.compile:
        model.unet.compile()
        for encoder in text_encoders(model).values():
            encoder.compile()
    trainer = loop.Trainer(objective, recipe, processes, args)
    trained = sum(p.numel() for p in trainer.trained.values())
    batches = Batches(data, model, recipe, processes, replace(batch_how, inpaint=args.inpaint, trained=trained))
    written = args.out / "model.safetensors"

    def write() -> str:
        models.write_model(models.averaged(model, trainer.weights()), written, find_dtype(args.export_dtype))
        return ""

    def show(step: int) -> None:
        present = models.averaged(model, trainer.weights())
        settings = {"steps": args.sample_steps, "guidance": args.sample_guidance}
        write_sheet(args.out / f"samples-{step:06d}.png", present, prompts, size, **settings)

    trainer.describe(model.config.name, len(data))
    trainer.run(batches, write, (size // model.config.vae.factor) ** 2, show if prompts else None)
    if processes.main:
        print(f"{written}: {model.config.name}, for --ckpt of every program")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return loop.main(train, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
