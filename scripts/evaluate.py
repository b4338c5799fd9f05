"""Evaluate a model of the toy world: generate captions of random scenes, and check the images with a judge network.

    python scripts/evaluate.py                                      the embedded model
    python scripts/evaluate.py --ckpt outputs/pocket/model.safetensors --guidance 1 3 5 7.5 --json scores.json
    python scripts/evaluate.py --prompts 0                          the judge alone
    python scripts/evaluate.py --control edges --prompts 200        a control network
    python scripts/evaluate.py --object hut --write outputs/hut     images of an object that the world lacks, to train
    python scripts/evaluate.py --object hut --lora hut.safetensors  a LoRA of it; or --embedding FILE

Seen prompts describe scenes whose combinations of kind, colour and ground occur in training; unseen prompts contain a
combination that does not. Prompts, seeds and the test images of the judge are the same on every run.

The judge (evaluation/judge.py) is a separate network, which is trained on the first run and kept in a file. It is first
tested on new renderings, original and degraded in several ways. The last degradation, the VAE of the model, shows what
a perfect U-Net could reach. Finally the probes of evaluation/probes.py test negative prompts, seeds, unknown words,
replaced things and changed styles.

With --control it measures instead how well images obey edges, and whether they still obey the prompt: see
evaluation/control.py. With --object it measures whether a model was taught an object: see evaluation/objects.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

if not __package__:  # run as a file: see bootstrap.py
    import bootstrap

    __package__ = bootstrap.PACKAGE

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sd.adapters.added import LoraFile
from sd.files import exists
from sd.imaging.annotate import check_installed
from sd.imaging.files import save_png
from sd.imaging.tensors import to_pil
from sd.params import SamplingParams
from sd.pipeline import StableDiffusion

from .common import arguments, cli, generate
from .common.adapter_args import embedding_file, lora_file
from .evaluation import control, judge, objects
from .evaluation.probes import PROBES, Generator
from .evaluation.scoring import ATTRIBUTES, Rate, tally, verdict, whole
from .toy_world import Scene, Told, random_scene, tell
from .toy_world.scenes import EXTRA, kept_back

SPLITS = {"seen": "train", "unseen": "unseen"}  # name here -> name in toy_world.scenes
TRUSTED = 0.99  # accuracy that each attribute needs on renderings, for the judge to be reliable
JUDGE = "outputs/judge.safetensors"
THROUGH_VAE = 500  # maximum number of renderings; the other degradations are cheap

Rates = dict[str, Rate]


def parser() -> cli.Parser:
    """The arguments."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--prompts", type=int, metavar="N",
        help="per split, with --object also with it; 0: only the judge (default: 500, with --object 100)",
    )  # fmt: skip
    add("--split", choices=(*SPLITS, "both"), default="both", help="default: %(default)s")
    add("--guidance", type=float, nargs="+", metavar="G", help="one or more (default: the model's own)")
    add("--sampler", metavar="NAME", help="default: the model's own; with --object dpmpp_2m")
    add("--steps", type=int, metavar="N", help="default: the model's own, or the sampler's; with --object 20")
    add("--seed", type=int, default=0, metavar="N", help="seed of the first image (default: %(default)s)")
    add("--batch-size", type=int, default=16, metavar="N", help="images per batch (default: %(default)s)")
    add("--probes", type=int, default=100, metavar="N", help="prompts per probe; 0: none (default: %(default)s)")
    add(
        "--judge", type=cli.file_path, metavar="FILE",
        help="weights of the judge, which is trained if the file is missing (default: outputs/judge.safetensors, "
        "with --object outputs/judge-OBJECT.safetensors)",
    )  # fmt: skip
    add("--renderings", type=int, default=2000, metavar="N", help="test images of the judge (default: %(default)s)")
    add("--markdown", type=cli.file_path, metavar="FILE", help="write the tables to a file, for a model card")
    add("--json", type=cli.file_path, metavar="FILE", help="write all figures to a file")
    add(
        "--lora", type=cli.home, action="append", default=[], metavar="[NAME=]FILE[:WEIGHT]",
        help="merge a LoRA, such as one that distill.py wrote; can be given several times; with --object, usual "
        "prompts are measured without and with the last one",
    )  # fmt: skip
    add("--object", choices=tuple(EXTRA), help="how well a model obeys prompts with an object that the world lacks")
    add(
        "--embedding", type=cli.home, action="append", default=[], metavar="FILE[:WORD]",
        help="with --object: add an embedding; can be given several times",
    )  # fmt: skip
    add("--word", help="with --object: what prompts call it (default: its name)")
    add("--write", type=cli.file_path, metavar="FOLDER", help="with --object: only write its training images")
    add(
        "--control", type=cli.home, metavar="FILE",
        help="how well images follow edges: a file that train.py --control wrote, or edges, the embedded network",
    )  # fmt: skip
    add("--wrong", type=cli.file_path, metavar="FOLDER", help="write the images with errors, and a list of the errors")
    arguments.add_model_arguments(parser)
    return parser


