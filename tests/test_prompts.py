"""Weights and chunks of the web UI's prompts: hand-computed parts, chunks and weighted contexts."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch
from common import error
from hypothesis import given, settings
from hypothesis import strategies as st

from sd.text.prompt_syntax import check_prompt, chunks, emphasised, parse, plain
from sd.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer()
CAT, COMMA, START, END = 2368, 267, 49406, 49407


def approx(parts: list[tuple[str, float]]) -> list[tuple[str, object]]:
    return [(text, pytest.approx(weight)) for text, weight in parts]


@pytest.mark.parametrize(
    "prompt, parts",
    [
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("[less]", [("less", 1 / 1.1)]),
        ("((a)) [[b]]", [("a", 1.21), (" ", 1), ("b", 1 / 1.21)]),
        ("(a:1.5) (b: .5 ) (c:-1)", [("a", 1.5), (" ", 1), ("b", 0.5), (" ", 1), ("c", -1)]),
        ("(a (b:2):3)", [("a ", 3), ("b", 6)]),
        ("([a])", [("a", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("a [b (c", [("a ", 1), ("b ", 1 / 1.1), ("c", 1)]),
        ("a) b] c:1.2)", [("a) b] c:1.2)", 1)]),  # nothing is open: text
        ("[a:1.2)]", [("a:1.2)", 1 / 1.1)]),  # a number belongs to round brackets
        (r"\(literal\] \\ \x", [(r"(literal] \ x", 1)]),  # a backslash before anything else is left out
        (r"(a\))", [("a)", 1.1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("a: b", [("a: b", 1)]),
        ("(:)", [(":", 1.1)]),
        ("", []),
        ("()", []),
        ("(a:1)", [("a", 1)]),
        ("(a:0)", [("a", 0)]),
        ("(a:-0.5)", [("a", -0.5)]),
        ("(a:+2)", [("a", 2)]),
        ("(a:5.)", [("a", 5)]),
        ("(a:100)", [("a", 100)]),
        ("(a: 1.5)(b:1.5 )", [("ab", 1.5)]),
        ("(a\n:1.5)", [("a\n", 1.5)]),
        ("(a:1.5\n)", [("a", 1.5)]),
        ("(a:b:1.5)", [("a:b", 1.5)]),
        ("(a:1.5:2)", [("a:1.5", 2)]),
        ("(a:x)", [("a:x", 1.1)]),
        ("(a:)", [("a:", 1.1)]),
        ("(:1.5)", []),
        ("(a:1e3)", [("a:1e3", 1.1)]),  # no exponents
        ("(a:1,5)", [("a:1,5", 1.1)]),
        ("a:1.2", [("a:1.2", 1)]),
        ("(a:1.2", [("a:1.2", 1.1)]),  # never closed: no number either
        ("(a) b:1.2)", [("a", 1.1), (" b:1.2)", 1)]),
        ("((a:1.2)", [("a", 1.32)]),
        ("(a))", [("a", 1.1), (")", 1)]),
        ("[a]]", [("a", 1 / 1.1), ("]", 1)]),
        ("([a)]", [("a", 1)]),  # of different kinds: each ends where its own closes
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 1 / 1.1)]),
        ("[(a:1.5)]", [("a", 1.5 / 1.1)]),
        ("[[[a]]]", [("a", 1.1**-3)]),
        (r"\(a:1.5\)", [("(a:1.5)", 1)]),
        (r"(a\):1.5)", [("a)", 1.5)]),
        (r"\\(a)", [("\\", 1), ("a", 1.1)]),
        ("a\\", [("a", 1)]),
        ("{a} <b> a|b", [("{a} <b> a|b", 1)]),
        ("(日本:1.2) é", [("日本", 1.2), (" é", 1)]),
        ("(🗼)\u2028x", [("🗼", 1.1), ("\u2028x", 1)]),
        ("a BREAK b", [("a ", 1), (None, 1), (" b", 1)]),
        ("a BREAKFAST break b", [("a BREAKFAST break b", 1)]),
        ("BREAK", [("", 1), (None, 1), ("", 1)]),
        ("(a BREAK b:1.5)", [("a ", 1.5), (None, 1), (" b", 1.5)]),
        ("a:BREAK:b", [("a:", 1), (None, 1), (":b", 1)]),
        (r"BREAK\(", [("", 1), (None, 1), ("(", 1)]),
        # nested and unbalanced, each weight worked out by hand: 1.1 from the bracket that is never closed
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1), ("house", 1.3 * 1.1 * 1.1), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55),
                (", sun, ", 1.1), ("sky", 1.1**4), (".", 1.1),
            ],
        ),
    ],
)  # fmt: skip
def test_weights(prompt, parts):
    assert parse(prompt) == approx(parts)


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("(a:1.2.3)", "weight '1.2.3' in the prompt is not a number"),
        ("(" * 101, r"more than 100 brackets open at once"),
    ],
)
def test_weights_that_are_refused(prompt, message):
    for read in (parse, check_prompt):
        with pytest.raises(ValueError, match=message):
            read(prompt)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab()[]:\\.1 ", max_size=40))
def test_any_text_keeps_its_letters(prompt):
    try:
        parts = parse(prompt)
    except ValueError as refused:
        assert "is not a number" in str(refused)
        return
    kept = "".join(text or "" for text, _ in parts)
    assert [c for c in kept if c in "ab"] == [c for c in prompt if c in "ab"]
    assert all(a.weight != b.weight for a, b in pairwise(parts))
    assert plain(prompt) == kept


def test_tokens_have_the_weight_of_their_part():
    (chunk,) = chunks(TOKENIZER, "a (red cat:1.5), [cat]")
    a, red = TOKENIZER.encode("a red")
    assert chunk.ids == [a, red, CAT, COMMA, CAT]
    assert chunk.weights == pytest.approx([1, 1.5, 1.5, 1, 1 / 1.1])


def lengths(prompt: str, tokenizer: Tokenizer = TOKENIZER) -> list[int]:
    return [len(chunk.ids) for chunk in chunks(tokenizer, prompt)]


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("", [0]),
        ("cat " * 75, [75]),
        ("cat " * 76, [75, 1]),
        ("cat " * 150, [75, 75]),
        ("cat BREAK dog", [1, 1]),
        ("BREAK cat", [0, 1]),
        ("cat BREAK", [1]),
        ("cat BREAK BREAK dog", [1, 0, 1]),
        ("cat BREAKFAST break", [3]),  # a word of its own, in capitals
        # the comma at place 54 is 21 before the end, too far back; at 55 the 19 tokens behind it move on
        ("cat " * 54 + ", " + "dog " * 25, [75, 5]),
        ("cat " * 55 + ", " + "dog " * 25, [56, 25]),
        ("cat " * 74 + ", dog", [75, 1]),
        ("cat " * 75 + ", dog", [75, 2]),  # the comma itself begins the next chunk
        # a comma of an earlier chunk does not count
        ("cat " * 70 + ", " + "dog " * 90, [71, 75, 15]),
    ],
)
def test_chunks(prompt, expected):
    assert lengths(prompt) == expected


def test_hostile_lengths_take_no_time():
    started = time.monotonic()
    for prompt in (r"\(" * 10**5, "cat" + " " * 10**5 + "dog", "(a)" * 10**4, "[:]" * 10**4, ":1" * 10**5):
        parse(prompt)
    assert lengths("BREAK" + " " * 10**5 + "BREAK") == [0, 0]
    with pytest.raises(ValueError, match="more than 100 chunks of 75 tokens"):
        lengths("cat " * 7501)
    assert time.monotonic() - started < 20


def test_chunks_keep_order_and_weights():
    made = chunks(TOKENIZER, "cat " * 70 + ", (" + "dog " * 10 + ":1.5) BREAK [cat]")
    (dog,) = TOKENIZER.encode("dog")
    assert [chunk.ids for chunk in made] == [[CAT] * 70 + [COMMA], [dog] * 10, [CAT]]
    assert [chunk.weights for chunk in made] == [[1] * 71, [1.5] * 10, pytest.approx([1 / 1.1])]
    assert lengths(r"cat BREAK\(dog") == [1, 2]
    inside = chunks(TOKENIZER, "(cat BREAK cat)")
    assert [(chunk.ids, chunk.weights) for chunk in inside] == [([CAT], [1.1])] * 2


def test_a_word_of_several_vectors_stays_whole():
    tokenizer = Tokenizer()
    tokenizer.add("mine", range(49408, 49416))
    assert lengths("cat " * 67 + "mine cat", tokenizer=tokenizer) == [75, 1]
    assert lengths("cat " * 68 + "mine cat", tokenizer=tokenizer) == [68, 9]


def test_emphasis_by_hand():
    context = torch.tensor([[[1.0, 2.0], [3.0, 6.0]], [[1.0, 2.0], [3.0, 6.0]]])
    out = emphasised(context, torch.tensor([[1.0, 2.0], [1.0, 1.0]]))
    # the first: (1, 2), (6, 12) has the mean 21 / 4, it was 12 / 4
    assert torch.allclose(out[0], torch.tensor([[1.0, 2.0], [6.0, 12.0]]) * 12 / 21)
    assert torch.equal(out[1], context[1])
    half = emphasised(context.bfloat16(), torch.tensor([[1.0, 2.0], [1.0, 1.0]]))
    assert half.dtype == torch.bfloat16 and torch.equal(half, out.bfloat16())
    for weight in (float("inf"), -1 / 3):  # the second: 1 + 2 - 1 - 2 leaves a mean of 0
        with pytest.raises(ValueError, match="no finite numbers"):
            emphasised(context[:1], torch.tensor([[1.0, weight]]))


# In the model


def test_weighted_prompt_in_the_model(tiny_sd):
    ids = TOKENIZER("a cat")
    plain_context = tiny_sd.text_encoder(ids).hidden
    weights = torch.ones(77)
    weights[2] = 1.5
    z = plain_context * weights[:, None]
    expected = z * plain_context.mean() / z.mean()
    assert error(tiny_sd.encode_prompt(["a (cat:1.5)"], web_ui_prompts=True), expected) < 1e-5
    assert torch.equal(tiny_sd.encode_prompt(["a cat"], web_ui_prompts=True), plain_context)


def test_long_prompt_in_the_model(tiny_sd):
    long = tiny_sd.encode_prompt(["cat " * 80, "a dog"], web_ui_prompts=True)
    assert long.shape == (2, 154, 64)
    expected = [tiny_sd.encode_prompt([text]) for text in ("cat " * 75, "cat " * 5, "a dog", "")]
    assert error(long, torch.cat([torch.cat(expected[:2], 1), torch.cat(expected[2:], 1)])) < 1e-5


def test_padding_of_stable_diffusion_2():
    tokenizer = Tokenizer(pad=0)
    rows = tokenizer.rows([chunk.ids for chunk in chunks(tokenizer, "cat BREAK")] + [[]])
    assert rows[:, :4].tolist() == [[START, CAT, END, 0], [START, END, 0, 0]]


def test_images_of_long_and_weighted_prompts(tiny_sd):
    settings = {"height": 64, "width": 64, "steps": 2, "seed": 3}
    for prompt, negative in (("cat " * 80, "blue"), ("a cat", "blue " * 160), (["cat", "dog " * 90], "")):
        images = tiny_sd.txt2img(prompt, negative, web_ui_prompts=True, **settings)
        assert len(images) == (2 if isinstance(prompt, list) else 1)
    options = {"web_ui_prompts": True}
    (usual,) = tiny_sd.txt2img("a cat", "blue", **settings)
    (same,) = tiny_sd.txt2img("a cat", "blue", **options, **settings)
    (other,) = tiny_sd.txt2img("a (cat:1.8)", "blue", **options, **settings)
    assert same.tobytes() == usual.tobytes() != other.tobytes()


def test_negative_is_filled_up_with_the_empty_text(tiny_sd):
    context, uncond = tiny_sd.same_length(torch.zeros(3, 231, 64), tiny_sd.encode_prompt(["blue"]))
    empty = tiny_sd.encode_prompt([""])
    assert context.shape == (3, 231, 64)
    assert torch.equal(uncond, torch.cat([tiny_sd.encode_prompt(["blue"]), empty, empty], dim=1))
    with pytest.raises(ValueError, match="multiples of 77 long"):
        tiny_sd.same_length(torch.zeros(1, 100, 64), empty)


def test_no_prompts(tiny_sd):
    assert tiny_sd.encode_prompt([], web_ui_prompts=True).shape == (0, 77, 64)
