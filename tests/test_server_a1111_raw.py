"""The web UI's interface by plain requests: bodies of other clients, errors, folders, clients that go away."""

from __future__ import annotations

import json
import random
import shutil
import socket
import time

import pytest

pytest.importorskip("fastapi")
httpx2 = pytest.importorskip("httpx2")

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from server_a1111 import base64_of, image_in, pixels, running  # noqa: E402

from sd import StableDiffusion  # noqa: E402
from sd.params import TextToImage  # noqa: E402
from sd.resources import EMBEDDED, EMBEDDED_LORA, resource  # noqa: E402
from sd.server.a1111.fields import COMMON, IMG2IMG, TXT2IMG  # noqa: E402
from sd.server.settings import ServerSettings  # noqa: E402

FEW = {"steps": 2, "seed": 5, "width": 128, "height": 128}
SMALL = Image.new("RGB", (64, 64), "navy")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    for name in ("models", "loras", "embeddings"):
        (root / name).mkdir()
    shutil.copyfile(resource(EMBEDDED), root / "models" / "second.safetensors")
    shutil.copyfile(resource(EMBEDDED_LORA), root / "loras" / "style.safetensors")
    save_file({"emb_params": torch.ones(3, 64)}, root / "embeddings" / "toy.safetensors")
    save_file({"emb_params": torch.ones(3, 999)}, root / "embeddings" / "other.safetensors")
    return root


@pytest.fixture(scope="module")
def server(folders):
    settings = ServerSettings(
        models=folders / "models", loras=folders / "loras", embeddings=folders / "embeddings", max_images=20
    )
    with running(settings) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with httpx2.Client(base_url=f"{server[0]}/sdapi/v1", timeout=60) as found:
        yield found


def generated(client, path="txt2img", **body):
    answer = client.post(f"/{path}", json={**FEW, **body})
    assert answer.status_code == 200, answer.text[:500]
    found = answer.json()
    return found, json.loads(found["info"])


def wrong(answer, status):
    """The one line that says what is wrong, in the web UI's form."""
    assert answer.status_code == status, answer.text[:500]
    found = answer.json()
    assert set(found) == {"error", "detail", "body", "errors"} and found["detail"] == found["errors"]
    assert "\n" not in found["detail"] and len(found["detail"]) < 500
    return found["detail"]


@pytest.mark.exhaustive
def test_without_fields_the_models_own_defaults_are_used(client):
    answer = client.post("/txt2img", json={"prompt": "a house", "seed": 3})
    info = json.loads(answer.json()["info"])
    expected = StableDiffusion.load().prepare(TextToImage.of("a house", seed=3, web_ui_prompts=True)).result()
    assert pixels([image_in(image) for image in answer.json()["images"]]) == pixels(expected.images)
    assert (info["sampler_name"], info["steps"], info["cfg_scale"], info["width"]) == ("DDIM", 50, 4.0, 128)


BODIES = {
    "chat front end": {
        "prompt": "a", "negative_prompt": "b", "sampler_name": "DPM++ 2M", "scheduler": "Automatic", "cfg_scale": 7,
        "restore_faces": False, "enable_hr": False, "hr_upscaler": "Latent", "hr_scale": 2, "hr_second_pass_steps": 0,
        "denoising_strength": 0.7, "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic"},
        "override_settings_restore_afterwards": True, "clip_skip": 1, "save_images": False, "send_images": True,
        "do_not_save_grid": False, "do_not_save_samples": False, "seed": None,
    },
    "chat page": {"prompt": "a", "batch_size": 1, "width": 128, "height": 128, "steps": 2, "negative_prompt": ""},
    "older": {"prompt": "a", "sampler_index": "Euler a", "subseed": -1, "subseed_strength": 0, "s_tmax": 0, "eta": 0},
    "texts for numbers": {"prompt": "a", "steps": "2", "cfg_scale": "6.5", "seed": "4", "enable_hr": "false"},
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_bodies_of_other_clients(client, name):
    found, info = generated(client, **BODIES[name])
    assert len(found["images"]) == 1 and set(info["ignored"]) <= {"eta"}


