"""The loop that both training programs run: one process or many, in mixed precision, that can stop and go on exactly.

A step sees `batch` items per process and part, `accumulate` parts, and as many processes as torchrun starts. All
random numbers are a function of the seed and the step, and every process draws them for all items of the step and
takes its own: so two processes do what one does with twice the batch, and a run that is resumed does what it would
have done. Nothing in the loop waits for the device but the log, every few steps.
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
from .state import STATE, Stop, continued, finite, keep_settings, load_state, save_state

# what Muon leaves to AdamW: first and last layers, whose rows are colours, latents or words, not directions
ENDS = ("conv_in", "conv_out", "quant", "token.", "position.")
FEW_POSITIONS = 1024  # of latents: a matrix of 4 MB a head
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
OUT_OF_MEMORY = "out of memory: try a smaller --batch with more --accumulate, --checkpointing, or --precision bfloat16"


def option(default: Any, text: str) -> Any:
    """A field of `Recipe` with its help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """How to train: each field is an option of the programs."""

    steps: int = option(1000, "optimisation steps")
    batch: int = option(8, "pictures per process and part")
    accumulate: int = option(1, "parts whose gradients are added up before a step")
    lr: float = option(1e-4, "highest learning rate")
    schedule: str = option("cosine", "after the warm-up the rate falls by half a cosine, or stays (constant)")
    warmup: int = option(100, "steps of rising learning rate, at most a tenth of all")
    clip: float = option(1.0, "the gradient's norm is cut to this")
    weight_decay: float = option(0.01, "of matrices and kernels, in AdamW")
    beta2: float = option(0.999, "AdamW's decay of squared gradients")
    optimizer: str = option("adamw", "of matrices and kernels between the ends: adamw, or muon; of the rest AdamW")
    ema: float = option(0.999, "decay of the averaged weights, which are what is written; 0 for none")
    seed: int = option(0, "of everything random")
    log_every: int = option(10, "steps between lines of the log")
    save_every: int = option(500, "steps between saved states, with samples and the model so far")

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
        """The recipe that the arguments say; ValueError for what cannot be."""
        new, with_ckpt = args.recipes
        given = {each.name: getattr(args, each.name) for each in fields(cls)}
        return replace(with_ckpt if args.ckpt else new, **{name: v for name, v in given.items() if v is not None})


def add_loop_arguments(parser: Parser, recipe: Recipe, with_ckpt: Recipe | None = None) -> None:
    """The options of a run, with a recipe's values as defaults; those of another where a checkpoint is trained on."""
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
    add("--precision", choices=("auto", *PRECISIONS), default="auto", help="of the arithmetic; weights stay float32")
    add("--checkpointing", action="store_true", help="compute activations twice, to need less memory")
    add("--compile", action="store_true", help="let torch.compile fuse the networks' operations")
    add("--device", help='"cuda", "cpu", ... (default: the best there is)')
    add("--threads", type=int, default=0, metavar="N", help="CPU threads; 0 leaves the choice to PyTorch")
    add("--resume", action="store_true", help="go on with the run in --out; its options need not be given again")


def find_precision(name: str, device: torch.device) -> torch.dtype | None:
    """What autocast computes in, None for float32. "auto" is bfloat16 where the device has it: it needs no scaling."""
    if name != "auto":
        return PRECISIONS[name]
    if device.type == "cuda":
        has_bfloat16 = torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0)  # older ones emulate it
        return torch.bfloat16 if has_bfloat16 else torch.float16
    return torch.bfloat16 if best_dtype(device) == torch.bfloat16 else None


