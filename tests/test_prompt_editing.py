"""Prompts that change during the steps or consist of several: a table of what the web UI's parser reads, and runs."""

from __future__ import annotations

import copy
import itertools
import time

import pytest
import torch
from common import error
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sd.conditioning import Composition, Conditioning
from sd.denoiser import Denoiser, by_step
from sd.params import ImageToImage, Inpaint, SamplingParams, TextToImage, from_dict
from sd.pipeline import StableDiffusion
from sd.runtime.cuda_graphs import Recorded
from sd.runtime.optimize import restore
from sd.samplers import SAMPLERS
from sd.schedule import Schedule
from sd.text.prompt_editing import all_texts, changes, parse_editing, schedule, text_at
from sd.text.prompt_syntax import check_prompt, read_negative, read_prompt, single_text, texts_of
from sd.text.prompt_tags import lora_weight, take_loras, take_tags

SIZE = {"height": 64, "width": 64, "seed": 3}

# (last step of the text, text) in a run of ten steps. Those of the web UI's own examples are among them.
EDITED = [
    ("test", [(10, "test")]),
    ("", [(10, "")]),
    ("a [b:3]", [(3, "a "), (10, "a b")]),
    ("a [b: 3]", [(3, "a "), (10, "a b")]),
    ("a [b:3 ]", [(3, "a "), (10, "a b")]),
    ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
    ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
    ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
    ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
    ("a [unbalanced", [(10, "a [unbalanced")]),
    ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
    ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
    ("[b::0.4]", [(4, "b"), (10, "")]),
    ("[:b:0.4]", [(4, ""), (10, "b")]),
    ("[[a:b:2]:c:3]", [(2, "a"), (3, "b"), (10, "c")]),
    ("[a:b:2] and [c:d:4]", [(2, "a and c"), (4, "b and c"), (10, "b and d")]),
    # the number
    ("[a:b:12]", [(10, "a")]),
    ("[a:b:1]", [(1, "a"), (10, "b")]),
    ("[a:b:1.0]", [(10, "a")]),
    ("[a:b:2.]", [(10, "a")]),
    ("[a:b:0]", [(10, "b")]),
    ("[a:b:0.0]", [(10, "b")]),
    ("[a:b:-0.5]", [(10, "b")]),
    ("[a:b:-3]", [(10, "b")]),
    ("[a:b:+3]", [(3, "a"), (10, "b")]),
    ("[a:b:1e-1]", [(10, "b")]),  # without a point it is a number of steps
    ("[a:b:1e999]", [(10, "a")]),
    ("[a:b:0.29]", [(2, "a"), (10, "b")]),
    ("[a:b:.5.]", [(10, "[a:b:.5.]")]),
    ("[a:b:five]", [(10, "[a:b:five]")]),
    ("[a:b:٣]", [(10, "[a:b:٣]")]),
    ("[3:4]", [(4, ""), (10, "3")]),
    ("[:2]", [(2, ""), (10, "")]),
    ("[a: :2]", [(2, "a"), (10, " ")]),
    # what is text
    ("[a:b]", [(10, "[a:b]")]),
    ("[a:b:c:2]", [(10, "[a:b:c:2]")]),
    ("[a:b:0.5", [(10, "[a:b:0.5")]),
    ("a:b:3]", [(10, "a:b:3]")]),
    ("(a [b:c:2)", [(10, "(a [b:c:2)")]),
    ("[a:(b:c:1):2]", [(10, "[a:(b:c:1):2]")]),
    ("[a:b:2] | c", [(10, "[a:b:2] | c")]),
    ("[{b|d{:.5]", [(10, "[{b|d{:.5]")]),
    ("[a|b:2]", [(10, "[a|b:2]")]),
    ("(a|b)", [(10, "(a|b)")]),
    ("[a|b|c", [(10, "[a|b|c")]),
    ("[a:b:2]\\", [(10, "[a:b:2]\\")]),
    ("\\[a:b:2\\]", [(10, "\\[a:b:2\\]")]),
    ("a\\[b:c:2]", [(10, "a\\[b:c:2]")]),
    ("\\(a [b:2\\)]", [(10, "\\(a [b:2\\)]")]),
    # what stands beside text that looks like syntax
    ("style: [a:b:3], 16:9", [(3, "style: a, 16:9"), (10, "style: b, 16:9")]),
    ("(x, [a:b:3]", [(3, "(x, a"), (10, "(x, b")]),
    ("x) [a:b:3]", [(3, "x) a"), (10, "x) b")]),
    ("[[b:2]", [(2, "["), (10, "[b")]),
    ("[b:2]]", [(2, "]"), (10, "b]")]),
    ("(x:[b:c:2]:y)", [(2, "(x:b:y)"), (10, "(x:c:y)")]),
    ("[a:(b:1.2):2]", [(2, "a"), (10, "(b:1.2)")]),
    ("[a:b\\:c:2]", [(2, "a"), (10, "b\\:c")]),
    ("[a\n:b:2]", [(2, "a\n"), (10, "b")]),
    ("[日本:東京 🗼:2]", [(2, "日本"), (10, "東京 🗼")]),
]
# the texts for the steps 1 to 6
ALTERNATED = [
    ("[a|b]", "a b a b a b"),
    ("[a|b|c]", "a b c a b c"),
    ("[fe|]male", "female male female male female male"),
    ("[fe|||]male", "female male male male female male"),
    ("[a|(b:1.1)]", "a (b:1.1) a (b:1.1) a (b:1.1)"),
    ("[[a|b]|c]", "a c a c a c"),
    ("[a|[b:c:2]]", "a b a c a c"),
    ("[[a|b]:c:2]", "a b c c c c"),
    ("[a:[b|c]:2]", "a a b c b c"),
    ("[a|b][c|d|e]", "ac bd ae bc ad be"),
]
# (last step of the text, text) in a second pass of six steps, after a first one of ten
SECOND_PASS = [
    ("[a:b:0.5]", [(6, "b")]),
    ("[a:b:1.0]", [(6, "b")]),
    ("[a:b:1.5]", [(3, "a"), (6, "b")]),
    ("[a:b:2.0]", [(6, "a")]),
    ("[a:b:5]", [(6, "b")]),
    ("[a:b:12]", [(2, "a"), (6, "b")]),
    ("[a:b:16]", [(6, "a")]),
]


