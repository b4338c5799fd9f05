"""Control networks against the original's residuals and runs, and in requests of every kind."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from common import TINY, TINY_V2, Golden, error, tiny_state
from conftest import loaded
from control_common import control_network, hint_of, lines, pil, silent
from PIL import Image

from sd.conditioning import Conditioning
from sd.control import AppliedControl, SummedControls, controlled, with_control
from sd.control_config import ControlConfig
from sd.control_params import Control
from sd.denoiser import Denoiser
from sd.imaging.hints import hint_image, looks_inverted, placed
from sd.models.controlnet import ControlNet
from sd.params import ImageToImage, Inpaint, TextToImage, from_dict
from sd.pipeline import StableDiffusion
from sd.samplers import SAMPLERS
from sd.schedule import Schedule

TINY_NETWORKS = {"tiny-control-v1": ("tiny-v1", TINY), "tiny-control-v2": ("tiny-v2-v", TINY_V2)}
SIZE = {"height": 64, "width": 64, "steps": 3}


@pytest.fixture(scope="module")
def networks():
    """U-Net, control network and config, by the name of the control network's manifest."""
    return {
        name: (loaded(tiny_state(base), config)["unet"], control_network(name, config), config)
        for name, (base, config) in TINY_NETWORKS.items()
    }


@pytest.fixture(scope="module")
def model(tiny) -> StableDiffusion:
    """The tiny model with two control networks: of the reference weights, and one that changes nothing."""
    made = StableDiffusion(TINY, **{**tiny, "unet": copy.deepcopy(tiny["unet"])})
    made.add_control(copy.deepcopy(control_network()), "edges")
    made.add_control(silent(control_network()), "silent")
    return made


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


def difference(a, b) -> float:
    return float(np.abs(pixels(a) - pixels(b)).mean())


# ------------------------------------------------------------------------------------------------ the original


@pytest.mark.parametrize("name", ["tiny_control_v1_components", "tiny_control_v2_components"])
def test_residuals_and_predictions(networks, name):
    golden = Golden(name)
    unet, control, _ = networks[golden.case["manifest"]]
    x = golden["x"]
    h, w = x.shape[-2:]
    hint, t = hint_of(golden, (2, 3, 8 * h, 8 * w)), torch.tensor(golden.case["t"], dtype=torch.float32)
    conditioning = Conditioning(Golden(golden.case["contexts"])["cond"])
    with torch.no_grad():
        features = control.embed(hint)
        assert error(features, golden["guided_hint"]) < 1e-5
        residuals = control(x, t, conditioning, features)
        all_of_them = [*residuals.down, residuals.middle]
        assert len(all_of_them) == sum(key.startswith("control.") for key in golden.tensors)
        for i, residual in enumerate(all_of_them):
            assert error(residual, golden[f"control.{i}"]) < 1e-5

        def prediction(scale=1.0, **options):
            applied = AppliedControl(control, control.embed, hint, scale, **options)
            return controlled(unet, [applied])(x, t, conditioning)

        assert error(prediction(), golden["eps"]) < 2e-5
        assert error(prediction(0.6), golden["eps_strength_06"]) < 2e-5
        assert error(prediction(soft=True), golden["eps_guess"]) < 2e-5
        assert error(prediction(0.0), golden["eps_plain"]) < 2e-5
        assert error(unet(x, t, conditioning, (), residuals.middle), golden["eps_mid"]) < 2e-5


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "name", ["control_ddim_s10", "control_ddim_s10_guess", "control_ddim_s10_strength06", "control_v_ddim_s10"]
)
def test_ddim_runs(networks, name):
    golden = Golden(name)
    unet, control, config = networks[golden.case["manifest"]]
    case, schedule, contexts = golden.case, Schedule(config.schedule), Golden(golden.case["contexts"])
    hint, asked = hint_of(golden, (2, 3, 128, 192)), []
    network = with_control(unet, control, hint, case["strength"], guess=case["guess_mode"])

    def watched(x, t, conditioning):
        asked.append(float(t[0]))
        return network(x, t, conditioning)

    cond, uncond = (Conditioning(contexts[name]) for name in ("cond", "uncond"))
    denoise = Denoiser(watched, schedule, cond, uncond, case["scale"])
    with torch.no_grad():
        steps = list(SAMPLERS["ddim"].run(denoise, golden["x_T"], schedule.levels(10, "leading")))
    assert asked == case["t_calls"]
    for i in (2, 5, 7):
        assert error(steps[i - 1].x, golden[f"mid.after_step_{i}"]) < 1e-4
    assert error(steps[0].x0, golden["mid.pred_x0_step_1"]) < 1e-4
    assert error(steps[-1].x, golden["out"]) < 1e-4


