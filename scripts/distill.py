"""Distil a model into one that needs a few steps and no guidance: all its weights, or a LoRA.

    python scripts/distill.py --out outputs/few-steps                                    the embedded model
    python scripts/distill.py --lora-rank 16 --out outputs/few-steps-lora                the same as a LoRA
    python scripts/distill.py --ckpt v1-5.ckpt --data photos --lora-rank 64 --out outputs/lcm
    python scripts/distill.py --out outputs/few-steps --resume                           continue a stopped run

The checkpoint is the teacher, and what the student starts from. In each training step, one step of a DDIM solver with
the teacher's guidance leads from a noisy latent to a less noisy one, and the student learns to say the same of both
(sd/training/distillation.py). The images of the data are only noised, and their captions are the prompts.

Writes OUT/model.safetensors, a model with few steps as its default, or OUT/lora.safetensors, which other programs read
as well. Also writes train.jsonl, loss.png, samples-STEP.png, state.pt.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: see bootstrap.py
    import bootstrap

    __package__ = bootstrap.PACKAGE

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sd.checkpoints.convert import WEIGHTS
from sd.checkpoints.few_step_files import LCM_WIDTH
from sd.conditioning import Conditioning, Network
from sd.config import PRECISIONS, SHORT_PRECISIONS, Config
from sd.few_step import LCM, SETTINGS, TCD, of_config
from sd.models.unet import UNet
from sd.params import SamplingParams
from sd.pipeline import StableDiffusion
from sd.runtime.device import find_dtype
from sd.schedule import LCM_TIMESTEPS, Schedule
from sd.training import (
    LoraParams,
    TrainableLora,
    add_guidance_input,
    channels_last,
    checkpoint_activations,
    consistency_loss,
    guided,
    level_batch,
    lora_layers,
    lora_metadata,
    lora_tensors,
    solver_step,
    solver_timesteps,
    trajectory_loss,
)
from sd.training.distillation import HUBER

from .common import cli
from .training import loop, models
from .training.batches import Batch, Batches, BatchOptions
from .training.captions import Captions, text_encoders
from .training.latents import latents
from .training.options import add_data_arguments, data_options, find_source
from .training.processes import Processes
from .training.samples import add_sample_arguments, sample_prompts, some_captions, write_sheet
from .training.state import save_tensors

# for the embedded model, and for a checkpoint
RECIPE = loop.Recipe(steps=4000, batch=32, lr=1e-4, weight_decay=0.0, ema=0.95, log_every=50)
FINE_TUNING = loop.Recipe(steps=1000, batch=4, lr=1e-5, weight_decay=0.0, ema=0.95, save_every=250)
LORA_LR = 1e-4  # of a checkpoint's LoRA (Luo et al. 2023, "LCM-LoRA")
METHODS = {"lcm": LCM, "tcd": TCD}


def parser() -> cli.Parser:
    """The arguments; the defaults are the recipe of the embedded model."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=cli.file_path, default=Path("outputs/few-steps"), help="output folder (default: %(default)s)")
    add("--ckpt", type=cli.file_path, metavar="FILE", help="the teacher (default: the embedded model)")
    add("--model", type=cli.home, metavar="NAME", help="a name, or a JSON file with a config (default: detected)")
    add("--weights", choices=WEIGHTS, default="auto", help="of a checkpoint with both: plain or averaged (EMA) U-Net")
    add("--export-dtype", choices=(*PRECISIONS, *SHORT_PRECISIONS), default="float16", help="default: %(default)s")
    add("--phrasings", type=int, default=8, help="captions per drawn scene (default: %(default)s)")
    add = parser.add_argument_group("distillation").add_argument
    add(
        "--method", choices=METHODS, default="lcm",
        help="consistency (Luo et al. 2023) or trajectory distillation (Zheng et al. 2024) (default: %(default)s)",
    )  # fmt: skip
    add(
        "--guidance", type=float, nargs="+", metavar="G",
        help="guidance of the teacher (default: its own); two numbers: drawn from this range for each image, and given "
        "to the student as an input",
    )  # fmt: skip
    add(
        "--solver-steps",
        type=int,
        default=LCM_TIMESTEPS,
        metavar="N",
        help="steps of the teacher's grid (default: %(default)s)",
    )
    add("--skip", type=int, default=5, metavar="K", help="timesteps of the grid per solver step (default: %(default)s)")
    add(
        "--substeps",
        type=int,
        default=1,
        metavar="N",
        help="DDIM steps of the teacher per solver step (default: %(default)s)",
    )
    add(
        "--huber",
        type=float,
        default=HUBER,
        metavar="H",
        help="pseudo-Huber loss: differences below H count quadratically, larger ones linearly (default: %(default)s)",
    )
    add(
        "--target", choices=("student", "average"), default="average",
        help="network that the student has to match: itself, or its moving average (--ema) (default: %(default)s)",
    )  # fmt: skip
    add("--lora-rank", type=int, metavar="R", help="train a LoRA of this rank (default: all weights of the U-Net)")
    add("--lora-alpha", type=float, metavar="A", help="of the LoRA, whose scale is A / R (default: R)")
    add_sample_arguments(parser, steps=LCM.steps)
    add_data_arguments(parser, scenes=24000, bucketed=True)
    loop.add_loop_arguments(parser, RECIPE, with_ckpt=FINE_TUNING)
    return parser


