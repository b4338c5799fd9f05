"""LCM and TCD against diffusers, step by step, and against Gaussian data, whose consistency function is known."""

from __future__ import annotations

import importlib
import math
from itertools import pairwise

import numpy as np
import pytest
import reference_weights as reference
import torch
from common import TINY, error
from PIL import Image

from sd.config import ScheduleConfig
from sd.imaging.tensors import to_tensor
from sd.params import HighRes, ImageToImage, Inpaint, TextToImage
from sd.samplers import SAMPLERS, euler, euler_a, find_sampler, lcm, tcd
from sd.samplers.consistency import boundary
from sd.schedule import CLEAN, Schedule

schedule = Schedule()
GAMMAS = (0.0, 0.3, 1.0)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


# ------------------------------------------------------------------------------------------------------ diffusers


def network(x, t):
    """Of unit size, and depends on everything that a network may depend on."""
    return torch.sin(3 * x + t / 100) + 0.3 * torch.roll(x, 1, dims=-1)


def draws(seed=3):
    rng = torch.Generator().manual_seed(seed)
    return lambda: torch.randn((1, 4, 8, 8), generator=rng, dtype=torch.float64)


@pytest.fixture
def scheduler(monkeypatch):
    """(name, prediction, options) -> a scheduler of diffusers in float64, which draws the noise of `draws`."""
    pytest.importorskip("diffusers", reason="compares with diffusers, which is not installed")

    def make(name, prediction, **options):
        file = {"LCM": "lcm", "TCD": "tcd", "EulerDiscrete": "euler_discrete"}.get(name, "euler_ancestral_discrete")
        module = importlib.import_module(f"diffusers.schedulers.scheduling_{file}")
        words = {"eps": "epsilon", "v": "v_prediction"}
        other = getattr(module, f"{name}Scheduler")(prediction_type=words[prediction], **BETAS, **options)
        other.alphas_cumprod = torch.from_numpy(schedule.alpha_bar)
        draw = draws()
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: draw(), raising=False)
        return other

    return make


