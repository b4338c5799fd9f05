"""Train a VAE from scratch, or fine-tune that of a checkpoint. Step 1 of 3 for a new model; step 2 is train_text.py.

    python scripts/train_vae.py --out outputs/vae                                       that of the embedded model
    python scripts/train_vae.py --data photos --ckpt v1-5.ckpt --decoder-only --lr 1e-5 --out outputs/vae
    python scripts/train_vae.py --out outputs/vae --resume                              continue a stopped run

Writes OUT/vae.safetensors for train.py (--vae), with the scale that gives latents standard deviation 1; for a
checkpoint also OUT/model.safetensors, the whole model with this VAE, which every program loads.
Also writes train.jsonl, loss.png, vae.png (held-out images, each beside its reconstruction), state.pt.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

if not __package__:  # run as a file: see bootstrap.py
    import bootstrap

    __package__ = bootstrap.PACKAGE

import torch
from torch import Tensor, nn

from sd.checkpoints.detect import CONFIG_KEY
from sd.config import Config, VAEConfig
from sd.files import replaced_file
from sd.imaging.tensors import grid, to_pil
from sd.models.vae import VAE
from sd.training import channels_last, checkpoint_activations, initialise_vae, vae_loss

from .common import cli
from .training import data, loop, models
from .training.epochs import Order
from .training.options import add_data_arguments, data_options, find_source
from .training.processes import Processes
from .training.state import save_tensors

KL = 5e-5  # small beside squared errors of about 0.005; latents then have a standard deviation of about 0.3
HELD_OUT = 10_000_000  # scenes from this number on are never used for training
SHOWN = 16  # held-out images in vae.png
RECIPE = loop.Recipe(
    steps=10000, batch=2, lr=1.5e-3, weight_decay=0.0, beta2=0.99, optimizer="muon", ema=0.998, log_every=50
)
FINE_TUNING = loop.Recipe(steps=1000, batch=4, lr=1e-5, save_every=250)


def parser() -> cli.Parser:
    """The arguments; the defaults are the recipe of the embedded model."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=cli.file_path, default=Path("outputs/vae"), help="output folder (default: %(default)s)")
    add("--crop", type=int, metavar="PIXELS", help="train on random crops of this side (default: whole images)")
    add("--kl", type=float, default=KL, help="weight of the KL term (default: %(default)s)")
    add("--held-out", type=int, default=64, metavar="N", help="number of test images (default: %(default)s)")
    add("--decoder-only", action="store_true", help="keep the encoder, so that the latents stay the same")
    models.add_model_arguments(parser)
    add_data_arguments(parser, scenes=16000)
    loop.add_loop_arguments(parser, RECIPE, with_ckpt=FINE_TUNING)
    return parser


