"""The control network and the hint of the figures of chapter 12: the embedded model's, or those that are given."""

from __future__ import annotations

import argparse

from tqdm import tqdm

import sd
from sd.control_params import Control
from sd.imaging.files import read_image
from sd.resources import EMBEDDED_CONTROLS, resource

EDGES = "edges"  # the embedded model's control network
HINT, LOG = "data/sample-edges.png", "docs/control-training.json"  # its hint, and the log of its training
NEEDED = "give a control network for this checkpoint with --control FILE, and a hint for it with --hint FILE"


def find_control(args: argparse.Namespace) -> str | None:
    """--control, by default the embedded model's; None for another checkpoint without --control.

    Raises ValueError for a control network without a hint of its kind.
    """
    if args.control is None:
        return EDGES if args.ckpt is None else None
    if args.hint is None and args.control not in EMBEDDED_CONTROLS:
        raise ValueError("--control needs a hint of its kind: give one with --hint FILE")
    return str(args.control)


def load_control(args: argparse.Namespace, model: sd.StableDiffusion) -> Control:
    """Add the control network to the model, and return the hint for it. Raises ValueError without one."""
    control = find_control(args)
    if control is None:
        raise ValueError(NEEDED)
    image = read_image(resource(HINT) if args.hint is None else args.hint).image
    return Control(model.add_control(control, note=tqdm.write), image)
