"""The training loop with an objective of a few numbers: learning rates, 8-bit AdamW, log, dropout, what stops it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import TINY
from PIL import Image
from test_train_scripts import new, photos, same, start  # noqa: F401
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from scripts import train
from scripts.training.log import Log, curve, read_log
from scripts.training.loop import Trainer
from scripts.training.optimizers import load_optimizer, make_optimizers, set_rate
from scripts.training.processes import Processes
from scripts.training.recipe import Recipe
from scripts.training.sharding import gathered
from scripts.training.state import load_state, save_state
from sd.conditioning import Conditioning
from sd.models.unet import UNet
from sd.training import EMA, LoraParams, TrainableLora, checkpoint_activations, learning_rate, lora_layers

CPU = torch.device("cpu")
QUICK = Recipe(steps=6, batch=2, lr=0.01, warmup=0, ema=0.5, log_every=1, save_every=3)


class Toy(nn.Module):
    """Two layers with dropout between them, and the vectors of two words."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.text = nn.Linear(4, 5)
            self.unet = nn.Linear(5, 1)
            self.token = nn.Embedding(2, 4)
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.dropout(self.text(x + self.token.weight.mean(0)), self.dropout)
        return self.unet(h.tanh()).square().mean()


class Numbers:
    """The batches of a toy: a function of the step. Those of step `bad` have a number that is not finite."""

    def __init__(self, bad: int | None = None, parts: int = 1) -> None:
        self.bad, self.parts = bad, parts

    def __call__(self, step: int):
        rng = torch.Generator().manual_seed(step)
        for _ in range(self.parts):
            x = torch.randn(2, 4, generator=rng)
            yield {"x": x if step != self.bad else x / 0}

    def names(self, step: int) -> list[str]:
        return [f"{step}-{i}.png" for i in range(10)]


def trainer(out, recipe: Recipe = QUICK, objective: nn.Module | None = None, **settings) -> Trainer:
    args = argparse.Namespace(**{"out": out, "precision": "float32", "resume": False, "shard": False, **settings})
    rates = vars(args).pop("rates", None)
    out.mkdir(exist_ok=True)
    return Trainer(objective or Toy(), recipe, Processes(CPU), args, rates)


def run(made: Trainer, batches=None, **hooks) -> Trainer:
    made.run(batches or Numbers(), lambda: "", 16, **hooks)
    return made


@pytest.fixture(autouse=True)
def no_curve(monkeypatch):
    monkeypatch.setattr(Log, "plot", lambda log: None)


def test_schedules():
    rates = {name: Recipe(steps=20, lr=1.0, warmup=5, schedule=name).rate for name in ("cosine", "linear", "constant")}
    for rate in rates.values():
        assert rate(0) == 0.5 and rate(2) == 1.0  # the warm-up is at most a tenth of the steps
    assert rates["constant"](19) == 1.0
    assert rates["linear"](11) == pytest.approx(0.5) and rates["linear"](20) == 0.0
    assert rates["cosine"](11) == pytest.approx(0.5) and rates["cosine"](5) > rates["linear"](5)
    with pytest.raises(ValueError, match="--schedule must be cosine, linear or constant, got step"):
        Recipe(schedule="step")
    assert learning_rate(50, 100, 2.0, 0) == pytest.approx(1.0)


def test_parts_have_rates_of_their_own(tmp_path):
    """Also after the schedule has changed the rate, in the log, and resumed with others."""
    made = trainer(tmp_path, rates={"text.": 0.5, "token.": 0.0})
    before = made.objective.token.weight.clone()
    run(made)
    groups = {name: group for group in made.optimizers[0].param_groups for name in group["names"]}
    assert set(groups) == set(made.trained)
    lr = QUICK.rate(5)
    assert groups["unet.weight"]["lr"] == lr and groups["text.bias"]["lr"] == lr / 2
    assert torch.equal(made.objective.token.weight, before)
    for line in read_log(tmp_path / "train.jsonl"):
        assert line["rates"] == {"text.": line["lr"] / 2, "token.": 0.0}
    with pytest.raises(ValueError, match=r"the learning rate of a part must be at least 0: text\. -1"):
        trainer(tmp_path / "wrong", rates={"text.": -1})
    again = trainer(tmp_path, replace(QUICK, steps=7), resume=True)  # one group instead of three: found by name
    for name, p in again.trained.items():
        assert same(again.optimizers[0].state[p], made.optimizers[0].state[made.trained[name]]), name