def test_what_has_no_effect_is_named(client):
    found, info = generated(
        client, prompt="a", styles=["oil"], restore_faces=True, s_churn=3, gravity=9.8, hr_prompt="",
        refiner_checkpoint="refiner", refiner_switch_at=0.8, save_images=True, script_name="x/y/z plot",
        override_settings={"outdir_samples": "/etc", "samples_format": "png", "eta_ancestral": 0.5},
        alwayson_scripts={"ADetailer": {"args": [True, {}]}, "Roop": {"args": [False]}},
    )  # fmt: skip
    assert set(info["ignored"]) == {
        "styles", "restore_faces", "s_churn", "gravity", "refiner_checkpoint", "save_images", "script_name",
        "override_settings.outdir_samples", "override_settings.eta_ancestral", "alwayson_scripts.ADetailer",
    }  # fmt: skip
    assert "gravity" not in found["parameters"] and len(found["images"]) == 1
    assert generated(client, prompt="a", send_images=False)[0]["images"] == []


def test_sizes_are_rounded_down(client):
    found, info = generated(client, prompt="a", width=133, height=130)
    assert image_in(found["images"][0]).size == (128, 128) and info["notes"][0].startswith("height 130")


SMALLEST = base64_of(SMALL)
ERRORS = [
    ("txt2img", {"sampler_name": "Euler z"}, 404, "Sampler not found"),
    ("txt2img", {"steps": "many"}, 422, "steps: 'many' is not a number"),
    ("txt2img", {"steps": 100_000}, 422, "at most 150"),
    ("txt2img", {"steps": 10**40}, 422, "steps"),
    ("txt2img", {"width": 10**5, "height": 8}, 422, "16384"),
    ("txt2img", {"width": 16384, "height": 16384}, 422, "too many"),
    ("img2img", {"width": 4096, "height": None, "init_images": [SMALLEST]}, 422, "4096x4096 pixels are too many"),
    ("txt2img", {"width": 0}, 422, "at least 8"),
    ("txt2img", {"batch_size": 0}, 422, "batch_size"),
    ("txt2img", {"batch_size": 8, "n_iter": 8}, 422, "64 images are too many"),
    ("txt2img", {"prompt": ["a", "b"]}, 422, "prompt: expected a text"),
    ("txt2img", {"prompt": "a" * 30_000}, 422, "too long"),
    ("txt2img", {"prompt": "a AND " * 40}, 422, "AND"),
    ("txt2img", {"prompt": "<lora:gone:1>"}, 422, "no LoRA is called 'gone'"),
    ("txt2img", {"override_settings": {"sd_model_checkpoint": "../../etc/passwd"}}, 404, "no model is called"),
    ("txt2img", {"override_settings": {"sd_vae": "/etc/passwd"}}, 404, "no VAE is called"),
    ("txt2img", {"override_settings": {"randn_source": "dice"}}, 422, "CPU, GPU, NV"),
    ("txt2img", {"override_settings": "no"}, 422, "expected an object"),
    ("txt2img", {"enable_hr": True, "hr_scale": 1}, 422, "hires must be above 1"),
    ("txt2img", {"enable_hr": True, "hr_scale": 4, "width": 1024, "height": 1024}, 422, "too many"),
    ("txt2img", {"subseed_strength": 2}, 422, "variation_strength"),
    ("txt2img", {"seed": 2**64}, 422, "2^64"),
    ("txt2img", {"alwayson_scripts": {"controlnet": {"args": [{"model": "edges"}]}}}, 422, "unit 0: it has no image"),
    ("txt2img", {"alwayson_scripts": {"controlnet": {"args": [{"model": "x", "image": SMALLEST}]}}}, 404, "no control"),
    (
        "txt2img",
        {"alwayson_scripts": {"controlnet": {"args": [{"model": "edges", "module": "openpose", "image": SMALLEST}]}}},
        422,
        "only none, canny",
    ),
    ("img2img", {}, 404, "Init image not found"),
    ("img2img", {"init_images": ["not base64!"]}, 422, "init_images[0]: not valid base64"),
    ("img2img", {"init_images": ["aGVsbG8="]}, 422, "init_images[0]"),
    ("img2img", {"init_images": ["https://example.org/a.png"]}, 422, "addresses are not fetched"),
    ("img2img", {"init_images": [SMALLEST, SMALLEST]}, 422, "more than batch_size"),
    ("img2img", {"init_images": [SMALLEST], "resize_mode": 9}, 422, "resize_mode"),
    ("img2img", {"init_images": [SMALLEST], "mask": SMALLEST, "inpainting_fill": 9}, 422, "inpainting_fill"),
    ("img2img", {"init_images": [SMALLEST], "mask": "?"}, 422, "mask"),
    ("png-info", {"image": "aGVsbG8="}, 422, "image"),
    ("png-info", {}, 422, "image"),
    ("extra-single-image", {"image": SMALLEST, "upscaler_1": "Lanczos", "upscaling_resize": 90}, 422, "pixels"),
    ("extra-batch-images", {}, 422, "imageList"),
    ("options", {"sd_model_checkpoint": "gone"}, 404, "no model is called 'gone'"),
    ("nothing", {}, 404, "nothing at"),
]


