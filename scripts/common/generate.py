"""Generating the images of all prompts: loading with progress, saving each image with its metadata."""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

import sd
from sd.checkpoints.folders import model_name
from sd.checkpoints.hashes import ModelHash
from sd.checkpoints.tiny_loading import load_tiny_vae
from sd.imaging.files import ImageFile
from sd.imaging.previews import LinearDecoder
from sd.imaging.tensors import grid
from sd.models.taesd import TinyVAE
from sd.params import ImageToImage, Inpaint, SamplingParams, TextToImage
from sd.recipes.fields import key, text_of
from sd.recipes.image_text import effective, image_text
from sd.recipes.refiner_switch import BY_STEPS
from sd.request_texts import without_lora_tags
from sd.resources import EMBEDDED, resource
from sd.run import Result, Run
from sd.runtime import kernel_choice
from sd.runtime.device import dtype_name

from . import like
from .adapter_args import AddOns
from .arguments import NICKNAMES, check_previews
from .checks import check_all, check_prompts, warn_of_unknown_words
from .cli import describe, keep_freed_memory, said
from .control_args import Controls
from .default_lora import default_lora
from .enough_memory import check_memory
from .loading import load_model
from .output import Output
from .prompt_loras import PromptLoras
from .prompts import Line, Make, read_prompts
from .user_cache import keep_kernels, keep_weights, recall_kernels
from .xl_args import check_refiner, load_refiner

FRAMES = 100  # at most: of a longer run, some steps are skipped


class Source(NamedTuple):
    """What all requests of a call have in common, but for the prompt and its settings."""

    make: Make
    about: Callable[[TextToImage], Mapping[str, object]] = lambda request: {}  # entries in the metadata
    name: str | None = None  # of the output files, in place of a number


Opener = Callable[[], Source]  # reads the initial image; raises ValueError if that is not possible


def about_init(args: argparse.Namespace, init: ImageFile, request: TextToImage) -> dict[str, object]:
    """The entries about the initial image in the metadata."""
    assert isinstance(request, ImageToImage | Inpaint)
    width, height = request.params.width, request.params.height
    return {
        **({"Generated size": f"{width or 'auto'}x{height or 'auto'}"} if width or height else {}),
        **({"Background": "#{:02x}{:02x}{:02x}".format(*args.background)} if init.alpha is not None else {}),
        "Init image hash": init.digest[:10],
    }


def load(args: argparse.Namespace) -> sd.StableDiffusion:
    """Load the model that the arguments select, with a progress bar."""
    dtype = NICKNAMES.get(args.dtype, args.dtype)
    if args.ckpt is None and args.model not in ("auto", "pocket"):
        raise ValueError(f"--model {args.model} says which model the file is: give the file with --ckpt")
    config = None if args.model == "auto" else sd.MODELS[args.model]
    recall_kernels(args)
    names = ("device", "weights", "prediction", "vae", "text_encoder", "text_encoder_2", "variant")
    options = {name: getattr(args, name) for name in names}
    model = load_model(args, args.ckpt, "loading", config=config, dtype=dtype, **options)
    if model.device.type == "cpu" and not args.low_memory:
        keep_freed_memory()
    return model


def load_previews(args: argparse.Namespace, model: sd.StableDiffusion) -> TinyVAE | None:
    """The tiny autoencoder of --preview-vae, if there is one, which decodes the steps."""
    if args.preview_vae is None:
        return None
    return load_tiny_vae(args.preview_vae, model.config, model.device, model.dtype)