def test_a_small_rate_makes_small_steps(tmp_path):
    plain, slow = Toy(), Toy()
    run(trainer(tmp_path / "a", replace(QUICK, steps=1), plain))
    run(trainer(tmp_path / "b", replace(QUICK, steps=1), slow, rates={"text.": 0.1}))
    before = Toy()
    moved = [(toy.text.weight - before.text.weight).norm() for toy in (plain, slow)]
    assert moved[1] / moved[0] == pytest.approx(0.1, rel=1e-3)
    assert torch.equal(plain.unet.weight, slow.unet.weight)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_words_and_lengths_are_not_decayed(optimizer):
    shapes = {
        "unet.mid.weight": (4, 4), "unet.mid.bias": (4,), "text_encoder.token.weight": (9, 4), "words.vectors": (2, 4),
        "lora.layers.0.magnitude": (4, 1), "unet.conv_in.weight": (4, 4, 3, 3),
    }  # fmt: skip
    trained = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    made = make_optimizers(trained, replace(QUICK, optimizer=optimizer, weight_decay=0.1), CPU, {})
    decay = {name: group["weight_decay"] for o in made for group in o.param_groups for name in group["names"]}
    assert {name for name, value in decay.items() if value} == {"unet.mid.weight", "unet.conv_in.weight"}
    assert decay.keys() == shapes.keys()
    only = make_optimizers(
        {"unet.mid.weight": trained["unet.mid.weight"]}, replace(QUICK, optimizer=optimizer), CPU, {}
    )
    assert len(only) == 1  # nothing is left for AdamW beside Muon


def test_a_saved_state_may_lie_in_memory_in_another_order():
    """Fused AdamW goes through memory as it comes; a state without channels-last kernels is of the same weights."""
    rng = torch.Generator().manual_seed(0)
    weight, grads = torch.randn(8, 4, 3, 3, generator=rng), torch.randn(2, 8, 4, 3, 3, generator=rng)

    def step(p: nn.Parameter, grad: torch.Tensor, saved=None):
        (made,) = make_optimizers({"w": p}, QUICK, CPU, {})
        if saved:
            load_optimizer(made, saved)
        set_rate([made], 0.01)
        p.grad = grad.clone(memory_format=torch.preserve_format).to(memory_format=torch.channels_last)
        made.step()
        return made.state_dict()

    kernels = nn.Parameter(weight.to(memory_format=torch.channels_last))
    saved = step(kernels, grads[0])
    saved["state"] = {0: {name: value.clone() for name, value in saved["state"][0].items()}}  # not those at work
    plain = {name: value.contiguous() for name, value in saved["state"][0].items()}
    twin = nn.Parameter(kernels.detach().clone(memory_format=torch.channels_last))
    step(kernels, grads[1], saved)
    step(twin, grads[1], {**saved, "state": {0: plain}})
    assert torch.equal(kernels, twin)


