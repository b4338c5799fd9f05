"""How well a model of the painted world obeys: it paints captions of random scenes, and a judge checks what they say.

    python scripts/evaluate.py                                      the embedded model
    python scripts/evaluate.py --ckpt outputs/pocket/model.safetensors --guidance 1 3 5 7.5 --json scores.json
    python scripts/evaluate.py --prompts 0                          the judge alone

Seen prompts are captions of scenes whose combinations of kind, colour and ground occur in training; unseen ones say a
combination that does not. Prompts, seeds and the judge's test pictures are the same on every run.

The judge (evaluation/judge.py) is a network of its own that is trained on the first run and kept in a file. It is
first tested on renderings that it has not seen, as they are and worn in several ways: the last, through the VAE of the
model, is what a perfect U-Net could reach. At the end come the probes of evaluation/probes.py: negative prompts, seeds,
words that do not exist, things that are exchanged and styles that are changed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

if not __package__:  # run as a file: see bootstrap.py
    from bootstrap import PACKAGE

    __package__ = PACKAGE

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sd.files import exists
from sd.imaging.files import save_png
from sd.imaging.tensors import to_pil
from sd.params import SamplingParams
from sd.pipeline import StableDiffusion

from .common import cli, generate
from .evaluation import judge
from .evaluation.probes import PROBES, Painter
from .evaluation.scoring import ATTRIBUTES, Rate, tally, verdict, whole
from .toy_world import Scene, Told, random_scene, tell
from .toy_world.scenes import kept_back

SPLITS = {"seen": "train", "unseen": "unseen"}  # their names in world.scenes
TRUSTED = 0.99  # of each attribute, as rendered: a judge that errs more says little
THROUGH_VAE = 500  # renderings at most; the others are cheap

Rates = dict[str, Rate]


def parser() -> cli.Parser:
    """The arguments."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompts", type=int, default=500, metavar="N", help="of each split; 0 tests the judge (default: %(default)s)")
    add("--split", choices=(*SPLITS, "both"), default="both", help="default: %(default)s")
    add("--guidance", type=float, nargs="+", metavar="G", help="one or more (default: the model's own)")
    add("--sampler", default="ddim", metavar="NAME", help="default: %(default)s")
    add("--steps", type=int, metavar="N", help="default: the sampler's")
    add("--seed", type=int, default=0, metavar="N", help="of the first picture (default: %(default)s)")
    add("--batch-size", type=int, default=16, metavar="N", help="pictures painted at once (default: %(default)s)")
    add("--probes", type=int, default=100, metavar="N", help="prompts of each probe; 0: none (default: %(default)s)")
    add(
        "--judge", type=Path, default=Path("outputs/judge.safetensors"), metavar="FILE",
        help="the judge's weights, made if they are not there (default: %(default)s)",
    )  # fmt: skip
    add("--renderings", type=int, default=2000, metavar="N", help="to test the judge on (default: %(default)s)")
    add("--markdown", type=Path, metavar="FILE", help="write the tables to a file, for a model card")
    add("--json", type=Path, metavar="FILE", help="write all figures to a file")
    add("--wrong", type=Path, metavar="FOLDER", help="write the pictures that are not all right, and what is wrong")
    generate.add_model_arguments(parser)
    return parser


def prompts(split: str, n: int) -> list[Told]:
    """n captions of a split of SPLITS, and what they say; the same on every call."""
    rng = Random(f"evaluate: {split}")
    found: list[Told] = []
    while len(found) < n:
        told = tell(random_scene(rng, SPLITS[split]), rng)
        if split == "seen" or says_unseen(told.said):
            found.append(told)
    return found


def says_unseen(said: Scene) -> bool:
    """Whether the words alone, blanks aside, make a combination that is kept from training."""
    coloured = [thing for thing in said.things if thing.colour and said.ground]
    return any(kept_back(thing.kind, thing.colour, said.ground) for thing in coloured)


def judge_rates(judged_by: judge.Judge, model: StableDiffusion, n: int) -> tuple[dict[str, Rates], float]:
    """The judge's rates on n renderings, as they are and worn; and the PSNR of the model's VAE on them, in dB."""
    pixels, scenes = judge.renderings(n, "judge: test")
    told = [whole(scene) for scene in scenes]
    rates = {}
    for name, wear in WEAR.items():
        seen = [scene for part in pixels.split(250) for scene in judged_by.look(wear(judge.to_floats(part)))]
        rates[name] = tally(told, seen)
    x = judge.to_floats(pixels[:THROUGH_VAE])
    decoded = through_vae(model, x)
    rates["through the VAE"] = tally(told[: len(x)], judged_by.look(decoded))
    error = F.mse_loss(decoded, x, reduction="none").mean((1, 2, 3))
    return rates, (10 * torch.log10(4 / error)).mean().item()  # 4 is the square of the range, 2