@pytest.mark.parametrize(("path", "body", "status", "words"), ERRORS, ids=lambda value: str(value)[:40])
def test_errors(client, path, body, status, words):
    body = {**FEW, **body} if path.endswith("2img") else body
    assert words in wrong(client.post(f"/{path}", json=body), status)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"steps": NaN}',
        b"[" * 100_000,
        b'{"prompt":' * 500 + b"1" + b"}" * 500,
    ],
    ids=range(8),
)
def test_bodies_that_are_no_requests(client, data):
    wrong(client.post("/txt2img", content=data), 422)


def test_halves_of_surrogate_pairs_become_question_marks(client):
    answer = client.post("/txt2img", content=json.dumps({**FEW, "prompt": "a \ud800 b", "\udfff": 1}))
    assert json.loads(answer.json()["info"])["prompt"] == "a ? b"


def test_models_are_switched(client, server):
    titles = [model["title"] for model in client.get("/sd-models").json()]
    assert len(titles) == 2 and titles[1].startswith("second.safetensors")
    _, info = generated(client, prompt="a", override_settings={"sd_model_checkpoint": titles[1]})
    assert info["sd_model_name"] == "second" and server[1].current.name == "pocket"
    assert client.post("/options", json={"sd_model_checkpoint": "second"}).json() is None
    try:
        assert client.get("/options").json()["sd_model_checkpoint"].startswith("second.safetensors [")
        assert generated(client, prompt="a")[1]["sd_model_name"] == "second"
    finally:
        client.post("/options", json={"sd_model_checkpoint": titles[0]})
    assert generated(client, prompt="a")[1]["sd_model_name"] == "pocket"


@pytest.mark.exhaustive
def test_unloading_and_loading_again(client, server):
    before = generated(client, prompt="a")[0]["images"]
    (worker,) = server[1].workers
    for path, count in (("unload-checkpoint", 0), ("reload-checkpoint", 1)):
        assert client.post(f"/{path}").json() == {}
        until = time.monotonic() + 10
        while len(worker.models) != count and time.monotonic() < until:
            time.sleep(0.01)
        assert len(worker.models) == count
    assert generated(client, prompt="a")[0]["images"] == before


def test_embeddings_and_new_files(client, folders):
    generated(client, prompt="a")
    found = client.get("/embeddings").json()
    assert found["loaded"]["toy"]["vectors"] == 3 and found["loaded"]["toy"]["shape"] == 64
    assert list(found["skipped"]) == ["other"]
    shutil.copyfile(folders / "loras" / "style.safetensors", folders / "loras" / "new.safetensors")
    assert client.post("/refresh-loras").status_code == 200
    assert {"new", "style", "pocket-lcm"} == {lora["name"] for lora in client.get("/loras").json()}
    assert str(folders) not in client.get("/loras").text + client.get("/sd-models").text


def test_a_client_that_goes_away_cancels(client, server):
    address, engine = server
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps({**FEW, "steps": 150, "n_iter": 4}).encode()
    head = f"POST /sdapi/v1/txt2img HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        until = time.monotonic() + 10
        while not any(job.step for job in engine.jobs()) and time.monotonic() < until:
            time.sleep(0.01)
        jobs = engine.jobs()
        assert len(jobs) == 4
    until = time.monotonic() + 10
    while engine.jobs() and time.monotonic() < until:
        time.sleep(0.01)
    assert {job.state for job in jobs} == {"cancelled"}
    assert client.get("/progress").json()["state"]["job_count"] == 0


def test_progress_without_an_image(client):
    found = client.get("/progress", params={"skip_current_image": True}).json()
    assert found["current_image"] is None and found["progress"] == 0 and found["state"]["job_timestamp"] == "0"
    assert client.post("/interrupt").json() == {} and client.post("/skip").json() is None