# --------------------------------------------------------------------------------------------------- composition


def test_several_controls_add_up(networks):
    """Nested, in one list, or by hand: the same."""
    unet, control, _ = networks["tiny-control-v1"]
    other = silent(control)
    other.zero_mid.bias.data.fill_(0.1)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([500.0, 3.0])
    conditioning = Conditioning(torch.randn(2, 77, 64))
    one, two = torch.rand(1, 3, 64, 64), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        nested = with_control(with_control(unet, control, one, 0.5), other, two, 2.0)(x, t, conditioning)
        a = control(x, t, conditioning, control.embed(one))
        b = other(x, t, conditioning, other.embed(two))
        down = [0.5 * r + 2 * s for r, s in zip(a.down, b.down, strict=True)]
        by_hand = unet(x, t, conditioning, down, 0.5 * a.middle + 2 * b.middle)
        hints = [AppliedControl(control, control.embed, one, 0.5), AppliedControl(other, other.embed, two, 2.0)]
        listed = controlled(unet, hints)(x, t, conditioning)
        alone = with_control(unet, control, one, 0.5)(x, t, conditioning)
    assert error(nested, by_hand) < 1e-6 and error(listed, by_hand) < 1e-6
    assert error(alone, by_hand) > 1e-4


def test_hint_block_runs_once(networks):
    unet, control, _ = networks["tiny-control-v1"]
    calls = []

    def embed(hint):
        calls.append(hint.shape)
        return control.embed(hint)

    network = controlled(unet, [AppliedControl(control, embed, torch.rand(1, 3, 64, 64))])
    with torch.no_grad():
        for batch in (1, 2, 4):
            network(torch.randn(batch, 4, 8, 8), torch.full((batch,), 500.0), Conditioning(torch.randn(batch, 77, 64)))
    assert calls == [(1, 3, 64, 64)]


def test_guess_mode_controls_predictions_with_a_prompt_only(networks):
    """Without guidance, and with several prompts joined by AND, as well."""
    unet, control, _ = networks["tiny-control-v1"]
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    contexts, hint = [Conditioning(torch.randn(1, 77, 64)) for _ in range(3)], torch.rand(1, 3, 64, 64)
    guess = with_control(unet, control, hint, guess=True)
    with torch.no_grad():
        plain = [unet(x, t, context) for context in contexts]
        alone = [guess(x, t, context) for context in contexts]
        together = guess(x.repeat(3, 1, 1, 1), t.repeat(3), Conditioning.joined(contexts)).split(1)
    assert error(together[0], plain[0]) < 1e-5
    assert all(error(a, b) < 1e-5 for a, b in zip(together[1:], alone[1:], strict=True))
    assert error(alone[1], plain[1]) > 1e-2


def test_pooled_residuals_have_no_place(networks):
    _, control, _ = networks["tiny-control-v1"]
    pooled = replaced(control, pooled=True)
    x, t, conditioning = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), Conditioning(torch.randn(1, 77, 64))
    with torch.no_grad():
        features = control.embed(torch.rand(1, 3, 64, 64))
        plain, mean = control(x, t, conditioning, features), pooled(x, t, conditioning, features)
    for a, b in zip((*plain.down, plain.middle), (*mean.down, mean.middle), strict=True):
        assert b.shape == (*a.shape[:2], 1, 1) and error(b, a.mean(dim=(2, 3), keepdim=True)) < 1e-6