class StandIn(torch.optim.AdamW):
    """Called like bitsandbytes' AdamW8bit, whose arguments these are."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        super().__init__(params, lr, betas, eps, weight_decay)


def test_eight_bit_adamw(tmp_path, monkeypatch):
    """The real one where it is installed. It learns, and a resumed run is the same to the bit."""
    if importlib.util.find_spec("bitsandbytes") is None:
        stand_in = ModuleType("bitsandbytes")
        stand_in.optim = argparse.Namespace(AdamW8bit=StandIn)
        monkeypatch.setitem(sys.modules, "bitsandbytes", stand_in)

    class Large(nn.Module):  # smaller tensors keep 32 bits
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)
            nn.init.eye_(self.layer.weight)
            nn.init.zeros_(self.layer.bias)

        def forward(self, x):
            return self.layer(x.repeat(1, 16)).square().mean()

    recipe = replace(QUICK, optimizer="adamw8bit", beta2=0.9, weight_decay=0.1)
    whole = run(trainer(tmp_path / "whole", recipe, Large()))
    (optimizer,) = whole.optimizers
    assert type(optimizer).__name__ in ("AdamW8bit", "StandIn")
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(tuple(group["betas"]) == (0.9, 0.9) for group in optimizer.param_groups)
    if type(optimizer).__name__ == "AdamW8bit":
        assert optimizer.state[whole.objective.layer.weight]["state1"].dtype == torch.uint8
    losses = [line["loss"] for line in read_log(tmp_path / "whole" / "train.jsonl")]
    assert losses[-1] < losses[0]
    first = trainer(tmp_path / "parts", recipe, Large())
    with pytest.raises(InterruptedError):
        run(first, validate=interrupt)
    second = run(trainer(tmp_path / "parts", recipe, Large(), resume=True))
    assert same(dict(whole.objective.state_dict()), dict(second.objective.state_dict()))
    assert same(*(load_state(tmp_path / name / "state.pt") for name in ("whole", "parts")))


def interrupt() -> dict[str, float]:
    raise InterruptedError


def test_eight_bit_adamw_needs_bitsandbytes(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r'adamw8bit needs bitsandbytes: pip install "sd-from-scratch\[low-memory\]"'):
        trainer(tmp_path, replace(QUICK, optimizer="adamw8bit"))
    monkeypatch.setattr("scripts.training.processes.Processes.count", 2)
    with pytest.raises(ValueError, match="--shard goes with --optimizer adamw, not with muon"):
        two = Processes(CPU, count=2)
        args = argparse.Namespace(out=tmp_path, precision="float32", resume=False, shard=True)
        Trainer(Toy(), replace(QUICK, optimizer="muon"), two, args)


def test_validation_is_logged_and_drawn(tmp_path):
    seen = []

    def validate():
        seen.append(len(seen))
        return {"loss": 1.0 / (1 + len(seen)), "deciles": [0.1 * (i + 1) for i in range(10)]}

    made = run(trainer(tmp_path), validate=validate)
    lines = read_log(tmp_path / "train.jsonl")
    found = [(line["step"], line["validation"]["loss"]) for line in lines if "validation" in line]
    assert found == [(3, 0.5), (6, 1 / 3)] and len(lines) == 8
    assert all("loss" not in line for line in lines if "validation" in line)
    again = Log(tmp_path, 4)
    assert [step for step, _ in again.validation] == [3] and [step for step, _ in again.points] == [1, 2, 3, 4]
    pytest.importorskip("matplotlib")
    log = Log(tmp_path, 6)
    figures = (
        curve(log.points),
        curve(log.points, [(3, {"loss": 0.5})]),
        curve(log.points, [(3, validate()), (6, validate())]),
    )
    assert [len(figure.axes) for figure in figures] == [1, 1, 2]
    assert [line.get_label() for line in figures[1].axes[0].lines] == ["loss", "average of 1", "validation"]
    assert len(figures[2].axes[1].lines) == 10 and figures[2].axes[1].lines[9].get_ydata()[0] == pytest.approx(1.0)
    path = tmp_path / "loss.png"
    figures[2].savefig(path, format="png")
    with Image.open(path) as image:
        assert image.size == (960, 960)
    # the run ended between its last state and the validation, or after it
    for kept, more in ((7, 1), (8, 0)):
        text = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "train.jsonl").write_text("".join(text[:kept]))
        count = len(seen)
        run(trainer(tmp_path, resume=True), validate=validate)
        assert len(seen) == count + more
    assert made.saved == 6


def test_the_log_of_an_earlier_version_is_taken_over(tmp_path):
    (tmp_path / "log.jsonl").write_text(
        '{"step": 1, "loss": 0.5, "seconds": 2.0}\n{"step": 9, "loss": 1, "seconds": 3}\n'
    )
    assert Log(tmp_path, 1).points == [(1, 0.5)]
    assert not (tmp_path / "log.jsonl").exists() and len(read_log(tmp_path / "train.jsonl")) == 1


@pytest.mark.parametrize("log_every", [1, 5])
def test_a_number_that_is_not_finite_is_named_by_step_and_images(log_every, tmp_path):
    made = trainer(tmp_path, replace(QUICK, steps=9, log_every=log_every))
    with pytest.raises(ArithmeticError) as refused:
        run(made, Numbers(bad=3))
    assert str(refused.value) == (
        "the loss is not finite (nan) at step 4 (3-0.png, 3-1.png, 3-2.png, 3-3.png, 3-4.png, 3-5.png, 3-6.png, "
        "3-7.png and 2 more): try a lower --lr or --precision float32; the state of step 3 is kept"
    )
    assert load_state(tmp_path / "state.pt")["step"] == 3


def test_a_gradient_that_is_not_finite_is_found_before_the_loss_that_it_spoils(tmp_path):
    made = trainer(tmp_path, replace(QUICK, log_every=10, save_every=10, steps=10))
    made.objective.unet.bias.register_hook(lambda grad: grad / 0 if made.step == 4 else grad)
    with pytest.raises(
        ArithmeticError, match=r"^the gradient is not finite \(\w+\) at step 5 \(4-0.png, .* nothing has"
    ):
        run(made)


def test_dropout_is_a_function_of_the_step(tmp_path):
    recipe = replace(QUICK, accumulate=2)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    whole = run(trainer(tmp_path / "whole", recipe, Toy(0.5)), Numbers(parts=2))
    assert torch.equal(torch.get_rng_state(), before)
    parts = trainer(tmp_path / "parts", recipe, Toy(0.5))
    with pytest.raises(InterruptedError):
        run(parts, Numbers(parts=2), validate=interrupt)
    torch.rand(3)
    parts = run(trainer(tmp_path / "parts", recipe, Toy(0.5), resume=True), Numbers(parts=2))
    assert same(dict(whole.objective.state_dict()), dict(parts.objective.state_dict()))
    losses = [run(trainer(tmp_path / str(seed), replace(recipe, seed=seed), Toy(0.5))) for seed in (1, 2)]
    assert not same(*(dict(made.objective.state_dict()) for made in losses))


def test_recomputed_blocks_draw_the_same_dropout_and_reach_a_lora():
    """The network is frozen: the first block's input needs no gradient, but the LoRA in it does."""
    torch.manual_seed(0)
    x, context, t = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 64), torch.tensor([3.0, 700.0])
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        unet = UNet(TINY.unet).requires_grad_(False)
        lora = TrainableLora(unet, lora_layers(unet), LoraParams(rank=2))
        for p in lora.parameters():
            nn.init.normal_(p, std=0.1)
        lora.attach(unet)
        unet.down[0].res[0].conv1.register_forward_hook(lambda module, inputs, out: F.dropout(out, 0.3))
        unet.down[0].attn[0].proj_in.register_forward_hook(lambda module, inputs, out: F.dropout(out, 0.3))
        if checkpointing:
            checkpoint_activations(unet, dropout=True)
        torch.manual_seed(1)
        with torch.enable_grad():
            unet(x, t, Conditioning(context)).square().mean().backward()
        found.append([p.grad for p in lora.parameters()])
    assert len(found[0]) > 40 and all(bool(grad.any()) for grad in found[1])
    assert same(*found)


