"""Images of other programs that were made with SDXL: their refiner, its switch, sizes and grids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sdxl_common import (
    SMALL_ARGS,
    model_files,
)

from scripts import txt2img
from sd.recipes.comfyui import read_graph
from sd.recipes.json_texts import read_fooocus
from sd.recipes.webui import read_parameters


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Base and refiner as files of our layout."""
    return model_files(tmp_path_factory.mktemp("models"))


def test_refiner_of_the_web_ui():
    text = (
        "a cat\nNegative prompt: fog\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 1024x1024, "
        "Model: sd_xl_base_1.0, Refiner: sd_xl_refiner_1.0 [7440042bbd], Refiner switch at: 0.75, Version: v1.6.0"
    )
    recipe = read_parameters(text)
    assert recipe.request.params.refiner_from == 0.75 and "refiner_from" in recipe.given
    assert recipe.info["Refiner"] == "sd_xl_refiner_1.0 [7440042bbd]" and recipe.notes == ()


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ("Schedule type: Karras, Refiner switch at: 0.8, Version: v1.8.0", 0.8),
        ("Schedule type: Karras, Refiner switch at: 0.8, Version: v1.10.1", 0.6),
        ("Schedule type: Uniform, Refiner switch at: 0.8, Version: v1.9.0", 0.8),
        (
            "Schedule type: Karras, Refiner switch at: 0.8, Refiner switch by sampling steps: True, Version: v1.10.1",
            0.8,
        ),
        ("Schedule type: Karras, Refiner switch at: 0.8, Version: sd 0.2.0", 0.8),
    ],
)
def test_what_the_web_ui_switches_by(more, wanted):
    """From 1.9 on by a timestep, before by steps."""
    recipe = read_parameters(
        f"a cat\nSteps: 20, Sampler: DPM++ 2M, CFG scale: 7, Seed: 1, Size: 64x64, Refiner: x, {more}"
    )
    assert recipe.request.params.refiner_from == wanted and recipe.notes == ()


def test_refiner_of_fooocus():
    recipe = read_fooocus(
        {"prompt": "a cat", "steps": 30, "refiner_model": "sd_xl_refiner_1.0.safetensors", "refiner_switch": 0.6}
    )
    assert recipe.request.params.refiner_from == 0.6 and recipe.info["Refiner"] == "sd_xl_refiner_1.0"
    assert not any("refiner" in note or "SDXL" in note for note in recipe.notes)


def comfy(**changed) -> dict:
    """ComfyUI's example of base and refiner."""
    size = {"width": 1024, "height": 1024}
    sizes = {**size, "crop_w": 0, "crop_h": 0, "target_width": 1024, "target_height": 1024}
    sampler = {"steps": 25, "cfg": 8.0, "sampler_name": "euler", "scheduler": "normal", "noise_seed": 7}
    nodes = {
        "1": ("CheckpointLoaderSimple", {"ckpt_name": "sd_xl_base_1.0.safetensors"}),
        "2": ("CheckpointLoaderSimple", {"ckpt_name": "sd_xl_refiner_1.0.safetensors"}),
        "3": ("CLIPTextEncodeSDXL", {**sizes, "text_l": "ink", "text_g": "a cat", "clip": ["1", 1]}),
        "4": ("CLIPTextEncodeSDXL", {**sizes, "text_l": "fog", "text_g": "fog", "clip": ["1", 1]}),
        "5": ("CLIPTextEncodeSDXLRefiner", {**size, "ascore": 7.0, "text": "a cat", "clip": ["2", 1]}),
        "6": ("CLIPTextEncodeSDXLRefiner", {**size, "ascore": 2.0, "text": "fog", "clip": ["2", 1]}),
        "7": ("EmptyLatentImage", {**size, "batch_size": 1}),
        "8": ("KSamplerAdvanced", {
            **sampler, "add_noise": "enable", "start_at_step": 0, "end_at_step": 20, "model": ["1", 0],
            "return_with_leftover_noise": "enable",
            "positive": ["3", 0], "negative": ["4", 0], "latent_image": ["7", 0],
        }),
        "9": ("KSamplerAdvanced", {
            **sampler, "add_noise": "disable", "start_at_step": 20, "end_at_step": 10000, "model": ["2", 0],
            "positive": ["5", 0], "negative": ["6", 0], "latent_image": ["8", 0],
        }),
        "10": ("VAEDecode", {"samples": ["9", 0], "vae": ["2", 2]}),
        "11": ("SaveImage", {"images": ["10", 0]}),
    }  # fmt: skip
    graph = {key: {"class_type": kind, "inputs": dict(inputs)} for key, (kind, inputs) in nodes.items()}
    for key, inputs in changed.items():
        graph[key[1:]]["inputs"] |= inputs
    return graph


