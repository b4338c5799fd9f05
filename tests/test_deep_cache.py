"""DeepCache: which calls run the whole U-Net, that these are exact, and whose features the others use."""

from __future__ import annotations

import copy

import pytest
import torch
from common import TINY, error, tiny_state
from conftest import loaded
from PIL import Image
from test_cuda_graphs import Tape, inputs

from scripts import txt2img
from sd.conditioning import Conditioning
from sd.config import SD1
from sd.models.unet import UNet
from sd.params import HighRes, ImageToImage, Inpaint, TextToImage, from_dict
from sd.pipeline import StableDiffusion
from sd.runtime import packing
from sd.runtime.cuda_graphs import Compiled, Recorded
from sd.runtime.deep_cache import Deep, DeepCache, shallow

SIZE = {"height": 64, "width": 64, "seed": 3}
EULER = {"sampler": "euler", **SIZE}
PHOTO = Image.effect_noise((64, 64), 60).convert("RGB")
MASK = Image.new("L", (64, 64))
MASK.paste(255, (16, 16, 48, 48))


@pytest.fixture
def passes(monkeypatch):
    """Runs a request; gives a letter for each call, W for the whole network and l for its last block, and the image."""

    def run(model, request):
        seen, unet = [], model.unet
        contract, end = unet.contract, unet.end
        with monkeypatch.context() as patch:
            patch.setattr(unet, "contract", lambda x, *more: seen.append("deep") or contract(x, *more))
            patch.setattr(unet, "end", lambda x: seen.append(len(x)) or end(x))
            run = model.prepare(request)
            images = run.result().images
        text, whole = "", False
        for what in seen:
            if what == "deep":
                whole = True
            else:
                text, whole = text + f"{'W' if whole else 'l'}{what} ", False
        return text.strip(), images

    return run


def around(network):
    """As `StableDiffusion.predict`, without a model."""
    return lambda x, t, conditioning, wrap: wrap(network)(x, t, conditioning)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("interval", "calls"), [(1, "W2 W2 W2 W2 W2"), (2, "W2 l2 W2 l2 W2"), (3, "W2 l2 l2 W2 l2")])
def test_every_kth_call_is_the_whole_network(tiny_sd, passes, interval, calls):
    request = TextToImage.of("a", cache_interval=interval, steps=5, **EULER)
    assert passes(tiny_sd, request)[0] == calls
    assert passes(tiny_sd, request)[0] == calls  # nothing is left of a run


@pytest.mark.exhaustive
def test_whole_calls_are_exact_and_others_have_the_features_of_the_last_one(tiny):
    unet = tiny["unet"]
    network, every = DeepCache(around(unet), 2), DeepCache(around(unet), 1)
    for seed in range(4):
        given = inputs(seed)
        out = network(*given)
        assert torch.equal(every(*given), unet(*given))
        if seed % 2 == 0:
            assert torch.equal(out, unet(*given))
            features = Deep(unet)(*given)
        else:
            assert torch.equal(out, shallow(unet, *given, features)) and error(out, unet(*given)) > 1e-3


def test_interval_1_is_the_image_without_a_cache(tiny_sd):
    plain, one, two = (
        tiny_sd.txt2img("a", steps=3, **EULER, **more)[0].tobytes()
        for more in ({}, {"cache_interval": 1}, {"cache_interval": 2})
    )
    assert plain == one != two


def test_another_shape_runs_the_whole_network(tiny):
    unet = tiny["unet"]
    network = DeepCache(around(unet), 9)
    for given in (inputs(1), inputs(2, B=1), inputs(3, size=9), inputs(4, size=8)):
        assert torch.equal(network(*given), unet(*given))
    assert not torch.equal(network(*inputs(5)), unet(*inputs(5)))


def test_calls_are_counted_where_a_sampler_evaluates_twice(tiny_sd, passes):
    request = TextToImage.of("a", cache_interval=2, steps=2, **SIZE, sampler="heun")
    assert passes(tiny_sd, request)[0] == "W2 l2 W2"