def replaced(control, **values):
    """A copy with other values in its config."""
    other = silent(control)
    other.load_state_dict(control.state_dict())
    other.control_config = replace(control.control_config, **values)
    return other


def test_pooled_networks_control_predictions_with_a_prompt_only(model, networks):
    """As in the original code and in diffusers, in every mode."""
    unet, control, _ = networks["tiny-control-v1"]
    pooled = replaced(control, pooled=True)
    x, t, hint = torch.randn(2, 4, 8, 8), torch.tensor([9.0, 9.0]), torch.rand(1, 3, 64, 64)
    conditioning = Conditioning(torch.randn(2, 77, 64))
    with torch.no_grad():
        plain, both = unet(x, t, conditioning), with_control(unet, pooled, hint)(x, t, conditioning)
        unguided = with_control(unet, pooled, hint, images=2)(x, t, conditioning)
    assert error(both[:1], plain[:1]) < 1e-6 and error(both[1:], plain[1:]) > 1e-2
    assert all(error(a, b) > 1e-2 for a, b in zip(unguided.split(1), plain.split(1), strict=True))
    made, batches = copy.copy(model), []
    made._controls = {}
    made.add_control(pooled, "shuffle")
    handle = made.control_network("shuffle").network.register_forward_hook(lambda m, a, o: batches.append(len(a[0])))
    try:
        made.txt2img("a", controls=Control("shuffle", lines()), **SIZE)
    finally:
        handle.remove()
    assert batches == [1, 1, 1]


# ------------------------------------------------------------------------------------------------------ requests


def test_runs_are_controlled_as_the_wrapper_is(model):
    """A request gives what its parts give when they are put together by hand."""
    control, hint = control_network(), pil(torch.rand(1, 3, 64, 64))
    request = TextToImage.of("a cube", "blue", controls=Control("edges", hint, 0.7), sampler="ddim", seed=3, **SIZE)
    run = model.prepare(request)
    x = run.start.x.clone()
    for _ in run:
        pass
    tensor = torch.from_numpy(pixels(hint)).permute(2, 0, 1)[None] / 255
    denoise = model.denoiser(
        model.conditioning(["a cube"]),
        model.conditioning(["blue"]),
        network=with_control(model.unet, control, tensor, 0.7),
    )
    *_, last = model.sample(denoise, x, run.levels, "ddim")
    assert error(run.x, last.x) < 1e-5


def test_scale_and_silence(model):
    plain = model.txt2img("a cube", **SIZE)[0]
    for control in (Control("silent", lines()), Control("edges", lines(), scale=0.0)):
        assert difference(model.txt2img("a cube", controls=[control], **SIZE)[0], plain) < 0.05
    assert difference(model.txt2img("a cube", controls=[Control("edges", lines())], **SIZE)[0], plain) > 1


@pytest.mark.parametrize(
    "start, end, followed",
    [(0, 1, [1, 1, 1, 1]), (0, 0.5, [1, 1, 0, 0]), (0.5, 1, [0, 0, 1, 1]), (0.3, 0.8, [0, 0, 1, 0]), (0.9, 1, [0] * 4)],
)
def test_share_of_the_steps(model, start, end, followed):
    """diffusers' rule: a step is controlled if all of it lies within the fractions."""
    calls = []
    network = model.control_network("edges").network
    handle = network.register_forward_hook(lambda *_: calls.append(len(calls)))
    try:
        run = model.prepare(
            TextToImage.of("a", controls=Control("edges", lines(), 1, start, end), **SIZE | {"steps": 4})
        )
        seen = []
        for _ in run:
            seen.append(len(calls))
    finally:
        handle.remove()
    assert np.diff([0, *seen]).tolist() == followed


