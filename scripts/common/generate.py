"""Generating the images of all prompts: loading with progress, saving each image with its metadata."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from PIL import Image
from tqdm import tqdm

import sd
from sd.checkpoints.folders import model_name
from sd.imaging.files import ImageFile
from sd.imaging.previews import LinearDecoder
from sd.imaging.tensors import grid
from sd.params import MAX_SEED, ImageToImage, Inpaint, SamplingParams, TextToImage
from sd.pipeline import EMBEDDED
from sd.recipes import describe, written
from sd.resources import resource
from sd.run import Result, Run
from sd.runtime.device import dtype_name
from sd.text.prompt_syntax import chunks

from . import like
from .adapter_args import AddOns
from .arguments import NICKNAMES, read_prompts
from .cli import keep_freed_memory, said
from .output import ModelHash, Output

FRAMES = 100  # at most: of a longer run, some steps are skipped

# builds the request of one prompt: make(prompt, params, negative=..., weighted_prompts=..., long_prompts=...)
Make = Callable[..., TextToImage]


def about_init(args: argparse.Namespace, init: ImageFile) -> dict[str, object]:
    """The entries about the initial image in the metadata."""
    return {
        **({"Generated size": f"{args.width or 'auto'}x{args.height or 'auto'}"} if args.width or args.height else {}),
        **({"Background": "#{:02x}{:02x}{:02x}".format(*args.background)} if init.alpha is not None else {}),
        "Init image hash": init.digest[:10],
    }


def load(args: argparse.Namespace) -> sd.StableDiffusion:
    """Load the model that the arguments select, with a progress bar."""
    dtype = NICKNAMES.get(args.dtype, args.dtype)
    if args.ckpt is None and args.model not in ("auto", "pocket"):
        raise ValueError(f"--model {args.model} says which model the file is: give the file with --ckpt")
    config = None if args.model == "auto" else sd.MODELS[args.model]
    with tqdm(desc="loading", unit=" weights", unit_scale=True, disable=None, leave=False, file=sys.stderr) as bar:

        def progress(numbers: int, total: int) -> None:
            bar.total = total
            bar.update(numbers)

        model = sd.StableDiffusion.load(
            args.ckpt,
            config=config,
            device=args.device,
            dtype=dtype,
            weights=args.weights,
            prediction=args.prediction,
            vae=args.vae,
            text_encoder=args.text_encoder,
            variant=args.variant,
            low_memory=args.low_memory,
            compile=args.compile,
            progress=progress,
        )
    if model.device.type == "cpu" and not args.low_memory:
        keep_freed_memory()
    return model


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

    def frames(self, i: int, mode: str) -> list[Image.Image]:
        """The steps of the i-th image of the batch, decoded, or mapped to colours linearly (fast and coarse)."""
        model, finish = self._run.model, self._run.start.finish
        x0 = [step[i : i + 1].to(model.device) for step in self._x0]
        if not x0:
            return []
        linear = LinearDecoder.fit(x0[-1], model.decode(x0[-1])) if mode == "linear" else None
        bar = tqdm(x0, desc="steps", unit="image", disable=None, leave=False, file=sys.stderr)
        return [finish((model.decode(z) if linear is None else linear(z))[0]) for z in bar]


@dataclass(frozen=True)
class Metadata:
    """The "parameters" text of images: what all images of one call have in common."""

    args: argparse.Namespace
    model: sd.StableDiffusion
    addons: AddOns
    digest: ModelHash  # of the checkpoint
    more: Mapping[str, object]  # about the initial image and the mask

    def describe(self, run: Run, result: Result, i: int) -> str:
        """The text of image i of a run. Everything that the pixels depend on is in it: `sd.read_request` reads it."""
        args, image, seed = self.args, result.images[i], result.seeds[i]
        assert not isinstance(run.request.prompt, torch.Tensor)
        (prompt,) = run.request.prompt
        digits = self.digest.digits()
        negative = run.request.negative if run.params.guidance != 1 else ""  # has no effect at 1
        batch, params = len(result.images), replace(run.params, seed=seed)
        if params.variation_strength > 0 and params.rng != "comfy":  # image k has variation_seed + k
            params = replace(params, variation_seed=((params.variation_seed or 0) + i) % (MAX_SEED + 1))
        size = image.size
        if not isinstance(run.request, ImageToImage | Inpaint):  # what comes after sampling may enlarge the image
            _, h, w = self.model.latent_shape(run.params.height, run.params.width)
            size = (w * self.model.config.vae.factor, h * self.model.config.vae.factor)
        values = {
            **describe(run.request, params, size),
            **({"Batch size": batch, "Batch pos": i} if batch > 1 else {}),
            **self.more,
            **({"Model hash": digits} if digits else {}),
            "Model": model_name(args.ckpt) if args.ckpt else "pocket",
            **({"Weights": args.weights} if args.weights != "auto" else {}),
            **({"Prediction": args.prediction} if args.prediction else {}),
            **({"VAE": model_name(args.vae)} if args.vae else {}),
            **({"Text encoder": model_name(args.text_encoder)} if args.text_encoder else {}),
            **self.addons.about(self.model, prompt, negative),
            "Precision": dtype_name(self.model.dtype),
            "Version": f"sd {sd.__version__}",
        }
        return written(self.addons.prompt(prompt), negative, values)


def generate(
    args: argparse.Namespace, params: SamplingParams, make: Make, more: Mapping[str, object] | None = None
) -> None:
    """Generate the images of all prompts, and save each batch when it is ready; `more` is added to their metadata."""
    prompts = read_prompts(args.prompt, args.from_file)
    params = replace(params, **like.carried(args, SamplingParams))
    make = partial(make, **like.carried(args, TextToImage))
    make = partial(make, negative=args.negative, weighted_prompts=args.weighted_prompts, long_prompts=args.long_prompts)
    for prompt in prompts:
        make(prompt, params)  # raises for invalid settings before a large model is loaded
    addons = AddOns(args, prompts)
    output = Output(args.out)
    model = load(args)
    file = args.ckpt or resource(EMBEDDED)
    digest = None if args.no_metadata else ModelHash(file)
    print(f"{model.config.name} on {model.device}, {dtype_name(model.dtype)}, first seed {args.seed}", flush=True)
    for line in model.about:
        print(line, flush=True)
    like.compare(args, more or {})
    like.compare_model(args, file, digest)
    if model.config.schedule.to_noise and params.resolved(model.config).spacing not in ("trailing", "linspace"):
        warnings.warn(
            "this model is trained to start from pure noise (zero terminal SNR), and this grid does not: "
            "--spacing trailing does",
            stacklevel=1,
        )
    addons.give(model, hashes=digest is not None)
    metadata = None if digest is None else Metadata(args, model, addons, digest, more or {})

    count = args.n * args.n_iter
    total = count * len(prompts)
    done, kept = 0, list[Image.Image]()
    for prompt in prompts:
        said.clear()  # a warning about a prompt is shown once, not for each of its images
        warn_of_unknown_words(model, args, prompt)
        for first in range(0, count, args.batch_size):
            seed = (args.seed + done) % (MAX_SEED + 1)
            batch = replace(params, seed=seed, n=min(args.batch_size, count - first))
            run = model.prepare(make(prompt, batch))
            recorder = StepRecorder(f"image {done + 1} of {total}", run, args.save_steps)
            recorder.take_steps()
            result = run.result()
            for note in result.notes:
                warnings.warn(note, stacklevel=1)
            for i, (image, own_seed) in enumerate(zip(result.images, result.seeds, strict=True)):
                path = output.save(image, metadata.describe(run, result, i) if metadata else None)
                print(f"{path}  seed {own_seed}", flush=True)
                if frames := recorder.frames(i, args.preview):
                    print(output.save_steps(frames, path, args.animation), flush=True)
            done += len(result.images)
            kept += result.images if args.grid else []
    if args.grid:
        print(output.save(grid(kept, args.columns), kind="-grid"), flush=True)


def warn_of_unknown_words(model: sd.StableDiffusion, args: argparse.Namespace, prompt: str) -> None:
    """Warn if tokens of a prompt have no vector: those of words that never occurred in training were set to zero."""
    found = chunks(model.tokenizer, prompt, args.weighted_prompts, args.long_prompts)
    ids = torch.tensor([i for chunk in found for i in chunk.ids], device=model.device, dtype=torch.long)
    missing = model.text_encoder.token(ids).abs().sum(dim=-1) == 0
    if unknown := model.tokenizer.decode(ids[missing].tolist()):
        who = "this model" if args.ckpt else "the embedded model"
        hint = "" if args.ckpt else " (its words: weights/README.md; another model: --ckpt)"
        warnings.warn(f"{who} does not know: {unknown}{hint}", stacklevel=1)
