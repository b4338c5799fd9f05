"""The training loop of all programs: one or many processes, mixed precision, exact resumption.

A step has `batch` items per process and part, `accumulate` parts, and as many processes as torchrun starts. Random
numbers are a function of seed and step: every process draws them for all items of the step and uses its share. So two
processes compute the same as one with twice the batch, and a resumed run the same as an uninterrupted one. Only the
log, every few steps, waits for the device.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from sd.files import remove_partial
from sd.runtime.device import dtype_name
from sd.training import EMA

from ..common.cli import Parser, keep_freed_memory, run
from . import sharding
from .log import Log, Values
from .optimizers import load_optimizer, make_optimizers, set_rate
from .processes import Processes, lost, processes
from .recipe import Recipe, add_loop_arguments, find_precision
from .settings import finished, keep_settings, starting
from .state import STATE, Stop, resumable, save_state
from .watch import Watch

__all__ = ["Recipe", "Trainer", "add_loop_arguments", "main"]

FEW_POSITIONS = 1024  # positions of a latent: an attention matrix of 4 MB per head
OUT_OF_MEMORY = "out of memory: try a smaller --batch with more --accumulate, --checkpointing, or --precision bfloat16"
LOST = "one ended or cannot be reached; resume the run (--resume), or let torchrun do it (--max-restarts)"


class Batches(Protocol):
    """The parts of each step for this process, each the arguments of the objective."""

    def __call__(self, step: int) -> Iterable[Mapping[str, Any]]: ...


@runtime_checkable
class Named(Protocol):
    """Batches that know their images."""

    def names(self, step: int) -> Sequence[str]:
        """The names of the images of a step, in all processes."""


class Trainer:
    """An objective (a module whose forward returns the loss) with optimizer, averaged weights and progress."""

    def __init__(
        self,
        objective: nn.Module,
        recipe: Recipe,
        processes: Processes,
        args: argparse.Namespace,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        """`rates` are factors of the learning rate, by what names of parameters begin with ("text_lora.": 0.5)."""
        self.objective, self.recipe, self.processes, self.args = objective, recipe, processes, args
        self.out: Path = args.out
        self.rates = dict(rates or {})
        self.precision = find_precision(args.precision, processes.device)
        self.sharded = bool(args.shard) and processes.count > 1
        if self.sharded:
            if recipe.optimizer != "adamw":
                raise ValueError(f"--shard goes with --optimizer adamw, not with {recipe.optimizer}")
            sharding.shard(objective, processes, self.precision)
        self.trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        self.optimizers = make_optimizers(self.trained, recipe, processes.device, self.rates)
        self.ema = EMA(objective, recipe.ema) if recipe.ema else None
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=self.precision == torch.float16)
        self.step = 0
        self.saved = 0
        self.watch = Watch()
        self.loss = torch.zeros((), device=processes.device)  # of the last step
        self.norm = torch.zeros((), device=processes.device)  # of the last gradient
        self.sum = torch.zeros((), device=processes.device)  # of the losses since the last line of the log
        self.count = 0
        self.names: Callable[[int], Sequence[str]] | None = None  # of the images of a step
        self._whole: dict[str, Tensor] | None = None  # the weights of a sharded objective, while they are written
        if args.resume:
            self._restore(resumable(self.out / STATE))
        self.parallel = DistributedDataParallel(objective) if processes.count > 1 and not self.sharded else None

    def _restore(self, state: Mapping[str, Any]) -> None:
        path = self.out / STATE
        shapes = {name: p.shape for name, p in self.trained.items()}
        if shapes != {name: value.shape for name, value in state["networks"].items()}:
            raise ValueError(f"{path}: the state of another model; resume with the original options")
        if (self.ema is None) != (state["ema"] is None):
            raise ValueError(f"{path}: --ema cannot change between 0 and another value")
        if self.recipe.optimizer != state["optimizer"]:
            raise ValueError(f"{path}: started with --optimizer {state['optimizer']}, which cannot change")
        place = sharding.placed if self.sharded else _as_it_is
        with torch.no_grad():
            for name, value in state["networks"].items():
                self.trained[name].copy_(place(value, self.trained[name]))
            if self.ema is not None:
                kept = state["ema"]["average"]
                average = {name: place(value, self.trained[name]) for name, value in kept.items()}
                self.ema.load_state_dict({**state["ema"], "average": average})
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            load_optimizer(optimizer, saved, place)
        if self.scaler.is_enabled() and state["scaler"]:  # empty if saved with another precision
            self.scaler.load_state_dict(state["scaler"])
        self.step = self.saved = state["step"]
        self.sum.copy_(state["sum"])
        self.count = state["count"]

    def save(self) -> None:
        """Write the state, in the main process, with the mean loss over all processes.

        A broken state never replaces a good one: see `_check`.
        """
        self._check()
        self.sum.copy_(self.processes.mean(self.sum.clone()))
        self.saved = self.step
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
        if self.sharded:
            state = sharding.gathered(state, self.processes.main, torch.device("cpu"))
        if self.processes.main:
            save_state(state, self.out / STATE)

    def _check(self) -> None:
        """Raise ArithmeticError, in all processes, if a loss or gradient since the last check is not finite."""
        self.watch.check(self.step, self.saved, self.processes, self.names)

    def weights(self) -> dict[str, Tensor]:
        """The state dict of the objective, with the averaged weights if there are any.

        Of a sharded objective only while `run` calls `write` and `show`, in the main process.
        """
        if self._whole is not None:
            return self._whole
        state = {name: value.detach() for name, value in self.objective.state_dict().items()}
        return state if self.ema is None else state | self.ema.average

    @contextlib.contextmanager
    def _gathered(self) -> Iterator[None]:
        """Inside a `with` block, entered in all processes, `weights` of the main process are whole tensors."""
        self._whole = sharding.gathered(self.weights(), self.processes.main) if self.sharded else None
        try:
            yield
        finally:
            self._whole = None

    def describe(self, name: str, images: int) -> None:
        """Print a line about the run."""
        if self.processes.main:
            batch = self.recipe.batch * self.recipe.accumulate * self.processes.count
            count = sum(p.numel() for p in self.trained.values())
            size = f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"  # a word has a few hundred
            how = f", sharded over {self.processes.count} processes" if self.sharded else ""
            print(
                f"{name} on {self.processes.device.type}, {dtype_name(self.precision or torch.float32)}{how}: "
                f"{size} parameters, {images} images, {batch} a step"
            )

    def run(
        self,
        batches: Batches,
        write: Callable[[], str],
        positions: int,
        show: Callable[[int], None] | None = None,
        measure: Callable[[], Values] | None = None,
        validate: Callable[[], Values] | None = None,
    ) -> None:
        """Train until the last step.

        batches    step -> the parts of a step for this process, each the arguments of the objective
        write      called in the main process after each saved state: writes the model, returns a remark for the log
        positions  number of positions that attend to each other
        show       called with the step after `write`, to generate samples
        measure    returns further values for a line of the log; not of a sharded objective
        validate   called in all processes after each saved state: "loss" and "deciles" of it are drawn in the curve

        Raises KeyboardInterrupt, after saving, on a request to stop, and ArithmeticError if the loss is not finite.
        """
        recipe, main = self.recipe, self.processes.main
        if self.step > recipe.steps:
            raise ValueError(f"the run is already at step {self.step}: give more --steps")
        if measure and self.sharded:
            raise ValueError("--shard is for training whole networks")
        self.names = batches.names if isinstance(batches, Named) else None
        log = None
        if main:
            keep_settings(self.args, asdict(recipe))  # only now, after invalid options were rejected
            remove_partial(self.out)
            log = Log(self.out, self.step)
        began = time.monotonic() - (log.seconds if log else 0.0)

        def present(whole: bool = True) -> None:
            """After a saved state: validation, curve, model and samples; on a request to stop, curve and model."""
            missing = log is not None and all(step != self.step for step, _ in log.validation)
            if validate and whole and self.processes.any(missing):
                found = validate()
                if self.sharded:
                    sharding.forget_weights(self.objective)
                if log:
                    log.validate(self.step, round(time.monotonic() - began, 2), found)
            with self._gathered():
                if log:
                    log.plot()
                    remark = write()
                    minutes = (time.monotonic() - began) / 60
                    loss = f"loss {log.points[-1][1]:.4f}, " if log.points else ""  # none before the first log line
                    if log.validation and log.validation[-1][0] == self.step:
                        loss += f"validation loss {log.validation[-1][1]['loss']:.4f}, "
                    tqdm.write(f"step {self.step}: {loss}{minutes:.1f} min{remark}")
                if main and show and whole:
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
                # float16 leaves out the steps whose gradients are not finite
                self.watch.add(self.loss, torch.zeros_like(self.norm) if self.scaler.is_enabled() else self.norm)
                self.step += 1
                bar.update()
                if self.step % recipe.log_every == 0 or self.step == recipe.steps:
                    self._check()
                    loss = self._mean_loss()
                    bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                    if log:
                        seconds = round(time.monotonic() - began, 2)
                        norm = self.norm.item()  # not finite for a step that float16 skipped
                        logged = norm if math.isfinite(norm) else None
                        parts = {"rates": {name: lr * rate for name, rate in self.rates.items()}} if self.rates else {}
                        more = measure() if measure else {}
                        log.write(step=self.step, loss=loss, lr=lr, norm=logged, seconds=seconds, **parts, **more)
                asked = self.processes.any(stop.asked)
                if asked or self.step % recipe.save_every == 0 or self.step == recipe.steps:
                    self.save()
                    present(whole=not asked)
                    if asked:
                        if main:
                            tqdm.write(f"saved at step {self.step}: continue with --resume")
                        raise KeyboardInterrupt

    def _optimise(self, parts: Iterable[Mapping[str, Tensor]], lr: float) -> Tensor:
        """One optimisation step; returns the norm of the gradient."""
        set_rate(self.optimizers, lr)
        self.loss = torch.zeros_like(self.sum)
        for k, part in enumerate(parts, start=1):
            number = self.step * self.recipe.accumulate + k
            with self._together(k == self.recipe.accumulate), self._random(number), torch.enable_grad():
                module = self.objective if self.parallel is None else self.parallel
                with torch.autocast(self.processes.device.type, self.precision, enabled=self.precision is not None):
                    loss = module(**part) / self.recipe.accumulate
                self.scaler.scale(loss).backward()
            self.loss += loss.detach()
        self.sum += self.loss
        self.count += 1
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.recipe.clip)
        norm = sharding.gathered(norm, keep=True) if self.sharded else norm
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

    def _together(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """The processes average their gradients after the last part of a step only."""
        if self.sharded:
            sharding.sync_gradients(self.objective, last)
        return contextlib.nullcontext() if last or self.parallel is None else self.parallel.no_sync()

    @contextlib.contextmanager
    def _random(self, part: int) -> Iterator[None]:
        """Inside a `with` block, what a part draws without a generator (dropout) is a function of seed, part and rank.

        Outside, the generators of the program are as they were.
        """
        device = self.processes.device
        seed = hashlib.sha256(f"{self.recipe.seed} {part} {self.processes.rank}".encode()).digest()[:8]
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(int.from_bytes(seed, "big") >> 1)
            yield

    def _mean_loss(self) -> float:
        mean = self.processes.mean(self.sum / self.count).item()
        self.sum.zero_()
        self.count = 0
        return mean


def _as_it_is(value: Any, like: Tensor) -> Any:
    return value


def _fast_attention(device: torch.device, positions: int) -> contextlib.AbstractContextManager[None]:
    """On a CPU the backward pass of fused attention is slow; plain attention is faster if its matrix is small."""
    plain = device.type == "cpu" and positions <= FEW_POSITIONS
    return sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext()


def main(train: Callable[[argparse.Namespace, Processes], None], parser: Parser, argv: list[str] | None) -> int:
    """Entry point of the programs: parses options, restores those of a resumed run, sets up processes, calls `train`.

    Returns the exit status.
    """

    def work(args: argparse.Namespace) -> None:
        with processes(args.device) as found:
            try:
                prepared = starting(parser, args, argv, found)
                check_limits(prepared)
                if prepared.threads:
                    torch.set_num_threads(prepared.threads)
                if found.device.type == "cpu":
                    keep_freed_memory()
                train(prepared, found)
                if found.main:
                    finished(prepared.out)
            except (ValueError, ArithmeticError):
                if found.main:
                    raise
                raise SystemExit(1) from None  # all processes find the same, and one says it
            except RuntimeError as error:
                if not lost(error, found):
                    raise
                tqdm.write(f"error: process {found.rank} lost the others: {LOST}", file=sys.stderr)
                raise SystemExit(1) from None

    return run(work, parser, argv, OUT_OF_MEMORY)


def check_limits(args: argparse.Namespace) -> None:
    """Raise ValueError for options out of range that several programs have."""
    for name, low in (("threads", 0), ("workers", 0), ("size", 1)):
        value = getattr(args, name, None)
        if value is not None and value < low:
            raise ValueError(f"--{name} must be at least {low}, got {value}")