def test_modes(model):
    """All differ; only "control" leaves the prediction without the prompt as it is."""
    batches = []
    network = model.control_network("edges").network
    handle = network.register_forward_hook(lambda module, args, out: batches.append(args[0].shape[0]))
    images = {}
    try:
        for mode in ("balanced", "prompt", "control"):
            images[mode] = model.txt2img("a", controls=Control("edges", lines(), mode=mode), n=2, **SIZE)[1]
    finally:
        handle.remove()
    assert batches == [4] * 6 + [2] * 3
    assert all(difference(images["balanced"], images[mode]) > 0.5 for mode in ("prompt", "control"))
    assert difference(images["prompt"], images["control"]) > 0.5


@pytest.mark.parametrize("mode", ["balanced", "control"])
def test_an_image_of_a_batch_is_the_image_alone(model, mode):
    settings = {"controls": Control("edges", lines(), mode=mode), **SIZE}
    both = model.txt2img("a cube", n=2, exact=True, **settings)
    alone = model.txt2img("a cube", seed=1, exact=True, **settings)[0]
    assert both[1].tobytes() == alone.tobytes()
    assert difference(model.txt2img("a cube", n=2, **settings)[1], alone) < 0.1


@pytest.mark.parametrize("mode", ["balanced", "prompt", "control"])
def test_cached_steps_run_no_control_network(model, mode):
    """But its first convolution: with an interval of 3, two of six steps run the whole."""
    calls = []
    network = model.control_network("edges").network
    handle = network.register_forward_hook(lambda *_: calls.append(1))
    settings = {"controls": Control("edges", lines(), 0.5, mode=mode), **SIZE, "steps": 6}
    try:
        cached = model.txt2img("a", cache_interval=3, **settings)[0]
    finally:
        handle.remove()
    assert len(calls) == 2
    assert difference(cached, model.txt2img("a", cache_interval=3, **SIZE | {"steps": 6})[0]) > 0.5


@pytest.mark.parametrize("options", [{}, {"soft": True}, {"guess": True, "soft": True}])
def test_the_first_residual_alone(networks, options):
    """As in a cached step: the same as with the others, with guidance as well."""
    _, control, _ = networks["tiny-control-v1"]
    x, t, conditioning = torch.randn(2, 4, 8, 8), torch.tensor([9.0, 9.0]), Conditioning(torch.randn(2, 77, 64))
    for network in (control, replaced(control, pooled=True)):
        both = [
            AppliedControl(
                network, network.embed, torch.rand(1, 3, 64, 64), scale, images=1, first=network.first, **options
            )
            for scale in (0.5, 0.0, 2.0)
        ]
        with torch.no_grad():
            residuals = SummedControls(both)
            everything, first = residuals(x, t, conditioning), residuals.first(x, t, conditioning)
        assert error(first, everything.down[0]) < 1e-6
        nothing = SummedControls(both[1:2])
        assert nothing(x, t, conditioning) is None and nothing.first(x, t, conditioning) is None


def test_with_the_other_wrappers(model):
    """Cached evaluations, images without seams, AND, steps without guidance: each with the hint and without differ."""
    for more in (
        {"cache_interval": 2}, {"tileable": True}, {"guidance_until": 0.5}, {"guidance": 1},
        {"prompt": "a cube AND a ball", "web_ui_prompts": True}, {"sampler": "heun"}, {"prompt": ["a cube", "a ball"]},
    ):  # fmt: skip
        settings = {"prompt": "a cube", **SIZE, **more}
        controlled_image = model.txt2img(controls=Control("edges", lines()), **settings)[0]
        assert difference(controlled_image, model.txt2img(**settings)[0]) > 0.5, more


