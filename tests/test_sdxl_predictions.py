"""What SDXL files predict: marker keys, metadata, names and files beside them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from common import TINY_XL, tiny_state
from conftest import loaded
from safetensors.torch import load_file, save_file
from sdxl_common import (
    FIRST,
    header,
)

from scripts import convert as convert_script
from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.detect import identify
from sd.checkpoints.diffusers_config import from_diffusers
from sd.checkpoints.diffusers_export import unet_to_diffusers
from sd.checkpoints.prediction import probe
from sd.config import MODELS, SDXL, SDXL_REFINER

V_SAYS = [
    ({"v_pred": (0,)}, {}, (False, 'it has the key "v_pred"')),
    ({"v_pred": (0,), "ztsnr": (0,)}, {}, (True, 'it has the key "v_pred"')),
    ({"ztsnr": (0,)}, {}, (True, "zero terminal SNR")),
    ({}, {"modelspec.prediction_type": "v"}, (False, "its metadata says so (modelspec.prediction_type)")),
    ({}, {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, (True, "ss_v_parameterization")),
    ({}, {"modelspec.title": "NoobAI-XL-Vpred-1.0"}, (False, "its metadata (modelspec.title) says so (--prediction")),
]


@pytest.mark.parametrize("keys, metadata, expected", V_SAYS)
@pytest.mark.sampled(3)
def test_v_is_said(keys, metadata, expected):
    for name, config in (("sdxl-base", SDXL), ("sdxl-refiner", SDXL_REFINER)):
        found = identify(header(name, metadata=metadata, **keys))
        assert (found.config.schedule.prediction, found.config.schedule.zero_snr, found.decided) == (
            "v",
            expected[0],
            True,
        )
        assert expected[1] in found.reason
        assert replace(found.config, schedule=config.schedule) == config  # everything else is as it was


def test_eps_without_any_sign_and_where_it_is_said():
    found = identify(header())
    assert found.decided and found.reason == "as SDXL does, and nothing about this one says otherwise"
    assert identify(header(**{FIRST: (320, 9, 3, 3)})).reason.startswith("as inpainting models do")
    # of no use with eps, which the trainer writes all the same; and what is said inside counts more than a name
    metadata = {"modelspec.prediction_type": "epsilon", "ss_zero_terminal_snr": "True"}
    found = identify(header(path="my_vpred.safetensors", metadata=metadata))
    assert found.config == SDXL and found.reason == "its metadata says so (modelspec.prediction_type)"
    assert identify(header(path="my-v-pred.safetensors")).config.schedule.prediction == "v"
    assert identify(header(path="my-v-pred.safetensors"), prediction="eps").config == SDXL
    assert identify(header("sd-v1", path="my-v-pred.safetensors")).config.schedule.prediction == "eps"


def test_files_beside_it_and_folders(tmp_path):
    path = tmp_path / "a.safetensors"
    (tmp_path / "a.yaml").write_text("parameterization: v\nzero_terminal_snr: true\n")
    found = identify(header(path=path)).config.schedule
    assert (found.prediction, found.zero_snr) == ("v", True)
    raw = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    found = from_diffusers(
        {"unet": unet_to_diffusers(SDXL), "scheduler": {"_class_name": "EulerDiscreteScheduler", **raw}}
    )
    assert (found.schedule.prediction, found.schedule.zero_snr, found.name) == ("v", True, "SDXL base")


@pytest.mark.parametrize("word", ["x0", "flow", "edm"])
def test_other_predictions_are_refused(word):
    with pytest.raises(CheckpointError, match=f"says that it predicts '{word}': only eps and v are supported"):
        identify(header(metadata={"modelspec.prediction_type": word}))


def test_a_probe_passes_a_vector():
    unet = loaded(tiny_state("tiny-sdxl"), TINY_XL)["unet"]
    assert probe(unet, TINY_XL, torch.zeros(1)) in ("eps", "v")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("illustrij_vPredV1", True), ("novaAnimeXL_vpredV10", True), ("obsessionIllustrious_vPredV11", True),
        ("someVpredModel", True), ("NoobAI-XL-v-prediction", True), ("vpredator", False), ("improvPredicate", False),
    ],
)  # fmt: skip
def test_v_prediction_in_a_name(name, said):
    found = identify(header(path=f"{name}.safetensors")).config.schedule.prediction
    assert found == ("v" if said else "eps")


def test_a_given_model_does_not_say_what_it_predicts():
    """There is one sdxl: the file's own marker decides, unless the caller gives the prediction."""
    file = header(v_pred=(0,))
    assert identify(file, SDXL).config.schedule.prediction == "v"
    assert identify(file, SDXL, "eps").config.schedule.prediction == "eps"


@pytest.mark.exhaustive
def test_markers_of_v_prediction_are_written(tmp_path, monkeypatch):
    """ComfyUI knows v-prediction of an SDXL file by these alone."""
    monkeypatch.setitem(MODELS, "tiny-xl", TINY_XL)
    markers = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    state = {k: x.contiguous() for k, x in tiny_state("tiny-sdxl").items()} | markers
    save_file(state, tmp_path / "a.safetensors")
    for i, layout in enumerate(("diffusers", "original")):
        path = tmp_path / ("folder" if layout == "diffusers" else "b.safetensors")
        given = (tmp_path / "a.safetensors", path, "--layout", layout, "--model", "tiny-xl")
        given = given if i == 0 else (tmp_path / "folder", path, "--layout", layout)
        assert convert_script.main([*map(str, given)]) == 0
    back = load_file(tmp_path / "b.safetensors")
    assert back.keys() == state.keys()