def test_a_sharded_state_is_gathered_outside_of_the_accelerator(tmp_path, monkeypatch):
    """Weights, moments and average of a whole model, four times its size, have no room where one part is."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        divided = {"a": [distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])], "b": 1}
        assert gathered(divided, keep=True)["a"][0].device.type == "cpu"
        assert gathered(divided, keep=True, device=torch.device("meta"))["a"][0].is_meta  # any other device
    finally:
        dist.destroy_process_group()
    made, devices = trainer(tmp_path), []
    monkeypatch.setattr(made, "sharded", True)
    monkeypatch.setattr("scripts.training.sharding.gathered", lambda state, keep, device=None: devices.append(device))
    monkeypatch.setattr("scripts.training.loop.save_state", lambda *_: None)
    made.save()
    assert devices == [torch.device("cpu")]


def test_the_average_can_be_tried():
    module = nn.Linear(2, 2)
    ema = EMA(module, decay=0.5)
    average = {name: value.clone() for name, value in ema.average.items()}
    with torch.no_grad():
        module.weight.add_(1)
    own = module.weight.clone()
    with pytest.raises(InterruptedError), ema.swapped():
        assert torch.equal(module.weight, average["weight"])
        raise InterruptedError
    assert torch.equal(module.weight, own) and same(ema.average, average)


def test_resuming_with_other_options(new, photos, start, tmp_path):  # noqa: F811
    """What cannot change is refused by name; what can is said in one line; a file may have moved."""
    out = tmp_path / "out"
    options = ["--data", photos, *new, "--samples", 0, "--steps", 1]
    assert start(train, *options, "--out", out)[0] == 0

    def resumed(*more: object) -> tuple[int, str]:
        status, printed, err = start(train, "--out", out, "--resume", *more)
        return status, (err if status else printed)[0]

    for given, was in (
        (("--train-text",), "--train-text: the run in {} was started without it"),
        (("--optimizer", "muon"), "--optimizer muon: the run in {} was started with --optimizer adamw"),
        (("--ckpt", "v1.ckpt"), "--ckpt v1.ckpt: the run in {} was started without it"),
        (("--vae", "other.pt"), "--vae other.pt: the run in {} was started with --vae " + new[3]),
    ):
        said = f"error: {was.format(out)}, which cannot change: leave the option out, or start another run with another"
        status, line = resumed(*given)
        assert status == 1 and line == f"{said} --out"
    moved = tmp_path / "elsewhere" / "vae.safetensors"
    moved.parent.mkdir()
    moved.write_bytes(Path(new[3]).read_bytes())
    status, line = resumed("--steps", 2, "--lr", 0.5, "--vae", moved, "--batch", 2, "--checkpointing")
    assert status == 0 and line == "resumed with --steps 2 in place of 1, --lr 0.5 in place of 0.0015, --checkpointing"
    assert json.loads((out / "settings.json").read_text())["lr"] == 0.5


def test_damaged_files_of_a_run_are_one_line(new, photos, start, tmp_path):  # noqa: F811
    assert start(train, "--data", photos, *new, "--samples", 0, "--steps", 1, "--out", tmp_path)[0] == 0
    settings, state = tmp_path / "settings.json", tmp_path / "state.pt"
    good = settings.read_text()
    for text in ("", "[1, 2]", good[:-20], json.dumps(json.loads(good) | {"batch": [1]}), good.replace("false", "3")):
        settings.write_text(text)
        status, _, err = start(train, "--out", tmp_path, "--resume")
        assert status == 1 and err == [f"error: {settings}: damaged; remove it and give all options again"]
    settings.write_text(good)
    whole = state.read_bytes()
    for data in (b"", b"PK" + bytes(50), whole[: len(whole) // 2]):
        state.write_bytes(data)
        status, _, err = start(train, "--out", tmp_path, "--resume")
        assert status == 1 and len(err) == 1 and err[0].startswith(f"error: {state}: not a training state: ")
    save_state({"step": 3}, state)
    status, _, err = start(train, "--out", tmp_path, "--resume")
    assert status == 1 and err == [
        f"error: {state}: not the state of a training run; remove it to start again, or restore it"
    ]