def compare(other, levels, run, prediction, gamma=None):
    """The largest distance of our state from theirs after any step, of a run from noised data; and that of our x0.

    Theirs starts from `add_noise`, as image to image does, and at strength 1 from pure noise.
    """
    own, draw = Schedule(ScheduleConfig(prediction=prediction)), draws()
    z, noise = reference.normal("z", (1, 4, 8, 8)).double(), reference.normal("n", (1, 4, 8, 8)).double()
    assert [level.t for level in levels[:-1]] == other.timesteps.tolist() and levels[-1] == CLEAN
    if levels[0].t == 999:
        x = theirs = noise
    else:
        x, theirs = own.add_noise(z, noise, levels[0]), other.add_noise(z, noise, other.timesteps[:1])
    assert error(x, theirs) < 1e-12
    options = {} if gamma is None else {"gamma": gamma}
    steps = run(
        lambda x, level: own.to_x0(network(x, level.t), x, level), x, levels,
        noise=lambda like: draw(), **options,
    )  # fmt: skip
    errors = []
    for step, t in zip(steps, other.timesteps, strict=True):
        found = other.step(network(theirs, float(t)), int(t), theirs, **({} if gamma is None else {"eta": gamma}))
        theirs = found.prev_sample
        errors.append(error(step.x, theirs))
        if gamma is None:
            errors.append(error(step.x0, found.denoised))
    return max(errors)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("strength", [0.3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_every_step_is_that_of_diffusers(scheduler, n, strength, prediction):
    levels = schedule.levels(n, "lcm", strength)
    other = scheduler("LCM", prediction)
    other.set_timesteps(n, strength=strength)
    assert compare(other, levels, lcm, prediction) < 1e-12
    for gamma in GAMMAS:
        other = scheduler("TCD", prediction)
        other.set_timesteps(n, strength=strength)
        assert compare(other, levels, tcd, prediction, gamma) < 1e-12, gamma


@pytest.mark.parametrize("gamma", [None, 0.3])
def test_on_trailing_timesteps(scheduler, gamma):
    """DMD2 and Hyper-SD give LCMScheduler and TCDScheduler the timesteps 999, 749, 499, 249."""
    name, run = ("LCM", lcm) if gamma is None else ("TCD", tcd)
    other = scheduler(name, "eps")
    other.set_timesteps(timesteps=[999, 749, 499, 249])
    assert compare(other, schedule.levels(4, "trailing"), run, "eps", gamma) < 1e-12


def test_grid_of_lcm(scheduler):
    """Theirs loses digits where the timesteps kept by the strength are no multiple of 5: checked where it does not."""
    other = scheduler("LCM", "eps")
    for strength in (0.02, 0.3, 0.5, 0.75, 1.0):
        for n in range(1, int(50 * strength) + 1):
            other.set_timesteps(n, strength=strength)
            ours = schedule.levels(n, "lcm", strength)
            assert [level.t for level in ours[:-1]] == other.timesteps.tolist(), (n, strength)
        with pytest.raises(ValueError, match="smaller than `num_inference_steps`"):
            other.set_timesteps(int(50 * strength) + 1, strength=strength)
        with pytest.raises(ValueError, match="the spacing lcm has 50 timesteps"):
            schedule.levels(int(50 * strength) + 1, "lcm", strength)


TURBO = {"timestep_spacing": "trailing", "steps_offset": 1}  # as in the scheduler of SD-Turbo


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # tensors to arrays in diffusers
@pytest.mark.parametrize("name, run", [("EulerDiscrete", euler), ("EulerAncestralDiscrete", euler_a)])
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_euler_of_turbo(scheduler, name, run, n):
    """SD-Turbo and SDXL-Turbo predict eps, and end at clean data (final_sigmas_type "zero", the default).

    Theirs keep y = x / alpha. They start from noise of the ratio r, so x is sigma times the noise: 0.998 of ours.
    """
    other = scheduler(name, "eps", **TURBO)
    other.set_timesteps(n)
    levels, draw = schedule.levels(n, "trailing"), draws()
    assert [level.t for level in levels[:-1]] == other.timesteps.tolist()
    assert [level.ratio for level in levels] == pytest.approx(other.sigmas.tolist(), rel=1e-6)
    other.sigmas = other.sigmas.double()
    noise = reference.normal("x", (1, 4, 8, 8)).double()
    y, x = float(other.init_noise_sigma) * noise, levels[0].sigma * noise
    assert error(x / levels[0].alpha, y) < 1e-6
    steps = run(
        lambda x, level: schedule.to_x0(network(x, level.t), x, level), x, levels, noise=lambda like: draw()
    )  # fmt: skip
    for step, t in zip(steps, other.timesteps, strict=True):
        y = other.step(network(other.scale_model_input(y, t), float(t)), t, y).prev_sample
        assert error(step.x / step.level.alpha, y) < 1e-6


# -------------------------------------------------------------------------------------------------- Gaussian data

MEAN, STD = 0.7, 0.4


def deviation(level):
    """Standard deviation of x at a level, for data of standard deviation STD."""
    return math.sqrt(level.alpha**2 * STD**2 + level.sigma**2)


def along_the_flow(x, a, b):
    """Where the probability flow takes x from level a to b, for data N(MEAN, STD²): it scales the distance from the
    mean by the ratio of the standard deviations."""
    return b.alpha * MEAN + (x - a.alpha * MEAN) * deviation(b) / deviation(a)


def consistency(x, level):
    """The consistency function of this data."""
    return along_the_flow(x, level, CLEAN)


def distributions(run, denoise, levels, **options):
    """(level, mean, standard deviation) of x after each step, of a run from the distribution at the first level.

    With these models x is linear in the initial noise and in the draws. So a run over unit vectors gives the
    coefficient of each, and one without any noise, the first entry, gives the mean.
    """
    first, *draws = torch.eye(len(levels) + 2, dtype=torch.float64)[1:]
    numbers = iter(draws)
    start = levels[0].alpha * MEAN + deviation(levels[0]) * first
    for step in run(denoise, start, levels, noise=lambda like: next(numbers), **options):
        yield step.level, float(step.x[0]), float((step.x[1:] - step.x[0]).norm())


def check(found, tolerance):
    """They are those of the data at this level."""
    level, mean, std = found
    assert mean == pytest.approx(level.alpha * MEAN, rel=tolerance), level
    assert std == pytest.approx(deviation(level), rel=tolerance), level


@pytest.mark.parametrize("spacing", ["lcm", "trailing"])
@pytest.mark.parametrize("n", [1, 2, 4, 8, 50])
def test_lcm_of_a_perfect_model_gives_the_data(n, spacing):
    """After every step, x has the distribution of its level: the last, that of the data.

    But for c_skip, which is 7e-6 at timestep 19.
    """
    found = list(distributions(lcm, consistency, schedule.levels(n, spacing)))
    for one in found:
        check(one, 1e-4)
    assert len(found) == n and found[-1][0] == CLEAN


def reaching(levels, gamma):
    """A model whose x0 leads DDIM exactly to the point of the flow at the level s that TCD goes down to.

    This is what TCD's is trained for. s is worked out here from the paper: (1 - gamma) of the next timestep, and 0 at
    the end.
    """
    targets = {}
    for a, b in pairwise(levels):
        targets[a] = schedule.level(math.floor((1 - gamma) * b.t + 1e-9) if b.t > 0 else 0)

    def x0(x, a):
        s = targets[a]
        goal = along_the_flow(x, a, s)
        # goal = alpha_s x0 + sigma_s (x - alpha_a x0) / sigma_a
        return (goal - s.sigma / a.sigma * x) / (s.alpha - s.sigma * a.alpha / a.sigma)

    return x0


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("n", [1, 2, 4, 8, 50])
def test_tcd_of_a_perfect_model_gives_the_data(n, gamma):
    levels = schedule.levels(n, "lcm")
    found = list(distributions(tcd, reaching(levels, gamma), levels, gamma=gamma))
    for one in found:
        check(one, 1e-10)
    assert len(found) == n and found[-1][0] == schedule.level(0)


def test_an_ordinary_model_is_told_apart():
    """The mean of the data given x, which ordinary models predict, loses most of the deviation."""

    def mean(x, level):
        return MEAN + level.alpha * STD**2 / deviation(level) ** 2 * (x - level.alpha * MEAN)

    *_, (_, found, std) = distributions(lcm, mean, schedule.levels(2, "lcm"))
    assert found == pytest.approx(MEAN, rel=1e-4) and std < 0.7 * STD


# ------------------------------------------------------------------------------------------------- what they promise


def test_tcd_without_noise_is_ddim_to_timestep_0():
    levels = schedule.levels(4, "lcm")
    x = reference.normal("x", (1, 4, 8, 8)).double()
    denoise = lambda x, level: torch.tanh(x)  # noqa: E731
    own = tcd(denoise, x, levels, gamma=0.0)
    ddim = SAMPLERS["ddim"].run(denoise, x, [*levels[:-1], schedule.level(0)])
    assert all(torch.equal(a.x, b.x) and a.level == b.level for a, b in zip(own, ddim, strict=True))


def test_lcm_ends_at_x0_on_every_grid():
    """Without noise, even where the last level is not clean, and without a draw there."""
    drawn = []
    levels = schedule.levels(3, "leading")
    assert levels[-1].sigma > 0

    def noise(x):
        drawn.append(x.shape)
        return torch.randn_like(x)

    x0 = torch.full((1, 4, 8, 8), 0.5)
    *_, last = lcm(lambda x, level: x0, torch.randn(1, 4, 8, 8), levels, noise=noise)
    assert torch.equal(last.x, last.x0) and error(last.x, x0) < 0.01 and len(drawn) == 2


def test_grids_that_evaluate_timestep_0():
    """LCM's boundary condition leaves x as it is there; TCD goes on to clean data."""
    assert boundary(0.0) == (1.0, 0.0)
    levels, x0 = schedule.levels(3, "linspace"), torch.full((5,), 2.0, dtype=torch.float64)
    one = lambda like: torch.ones_like(like)  # noqa: E731
    *_, before, last = lcm(lambda x, level: x0, torch.zeros_like(x0), levels, noise=one)
    assert levels[-2].t == 0 and last.level == CLEAN and torch.equal(last.x, before.x)
    assert error(before.x, levels[-2].alpha * x0 + levels[-2].sigma) < 1e-5
    *_, last = tcd(lambda x, level: x0, torch.zeros_like(x0), levels, noise=one)
    assert last.level == CLEAN and error(last.x, x0) < 1e-12


def test_gamma_0_draws_no_noise_and_others_need_it():
    entry = SAMPLERS["tcd"]
    assert entry.draws() and entry.draws({"gamma": 0.1}) and not entry.draws({"gamma": 0.0})
    assert SAMPLERS["lcm"].draws() and not SAMPLERS["ddim"].draws() and SAMPLERS["ddim"].draws({"eta": 0.5})
    with pytest.raises(ValueError, match=r"tcd with gamma 0.3 draws noise in its steps: give it `noise`"):
        list(tcd(lambda x, level: x, torch.zeros(1), schedule.levels(2, "lcm")))


@pytest.mark.parametrize(
    "name, key, spacing",
    [
        ("LCM", "lcm", "lcm"), ("LCMScheduler", "lcm", "lcm"), ("lcm", "lcm", "lcm"), ("LCM Karras", "lcm", "karras"),
        ("TCD", "tcd", "lcm"), ("TCDScheduler", "tcd", "lcm"), ("TCD Trailing", "tcd", "trailing"),
        ("euler lcm", "euler", "lcm"),
    ],
)  # fmt: skip
def test_names(name, key, spacing):
    assert find_sampler(name) == SAMPLERS[key]._replace(spacing=spacing)


@pytest.mark.parametrize(
    "n, strength, expected",
    [
        (4, 1.0, [999, 759, 499, 259]),
        (4, 0.5, [499, 379, 259, 139]),
        (1, 0.3, [299]),
        (8, 1.0, [999, 879, 759, 639, 499, 379, 259, 139]),
        (4, 0.0, []),
    ],
)
def test_timesteps(n, strength, expected):
    assert [level.t for level in schedule.levels(n, "lcm", strength)] == [*expected, -1]


@pytest.mark.parametrize(
    "steps, expected", [(200, [199, 151, 99, 51]), (1024, [1023, 777, 511, 265]), (4, [3, 2, 1, 0])]
)
def test_grids_of_other_schedules(steps, expected):
    """50 timesteps in even strides that end at the last one, or all where there are fewer."""
    own = Schedule(ScheduleConfig(steps=steps))
    assert [level.t for level in own.levels(4, "lcm")[:-1]] == expected
    most = min(50, steps)
    assert len({level.t for level in own.levels(most, "lcm")}) == most + 1
    with pytest.raises(ValueError, match=f"lcm has {most} timesteps, too few" if steps > 50 else "from 1 to 4"):
        own.levels(most + 1, "lcm")


@pytest.mark.parametrize(
    "n, strength, message",
    [
        (51, 1.0, ", too few for 51 steps: use fewer steps, or the spacing trailing"),
        (51, 0.0, ", too few for 51 steps: use fewer steps, or the spacing trailing"),
        (
            4, 0.07, ", of which strength 0.07 leaves 3, too few for 4 steps: use fewer steps, more strength, or the "
            "spacing trailing",
        ),
        (
            1, 0.01, ", of which strength 0.01 leaves 0, too few for 1 step: use fewer steps, more strength, or the "
            "spacing trailing",
        ),
    ],
)  # fmt: skip
def test_too_many_steps(n, strength, message):
    with pytest.raises(ValueError) as refusal:
        schedule.levels(n, "lcm", strength)
    assert str(refusal.value) == "the spacing lcm has 50 timesteps" + message


# ----------------------------------------------------------------------------------------------------- in the model

SIZE = {"height": 64, "width": 64, "seed": 3}
PHOTO = Image.effect_noise((64, 64), 60).convert("RGB")
MASK = Image.new("L", (64, 64))
MASK.paste(255, (16, 16, 48, 48))


@pytest.fixture
def asked(monkeypatch):
    """Runs a request; gives (timestep, rows) of each call of the network, and the run."""

    def run(model, request):
        seen, predict = [], model.predict
        with monkeypatch.context() as patch:
            patch.setattr(
                model, "predict", lambda x, t, c, **more: seen.append((float(t[0]), len(x))) or predict(x, t, c, **more)
            )
            made = model.prepare(request)
            for _ in made:  # the images are not looked at, so nothing is decoded
                pass
        return seen, made

    return run


@pytest.mark.parametrize("sampler", ["lcm", "tcd"])
@pytest.mark.parametrize("name", ["tiny_sd", "tiny_inpaint"])
def test_all_tasks(request, asked, name, sampler):
    """Whatever the strength, as many steps are taken as are asked for, and none at 0; two rows are guided."""
    model = request.getfixturevalue(name)
    settings = {"sampler": sampler, "steps": 2, **SIZE}
    whole, lower = [(999, 2), (499, 2)], [(499, 2), (259, 2)]
    assert asked(model, TextToImage.of("a", **settings))[0] == whole
    for kind, more in ((ImageToImage, {}), (Inpaint, {"mask": MASK})):
        for strength, expected in ((1, whole), (0.5, lower), (0, [])):
            seen, run = asked(model, kind.of("a", image=PHOTO, strength=strength, **more, **settings))
            assert seen == expected and len(run) == len(expected)
            assert strength or run.notes == []
    with pytest.raises(ValueError, match=r"of which strength 0\.02 leaves 1, too few for 2 steps"):
        model.prepare(ImageToImage.of("a", image=PHOTO, strength=0.02, **settings))


@pytest.mark.parametrize("sampler", ["lcm", "tcd"])
def test_the_unmasked_part_is_kept(tiny_sd, sampler):
    """To the bit in pixels, and in the latents of the last step."""
    given = {"sampler": sampler, "mask": MASK, "posterior": "mode", **SIZE}
    run = tiny_sd.prepare(Inpaint.of("a", image=PHOTO, strength=0.5, **given))
    (image,) = run.result().images
    kept = np.asarray(MASK) == 0
    assert np.array_equal(np.asarray(image)[kept], np.asarray(PHOTO)[kept])
    assert not np.array_equal(np.asarray(image)[~kept], np.asarray(PHOTO)[~kept])
    z = tiny_sd.encode(to_tensor(PHOTO)).mode()
    level = CLEAN if sampler == "lcm" else schedule.level(0)  # what is left there is the noise of that level
    assert (run.x - level.alpha * z)[..., :2, :].abs().max() < 6 * level.sigma + 1e-4


@pytest.mark.parametrize("sampler", ["lcm", "tcd"])
def test_with_settings_that_count_steps(tiny_sd, asked, sampler):
    """guidance_until and prompts that change go by the step; DeepCache by the call of the network."""
    settings = {"sampler": sampler, "web_ui_prompts": True, "guidance_until": 0.5, **SIZE}
    request = ImageToImage.of("a [cat:dog:0.5]", image=PHOTO, strength=0.5, **settings)
    seen, run = asked(tiny_sd, request)
    assert seen == [(499, 2), (379, 2), (259, 1), (139, 1)]
    assert [guide is run.guides[0] for guide in run.guides] == [True, True, True, False]  # as the web UI counts them
    whole, forward = [], tiny_sd.unet.bottom
    tiny_sd.unet.bottom = lambda *inputs: whole.append(1) or forward(*inputs)
    try:
        tiny_sd.prepare(TextToImage.of("a", sampler=sampler, cache_interval=2, guidance=1, **SIZE)).result()
    finally:
        del tiny_sd.unet.bottom
    assert len(whole) == 2


@pytest.mark.parametrize(
    "steps, strength, expected", [(None, 0.5, [499, 379, 259, 139]), (2, 0.5, [499, 259]), (1, 1.0, [999]), (3, 0, [])]
)
def test_second_pass(tiny_sd, asked, steps, strength, expected):
    """It takes hires_steps, or as many steps as the first, of the part of the grid below its strength."""
    request = HighRes.of(
        "a", hires=1.5, hires_strength=strength, hires_steps=steps, hires_upscaler="latent", sampler="lcm", **SIZE
    )
    seen, run = asked(tiny_sd, request)
    assert [t for t, _ in seen] == [999, 759, 499, 259, *expected] and len(run) == 4 + len(expected)
    with pytest.raises(ValueError, match=r"of which strength 0\.1 leaves 5, too few for 6 steps"):
        tiny_sd.prepare(HighRes.of("a", hires_strength=0.1, hires_steps=6, sampler="lcm", **SIZE))


def test_gamma_is_a_setting_of_tcd():
    params = TextToImage.of("a", gamma=0.5).params.resolved(TINY)
    assert (params.sampler, params.spacing, params.steps, params.options) == ("tcd", "lcm", 4, {"gamma": 0.5})
    with pytest.raises(ValueError, match=r"^gamma must be in \[0, 1\], got 1.5$"):
        TextToImage.of("a", sampler="tcd", gamma=1.5)
    with pytest.raises(ValueError, match=r"^gamma is a setting of tcd, not of LCM$"):
        TextToImage.of("a", sampler="lcm", gamma=0.5)


def test_gamma_0_draws_nothing(tiny_sd):
    """So a seed of its noise has no effect, and this is noted."""
    settings = {"sampler": "tcd", "noise_seed_delta": 1, "guidance": 1, **SIZE}
    (blurred,) = tiny_sd.prepare(TextToImage.of("a", **settings)).notes
    assert "the sampler tcd needs a few-step model" in blurred
    note, _ = tiny_sd.prepare(TextToImage.of("a", gamma=0, **settings)).notes
    assert note == "noise_seed_delta has no effect: TCD draws no noise in its steps"
