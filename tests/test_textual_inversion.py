"""Textual inversion: every layout of file, words in prompts, and what does not fit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from common import TINY, error
from PIL import Image
from safetensors.torch import save_file
from test_tokenizer import write_folder
from torch import nn

from sd.adapters.textual_inversion import read_embedding
from sd.adapters.words import WordTable
from sd.checkpoints.checkpoint import CheckpointError
from sd.pipeline import StableDiffusion
from sd.text.tokenizer import Tokenizer

CAT, END = 2368, 49407
FIRST = END + 1


def vectors(n: int = 1, width: int = 64) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(n))


@pytest.fixture
def model(tiny) -> StableDiffusion:
    networks = {**tiny, "text_encoder": copy.deepcopy(tiny["text_encoder"])}
    return StableDiffusion(TINY, **networks)


def web_ui(tensor, parameters=dict, name="trained-500"):
    return {
        "string_to_token": {"*": 265},
        "string_to_param": parameters({"*": tensor}),
        "name": name,
        "step": 499,
        "sd_checkpoint": None,
        "sd_checkpoint_name": "model",
    }


def old_parameters(tensors: dict) -> nn.ParameterDict:
    """As torch before 1.12 pickled it: all in `_parameters`."""
    made = nn.ParameterDict()
    made.__dict__["_parameters"].update({key: nn.Parameter(tensor) for key, tensor in tensors.items()})
    return made


FILES = {
    "web UI": ("style.pt", lambda x: web_ui(x), "style"),
    "web UI, parameters": ("style.pt", lambda x: web_ui(nn.Parameter(x)), "style"),
    "the paper's": ("style.pt", lambda x: web_ui(x, lambda d: nn.ParameterDict({"*": nn.Parameter(d["*"])})), "style"),
    "the paper's, old torch": ("style.pt", lambda x: web_ui(x, old_parameters), "style"),
    "diffusers": ("learned_embeds.bin", lambda x: {"<cat-toy>": x}, "<cat-toy>"),
    "emb_params": ("Easy Style.safetensors", lambda x: {"emb_params": x}, "Easy Style"),
    "diffusers, safetensors": ("learned_embeds.safetensors", lambda x: {"<cat-toy>": x}, "<cat-toy>"),
}


def saved(tmp_path, layout: str, tensor, legacy: bool = False):
    name, content, word = FILES[layout]
    if name.endswith(".safetensors"):
        save_file(content(tensor), tmp_path / name)
    else:
        torch.save(content(tensor), tmp_path / name, _use_new_zipfile_serialization=not legacy)
    return tmp_path / name, word


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("layout", FILES)
def test_every_layout(layout, n, legacy, tmp_path):
    file, word = saved(tmp_path, layout, vectors(n), legacy)
    ((found, tensor),) = read_embedding(file, 64, 75).items()
    assert found == word and torch.equal(tensor, vectors(n))
    assert list(read_embedding(file, 64, 75, "mine")) == ["mine"]


def test_one_vector_without_its_dimension(tmp_path):
    torch.save({"<cat-toy>": vectors()[0].half()}, tmp_path / "a.bin")
    found = read_embedding(tmp_path / "a.bin", 64, 75)["<cat-toy>"]
    assert torch.equal(found, vectors().half().float()) and found.dtype == torch.float32


def test_several_words_in_a_file(model, tmp_path):
    save_file({"<s0>": vectors(1), "<s1>": vectors(2)}, tmp_path / "a.safetensors")
    assert sorted(model.add_embedding(tmp_path / "a.safetensors")) == ["<s0>", "<s1>"]
    assert model.words == {"<s0>": 1, "<s1>": 2}
    with pytest.raises(CheckpointError, match=r"holds 2 words .*: leave out the word"):
        model.add_embedding(tmp_path / "a.safetensors", "mine")


# In prompts


def expected(model: StableDiffusion, rows: list) -> torch.Tensor:
    """The text encoder by hand: token vectors, an embedding's in between, positions, blocks, norm."""
    encoder = model.text_encoder
    table = encoder.token.weight
    full = [table[49406][None], *(table[row][None] if isinstance(row, int) else row for row in rows)]
    x = torch.cat([*full, table[END].expand(77, -1)])[:77] + encoder.position.weight
    x = x[None]
    for block in encoder.blocks:
        x = block(x)
    return encoder.norm(x)


