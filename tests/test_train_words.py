"""A word to train: only its rows change, and its files are read by diffusers and by us."""

from __future__ import annotations

import copy

import pytest
import torch
from common import TINY, TINY_XL, error, tiny_state
from conftest import loaded
from safetensors.torch import load_file, save_file
from test_lora_files_written import pipes  # noqa: F401  a fixture
from torch import Tensor

from sd import StableDiffusion
from sd.adapters.lora_formats import read_lora
from sd.adapters.textual_inversion import read_embedding, widths_of
from sd.config import Config
from sd.training import (
    LoraParams,
    TrainableLora,
    TrainableWord,
    bundled_tensors,
    diffusion_loss,
    embedding_pickle,
    embedding_tensors,
    lora_tensors,
)

MANIFESTS = {TINY: "tiny-v1", TINY_XL: "tiny-sdxl"}
CONFIGS = pytest.mark.parametrize("config", MANIFESTS, ids=["SD 1", "SDXL"])
PROMPT = "a photo of <cat-toy> on a table"


def model_of(config: Config) -> StableDiffusion:
    return StableDiffusion(config, **loaded(tiny_state(MANIFESTS[config]), config))


def states(model: StableDiffusion) -> dict[str, Tensor]:
    """All weights of a model; the word's vectors are in no state dict."""
    return {
        f"{name}.{key}": tensor.clone()
        for name in model.config.networks
        for key, tensor in getattr(model, name).state_dict().items()
    }


def loss_of(model: StableDiffusion) -> Tensor:
    rng = torch.Generator().manual_seed(2)
    x0, noise = torch.randn(2, 1, 4, 8, 8, generator=rng)
    texts = [encoder(tokenizer([PROMPT])) for encoder, tokenizer in zip(encoders(model), model.tokenizers, strict=True)]
    hidden = torch.cat([text.hidden for text in texts], dim=-1)
    cond = model.with_sizes(texts[-1]._replace(hidden=hidden))
    return diffusion_loss(model.unet, model.schedule, x0, cond, torch.tensor([500]), noise)


def encoders(model: StableDiffusion) -> list:
    return [getattr(model, name) for name in model.config.text_names]


@CONFIGS
def test_only_the_rows_of_the_word_change(config):
    """A step of AdamW changes the vectors, and no bit of anything else; gradients exist for them only."""
    model = model_of(config)
    rows = model.tokenizer.encode("a photo of on a table")
    word = TrainableWord(model, "<cat-toy>", 3, "toy")
    before, first = states(model), [v.detach().clone() for v in word.vectors]
    tables = [encoder.token.weight[rows].clone() for encoder in encoders(model)]
    word.attach()
    optimizer = torch.optim.AdamW(word.parameters(), 1e-2)
    with torch.enable_grad():
        loss = loss_of(model)
        loss.backward()
    assert all(p.grad is None for name in config.networks for p in getattr(model, name).parameters())
    assert [v.grad.abs().sum(dim=1).gt(0).all() for v in word.vectors] == [True] * len(config.text)
    optimizer.step()
    assert all(torch.equal(tensor, before[key]) for key, tensor in states(model).items())
    assert all(torch.equal(e.token.weight[rows], t) for e, t in zip(encoders(model), tables, strict=True))
    assert all(not torch.equal(now, then) for now, then in zip(word.vectors, first, strict=True))
    assert loss_of(model) < loss.detach() - 1e-4
    # the model's own vectors are the first ones, until the new ones are stored
    trained = loss_of(model)
    word.detach()
    torch.testing.assert_close(loss_of(model), loss.detach(), rtol=1e-6, atol=0)
    word.store()
    assert torch.equal(loss_of(model), trained)
    averages = [torch.zeros_like(v) for v in word.vectors]
    word.store(averages)
    assert not torch.equal(loss_of(model), trained)
    assert model.words == {"<cat-toy>": 3}
    model.remove_embedding()
    with pytest.raises(ValueError, match="<cat-toy> is not in the model any more"):
        word.store()


def test_other_words_stay_and_half_precision_is_the_tables():
    """Beside a word that was added before; the vectors are float32, what the text encoder sees is not."""
    model = model_of(TINY)
    model.text_encoder.bfloat16()
    model.add_word("<other>", torch.ones(2, 64))
    word = TrainableWord(model, "<Cat-Toy>", 1, "toy")
    assert word.word == "<cat-toy>" and word.vectors[0].dtype == torch.float32
    word.attach()
    with torch.no_grad():
        word.vectors[0].fill_(2.0)
    ids = torch.tensor([model.tokenizer.encode("cat <other> <cat-toy>")])
    found = model.text_encoder.token(ids)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[0, 1:, 0].float(), torch.tensor([1.0, 1.0, 2.0]))
    assert torch.equal(found[0, 0], model.text_encoder.token.weight[ids[0, 0]])
    with pytest.raises(ValueError, match="attached already"):
        word.attach()


@pytest.mark.parametrize(
    ("count", "init"), [(1, "toy"), (4, "toy"), (3, "red toy"), (1, "red toy"), (2, "a big red toy")]
)
def test_first_values(count, init):
    """Vectors of the tokens: repeated if there are fewer, averaged if there are more."""
    model = model_of(TINY)
    known = model.text_encoder.token.weight[model.tokenizer.encode(init)]
    word = TrainableWord(model, "<cat-toy>", count, init)
    (found,) = word.vectors
    if len(known) <= count:
        expected = torch.stack([known[i % len(known)] for i in range(count)])
    elif count == 1:
        expected = known.mean(dim=0, keepdim=True)
    else:
        expected = torch.stack([known[:2].mean(dim=0), known[2:].mean(dim=0)])
    torch.testing.assert_close(found.detach(), expected)