def prompts(split: str, n: int) -> list[Told]:
    """n captions of a split of SPLITS with their meaning; the same on every call."""
    rng = Random(f"evaluate: {split}")
    found: list[Told] = []
    while len(found) < n:
        told = tell(random_scene(rng, SPLITS[split]), rng)
        if split == "seen" or says_unseen(told.said):
            found.append(told)
    return found


def says_unseen(said: Scene) -> bool:
    """Whether the words of a caption contain a combination that is excluded from training."""
    coloured = [thing for thing in said.things if thing.colour and said.ground]
    return any(kept_back(thing.kind, thing.colour, said.ground) for thing in coloured)


def judge_rates(judged_by: judge.Judge, model: StableDiffusion, n: int) -> tuple[dict[str, Rates], float]:
    """The accuracy of the judge on n renderings, original and degraded; and the PSNR of the model's VAE, in dB."""
    pixels, scenes = judge.renderings(n, "judge: test", extra=judged_by.extra)
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
    """Add noise of 3 % of the range."""
    return x + 0.06 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def through_jpeg(x: Tensor) -> Tensor:
    """Compress as JPEG of quality 40."""
    return judge.to_tensor([judge.jpeg(image, 40) for image in to_pil(x)])


def through_vae(model: StableDiffusion, x: Tensor) -> Tensor:
    """Encode and decode images (N, 3, SIZE, SIZE) in [-1, 1]."""
    decoded: list[Image.Image] = []
    for one in tqdm(x.split(16), "through the VAE", unit="batch", disable=None, leave=False, file=sys.stderr):
        decoded += model.decode(model.encode(one).mode())
    return judge.to_tensor(decoded)


# degradations of images (N, 3, SIZE, SIZE)
WEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "as rendered": lambda x: x,
    "blur of 1 pixel": lambda x: judge.blurred(x, torch.ones(len(x))),
    "half the pixels": lambda x: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear"),
    "noise of 3 %": noisy,
    "JPEG": through_jpeg,
}