@pytest.mark.parametrize("n", [1, 3])
def test_a_word_stands_for_its_vectors(model, tmp_path, n):
    file, _ = saved(tmp_path, "diffusers", vectors(n))
    before, plain = model.encode_prompt(["a <cat-toy>, cat"]), model.text_encoder.token
    assert model.add_embedding(file) == ["<cat-toy>"]
    assert model.words == {"<cat-toy>": n}
    after = model.encode_prompt(["a <Cat-Toy>, cat"])
    assert torch.allclose(after, expected(model, [320, vectors(n), 267, CAT]), atol=1e-5)
    table = model.text_encoder.state_dict()
    assert table["token.weight"].shape == (49408, 64) and not any("more" in key for key in table)
    del table  # a weight that is held here is not packed, and plain kernels may round differently
    model.remove_embedding("<cat-toy>")
    again = model.encode_prompt(["a <cat-toy>, cat"])  # MKL rounds by where its inputs lie in memory
    assert torch.allclose(again, before, atol=1e-5) and model.text_encoder.token is plain and model.words == {}
    assert type(model.text_encoder.token) is nn.Embedding


def test_several_words_and_one_goes(model, tmp_path):
    files = {}
    for i, word in enumerate(["one", "two", "three"], start=1):
        files[word] = tmp_path / f"{word}.safetensors"
        save_file({"emb_params": vectors(i)}, files[word])
        model.add_embedding(files[word])
    assert model.words == {"one": 1, "two": 2, "three": 3}
    model.remove_embedding("two")
    after = model.encode_prompt(["three cat one"])
    assert torch.allclose(after, expected(model, [vectors(3), CAT, vectors(1)]), atol=1e-5)
    model.add_embedding(files["two"])
    after = model.encode_prompt(["two one three"])
    assert torch.allclose(after, expected(model, [vectors(2), vectors(1), vectors(3)]), atol=1e-5)
    model.remove_embedding()
    assert model.words == {} and model.tokenizer.added == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, tiny):
    table = copy.deepcopy(tiny["text_encoder"].token).to(dtype)
    both = WordTable(table, vectors(2))
    out = both(torch.tensor([[CAT, FIRST + 1, FIRST]]))
    assert out.dtype == dtype and both.weight is table.weight
    assert torch.equal(out[0], torch.stack([table.weight[CAT], *vectors(2).to(dtype).flip(0)]))


def test_negative_weighted_and_long_prompts(model, tmp_path):
    file, _ = saved(tmp_path, "diffusers", vectors(3))
    model.add_embedding(file)
    settings = {"height": 64, "width": 64, "steps": 2, "seed": 1}
    pictures = {
        model.txt2img("a cat", negative, web_ui_prompts=weighted, **settings)[0].tobytes()
        for negative, weighted in (("blue", False), ("<cat-toy>", False), ("(<cat-toy>:1.5)", True))
    }
    assert len(pictures) == 3
    long = model.encode_prompt(["cat " * 73 + "<cat-toy>"], web_ui_prompts=True)
    assert torch.allclose(long[:, 77:], expected(model, [vectors(3)]), atol=1e-5)


@pytest.mark.parametrize("layout", ["web UI", "diffusers", "emb_params"])
@pytest.mark.filterwarnings("ignore")
def test_diffusers_reads_the_same(layout, tiny, model, tmp_path):
    """load_textual_inversion of a diffusers pipeline, several vectors and a prompt that is cut included."""
    pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    from scripts.benchmark.references import peers, pipeline

    tokenizer = transformers.CLIPTokenizer.from_pretrained(write_folder(tmp_path / "tokenizer"))
    tokenizer.model_max_length = 77
    pipe = pipeline(peers({name: copy.deepcopy(network) for name, network in tiny.items()}, TINY, torch.float32), TINY)
    pipe.register_modules(tokenizer=tokenizer)
    file, _ = saved(tmp_path, layout, vectors(3))
    pipe.load_textual_inversion(str(file), token="<mine>")
    model.add_embedding(file, "<mine>")
    for prompt in ("a photo of <mine> on a cat", "<mine>, red (<mine>)", "cat " * 70 + "<mine> dog dog dog"):
        theirs, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
        assert error(model.encode_prompt([prompt]), theirs) < 1e-5