def test_base_and_refiner_of_comfyui():
    recipe = read_graph(comfy())
    request = recipe.request
    assert (request.prompt, request.prompt_2, request.negative, request.negative_2) == (("ink",), "a cat", "fog", None)
    assert (request.params.refiner_from, recipe.info["Refiner"]) == (0.8, "sd_xl_refiner_1.0")
    assert (request.params.aesthetic_score, request.params.negative_aesthetic_score) == (7.0, 2.0)
    assert request.params.original_width is None  # the image's own
    assert recipe.notes == ()


@pytest.mark.parametrize(
    ("changed", "settings", "note"),
    [
        (
            {
                **{node: {"width": 4096, "crop_w": 9, "crop_h": 8, "target_height": 512} for node in ("n3", "n4")},
                **{node: {"width": 4096} for node in ("n5", "n6")},
            },
            {"original_width": 4096, "crop_left": 9, "crop_top": 8, "target_height": 512, "original_height": None},
            "",
        ),
        ({"n4": {"height": 300}}, {"original_height": None}, "not reproduced: height 300 of the negative prompt alone"),
        ({"n5": {"height": 768}}, {"original_height": None}, "not reproduced: height 768 of the refiner alone"),
        ({"n8": {"return_with_leftover_noise": "disable"}}, {"refiner_from": None}, "only steps 0 to 20 of 25"),
        ({"n9": {"cfg": 5.0}}, {"refiner_from": 0.8}, "not reproduced: cfg 5.0 of the second sampler alone"),
        ({"n6": {"text": "mist"}}, {"refiner_from": 0.8}, "the negative prompt of the second sampler, 'mist'"),
        ({"n2": {"ckpt_name": "sd_xl_base_1.0.safetensors"}}, {"refiner_from": None, "steps": 25}, ""),
        ({"n2": {"ckpt_name": ""}}, {"refiner_from": None}, "a later pass is not reproduced"),
        ({"n8": {"end_at_step": 10}, "n9": {"start_at_step": 10}}, {"refiner_from": 0.4}, ""),
        ({"n9": {"start_at_step": 15}}, {"refiner_from": None}, "a later pass is not reproduced"),
        ({"n9": {"add_noise": "enable"}}, {"aesthetic_score": 6.0}, "the sampler runs only steps 0 to 20 of 25"),
    ],
)
def test_graphs_of_comfyui(changed, settings, note):
    recipe = read_graph(comfy(**changed))
    assert {name: getattr(recipe.request.params, name) for name in settings} == settings
    assert (note in " ".join(recipe.notes)) if note else recipe.notes == ()


@pytest.mark.exhaustive
def test_an_empty_negative_prompt_of_comfyui_is_encoded(files, tmp_path, capsys):
    """Which is said of a model for which it is zeros, unless they are zeros in the graph as well."""
    empty = {"n3": {"text_l": "a cat"}, "n4": {"text_l": "", "text_g": ""}, "n6": {"text": ""}}
    zeros = {"12": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["4", 0]}}}
    for i, (graph, model, said) in enumerate(
        (
            (comfy(**empty), "base", True),
            (comfy(**empty), "refiner", False),
            (comfy(**empty, n8={"negative": ["12", 0]}) | zeros, "base", False),
            (comfy(), "base", False),
        )
    ):
        (tmp_path / f"{i}.json").write_text(json.dumps(graph))
        like = ("--like", str(tmp_path / f"{i}.json"), "--ckpt", str(files[model]), "--spacing", "trailing")
        assert txt2img.main([*like, *SMALL_ARGS, "--out", str(tmp_path / f"{i}.png")]) == 0
        assert ("ComfyUI encodes the empty negative prompt" in capsys.readouterr().err) is said


def test_the_grid_of_sgm_has_a_name_everywhere():
    """Ours in our files; sgm_uniform of others is the same before its timesteps are rounded."""
    ours = "a cat\nSteps: 5, Sampler: Euler, Schedule type: Sgm, CFG scale: 7, Seed: 1, Size: 64x64, Version: sd 0.2.0"
    recipe = read_parameters(ours)
    assert recipe.request.params.spacing == "sgm" and recipe.notes == ()
    other = read_graph(comfy(n8={"scheduler": "sgm_uniform"}, n9={"scheduler": "sgm_uniform"}))
    assert other.request.params.spacing == "sgm" and "sgm is close, but not the same" in " ".join(other.notes)
