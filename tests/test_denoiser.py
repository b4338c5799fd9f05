"""Guidance and prediction types."""

from __future__ import annotations

import pytest
import reference_weights as reference
import torch
from common import error

from sd.conditioning import Conditioning
from sd.config import ScheduleConfig
from sd.denoiser import Denoiser, concatenate, rescaled
from sd.schedule import Schedule


def network(x, t, conditioning):
    """A stand-in that mixes everything it is given."""
    return 0.3 * x + conditioning.context.mean(dim=(1, 2))[:, None, None, None] + t[:, None, None, None] / 1000


X = reference.normal("x", (2, 4, 8, 8))
COND, UNCOND = (Conditioning(reference.normal(name, (2, 77, 16))) for name in "cu")
ONE, NONE = (Conditioning(part.context[:1]) for part in (COND, UNCOND))


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

    def counting(x, t, conditioning):
        batches.append((x.shape[0], t.shape[0], conditioning.batch))
        return network(x, t, conditioning)

    schedule = Schedule()
    Denoiser(counting, schedule, COND, UNCOND, 1.0)(X, schedule.level(10))
    Denoiser(counting, schedule, COND, UNCOND, 2.0)(X, schedule.level(10))
    assert batches == [(2, 2, 2), (4, 4, 4)]


def test_batch_order_is_uncond_cond():
    seen = []

    def looking(x, t, conditioning):
        seen.append(conditioning.context)
        return x

    Denoiser(looking, Schedule(), COND, UNCOND, 3.0)(X, Schedule().level(5))
    assert torch.equal(seen[0], torch.cat([UNCOND.context, COND.context]))


def test_precision_of_the_network_and_of_the_state():
    def half(x, t, conditioning):
        assert x.dtype == conditioning.context.dtype == torch.bfloat16 and t.dtype == torch.float32
        return x

    out = Denoiser(half, Schedule(), COND.to(dtype=torch.bfloat16))(X, Schedule().level(5))
    assert out.dtype == torch.float32


def test_one_context_serves_all_and_other_numbers_are_refused():
    schedule = Schedule()
    level = schedule.level(5)
    out = Denoiser(network, schedule, ONE, NONE, 3.0)(X, level)
    for i in range(2):
        assert error(out[i : i + 1], Denoiser(network, schedule, ONE, NONE, 3.0)(X[i : i + 1], level)) < 1e-6
    with pytest.raises(ValueError, match="a context for 2 images, but there are 3"):
        Denoiser(network, schedule, COND, NONE, 3.0)(torch.cat([X, X[:1]]), level)


def test_guidance_needs_uncond():
    with pytest.raises(ValueError, match="uncond"):
        Denoiser(network, Schedule(), COND, guidance=2.0)


def test_contexts_of_unequal_length_are_refused_in_a_line():
    longer = Conditioning(torch.cat([COND.context, COND.context], dim=1))
    with pytest.raises(ValueError, match=r"^contexts must be of one length, got 77 and 154: .*same_length\)$"):
        Denoiser(network, Schedule(), longer, UNCOND, 3.0)


def test_all_of_a_conditioning_goes_together():
    """Moved, expanded, repeated and concatenated as one; what some have and others lack is refused."""
    whole = Conditioning(torch.ones(1, 3, 2), torch.ones(1, 5), torch.ones(1, 4, 6, 7), torch.ones(1))
    assert [x.shape[0] for x in concatenate([whole], batch=3)] == [3, 3, 3, 3]
    assert concatenate([whole], batch=3).batch == 3
    assert [x.shape[0] for x in whole.repeat(2)] == [2, 2, 2, 2]
    assert [x.dtype for x in whole.to(dtype=torch.float64)] == [torch.float64] * 3 + [torch.float32]
    both = concatenate([whole, whole.each(torch.zeros_like).repeat(2)])
    assert [tuple(x.shape) for x in both] == [(3, 3, 2), (3, 5), (3, 4, 6, 7), (3,)]
    assert all(x[0].min() == 1 and x[1:].max() == 0 for x in both)
    assert concatenate([Conditioning(whole.context)] * 2).vector is None
    with pytest.raises(ValueError, match="1 of 2 conditionings have a vector"):
        concatenate([whole, whole._replace(vector=None)])
    with pytest.raises(ValueError, match="concats must be of one shape"):
        concatenate([whole, whole._replace(concat=torch.ones(1, 4, 6, 8))])
    with pytest.raises(ValueError, match="a vector for 2 images, but there are 3"):
        concatenate([Conditioning(whole.context, torch.ones(2, 5))], batch=3)


def test_the_conditioning_is_put_together_once():
    seen = []

    def looking(x, t, conditioning):
        seen.append(conditioning.context)
        return x

    denoise = Denoiser(looking, Schedule(), COND, UNCOND, 3.0)
    for t in (5, 10):
        denoise(X, Schedule().level(t))
    assert seen[0] is seen[1]


def test_one_context_serves_images_with_channels_of_their_own():
    """Inpainting: one prompt, and for each image its own masked latent."""
    seen = []

    def network(x, t, conditioning):
        seen.append(conditioning)
        return x

    cond = Conditioning(torch.ones(1, 7, 4), concat=torch.randn(3, 5, 2, 2))
    Denoiser(network, Schedule(), cond, cond, 2.0)(torch.randn(3, 4, 2, 2), Schedule().level(500))
    assert seen[0].context.shape == (6, 7, 4) and seen[0].concat.equal(cond.concat.repeat(2, 1, 1, 1))


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescaled_guidance_by_hand(prediction, phi):
    """Lin et al. 2024, eq. 15 and 16, on the output of the network; the images of a batch each on their own."""
    schedule = Schedule(ScheduleConfig(prediction=prediction))
    level, outs = schedule.level(400), reference.normal("outs", (4, 4, 8, 8))
    outs[1] *= 3
    x0 = Denoiser(lambda *_: outs, schedule, COND, UNCOND, 7.5, phi)(X, level)
    for i in (0, 1):
        u, c = outs[i].double(), outs[2 + i].double()
        guided = u + 7.5 * (c - u)
        final = phi * guided * (c.std() / guided.std()) + (1 - phi) * guided
        assert error(x0[i : i + 1], schedule.to_x0(final.float()[None], X[i : i + 1], level)) < 1e-5


def test_rescaled_guidance_of_diffusers():
    pipelines = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    guided, cond = 5 * X + 0.3, reference.normal("cond", (2, 4, 8, 8))
    theirs = pipelines.rescale_noise_cfg(guided, cond, guidance_rescale=0.7)
    assert error(rescaled(guided, cond, 0.7), theirs) < 1e-6


def test_rescaling_what_is_constant_changes_nothing():
    flat = torch.full((1, 4, 8, 8), 2.0)
    assert torch.equal(rescaled(flat, X[:1], 0.7), flat)