def test_steps_without_guidance_have_features_of_their_own(tiny_sd, passes):
    request = TextToImage.of("a", cache_interval=3, guidance_until=0.5, steps=4, **EULER)
    assert passes(tiny_sd, request)[0] == "W2 l2 W1 l1"


def test_prompts_that_change_have_features_of_their_own(tiny_sd, passes):
    settings = {"cache_interval": 2, "web_ui_prompts": True, **EULER}
    assert passes(tiny_sd, TextToImage.of("[a:b:1]", steps=4, **settings))[0] == "W2 l2 W2 l2"
    request = TextToImage.of("[a|b]", steps=6, **settings)
    guides = [id(guide) for guide in tiny_sd.prepare(request).guides]
    calls = ["l2" if guides[:i].count(guide) % 2 else "W2" for i, guide in enumerate(guides)]
    assert len(set(guides)) == 2 and passes(tiny_sd, request)[0] == " ".join(calls)


def test_the_other_tasks(tiny_sd, tiny_inpaint, passes):
    settings = {"cache_interval": 2, "steps": 4, **EULER}
    assert passes(tiny_sd, ImageToImage.of("a", image=PHOTO, strength=0.75, **settings))[0] == "W2 l2 W2"
    assert passes(tiny_sd, HighRes.of("a", hires=1.25, hires_steps=2, **settings))[0] == "W2 l2 W2 l2 W2 l2"
    for model in (tiny_sd, tiny_inpaint):
        assert passes(model, Inpaint.of("a", image=PHOTO, mask=MASK, **settings))[0] == "W2 l2 W2 l2"


def test_exact_batches_are_images_alone(tiny_sd, passes):
    """Each image has features of its own."""
    settings = {"cache_interval": 2, "steps": 3, **EULER}
    calls, images = passes(tiny_sd, TextToImage.of("a", n=2, exact=True, tileable=True, **settings))
    assert calls == "W2 W2 l2 l2 W2 W2"
    for i, image in enumerate(images):
        (alone,) = tiny_sd.txt2img("a", tileable=True, **settings | {"seed": 3 + i})
        assert alone.tobytes() == image.tobytes()


def test_runs_at_once_do_not_share_features(tiny_sd):
    requests = [TextToImage.of(prompt, cache_interval=3, steps=4, **EULER) for prompt in ("a cube", "a tree")]
    alone = [tiny_sd.prepare(request).result().images[0].tobytes() for request in requests]
    runs = [tiny_sd.prepare(request) for request in requests]
    for _ in zip(*runs, strict=True):
        pass
    assert [run.result().images[0].tobytes() for run in runs] == alone


@pytest.fixture
def unpacked(monkeypatch):
    """As on a GPU: no layouts of oneDNN, which have no address."""
    monkeypatch.setattr(packing, "onednn_dtypes", frozenset)


def test_the_deep_part_is_recorded_once_for_all_runs(unpacked):
    unet, tape = loaded(tiny_state(), TINY)["unet"], Tape()
    recorded = Recorded(unet, tape)
    for _ in range(2):
        network, plain = DeepCache(around(recorded), 2), DeepCache(around(unet), 2)
        for seed in range(4):
            assert torch.equal(network(*inputs(seed)), plain(*inputs(seed)))
    assert (tape.recorded, tape.played) == (1, 4)
    with torch.no_grad():  # other weights at another address, as after a LoRA
        unet.mid.res[0] = copy.deepcopy(unet.mid.res[0])
        unet.mid.res[0].conv1.weight.mul_(2)
    assert torch.equal(DeepCache(around(recorded), 2)(*inputs(1)), unet(*inputs(1))) and tape.recorded == 2
    assert copy.copy(recorded).part(Deep) is not recorded.part(Deep)


