"""train.py --lora, --train-word and --class-prompt as a user meets them: runs, files, resumption, wrong options."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_sdxl_training import checkpoint as xl  # noqa: F401
from test_train_scripts import interrupt_at, new, photos, same, start  # noqa: F401

from scripts import train
from scripts.training import adapters, models
from scripts.training.data import World
from scripts.training.log import read_log
from scripts.training.objective import Objective
from scripts.training.state import load_state
from scripts.training.word_captions import OBJECT, WithWord
from sd import StableDiffusion
from sd.adapters.textual_inversion import read_embedding
from sd.conditioning import Conditioning

QUICK = ("--steps", 2, "--batch", 2, "--precision", "float32", "--device", "cpu", "--log-every", 1, "--samples", 0)


def prediction(model: StableDiffusion, prompt: str) -> torch.Tensor:
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    cond = model.conditioning([prompt])
    cond = cond if isinstance(cond, Conditioning) else Conditioning(cond)
    return model.predict(x, torch.tensor([500.0]), cond)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--lora-layers", "all", "--conv-rank", 2, "--train-text", "--dora", "--checkpointing"),
        pytest.param(("--lora-names", "peft", "--lora-layers", "attention"), marks=pytest.mark.exhaustive),
    ],
)
def test_a_lora_is_what_the_run_trained(more, photos, start, tmp_path):  # noqa: F811
    """Its file, merged into the model, predicts what the network with the trained values predicts."""
    given = ["--lora", 4, "--data", photos, *QUICK, "--lr", 1e-2, "--export-dtype", "float32", *more]
    status, out, err = start(train, *given, "--out", tmp_path)
    assert status == 0, err
    assert out[-1] == f"{tmp_path / 'lora.safetensors'}: for --lora of every program"
    kept = load_state(tmp_path / "state.pt")["networks"]
    assert kept and all(name.startswith("lora.") for name in kept)

    args = train.parser().parse_words([*map(str, given), "--out", str(tmp_path)])
    model = StableDiffusion.load(device="cpu", dtype="float32")
    plain = prediction(model, "a red house")
    target = adapters.Adapters(args, model, adapters.LORA)
    target.set_trainable()
    target.attach()
    target.modules.load_state_dict(kept)
    target.modules.eval()
    expected = prediction(model, "a red house")
    other = StableDiffusion.load(device="cpu", dtype="float32")
    other.add_lora(tmp_path / "lora.safetensors")
    found = prediction(other, "a red house")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert (found - plain).abs().max() > 1e-3


def test_metadata_of_a_lora(photos, start, tmp_path):  # noqa: F811
    given = ["--lora", 4, "--lora-alpha", 2, "--data", photos, *QUICK, "--weighting", "min-snr", "--keep"]
    assert start(train, *given, "--out", tmp_path / "style", "--save-every", 1)[0] == 0
    files = sorted(path.name for path in (tmp_path / "style").glob("*.safetensors"))
    assert files == ["lora-000001.safetensors", "lora-000002.safetensors", "lora.safetensors"]
    with safe_open(tmp_path / "style" / "lora.safetensors", "pt") as file:
        found = file.metadata()
    expected = {
        "ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_learning_rate": "0.002", "ss_num_train_images": "8",
        "ss_steps": "2", "ss_max_train_steps": "2", "ss_min_snr_gamma": "5.0", "ss_batch_size_per_device": "2",
        "ss_sd_model_name": "pocket.safetensors", "modelspec.title": "style LoRA", "modelspec.prediction_type": "v",
    }  # fmt: skip
    assert expected.items() <= found.items()
    tags = json.loads(found["ss_tag_frequency"])[photos.name]
    assert tags["a red picture"] == 1 and tags["something blue"] == 1
    assert "ss_noise_offset" not in found and "ss_text_encoder_lr" not in found
    assert float(found["ss_training_started_at"]) < float(found["ss_training_finished_at"])
    assert start(train, "--out", tmp_path / "style", "--resume", "--steps", 3)[0] == 0
    with safe_open(tmp_path / "style" / "lora.safetensors", "pt") as file:
        found = file.metadata()
    assert found["ss_steps"] == "3" and "ss_training_started_at" not in found  # it is that of the first part


@pytest.mark.sampled(2)
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_a_word(ending, photos, start, tmp_path):  # noqa: F811
    """Only its vectors are trained and kept; the file has them, and images without a caption are told with the word."""
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    (data / "red.txt").unlink()
    given = ["--train-word", "<cat-toy>", "--vectors", 3, "--init-word", "red cat", "--data", data, *QUICK]
    status, out, err = start(train, *given, "--out", tmp_path / "run", "--word-format", ending)
    assert status == 0, err
    written = tmp_path / "run" / f"cat-toy.{ending}"
    assert out[-1] == f"{written}: for --embedding of every program"
    kept = load_state(tmp_path / "run" / "state.pt")["networks"]
    assert kept.keys() == {"word.vectors.0"} and kept["word.vectors.0"].shape == (3, 64)
    words = read_embedding(written, 64, 75)
    assert torch.equal(next(iter(words.values())), kept["word.vectors.0"])
    model = StableDiffusion.load(device="cpu", dtype="float32")
    before = model.text_encoder.token.weight[model.tokenizer.encode("red cat")]
    assert not torch.equal(kept["word.vectors.0"][:2], before)
    plain = prediction(model, "a <cat-toy> in the snow")
    model.add_embedding(written)
    assert not torch.equal(prediction(model, "a <cat-toy> in the snow"), plain)


@pytest.mark.parametrize(
    ("word", "ending", "name"), [("<lora>", "safetensors", "lora-word"), ("<state>", "pt", "state-word")]
)
def test_the_file_of_a_word_replaces_no_other(word, ending, name, photos, start, tmp_path):  # noqa: F811
    given = ["--train-word", word, "--init-word", "red", "--word-format", ending, "--data", photos, *QUICK]
    status, _, err = start(train, *given, "--out", tmp_path)
    assert status == 0, err
    assert read_embedding(tmp_path / f"{name}.{ending}", 64, 75)
    assert load_state(tmp_path / "state.pt")["step"] == 2


def test_a_part_of_another_word_is_not_the_word():
    """The tokenizer finds whole words only: the caption would have nothing to learn from."""
    told = WithWord(World(1, 64), "sks", OBJECT).told
    assert told(["she asks", "a SKS, red", "a red sks"]) == ["sks, she asks", "a SKS, red", "a red sks"]
    assert WithWord(World(1, 64), "<x>", OBJECT).told(["my <x>"]) == ["my <x>"]


def test_a_long_word_has_a_short_file_name(photos, start, tmp_path):  # noqa: F811
    given = ["--train-word", "x" * 300, "--init-word", "red", "--data", photos, *QUICK, "--out", tmp_path]
    assert start(train, *given)[0] == 0
    assert (tmp_path / f"{'x' * 50}.safetensors").exists()


def test_a_cache_of_scenes_is_not_used_for_a_word(start, tmp_path):  # noqa: F811
    """Captions of drawn scenes are kept with their latents: those of another run have no word."""
    given = ["--data", "world", "--scenes", 4, *QUICK, "--out", tmp_path]
    assert start(train, *given, "--lora", 2)[0] == 0
    (tmp_path / "state.pt").unlink()
    assert start(train, *given, "--train-word", "<x>", "--init-word", "red", "--lr", 1e-2)[0] == 0
    model = StableDiffusion.load(device="cpu", dtype="float32")
    first = model.text_encoder.token.weight[model.tokenizer.encode("red")]
    assert not torch.equal(load_state(tmp_path / "state.pt")["networks"]["word.vectors.0"], first)


def test_an_inpainting_model_is_refused(photos, start, tmp_path):  # noqa: F811
    model = models.for_inpainting(StableDiffusion.load(device="cpu", dtype="float32"))
    models.write_model(model, tmp_path / "inpainting.safetensors", torch.float16)
    given = ["--ckpt", tmp_path / "inpainting.safetensors", "--data", photos, *QUICK, "--out", tmp_path / "run"]
    for what in (("--lora", 2), ("--train-word", "<x>", "--init-word", "red")):
        status, _, err = start(train, *given, *what)
        assert status == 1 and len(err) == 1 and "is an inpainting model" in err[0], err


@pytest.mark.parametrize("what", [("--lora", 2, "--train-text"), ("--train-word", "<x>", "--init-word", "red")])
def test_sdxl(what, xl, photos, start, tmp_path):  # noqa: F811
    given = ["--ckpt", xl, "--data", photos, *QUICK, *what, "--samples", 1, "--sample-steps", 1]
    status, _, err = start(train, *given, "--out", tmp_path)
    assert status == 0, err
    assert (tmp_path / "samples-000002.png").exists()
    model = StableDiffusion.load(xl, device="cpu", dtype="float32")
    if "--lora" in what:
        names = {key.split("_")[1] for key in load_file(tmp_path / "lora.safetensors")}
        assert names == {"unet", "te1", "te2"}
        model.add_lora(tmp_path / "lora.safetensors")
    else:
        assert load_file(tmp_path / "x.safetensors").keys() == {"clip_l", "clip_g"}
        assert model.add_embedding(tmp_path / "x.safetensors")


def test_a_lora_with_its_word(photos, start, tmp_path):  # noqa: F811
    """One file has both; with the names of diffusers, which refuses that, they are two files."""
    given = ["--lora", 2, "--train-word", "<dot>", "--init-word", "red", "--data", photos, *QUICK]
    assert start(train, *given, "--out", tmp_path / "one")[0] == 0
    model = StableDiffusion.load(device="cpu", dtype="float32")
    model.add_lora(tmp_path / "one" / "lora.safetensors")
    assert model.words == {"<dot>": 1}
    assert start(train, *given, "--lora-names", "peft", "--out", tmp_path / "two")[0] == 0
    assert {path.name for path in (tmp_path / "two").glob("*.safetensors")} == {
        "lora.safetensors",
        "word.safetensors",
    }
    other = StableDiffusion.load(device="cpu", dtype="float32")
    other.add_lora(tmp_path / "two" / "lora.safetensors")
    assert other.add_embedding(tmp_path / "two" / "word.safetensors")[0] == "<dot>"


@pytest.mark.exhaustive
def test_resumed_to_the_bit(photos, start, tmp_path, monkeypatch):  # noqa: F811
    """With dropout, whose random numbers are a function of the step, and with shuffled tags, flips and noise."""
    given = ["--lora", 4, "--train-text", "--train-word", "<x>", "--init-word", "red", "--data", photos, *QUICK]
    given += ["--steps", 4, "--lora-dropout", 0.3, "--checkpointing", "--shuffle-tags", "--flip"]
    given += ["--pyramid-noise", 0.5, "--drop", 0.3, "--validate", 0.3, "--text-lr", 1e-4]
    assert start(train, *given, "--out", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        assert start(train, *given, "--out", tmp_path / "parts")[0] == 130
    assert start(train, "--out", tmp_path / "parts", "--resume")[0] == 0
    states = [load_state(tmp_path / name / "state.pt") for name in ("whole", "parts")]
    assert same(*states)
    assert same(*(load_file(tmp_path / name / "lora.safetensors") for name in ("whole", "parts")))
    assert start(train, *given, "--lora-dropout", 0.0, "--out", tmp_path / "other")[0] == 0
    assert not same(states[0]["networks"], load_state(tmp_path / "other" / "state.pt")["networks"])


def test_resuming_with_another_rank_is_refused(photos, start, tmp_path):  # noqa: F811
    assert start(train, "--lora", 4, "--data", photos, *QUICK, "--out", tmp_path)[0] == 0
    status, _, err = start(train, "--out", tmp_path, "--resume", "--lora", 8)
    assert status == 1 and err[-1].startswith("error: --lora 8: the run in") and "with --lora 4" in err[-1]


@pytest.mark.exhaustive
def test_class_images_are_made_once(photos, start, tmp_path):  # noqa: F811
    """Those that are there are kept, an interrupted run goes on with the missing ones; their loss has its weight."""
    given = ["--lora", 2, "--data", photos, *QUICK, "--class-prompt", "a red house", "--class-images", 3]
    given += ["--prior-weight", 0.5, "--out", tmp_path]
    folder = tmp_path / "class"
    folder.mkdir()
    Image.new("RGB", (128, 128), "green").save(folder / "own.png")
    status, out, err = start(train, *given)
    assert status == 0, err
    assert "3 of them class images" in out[0]
    made = sorted(path.name for path in folder.iterdir())
    assert made == ["class-00000.png", "class-00000.txt", "class-00001.png", "class-00001.txt", "own.png"]
    assert (folder / "class-00000.txt").read_text() == "a red house\n"
    dates = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "class-00001.png").unlink()
    assert start(train, "--out", tmp_path, "--resume", "--steps", 3)[0] == 0
    assert (folder / "class-00000.png").stat().st_mtime_ns == dates["class-00000.png"]
    assert (folder / "class-00001.png").exists()


def test_class_images_move_with_the_run(photos, start, tmp_path):  # noqa: F811
    given = ["--lora", 2, "--data", photos, *QUICK, "--class-prompt", "a house", "--class-images", 1]
    given += ["--sample-steps", 1]
    assert start(train, *given, "--out", tmp_path / "one")[0] == 0
    (tmp_path / "one").rename(tmp_path / "two")
    assert start(train, "--out", tmp_path / "two", "--resume", "--steps", 3)[0] == 0
    assert not (tmp_path / "one").exists()


def test_images_of_the_class_are_others_than_those_to_learn(photos, start, tmp_path):  # noqa: F811
    """Whichever of the folders is in the other one."""
    whole = tmp_path / "whole"
    shutil.copytree(photos, whole / "mine")
    Image.new("RGB", (128, 128), "green").save(whole / "green.png")
    given = ["--lora", 2, "--data", whole / "mine", "--caption", "a house", *QUICK]
    status, _, err = start(train, *given, "--reg", whole, "--out", tmp_path / "run")
    assert status == 1 and "no caption (1 of 1 images have none)" in err[-1]
    assert 'call their folder "1_" and the class' in err[-1] and "--caption" not in err[-1]
    (whole / "green.txt").write_text("a green house")
    status, out, err = start(train, *given, "--reg", whole, "--out", tmp_path / "run")
    assert status == 0 and "; 1 of them class images" in out[0], err
    status, _, err = start(train, *given, "--reg", whole / "mine", "--out", tmp_path / "other")
    assert status == 1 and len(err) == 1 and "the folder of --data" in err[0]


def test_a_new_model_knows_no_class_and_learns_its_text(new, photos, start, tmp_path):  # noqa: F811
    given = ["--data", photos, *QUICK, *new, "--out", tmp_path]
    status, _, err = start(train, *given, "--class-prompt", "a house")
    assert status == 1 and "--class-prompt does not go with a new model" in err[-1]
    assert start(train, *given, "--text-lr", 1e-4, "--estimate-memory")[0] == 0


@pytest.mark.exhaustive
def test_validation_is_of_images_that_are_not_trained_on(photos, start, tmp_path):  # noqa: F811
    given = ["--lora", 2, "--data", photos, *QUICK, "--steps", 4, "--save-every", 2, "--validate", 0.25]
    status, out, _ = start(train, *given, "--out", tmp_path)
    assert status == 0 and out[1] == "2 images held out for validation" and ", 6 images," in out[2]
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    found = [line["validation"] for line in lines if "validation" in line]
    assert len(found) == 2 and all(len(each["deciles"]) == 10 and math.isfinite(each["loss"]) for each in found)
    assert found[0]["deciles"] != found[1]["deciles"]
    assert len(read_log(tmp_path / "train.jsonl")) >= 4
    again = [*given, "--lr", 1e-9, "--out", tmp_path / "again"]  # nothing is learned: nothing changes
    assert start(train, *again)[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "again" / "train.jsonl").read_text().splitlines()]
    one, two = (line["validation"]["deciles"] for line in lines if "validation" in line)
    assert one == pytest.approx(two, abs=1e-4)


@pytest.mark.exhaustive
def test_samples_are_without_dropout_and_leave_the_training_as_it_is(photos, start, tmp_path):  # noqa: F811
    given = ["--lora", 2, "--data", photos, *QUICK, "--steps", 3, "--lora-dropout", 0.5, "--save-every", 1]
    assert start(train, *given, "--out", tmp_path / "without")[0] == 0
    more = ["--samples", 1, "--sample-steps", 1, "--ema", 0.9]
    assert start(train, *given, *more, "--out", tmp_path / "with")[0] == 0
    states = [load_state(tmp_path / name / "state.pt")["networks"] for name in ("without", "with")]
    assert same(*states)


def test_a_broken_loss_names_its_image(photos, start, tmp_path, monkeypatch):  # noqa: F811
    """And the files of the last save stay."""
    given = ["--lora", 2, "--data", photos, *QUICK, "--batch", 1, "--steps", 4, "--save-every", 2, "--out", tmp_path]
    errors, calls = Objective.errors, []

    def broken(self, batch):
        calls.append(1)
        return errors(self, batch) * (math.nan if len(calls) == 4 else 1)

    monkeypatch.setattr(Objective, "errors", broken)
    status, _, err = start(train, *given)
    assert status == 1 and "the loss is not finite (nan) at step 4 (" in err[-1] and ".png)" in err[-1]
    assert "the state of step 2 is kept" in err[-1]
    assert load_state(tmp_path / "state.pt")["step"] == 2 and load_file(tmp_path / "lora.safetensors")


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--lora", 0), "the rank of a LoRA must be a whole number from 1, got 0"),
        (("--lora", 100_000), "the rank is above that of every layer"),
        (("--lora", 4, "--lora-alpha", 0), "the alpha of a LoRA must be a number above 0"),
        (("--lora", 4, "--conv-rank", 2), "go with --lora-layers all"),
        (("--lora", 4, "--lora-dropout", 1), "the dropout of a LoRA must be from 0 to below 1"),
        (("--lora", 4, "--inpaint"), "--inpaint does not go with --lora"),
        (("--lora", 4, "--prediction", "v"), "--prediction does not go with --lora"),
        (("--lora", 4, "--optimizer", "muon"), "--optimizer muon does not go with --lora"),
        (("--lora", 4, "--text-lr", 1e-5), "--text-lr goes with --train-text"),
        (("--lora", 4, "--vectors", 2), "--vectors goes with --train-word"),
        (("--dora",), "--dora goes with --lora"),
        (("--keep",), "--keep goes with --lora or --train-word"),
        (("--train-word", "<x>", "--init-word", "qqqq"), "the model does not know 'qqqq'"),
        (("--train-word", "<1>"), "--train-word <1> has no letters: give a word to start from (--init-word)"),
        (("--train-word", "<x>", "--init-word", "red", "--vectors", 100), "a word has from 1 to 75 vectors"),
        (("--train-word", "house", "--init-word", "red", "--train-text"), "--train-text does not go with --train-word"),
        (("--lora", 4, "--class-prompt", " "), "--class-prompt is empty"),
        (("--lora", 4, "--class-prompt", "a house", "--class-images", 0), "--class-images must be at least 1"),
        (("--lora", 4, "--min-snr-gamma", 3), "--min-snr-gamma goes with --weighting min-snr"),
        (("--lora", 4, "--class-images", 3), "--class-images goes with --class-prompt"),
        (("--control", "--class-images", 3), "--class-images goes with --class-prompt"),
        (("--lora", 4, "--huber", 0), "--huber must be above 0"),
        (("--lora", 4, "--noise-offset", 0.1, "--pyramid-noise", 0.5), "give one"),
        (("--lora", 4, "--timesteps", "900-100"), "--timesteps must be two whole numbers from 0 to 1000"),
        (("--lora", 4, "--validate", 1.0), "--validate must be above 0 and below 1"),
        (("--lora", 4, "--zero-snr"), "--zero-snr does not go with --lora"),
    ],
)
def test_wrong_options_are_one_line(options, words, photos, start, tmp_path):  # noqa: F811
    status, _, err = start(train, "--data", photos, *QUICK, *options, "--out", tmp_path / "run")
    assert status == 1 and words in err[-1] and len(err) == 1, err
    assert not (tmp_path / "run").exists() or not [*(tmp_path / "run").glob("*.safetensors")]


def test_data_is_needed_with_a_checkpoint(xl, start, tmp_path):  # noqa: F811
    status, _, err = start(train, "--lora", 2, "--ckpt", xl, *QUICK, "--out", tmp_path)
    assert status == 1 and "--lora needs --data" in err[-1]
    status, _, err = start(train, "--train-word", "<x>", "--init-word", "red", *QUICK, "--out", tmp_path)
    assert status == 1 and "--train-word needs --data: a folder with images, such as data/hut" in err[-1]


def test_one_image_is_enough(photos, start, tmp_path):  # noqa: F811
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(photos / "red.png", data)
    assert start(train, "--lora", 2, "--data", data, "--caption", "a house", *QUICK, "--out", tmp_path / "run")[0] == 0
    status, _, err = start(
        train, "--lora", 2, "--data", data, "--caption", "a house", *QUICK, "--validate", 0.5, "--out", tmp_path / "b"
    )
    assert status == 1 and "with one image none can be held out" in err[-1]


def test_another_prediction_is_in_the_file(photos, start, tmp_path, xl):  # noqa: F811
    """A model of eps learns v on a schedule that ends in pure noise; the file says so."""
    given = ["--ckpt", xl, "--data", photos, *QUICK, "--prediction", "v", "--zero-snr"]
    status, _, err = start(train, *given, "--out", tmp_path)
    assert status == 0, err
    config = StableDiffusion.load(tmp_path / "model.safetensors", device="cpu", dtype="float32").config
    assert config.schedule.prediction == "v" and config.schedule.zero_snr