@pytest.mark.parametrize("prompt, expected", EDITED)
def test_prompt_editing(prompt, expected):
    assert schedule(prompt, 10) == expected


@pytest.mark.parametrize("prompt, expected", ALTERNATED)
def test_alternation(prompt, expected):
    assert [stage.text for stage in schedule(prompt, 6)] == expected.split()
    assert [stage.last for stage in schedule(prompt, 6)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("prompt, expected", SECOND_PASS)
def test_prompt_editing_in_a_second_pass(prompt, expected):
    assert schedule(prompt, 6, first_pass=10) == expected


def test_the_text_of_a_step():
    """The steps are counted from 0: the text up to step 3 is that of four steps, and alternation begins with two."""
    stages = schedule("[a:b:3]", 10)
    assert [text_at(stages, step) for step in range(10)] == ["a"] * 4 + ["b"] * 6
    stages = schedule("[a|b|c]", 7)
    assert "".join(text_at(stages, step) for step in range(7)) == "aabcabc"


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab()[]:|\\.13 ", max_size=40))
def test_any_text_can_be_scheduled(prompt):
    stages = schedule(prompt, 5)
    assert [stage.last for stage in stages] == sorted({stage.last for stage in stages}) and stages[-1].last == 5
    assert changes(prompt) or [stage.text for stage in stages] == [prompt]
    assert parse_editing(prompt) is None or set("".join(stage.text for stage in stages)) <= set(all_texts(prompt))


def test_hostile_prompts_take_no_time():
    started = time.monotonic()
    for prompt in ("[a:" * 150, "[" * 200 + "]" * 200, "[a|b]" * 2000, "[:]" * 10**4, "\\(" * 10**5, "a:" * 10**5):
        schedule(prompt, 20)
    for prompt in ("(" * 10**5, "[a|" * 10**4 + "]" * 10**4):
        with pytest.raises(ValueError, match="more than 200 brackets within each other"):
            schedule(prompt, 20)
    read_prompt("a" + " " * 10**5 + ":" + " " * 10**5 + "x", 20)
    assert time.monotonic() - started < 10


# AND, comments, tags


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("a cat", [("a cat", 1)]),
        ("a cat :1.2 AND a dog :-0.5", [("a cat", 1.2), (" a dog", -0.5)]),
        ("a cat:.5AND b", [("a cat:.5AND b", 1)]),
        ("a AND b AND c:2", [("a", 1), (" b", 1), (" c", 2)]),
        ("AND a", [("", 1), (" a", 1)]),
        ("a and b ANDROID", [("a and b ANDROID", 1)]),
        ("a\nAND\nb : 0.5 \n", [("a", 1), ("\nb", 0.5)]),
        ("(a AND b:1.5)", [("(a", 1), (" b:1.5)", 1)]),  # that is a weight of the text
        ("(a:1.2) :2.", [("(a:1.2)", 2)]),
        ("[a:b:0.5]", [("a", 1)]),
        ("a::3", [("a:", 3)]),
        (":3", [("", 3)]),
        ("a :3x", [("a :3x", 1)]),
        ("a :-", [("a :-", 1)]),
        ("a :1e3", [("a :1e3", 1)]),
        ("a # b AND c", [("a", 1)]),
        ("a, # the first\nb", [("a, \nb", 1)]),
        ("a <lyke:x:1> AND b <y:z>", [("a", 1), (" b", 1)]),
    ],
)
def test_prompts_between_ands(prompt, expected):
    read = read_prompt(prompt, 10, note=lambda message: None)
    assert [(part.stages[0].text, part.weight) for part in read] == expected


