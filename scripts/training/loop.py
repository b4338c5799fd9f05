"""The training loop of all programs: one or many processes, mixed precision, exact resumption.

A step has `batch` items per process and part, `accumulate` parts, and as many processes as torchrun starts. Random
numbers are a function of seed and step: every process draws them for all items of the step and uses its share. So two
processes compute the same as one with twice the batch, and a resumed run the same as an uninterrupted one. Only the
log, every few steps, waits for the device.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from sd.files import remove_partial
from sd.runtime.device import best_dtype, dtype_name
from sd.training import EMA, Muon, learning_rate

from ..common.cli import Parser, keep_freed_memory, run
from .log import Log
from .processes import Processes, processes
from .state import STATE, Stop, continued, finite, keep_settings, load_state, save_state, upgraded

# layers that AdamW optimises even with Muon: first and last layers, whose rows are colours, latents or words
ENDS = ("conv_in", "conv_out", "quant", "token.", "position.")
FEW_POSITIONS = 1024  # positions of a latent: an attention matrix of 4 MB per head
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
OUT_OF_MEMORY = "out of memory: try a smaller --batch with more --accumulate, --checkpointing, or --precision bfloat16"


def option(default: Any, text: str) -> Any:
    """A field of `Recipe` with its help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of training; each field is an option of the programs."""

    steps: int = option(1000, "optimisation steps")
    batch: int = option(8, "images per process and part")
    accumulate: int = option(1, "parts whose gradients are summed before a step")
    lr: float = option(1e-4, "peak learning rate")
    schedule: str = option("cosine", "after the warm-up: cosine decay to 0, or constant")
    warmup: int = option(100, "steps of linear warm-up, at most a tenth of all")
    clip: float = option(1.0, "maximum norm of the gradient")
    weight_decay: float = option(0.01, "weight decay of matrices and kernels, in AdamW")
    beta2: float = option(0.999, "AdamW's decay of squared gradients")
    optimizer: str = option("adamw", "of hidden matrices and kernels: adamw or muon; the rest uses AdamW")
    ema: float = option(0.999, "decay of the averaged weights, which are saved; 0 for none")
    seed: int = option(0, "seed of all random numbers")
    log_every: int = option(10, "steps between log lines")
    save_every: int = option(500, "steps between saved states, samples and models")

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "log_every", "save_every"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("warmup", self.warmup >= 0, "at least 0")
        self._check("lr", 0 < self.lr < math.inf, "above 0")
        self._check("clip", self.clip > 0, "above 0")
        self._check("schedule", self.schedule in ("cosine", "constant"), "cosine or constant")
        self._check("weight_decay", self.weight_decay >= 0, "at least 0")
        self._check("beta2", 0 <= self.beta2 < 1, "from 0 to below 1")
        self._check("ema", 0 <= self.ema < 1, "from 0 to below 1")
        self._check("optimizer", self.optimizer in ("adamw", "muon"), "adamw or muon")

    def _check(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise ValueError(f"--{name.replace('_', '-')} must be {expected}, got {getattr(self, name)}")

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        warmup = min(self.warmup, self.steps // 10)
        if self.schedule == "constant" and step >= warmup:
            return self.lr
        return learning_rate(step, self.steps, self.lr, warmup)

    @classmethod
    def of(cls, args: argparse.Namespace) -> Recipe:
        """The recipe of the arguments. Raises ValueError for invalid values."""
        new, with_ckpt = args.recipes
        given = {each.name: getattr(args, each.name) for each in fields(cls)}
        return replace(with_ckpt if args.ckpt else new, **{name: v for name, v in given.items() if v is not None})


def add_loop_arguments(parser: Parser, recipe: Recipe, with_ckpt: Recipe | None = None) -> None:
    """Add the options of a run; defaults are those of `recipe`, or of `with_ckpt` when fine-tuning a checkpoint."""
    add = parser.add_argument_group("training").add_argument
    other = with_ckpt or recipe
    for each in fields(recipe):
        name, default, fine = each.name, getattr(recipe, each.name), getattr(other, each.name)
        text = f"{each.metadata['help']} (default: {default}{f', with --ckpt {fine}' if fine != default else ''})"
        add(
            f"--{name.replace('_', '-')}",
            type=type(default),
            metavar="NAME" if isinstance(default, str) else "N",
            help=text,
        )
    parser.set_defaults(recipes=(recipe, other))
    add("--precision", choices=("auto", *PRECISIONS), default="auto", help="of computation; weights stay float32")
    add("--checkpointing", action="store_true", help="recompute activations to save memory")
    add("--compile", action="store_true", help="compile the networks with torch.compile")
    add("--device", help='"cuda", "cpu", ... (default: the best available)')
    add("--threads", type=int, default=0, metavar="N", help="CPU threads; 0: PyTorch's default")
    add("--resume", action="store_true", help="resume the run in --out, with its options")


def find_precision(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, None for float32. "auto" prefers bfloat16, which needs no loss scaling."""
    if name != "auto":
        return PRECISIONS[name]
    if device.type == "cuda":
        has_bfloat16 = torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0)  # older ones emulate it
        return torch.bfloat16 if has_bfloat16 else torch.float16
    return torch.bfloat16 if best_dtype(device) == torch.bfloat16 else None


