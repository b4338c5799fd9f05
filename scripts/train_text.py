"""Train a text encoder as CLIP's was: to tell which caption belongs to which picture. Step 2 of 3 of a new model.

    python scripts/train_text.py --vae outputs/vae/vae.safetensors --out outputs/text              the embedded model's
    python scripts/train_text.py --out outputs/text --resume                                       after it was stopped

Beside it a small picture encoder is trained that looks at latents, and is thrown away at the end (Radford et al. 2021,
figure 3). Then the U-Net, which is slow to train, meets words that mean something from its first step on. It is not
needed for fine-tuning: a checkpoint has its text encoder.

Among pictures by lot it is enough to know which things there are. So every other drawn scene is the counterpart of
another one, with the same things in other places, colours or sizes: to tell these apart, order and grammar count.

Writes OUT/text_encoder.safetensors, which train.py takes (--text). Beside it: log.jsonl, loss.png, state.pt.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from pathlib import Path

if not __package__:  # run as a file: see bootstrap.py
    from bootstrap import PACKAGE

    __package__ = PACKAGE

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.checkpoints.detect import CONFIG_KEY
from sd.models.text_encoder import TextEncoder
from sd.pipeline import StableDiffusion
from sd.training import channels_last, checkpoint_activations, contrastive_loss

from .common import cli
from .training import loop, models
from .training.data import World, add_data_arguments, find_source
from .training.latents import Batches, latents
from .training.processes import Processes
from .training.state import save_tensors

RECIPE = loop.Recipe(
    steps=1000, batch=256, lr=2e-3, weight_decay=0.0, beta2=0.99, optimizer="muon", ema=0.99, save_every=250
)
FEATURES = 128  # of a picture and of a text, where they are compared
WIDTHS, GROUPS = (64, 96, 128), 8  # of the picture encoder
HOTTEST = math.log(100)  # similarities are never scaled up more, as in CLIP
END = 49407  # the id of the end token
HELD_OUT = 500  # pictures that success is measured by, at most a tenth of all


def parser() -> cli.Parser:
    """The arguments; the defaults are the recipe of the embedded model."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("outputs/text"), help="folder for all that is written (default: %(default)s)")
    add("--vae", type=Path, metavar="FILE", help="what train_vae.py wrote, or a checkpoint")
    add("--model", metavar="NAME", help="a file with a config in JSON (default: pocket)")
    add("--phrasings", type=int, default=8, help="captions of each drawn scene (default: %(default)s)")
    add_data_arguments(parser, scenes=24000)
    loop.add_loop_arguments(parser, RECIPE)
    parser.set_defaults(ckpt=None)
    return parser


class PictureEncoder(nn.Module):
    """Latents (B, C, h, w) of one size -> features (B, FEATURES)."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, WIDTHS[0], 3, padding=1)]
        for width, wider in zip(WIDTHS, WIDTHS[1:] + WIDTHS[-1:], strict=True):
            stride = 1 if side < 8 else 2
            layers += [nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, wider, 3, stride, 1)]
            side = -(-side // stride)
        layers += [nn.GroupNorm(GROUPS, WIDTHS[-1]), nn.SiLU(), nn.Flatten(), nn.Linear(WIDTHS[-1] * side**2, FEATURES)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Objective(nn.Module):
    """Text encoder and picture encoder with the contrastive loss."""

    def __init__(self, text_encoder: TextEncoder, channels: int, side: int) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.picture_encoder = PictureEncoder(channels, side)
        self.text_projection = nn.Linear(text_encoder.config.width, FEATURES, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def text_features(self, ids: Tensor) -> Tensor:
        """ids (B, M) -> (B, FEATURES): what stands at the first end token, which has seen all of the text.

        What follows only repeats it, and nothing looks ahead: it is left out of the computation.
        """
        end = (ids == END).int().argmax(1)
        hidden = self.text_encoder(ids[:, : int(end.max()) + 1])
        return self.text_projection(hidden[torch.arange(len(ids), device=ids.device), end])

    def forward(self, x0: Tensor, ids: Tensor, **_: Tensor) -> Tensor:
        """x0 (B, C, h, w) and the ids (B, M) of their captions -> a scalar."""
        scale = self.log_scale.clamp(max=HOTTEST).exp()
        return contrastive_loss(self.picture_encoder(x0), self.text_features(ids), scale)


@torch.no_grad()
def told_apart(objective: Objective, data: dict[str, Tensor], model: StableDiffusion) -> float:
    """The share of pictures whose first caption is more like them than like any other of these pictures."""
    pictures, texts = [], []
    for part in torch.arange(len(data["mean"])).split(250):
        pictures.append(objective.picture_encoder(data["mean"][part].to(model.device).float()))
        texts.append(objective.text_features(data["ids"][data["first"][part]].to(model.device).long()))
    similarity = F.normalize(torch.cat(texts), dim=1) @ F.normalize(torch.cat(pictures), dim=1).T
    own = torch.arange(len(similarity), device=similarity.device)
    return (similarity.argmax(1) == own).float().mean().item()


def train(args: argparse.Namespace, processes: Processes) -> None:
    """The whole run."""
    recipe = loop.Recipe.of(args)
    if processes.count > 1:
        raise ValueError("the loss compares all pictures of a batch, so one process trains: start it without torchrun")
    model = models.find_new(args, recipe.seed, processes.device)
    size = args.size or model.config.size
    side, _ = model.latent_shape(size, size)[1:]
    source = find_source(args, size, pairs=True)
    group = 2 if isinstance(source, World) else 1
    if recipe.batch % group or args.scenes % group:
        raise ValueError("--batch and --scenes must be even: drawn scenes come in pairs")
    found = latents(args.out / "cache" / "latents.safetensors", source, model, processes, args.workers)
    n = len(found["mean"])
    kept = min(HELD_OUT, n // 10) // group * group
    seen = found | {name: found[name][: n - kept] for name in ("mean", "std", "first", "count")}
    unseen = found | {
        name: found[name][n - kept if kept else 0 :] for name in ("mean", "first")
    }  # of few, none is spared

    model.text_encoder.requires_grad_(True)
    models.forget_unused(model.text_encoder, torch.cat([found["ids"].long(), model.tokenizer([""])]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        objective = Objective(model.text_encoder, model.config.vae.latent_channels, side)
    channels_last(objective, processes.device)
    if args.checkpointing:
        checkpoint_activations(objective)
    trainer = loop.Trainer(objective, recipe, processes, args)
    batches = Batches(seen, model, recipe, processes, group=group)
    written = args.out / models.TEXT_FILE

    def write() -> str:
        weights = trainer.weights()
        present = copy.deepcopy(objective)
        present.load_state_dict(weights)
        tensors = {name: value.cpu() for name, value in weights.items() if name.startswith("text_encoder.")}
        save_tensors(tensors, written, {CONFIG_KEY: model.config.to_json(), "format": "pt"})
        return (
            f", {100 * told_apart(present, unseen, model):.1f} % of {len(unseen['mean'])} captions find their picture"
        )

    trainer.describe(f"text encoder of {model.config.name}", len(seen["mean"]))
    trainer.run(batches, write, model.config.text.length)
    print(f"{written}: the text encoder, for train.py --text")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return loop.main(train, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