def test_what_is_left_out_or_surprising_is_said():
    for prompt, said in (
        ("ratio 16:9", ["the prompt ends in a number after a colon: its weight is 9, as in the web UI"]),
        ("a # b\x07c\nd", ['from # on is a comment and left out: "# b\\x07c"']),
        ("a <hypernet:b:1>", ["<hypernet:b:1> is left out: hypernetworks are not supported"]),
        ("a <lyke:b>", ["<lyke:b> is left out: tags of the kind 'lyke' are not known"]),
        ("[a:b:2] | c", ["prompt editing is read as text, as in the web UI: there is a | outside of [a|b]"]),
        ("a | c, <cat-toy> AND d :2", []),
    ):
        notes: list[str] = []
        read_prompt(prompt, 10, note=notes.append)
        assert len(notes) == len(said) and all(map(str.startswith, notes, said))
    notes.clear()
    assert read_negative("a AND b :2 ", 10, note=notes.append) == [(10, "a AND b :2")]
    assert notes == ["AND in the negative prompt is read as a word, as in the web UI"]


@pytest.mark.parametrize(
    "prompt, message",
    [
        (" AND ".join("a" * 33), "33 prompts are joined by AND, at most 32 can be"),
        ("a :" + "9" * 400, "has 400 digits"),
        ("a <lora:b:0.5>", r"<lora:b:0.5> in the prompt: .* model.add_lora\(path, weight\)"),
        ("[a|(b:1.2.3)]", "'1.2.3' in the prompt is not a number"),
    ],
)
def test_prompts_that_are_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        check_prompt(prompt)


def test_tags():
    prompt = "a <lora:x:0.5>, <hypernet:y> # <lora:z:1>\n<lyco:q> < lora:b> <cat-toy>"
    text, tags = take_tags(prompt)
    assert text == "a ,  # <lora:z:1>\n < lora:b> <cat-toy>" and [tag.name for tag in tags] == ["x", "y", "q"]
    assert take_loras(prompt)[0] == "a , <hypernet:y> # <lora:z:1>\n < lora:b> <cat-toy>"
    assert texts_of("a <lora:x:1> [b:c:2]:3 AND d # e") == ["a   b c", " d"]


