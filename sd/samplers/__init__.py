"""Samplers: from noise to data, as generators over a denoiser. This file is their registry.

    for step in ddim(denoise, x, levels):
        ...                                  step.x is the state, step.x0 the data predicted in this step

    step.py          what all samplers share, and the notation of their equations: read it first
    ddim.py          DDPM, DDIM
    multistep.py     PLMS, LMS
    karras.py        Euler, Heun, DPM2, and the ancestral Euler a, DPM2 a
    dpm_solver.py    DPM++ 2S a, SDE, 2M, 2M SDE, and UniPC
    consistency.py   LCM and TCD, for distilled models

To add a sampler, write such a generator (it takes `noise`, even if it draws none), import it here and add an entry to
`SAMPLERS`, and to `ALIASES` if other tools have another name for it: the command line, the Python API and the metadata
of images read its name, options and defaults from there. An option whose default is an int takes whole numbers. If a
sampler draws no noise where an option is 0, name that option in `AMOUNTS`: see `Sampler.draws`.

>>> import torch
>>> from sd.schedule import Schedule
>>> truth = torch.ones(1, 4, 8, 8)
>>> for step in ddim(lambda x, level: truth, torch.randn(1, 4, 8, 8), Schedule().levels(10, "trailing")):
...     pass
>>> torch.allclose(step.x, truth)  # if the denoiser knows x0, the sampler ends there
True
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from ..schedule import SPACINGS
from .consistency import lcm, tcd
from .ddim import ddim, ddpm, posterior
from .dpm_solver import dpmpp_2m, dpmpp_2m_sde, dpmpp_2s_a, dpmpp_sde, unipc
from .karras import ancestral, dpm2, dpm2_a, euler, euler_a, heun
from .multistep import ADAMS_BASHFORTH, lms, multistep_weights, plms
from .step import Denoise, Noise, Step, eps_of, move

__all__ = [
    "ADAMS_BASHFORTH", "ALIASES", "SAMPLERS", "Denoise", "Noise", "Option", "Sampler", "Step", "ancestral", "ddim",
    "ddpm", "dpm2", "dpm2_a", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s_a", "dpmpp_sde", "eps_of", "euler", "euler_a",
    "find_sampler", "heun", "lcm", "lms", "move", "multistep_weights", "plms", "posterior", "sampler_key", "spacing_in",
    "tcd", "unipc",
]  # fmt: skip


class Option(NamedTuple):
    """A setting of some samplers only: its default, range and help text."""

    default: float  # if it is an int, the option takes whole numbers
    low: float
    high: float
    help: str


AMOUNTS = ("eta", "gamma")  # options that are amounts of fresh noise: at 0 their samplers draw none


class Sampler(NamedTuple):
    """A sampler and its description, from which --help and the table in docs are generated."""

    label: str  # the name shown to people and in the metadata of images
    run: Callable[..., Iterator[Step]]  # (denoise, x, levels, *, noise, **options), for all samplers
    paper: str
    order: int
    evaluations: int  # of the network per step
    stochastic: bool  # whether it draws noise, if its options have their defaults
    spacing: str  # default, one of SPACINGS
    steps: int  # default number of steps
    options: Mapping[str, Option] = MappingProxyType({})  # keyword arguments of `run`

    def draws(self, options: Mapping[str, float] = MappingProxyType({})) -> bool:
        """Whether a run with these options draws noise."""
        amounts = [options.get(name, option.default) for name, option in self.options.items() if name in AMOUNTS]
        return max(amounts) > 0 if amounts else self.stochastic


ETA = Option(0.0, 0.0, 1.0, "amount of fresh noise in each step, from 0 (none) to 1 (as much as DDPM)")
GAMMA = Option(0.3, 0.0, 1.0, "share of fresh noise in each step, from 0 (none) to 1 (all)")
ORDER = Option(4, 1, 4, "number of previous steps that it extrapolates from")

HO, LIU, KARRAS = "Ho et al. 2020", "Liu et al. 2022", "Karras et al. 2022"
LU_A, LU_B, CROWSON = "Lu et al. 2022a", "Lu et al. 2022b", "k-diffusion"
SAMPLERS = {
    "ddim": Sampler("DDIM", ddim, "Song et al. 2021", 1, 1, False, "leading", 50, MappingProxyType({"eta": ETA})),
    "ddpm": Sampler("DDPM", ddpm, HO, 1, 1, True, "leading", 1000),
    "plms": Sampler("PLMS", plms, LIU, 4, 1, False, "leading", 50),
    "lms": Sampler("LMS", lms, CROWSON, 4, 1, False, "linspace", 50, MappingProxyType({"order": ORDER})),
    "euler": Sampler("Euler", euler, KARRAS, 1, 1, False, "linspace", 30),
    "euler_a": Sampler("Euler a", euler_a, CROWSON, 1, 1, True, "linspace", 30),
    "heun": Sampler("Heun", heun, KARRAS, 2, 2, False, "linspace", 20),
    "dpm2": Sampler("DPM2", dpm2, LU_A, 2, 2, False, "karras", 20),
    "dpm2_a": Sampler("DPM2 a", dpm2_a, LU_A, 1, 2, True, "karras", 20),
    "dpmpp_2s_a": Sampler("DPM++ 2S a", dpmpp_2s_a, LU_B, 1, 2, True, "karras", 20),
    "dpmpp_2m": Sampler("DPM++ 2M", dpmpp_2m, LU_B, 2, 1, False, "karras", 25),
    "dpmpp_sde": Sampler("DPM++ SDE", dpmpp_sde, LU_B, 1, 2, True, "karras", 20),
    "dpmpp_2m_sde": Sampler("DPM++ 2M SDE", dpmpp_2m_sde, LU_B, 1, 1, True, "karras", 25),
    "unipc": Sampler("UniPC", unipc, "Zhao et al. 2023", 3, 1, False, "karras", 30),
    "lcm": Sampler("LCM", lcm, "Luo et al. 2023", 1, 1, True, "lcm", 4),
    "tcd": Sampler("TCD", tcd, "Zheng et al. 2024", 1, 1, True, "lcm", 4, MappingProxyType({"gamma": GAMMA})),
}

# names in the original's scripts, k-diffusion, A1111, ComfyUI and SD.Next, and diffusers' classes without "Scheduler"
ALIASES = {
    "plms": ("pndm",),
    "lms": ("LMSDiscrete", "lmsd"),
    "euler": ("EulerDiscrete",),
    "euler_a": ("euler ancestral", "EulerAncestralDiscrete"),
    "heun": ("HeunDiscrete",),
    "dpm2": ("dpm_2", "KDPM2Discrete", "kdpm2"),
    "dpm2_a": ("dpm_2_ancestral", "dpm2 ancestral", "KDPM2AncestralDiscrete", "kdpm2 a"),
    "dpmpp_2s_a": ("dpmpp_2s_ancestral",),
    "dpmpp_2m": ("dpm_solver", "dpm_solver++", "DPMSolverMultistep", "dpm2++ 2m"),
    "dpmpp_sde": ("DPMSolverSDE", "dpm sde"),
    "dpmpp_2m_sde": ("dpm2++ 2m sde",),
    "unipc": ("uni_pc", "uni_pc_bh2", "UniPCMultistep"),
}

# k-diffusion, and so the web UI and ComfyUI, draw the noise of their steps from a Brownian tree
BROWNIAN = ("dpmpp_sde", "dpmpp_2m_sde")


def _plain(name: str) -> str:
    """A name without case, spaces and punctuation; "++" becomes "pp"."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "pp"))