def test_the_deep_part_is_compiled(unpacked, monkeypatch):
    unet = loaded(tiny_state(), TINY)["unet"]
    compiled, made = Compiled(unet), []
    monkeypatch.setattr(torch, "compile", lambda net, **options: made.append(type(net)) or net)
    network = DeepCache(around(compiled), 2)
    assert torch.equal(network(*inputs(1)), unet(*inputs(1)))
    network(*inputs(2))
    DeepCache(around(compiled), 2)(*inputs(1))
    assert made == [Deep] and compiled(*inputs(1)).equal(unet(*inputs(1))) and made == [Deep, UNet]


def test_low_memory_gives_the_same_image():
    settings = {"steps": 3, "cache_interval": 2, "seed": 3}
    images = [
        StableDiffusion.load(device="cpu", dtype="float32", low_memory=low).txt2img("a house", **settings)[0].tobytes()
        for low in (False, True)
    ]
    assert images[0] == images[1]


def test_networks_without_parts_are_refused_in_a_line():
    network = DeepCache(around(torch.nn.Identity()), 2)
    with pytest.raises(ValueError, match=r"^cache_interval needs a UNet, whose parts it runs, and not a Identity: "):
        network(*inputs(1))
    with pytest.raises(ValueError, match=r"^cache_interval must be at least 1, got 0$"):
        DeepCache(around(None), 0)


def test_gradients_reach_x_in_each_call(tiny):
    network = DeepCache(around(tiny["unet"]), 2)
    with torch.enable_grad():
        for seed in range(2):
            x, t, conditioning = inputs(seed)
            network(x.requires_grad_(), t, conditioning).sum().backward()
            assert x.grad.abs().sum() > 0


def test_requests_keep_it_and_refuse_what_is_no_interval():
    request = TextToImage.of("a", cache_interval=3)
    assert from_dict(request.to_dict()) == request and request.params.cache_interval == 3
    for value, message in ((0, "at least 1, got 0"), (2.5, "a whole number, got 2.5"), (True, "a whole number")):
        with pytest.raises(ValueError, match=f"^cache_interval must be {message}"):
            TextToImage.of("a", cache_interval=value)


def test_the_program_takes_it(tmp_path, monkeypatch, capsys):
    calls, end = [], UNet.end
    monkeypatch.setattr(UNet, "end", lambda self, x: calls.append(len(x)) or end(self, x))
    contract = UNet.contract
    monkeypatch.setattr(UNet, "contract", lambda self, x, *more: calls.append("deep") or contract(self, x, *more))
    out = tmp_path / "a.png"
    given = ["a house", "--steps", "4", "--cache-interval", "2", "--guidance-until", "0.5", "--seed", "1"]
    assert txt2img.main([*given, "--device", "cpu", "--out", str(out)]) == 0
    assert calls == ["deep", 2, 2, "deep", 1, 1]
    with Image.open(out) as image:
        assert "Guidance until: 0.5, Cache interval: 2" in image.text["parameters"]
    assert txt2img.main(["a house", "--cache-interval", "0", "--device", "cpu", "--out", str(out)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: cache_interval must be at least 1, got 0"


@pytest.mark.exhaustive
def test_a_call_in_between_takes_a_twelfth_at_full_size():
    """By its operations; docs/performance.md says so."""
    counter = pytest.importorskip("torch.utils.flop_counter").FlopCounterMode
    with torch.device("meta"):
        unet = UNet(SD1.unet)
        given = torch.empty(2, 4, 64, 64), torch.empty(2), Conditioning(torch.empty(2, 77, 768))

    def work(network, *inputs) -> tuple[int, torch.Tensor]:
        with counter(display=False) as count:
            out = network(*inputs)
        return count.get_total_flops(), out

    whole, _ = work(unet, *given)
    deep, features = work(Deep(unet), *given)
    last, _ = work(shallow, unet, *given, features)
    assert features.shape == (2, 320, 64, 64)
    assert 0.07 < last / whole < 0.085 and abs(deep + last - whole) / whole < 0.001