@pytest.mark.parametrize(
    "tag, weight",
    [
        ("<lora:x>", 1), ("<lora:x:0.5>", 0.5), ("<lora:x: -1 >", -1), ("<lora:x:0.5:0.5>", 0.5),
        ("<lora:x:te=0.5:unet=.5>", 0.5), ("<lora:x:0.3:unet=0.3>", 0.3),
    ],
)  # fmt: skip
def test_weight_of_a_lora(tag, weight):
    assert lora_weight(take_tags(tag)[1][0]) == weight


@pytest.mark.parametrize(
    "tag, message",
    [
        ("<lora:x:much>", "the weight 'much' is not a number"),
        ("<lora:x:inf>", "the weight 'inf' is not a number"),
        ("<lora:x:>", "the weight '' is not a number"),
        ("<lora:x:1:0.5>", "different weights for the text encoder and the U-Net"),
        ("<lora:x:unet=0.5>", "different weights"),
        ("<lora:x:1:1:8>", "not a rank"),
        ("<lora:x:dyn=8>", "not dyn"),
    ],
)
def test_weights_of_a_lora_that_are_refused(tag, message):
    with pytest.raises(ValueError, match=message):
        lora_weight(take_tags(tag)[1][0])


def test_a_prompt_of_several_texts_has_no_single_context(tiny_sd):
    for prompt in ("a AND b", "a [b:2]", "[a|b]", "a :2"):
        with pytest.raises(ValueError, match="has several contexts"):
            tiny_sd.encode_prompt([prompt], web_ui_prompts=True)
    assert single_text("a\\[b:c:2] ") == "a\\[b:c:2]"


# The denoiser


def test_composition_by_hand():
    """u + guidance sum w (c - u), for each image with its own weights, and at guidance 1."""
    u, a, b = (Conditioning(torch.full((1, 2, 3), value)) for value in (1.0, 2.0, 5.0))
    weights = torch.tensor([[1.0, 0.5], [-0.5, 2.0]])
    x, level = torch.zeros(2, 4, 2, 2), Schedule().level(500)
    seen = []

    def network(x, t, conditioning):
        seen.append(conditioning.context[:, 0, 0].tolist())
        return x + conditioning.context.mean(dim=(1, 2))[:, None, None, None]

    for guidance in (3.0, 1.0):
        denoise = Denoiser(network, Schedule(), Composition((a, b), weights), u, guidance)
        out = (x - level.alpha * denoise(x, level)) / level.sigma  # the prediction
        for image, (of_a, of_b) in zip(out, ((1.0, -0.5), (0.5, 2.0)), strict=True):
            assert torch.allclose(image, torch.tensor(1 + guidance * (of_a * (2 - 1) + of_b * (5 - 1))), atol=1e-5)
        assert seen.pop() == [1, 1, 2, 2, 5, 5]  # one call: negative, first, second
    with pytest.raises(ValueError, match="needs `uncond`"):
        Denoiser(network, Schedule(), Composition((a, b), weights), None, 1.0)


def test_steps_by_level():
    levels = Schedule().levels(5, "karras")
    denoise = by_step([lambda x, level, i=i: torch.tensor(i) for i in range(5)], levels)
    x = torch.zeros(1)
    assert [int(denoise(x, level)) for level in levels] == [0, 1, 2, 3, 4, 4]  # the last is where the last step ends
    between = [levels.between(a.ratio, b.ratio) for a, b in itertools.pairwise(levels[:-1])]
    assert [int(denoise(x, level)) for level in between] == [0, 1, 2, 3]
    assert int(denoise(x, Schedule().level_of_ratio(1000.0))) == 0


# In the model


