"""The benchmark of control: a controlled step and the same without, ours and diffusers', and what control costs."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from common import TINY_V2, TINY_XL, error
from tqdm import tqdm

from scripts.benchmark import report, sides
from scripts.benchmark.cases import (
    Case,
    all_cases,
    arguments,
    flop,
    inputs,
    label,
    needed,
    networks_of,
    usual_case,
    weight_bytes,
)
from scripts.benchmark.interleave import Comparison, measure
from scripts.benchmark.references import REQUIRED
from scripts.benchmark.runner import Run, Runner
from scripts.benchmark.weights import Setup
from sd.config import POCKET, SD1, SDXL
from sd.models.controlnet import ControlNet
from sd.runtime.cuda_graphs import Recorded

CPU = torch.device("cpu")
SETUP = Setup(POCKET, None, CPU, "float32", 1, Path("."))
WITH = usual_case("control", POCKET)
WITHOUT = WITH._replace(controlled=False)
SMALL_XL = replace(TINY_XL, size=64)


def needs(*packages: str) -> None:
    """Skip where the packages are not installed."""
    for name in packages:
        if find_spec(name) is None:
            pytest.skip(f"compares with {name}, which is not installed")


def test_cases():
    """Both at the native size, the controlled one first; a hint of the image's size; work and weights of both."""
    assert all_cases("control", POCKET, 4, [64], [2]) == [WITH, WITHOUT]
    assert label(WITH, POCKET) == "controlled step, 2 x 16x16"
    assert label(WITHOUT, POCKET) == "the same without control, 2 x 16x16"
    assert needed("control", POCKET) == ("unet", "control")
    x, _, conditioning, hint = arguments(WITH, inputs(WITH, POCKET))
    assert x.shape == (2, 4, 16, 16) and hint.shape == (1, 3, 128, 128) and conditioning.vector is None
    assert torch.equal(x, inputs(usual_case("unet", POCKET), POCKET)[0])
    step = flop(usual_case("unet", POCKET), POCKET)
    assert flop(WITHOUT, POCKET) == step and step < flop(WITH, POCKET) < 1.5 * step
    control = sum(weight.numel() for weight in networks_of(["control"], POCKET)["control"].state_dict().values())
    both = weight_bytes("unet", POCKET, torch.float32) + 4 * control
    assert weight_bytes("control", POCKET, torch.float32) == both


@pytest.mark.exhaustive
@pytest.mark.parametrize("config", [SD1, SDXL])
def test_arithmetic_of_full_size(config):
    """The paper's network has a bit more than a third of the U-Net's arithmetic."""
    case = usual_case("control", config)
    share = flop(case, config) / flop(case._replace(controlled=False), config) - 1
    assert 0.3 < share < 0.45


@pytest.mark.parametrize("config", [POCKET, SMALL_XL, replace(TINY_V2, size=64)], ids=["pocket", "xl", "v2"])
@torch.no_grad()
def test_both_programs_compute_the_same(config):
    """With every weight of the control network in its place in diffusers'; without control it is the U-Net."""
    needs(*REQUIRED)
    setup = replace(SETUP, config=config)
    ours, theirs = (kind(setup, "control") for kind in (sides.Side, sides.Diffusers))
    cases = all_cases("control", config, 1, [], [])
    results = [[side.call(case)() for case in cases] for side in (ours, theirs)]
    for a, b in zip(*results, strict=True):
        assert error(a, b) < 1e-4
    assert error(*results[0]) > 1e-2  # control has an effect
    *given, _ = arguments(cases[1], ours.inputs(cases[1]))
    assert torch.equal(results[0][1], ours.networks["unet"](*given))


@torch.no_grad()
def test_the_hint_is_embedded_once(monkeypatch):
    """By ours in the warm-up. On CUDA both networks are recorded."""
    calls, embed = [], ControlNet.embed
    monkeypatch.setattr(ControlNet, "embed", lambda self, hint: calls.append(1) or embed(self, hint))
    side = sides.Side(SETUP, "control")
    call = side.call(WITH)
    first = call()
    assert torch.equal(call(), first) and len(calls) == 1

    recorded = []
    monkeypatch.setattr(sides, "Recorded", lambda network: recorded.append(network) or Recorded(network))
    monkeypatch.setattr(side, "inputs", lambda case: list(inputs(case, POCKET)))
    monkeypatch.setattr(side, "setup", replace(SETUP, device=torch.device("cuda")))
    side.call(WITH)
    assert recorded == [side.networks["unet"], side.networks["control"]]


@torch.no_grad()
def test_an_inpainting_model():
    """The control network does not see the channels of the mask."""
    config = replace(POCKET, unet=replace(POCKET.unet, in_channels=9))
    side = sides.Side(replace(SETUP, config=config), "control")
    assert side.networks["control"].config.in_channels == 4
    assert side.call(usual_case("control", config))().shape == (2, 4, 16, 16)


def test_who_takes_part():
    assert sides.takes_part("diffusers", WITH, SETUP)
    assert not sides.takes_part("openvino", WITH, SETUP) and not sides.takes_part("compiled", WITH, SETUP)


class InThisProcess:
    """Stands in for a worker."""

    def __init__(self, name: str, log: Path, make, *arguments: object) -> None:
        self.name, self.made = name, make(*arguments)

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: object) -> None: ...

    def ask(self, method: str, *arguments: object) -> object:
        return getattr(self.made, method)(*arguments)


def test_measured(monkeypatch):
    """All of it in this process: two rows, whose difference is what control costs."""
    needs(*REQUIRED)
    monkeypatch.setattr("scripts.benchmark.interleave.Worker", InThisProcess)
    monkeypatch.setattr("scripts.benchmark.runner.cli.keep_freed_memory", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(Runner, "peak", lambda self: 1e12)
    notes: list[str] = []
    cases = all_cases("control", POCKET, 1, [64], [2])
    with torch.no_grad():
        found, _ = measure(SETUP, "control", cases, ["diffusers", "openvino"], 1, tqdm(disable=True), notes.append)
    assert notes == [] and list(found) == [WITH, WITHOUT]
    assert all(list(by_peer) == ["diffusers"] and by_peer["diffusers"].difference < 1e-4 for by_peer in found.values())


def test_the_share():
    """Ours and each peer's, from both rows; no table of growth."""

    def row(case: Case, ours: float, theirs: float, dtype: str = "float32") -> report.Row:
        measured = {"diffusers": Comparison([Run(ours, None)], [Run(theirs, None)], 0.0)}
        return report.row(case, replace(SETUP, dtype=dtype), measured)

    rows = [row(WITH, 1.4, 3.0), row(WITHOUT, 1.0, 2.0), row(WITH, 1.0, 1.0, "bfloat16")]
    assert [each["usual"] for each in rows] == [True] * 3
    assert report.control_shares(rows, ["diffusers"]) == ["0.40 and 0.50 (diffusers) in float32"]
    assert report.control_shares(rows, []) == ["0.40 in float32"]
    record = {"machine": report.machine(SETUP), "figures": rows}
    text = report.text(record, False)
    assert "Control adds to a step, as a share of one without it, 0.40 and 0.50 (diffusers) in float32" in text
    assert "Growth" not in text and "controlled step, 2 x 16x16" in text
