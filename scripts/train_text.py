"""Train a text encoder like CLIP's, to match captions to images. Step 2 of 3 for a new model.

    python scripts/train_text.py --vae outputs/vae/vae.safetensors --out outputs/text     that of the embedded model
    python scripts/train_text.py --out outputs/text --resume                              continue a stopped run

A small image encoder on latents is trained with it and discarded at the end (Radford et al. 2021, figure 3). The U-Net,
which is slow to train, then has meaningful words from its first step. Fine-tuning does not need this step: a checkpoint
has a text encoder.

To match random images it would be enough to know which things they show. So every second drawn scene is the counterpart
of another, with the same things in other places, colours or sizes: to distinguish these, word order and grammar count.

Writes OUT/text_encoder.safetensors for train.py (--text), train.jsonl, loss.png, state.pt.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from pathlib import Path

if not __package__:  # run as a file: see bootstrap.py
    import bootstrap

    __package__ = bootstrap.PACKAGE

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.checkpoints.detect import CONFIG_KEY
from sd.config import END
from sd.models.text_encoder import TextEncoder
from sd.pipeline import StableDiffusion
from sd.training import channels_last, checkpoint_activations, contrastive_loss

from .common import cli
from .training import loop, models
from .training.batches import Batch, Batches, BatchOptions
from .training.data import World
from .training.dataset import TrainingData
from .training.latents import latents
from .training.options import add_data_arguments, data_options, find_source
from .training.processes import Processes
from .training.state import save_tensors

RECIPE = loop.Recipe(
    steps=1000, batch=256, lr=2e-3, weight_decay=0.0, beta2=0.99, optimizer="muon", ema=0.99, save_every=250
)
FEATURES = 128  # of images and texts, in the shared space
WIDTHS, GROUPS = (64, 96, 128), 8  # of the image encoder
HOTTEST = math.log(100)  # maximum log scale of the similarities, as in CLIP
HELD_OUT = 500  # test images, at most a tenth of all


def parser() -> cli.Parser:
    """The arguments; the defaults are the recipe of the embedded model."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=cli.file_path, default=Path("outputs/text"), help="output folder (default: %(default)s)")
    add("--vae", type=cli.file_path, metavar="FILE", help="file of train_vae.py, or a checkpoint")
    add("--model", metavar="NAME", help="JSON file with a config (default: pocket)")
    add("--phrasings", type=int, default=8, help="captions per drawn scene (default: %(default)s)")
    add_data_arguments(parser, scenes=24000)
    loop.add_loop_arguments(parser, RECIPE)
    parser.set_defaults(ckpt=None)
    return parser


class ImageEncoder(nn.Module):
    """Latents (B, C, h, w) of a fixed size -> features (B, FEATURES)."""

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
    """Text encoder and image encoder with the contrastive loss."""

    def __init__(self, text_encoder: TextEncoder, channels: int, side: int) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.picture_encoder = ImageEncoder(channels, side)
        self.text_projection = nn.Linear(text_encoder.config.width, FEATURES, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def text_features(self, ids: Tensor) -> Tensor:
        """ids (B, M) -> (B, FEATURES): the output at the first end token, which attends to the whole text.

        The later tokens are padding, and attention is causal, so they are left out of the computation.
        """
        end = (ids == END).int().argmax(1)
        hidden = self.text_encoder(ids[:, : int(end.max()) + 1]).hidden
        return self.text_projection(hidden[torch.arange(len(ids), device=ids.device), end])

    def forward(self, batch: Batch) -> Tensor:
        """The loss of the latents and captions of a batch, a scalar."""
        scale = self.log_scale.clamp(max=HOTTEST).exp()
        return contrastive_loss(self.picture_encoder(batch.x0), self.text_features(batch.ids), scale)


@torch.no_grad()
def told_apart(objective: Objective, data: TrainingData, model: StableDiffusion) -> float:
    """The share of first captions whose most similar image is their own."""
    images, texts = [], []
    for start in range(0, len(data), 250):
        part = range(len(data))[start : start + 250]
        images.append(objective.picture_encoder(data.take("mean", part).to(model.device).float()))
        first = data.ids[[data.choices[i][0] for i in part]]
        texts.append(objective.text_features(first.to(model.device).long()))
    similarity = F.normalize(torch.cat(texts), dim=1) @ F.normalize(torch.cat(images), dim=1).T
    own = torch.arange(len(similarity), device=similarity.device)
    return (similarity.argmax(1) == own).float().mean().item()


def train(args: argparse.Namespace, processes: Processes) -> None:
    """Run the training."""
    recipe = loop.Recipe.of(args)
    if processes.count > 1:
        raise ValueError("the loss compares all images of a batch, so only one process can train: do not use torchrun")
    model = models.find_new(args, recipe.seed, processes.device)
    size = args.size or model.config.size
    side, _ = model.latent_shape(size, size)[1:]
    source = find_source(args, data_options(args, model.config), pairs=True)
    group = 2 if isinstance(source, World) else 1
    if recipe.batch % group or args.scenes % group:
        raise ValueError("--batch and --scenes must be even: drawn scenes come in pairs")
    found = latents(args.out / "cache" / "latents.safetensors", source, model, processes, args.workers)
    n = len(found)
    kept = min(HELD_OUT, n // 10) // group * group
    seen = found.subset(range(n - kept))
    unseen = found.subset(range(n - kept if kept else 0, n))  # of few images, none is held out

    model.text_encoder.requires_grad_(True)
    models.forget_unused(model.text_encoder, torch.cat([found.ids.long(), model.tokenizer([""])]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        objective = Objective(model.text_encoder, model.config.vae.latent_channels, side)
    channels_last(objective, processes.device)
    if args.checkpointing:
        checkpoint_activations(objective)
    trainer = loop.Trainer(objective, recipe, processes, args)
    batches = Batches(seen, model, recipe, processes, BatchOptions(group=group))
    written = args.out / models.TEXT_FILE

    def write() -> str:
        weights = trainer.weights()
        present = copy.deepcopy(objective)
        present.load_state_dict(weights)
        tensors = {name: value.cpu() for name, value in weights.items() if name.startswith("text_encoder.")}
        save_tensors(tensors, written, {CONFIG_KEY: model.config.to_json(), "format": "pt"})
        return f", {100 * told_apart(present, unseen, model):.1f} % of {len(unseen)} captions find their image"

    trainer.describe(f"text encoder of {model.config.name}", len(seen))
    trainer.run(batches, write, model.config.text[0].length)
    print(f"{written}: the text encoder, for train.py --text")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return loop.main(train, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
