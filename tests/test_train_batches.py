"""The batches of each step: who sees which image when, and what is drawn for it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from random import Random

import pytest
import torch
from common import TINY_XL, error, tiny_state
from conftest import loaded
from test_train_scripts import new, photos, start  # noqa: F401
from torch import Tensor
from training_common import random_data

from scripts import distill, train, train_text, train_vae
from scripts.training import options as data_arguments
from scripts.training.batches import Batch, Batches, BatchOptions, Tags
from scripts.training.epochs import Epochs
from scripts.training.loop import Recipe
from scripts.training.processes import Processes
from sd import StableDiffusion

CPU = torch.device("cpu")
ALONE = Processes(CPU)
SHAPES = {(16, 16): 7, (12, 20): 4, (20, 12): 2}


def epochs_of(counts: list[int], most: int, **more) -> Epochs:
    bucket = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    repeats = torch.tensor(more.pop("repeats", [1] * len(bucket)))
    regular = torch.tensor([i in more.get("regular", ()) for i in range(len(bucket))])
    more.pop("regular", None)
    return Epochs(bucket, repeats, regular, most, **more)


# ------------------------------------------------------------------------------------------------------ the epochs


@pytest.mark.parametrize("most", [1, 3, 4, 100])
def test_every_image_is_seen_once_per_epoch_and_parts_have_one_bucket(most):
    counts, repeats = [7, 4, 2], [1] * 7 + [1, 3, 1, 1] + [2, 1]
    epochs = epochs_of(counts, most, repeats=repeats, seed=3)
    length = sum(-(-n // most) for n in (7, 6, 3))
    orders = []
    for epoch in range(3):
        parts = [epochs(number) for number in range(epoch * length, (epoch + 1) * length)]
        assert all(len(set(epochs.bucket[part].tolist())) == 1 and 0 < len(part) <= most for part in parts)
        seen = torch.cat(parts).tolist()
        assert Counter(seen) == dict(enumerate(repeats))
        assert Counter(map(len, parts)) == Counter(
            size for n in (7, 6, 3) for size in [most] * (n // most) + [n % most] * (n % most > 0)
        )
        orders.append(seen)
    assert most == 100 or orders[0] != orders[1] != orders[2]
    others = epochs_of(counts, most, repeats=repeats, seed=3)
    for number in (2 * length + 1, 4, 0):  # from anywhere
        assert torch.equal(others(number), epochs(number))


def test_images_of_the_class_are_as_many_as_others_and_go_on_in_the_next_epoch():
    """Of 8 to learn (5 images, one shown 4 times) and 11 of the class in two sizes."""
    regular = [*range(3, 10), *range(12, 16)]
    repeats = [4, 1, 1, *[1] * 7, 1, 1, *[9] * 4]  # repeats of the class do not count
    epochs = epochs_of([10, 6], 3, repeats=repeats, regular=regular)
    number, seen, lengths = 0, Counter(), set()
    for epoch in range(11):
        items: list[int] = []
        begin = number
        while epochs.find(number)[0] == epoch:
            assert epochs.find(number) == (epoch, number - begin)
            items += epochs(number).tolist()
            number += 1
        lengths.add(number - begin)
        of_class = [i for i in items if i in regular]
        assert len(of_class) == 8 and Counter(i for i in items if i not in regular) == {0: 4, 1: 1, 2: 1, 10: 1, 11: 1}
        seen.update(of_class)
    assert set(seen.values()) == {8} and set(seen) == set(regular)  # 88 in 11 epochs
    again = epochs_of([10, 6], 3, repeats=repeats, regular=regular)
    assert again.find(number - 1) == epochs.find(number - 1)
    with pytest.raises(ValueError, match="none to learn"):
        epochs_of([3], 2, regular=[0, 1, 2])


def test_repeats_are_spread_over_the_epoch():
    """3 images shown 8 times are 8 rounds, so a part of 6 has each twice; the class is about half of each part."""
    epochs = epochs_of([3], 6, repeats=[8] * 3)
    for number in range(8):
        assert sorted(epochs(number).tolist()) == [0, 0, 1, 1, 2, 2]
    mixed = epochs_of([30], 10, regular=range(20, 30))
    for number in range(40):
        assert abs(int((mixed(number) >= 20).sum()) - 5) <= 3
    assert len({tuple(epochs(number).tolist()) for number in range(8)}) > 4


def test_groups_stay_together():
    epochs = epochs_of([12], 4, group=2)
    for number in range(6):
        part = epochs(number)
        assert torch.equal(part[1::2], part[::2] + 1) and not (part[::2] % 2).any()
    with pytest.raises(ValueError, match="groups of 2"):
        epochs_of([11], 4, group=2)


# ----------------------------------------------------------------------------------------------------- the batches


@pytest.mark.parametrize("count", [2, 3])
def test_processes_compute_what_one_with_the_whole_batch_does(count, tiny_sd):
    """Whatever the part: also where the last one does not suffice for all, whose shares are filled with weight 0."""
    data = random_data(tiny_sd, SHAPES, regular=[1, 8], repeats=[1, 1, 2, *[1] * 10], more={"mask": (1, 16, 16)})
    options = BatchOptions(drop=0.3, prior_weight=0.5, tags=Tags(shuffle=True), noise=lambda x, rng: x + 1)
    alone = Batches(data, tiny_sd, Recipe(batch=2 * count, accumulate=2), ALONE, options)
    shares = [
        Batches(data, tiny_sd, Recipe(batch=2, accumulate=2), Processes(CPU, rank, count), options)
        for rank in range(count)
    ]
    filled = 0
    for step in range(6):
        for whole, *parts in zip(alone(step), *(batches(step) for batches in shares), strict=True):
            one: Batch = whole["batch"]
            mine: list[Batch] = [part["batch"] for part in parts]
            assert len({len(part.x0) for part in mine}) == 1
            columns = zip(*mine, strict=True)
            joined = Batch(*(None if column[0] is None else torch.cat(column) for column in columns))
            n, extra = len(one.x0), len(joined.x0) - len(one.x0)
            filled += extra
            assert extra < count and not joined.weight[n:].any()
            for name, value in one._asdict().items():
                if isinstance(value, Tensor) and name != "weight":
                    assert torch.equal(value, getattr(joined, name)[:n]), name
            losses = torch.rand(n)
            expected = (one.weight * losses).mean()
            weighted = joined.weight * torch.cat([losses, torch.ones(extra)])
            torch.testing.assert_close(torch.stack([each.mean() for each in weighted.chunk(count)]).mean(), expected)
    assert filled > 0
    assert shares[0].names(3) == alone.names(3) and set(alone.names(3)) <= set(data.names)


def test_a_step_is_the_same_on_every_start_and_none_is_like_another(tiny_sd):
    data = random_data(tiny_sd, SHAPES)
    recipe, options = Recipe(batch=3, accumulate=2), BatchOptions(drop=0.2)
    first = [part["batch"] for step in range(8) for part in Batches(data, tiny_sd, recipe, ALONE, options)(step)]
    late = [part["batch"] for part in Batches(data, tiny_sd, recipe, ALONE, options)(7)]
    for one, other in zip(first[14:], late, strict=True):
        assert all(a is None or torch.equal(a, b) for a, b in zip(one, other, strict=True))
    noises = {float(batch.noise[0, 0, 0, 0]) for batch in first}
    assert len(noises) == 16
    assert {tuple(batch.x0.shape[2:]) for batch in first} == set(SHAPES)
    other = next(Batches(data, tiny_sd, Recipe(batch=3, seed=1), ALONE)(0))["batch"]
    assert other.x0.shape != first[0].x0.shape or not torch.equal(other.noise, first[0].noise)


def test_latents_are_sampled_and_times_are_in_their_range(tiny_sd):
    data = random_data(tiny_sd, {(4, 4): 1})
    batches = Batches(data, tiny_sd, Recipe(batch=1), ALONE, BatchOptions(timesteps=(100, 200)))
    drawn = [next(batches(step))["batch"] for step in range(600)]
    t = torch.cat([batch.t for batch in drawn])
    assert t.min() >= 100 and t.max() < 200 and 140 < t.float().mean() < 160
    x0 = torch.cat([batch.x0 for batch in drawn])
    mean, std = data.take("mean", [0]).float(), data.take("std", [0]).float()
    assert ((x0.mean(0) - mean[0]).abs() < 0.2).all() and ((x0.std(0) - std[0]).abs() < 0.15).all()
    correlation = ((x0 - mean) * torch.cat([batch.noise for batch in drawn])).mean()
    assert abs(correlation) < 0.05  # of what is sampled and what is added


def test_half_of_the_images_are_mirrored_with_all_that_belongs_to_them(tiny_sd, monkeypatch):
    more = {"mask": (1, 8, 8), "pixels": (3, 64, 64)}
    data = random_data(tiny_sd, {(8, 8): 4}, more=more)
    (bucket,) = data.buckets
    bucket |= {"flipped_mean": -bucket["mean"], "std": 0 * bucket["std"], "flipped_std": 0 * bucket["std"]}
    recipe = Recipe(batch=4)
    monkeypatch.setattr("scripts.training.batches.random_masks", lambda n, h, w, rng: torch.zeros(n, 1, h, w))
    batches = Batches(data, tiny_sd, recipe, ALONE, BatchOptions(inpaint=True))
    for step in range(4):
        batch, items = next(batches(step))["batch"], batches.epochs(step).tolist()
        mean, mask = data.take("mean", items).float(), data.take("mask", items).float()
        flipped = (batch.x0 != mean).flatten(1).any(1)

        pixels = data.take("pixels", items).float() / 127.5 - 1
        for i, other in enumerate(flipped.tolist()):
            assert torch.equal(batch.x0[i], -mean[i] if other else mean[i])
            assert torch.equal(batch.mask[i], mask[i].flip(-1) if other else mask[i])
            shown = pixels[i].flip(-1) if other else pixels[i]  # nothing is masked
            assert error(batch.concat[i, 1:], tiny_sd.vae.encode(shown[None]).mode()[0]) < 1e-4
    batches, mirrored = Batches(data, tiny_sd, recipe, ALONE), torch.zeros(4)
    for step in range(200):
        items = batches.epochs(step)
        mean = data.take("mean", items.tolist()).float()
        mirrored[items] += (next(batches(step))["batch"].x0 != mean).flatten(1).any(1)
    assert ((mirrored > 75) & (mirrored < 125)).all()
    del bucket["flipped_mean"], bucket["flipped_std"]
    batch = next(Batches(data, tiny_sd, recipe, ALONE)(0))["batch"]
    items = Batches(data, tiny_sd, recipe, ALONE).epochs(0).tolist()
    assert torch.equal(batch.x0, data.take("mean", items).float())
    assert torch.equal(batch.mask, data.take("mask", items).float())


def test_inpainting_masks_have_the_shape_of_the_bucket(tiny_sd):
    shapes = {(16, 16): 2, (12, 20): 2}
    data = random_data(tiny_sd, shapes)
    for (h, w), bucket in zip(shapes, data.buckets, strict=True):
        bucket["pixels"] = torch.zeros(2, 3, 8 * h, 8 * w, dtype=torch.uint8)
    batches = Batches(data, tiny_sd, Recipe(batch=2), ALONE, BatchOptions(inpaint=True))
    found = [next(batches(step))["batch"] for step in range(2)]
    assert {tuple(batch.concat.shape) for batch in found} == {(2, 5, 16, 16), (2, 5, 12, 20)}
    assert all(set(batch.concat[:, 0].unique().tolist()) <= {0, 1} for batch in found)


def test_sizes_of_each_image_are_told():
    model = StableDiffusion(TINY_XL, **loaded(tiny_state("tiny-sdxl"), TINY_XL))
    data = random_data(model, SHAPES)
    batches = Batches(data, model, Recipe(batch=4), ALONE)
    for step in range(4):
        assert torch.equal(next(batches(step))["batch"].sizes, data.sizes[batches.epochs(step)])


def test_the_loss_is_the_mean_over_what_masks_show(tiny_sd):
    """An image counts the same whatever the size of its mask; a white mask changes nothing."""
    data = random_data(tiny_sd, {(8, 8): 2})
    batch = next(Batches(data, tiny_sd, Recipe(batch=2), ALONE)(0))["batch"]._replace(weight=torch.tensor([1.0, 0.5]))
    objective = train.Objective(tiny_sd, train.LossParams())
    plain = objective(batch)
    torch.testing.assert_close(objective(batch._replace(mask=torch.ones(2, 1, 8, 8))), plain)
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :2], mask[1, :, :, :5] = 1.0, 0.5
    noisy = torch.cat([
        tiny_sd.schedule.add_noise(x, eps, tiny_sd.schedule.level(int(t)))
        for x, eps, t in zip(batch.x0.split(1), batch.noise.split(1), batch.t, strict=True)
    ])  # fmt: skip
    errors = (tiny_sd.unet(noisy, batch.t, objective.captions(batch)) - batch.noise).square()
    expected = (errors[0, :, :2].mean() + 0.5 * errors[1, :, :, :5].mean()) / 2
    torch.testing.assert_close(objective(batch._replace(mask=mask)), expected)


# ---------------------------------------------------------------------------------------------------- the captions


def test_dropped_prompts_and_phrasings(tiny_sd):
    data = random_data(tiny_sd, {(4, 4): 5})
    batches = Batches(data, tiny_sd, Recipe(batch=5), ALONE, BatchOptions(drop=0.25))
    empty = tiny_sd.tokenizer([""])[0]
    seen: Counter[str] = Counter()
    for step in range(100):
        batch, items = next(batches(step))["batch"], batches.epochs(step).tolist()
        for row, i in zip(batch.ids, items, strict=True):
            if torch.equal(row, empty):
                seen["dropped"] += 1
            else:
                captions = [tiny_sd.tokenizer([text])[0] for text in data.captions(i)]
                (k,) = [k for k, ids in enumerate(captions) if torch.equal(ids, row)]
                seen[str(k)] += 1
    assert 90 < seen["dropped"] < 160 and abs(seen["0"] - seen["1"]) < 90


def test_tags_are_shuffled_dropped_and_kept():
    caption = "a cat, red,  green, blue,black, white"
    every = ["a cat", "red", "green", "blue", "black", "white"]
    shuffled = {Tags(shuffle=True, keep=2)(caption, Random(i)) for i in range(50)}
    assert len(shuffled) > 15 and all(each.startswith("a cat, red, ") for each in shuffled)
    assert all(sorted(each.split(", ")) == sorted(every) for each in shuffled)
    dropped = [Tags(drop=0.3, keep=1)(caption, Random(i)).split(", ") for i in range(200)]
    assert all(each[0] == "a cat" and each == [tag for tag in every if tag in each] for each in dropped)
    assert 3.2 < sum(len(each) - 1 for each in dropped) / 200 < 3.8
    assert Tags(drop=1.0)(caption, Random(0)) == "" and not Tags().change
    for wrong, said in (({"keep": -1}, "--keep-tags"), ({"drop": 1.5}, "--drop-tags"), ({"keep": 1}, "goes with")):
        with pytest.raises(ValueError, match=said):
            Tags(**wrong)


def test_tags_change_what_a_batch_says(tiny_sd):
    data = random_data(tiny_sd, {(4, 4): 2})
    batches = Batches(data, tiny_sd, Recipe(batch=2), ALONE, BatchOptions(tags=Tags(shuffle=True, keep=1)))
    said = {tiny_sd.tokenizer.decode(row) for step in range(90) for row in next(batches(step))["batch"].ids}
    listed = {text for text in said if "photo 0" in text}
    assert len(listed) == 6 and all(text.startswith("a photo 0") for text in listed)


# ----------------------------------------------------------------------------------------------------- the options


def test_options_that_make_no_sense_are_one_line(new, photos, start, tmp_path):  # noqa: F811
    def problem(*args: object) -> str:
        status, _, err = start(train, *args, *new, "--steps", 1, "--out", tmp_path / "out")
        assert status == 1 and len(err) == 1
        return err[0].removeprefix("error: ")

    for name in ("flip", "masked"):
        assert problem(f"--{name}").startswith(f"--{name} is for a folder of images, not for drawn scenes")
    photographs = ("--data", photos)
    assert problem(*photographs, "--prior-weight", 2) == (
        "--prior-weight is the weight of class images: give their folder (--reg) or --class-prompt"
    )
    assert problem(*photographs, "--reg", tmp_path / "none") == f"--reg {tmp_path / 'none'}: no such folder"
    assert problem(*photographs, "--reg", photos).startswith(f"--reg {photos}: the folder of --data")
    shutil.copytree(photos, tmp_path / "others")
    assert problem(*photographs, "--reg", tmp_path / "others", "--prior-weight", -1).startswith(
        "--prior-weight must be at least 0"
    )
    assert problem(*photographs, "--drop", 2).startswith("--drop must be from 0 to 1")
    assert problem(*photographs, "--keep-tags", 1) == "--keep-tags goes with --shuffle-tags or --drop-tags"
    assert problem(*photographs, "--size", 8) == "--size must be at least 16 for this model, got 8"
    status, _, err = start(train, "--control", *photographs, "--masked", "--out", tmp_path / "out")
    assert status == 1 and err[0].startswith("error: --masked does not go with --control")
    for program, offered in ((train_text, set()), (train_vae, set()), (distill, {"square", "flip"})):
        names = {*data_arguments.BUCKETED, *data_arguments.FINE_TUNING}
        assert names & vars(program.parser().parse_args([])).keys() == offered


def test_a_run_with_all_of_it(new, photos, start, tmp_path):  # noqa: F811
    """Class images, masks, mirrored images and tags, in buckets; the loss is finite and the model is written."""
    out, others = tmp_path / "out", tmp_path / "others"
    shutil.copytree(photos, others)
    options = ["--data", photos, "--reg", others, "--prior-weight", 0.5, "--masked", "--flip", "--shuffle-tags"]
    status, said, err = start(train, *new, *options, "--samples", 0, "--steps", 3, "--out", out)
    assert status == 0, err
    assert "8 of them class images" in said[0] and (out / "model.safetensors").exists()
    lines = [json.loads(line) for line in next(out.glob("*.jsonl")).read_text().splitlines()]
    assert all(0 < line["loss"] < 10 for line in lines)