def images(model: StableDiffusion, prompt, negative="", **given) -> list[bytes]:
    made = model.txt2img(prompt, negative, web_ui_prompts=True, **{"steps": 4, **SIZE, **given})
    return [image.tobytes() for image in made]


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpm2", "dpmpp_sde", "plms", "unipc", "tcd"])
def test_each_step_has_the_context_of_its_text(tiny_sd, sampler, monkeypatch):
    """Whatever the sampler evaluates: each text has the context it has alone, and is encoded once."""
    seen: list[tuple[float, torch.Tensor]] = []
    network = tiny_sd.predict
    monkeypatch.setattr(
        tiny_sd, "predict", lambda x, t, c: seen.append((float(t[0]), c.context[1])) or network(x, t, c)
    )
    calls: list[list[str]] = []
    encode = tiny_sd.encode_batches
    monkeypatch.setattr(
        tiny_sd, "encode_batches", lambda given, **k: calls.extend(b.texts for b in given) or encode(given, **k)
    )
    params = SamplingParams(steps=5, sampler=sampler, **SIZE)
    run = tiny_sd.prepare(TextToImage("a [cat:dog:1] [x|y]", params, web_ui_prompts=True))
    assert sorted(text for texts in calls for text in texts) == ["", "a cat x", "a dog x", "a dog y"]
    assert len(calls) == 4 and not seen
    run.result()
    expected = [tiny_sd.encode_prompt([text])[0] for text in ("a cat x", "a cat x", "a dog y", "a dog x", "a dog y")]
    assert len(seen) >= 5 + (SAMPLERS[sampler].evaluations == 2) * 4
    for t, context in seen:
        step = max(i for i in range(5) if run.levels[i].t >= t - 1e-3)  # which is float32
        assert torch.equal(context, expected[step])


def test_one_recording_serves_all_steps(tiny_sd, monkeypatch):
    """Contexts of all steps have one length, so that a recorded step is replayed with each of them."""
    recorded: list[object] = []

    def record(run, device):
        recorded.append(run)
        out = run()
        return lambda: out.copy_(run()), out

    prompt = "[a cat|" + "dog " * 80 + "|] AND a tree :0.5"
    unet = restore(copy.deepcopy(tiny_sd.unet))  # its weights stay where they are
    made = []
    for network in (unet, Recorded(unet, record)):
        monkeypatch.setattr(tiny_sd, "_fast_unet", network)
        made.append(images(tiny_sd, prompt, "[blue:red:1]", steps=5))
    assert made[0] == made[1] and len(recorded) == 1


def test_runs_of_equal_contexts_are_equal(tiny_sd):
    """Editing that changes nothing, AND of a prompt with itself, and what comes before the first step."""
    (plain,) = images(tiny_sd, "a cat", "blue")
    assert (
        [plain]
        == [image.tobytes() for image in tiny_sd.txt2img("a cat", "blue", steps=4, **SIZE)]
        == images(tiny_sd, "[dog:a cat:0]", "[red:blue:-1]")
        == images(tiny_sd, "a cat", "blue")
    )
    (edited,), (dog,) = images(tiny_sd, "[a cat:dog:1]", "blue"), images(tiny_sd, "dog", "blue")
    assert len({plain, edited, dog}) == 3
    assert images(tiny_sd, "a cat", "[blue:red:1]") not in ([plain], images(tiny_sd, "a cat", "red"))
    assert images(tiny_sd, "[a cat|a cat]", "blue") == [plain]


def test_and_is_composable_guidance(tiny_sd):
    params = SamplingParams(steps=3, n=2, guidance=5.0, **SIZE)
    run = tiny_sd.prepare(TextToImage(["a cat :0.7 AND a dog :-0.4", "a tree"], params, "blue", web_ui_prompts=True))
    x, level = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1)), run.levels[1]
    with torch.no_grad():
        guided = run.start.denoise(x, level)
        u, cat, dog, tree = (
            tiny_sd.denoiser(tiny_sd.encode_prompt([text]), guidance=1.0)(x, level)
            for text in ("blue", "a cat", "a dog", "a tree")
        )
    expected = torch.cat([(u + 5 * (0.7 * (cat - u) - 0.4 * (dog - u)))[:2], (u + 5 * (tree - u))[2:]])
    assert error(guided, expected) < 1e-5
    assert len(run.result().images) == 4


