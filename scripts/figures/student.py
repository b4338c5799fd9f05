"""The few-step model that some figures show beside the ordinary one: the same checkpoint with a few-step LoRA."""

from __future__ import annotations

import argparse

from tqdm import tqdm

import sd
from sd.adapters.added import LoraFile
from sd.few_step import of_config
from sd.resources import EMBEDDED_LORA, resource

from ..common import generate
from ..common.adapter_args import lora_file

NEEDED = "give a few-step LoRA for this checkpoint, such as lcm-lora-sdv1-5.safetensors, with --lora FILE"


def find_lora(args: argparse.Namespace) -> LoraFile | None:
    """The LoRA of --lora, by default that of the embedded model; None for another checkpoint without --lora.

    Raises CheckpointError for a file that is missing or not a weight file, ValueError for a wrong --lora.
    """
    if args.lora is None:
        return LoraFile(resource(EMBEDDED_LORA)) if args.ckpt is None else None
    return lora_file(args.lora)


def load_student(args: argparse.Namespace, teacher: sd.StableDiffusion) -> sd.StableDiffusion:
    """Load the teacher's checkpoint a second time, with the LoRA, and print what the LoRA is.

    Raises ValueError without a LoRA, for one that is not known as a few-step LoRA, and for a teacher of few steps.
    """
    lora = find_lora(args)
    if lora is None:
        raise ValueError(NEEDED)
    if of_config(teacher.config) is not None:
        raise ValueError(f"{teacher.config.name} is already a few-step model: give the ordinary model with --ckpt")
    student = generate.load(args)
    student.config = teacher.config  # with --size
    student.add_loras([lora], removable=False, note=tqdm.write)
    if not student.few_step_loras:
        file = args.lora or lora.path
        raise ValueError(f"{file} is not known as a few-step LoRA: if it is one, write --lora lcm={file}")
    return student