class Objective(nn.Module):
    """The VAE with its loss."""

    def __init__(self, vae: VAE, kl_weight: float, decoder_only: bool) -> None:
        super().__init__()
        self.vae, self.kl_weight = vae, kl_weight
        vae.requires_grad_(True)
        if decoder_only:
            vae.encoder.requires_grad_(False)
            vae.quant.requires_grad_(False)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1], noise (B, C, h, w) -> a scalar."""
        mean, logvar = self.vae.moments(images)
        z = mean + (0.5 * logvar.float()).exp() * noise
        return vae_loss(images, self.vae.decoder(self.vae.post_quant(z)), mean, logvar, self.kl_weight)


class Crops:
    """The parts of each step: random crops of the images (n, 3, H, W), uint8, and noise for their latents."""

    def __init__(
        self,
        images: Tensor,
        config: Config,
        recipe: loop.Recipe,
        processes: Processes,
        crop: int,
    ) -> None:
        self.images, self.recipe, self.processes, self.crop = images, recipe, processes, crop
        self.channels, self.factor = config.vae.latent_channels, config.vae.factor
        self.order = Order(len(images), recipe.seed)

    def __call__(self, step: int) -> Iterator[dict[str, Tensor]]:
        """The parts of a step for this process, as arguments of the objective."""
        side, crop, batch = self.images.shape[-1], self.crop, self.recipe.batch
        device, count = self.processes.device, self.processes.count
        total = batch * self.recipe.accumulate * count
        rng = data.generator(device, self.recipe.seed, "step", step)
        shape = (total, self.channels, crop // self.factor, crop // self.factor)
        noise = torch.randn(shape, generator=rng, device=device)
        rng = data.generator("cpu", self.recipe.seed, "crop", step)
        left, top = torch.randint(0, side - crop + 1, (2, total), generator=rng)
        where = (self.order(step * total, total), left, top)
        chosen, left, top = (x.to(self.images.device, non_blocking=True) for x in where)
        pixels = torch.arange(crop, device=self.images.device)
        for k in range(self.recipe.accumulate):
            start = (k * count + self.processes.rank) * batch
            mine = slice(start, start + batch)
            rows, columns = top[mine, None, None] + pixels[:, None], left[mine, None, None] + pixels
            images = self.images[chosen[mine, None, None], :, rows, columns]  # (B, crop, crop, 3)
            images = images.to(device, non_blocking=True).permute(0, 3, 1, 2)
            yield {"images": data.to_floats(images), "noise": noise[mine]}


@torch.no_grad()
def evaluate(vae: VAE, images: Tensor) -> tuple[float, Tensor]:
    """Mean PSNR in dB of the reconstructions of images (n, 3, H, W) in [-1, 1], and the reconstructions."""
    decoded = torch.cat([vae.decode(vae.encode(part).mode()) for part in images.split(8)]).clamp(-1, 1)
    error = (decoded - images).square().mean((1, 2, 3)) / 4  # values span 2
    return (-10 * error.clamp(min=1e-10).log10()).mean().item(), decoded


@torch.no_grad()
def measured_scale(vae: VAE, images: Tensor) -> float:
    """The scale that gives sampled latents standard deviation 1 (Rombach et al. 2022, appendix G)."""
    rng = data.generator(images.device, 0, "scale")
    parts = [vae.encode(part) for part in images.split(8)]
    noise = [torch.randn(part.mean.shape, generator=rng, device=images.device) for part in parts]
    z = torch.cat([part.sample(eps) for part, eps in zip(parts, noise, strict=True)])
    return vae.config.scale / z.std().item()


def read(source: data.Source, args: argparse.Namespace) -> Tensor:
    """All images, (n, 3, size, size), uint8."""
    chunks = data.examples(source, args.workers, progress=True)
    return torch.cat([data.pixels(chunk) for _, chunk in chunks])


def load_images(args: argparse.Namespace, config: Config, processes: Processes) -> tuple[Tensor, Tensor]:
    """The training images and the held-out test images, (n, 3, size, size), uint8."""
    options = data_options(args, config, caption="")
    source, size = find_source(args, options), options.size
    held_out = data.World(args.held_out, size, first=HELD_OUT) if isinstance(source, data.World) else None
    found = data.cached(
        args.out / "cache" / "pictures.safetensors",
        data.fingerprint(source),
        processes,
        lambda: {"pixels": read(source, args)},
    )["pixels"]
    if held_out is not None:
        return found, read(held_out, args)
    n = min(args.held_out, len(found) // 10)  # of fewer than 10 images none is held out: training images are tested
    mixed = torch.randperm(len(found), generator=data.generator("cpu", 0, "held out"))
    return (found[mixed[n:]], found[mixed[:n]]) if n else (found, found[: args.held_out])


def train(args: argparse.Namespace, processes: Processes) -> None:
    """Run the training."""
    recipe = loop.Recipe.of(args)
    if args.held_out < 1:
        raise ValueError(f"--held-out must be at least 1, got {args.held_out}")
    device = processes.device
    if args.ckpt:
        config, vae = models.load_vae(args.ckpt, device, args.model)
    else:
        config = models.find_config(args.model or "pocket")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            assert isinstance(config.vae, VAEConfig)
            vae = VAE(config.vae)
            initialise_vae(vae)
            vae.to(device)
    size = args.size or config.size
    crop = args.crop or size
    for name, side in (("size", size), ("crop", crop)):
        if side < 1 or side % config.vae.factor or side > size:
            raise ValueError(f"--{name} must be a multiple of {config.vae.factor} up to the image size, got {side}")
    images, held_out = load_images(args, config, processes)
    held_out = data.to_floats(held_out.to(device))
    if args.checkpointing:
        checkpoint_activations(vae)
    objective = channels_last(Objective(vae, args.kl, args.decoder_only), device)
    if args.compile:
        vae.encoder.compile()
        vae.decoder.compile()
    trainer = loop.Trainer(objective, recipe, processes, args)
    trained = sum(p.numel() for p in trainer.trained.values())
    images = models.fitting({"images": images}, device, trained)["images"]
    crops = Crops(images, config, recipe, processes, crop)

    def write() -> str:
        present = models.with_weights(vae, trainer.weights(), "vae.")
        psnr, decoded = evaluate(present, held_out)
        assert isinstance(config.vae, VAEConfig)
        scale = config.vae.scale if args.decoder_only else round(measured_scale(present, held_out), 4)
        both = torch.stack([held_out[:SHOWN], decoded[:SHOWN]], 1).flatten(0, 1)
        with replaced_file(args.out / "vae.png") as partial:
            grid(to_pil(both), columns=8).save(partial, "PNG")
        tensors = {f"vae.{key}": value.cpu() for key, value in present.state_dict().items()}
        written = replace(config, vae=replace(config.vae, scale=scale))
        path = args.out / models.VAE_FILE
        save_tensors(tensors, path, {CONFIG_KEY: written.to_json(), "format": "pt"})
        return f", PSNR {psnr:.2f} dB on {len(held_out)} images, scale {scale}"

    trainer.describe(f"VAE of {config.name}", len(images))
    trainer.run(crops, write, (crop // config.vae.factor) ** 2)
    if processes.main:
        print(f"{args.out / models.VAE_FILE}: the VAE, for train.py --vae")
        if args.ckpt:
            whole = models.whole_model(args.ckpt, args.model)
            if whole is not None:
                path = args.out / "model.safetensors"
                models.write_model(models.with_vae(whole, args.out / models.VAE_FILE), path, torch.float16)
                print(f"{path}: {args.ckpt.name} with it")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return loop.main(train, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