def test_caching_the_first_call_is_exact(model):
    settings = {"controls": Control("edges", lines()), **SIZE, "steps": 1}
    assert difference(model.txt2img("a", cache_interval=2, **settings)[0], model.txt2img("a", **settings)[0]) == 0


def test_hints_of_a_second_pass(model):
    """At high resolution the hint is placed anew at the larger size."""
    sizes = []
    network = model.control_network("edges").network
    handle = network.hint.register_forward_hook(lambda module, args, out: sizes.append(tuple(args[0].shape[-2:])))
    try:
        model.txt2img("a", controls=Control("edges", lines(32, 32)), hires=1.5, **SIZE)
    finally:
        handle.remove()
    assert sizes == [(64, 64), (96, 96)]


def test_inpainting_model_takes_hints(tiny_inpaint):
    """Its U-Net has nine channels, a control network sees the latent alone."""
    made = copy.copy(tiny_inpaint)
    made._controls = {}
    made.add_control(copy.deepcopy(control_network()), "edges")
    photo, mask = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64), 255)
    settings = {"steps": 2, "seed": 1}
    plain = made.inpaint("a", photo, mask, **settings)[0]
    assert difference(made.inpaint("a", photo, mask, controls=Control("edges", lines()), **settings)[0], plain) > 1


# ------------------------------------------------------------------------------------------------ hints as images


def seen_hint(model, request) -> np.ndarray:
    """The hint (H, W) as the control network sees it, of 255."""
    hints = []
    network = model.control_network("edges").network
    handle = network.hint.register_forward_hook(lambda module, args, out: hints.append(args[0]))
    try:
        next(model.prepare(request))
    finally:
        handle.remove()
    return (255 * hints[0][0, 0]).round().numpy().astype(int)


def ramp(width: int, height: int) -> Image.Image:
    """Grey that says where a pixel is: rows from top to bottom."""
    return Image.fromarray(np.tile(np.linspace(0, 255, height).astype(np.uint8)[:, None], (1, width)))


def test_hints_are_cropped_or_padded(model):
    def seen(hint, **fit):
        control = Control("edges", hint, **fit)
        run = model.prepare(TextToImage.of("a", controls=control, height=64, width=64, steps=1))
        return seen_hint(model, run.request), [note for note in run.notes if "cut off" in note]

    whole, notes = seen(ramp(64, 64))
    assert whole[0, 0] == 0 and whole[-1, 0] == 255 and not notes
    cropped, notes = seen(ramp(64, 128))
    assert cropped[0, 0] > 50 and cropped[-1, 0] < 205 and notes == ["control edges: 50 % of the hint is cut off"]
    padded, notes = seen(ramp(32, 64), fit="pad")
    assert (padded[:, :16] == 0).all() and (padded[:, 48:] == 0).all() and padded[-1, 32] == 255 and not notes


def test_hints_go_with_the_image(model):
    """Image to image crops or pads the hint as it does the image; inpainting shows the region around the mask."""
    photo = Image.new("RGB", (64, 128), "red")
    control = Control("edges", ramp(32, 64))  # half the size of the photo
    seen = seen_hint(model, ImageToImage.of("a", image=photo, controls=control, height=64, width=64, steps=4))
    assert seen[0, 0] > 50 and seen[-1, 0] < 205
    padded = ImageToImage.of("a", image=photo, controls=control, height=64, width=64, steps=4, fit="pad")
    seen = seen_hint(model, padded)
    assert (seen[:, :16] == 0).all() and seen[-1, 32] == 255
    mask = Image.new("L", photo.size)
    mask.paste(255, (0, 64, 64, 128))  # the lower half
    request = Inpaint.of("a", image=photo, mask=mask, margin=0, controls=control, height=64, width=64, steps=2)
    seen = seen_hint(model, request)
    assert 120 < seen[0, 0] < 135 and seen[-1, 0] == 255


