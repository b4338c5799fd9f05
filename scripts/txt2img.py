"""Pictures of a text.

python scripts/txt2img.py "a red house in the snow"
python scripts/txt2img.py "a photograph of an astronaut riding a horse" --ckpt v1-5-pruned-emaonly.ckpt --n 4 --grid
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

if not __package__:  # run as a file, from any folder, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from sd.image import grid
from sd.pipeline import EMBEDDED, MAX_SEED, StableDiffusion
from sd.resources import resource

if __package__:
    from . import cli
else:
    from scripts import cli


def parser() -> cli.Parser:
    """The arguments; names of the original's scripts work too."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", help="what to paint; may be empty")
    parser.add_argument("--prompt", dest="prompt_option", metavar="TEXT", help="the same as an option")
    parser.add_argument("--negative", "--negative-prompt", default="", metavar="TEXT", help="what to steer away from")
    parser.add_argument(
        "--from-file", type=Path, metavar="FILE", help='one prompt a line, UTF-8; "-" reads standard input'
    )
    cli.add_sampling_arguments(parser)
    cli.add_output_arguments(parser)
    cli.add_model_arguments(parser)
    return parser


def paint(args: argparse.Namespace) -> None:
    """Make the pictures, saving each as soon as it is there."""
    if args.prompt is not None and args.prompt_option is not None:
        raise ValueError("give the prompt once: in its place or with --prompt")
    prompts = cli.read_prompts(args.prompt if args.prompt is not None else args.prompt_option, args.from_file)
    args = cli.checked(args)
    output = cli.Output(args.out)
    model = cli.load(args)
    digest = None if args.no_metadata else cli.ModelHash(args.ckpt or resource(EMBEDDED))
    precision = str(model.dtype).removeprefix("torch.")
    print(f"{model.config.name} on {model.device}, {precision}, first seed {args.seed}", flush=True)

    count = args.n * args.n_iter
    total = count * len(prompts)
    done, kept = 0, []
    for prompt in prompts:
        if args.ckpt is None and (unknown := unknown_words(model, prompt)):
            warnings.warn(
                f"the embedded model does not know: {unknown} (its words: weights/README.md; another model: --ckpt)",
                stacklevel=1,
            )
        for start in range(0, count, args.batch_size):
            seed = (args.seed + done) % (MAX_SEED + 1)
            batch = model.txt2img(
                prompt,
                args.negative,
                height=args.height,
                width=args.width,
                steps=args.steps,
                guidance=args.guidance,
                sampler=args.sampler,
                spacing=args.spacing,
                eta=args.eta,
                seed=seed,
                n=min(args.batch_size, count - start),
                progress=cli.steps_bar(f"picture {done + 1} of {total}"),
            )
            for i, image in enumerate(batch):
                own_seed = (seed + i) % (MAX_SEED + 1)
                path = output.save(image, cli.settings(args, prompt, image, own_seed, precision, digest))
                print(f"{path}  seed {own_seed}", flush=True)
            done += len(batch)
            kept += batch if args.grid else []
    if args.grid:
        print(output.save(grid(kept, args.columns), kind="-grid"), flush=True)


def unknown_words(model: StableDiffusion, prompt: str) -> str:
    """The part of a prompt whose tokens have no vector: words that training never met were set to zero."""
    ids = torch.tensor(
        model.tokenizer.encode(prompt)[: model.config.text.length], device=model.device, dtype=torch.long
    )
    known = model.text_encoder.token(ids).abs().sum(dim=-1) > 0
    return model.tokenizer.decode([i for i, is_known in zip(ids.tolist(), known.tolist(), strict=True) if not is_known])


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run(paint, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