def save_wrong(
    folder: Path, label: str, told: Sequence[Told], images: Sequence[Image.Image], seen: Sequence[Scene]
) -> None:
    """Save images with errors; wrong.txt lists the prompt, the errors and what the judge saw."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "wrong.txt", "a", encoding="utf-8") as index:
        for i, (each, image, scene) in enumerate(zip(told, images, seen, strict=True)):
            wrong = [name for name, right in verdict(each, scene).items() if not all(right) and name != "all"]
            if wrong:
                name = f"{label}-{i:04d}.png"
                save_png(image, folder / name, each.text)
                things = "; ".join(" ".join(thing) for thing in scene.things)
                print(f"{name}: {each.text} | {', '.join(wrong)} | {' '.join(scene[:3])}: {things}", file=index)


def table(columns: dict[str, Rates], first: str) -> str:
    """A Markdown table with aligned columns; one row for each attribute that occurs."""
    rows = [[first, *columns]]
    for name in ATTRIBUTES:
        if any(rates[name].of for rates in columns.values()):
            rows.append([name, *(str(rates[name]) for rates in columns.values())])
    rows.append(["images", *(str(rates["all"].of) for rates in columns.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def evaluate(args: argparse.Namespace) -> None:
    """Test the judge, generate images, judge them, and print the results."""
    check(args)
    if args.write:
        objects.write_examples(args.object, args.write)
        print(f"{args.write}: {objects.IMAGES} images of a {args.object} with captions")
        return
    loras = [lora_file(text) for text in args.lora]
    taught = loras[-1:] if args.object else []  # added later: usual prompts are measured without it first
    words = [embedding_file(text) for text in args.embedding]
    model = generate.load(args)
    model.add_loras(loras[: len(loras) - len(taught)], removable=False, note=lambda text: print(text, flush=True))
    args.guidance = args.guidance or [model.defaults.guidance]
    name = model.add_control(args.control, note=lambda text: print(text, flush=True)) if args.control else ""
    judged_by = judge.find(args.judge, model.device, args.object or "")
    report: list[str] = []
    sampler = args.sampler or (objects.SAMPLER if args.object else model.defaults.sampler)
    figures: dict[str, Any] = {"checkpoint": str(args.ckpt or "embedded"), "sampler": sampler, "seed": args.seed}
    figures |= {"lora": ", ".join(args.lora)} if args.lora else {}

    def say(text: str) -> None:
        print(text, end="\n\n", flush=True)
        report.append(text)

    tests, psnr = judge_rates(judged_by, model, args.renderings)
    say(f"Accuracy of the judge on new renderings, all attributes:\n\n{table(tests, 'judge')}")
    say(f"PSNR of the VAE on these renderings: {psnr:.1f} dB.")
    figures |= {"judge": tests, "psnr": psnr}
    rendered = tests["as rendered"].items()
    weak = [name for name, rate in rendered if name != "all" and rate.right < TRUSTED * rate.of]
    if weak:
        say(f"This judge errs in more than {100 - 100 * TRUSTED:.0f} % of: {', '.join(weak)}. Train another one.")
    if args.control:
        measure_control(args, model, name, judged_by, figures, say)
    elif args.object and args.prompts:
        measure_object(args, model, Taught(taught, words), judged_by, figures, say)
    elif args.prompts:
        generator = Generator(model, sampler, args.steps, args.seed, args.batch_size)
        figures["scores"] = scores = {}
        for split in SPLITS if args.split == "both" else (args.split,):
            told = prompts(split, args.prompts)
            for guidance in args.guidance:
                label = f"{split}, {guidance:g}"
                images = generator([each.text for each in told], guidance, label)
                seen = judged_by.look(images)
                scores[label] = tally(told, seen)
                if args.wrong:
                    save_wrong(args.wrong, label.replace(", ", "-"), told, images, seen)
        say(f"Images by split (combination seen in training or not) and guidance:\n\n{table(scores, '')}")
    if args.prompts and args.probes and not args.control and not args.object:
        for name, probe in PROBES.items():
            text, figures[name] = probe(generator, judged_by, args.guidance[0], prompts("seen", args.probes))
            say(text)
    if args.markdown:
        args.markdown.write_text("\n\n".join(report) + "\n", encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure_control(
    args: argparse.Namespace,
    model: StableDiffusion,
    name: str,
    judged_by: judge.Judge,
    figures: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """Measure a control network, that of this name, on new drawings of each split, and add the figures."""
    figures |= {"control": args.control, "edges": {}, "scores": {}}
    settings = {"steps": args.steps, "sampler": args.sampler, "guidance": args.guidance[0], "seed": args.seed}
    for split in SPLITS if args.split == "both" else (args.split,):
        cases = control.cases(SPLITS[split], args.prompts)
        scores, rates = control.measure(model, name, cases, judged_by, through_vae, **settings)
        figures["edges"][split], figures["scores"][split] = scores, rates
        say(f"Edges of images against their hints, {args.prompts} {split} scenes:\n\n{control.describe(scores)}")
        say(f"Images without and with hints, {split}:\n\n{table(rates, split)}")


class Taught(NamedTuple):
    """What a model is taught an object with: a LoRA or none, and the files of words, each with its word or None."""

    loras: list[LoraFile]
    words: list[tuple[Path, str | None]]

    def add_to(self, model: StableDiffusion) -> None:
        """Add them to a model, for good."""
        model.add_loras(self.loras, removable=False, note=lambda text: print(text, flush=True))
        for path, word in self.words:
            model.add_embedding(path, word)


def measure_object(
    args: argparse.Namespace,
    model: StableDiffusion,
    taught: Taught,
    judged_by: judge.Judge,
    figures: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """Measure prompts with an object, and usual ones without and with the LoRA of it, and add the figures."""
    kind, word = args.object, args.word or args.object
    steps = args.steps or (None if args.sampler else objects.STEPS)
    generator = Generator(model, figures["sampler"], steps, args.seed, args.batch_size)

    def see(told: Sequence[Told], label: str) -> list[Scene]:
        images = generator([each.text for each in told], args.guidance[0], label)
        seen = judged_by.look(images)
        if args.wrong:
            save_wrong(args.wrong, label.replace(" ", "-"), told, images, seen)
        return seen

    usual = [told for split in SPLITS if args.split in (split, "both") for told in prompts(split, args.prompts)]
    before = see(usual, "usual prompts before") if taught.loras else []
    taught.add_to(model)
    if taught.words and word.lower() not in {known.lower() for known in model.words}:
        raise ValueError(f"no embedding has the word {word}: give --word, one of {', '.join(model.words)}")
    asked = objects.prompts(kind, args.prompts, word)
    seen, after = see(asked, f"prompts with {word}"), see(usual, "usual prompts")
    of = objects.with_it(kind, seen)
    say(f"The judge sees the {kind} in {of.right} of {of.of} images of prompts with {word}.")
    columns = {f"with {word}": tally(asked, seen)}
    columns |= {"usual before": tally(usual, before)} if before else {}
    columns |= {"usual": tally(usual, after)}
    say(f"Prompts with {word}, and usual ones:\n\n{table(columns, '')}")
    uncalled = {name: objects.with_it(kind, scenes) for name, scenes in (("before", before), ("after", after))}
    say(f"Usual prompts whose image has a {kind}: {uncalled['after'].right} of {len(usual)}.")
    figures |= {"object": kind, "word": word, "steps": steps, "seen": of, "uncalled": uncalled, "scores": columns}
    if before:
        one, two = (columns[name]["all"].right for name in ("usual before", "usual"))
        figures["points"] = points = 100 * (two - one) / len(usual)
        say(f"Usual prompts of which everything is right: {points:+.1f} points with the LoRA.")


def check(args: argparse.Namespace) -> None:
    """Raise an error for invalid arguments before any work."""
    for name in ("embedding", "word", "write"):
        if getattr(args, name) and not args.object:
            raise ValueError(f"--{name} is for --object")
    if args.write and (args.word or args.embedding or args.lora):
        raise ValueError("--write only writes the training images of --object: no --word, --embedding or --lora")
    if args.object and (args.control or len(args.guidance or ()) > 1):
        raise ValueError("--object takes at most one --guidance, and no --control")
    args.prompts = (100 if args.object else 500) if args.prompts is None else args.prompts
    args.judge = args.judge or Path(f"outputs/judge-{args.object}.safetensors" if args.object else JUDGE)
    least: Iterable[tuple[str, int]] = (("prompts", 0), ("probes", 0), ("batch_size", 1), ("renderings", 1))
    for name, value in least:
        if getattr(args, name) < value:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {value}, got {getattr(args, name)}")
    if args.control and (args.wrong or args.prompts < 2 or len(args.guidance or ()) > 1):
        raise ValueError("--control needs at least two --prompts and at most one --guidance, and no --wrong")
    if args.control:
        check_installed()
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