def test_hints_of_another_shape_than_the_image_are_noted(model):
    photo = Image.new("RGB", (64, 64), "red")
    for request in (
        ImageToImage.of("a", image=photo, controls=Control("edges", ramp(32, 64)), steps=4),
        Inpaint.of("a", image=photo, mask=photo.convert("L"), controls=Control("edges", ramp(32, 64)), steps=4),
    ):
        assert "control edges: 50 % of the hint is cut off" in model.prepare(request).notes


def test_a_share_of_the_steps_that_is_less_than_one_is_noted(model):
    settings = {"height": 64, "width": 64, "steps": 4}
    run = model.prepare(TextToImage.of("a", controls=Control("edges", lines(), end=0.2), **settings))
    assert run.notes == ["control edges: 0 to 0.2 of 4 steps is less than one step: none is controlled"]
    run = model.prepare(TextToImage.of("a", controls=Control("edges", lines(), 0.0, end=0.2), **settings))
    assert not run.notes  # of scale 0, which asks for nothing


def test_colour_profiles_are_for_pictures():
    """The numbers of a depth map or of directions mean what they are."""
    from PIL import ImageCms

    grey = Image.new("RGB", (8, 8), (100, 50, 200))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    grey.info["icc_profile"] = profile.tobytes()
    assert hint_image(grey).getpixel((0, 0)) == (100, 50, 200)


def test_kinds_of_hints():
    white = np.zeros((8, 8, 4), np.uint8)
    white[:, 4:] = 255
    transparent = hint_image(Image.fromarray(white, "RGBA"))
    assert transparent.getpixel((0, 0)) == (0, 0, 0) and transparent.getpixel((7, 7)) == (255, 255, 255)
    deep = Image.fromarray(np.full((8, 8), 65535, np.uint16))
    assert hint_image(deep).getpixel((0, 0)) == (255, 255, 255)
    assert hint_image(Image.new("L", (4, 4), 100)).getpixel((0, 0)) == (100, 100, 100)
    assert placed(Image.new("RGB", (8, 8), "white"), 16, 8, "pad").getpixel((0, 0)) == (0, 0, 0)


def test_inverted_lines_are_noticed(model):
    assert looks_inverted(lines(invert=True)) and not looks_inverted(lines())
    assert not looks_inverted(ramp(64, 64).convert("RGB"))  # a depth map
    assert not looks_inverted(Image.new("RGB", (64, 64), (128, 128, 255)))  # of a surface that faces the viewer
    run = model.prepare(TextToImage.of("a", controls=Control("edges", lines(invert=True)), **SIZE))
    (note,) = run.notes
    assert note.startswith("control edges: the hint looks like black lines on white") and "invert it" in note
    inverted = Control("edges", lines(invert=True), annotate="invert")
    run = model.prepare(TextToImage.of("a", controls=inverted, **SIZE))
    assert not run.notes
    seen = seen_hint(model, run.request)
    assert (seen == np.asarray(lines().convert("L"))).all()
    wide = Control("edges", lines(64, 32, invert=True), annotate="invert", fit="pad")
    assert not seen_hint(model, TextToImage.of("a", controls=wide, **SIZE))[:16].any()  # black around it


def test_pictures_in_place_of_lines_are_noticed(model):
    picture = ramp(64, 64)
    (note,) = model.prepare(TextToImage.of("a", controls=Control("edges", picture), **SIZE)).notes
    assert note.startswith("control edges: the hint looks like a picture, not like lines") and "canny" in note
    assert not model.prepare(TextToImage.of("a", controls=Control("silent", picture), **SIZE)).notes  # may be depth


# --------------------------------------------------------------------------------------- values and refused input