# The tokenizer


def tokenizer(*words: str) -> Tokenizer:
    made = Tokenizer()
    for i, word in enumerate(words):
        made.add(word, [FIRST + i])
    return made


@pytest.mark.parametrize(
    "text, ids",
    [
        ("style", [FIRST]),
        ("a STYLE, cat", [320, FIRST, 267, CAT]),
        ("(style)", [263, FIRST, 264]),
        ("cat-style", [CAT, 268, FIRST]),
        ("<toy>,<toy>", [FIRST + 1, 267, FIRST + 1]),
        ("cat<toy>cat", [CAT, FIRST + 1, CAT]),
        ("style two", [FIRST + 2]),
        ("style  TWO cat", [FIRST + 2, CAT]),
    ],
)
def test_where_a_word_is_found(text, ids):
    assert tokenizer("style", "<toy>", "style two").encode(text) == ids


@pytest.mark.parametrize("text", ["styles", "restyle", "style2", "my_style", "toy"])
def test_where_it_is_not(text):
    assert tokenizer("style", "<toy>").encode(text) == Tokenizer().encode(text)


def test_words_of_a_tokenizer():
    made = tokenizer("style", "<toy>")
    made.add("long", range(FIRST + 2, FIRST + 5))
    assert made.decode(made.encode("a style <toy> long cat")) == "a style <toy> long cat"
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert again.encode("a style") == [320, FIRST] and again.added == made.added
    for word, message in (("style", "is taken"), ("STYLE ", "is taken"), (" ", "cannot be a word")):
        with pytest.raises(ValueError, match=message):
            made.add(word, [FIRST])
    with pytest.raises(ValueError, match="must be beyond"):
        made.add("other", [5])
    made.remove("style")
    assert made.encode("style") == Tokenizer().encode("style")
    with pytest.raises(KeyError):
        made.remove("style")


@pytest.mark.parametrize(
    "key", ["emb_params", "emp_params", "clip_l", "text_encoders_0", "*", "<*>", "<my-dog>", "other", "My Dog"]
)
def test_the_files_name_is_always_a_word(key, model, tmp_path):
    """And the word in the file, if it has one, stands for the same vectors."""
    save_file({key: vectors(2)}, tmp_path / "My Dog.safetensors")
    words = model.add_embedding(tmp_path / "My Dog.safetensors")
    assert words == {"<my-dog>": ["<my-dog>", "my dog"], "other": ["other", "my dog"]}.get(key, ["my dog"])
    assert model.words == dict.fromkeys(words, 2)
    assert [model.tokenizer.encode(word) for word in words] == [[FIRST, FIRST + 1]] * len(words)
    save_file({"emb_params": vectors(1)}, tmp_path / "zz.safetensors")
    model.add_embedding(tmp_path / "zz.safetensors")
    model.remove_embedding(words[-1])
    assert model.words == {"zz": 1} and model.tokenizer.encode("a zz my dog") == [320, FIRST, 607, 1929]
    assert torch.allclose(model.encode_prompt("zz"), expected(model, [vectors(1)]), atol=1e-5)


def test_a_second_word_stays_when_another_embedding_goes(model, tmp_path):
    for name, key in (("zz", "emb_params"), ("dog", "<dog>")):
        save_file({key: vectors(2)}, tmp_path / f"{name}.safetensors")
        model.add_embedding(tmp_path / f"{name}.safetensors")
    model.remove_embedding("zz")
    assert model.words == {"<dog>": 2, "dog": 2}
    assert model.tokenizer.encode("dog") == model.tokenizer.encode("<dog>") == [FIRST, FIRST + 1]
    model.remove_embedding()
    assert model.words == {} and model.tokenizer.added == {}