@pytest.mark.parametrize(
    ("word", "count", "init", "text"),
    [
        ("<x>", 0, "toy", "a word has from 1 to 75 vectors"),
        ("<x>", 76, "toy", "a word has from 1 to 75 vectors"),
        ("<x>", 1, " ", "' ' has no tokens: give a word to start from"),
        ("<x>", 1, "dog", "the model does not know 'dog', whose vectors are zero"),
        ("<taken>", 1, "toy", "the word '<taken>' is taken"),
        ("", 1, "toy", "cannot be a word of its own"),
    ],
)
def test_what_is_refused(word, count, init, text):
    model = model_of(TINY)
    model.text_encoder.token.weight[model.tokenizer.encode("dog")] = 0.0  # as in models that forgot unused words
    model.add_word("<taken>", torch.ones(1, 64))
    with pytest.raises(ValueError, match=text):
        TrainableWord(model, word, count, init)
    assert model.words == {"<taken>": 1}


def test_vectors_that_do_not_fit_are_refused():
    model = model_of(TINY)
    for shape in ((64,), (1, 63), (0, 64), (76, 64)):
        with pytest.raises(ValueError, match=r"the vectors of '<x>' are .*: expected 1 to 75, 64 wide"):
            model.add_word("<x>", torch.ones(shape))


# --------------------------------------------------------------------------------------------------------------- files


def vectors_of(config: Config, count: int = 2) -> list[Tensor]:
    rng = torch.Generator().manual_seed(5)
    return [torch.randn(count, text.width, generator=rng) for text in config.text]


@CONFIGS
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_we_read_what_is_written(config, ending, tmp_path):
    vectors, path = vectors_of(config), tmp_path / f"cat-toy.{ending}"
    if ending == "pt":
        torch.save(embedding_pickle("<cat-toy>", vectors, config, step=500), path)
    else:
        save_file(embedding_tensors("<cat-toy>", vectors, config), path)
    ((word, found),) = read_embedding(path, widths_of(config), 75).items()
    assert word == ("<cat-toy>" if ending == "safetensors" and config is TINY else "cat-toy")
    assert torch.equal(found, torch.cat(vectors, dim=1))


def test_the_web_uis_pickle():
    """The entries that its own files have (modules/textual_inversion: load_from_file, save)."""
    content = embedding_pickle("<cat-toy>", vectors_of(TINY), TINY, step=500)
    assert content.pop("string_to_param").keys() == {"*"}
    assert content == {
        "string_to_token": {"*": 265}, "name": "<cat-toy>", "step": 500, "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }  # fmt: skip


@pytest.mark.parametrize("config, ending", [(TINY, "safetensors"), (TINY, "pt"), (TINY_XL, "safetensors")])
@pytest.mark.filterwarnings("ignore")
def test_diffusers_reads_the_word(config, ending, pipes, tmp_path):  # noqa: F811
    """`load_textual_inversion`, and its encoded prompts and predictions are ours."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    more = {"add_watermarker": False} if config.sizes else {"safety_checker": None, "requires_safety_checker": False}
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipes[config], **more)
    vectors, path = vectors_of(config), tmp_path / f"cat-toy.{ending}"
    if ending == "pt":
        torch.save(embedding_pickle("<cat-toy>", vectors, config, step=500), path)
    else:
        save_file(embedding_tensors("<cat-toy>", vectors, config), path)
    if config.sizes:
        parts = load_file(path)
        for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
            encoder, tokenizer = getattr(pipe, f"text_encoder{suffix}"), getattr(pipe, f"tokenizer{suffix}")
            pipe.load_textual_inversion(parts[key], "<cat-toy>", text_encoder=encoder, tokenizer=tokenizer)
    else:
        pipe.load_textual_inversion(str(tmp_path), weight_name=path.name)
    model = model_of(config)
    model.add_embedding(path, "<cat-toy>")
    ours = model.encode_texts(PROMPT)
    theirs = pipe.encode_prompt(PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    assert error(ours.hidden, theirs[0]) < 1e-5
    plain = copy.deepcopy(model)
    plain.remove_embedding()
    assert error(plain.encode_texts(PROMPT).hidden, theirs[0]) > 0.05
    if not config.sizes:
        x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([500.0])
        assert error(model.unet(x, t, model.with_sizes(ours)), pipe.unet(x, t, theirs[0]).sample) < 1e-4


@CONFIGS
def test_a_lora_file_bundles_words(config, tmp_path):
    """In kohya's names, beside the LoRA."""
    model, vectors = model_of(config), vectors_of(config)
    lora = {"unet": TrainableLora(model.unet, ["mid.attn.proj_in"], LoraParams(2))}
    tensors = lora_tensors(lora, config) | bundled_tensors({"<cat-toy>": vectors}, config)
    save_file(tensors, tmp_path / "both.safetensors")
    read = read_lora(tmp_path / "both.safetensors", config, {name: getattr(model, name) for name in config.networks})
    assert len(read.changes) == 1 and read.notes == ()
    assert read.words.keys() == {"<cat-toy>"} and torch.equal(read.words["<cat-toy>"], torch.cat(vectors, dim=1))
