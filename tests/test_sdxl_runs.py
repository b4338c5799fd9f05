"""Every task and setting of a run with SDXL in small."""

from __future__ import annotations

import pytest
import torch
from common import error
from sdxl_common import (
    finish,
    guide_of,
    half_mask,
    params,
    photo,
    tiny_refiner,
    tiny_xl,
)

from sd import StableDiffusion
from sd.conditioning import Composition
from sd.params import HighRes, Inpaint, TextToImage
from sd.size_conditioning import size_embedding


@pytest.fixture(scope="module")
def base() -> StableDiffusion:
    return tiny_xl()


@pytest.fixture(scope="module")
def refiner() -> StableDiffusion:
    return tiny_refiner()


def test_images_of_a_batch_are_those_alone(base):
    batch = finish(base.prepare(TextToImage("a cat", params(n=3, steps=4, exact=True))))
    for i in range(3):
        alone = finish(base.prepare(TextToImage("a cat", params(seed=3 + i, steps=4, exact=True))))
        assert torch.equal(batch[i : i + 1], alone)


def test_prompts_joined_by_and(base):
    """Two halves of one prompt are that prompt; the parts have vectors of their own."""
    one = finish(base.prepare(TextToImage("a cat", params(), web_ui_prompts=True)))
    run = base.prepare(TextToImage("a cat :0.5 AND a cat :0.5", params(), web_ui_prompts=True))
    assert error(finish(run), one) < 1e-4
    both = guide_of(base, TextToImage("a cat AND a dog", params(), web_ui_prompts=True))
    assert isinstance(both.cond, Composition) and not both.uncond.context.any()
    for part, text in zip(both.cond.parts, ("a cat", "a dog"), strict=True):
        assert torch.equal(part.vector, guide_of(base, TextToImage(text, params())).cond.vector)


def test_prompts_that_change(base):
    run = base.prepare(TextToImage("a [cat:dog:0.5]", params(), web_ui_prompts=True))
    for guide, text in ((run.guides[5], "a cat"), (run.guides[6], "a dog")):
        wanted = guide_of(base, TextToImage(text, params())).cond
        assert torch.equal(guide.cond.vector, wanted.vector) and error(guide.cond.context, wanted.context) < 1e-6
    assert torch.isfinite(finish(run)).all()


def test_weights_and_long_prompts(base):
    """Weights change the context and not the pooled text, which is that of the first chunk."""
    plain, weighted = (
        guide_of(base, TextToImage(text, params(), web_ui_prompts=True)).cond
        for text in ("a red cat", "a (red:1.4) cat")
    )
    assert error(plain.vector, weighted.vector) < 1e-6 and error(weighted.context, plain.context) > 1e-3
    long = guide_of(base, TextToImage("a cat BREAK a dog", params(), web_ui_prompts=True))
    assert long.cond.context.shape == long.uncond.context.shape == (1, 2 * 77, 160)
    first, second = (guide_of(base, TextToImage(text, params())).cond for text in ("a cat", "a dog"))
    assert error(long.cond.context, torch.cat([first.context, second.context], dim=1)) < 1e-6
    assert error(long.cond.vector, first.vector) < 1e-6 and not long.uncond.context.any()
    assert torch.isfinite(finish(base.prepare(TextToImage("a cat, " * 60, params(), web_ui_prompts=True)))).all()


def test_an_empty_negative_prompt_is_not_encoded(base):
    """It is zeros; with one that is not empty beside it, and one that becomes empty, only those are."""
    heard = []
    encoders = (base.text_encoder, base.text_encoder_2)
    hooks = [
        encoder.register_forward_hook(lambda module, args, out: heard.append(len(args[0]))) for encoder in encoders
    ]
    for request, counts in (
        (TextToImage("a cat", params()), [1, 1]),
        (TextToImage("a cat", params(), " ", web_ui_prompts=True), [1, 1]),
        (TextToImage(["a cat", "a dog"], params(exact=True), ["", ""]), [1, 1, 1, 1]),
        (TextToImage(["a cat", "a dog"], params(), ["", "fog"]), [2, 2, 2, 2]),
        (TextToImage("a [cat:dog:0.5]", params(), "[fog::0.5]", web_ui_prompts=True), [1] * 6),
        (TextToImage("a cat", params(), "", negative_2="fog"), [1] * 4),
    ):
        heard.clear()
        guides = base.prepare(request).guides
        assert heard == counts
        unconds = [guides[0].uncond, guides[-1].uncond]
        assert [bool(uncond.context[0].any()) for uncond in unconds] == {
            "[fog::0.5]": [True, False], "": [request.negative_2 is not None] * 2,
        }.get(request.negative, [False, False])  # fmt: skip
        assert unconds[-1].context.shape[1:] == (77, 160) and unconds[-1].vector[0, 96:].any()
    for hook in hooks:
        hook.remove()


@pytest.mark.exhaustive
def test_cached_features(base, refiner):
    """The first evaluation is whole, the second reuses it; both models of a run have their own cache."""
    whole, cached = (list(base.prepare(TextToImage("a cat", params(cache_interval=k)))) for k in (1, 2))
    assert torch.equal(whole[0].x0, cached[0].x0) and error(cached[1].x0, whole[1].x0) > 1e-6
    assert error(cached[-1].x, whole[-1].x) < 0.5
    deep = []  # whose lowest blocks run: they are what is reused
    hooks = [
        model.unet.mid.register_forward_hook(lambda *_, name=name: deep.append(name))
        for model, name in ((base, "base"), (refiner, "refiner"))
    ]
    # the base takes three steps; after the third, it would reuse its features
    finish(base.prepare(TextToImage("a cat", params(cache_interval=2, steps=5, refiner_from=0.6)), refiner))
    for hook in hooks:
        hook.remove()
    assert deep == ["base", "base", "refiner"]


def test_tiles(base):
    """A denoiser of a run that is to be tileable does not know where the edges are."""
    run = base.prepare(TextToImage("a cat", params(tileable=True)))
    x, level = run.start.x, run.levels[3]
    shifted = run.start.denoise(torch.roll(x, (4, 8), (2, 3)), level)
    assert error(shifted, torch.roll(run.start.denoise(x, level), (4, 8), (2, 3))) < 1e-5
    flat = base.prepare(TextToImage("a cat", params())).start.denoise
    assert error(flat(torch.roll(x, (4, 8), (2, 3)), level), torch.roll(flat(x, level), (4, 8), (2, 3))) > 1e-3


def test_high_resolution(base):
    run = base.prepare(HighRes("a cat", params(steps=4), hires=1.5, hires_upscaler="latent"))
    assert torch.isfinite(finish(run)).all() and run.result().images[0].size == (96, 96)
    larger = size_embedding(torch.tensor([[96.0, 96, 0, 0, 96, 96]]))
    assert torch.equal(run.second.guides[0].cond.vector[:, 96:], larger)


def test_inpainting_of_four_channels_keeps_what_is_known(base):
    for strength in (1.0, 0.6):
        run = base.prepare(Inpaint("a cat", params(), image=photo(), mask=half_mask(), strength=strength))
        images = run.result().images
        assert images[0].crop((32, 0, 64, 64)).tobytes() == photo().crop((32, 0, 64, 64)).tobytes()
        assert images[0].crop((0, 0, 32, 64)).tobytes() != photo().crop((0, 0, 32, 64)).tobytes()