def noisy(x: Tensor) -> Tensor:
    """Pictures with noise of 3 % of the range."""
    return x + 0.06 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def through_jpeg(x: Tensor) -> Tensor:
    """Pictures after JPEG of quality 40."""
    return judge.to_tensor([judge.jpeg(picture, 40) for picture in to_pil(x)])


def through_vae(model: StableDiffusion, x: Tensor) -> Tensor:
    """Pictures (N, 3, SIZE, SIZE) in [-1, 1], encoded and decoded."""
    decoded: list[Image.Image] = []
    for one in tqdm(x.split(16), "through the VAE", unit="batch", disable=None, leave=False, file=sys.stderr):
        decoded += model.decode(model.encode(one).mode())
    return judge.to_tensor(decoded)


WEAR: dict[
    str, Callable[[Tensor], Tensor]
] = {  # what is done to pictures (N, 3, SIZE, SIZE) before the judge sees them
    "as rendered": lambda x: x,
    "blur of 1 pixel": lambda x: judge.blurred(x, torch.ones(len(x))),
    "half the pixels": lambda x: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear"),
    "noise of 3 %": noisy,
    "JPEG": through_jpeg,
}


def save_wrong(
    folder: Path, label: str, told: Sequence[Told], pictures: Sequence[Image.Image], seen: Sequence[Scene]
) -> None:
    """Pictures that are not all right, each with its prompt, what is wrong and what the judge saw, in wrong.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "wrong.txt", "a", encoding="utf-8") as index:
        for i, (each, picture, scene) in enumerate(zip(told, pictures, seen, strict=True)):
            wrong = [name for name, right in verdict(each, scene).items() if not all(right) and name != "all"]
            if wrong:
                name = f"{label}-{i:04d}.png"
                save_png(picture, folder / name, each.text)
                things = "; ".join(" ".join(thing) for thing in scene.things)
                print(f"{name}: {each.text} | {', '.join(wrong)} | {' '.join(scene[:3])}: {things}", file=index)


def table(columns: dict[str, Rates], first: str) -> str:
    """Markdown, in columns that are aligned also for reading as it is: a row for each attribute that is mentioned."""
    rows = [[first, *columns]]
    for name in ATTRIBUTES:
        if any(rates[name].of for rates in columns.values()):
            rows.append([name, *(str(rates[name]) for rates in columns.values())])
    rows.append(["pictures", *(str(rates["all"].of) for rates in columns.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def evaluate(args: argparse.Namespace) -> None:
    """Test the judge, paint, judge, and print."""
    check(args)
    model = generate.load(args)
    args.guidance = args.guidance or [model.config.guidance]
    judged_by = judge.find(args.judge, model.device)
    report: list[str] = []
    figures: dict[str, Any] = {"checkpoint": str(args.ckpt or "embedded"), "sampler": args.sampler, "seed": args.seed}

    def say(text: str) -> None:
        print(text, end="\n\n", flush=True)
        report.append(text)

    tests, psnr = judge_rates(judged_by, model, args.renderings)
    say(f"The judge on renderings that it has not seen, all of each said:\n\n{table(tests, 'judge')}")
    say(f"The VAE's reconstructions of them: PSNR {psnr:.1f} dB.")
    figures |= {"judge": tests, "psnr": psnr}
    rendered = tests["as rendered"].items()
    weak = [name for name, rate in rendered if name != "all" and rate.right < TRUSTED * rate.of]
    if weak:
        say(f"This judge errs in more than {100 - 100 * TRUSTED:.0f} % of: {', '.join(weak)}. Train another one.")
    if args.prompts:
        paint = Painter(model, args.sampler, args.steps, args.seed, args.batch_size)
        figures["scores"] = scores = {}
        for split in SPLITS if args.split == "both" else (args.split,):
            told = prompts(split, args.prompts)
            for guidance in args.guidance:
                label = f"{split}, {guidance:g}"
                pictures = paint([each.text for each in told], guidance, label)
                seen = judged_by.look(pictures)
                scores[label] = tally(told, seen)
                if args.wrong:
                    save_wrong(args.wrong, label.replace(", ", "-"), told, pictures, seen)
        say(f"Pictures, by whether the prompt's combination was seen in training, and guidance:\n\n{table(scores, '')}")
    if args.prompts and args.probes:
        for name, probe in PROBES.items():
            text, figures[name] = probe(paint, judged_by, args.guidance[0], prompts("seen", args.probes))
            say(text)
    if args.markdown:
        args.markdown.write_text("\n\n".join(report) + "\n", encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def check(args: argparse.Namespace) -> None:
    """What can be refused before there is any work."""
    least: Iterable[tuple[str, int]] = (("prompts", 0), ("probes", 0), ("batch_size", 1), ("renderings", 1))
    for name, value in least:
        if getattr(args, name) < value:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {value}, got {getattr(args, name)}")
    for guidance in args.guidance or [None]:
        SamplingParams(sampler=args.sampler, steps=args.steps, guidance=guidance, seed=args.seed)
    for file in (args.markdown, args.json, args.wrong):
        if file and file.exists():
            raise exists(file)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run(evaluate, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
