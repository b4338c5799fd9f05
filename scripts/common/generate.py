"""Generating the images of all prompts: loading with progress, saving each image with its metadata."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from tqdm import tqdm

import sd
from sd.checkpoints.folders import model_name
from sd.imaging.files import ImageFile, parameters
from sd.imaging.previews import LinearDecoder
from sd.imaging.tensors import grid
from sd.params import POSTERIORS, SamplingParams, TextToImage
from sd.pipeline import EMBEDDED
from sd.resources import resource
from sd.run import Run
from sd.runtime.device import dtype_name
from sd.samplers import SAMPLERS
from sd.text.prompt_syntax import check_prompt, chunks, texts_of

from .adapter_args import AddOns
from .arguments import NICKNAMES, read_prompts
from .cli import keep_freed_memory, said
from .output import ModelHash, Output

FRAMES = 100  # at most: of a longer run, some steps are skipped

# builds the request of one prompt: make(prompt, params, negative=..., web_ui_prompts=..., clip_skip=...)
Make = Callable[..., TextToImage]


def about_init(args: argparse.Namespace, init: ImageFile) -> dict[str, object]:
    """The entries about the initial image in the metadata."""
    return {
        "Denoising strength": f"{args.strength:g}",
        **({"Posterior": args.posterior} if args.posterior != POSTERIORS[0] else {}),
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
        model, finish, decode = self._run.model, self._run.start.finish, self._run.decode
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

    def describe(self, run: Run, image: Image.Image, seed: int) -> str:
        """The text of one image of a run."""
        args, params = self.args, run.params
        assert not isinstance(run.request.prompt, torch.Tensor)
        (prompt,) = run.request.prompt
        digits = self.digest.digits()
        negative = args.negative if params.guidance != 1 else ""  # has no effect at 1
        values = {
            "Steps": params.steps,
            "Sampler": SAMPLERS[params.sampler].label,
            "Schedule type": params.spacing.capitalize(),
            "CFG scale": f"{params.guidance:g}",
            "Seed": seed,
            "Size": f"{image.width}x{image.height}",
            **self.more,
            **{name.capitalize(): f"{value:g}" for name, value in params.options.items()},
            **({"Model hash": digits} if digits else {}),
            "Model": model_name(args.ckpt) if args.ckpt else "pocket",
            **({"Weights": args.weights} if args.weights != "auto" else {}),
            **({"VAE": model_name(args.vae)} if args.vae else {}),
            **self.addons.about(self.model, prompt, negative),
            "Precision": dtype_name(self.model.dtype),
            "Version": f"sd {sd.__version__}",
        }
        return parameters(self.addons.prompt(prompt), negative, values)


def generate(
    args: argparse.Namespace, params: SamplingParams, make: Make, more: Mapping[str, object] | None = None
) -> None:
    """Generate the images of all prompts, and save each batch when it is ready; `more` is added to their metadata."""
    prompts = read_prompts(args.prompt, args.from_file)
    addons = AddOns(args, prompts)
    text = addons.of_prompts.text  # of a prompt without what names a LoRA file
    make = partial(make, negative=text(args.negative), web_ui_prompts=args.web_ui_prompts, clip_skip=args.clip_skip)
    for prompt in prompts:
        make(text(prompt), params)  # raises for invalid settings before a large model is loaded
    if args.web_ui_prompts:
        for prompt in (*prompts, args.negative):
            check_prompt(text(prompt))
    output = Output(args.out)
    model = load(args)
    digest = None if args.no_metadata else ModelHash(args.ckpt or resource(EMBEDDED))
    print(f"{model.config.name} on {model.device}, {dtype_name(model.dtype)}, first seed {args.seed}", flush=True)
    for line in model.about:
        print(line, flush=True)
    if model.config.schedule.to_noise and params.resolved(model.config).spacing not in ("trailing", "linspace"):
        warnings.warn(
            "this model is trained to start from pure noise (zero terminal SNR), and this grid does not: "
            "--spacing trailing does; --guidance-rescale 0.7 takes back the contrast that guidance adds",
            stacklevel=1,
        )
    addons.give(model, hashes=digest is not None)
    metadata = None if digest is None else Metadata(args, model, addons, digest, more or {})

    count = args.n * args.n_iter
    total = count * len(prompts)
    done, kept = 0, list[Image.Image]()
    for prompt in prompts:
        said.clear()  # a warning about a prompt is shown once, not for each of its images
        addons.of_prompts.merge(model, prompt)
        warn_of_unknown_words(model, args, text(prompt))
        for first in range(0, count, args.batch_size):
            batch = params.batch(done, min(args.batch_size, count - first))
            run = model.prepare(make(text(prompt), batch))
            recorder = StepRecorder(f"image {done + 1} of {total}", run, args.save_steps)
            recorder.take_steps()
            result = run.result()
            for note in result.notes:
                warnings.warn(note, stacklevel=1)
            for i, (image, own_seed) in enumerate(zip(result.images, result.seeds, strict=True)):
                path = output.save(image, metadata.describe(run, image, own_seed) if metadata else None)
                varied = f", variation seed {run.source.variation_seeds[i]}" if run.source.variation_seeds else ""
                print(f"{path}  seed {own_seed}{varied}", flush=True)
                if frames := recorder.frames(i, args.preview):
                    print(output.save_steps(frames, path, args.animation), flush=True)
            done += len(result.images)
            kept += result.images if args.grid else []
    if args.grid:
        print(output.save(grid(kept, args.columns), kind="-grid"), flush=True)


def warn_of_unknown_words(model: sd.StableDiffusion, args: argparse.Namespace, prompt: str) -> None:
    """Warn if tokens of a prompt have no vector: those of words that never occurred in training were set to zero."""
    if args.web_ui_prompts:
        read = [i for text in texts_of(prompt) for chunk in chunks(model.tokenizer, text) for i in chunk.ids]
    else:
        read = model.tokenizer.encode(prompt)[: model.tokenizer.length - 2]
    ids = torch.tensor(read, device=model.device, dtype=torch.long)
    missing = model.text_encoder.token(ids).abs().sum(dim=-1) == 0
    if unknown := model.tokenizer.decode(ids[missing].tolist()):
        who = "this model" if args.ckpt else "the embedded model"
        hint = "" if args.ckpt else " (its words: weights/README.md; another model: --ckpt)"
        warnings.warn(f"{who} does not know: {unknown}{hint}", stacklevel=1)