class Trainer:
    """An objective (a module whose forward returns the loss) with optimizer, averaged weights and progress."""

    def __init__(
        self,
        objective: nn.Module,
        recipe: Recipe,
        processes: Processes,
        args: argparse.Namespace,
    ) -> None:
        self.objective, self.recipe, self.processes, self.args = objective, recipe, processes, args
        self.out: Path = args.out
        self.precision = find_precision(args.precision, processes.device)
        self.trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        self.optimizers = self._optimizers()
        self.ema = EMA(objective, recipe.ema) if recipe.ema else None
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=self.precision == torch.float16)
        self.step = 0
        self.saved = 0
        self.norm = torch.zeros((), device=processes.device)  # of the last gradient
        self.sum = torch.zeros((), device=processes.device)  # of the losses since the last line of the log
        self.count = 0
        if args.resume:
            self._restore(upgraded(load_state(self.out / STATE)))
        self.parallel = DistributedDataParallel(objective) if processes.count > 1 else None

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW alone, or Muon for the hidden matrices and AdamW for the rest. Biases have no weight decay."""
        recipe = self.recipe
        groups: dict[str, list[Tensor]] = {"inner": [], "decayed": [], "others": []}
        for name, p in self.trained.items():
            if p.dim() <= 1 or "token." in name:
                groups["others"].append(p)
            elif recipe.optimizer == "muon" and not any(end in name for end in ENDS):
                groups["inner"].append(p)
            else:
                groups["decayed"].append(p)
        adamw: list[dict[str, Any]] = [
            {"params": groups["decayed"]},
            {"params": groups["others"], "weight_decay": 0.0},
        ]
        found: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                adamw,
                recipe.lr,
                betas=(0.9, recipe.beta2),
                weight_decay=recipe.weight_decay,
                fused=self.processes.device.type in ("cpu", "cuda"),
            )
        ]
        if groups["inner"]:
            found.append(Muon(groups["inner"], recipe.lr, weight_decay=recipe.weight_decay))
        return found

    def _restore(self, state: Mapping[str, Any]) -> None:
        shapes = {name: p.shape for name, p in self.trained.items()}
        if shapes != {name: value.shape for name, value in state["networks"].items()}:
            raise ValueError(f"{self.out / STATE}: the state of another model; resume with the original options")
        if (self.ema is None) != (state["ema"] is None):
            raise ValueError(f"{self.out / STATE}: --ema cannot change between 0 and another value")
        if self.recipe.optimizer != state["optimizer"]:
            raise ValueError(f"{self.out / STATE}: started with --optimizer {state['optimizer']}, which cannot change")
        with torch.no_grad():
            for name, value in state["networks"].items():
                self.trained[name].copy_(value)
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            given = [{name: v for name, v in group.items() if name != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(kept)
            for group, settings in zip(optimizer.param_groups, given, strict=True):
                group.update(settings)  # the current settings override the saved ones
        if self.scaler.is_enabled() and state["scaler"]:  # empty if saved with another precision
            self.scaler.load_state_dict(state["scaler"])
        self.step = self.saved = state["step"]
        self.sum.copy_(state["sum"])
        self.count = state["count"]

    def save(self) -> None:
        """Write the state, in the main process, with the mean loss over all processes.

        Raises ArithmeticError in all processes for a loss or gradient that is not finite, so that a broken state never
        replaces a good one.
        """
        self.sum.copy_(self.processes.mean(self.sum.clone()))
        finite(self.sum.item(), self.step, self.saved)
        if not self.scaler.is_enabled():  # the scaler skips steps with such gradients
            finite(self.norm.item(), self.step, self.saved, "gradient")
        self.saved = self.step
        if self.processes.main:
            state = {
                "networks": {name: p.detach() for name, p in self.trained.items()},
                "optimizer": self.recipe.optimizer,
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "ema": None if self.ema is None else self.ema.state_dict(),
                "scaler": self.scaler.state_dict(),
                "step": self.step,
                "sum": self.sum,
                "count": self.count,
            }
            save_state(state, self.out / STATE)

    def weights(self) -> dict[str, Tensor]:
        """The state dict of the objective, with the averaged weights if there are any."""
        state = {name: value.detach() for name, value in self.objective.state_dict().items()}
        return state if self.ema is None else state | self.ema.average

    def describe(self, name: str, images: int) -> None:
        """Print a line about the run."""
        if self.processes.main:
            batch = self.recipe.batch * self.recipe.accumulate * self.processes.count
            millions = sum(p.numel() for p in self.trained.values()) / 1e6
            print(
                f"{name} on {self.processes.device.type}, {dtype_name(self.precision or torch.float32)}: "
                f"{millions:.1f} M parameters, {images} images, {batch} a step"
            )

    def run(
        self,
        batches: Callable[[int], Iterable[Mapping[str, Tensor]]],
        write: Callable[[], str],
        positions: int,
        show: Callable[[int], None] | None = None,
        measure: Callable[[], Mapping[str, float | list[float]]] | None = None,
    ) -> None:
        """Train until the last step.

        batches    step -> the parts of a step for this process, each the arguments of the objective
        write      called in the main process after each saved state: writes the model, returns a remark for the log
        positions  number of positions that attend to each other
        show       called with the step after `write`, to generate samples
        measure    returns further values for a line of the log

        Raises KeyboardInterrupt, after saving, on a request to stop, and ArithmeticError if the loss is not finite.
        """
        recipe, main = self.recipe, self.processes.main
        if self.step > recipe.steps:
            raise ValueError(f"the run is already at step {self.step}: give more --steps")
        log = None
        if main:
            keep_settings(self.args, asdict(recipe))  # only now, after invalid options were rejected
            remove_partial(self.out)
            log = Log(self.out, self.step)
        began = time.monotonic() - (log.seconds if log else 0.0)

        def wrap_up() -> None:
            if log:
                log.plot()
                remark = write()
                minutes = (time.monotonic() - began) / 60
                loss = log.points[-1][1] if log.points else float("nan")
                tqdm.write(f"step {self.step}: loss {loss:.4f}, {minutes:.1f} min{remark}")

        def present() -> None:
            wrap_up()
            if main and show:
                show(self.step)
            self.processes.wait()

        if self.step == recipe.steps:  # the run stopped before writing its final model
            present()
            return
        bar = tqdm(desc="training", initial=self.step, total=recipe.steps, disable=None if main else True)
        with bar, Stop(patient=self.processes.count > 1) as stop, _fast_attention(self.processes.device, positions):
            while self.step < recipe.steps:
                lr = recipe.rate(self.step)
                self.norm = self._optimise(batches(self.step), lr)
                self.step += 1
                bar.update()
                if self.step % recipe.log_every == 0 or self.step == recipe.steps:
                    loss = finite(self._mean_loss(), self.step, self.saved)
                    bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                    if log:
                        seconds = round(time.monotonic() - began, 2)
                        norm = self.norm.item()  # not finite for a step that float16 skipped
                        logged = norm if math.isfinite(norm) else None
                        more = measure() if measure else {}
                        log.write(step=self.step, loss=loss, lr=lr, norm=logged, seconds=seconds, **more)
                asked = self.processes.any(stop.asked)
                if asked or self.step % recipe.save_every == 0 or self.step == recipe.steps:
                    self.save()
                    if asked:
                        wrap_up()
                        if main:
                            tqdm.write(f"saved at step {self.step}: continue with --resume")
                        raise KeyboardInterrupt
                    present()

    def _optimise(self, parts: Iterable[Mapping[str, Tensor]], lr: float) -> Tensor:
        """One optimisation step; returns the norm of the gradient."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        for k, part in enumerate(parts, start=1):
            last = k == self.recipe.accumulate
            module = self.objective if self.parallel is None else self.parallel
            # processes average their gradients after the last part only
            together = contextlib.nullcontext() if last or self.parallel is None else self.parallel.no_sync()
            with together, torch.enable_grad():
                with torch.autocast(self.processes.device.type, self.precision, enabled=self.precision is not None):
                    loss = module(**part) / self.recipe.accumulate
                self.scaler.scale(loss).backward()
            self.sum += loss.detach()
        self.count += 1
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.recipe.clip)
        # The scaler checks each optimizer alone, but the norm includes all gradients: both take the step or neither
        if not self.scaler.is_enabled() or norm.isfinite():
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update()
        return norm

    def _mean_loss(self) -> float:
        mean = self.processes.mean(self.sum / self.count).item()
        self.sum.zero_()
        self.count = 0
        return mean


def _fast_attention(device: torch.device, positions: int) -> contextlib.AbstractContextManager[None]:
    """On a CPU the backward pass of fused attention is slow; plain attention is faster if its matrix is small."""
    plain = device.type == "cpu" and positions <= FEW_POSITIONS
    return sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext()


def main(train: Callable[[argparse.Namespace, Processes], None], parser: Parser, argv: list[str] | None) -> int:
    """Entry point of the programs: parses options, restores those of a resumed run, sets up processes, calls `train`.

    Returns the exit status.
    """

    def work(args: argparse.Namespace) -> None:
        args = continued(parser, args, argv)
        for name, low in (("threads", 0), ("workers", 0), ("size", 1)):
            value = getattr(args, name, None)
            if value is not None and value < low:
                raise ValueError(f"--{name} must be at least {low}, got {value}")
        if args.threads:
            torch.set_num_threads(args.threads)
        with processes(args.device) as found:
            if found.device.type == "cpu":
                keep_freed_memory()
            args.out.mkdir(parents=True, exist_ok=True)
            try:
                train(args, found)
            except ValueError:
                if found.main:
                    raise
                raise SystemExit(1) from None  # all processes find the same, and one says it

    return run(work, parser, argv, OUT_OF_MEMORY)