class Student(nn.Module):
    """A U-Net to train, or a frozen one with a LoRA to train, which is attached."""

    def __init__(self, unet: UNet, lora: TrainableLora | None = None) -> None:
        super().__init__()
        self.unet, self.lora = unet.requires_grad_(lora is None), lora
        if lora is not None:
            lora.attach(unet)

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The U-Net's prediction."""
        return self.unet(x, t, conditioning)

    def without_lora(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """What the U-Net predicts as it was."""
        assert self.lora is not None
        with self.lora.disabled():
            return self.unet(x, t, conditioning)

    def trained_lora(self, weights: Mapping[str, Tensor]) -> TrainableLora:
        """The LoRA with these weights of an objective; attached to no network."""
        assert self.lora is not None
        other = TrainableLora(self.unet, self.lora.names, self.lora.params)
        other.load_state_dict(part(weights, "student.lora."))
        return other.requires_grad_(False)

    def network(self, weights: Mapping[str, Tensor]) -> UNet:
        """A U-Net for inference with these weights of an objective; a LoRA is merged into it."""
        own = part(weights, "student.unet.")
        own = own if self.lora is None else self.trained_lora(weights).merged(own)
        return models.with_weights(self.unet, own, "")


def part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def make_student(args: argparse.Namespace, teacher: UNet, guidance: tuple[float, float], seed: int) -> Student:
    """The student that the options ask for, equal to the teacher."""
    if args.lora_rank:
        params = LoraParams(args.lora_rank, args.lora_alpha)
        return Student(teacher, TrainableLora(teacher, lora_layers(teacher), params, seed))
    if guidance[0] < guidance[1]:
        return Student(add_guidance_input(teacher, LCM_WIDTH))
    return Student(copy.deepcopy(teacher))


class Objective(nn.Module):
    """The student with the loss of a method; text encoders and teacher are frozen."""

    def __init__(
        self,
        student: Student,
        teacher: Network,
        model: StableDiffusion,
        method: str,
        huber: float,
        substeps: int = 1,
    ) -> None:
        """`method`, `huber` and `substeps` are those of the options."""
        super().__init__()
        self.student, self.captions = student, Captions(model)
        for name, encoder in text_encoders(model).items():
            self.add_module(name, encoder)
        self.schedule: Schedule = model.schedule
        self.method, self.huber, self.substeps = method, huber, substeps
        self.average: Mapping[str, Tensor] | None = None  # weights of the target; None: the student's
        self.networks = {"teacher": teacher}  # not a submodule: it is neither trained nor saved
        self.is_told = student.unet.config.guidance is not None

    def target(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The prediction that the student has to agree with."""
        if self.average is None:
            return self.student(x, t, conditioning)
        own = {key.removeprefix("student."): value for key, value in self.average.items()}
        return functional_call(self.student, own, (x, t, conditioning))

    def forward(self, batch: Batch, u: Tensor, s: Tensor, guidance: Tensor) -> Tensor:
        """A batch, whose t are on the grid, and the times u, s and the guidance (B,) -> a scalar."""
        x0, noise, t = batch[:3]
        with torch.no_grad():
            cond = self.captions(batch)
            teacher = guided(self.networks["teacher"], self.captions.without(batch), guidance)
            x_t = self.schedule.add_noise(x0, noise, level_batch(self.schedule, t))
            points = solver_step(teacher, self.schedule, x_t, t, u, cond, self.substeps)
        if self.is_told:
            cond = cond._replace(guidance=guidance)
        of_both, of_each = (self.student, self.target, self.schedule, points), (cond, self.huber, batch.weight)
        if self.method == "tcd":
            return trajectory_loss(*of_both, s, *of_each)
        return consistency_loss(*of_both, *of_each)


class SolverBatches:
    """The batches of each step, with times on the grid of the solver and the teacher's guidance.

    From t to u it is `skip` places on the grid, or what is left of it.
    """

    def __init__(self, batches: Batches, grid: tuple[int, ...], guidance: tuple[float, float], skip: int = 1) -> None:
        self.batches, self.guidance, self.skip = batches, guidance, skip
        self.grid = torch.tensor(grid, device=batches.processes.device)

    def names(self, step: int) -> list[str]:
        """The names of all images of a step."""
        return self.batches.names(step)

    def __call__(self, step: int) -> Iterator[dict[str, Any]]:
        """The parts of a step for this process: see `Objective.forward`."""
        batches, (low, high) = self.batches, self.guidance
        for number, part in enumerate(batches(step), step * batches.recipe.accumulate):
            batch: Batch = part["batch"]
            of_guidance, of_s = batches.draw(number, "distillation", 2)
            index = 1 + batch.t * (len(self.grid) - 1) // batches.steps  # of t; all are as likely
            to = (index - self.skip).clamp(min=0)
            s = (of_s * (to + 1)).long()  # from clean data to u itself
            timed = {"batch": batch._replace(t=self.grid[index]), "u": self.grid[to], "s": self.grid[s]}
            yield {**timed, "guidance": low + (high - low) * of_guidance}


def distilled(config: Config, method: str, guidance: tuple[float, float], solver_steps: int) -> Config:
    """The config of the distilled model: the method's sampler and steps, no guidance.

    A student that is told its guidance has as default the teacher's, or what is nearest to it in the range.
    """
    kind = METHODS[method]
    made = kind.applied(replace(config, name=f"{config.name} {kind.label}"[:100]))
    if solver_steps % LCM_TIMESTEPS:  # the timesteps of the spacing lcm were not trained
        made = replace(made, spacing="trailing")
    low, high = guidance
    if low == high:
        return made
    told = replace(config.unet, guidance=LCM_WIDTH)
    return replace(made, unet=told, guidance=min(max(config.guidance, low), high))


def find_teacher(args: argparse.Namespace, device: torch.device) -> StableDiffusion:
    """The model of the checkpoint."""
    config = models.find_config(args.model) if args.model else None
    model = StableDiffusion.load(
        args.ckpt, config=config, weights=args.weights, device=device, dtype="float32", offload_text_encoders=False
    )
    if of_config(model.config) is not None:
        raise ValueError(f"{model.config.name} is already a few-step model: give the ordinary model with --ckpt")
    return model


def guidance_range(args: argparse.Namespace, model: StableDiffusion) -> tuple[float, float]:
    """The lowest and the highest guidance of the teacher."""
    given = args.guidance or [model.config.guidance]
    if len(given) > 2 or given != sorted(given) or not all(math.isfinite(g) and 0 <= g <= 100 for g in given):
        raise ValueError(f"--guidance must be one number from 0 to 100, or two, the lower first, got {given}")
    return given[0], given[-1]


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for options out of range."""
    if min(args.phrasings, args.skip, args.substeps) < 1 or args.samples < 0 or not 0 < args.huber < math.inf:
        raise ValueError("--phrasings, --skip and --substeps must be at least 1, --samples at least 0, --huber above 0")
    if args.lora_rank is None and args.lora_alpha is not None:
        raise ValueError("--lora-alpha goes with --lora-rank")
    if args.lora_rank is not None and not (args.lora_rank >= 1 and (args.lora_alpha is None or args.lora_alpha > 0)):
        raise ValueError("--lora-rank must be at least 1, --lora-alpha above 0")
    if args.lora_rank is not None and len(args.guidance or ()) > 1:
        raise ValueError("a LoRA has no input for a range of guidance: give one --guidance, or leave out --lora-rank")
    if args.target == "average" and args.ema == 0:
        raise ValueError("--target average needs an average of the weights: --ema above 0, or --target student")
    if args.shard:
        raise ValueError("--shard goes with train.py and train_vae.py: here each process keeps the whole networks")
    SamplingParams(steps=args.sample_steps)


def train(args: argparse.Namespace, processes: Processes) -> None:
    """Run the distillation."""
    check(args)
    if args.lora_rank and args.ckpt and args.lr is None:
        args.lr = LORA_LR
    recipe = loop.Recipe.of(args)
    prompts = sample_prompts(args)
    device = processes.device
    model = find_teacher(args, device)
    grid = solver_timesteps(model.schedule, args.solver_steps)
    guidance = guidance_range(args, model)
    size = args.size or model.config.size
    model.latent_shape(size, size)  # refuses what cannot be
    path = args.out / "cache" / "latents.safetensors"
    how = data_options(args, model.config)
    data = latents(path, find_source(args, how), model, processes, args.workers, model.is_inpainting, how.flip)
    if unknown := models.unknown_words(model, data.ids):
        warnings.warn(f"the model does not know these words: {unknown}", stacklevel=1)
    if args.samples and not prompts:
        prompts = some_captions(args.samples, model, data)

    teacher = model.unet
    student = make_student(args, teacher, guidance, recipe.seed)
    unet, lora = student.unet, student.lora
    if lora is not None and lora.limited:
        warnings.warn(f"{lora.limited} layers are smaller than the LoRA's rank, and have less", stacklevel=1)
    objective = Objective(
        student, student.without_lora if lora else teacher, model, args.method, args.huber, args.substeps
    )
    channels_last(teacher, device)
    channels_last(objective, device)
    if args.checkpointing:
        checkpoint_activations(unet)
    if args.compile:
        unet.compile()
        teacher.compile()
    trainer = loop.Trainer(objective, recipe, processes, args)
    if args.target == "average":
        assert trainer.ema is not None
        objective.average = trainer.ema.average
    trained = sum(p.numel() for p in trainer.trained.values())
    batches = Batches(data, model, recipe, processes, BatchOptions(inpaint=model.is_inpainting, trained=trained))
    config = distilled(model.config, args.method, guidance, args.solver_steps)
    title = f"{config.name} LoRA"
    kind = of_config(config)
    assert kind is not None
    settings = {SETTINGS: kind.to_json()}  # by which programs see what the LoRA is (sd/few_step.py)
    written = args.out / ("lora.safetensors" if lora else "model.safetensors")

    def present() -> StableDiffusion:
        return models.with_networks(model, config, unet=student.network(trainer.weights()))

    def write() -> str:
        dtype = find_dtype(args.export_dtype)
        if lora is None:
            models.write_model(present(), written, dtype)
        else:
            found = student.trained_lora(trainer.weights())
            metadata = lora_metadata({"unet": found}, model.config, title) | settings
            save_tensors(lora_tensors({"unet": found}, model.config, dtype), written, metadata)
        return ""

    def show(step: int) -> None:
        write_sheet(args.out / f"samples-{step:06d}.png", present(), prompts, size, steps=args.sample_steps)

    trainer.describe(f"{title} of rank {lora.params.rank}" if lora else config.name, len(data))
    timed = SolverBatches(batches, grid, guidance, args.skip)
    trainer.run(timed, write, (size // model.config.vae.factor) ** 2, show if prompts else None)
    if processes.main:
        what = "a LoRA of the U-Net, for --lora" if lora else f"{config.name}, for --ckpt"
        print(f"{written}: {what} of every program")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return loop.main(train, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
