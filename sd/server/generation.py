"""Generating the images of one job, in the thread of its worker."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

from .. import __version__
from ..checkpoints.folders import model_name
from ..pipeline import StableDiffusion
from ..recipes.image_text import effective, image_text
from ..request_texts import all_texts
from ..run import Result, Run
from ..runtime.device import dtype_name
from ..samplers import Step
from ..text.prompt_tags import tag_name
from .jobs import Finished, Job
from .loaded import Loaded

if TYPE_CHECKING:
    from .engine import Setup


class Cancelled(Exception):
    """The client does not want the job any more."""


def generate(
    job: Job, setup: Setup, model: StableDiffusion, loaded: Loaded, after: Callable[[Step], object] = lambda step: None
) -> None:
    """Take the steps of a job and set its `finished`. Raises Cancelled, and whatever is wrong with its request."""
    begun, watcher = time.monotonic(), job.work.watcher
    job.report("running")
    with nullcontext(model) if watcher is None else watcher.watching(model) as model:
        run = model.prepare(job.work.request)
        if watcher is not None:
            watcher.begin(run, loaded)
        result, interrupted = _result(job, run, loaded, after)
    job.finished = Finished(
        result.images,
        result.seeds,
        list(run.source.variation_seeds or ()),
        [_text(run, result, i, setup, loaded) for i in range(len(result.images))],
        result.notes,
        setup.model.title,
        setup.model.hash,
        time.monotonic() - begun,
        interrupted,
        len(model.tokenizer.encode(str(job.work.request.prompt[0]))),
        model.config.vae.factor,
    )


def _result(job: Job, run: Run, loaded: Loaded, after: Callable[[Step], object]) -> tuple[Result, bool]:
    """Take the steps of a job: its result, and whether it was interrupted. Raises Cancelled."""
    work, steps = job.work, len(run)
    for taken, step in enumerate(run, start=1):
        after(step)
        if work.watcher is not None and not job.is_cancelled:
            work.watcher.see(step)
        due = ((work.previews and taken % work.previews == 0) or job.is_preview_wanted) and taken < steps
        job.is_preview_wanted = job.is_preview_wanted and not due
        job.report("running", taken, steps, loaded.previews(run, step) if due and not job.is_cancelled else ())
        if job.is_cancelled:
            raise Cancelled
        if job.is_interrupted and taken < steps:
            images = run.preview(run.start.blend(step.x0))
            return Result(images, run.seeds, list(dict.fromkeys(run.notes))), True
    return run.result(), False


def _text(run: Run, result: Result, i: int, setup: Setup, loaded: Loaded) -> str:
    """The "parameters" of image i: as those of the programs, so that they can be read back."""
    texts = [text for texts in all_texts(effective(run)) for text in texts]
    tokenizer = run.model.tokenizer
    used = {token for text in texts for token in tokenizer.encode(text)} if loaded.words else set()
    words = {
        word: entry.sha256()[:12]
        for entry, names in loaded.words.items()
        for word in names[:1]
        if used & set(tokenizer.added[word])
    }
    end = {
        "Model hash": setup.model.hash,
        "Model": model_name(setup.model.path),
        **({"VAE": setup.vae.name} if setup.vae is not None else {}),
        **_hashes("Lora hashes", {tag_name(entry.name): entry.sha256()[:12] for entry, _ in setup.loras}),
        **_hashes("TI hashes", words),
        **({"Emphasis": "Original", "Pad conds": "True"} if run.request.web_ui_prompts else {}),
        "Precision": dtype_name(run.model.dtype),
        "Version": f"sd {__version__}",
    }
    tags = [f"<lora:{tag_name(entry.name)}:{weight:g}>" for entry, weight in setup.loras]
    return image_text(run, result, i, {}, end, tags)


def _hashes(key: str, found: dict[str, str]) -> dict[str, str]:
    return (
        {key: ", ".join(f"{name.replace(':', '').replace(',', '')}: {digits}" for name, digits in found.items())}
        if found
        else {}
    )
