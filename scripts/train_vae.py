"""Train the VAE of the embedded model on scenes of scripts/world.py. Step 1 of 2; step 2 is train.py.

python scripts/train_vae.py --out outputs/vae
"""

from __future__ import annotations

import argparse
import math
import os
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from random import Random

if not __package__:  # run as a file, from any folder, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sd.config import POCKET
from sd.device import best_dtype
from sd.image import grid, to_pil
from sd.training import learning_rate, vae_loss
from sd.vae import VAE

if __package__:
    from . import cli
    from .world import SIZE, example
else:
    from scripts import cli
    from scripts.world import SIZE, example

HELD_OUT = 10_000_000  # scenes from this number on are never trained on


def parser() -> cli.Parser:
    """The arguments; the defaults are the recipe of the embedded model."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("outputs/vae"), help="folder for state and samples (default: %(default)s)")
    add("--resume", action="store_true", help="go on from the state in --out")
    add("--scenes", type=int, default=6000, help="different scenes (default: %(default)s)")
    add("--steps", type=int, default=2500, help="optimisation steps (default: %(default)s)")
    add("--batch", type=int, default=16, help="crops a step (default: %(default)s)")
    add("--crop", type=int, default=64, help="side of the random crops in pixels (default: %(default)s)")
    add("--full", type=float, default=0.12, help="share of the steps, at the end, on whole pictures")
    add("--lr", type=float, default=1e-3, help="highest learning rate (default: %(default)s)")
    add("--kl", type=float, default=1e-4, help="weight of the KL term (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--threads", type=int, default=0, help="CPU threads; 0 leaves the choice to PyTorch")
    add("--save-every", type=int, default=250, metavar="STEPS", help="default: %(default)s")
    return parser


def pictures(start: int, n: int) -> Tensor:
    """Scenes start .. start + n - 1 as bytes: (n, 3, H, W), uint8."""
    images = [np.asarray(example(i)[1]) for i in tqdm(range(start, start + n), "drawing scenes", leave=False)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def to_floats(images: Tensor) -> Tensor:
    """uint8 -> [-1, 1]."""
    return images.float() / 127.5 - 1


def batch(pool: Tensor, n: int, crop: int, rng: Random) -> Tensor:
    """n random crops (n, 3, crop, crop) in [-1, 1]."""
    crops = []
    for _ in range(n):
        x, y = rng.randint(0, SIZE - crop), rng.randint(0, SIZE - crop)
        crops.append(pool[rng.randrange(len(pool)), :, y : y + crop, x : x + crop])
    return to_floats(torch.stack(crops))


@torch.no_grad()
def evaluate(vae: VAE, images: Tensor) -> tuple[float, Tensor]:
    """Mean PSNR in dB of decoded means, and what was decoded."""
    decoded = torch.cat([vae.decode(vae.encode(part).mode()) for part in images.split(8)]).clamp(-1, 1)
    error = (decoded - images).square().mean((1, 2, 3)) / 4  # values span 2
    return (-10 * error.log10()).mean().item(), decoded


@torch.no_grad()
def measured_scale(vae: VAE, images: Tensor, rng: torch.Generator) -> float:
    """What brings the standard deviation of sampled latents to 1 (Rombach et al. 2022, appendix G)."""
    parts = [vae.encode(part) for part in images.split(8)]
    z = torch.cat([part.sample(torch.randn(part.mean.shape, generator=rng)) for part in parts])
    return vae.config.scale / z.std().item()


def save_state(state: Mapping[str, object], path: Path) -> None:
    """Write a training state whole or not at all: a run that is stopped while it saves keeps the state before.

    `state` holds tensors, numbers, texts, lists and dictionaries only, so `load_state` needs to trust nobody.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        torch.save(dict(state), partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_state(path: Path) -> dict[str, object]:
    """Read what `save_state` wrote. Raises OSError, or ValueError in one line for what is not a training state."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises several kinds, depending on where the file is wrong
        raise ValueError(f"{path}: not a training state: {str(error).partition(chr(10))[0][:200]}") from None


def train(args: argparse.Namespace) -> None:
    """The whole run."""
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed)
    vae = VAE(POCKET.vae)
    optimizer = torch.optim.AdamW(vae.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    start = 0
    if args.resume:
        state = load_state(args.out / "vae.pt")
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]

    held_out = to_floats(pictures(HELD_OUT, 64))
    pool = pictures(0, args.scenes)
    low = best_dtype(torch.device("cpu")) == torch.bfloat16  # where it is fast
    began = time.monotonic()
    bar = tqdm(range(start, args.steps), "training", initial=start, total=args.steps)
    for step in bar:
        choice = Random(args.seed * 1_000_003 + step)  # a run that goes on sees what an unbroken one would
        rng.manual_seed(args.seed * 1_000_003 + step)
        if step < args.steps * (1 - args.full):
            images = batch(pool, args.batch, args.crop, choice)
        else:
            images = batch(pool, max(1, args.batch * args.crop**2 // SIZE**2), SIZE, choice)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, warmup=100)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            mean, logvar = vae.moments(images)
            noise = torch.randn(mean.shape, generator=rng)
            decoded = vae.decoder(vae.post_quant(mean + (0.5 * logvar.float()).exp() * noise))
        loss = vae_loss(images, decoded, mean, logvar, args.kl)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)

        last = step + 1 == args.steps
        if (step + 1) % args.save_every == 0 or last:
            scale = round(measured_scale(vae, held_out, rng), 4)
            psnr, decoded = evaluate(vae, held_out)
            minutes = (time.monotonic() - began) / 60
            tqdm.write(f"step {step + 1}: loss {loss.item():.4f}, PSNR {psnr:.2f} dB, scale {scale}, {minutes:.1f} min")
            both = torch.stack([held_out[:16], decoded[:16]], 1).flatten(0, 1)
            grid(to_pil(both), columns=8).save(args.out / "vae.png")
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            save_state(state | {"scale": scale, "psnr": psnr}, args.out / "vae.pt")
            if not math.isfinite(psnr):
                raise ArithmeticError("training went to NaN: try a lower --lr")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run(train, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