def test_a_name_that_many_files_have_is_no_word(model, tmp_path):
    save_file({"<dog>": vectors()}, tmp_path / "learned_embeds.safetensors")
    assert model.add_embedding(tmp_path / "learned_embeds.safetensors") == ["<dog>"]
    assert model.add_embedding(tmp_path / "learned_embeds.safetensors", "dog") == ["dog"]


@pytest.mark.parametrize("key", ["emb_params", "emp_params"])
def test_output_vectors_are_left_out_and_said(key, model, tmp_path):
    save_file({key: vectors(2), f"{key}_out": vectors(2)}, tmp_path / "dog.safetensors")
    with pytest.warns(UserWarning, match=r"^dog.safetensors: its output vectors are not used"):
        assert model.add_embedding(tmp_path / "dog.safetensors") == ["dog"]
    assert model.words == {"dog": 2}


@pytest.mark.parametrize("name", ["dog.png", "dog.webp"])
def test_an_embedding_in_an_image_is_named(name, model, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"an image; embeddings in images are not read"):
        model.add_embedding(tmp_path / name)


def test_hundreds_of_words(model):
    """In any case, the longest match first; each is found in time that does not grow with their number."""
    made = Tokenizer()
    for i in range(1000):
        made.add(f"word{i}" if i % 2 else f"word {i}", [FIRST + i])
    assert made.encode("WORD1 word 10, word999") == [FIRST + 1, FIRST + 10, 267, FIRST + 999]
    assert made.encode("words") == Tokenizer().encode("words")


# What is refused


@pytest.mark.parametrize(
    "content, message",
    [
        ({"emb_params": torch.zeros(1, 768)}, "an embedding for Stable Diffusion 1.x: its vectors are 768 wide, .* 64"),
        ({"<a>": torch.zeros(1024)}, "an embedding for Stable Diffusion 2.x: its vectors are 1024 wide"),
        ({"emb_params": torch.zeros(1, 9)}, "an embedding for another model"),
        ({"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}, "an embedding for SDXL"),
        ({"clip_l": torch.zeros(1, 64), "t5": torch.zeros(1, 4096)}, "an embedding for Flux or Stable Diffusion 3"),
        ({"emb_params_out": torch.zeros(1, 64)}, "holds output vectors only"),
        ({"two\nlines": torch.zeros(64)}, "'two.*lines' is not a word; give one"),
        ({"a" * 201: torch.zeros(64)}, "'a+' is not a word; give one"),
        ({"emb_params": torch.zeros(76, 64)}, "'style' has 76 vectors, but a prompt has room for 75"),
        ({"emb_params": torch.full((1, 64), float("nan"))}, "emb_params holds numbers that are not finite .NaN or"),
        ({"emb_params": torch.zeros(1, 64, dtype=torch.int64)}, "emb_params holds whole numbers .int64., not weights"),
        (
            {"x.weight": torch.zeros(4, 4, 3, 3)},
            "not an embedding .x.weight is 4x4x3x3.: a checkpoint is given with --ckpt",
        ),
        ({f"a{i}": torch.zeros(64) for i in range(101)}, "not an embedding .101 tensors, "),
        ({"emb_params": torch.zeros(0, 64)}, "not an embedding"),
        ({"<|endoftext|>": torch.zeros(64)}, "cannot be a word of its own"),
    ],
)
def test_one_line_for_what_does_not_fit(content, message, model, tmp_path):
    save_file(content, tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match=message) as refused:
        model.add_embedding(tmp_path / "style.safetensors")
    assert "\n" not in str(refused.value) and model.words == {}
    assert type(model.text_encoder.token) is nn.Embedding


def test_words_are_taken_once(model, tmp_path):
    file, _ = saved(tmp_path, "diffusers", vectors())
    model.add_embedding(file)
    with pytest.raises(ValueError, match="'<cat-toy>' is taken: choose another one"):
        model.add_embedding(file)
    assert model.add_embedding(file, "Other") == ["other"]
    with pytest.raises(ValueError, match="no word 'x' was added: <cat-toy>, other"):
        model.remove_embedding("x")


def test_a_pickle_that_is_something_else(tmp_path):
    torch.save({"string_to_param": {"*": 3}, "name": "x"}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="holds no named tensors"):
        read_embedding(tmp_path / "a.pt", 64, 75)