class Trainer:
    """An objective (a module whose forward gives the loss), its optimizer and average, and where they stand."""

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
            self._restore(load_state(self.out / STATE))
        self.parallel = DistributedDataParallel(objective) if processes.count > 1 else None

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW alone, or Muon for the matrices between the ends and AdamW for the rest. Biases do not decay."""
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
            raise ValueError(f"{self.out / STATE}: the state of another model; resume with the options it began with")
        if (self.ema is None) != (state["ema"] is None):
            raise ValueError(f"{self.out / STATE}: with --ema 0 or without, as it began")
        if self.recipe.optimizer != state["optimizer"]:
            raise ValueError(f"{self.out / STATE}: began with --optimizer {state['optimizer']} and goes on with it")
        with torch.no_grad():
            for name, value in state["networks"].items():
                self.trained[name].copy_(value)
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            given = [{name: v for name, v in group.items() if name != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(kept)
            for group, settings in zip(optimizer.param_groups, given, strict=True):
                group.update(settings)  # what is given now counts
        if self.scaler.is_enabled() and state["scaler"]:  # another precision has none
            self.scaler.load_state_dict(state["scaler"])
        self.step = self.saved = state["step"]
        self.sum.copy_(state["sum"])
        self.count = state["count"]

    def save(self) -> None:
        """Agree on the mean loss and write the state, in the main process.

        Raises ArithmeticError in all of them for losses or weights that are no numbers: a broken state must not
        replace a good one.
        """
        self.sum.copy_(self.processes.mean(self.sum.clone()))
        finite(self.sum.item(), self.step, self.saved)
        if not self.scaler.is_enabled():  # which has kept them from the weights
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
        """The state of the objective with the averaged weights, where there is an average: what is worth keeping."""
        state = {name: value.detach() for name, value in self.objective.state_dict().items()}
        return state if self.ema is None else state | self.ema.average

    def describe(self, name: str, pictures: int) -> None:
        """Say what is about to be done, in one line."""
        if self.processes.main:
            batch = self.recipe.batch * self.recipe.accumulate * self.processes.count
            millions = sum(p.numel() for p in self.trained.values()) / 1e6
            print(
                f"{name} on {self.processes.device.type}, {dtype_name(self.precision or torch.float32)}: "
                f"{millions:.1f} M parameters, {pictures} pictures, {batch} a step"
            )

    def run(
        self,
        batches: Callable[[int], Iterable[Mapping[str, Tensor]]],
        write: Callable[[], str],
        positions: int,
        show: Callable[[int], None] | None = None,
    ) -> None:
        """Train to the last step.

        `batches(step)` gives this process' parts of a step, each the arguments of the objective; `write()` is called
        in the main process whenever a state was saved, to write the model, and may give a remark; `show(step)` then
        makes samples. `positions` is how many attend to each other. Raises KeyboardInterrupt after saving when it is
        asked to stop, ArithmeticError for a loss of NaN.
        """
        recipe, main = self.recipe, self.processes.main
        if self.step > recipe.steps:
            raise ValueError(f"the run is at step {self.step} already: give more --steps")
        log = None
        if main:
            keep_settings(self.args, asdict(recipe))  # only now: options that cannot be were refused before
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

        if self.step == recipe.steps:  # it was stopped before the model of the last step was written
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
                        log.write(step=self.step, loss=loss, lr=lr, norm=logged, seconds=seconds)
                asked = self.processes.any(stop.asked)
                if asked or self.step % recipe.save_every == 0 or self.step == recipe.steps:
                    self.save()
                    if asked:
                        wrap_up()
                        if main:
                            tqdm.write(f"saved at step {self.step}: go on with --resume")
                        raise KeyboardInterrupt
                    present()

    def _optimise(self, parts: Iterable[Mapping[str, Tensor]], lr: float) -> Tensor:
        """One step; gives the gradient's norm."""
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
        # The scaler looks at each optimizer's gradients alone, but the norm is of all: both take the step or neither
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
    """On CPUs the fused attention's way back is slow; the plain one is faster where its matrix is small."""
    plain = device.type == "cpu" and positions <= FEW_POSITIONS
    return sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext()


def main(train: Callable[[argparse.Namespace, Processes], None], parser: Parser, argv: list[str] | None) -> int:
    """Entry point of both programs: options, those of a run that goes on, processes, threads, the folder; then `train`.

    Returns the exit status.
    """

    def work(args: argparse.Namespace) -> None:
        args = continued(parser, args, argv)
        if args.threads < 0:
            raise ValueError(f"--threads must be at least 0, got {args.threads}")
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
