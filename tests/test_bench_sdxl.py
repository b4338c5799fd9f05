"""The benchmark of SDXL on a small network: two text encoders, size conditioning, and what it says of other models."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from common import TINY_XL, error
from sdxl_common import TINY_REFINER, TINY_XL_INPAINT
from torch import Tensor, nn

from scripts import bench
from scripts.benchmark import openvino_networks, report, sides, texts
from scripts.benchmark.cases import (
    FEW_STEPS,
    IMAGES,
    LARGE_PARTS,
    PARTS,
    PROMPTS,
    flop,
    inner_cases,
    inputs,
    inputs_of,
    needed,
    usual_case,
    weight_bytes,
)
from scripts.benchmark.references import REQUIRED
from scripts.benchmark.weights import Setup, load_networks
from scripts.benchmark.workers import Failed, Worker
from sd.config import END, MODELS, SD1, TextConfig
from sd.pipeline import StableDiffusion

CPU = torch.device("cpu")
SMALL = replace(TINY_XL, size=64)
SETUP = Setup(SMALL, None, CPU, "float32", 1, Path("."))


def needs(*packages: str) -> None:
    """Skip where the packages are not installed."""
    for name in packages:
        if find_spec(name) is None:
            pytest.skip(f"compares with {name}, which is not installed")


def work_of(text: TextConfig, tokens: int) -> int:
    """The operations of a text encoder, counted by hand: linear layers, attention, projection for two texts."""
    layers = tokens * text.layers * (2 * 12 * text.width**2 + 4 * text.length * text.width)
    return layers + (4 * text.width * text.projection if text.projection else 0)


def test_both_text_encoders():
    """Each has the ids of its own tokenizer, and counts as work and as weights; both outputs are compared."""
    case = usual_case("text", SMALL)
    assert needed("text", SMALL) == ("text_encoder", "text_encoder_2") and needed("text", SD1) == ("text_encoder",)
    assert needed("picture", SMALL) == needed("start", SMALL) == SMALL.networks
    first, second = inputs(case, SMALL)
    assert first.shape == second.shape == (2, 77) and (first[:, -1] == END).all() and (second[:, -1] == 0).all()
    assert flop(case, SMALL) == sum(work_of(text, 2 * 77) for text in SMALL.text)
    side = sides.Side(SETUP, "text")
    numbers = sum(weight.numel() for network in side.networks.values() for weight in network.state_dict().values())
    assert weight_bytes("text", SMALL, torch.float16) == 2 * numbers
    a, b = (side.networks[name](*given) for name, given in inputs_of(case, SMALL).items())
    hidden = torch.cat([a.hidden, b.hidden], dim=-1).flatten(1)
    assert torch.equal(side.call(case)(), torch.cat([hidden, b.pooled], dim=1))


def test_both_text_encoders_of_a_peer():
    """The same hidden states, and the same pooled output."""
    needs(*REQUIRED)
    case = usual_case("text", SMALL)
    ours, theirs = (kind(SETUP, "text").call(case)() for kind in (sides.Side, sides.Diffusers))
    width = SMALL.text[1].pooled_width
    assert error(theirs[:, :-width], ours[:, :-width]) < 1e-5 and error(theirs[:, -width:], ours[:, -width:]) < 1e-5


def test_an_empty_negative_prompt_is_not_encoded():
    """It is zeros for SDXL, so a picture is the work of one prompt; the part `text` always has two."""
    picture, text = usual_case("picture", SMALL, 2), usual_case("text", SMALL)
    assert len(inputs(inner_cases(picture, SMALL)["text"], SMALL)[0]) == 1
    assert len(inputs(inner_cases(picture, SD1)["text"], SD1)[0]) == len(inputs(text, SMALL)[0]) == 2
    unet, vae = (flop(usual_case(part, SMALL), SMALL) for part in ("unet", "vae"))
    assert flop(picture, SMALL) == pytest.approx(2 * unet + vae + sum(work_of(t, 77) for t in SMALL.text), rel=1e-4)


def told(network: nn.Module, call) -> list[Tensor]:
    """What the layer that reads the vector was given, for each evaluation of a U-Net."""
    found: list[Tensor] = []
    hook = network.register_forward_pre_hook(lambda _, given: found.append(given[0].float()))
    call()
    hook.remove()
    return found


def test_an_image_of_each_program_is_told_the_same():
    """Pooled text and sizes, with zeros for the negative prompt: ours, diffusers' pipeline, and the loop for OpenVINO.

    A step is of two items; diffusers puts the negative prompt first.
    """
    needs(*REQUIRED)
    case = usual_case("picture", SMALL, 2)
    side, other = (kind(SETUP, "picture") for kind in (sides.Side, sides.Diffusers))
    ours = told(side.networks["unet"].vector, side.call(case))
    theirs = told(other.networks["unet"].model.add_embedding.linear_1, other.call(case))
    assert len(ours) == len(theirs) == 2 and ours[0].shape == (2, SMALL.unet.vector)
    order = [0, 1] if error(ours[0], theirs[0]) < 1e-3 else [1, 0]
    assert all(error(theirs[step][order], ours[step]) < 1e-5 for step in range(2))

    model = StableDiffusion(SMALL, **side.networks)
    encoder = other.encoder(case)
    both = texts.prompt_and_negative(encoder(*inputs(inner_cases(case, SMALL)["text"], SMALL)), case, SMALL)
    cond, uncond = (texts.conditioning(text, case, SMALL) for text in both)
    expected = model.conditioning([PROMPTS[0]])
    assert error(cond.context, expected.context) < 1e-5 and error(cond.vector, expected.vector) < 1e-5
    zeros = model.zeroed(expected, [True])
    assert torch.equal(uncond.context, zeros.context) and error(uncond.vector, zeros.vector) < 1e-6


@pytest.mark.exhaustive
def test_files_of_openvino(tmp_path):
    """A float16 file that is made from float16 weights is the one that float32 weights would make, in all constants."""
    needs(*REQUIRED, "openvino")
    try:
        with Worker("conversion", tmp_path / "log", Conversions) as worker:
            answers = [
                worker.ask("layers", replace(SETUP, folder=tmp_path), name) for name in ("unet", "text_encoder_2")
            ]
    except Failed as failure:
        if "died" not in failure.why:
            raise
        pytest.skip(str(failure))
    for of_float16, of_float32 in answers:
        assert of_float16 == of_float32 and len(of_float16[1]) > 10


class Conversions:
    """Converts in a process of its own, as the benchmark does, since OpenVINO dies on some processors."""

    def layers(self, setup: Setup, name: str) -> list[tuple[int, list[bytes]]]:
        """For float16 and float32 weights: the number of layers, and the float16 constants."""
        found = []
        for half in (True, False):
            its = replace(setup, dtype="float16" if half else "float32")
            kind = {"unet": openvino_networks.PlainUNet}.get(name, openvino_networks.Encoder)
            built = openvino_networks.peers(load_networks(its, [name]), SMALL, its.torch_dtype)[name]
            given = openvino_networks.example(name, SMALL)
            model = openvino_networks.converted(kind(built), given, half)
            file = setup.folder / f"{name}-{half}.xml"
            openvino_networks.openvino().save_model(model, file, compress_to_fp16=True)
            model = openvino_networks.openvino().Core().read_model(file)
            layers = model.get_ordered_ops()
            constants = [layer.data for layer in layers if layer.get_type_name() == "Constant"]
            found.append((len(layers), sorted(x.tobytes() for x in constants if x.dtype == np.float16)))
        return found


@pytest.mark.exhaustive
@pytest.mark.parametrize("peer", ["diffusers", "openvino"])
def test_every_part(tmp_path, monkeypatch, peer):
    """With a small model in the place of SDXL; where the peer cannot run on this processor, the notes say so."""
    needs(*REQUIRED, *(["openvino"] if peer == "openvino" else []))
    monkeypatch.setitem(MODELS, "sdxl", SMALL)
    file = tmp_path / "new.json"
    options = ["--model", "sdxl", "--device", "cpu", "--dtype", "float32", "--runs", "1", "--threads", "1"]
    assert bench.main([*options, "--peers", peer, "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    parts = dict.fromkeys(row["part"] for row in record["figures"])  # control has two rows: with it and without
    assert list(parts) == list(LARGE_PARTS) and record["machine"]["model"] == SMALL.name
    if record["notes"]:
        assert all(f": {peer} failed: " in note for note in record["notes"])
        pytest.skip("; ".join(record["notes"]))
    for row in record["figures"]:
        if row["part"] == "control" and peer == "openvino":
            assert peer not in row["peers"]  # it takes no part
            continue
        its = row["peers"][peer]
        assert its["seconds"] > 0 and (row["part"] in (*IMAGES, "start") or its["difference"] < 1e-4)


def chosen(config, *options: str) -> tuple[list[str], int]:
    """Parts and steps of a run."""
    args = bench.parser().parse_args(options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "sd1", config)
        bench.find_config(args)
    return list(args.parts), args.steps


def test_what_is_measured_by_default():
    """Of a large model fewer parts and steps, and of each model only what it can do."""
    assert chosen(SD1) == (list(PARTS), 4)
    assert chosen(TINY_XL) == (["unet", "control", "vae", "taesd", "text", "picture", "start"], 2)
    assert chosen(TINY_XL_INPAINT) == (["unet", "control", "vae", "taesd", "text", "start"], 2)
    assert chosen(TINY_REFINER) == (["unet", "control", "vae", "taesd", "text"], 2)
    assert chosen(TINY_XL, "--steps", "5", "--parts", *FEW_STEPS) == (list(FEW_STEPS), 5)


@pytest.mark.parametrize(
    ("model", "parts", "message"),
    [
        ("sdxl-refiner", ["picture", "start"], "SDXL refiner only finishes images of another model"),
        ("sdxl-inpaint", ["picture", "lcm"], "SDXL inpainting cannot generate from text alone"),
    ],
)
def test_images_that_a_model_cannot_make(capsys, model, parts, message):
    assert bench.main(["--model", model, "--peers", "--parts", "vae", *parts]) == 1
    assert capsys.readouterr().err == f"error: {message}: leave {', '.join(parts)} out of --parts\n"


def test_a_file_of_another_model_is_not_compared(tmp_path, capsys, monkeypatch):
    """A step of SDXL at 512x512 has the label of a step of SD 1.x; it is refused before anything is measured."""
    monkeypatch.setattr(bench, "measured", lambda args: pytest.fail("it was measured"))
    then, now = tmp_path / "then.json", tmp_path / "now.json"
    for file, config in ((then, SD1), (now, SMALL)):
        record = {"machine": report.machine(replace(SETUP, config=config)), "notes": [], "figures": []}
        report.write(file, record)
    message = f"error: --compare {then}: measured with {SD1.name}, not {{}}: give one of the same model\n"
    assert bench.main(["--model", "sdxl", "--peers", "--compare", str(then)]) == 1
    assert capsys.readouterr().err == message.format("SDXL base")
    assert bench.main(["--show", str(now), "--compare", str(then)]) == 1
    assert capsys.readouterr().err == message.format(SMALL.name)
    assert bench.main(["--show", str(now), "--compare", str(now)]) == 0


def test_the_check_is_of_one_model(capsys):
    """Its recorded outputs are of Stable Diffusion 1.x."""
    assert bench.main(["--check", "--model", "sdxl", "--device", "cpu"]) == 1
    assert capsys.readouterr().err == "error: --model has no effect with --check: leave it out\n"
