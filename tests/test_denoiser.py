"""Guidance and prediction types."""

from __future__ import annotations

import pytest
import reference_weights as reference
import torch
from common import error

from sd.config import ScheduleConfig
from sd.denoiser import Denoiser
from sd.schedule import Schedule


def network(x, t, context):
    """A stand-in that mixes everything it is given."""
    return 0.3 * x + context.mean(dim=(1, 2))[:, None, None, None] + t[:, None, None, None] / 1000


X = reference.normal("x", (2, 4, 8, 8))
COND, UNCOND = reference.normal("c", (2, 77, 16)), reference.normal("u", (2, 77, 16))


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 7.5, -1.0])
def test_guidance_on_the_prediction_is_guidance_on_x0(prediction, guidance):
    schedule = Schedule(ScheduleConfig(prediction=prediction))
    level = schedule.level(400)
    plain = [Denoiser(network, schedule, context)(X, level) for context in (UNCOND, COND)]
    guided = Denoiser(network, schedule, COND, UNCOND, guidance)(X, level)
    assert error(guided, plain[0] + guidance * (plain[1] - plain[0])) < 1e-5


def test_plain_prediction_is_half_the_work():
    batches = []

    def counting(x, t, context):
        batches.append((x.shape[0], t.shape[0], context.shape[0]))
        return network(x, t, context)

    schedule = Schedule()
    Denoiser(counting, schedule, COND, UNCOND, 1.0)(X, schedule.level(10))
    Denoiser(counting, schedule, COND, UNCOND, 2.0)(X, schedule.level(10))
    assert batches == [(2, 2, 2), (4, 4, 4)]


def test_batch_order_is_uncond_cond():
    seen = []

    def looking(x, t, context):
        seen.append(context)
        return x

    Denoiser(looking, Schedule(), COND, UNCOND, 3.0)(X, Schedule().level(5))
    assert torch.equal(seen[0], torch.cat([UNCOND, COND]))


def test_precision_of_the_network_and_of_the_state():
    def half(x, t, context):
        assert x.dtype == context.dtype == torch.bfloat16 and t.dtype == torch.float32
        return x

    out = Denoiser(half, Schedule(), COND.bfloat16())(X, Schedule().level(5))
    assert out.dtype == torch.float32


def test_one_context_serves_all_and_other_numbers_are_refused():
    schedule = Schedule()
    level = schedule.level(5)
    out = Denoiser(network, schedule, COND[:1], UNCOND[:1], 3.0)(X, level)
    for i in range(2):
        assert error(out[i : i + 1], Denoiser(network, schedule, COND[:1], UNCOND[:1], 3.0)(X[i : i + 1], level)) < 1e-6
    with pytest.raises(ValueError, match="a context for 2 pictures, but there are 3"):
        Denoiser(network, schedule, COND, UNCOND[:1], 3.0)(torch.cat([X, X[:1]]), level)


def test_guidance_needs_uncond():
    with pytest.raises(ValueError, match="uncond"):
        Denoiser(network, Schedule(), COND, guidance=2.0)