NAMES = {
    _plain(prefix + name): entry
    for key, entry in SAMPLERS.items()
    for name in (key, entry.label, *ALIASES.get(key, ()))
    for prefix in ("", "k_", "sample_")
}


def find_sampler(name: str | Sampler) -> Sampler:
    """Look up a sampler by our name, A1111's ("DPM++ 2M Karras"), the original scripts' ("k_lms") or diffusers'
    ("EulerDiscreteScheduler"); a sampler is returned as it is.

    A spacing at the end of the name ("Karras", "exponential", ...) replaces the default one. Raises ValueError, with
    all names, for an unknown one.
    """
    if isinstance(name, Sampler):
        return name
    plain = _plain(name).removesuffix("scheduler")
    if (spacing := spacing_in(name)) is not None:
        return NAMES[plain.removesuffix(spacing)]._replace(spacing=spacing)
    if plain not in NAMES:
        raise ValueError(
            f"unknown sampler {name!r}, expected one of {', '.join(SAMPLERS)}, "
            f"with or without a spacing after it: {', '.join(SPACINGS)}"
        )
    return NAMES[plain]


def sampler_key(entry: Sampler) -> str:
    """The key of a sampler in `SAMPLERS`, whatever its spacing. Raises ValueError if it is not there."""
    for key, known in SAMPLERS.items():
        if known.label == entry.label:
            return key
    raise ValueError(f"{entry.label} is not in SAMPLERS: add it there, or call `StableDiffusion.sample` with it")


def spacing_in(name: str | Sampler) -> str | None:
    """The spacing at the end of a sampler's name, if there is one: "karras" in "DPM++ 2M Karras", none in "LCM"."""
    plain = _plain(name).removesuffix("scheduler") if isinstance(name, str) else ""
    ends = (spacing for spacing in SPACINGS if plain.endswith(spacing) and plain.removesuffix(spacing) in NAMES)
    return next(ends, None)
