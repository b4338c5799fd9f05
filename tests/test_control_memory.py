"""The memory of control networks: what is estimated before loading is what tensors on a GPU add up to."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator

import pytest
import torch
from common import TINY
from control_common import control_network, lines
from simulated_device import SimulatedGpu
from test_sdxl_memory import HALF, model_on
from test_simulated_gpu import networks, phases
from torch import nn

from sd.conditioning import Conditioning
from sd.config import SD1, SDXL, Config
from sd.control import AppliedControl, controlled
from sd.control_config import ControlConfig
from sd.control_params import Control
from sd.models.build import build_control
from sd.models.controlnet import ControlNet
from sd.params import SamplingParams, TextToImage
from sd.runtime.memory import ALL, ONE, WITHOUT_TEXT, Job, needed, residual_bytes, step_bytes
from sd.runtime.optimize import optimize


@pytest.fixture
def gpu() -> Iterator[SimulatedGpu]:
    gc.collect()  # what other tests have left: its end would be a warning here
    with SimulatedGpu() as device, warnings.catch_warnings():
        warnings.simplefilter("error")
        yield device


def control_on_gpu(config: Config) -> ControlNet:
    control = build_control(ControlConfig.of(config.unet))
    for module in control.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            layout = torch.channels_last if weight.dim() == 4 else torch.contiguous_format
            made = torch.empty(weight.shape, dtype=HALF, device="cuda", memory_format=layout)
            setattr(module, name, nn.Parameter(made, requires_grad=False))
    optimize(control.eval(), torch.device("cuda", 0))
    return control


def weights_of(control: ControlNet) -> int:
    return sum(weight.numel() for weight in control.parameters())


def test_residuals_are_as_large_as_estimated():
    network = control_network()
    x, context = torch.zeros(2, 4, 8, 8), torch.zeros(2, 77, 64)
    down, middle = network(x, torch.zeros(2), context, network.embed(torch.zeros(1, 3, 64, 64)))
    sizes = sum(residual.nbytes for residual in (*down, middle))
    assert residual_bytes(TINY.unet, torch.float32, 2, 8, 8) == sizes


def test_the_weights_count_wherever_the_others_are():
    job = Job(64, 64)
    for kept in (ALL, WITHOUT_TEXT, ONE):
        plain, both = (needed(TINY, torch.float32, each, kept) for each in (job, job._replace(controls=(10**6, 10**6))))
        assert both - plain >= 2 * 4 * 10**6


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("config", [SD1, SDXL], ids=lambda config: config.name)
@pytest.mark.sampled(2)
def test_what_a_controlled_step_needs_is_what_the_tensors_add_up_to(gpu, config, count):
    unet, control = networks(config)["unet"], control_on_gpu(config)
    for batch, height, width in ((1, 64, 64), (2, 104, 152)):
        x, t = torch.empty(batch, 4, height, width, device="cuda").half(), torch.full((batch,), 5.0, device="cuda")
        vector = torch.empty(batch, config.unet.vector, device="cuda").half() if config.unet.vector else None
        context = torch.empty(batch, 77, config.unet.context, device="cuda").half()
        hint = torch.empty(1, 3, 8 * height, 8 * width, device="cuda").half()
        features = control.embed(hint)
        before = gpu.live
        applied = [AppliedControl(control, lambda hint: features, hint) for _ in range(count)]  # noqa: B023
        with gpu.phase() as peak:
            controlled(unet, applied)(x, t, Conditioning(context, vector))
        sizes = (config.unet, HALF, batch, height, width)
        assert 0.9 < (step_bytes(*sizes) + residual_bytes(*sizes)) / (peak() - before) < 1.05


@pytest.mark.parametrize(("config", "count", "end"), [(SD1, 1, 1.0), (SD1, 2, 1.0), (SDXL, 1, 1.0), (SD1, 1, 0.5)])
def test_what_is_needed_is_what_a_run_takes(gpu, config, count, end):
    """With what the recordings of the networks keep: also of the steps without control, where there are some."""
    model = model_on(config, ALL)
    controls = [control_on_gpu(config) for _ in range(count)]
    for i, control in enumerate(controls):
        model.add_control(control, f"control {i}")
    asked = [Control(f"control {i}", lines(), end=end) for i in range(count)]
    params = SamplingParams(height=768, width=512, steps=2)
    found = max(phases(gpu, model, TextToImage("a", params, controls=asked)).values()) * 1e9
    job = Job(768, 512, recorded=True, controls=tuple(map(weights_of, controls)), kinds=1 if end == 1 else 2)
    assert 0.95 * found < needed(config, HALF, job) < 1.02 * found