def test_units_of_the_controlnet_extension(client, server):
    unit = {
        "enabled": True, "model": "edges [0123abcd]", "module": "invert (from white bg & black line)",
        "image": {"image": SMALLEST, "mask": None}, "resize_mode": "Just Resize", "weight": 1, "lowvram": False,
        "control_mode": "ControlNet is more important", "processor_res": 512, "threshold_a": -1, "gravity": 1,
    }  # fmt: skip
    off = [{"enabled": False, "model": "gone"}, {"model": "None"}, None]
    _, info = generated(client, prompt="a", alwayson_scripts={"ControlNet": {"args": [unit, *off]}})
    assert info["ignored"] == ["controlnet.gravity"]
    body = {"init_images": [SMALLEST], "alwayson_scripts": {"controlnet": {"args": [{**unit, "image": None}]}}}
    assert generated(client, "img2img", **body)[1]["ignored"] == ["controlnet.gravity"]
    root = server[0]
    assert httpx2.get(f"{root}/controlnet/control_types").json()["control_types"]["All"]["default_model"] == "edges"
    assert httpx2.get(f"{root}/controlnet/settings").json() == {"control_net_unit_count": 3}
    assert httpx2.get(f"{root}/internal/ping").json() == {}
    body = {"controlnet_module": "depth", "controlnet_input_images": [SMALLEST]}
    wrong(httpx2.post(f"{root}/controlnet/detect", json=body), 422)


def test_an_empty_mask_keeps_the_image(client):
    black = base64_of(Image.new("L", (64, 64)))
    found, info = generated(client, "img2img", init_images=[SMALLEST], mask=black)
    assert pixels([image_in(found["images"][0])]) == pixels([SMALL]) and "empty" in info["notes"][0]


def test_strokes_on_a_transparent_layer_are_a_mask(client):
    layer = Image.new("RGBA", (64, 64))
    layer.paste("red", (0, 0, 32, 64))
    found, _ = generated(client, "img2img", init_images=[SMALLEST], mask=base64_of(layer), mask_blur=0)
    image = image_in(found["images"][0])
    assert pixels([image.crop((32, 0, 64, 64))]) == pixels([SMALL.crop((32, 0, 64, 64))])
    assert pixels([image.crop((0, 0, 32, 64))]) != pixels([SMALL.crop((0, 0, 32, 64))])


def test_the_images_of_a_request_are_bounded_together(client):
    large = base64_of(Image.new("L", (4096, 4096)))
    body = {"init_images": [SMALLEST], "mask": large}
    body["alwayson_scripts"] = {"controlnet": {"args": [{"model": "edges", "image": large}] * 4}}
    assert "too many pixels" in wrong(client.post("/img2img", json={**FEW, **body}), 422)
    body["alwayson_scripts"] = {"controlnet": {"args": [{"model": "edges"}] * 21}}
    assert "at most 20" in wrong(client.post("/img2img", json={**FEW, **body}), 422)


def test_the_document_describes_the_fields(server):
    paths = httpx2.get(f"{server[0]}/openapi.json").json()["paths"]
    body = paths["/sdapi/v1/img2img"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"200", "404", "422", "429"} <= set(paths["/sdapi/v1/txt2img"]["post"]["responses"])
    assert set(COMMON) < set(body["properties"]) == set(IMG2IMG)


VALUES = [
    None, True, False, 0, 1, -1, 2, 0.5, -3.7, 1e300, 10**25, 2**63, "", "a", "1", "None", "\ud800", "é" * 50, [], [1],
    [[]], ["a"], {}, {"a": 1}, {"args": [{}]}, {"controlnet": {"args": [{"model": "edges"}, 1, "a"]}},
    {"controlnet": 5}, SMALLEST, [SMALLEST], {"sd_model_checkpoint": 5}, {"CLIP_stop_at_last_layers": 10**9},
    {"tiling": "yes"},
]  # fmt: skip


@pytest.mark.sampled(30)
@pytest.mark.parametrize("seed", range(300))
def test_whatever_a_field_has_there_is_one_answer(client, seed):
    rng = random.Random(seed)
    path, fields = rng.choice([("txt2img", TXT2IMG), ("img2img", IMG2IMG)])
    body = {"init_images": [SMALLEST]} if path == "img2img" else {}
    body |= {name: rng.choice(VALUES) for name in rng.sample(sorted(fields), rng.choice((1, 1, 2, 4)))}
    answer = client.post(f"/{path}", content=json.dumps({**FEW, **body}))
    if answer.status_code == 200:
        json.loads(answer.json()["info"])
    else:
        assert wrong(answer, answer.status_code) and answer.status_code in (404, 422), answer.text[:500]