class StepRecorder:
    """Runs the steps with a progress bar, and keeps the x0 predicted in each, for previews."""

    def __init__(self, label: str, run: Run, keep: bool) -> None:
        self._label, self._run, self._keep = label, run, keep
        self._x0: list[torch.Tensor] = []  # of each recorded step

    def take_steps(self) -> None:
        """Take all steps."""
        every = -(-len(self._run) // FRAMES)
        count = len(self._run)
        for step in tqdm(self._run, desc=self._label, unit="step", disable=None, leave=False, file=sys.stderr):
            if self._keep and ((step.i + 1) % every == 0 or step.i + 1 == count):
                self._x0.append(step.x0.cpu())

    def frames(self, i: int, mode: str, vae: TinyVAE | None) -> list[Image.Image]:
        """The steps of the i-th image of the batch, decoded, or mapped to colours linearly (fast and coarse).

        vae   decodes them in place of the model's own
        """
        model, finish, decode = self._run.model, self._run.start.finish, partial(self._run.decode, vae=vae)
        x0 = [step[i : i + 1].to(model.device) for step in self._x0]
        if not x0:
            return []
        linear = LinearDecoder.fit(x0[-1], decode(x0[-1])) if mode == "linear" else None
        bar = tqdm(x0, desc="steps", unit="image", disable=None, leave=False, file=sys.stderr)
        return [finish((decode(z) if linear is None else linear(z))[0]) for z in bar]


@dataclass(frozen=True)
class Metadata:
    """The "parameters" text of images: what all images of one call have in common."""

    args: argparse.Namespace
    model: sd.StableDiffusion
    addons: AddOns
    digest: ModelHash  # of the checkpoint
    more: Mapping[str, object]  # about the initial image and the mask
    refiner: ModelHash | None = None  # of the checkpoint of the refiner, if there is one
    controls: Controls | None = None

    def describe(self, run: Run, result: Result, i: int) -> str:
        """The text of image i of a run. Everything that the pixels depend on is in it: `sd.read_request` reads it."""
        args, digits = self.args, self.digest.digits()
        chosen = args.prediction or args.model != "auto"
        end = {
            **({"Model hash": digits} if digits else {}),
            "Model": model_name(args.ckpt or resource(EMBEDDED)),
            **({"Weights": args.weights} if args.weights != "auto" else {}),
            **({"Variant": args.variant} if args.variant else {}),
            **({"Prediction": self.model.config.schedule.prediction} if chosen else {}),
            **({"VAE": model_name(args.vae)} if args.vae else {}),
            **({"Text encoder": model_name(args.text_encoder)} if args.text_encoder else {}),
            **(self._refiner(run.params) if args.refiner else {}),
            **({"Text encoder 2": model_name(args.text_encoder_2)} if args.text_encoder_2 else {}),
            **self.addons.about(self.model, effective(run)),
            **(self.controls.about() if self.controls else {}),
            "Precision": dtype_name(self.model.dtype),
            "Version": f"sd {sd.__version__}",
        }
        return image_text(run, result, i, self.more, end, self.addons.tags())

    def _refiner(self, params: SamplingParams) -> dict[str, object]:
        """The entries about the refiner, as the web UI writes them."""
        digits = self.refiner.digits() if self.refiner else None
        name = model_name(self.args.refiner) + (f" [{digits}]" if digits else "")
        if params.refiner_from is None:  # a run of no steps
            return {"Refiner": name}
        return {"Refiner": name, key("refiner_from"): text_of(params.refiner_from), BY_STEPS.capitalize(): True}


class Plan(NamedTuple):
    """What is to be done, read and checked before a large model is loaded."""

    params: SamplingParams
    lines: list[Line]
    requests: list[TextToImage]  # of the lines, for the first source
    sources: Iterator[Source]
    total: int  # number of sources
    skipped: list[str]  # sources that cannot be used
    controls: Controls


def generate(args: argparse.Namespace, params: SamplingParams, openers: Sequence[Opener]) -> None:
    """Generate the images of all sources and prompts, and save each batch when it is ready.

    Of several sources, those that cannot be used are skipped with a warning, and a ValueError at the end counts them.
    For exact images, kernels are not chosen by measuring: the choice could be another one in the next run of the
    program.
    """
    check_previews(args)
    controls = Controls(args)
    lines = read_prompts(args.prompt, args.from_file)
    params = replace(params, **like.carried(args, SamplingParams))
    skipped: list[str] = []
    sources = opened(openers, skipped)
    first = next(sources)
    # raises for invalid settings before a large model is loaded
    requests = [line.request(_complete(first.make, args, controls), params, args.spacing) for line in lines]
    loras = PromptLoras(args.lora_dir)
    for line, request in zip(lines, requests, strict=True):
        try:
            loras.look_up(request)
            check_prompts(without_lora_tags(request))
        except ValueError as error:
            raise line.at(error) from None
    check_refiner(args)
    exact = any(request.params.exact for request in requests)
    with kernel_choice.prefer("plain") if exact else contextlib.nullcontext():
        args.offload_text_encoders = check_memory(args, requests, controls)
    args.lora = [*args.lora, *default_lora(args, requests, loras)]
    addons = AddOns(args, requests, loras)
    output = Output(args.out)
    plan = Plan(params, lines, requests, chain([first], sources), len(openers), skipped, controls)
    with kernel_choice.prefer("plain") if exact else contextlib.nullcontext():
        _generate(args, plan, addons, output)


def _generate(args: argparse.Namespace, plan: Plan, addons: AddOns, output: Output) -> None:
    model = load(args)
    file = args.ckpt or resource(EMBEDDED)
    digest = None if args.no_metadata else ModelHash(file)
    print(f"{model.config.name} on {model.device}, {dtype_name(model.dtype)}, first seed {args.seed}", flush=True)
    for text in model.about:
        print(text, flush=True)
    like.compare_model(args, file, digest, model.config)
    plan = plan._replace(requests=like.fitted(args, plan.requests, model.config))
    plan.controls.give(model)
    addons.give(model, hashes=digest is not None)  # first: a few-step LoRA has other default settings
    check_all(model, plan.lines, plan.requests)
    spacings = {request.params.resolved(model.defaults).spacing for request in plan.requests}
    if model.config.schedule.to_noise and spacings - {"trailing", "linspace", "lcm"}:
        warnings.warn(
            "this model starts from pure noise (zero terminal SNR), which this spacing does not give: "
            "--spacing trailing does; --guidance-rescale 0.7 takes back the contrast that guidance adds",
            stacklevel=1,
        )
    hashes = None if args.refiner is None or digest is None else ModelHash(args.refiner)
    metadata = None if digest is None else Metadata(args, model, addons, digest, {}, hashes, plan.controls)

    rounds = args.n_iter * getattr(args, "loopback", 1) * plan.total
    total = rounds * sum(request.params.n for request in plan.requests)
    refiner = load_refiner(args, model)
    if refiner is not None:
        addons.warn_of_refiner(model)
    work = Work(args, model, addons, plan.controls, output, metadata, total, refiner, load_previews(args, model))
    for number, source in enumerate(plan.sources):
        try:
            for line in plan.lines:
                request = line.request(_complete(source.make, args, plan.controls), plan.params, args.spacing)
                if plan.total == 1:
                    like.compare(args, source.about(request))
                work.take(line, request, source)
        except ValueError as error:
            if number == 0:
                raise
            plan.skipped.append(f"{source.name}: {error}")
            warnings.warn(f"skipped: {plan.skipped[-1]}", stacklevel=1)
    if args.grid:
        print(output.save(grid(work.kept, args.columns), kind="-grid"), flush=True)
    keep_kernels(args)
    keep_weights(model)
    if plan.skipped:
        raise ValueError(f"{len(plan.skipped)} of {plan.total} images were skipped; the first: {plan.skipped[0]}")


def opened(openers: Sequence[Opener], skipped: list[str]) -> Iterator[Source]:
    """The sources, one after the other. If there are several, the errors of some are warnings, added to `skipped`."""
    for opener in openers:
        try:
            source = opener()
        except ValueError as error:
            if len(openers) == 1:
                raise
            skipped.append(str(error))
            warnings.warn(f"skipped: {error}", stacklevel=2)
            continue
        yield source
    if len(skipped) == len(openers):
        raise ValueError(f"none of the {len(openers)} images can be used; the first: {skipped[0]}")


def _complete(make: Make, args: argparse.Namespace, controls: Controls) -> Make:
    """With the settings of the command line that all requests have."""
    more = like.carried(args, TextToImage)
    names = ("negative", "prompt_2", "negative_2", "web_ui_prompts", "clip_skip")
    return partial(make, **{name: getattr(args, name) for name in names}, controls=controls.requested, **more)


@dataclass
class Work:
    """Generating and saving; counts the images."""

    args: argparse.Namespace
    model: sd.StableDiffusion
    addons: AddOns
    controls: Controls
    output: Output
    metadata: Metadata | None
    total: int
    refiner: sd.StableDiffusion | None = None  # takes the last steps
    previews: TinyVAE | None = None  # decodes the steps, if it is not the model's own VAE
    done: int = 0
    kept: list[Image.Image] = field(default_factory=list)  # for the grid

    def take(self, line: Line, request: TextToImage, source: Source) -> None:
        """All images of one prompt of a source."""
        said.clear()  # a warning about a prompt is shown once, not for each of its images
        self.addons.of_prompts.merge(self.model, request)
        request = without_lora_tags(request)
        warn_of_unknown_words(self.model, self.args, request)
        rounds, count = getattr(self.args, "loopback", 1), request.params.n * self.args.n_iter
        size = self.args.batch_size if rounds == 1 else 1  # each image of a loop starts from one of its own
        counted = "variation_seed" if request.params.variation_strength > 0 else "seed"
        before = 0 if counted in line.settings else self.done  # a seed of its own starts there
        made = 0
        for first in range(0, count, size):
            current = request
            for number in range(1, rounds + 1):
                batch = request.params.batch(before + made, min(size, count - first))
                about = {**source.about(request), **({"Loopback round": number} if number > 1 else {})}
                try:
                    images = self.batch(replace(current, params=batch), about, source.name)
                except ValueError as error:
                    raise line.at(error) from None
                made += len(images)
                if rounds > 1:
                    current = replace(current, image=images[0])  # type: ignore[call-arg]

    def batch(self, request: TextToImage, about: Mapping[str, object], name: str | None) -> list[Image.Image]:
        """The images of one request, saved."""
        args = self.args
        run = self.model.prepare(request, self.refiner)
        recorder = StepRecorder(f"image {self.done + 1} of {self.total}", run, args.save_steps)
        recorder.take_steps()
        result = run.result()
        for note in result.notes:
            warnings.warn(note, stacklevel=1)
        metadata = replace(self.metadata, more=about) if self.metadata else None
        for i, (image, seed) in enumerate(zip(result.images, result.seeds, strict=True)):
            text = metadata.describe(run, result, i) if metadata else None
            path = self.output.save(image, text, name=name)
            varied = f", variation seed {run.source.variation_seeds[i]}" if run.source.variation_seeds else ""
            print(f"{path}  seed {seed}{varied}", flush=True)
            if i == 0:  # the others have the same maps
                self.controls.save_maps(run, self.output, path, image.size)
            if frames := recorder.frames(i, args.preview, self.previews):
                try:
                    print(self.output.save_steps(frames, path, args.animation), flush=True)
                except OSError as error:  # the other images of the batch are not lost for it
                    warnings.warn(f"the images of the steps are not saved: {describe(error)}", stacklevel=1)
        self.done += len(result.images)
        self.kept += result.images if args.grid else []
        return result.images