def test_requests_are_serialised():
    control = Control("edges", lines(), 0.5, 0.1, 0.9, "prompt", "pad")
    request = TextToImage.of("a house", controls=[control, Control("depth", ramp(8, 8))], steps=3)
    back = from_dict(request.to_dict())
    assert [(c.name, c.scale, c.start, c.end, c.mode, c.fit) for c in back.controls] == [
        ("edges", 0.5, 0.1, 0.9, "prompt", "pad"),
        ("depth", 1.0, 0.0, 1.0, "balanced", "crop"),
    ]
    assert all(a.image.tobytes() == b.image.tobytes() for a, b in zip(back.controls, request.controls, strict=True))
    assert TextToImage.of("a", controls=control).controls == (control,)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scale": float("nan")}, "control edges: scale must be a finite number, got nan"),
        ({"scale": "much"}, "control edges: scale must be a number, got 'much'"),
        ({"start": 0.8, "end": 0.2}, "it begins at 0.8 of the steps and ends at 0.2: the first must be smaller"),
        ({"end": 1.5}, r"control edges: end must be in \[0, 1\], got 1.5"),
        ({"mode": "mine"}, "control edges: unknown mode 'mine', expected one of balanced, prompt, control"),
        ({"fit": "stretch"}, "control edges: unknown fit 'stretch', expected one of crop, pad"),
        ({"image": "edges.png"}, "control edges: the hint must be a PIL image, got str"),
        ({"image": None}, "control edges: the hint must be a PIL image, got NoneType"),
        ({"name": ""}, "a control needs the name of a control network, got ''"),
    ],
)
def test_refused_settings(change, message):
    with pytest.raises(ValueError, match=message):
        Control(**{"name": "edges", "image": lines(), **change})


def test_refused_controls(model):
    with pytest.raises(
        ValueError, match=r"no control network 'depth' \(it has edges, silent\): add it with add_control"
    ):
        model.txt2img("a", controls=Control("depth", lines()), **SIZE)
    for value in ("edges", [lines()], 3):
        with pytest.raises(ValueError, match="controls must be a Control or a list of them"):
            model.txt2img("a", controls=value, **SIZE)
    with pytest.raises(ValueError, match="there is a control network 'edges' already"):
        model.add_control(silent(control_network()), "edges")
    with pytest.raises(ValueError, match="is for another U-Net than tiny v1's"):
        model.add_control(control_network("tiny-control-v2", TINY_V2))
    with pytest.raises(ValueError, match="its hint block reduces hints to 1/4, the model's VAE images to 1/8"):
        model.add_control(ControlNet(ControlConfig.of(TINY.unet, hint=(16, 32, 96))), "coarse")
    with pytest.raises(ValueError, match=r"control edges: the hint: .*infinite or NaN"):
        model.txt2img("a", controls=Control("edges", Image.new("F", (64, 64), float("nan"))), **SIZE)
    with pytest.raises(ValueError, match="a hint must be"):
        control_network().embed(torch.rand(1, 3, 60, 64))


def test_a_network_in_training_is_copied(model):
    """One in another precision as well; one that can be used as it is, is."""
    made = copy.copy(model)
    made._controls = {}
    trained = silent(control_network()).train().requires_grad_(True)
    made.add_control(trained, "trained")
    assert trained.training and all(weight.requires_grad for weight in trained.parameters())
    assert not any(weight.requires_grad for weight in made.control_network("trained").network.parameters())
    made.add_control(silent(control_network()).bfloat16(), "other")
    made.txt2img("a", controls=[Control("trained", lines()), Control("other", lines())], **SIZE)
    ready = silent(control_network())
    made.add_control(ready, "ready")
    assert made.control_network("ready").network is ready


def test_adding_and_removing(tiny):
    made = StableDiffusion(TINY, **tiny)
    assert made.add_control(silent(control_network())) == "tiny-control-v1"
    made.add_control(silent(control_network()), "other")
    assert list(made.controls) == ["tiny-control-v1", "other"]
    made.remove_control("other")
    assert list(made.controls) == ["tiny-control-v1"]
    made.remove_control()
    assert not made.controls
    with pytest.raises(ValueError, match=r"no control network 'other' \(it has none\)"):
        made.remove_control("other")