def test_lengths_and_weights_go_with_editing_and_and(tiny_sd):
    run = tiny_sd.prepare(
        TextToImage("[(cat:1.5)|" + "dog " * 80 + "] AND x", SamplingParams(steps=3, **SIZE), web_ui_prompts=True)
    )
    first, last = run.guides[0], run.guides[2]
    assert isinstance(first.cond, Composition) and isinstance(last.cond, Composition)
    empty = tiny_sd.encode_prompt([""])
    cat = tiny_sd.encode_prompt(["(cat:1.5)"], web_ui_prompts=True)
    assert torch.equal(first.cond.parts[0].context, torch.cat([cat, empty], dim=1))
    assert last.cond.parts[0].context.shape == first.uncond.context.shape == (1, 154, 64)
    assert run.guides[0] is run.guides[1]


def test_guidance_1_needs_the_negative_prompt_with_and(tiny_sd):
    assert images(tiny_sd, "a cat", "blue", guidance=1.0) == images(tiny_sd, "a cat", "red", guidance=1.0)
    composed = [images(tiny_sd, "a cat AND a dog", text, guidance=1.0) for text in ("blue", "red")]
    assert composed[0] != composed[1]
    run = tiny_sd.prepare(TextToImage.of("[a|b]", web_ui_prompts=True, steps=3, guidance=1.0, **SIZE))
    assert all(guide.uncond is None for guide in run.guides)


def test_contexts_with_an_edited_negative_prompt(tiny_sd):
    context = torch.cat([tiny_sd.encode_prompt(["a cat"]), tiny_sd.encode_prompt([""])], dim=1)
    run = tiny_sd.prepare(TextToImage.of(context, "[blue|red]", web_ui_prompts=True, steps=3, n=2, **SIZE))
    assert len({id(guide) for guide in run.guides}) == 2 and run.guides[0].cond.context.equal(context.repeat(2, 1, 1))
    assert len(run.result().images) == 2


@pytest.mark.parametrize("inpainting", [False, True])
def test_image_to_image_and_inpainting(tiny_sd, tiny_inpaint, inpainting):
    """Shares are those of the whole grid, and the count begins with the first step that is taken."""
    model = tiny_inpaint if inpainting else tiny_sd
    image, mask = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64), 255)
    mask.paste(0, (0, 0, 16, 16))
    params = SamplingParams(steps=10, seed=1)
    kinds = [
        ImageToImage("[a:b:0.3]", params, web_ui_prompts=True, image=image, strength=0.5),
        Inpaint("[a:b:0.3] AND c", params, web_ui_prompts=True, image=image, mask=mask, strength=0.5),
    ]
    for request in kinds:
        run = model.prepare(request)
        assert len(run) == 5 and [guide is run.guides[0] for guide in run.guides] == [True] * 4 + [False]
        assert run.result().notes == []
    late = ImageToImage("[a:b:0.5]", params, web_ui_prompts=True, image=image, strength=0.5)
    result = model.prepare(late).result()
    assert result.notes == ["5 of 10 steps are taken, and an edit of the prompt comes after them"]
    nothing = ImageToImage("[a|b] AND c", params, web_ui_prompts=True, image=image, strength=0.0)
    assert len(model.prepare(nothing).result().images) == 1


def test_earlier_names_of_the_option(tiny_sd):
    for name in ("weighted_prompts", "long_prompts"):
        for call in (TextToImage.of, tiny_sd.txt2img):
            with pytest.raises(TypeError, match=f"{name} is now web_ui_prompts"):
                call("a", **{name: True})
        with pytest.raises(ValueError, match=name):
            from_dict({"kind": "txt2img", "prompt": ["a"], name: True})
