"""Our own interface: the library's images for every kind of request, progress as events, mistakes as one line."""

from __future__ import annotations

import base64
import io
import json
import time
from dataclasses import fields, replace

import httpx2
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from server_browser import serving

from sd import StableDiffusion
from sd.config import Config
from sd.control_params import Control
from sd.imaging.files import png_bytes
from sd.params import REQUESTS, HighRes, ImageToImage, Inpaint, SamplingParams, TextToImage
from sd.request_json import to_dict
from sd.resources import EMBEDDED, EMBEDDED_LORA, resource
from sd.server.app import create_app
from sd.server.native.schema import any_request
from sd.server.settings import ServerSettings

EVENTS = {"Accept": "text/event-stream"}


@pytest.fixture(scope="module")
def client():
    with serving(ServerSettings(port=0)) as address, httpx2.Client(base_url=address, timeout=60) as client:
        while client.get("/api/models").status_code == 503:
            time.sleep(0.05)
        yield client


@pytest.fixture(scope="module")
def library():
    return StableDiffusion.load()


def picture(size=(64, 64)):
    image = Image.new("RGB", size, (40, 120, 220))
    image.paste((90, 160, 60), (0, size[1] // 2, *size))
    return image


def text_of(image):
    return base64.b64encode(png_bytes(image)).decode()


def images_of(answer):
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in answer["images"]]


def generate(client, request, **more):
    answer = client.post("/api/generate", json={"request": request, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(response):
    """(name, data) of each event of a stream."""
    name = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


SMALL = {"steps": 3, "seed": 5, "width": 64, "height": 64}
REQUESTS_OF_ALL_KINDS = {
    "txt2img": TextToImage.of("a red house", "fog", **SMALL, n=2, sampler="ddim", eta=0.5),
    "web ui": TextToImage.of("a (red:1.3) [house:tree:0.5]", **SMALL, web_ui_prompts=True),
    "hires": HighRes.of("a red house", **SMALL, hires=1.5, hires_steps=2),
    "img2img": ImageToImage.of("a red house", **SMALL, image=picture(), strength=0.7),
    "inpaint": Inpaint.of("a red house", **SMALL, image=picture(), mask=Image.linear_gradient("L").resize((64, 64))),
    "control": TextToImage.of("a red house", **SMALL, controls=[Control("edges", picture(), annotate="canny")]),
}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS_OF_ALL_KINDS)
def test_images_are_the_librarys(client, library, name):
    request = REQUESTS_OF_ALL_KINDS[name]
    if request.controls and "edges" not in library.controls:
        library.add_control(resource("weights/pocket-edges.safetensors"), "edges")
    values = to_dict(request)
    values["prompt"] = values["prompt"][0]
    answer = generate(client, values)
    expected = library.prepare(request).result()
    assert answer["seeds"] == expected.seeds and answer["model"].startswith("pocket.safetensors [")
    found = images_of(answer)
    assert [image.convert("RGB").tobytes() for image in found] == [image.tobytes() for image in expected.images]
    assert [image.text["parameters"] for image in found] == answer["texts"] and not answer["interrupted"]


def test_a_request_has_the_defaults_of_the_library(client, library):
    answer = generate(client, {"prompt": "a tree", "params": {"steps": 2}})
    (expected,) = library.txt2img("a tree", steps=2)
    assert images_of(answer)[0].tobytes() == expected.tobytes() and answer["seeds"] == [0]


def test_images_may_be_data_urls_in_any_format(client):
    buffer = io.BytesIO()
    picture().save(buffer, "WEBP", lossless=True)
    url = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    request = {"kind": "img2img", "prompt": "a", "params": SMALL}
    a, b = (generate(client, {**request, "image": image}) for image in (url, text_of(picture())))
    assert a["images"] == b["images"]


@pytest.mark.filterwarnings("ignore:pocket-lcm is")
def test_loras_are_merged_for_the_request(client, library):
    answer = generate(client, {"prompt": "a red house", "params": SMALL}, loras=[{"name": "pocket-lcm", "weight": 0.5}])
    name = library.add_lora(resource(EMBEDDED_LORA), 0.5)
    try:
        # the defaults are those of the LoRA, as in the library
        (expected,) = library.prepare(TextToImage.of("a red house", **SMALL)).result().images
    finally:
        library.remove_lora(name)
    assert images_of(answer)[0].tobytes() == expected.tobytes()


def test_events_tell_the_progress(client):
    body = {"request": {"prompt": "a red house", "params": {**SMALL, "steps": 6}}, "previews": 2}
    with client.stream("POST", "/api/generate", json=body, headers=EVENTS) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        found = list(events(response))
    names = [name for name, _ in found]
    assert names[0] == "queued" and names[-1] == "done" and set(names[1:-1]) == {"step"}
    steps = [data for name, data in found if name == "step"]
    assert [data["step"] for data in steps] == [1, 2, 3, 4, 5, 6] and {data["steps"] for data in steps} == {6}
    assert [bool(data["previews"]) for data in steps] == [False, True, False, True, False, False]
    preview = next(data["previews"][0] for data in steps if data["previews"])
    shown = Image.open(io.BytesIO(base64.b64decode(preview.removeprefix("data:image/jpeg;base64,"))))
    assert shown.format == "JPEG" and shown.size == (64, 64)
    done = found[-1][1]
    assert done["id"] == found[0][1]["id"] and done["images"] == generate(client, body["request"])["images"]


LONG = {"request": {"prompt": "a", "params": {**SMALL, "steps": 150}}}


def until_none(client):
    for _ in range(200):
        if not client.get("/api/jobs").json():
            return True
        time.sleep(0.02)
    return False


def test_closing_the_connection_cancels_the_job(client):
    with client.stream("POST", "/api/generate", json=LONG, headers=EVENTS) as response:
        seen = events(response)
        while next(seen)[0] != "step":
            pass
        (job,) = client.get("/api/jobs").json()
        assert job["state"] == "running" and job["steps"] == 150 and job["position"] is None
    assert until_none(client)
    assert generate(client, {"prompt": "a", "params": SMALL})["images"]


def test_so_it_does_without_a_stream(client):
    with pytest.raises(httpx2.ReadTimeout):
        client.post("/api/generate", json=LONG, timeout=0.3)
    assert until_none(client)


@pytest.mark.parametrize("how", ["interrupt", "drop"])
def test_a_job_is_finished_early_or_dropped(client, how):
    with client.stream("POST", "/api/generate", json=LONG, headers=EVENTS) as response:
        seen = events(response)
        id = next(seen)[1]["id"]
        while (event := next(seen))[0] != "step" or event[1]["step"] < 2:
            pass
        if how == "interrupt":
            assert client.post(f"/api/jobs/{id}/interrupt").json()["id"] == id
        else:
            assert client.delete(f"/api/jobs/{id}").json()["id"] == id
        name, data = list(seen)[-1]
    if how == "interrupt":
        assert name == "done" and data["interrupted"] and len(data["images"]) == 1
    else:
        assert name == "error" and data["status"] == 409
    assert client.post(f"/api/jobs/{id}/interrupt").status_code == client.delete(f"/api/jobs/{id}").status_code == 404


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"promt": "a"}, "did you mean 'prompt'?"),
        ({"steps": 3}, "steps is a setting of params"),
        ({"cfg_scale": 3}, "did you mean 'guidance' of params?"),
        ({"params": {"num_inference_steps": 3}}, "did you mean 'steps'?"),
        ({"params": {"prompt": "a"}}, "beside params"),
        ({"params": {"options": {"eta": 2}}}, "eta must be in [0, 1]"),
        ({"params": {**SMALL, "guidance": 1e300}}, "is too large"),
        ({"params": {"options": []}}, "options must be an object"),
        ({"params": []}, "params must be an object"),
        ({"params": {"steps": "3"}}, "steps must be a whole number"),
        ({"params": {"steps": 5000}}, "at most 150"),
        ({"params": {"sampler": "ddpm"}}, "1000 steps are too many"),
        ({"params": {"seed": 2**64}}, "seed must be from 0"),
        ({"params": {"width": 130}}, "multiple of 8"),
        ({"params": {"width": 8192, "height": 8192}}, "pixels are too many"),
        ({"params": {"sampler": "nope"}}, "unknown sampler"),
        ({"params": {"n": 9}}, "at most 8"),
        ({"kind": "video"}, "kind must be one of"),
        ({"kind": ["txt2img"]}, "kind must be one of"),
        ({"prompt": ["a", "b"]}, "one prompt"),
        ({"prompt": 5}, "prompt must be"),
        ({"prompt": "\ud800"}, "UTF-8"),
        ({"prompt": "a" * 30_000}, "too long"),
        ({"strength": 0.5}, "img2img and inpaint"),
        ({"kind": "img2img"}, "needs an image"),
        ({"kind": "img2img", "image": "/etc/passwd"}, "not valid base64"),
        ({"kind": "img2img", "image": "https://example.org/a.png"}, "addresses are not fetched"),
        ({"kind": "img2img", "image": 3}, "expected an image as base64"),
        ({"kind": "img2img", "image": base64.b64encode(b"no image").decode()}, "image: "),
        ({"kind": "inpaint", "image": text_of(picture())}, "no part of the image is masked"),
        ({"controls": [{"name": "edges"}]}, "needs an image"),
        ({"controls": [{"name": "none", "image": text_of(picture())}]}, "no control network is called"),
        ({"controls": [{"nme": "edges"}]}, "did you mean 'name'?"),
        ({"controls": [3]}, "a control must be an object"),
        ({"controls": "edges"}, "controls must be a list"),
        ({"prompt": "<lora:none:1>", "web_ui_prompts": True}, "no LoRA is called"),
    ],
)
def test_a_mistake_is_one_clear_line(client, request_, said):
    content = json.dumps({"request": {"prompt": "a", **request_}})  # escapes what is not Unicode
    answer = client.post("/api/generate", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422 and set(answer.json()) == {"status", "message"}
    message = answer.json()["message"]
    assert said in message and "\n" not in message and len(message) <= 1000


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"requst": {}}, "did you mean 'request'?"),
        ({"request": {}, "model": "../../etc/passwd"}, "no model is called"),
        ({"request": {}, "vae": "x"}, "no VAE is called"),
        ({"request": {}, "loras": [{"name": "pocket-lcm", "wight": 1}]}, "did you mean 'weight'?"),
        ({"request": {}, "loras": [{"name": "x"}]}, "no LoRA is called"),
        ({"request": {}, "loras": [{"name": "pocket-lcm", "weight": 1e30}]}, "too large"),
        ({"request": {"prompt": "<lora:pocket-lcm:999>", "web_ui_prompts": True}}, "too large"),
        ({"request": {}, "previews": -1}, "previews"),
        ({}, "request"),
        ([], "the body"),
    ],
)
def test_a_mistake_in_the_body_too(client, body, said):
    answer = client.post("/api/generate", json=body)
    assert answer.status_code == 422 and said in answer.json()["message"]


def test_models_samplers_limits_and_defaults(client, library):
    found = client.get("/api/models").json()
    assert found["current"] == "pocket" and found["models"][0]["embedded"] and len(found["models"][0]["hash"]) == 10
    assert [each["name"] for each in found["loras"]] == ["pocket-lcm"]
    assert [each["name"] for each in found["controls"]] == ["edges"]
    params = SamplingParams().resolved(library.config)
    wanted = {name: getattr(params, name) for name in ("steps", "guidance", "sampler", "spacing")}
    assert found["defaults"] == {"size": 128, **wanted}
    ddim = next(each for each in found["samplers"] if each["key"] == "ddim")
    assert ddim["options"]["eta"]["high"] == 1 and ddim["usual_steps"] == 50 and "trailing" in found["spacings"]
    few = found["few_steps"]
    params = {name: few[name] for name in ("steps", "guidance", "sampler", "spacing")}
    assert generate(client, {"prompt": "a", "params": params}, loras=[{"name": few["lora"]}])["notes"] == []
    assert client.post("/api/models/select", json={"name": "pocket.safetensors"}).json()["current"] == "pocket"
    assert client.post("/api/models/select", json={"name": "none"}).status_code == 404
    assert client.post("/api/refresh").json()["current"] == "pocket"


def test_a_model_is_chosen_by_its_file_before_it_is_loaded(client, tmp_path):
    with safe_open(resource(EMBEDDED), "pt") as file:
        config = Config.from_json(file.metadata()["sd.config"])
    few = {"sd.config": replace(config, name="few", steps=2).to_json()}
    save_file(load_file(resource(EMBEDDED)), tmp_path / "few.safetensors", few)
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with serving(ServerSettings(port=0, models=tmp_path)) as address, httpx2.Client(base_url=address) as other:
        while other.get("/api/models").status_code == 503:
            time.sleep(0.05)
        answer = other.post("/api/models/select", json={"name": "broken"})
        assert answer.status_code == 422 and str(tmp_path) not in answer.text and "broken" in answer.text
        assert other.get("/api/models").json()["current"] == "pocket"
        found = other.post("/api/models/select", json={"name": "few"}).json()
        assert found["current"] == "few" and found["defaults"]["steps"] == 2 and found["few_steps"] is None
        answer = other.post("/api/generate", json={"request": {"prompt": "a", "params": {"width": 64, "height": 64}}})
        assert answer.json()["model"].startswith("few.safetensors") and "Steps: 2," in answer.json()["texts"][0]


def test_nothing_is_loaded_yet():
    app = create_app(ServerSettings())  # without its lifespan, so no worker runs
    client = TestClient(app, base_url="http://127.0.0.1:7860")
    answer = client.post("/api/tokens", json={"text": "a"})
    assert answer.status_code == 503 and int(answer.headers["Retry-After"]) >= 1
    assert client.get("/api/models").json()["defaults"]["size"] == 128  # from the file


def test_tokens_are_counted_and_what_is_cut_is_said(client, library):
    def tokens(text, **more):
        return client.post("/api/tokens", json={"text": text, **more}).json()

    long = "a red house on the beach, " * 20
    count, cut = library.tokenizer.cut(long)
    found = tokens(long)
    assert found["count"] == 75 + count and found["cut"] == cut and found["limit"] == 75 and found["chunks"] == 1
    found = tokens(long, web_ui_prompts=True)
    assert found["cut"] == "" and found["chunks"] == 2
    assert tokens("a (red:1.2) house <lora:pocket-lcm:1>", web_ui_prompts=True)["count"] == 3
    assert tokens("a red zebra and a dragon")["unknown"] == ["zebra", "dragon"]
    assert tokens("") == {"count": 0, "limit": 75, "chunks": 1, "cut": "", "unknown": []}
    for text in ("(" * 200, "\ud800"):
        content = json.dumps({"text": text, "web_ui_prompts": True})
        answer = client.post("/api/tokens", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422 and "\n" not in answer.json()["message"]


@pytest.mark.parametrize("name", ["txt2img", "web ui", "hires"])
def test_a_recipe_generates_the_same_image(client, name):
    request = to_dict(REQUESTS_OF_ALL_KINDS[name]) | {"prompt": REQUESTS_OF_ALL_KINDS[name].prompt[0]}
    request["params"]["n"] = 1
    loras = [{"name": "pocket-lcm", "weight": 0.25}] if name == "web ui" else []
    first = generate(client, request, loras=loras)
    found = client.post("/api/recipe", content=base64.b64decode(first["images"][0])).json()
    assert found["text"] == first["texts"][0] and found["notes"] == [] and found["model_known"]
    known = [{**each, "known": True} for each in loras]
    assert found["loras"] == known
    again = generate(client, found["request"], model=found["model"], loras=loras)
    assert images_of(again)[0].tobytes() == images_of(first)[0].tobytes()


def test_a_recipe_of_another_program_and_a_file_without_one(client):
    text = "a cat <lora:other:0.5>\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 512x512, Model: gone"
    found = client.post("/api/recipe", content=png_bytes(picture(), text)).json()
    assert found["request"]["prompt"].strip() == "a cat" and found["request"]["params"]["sampler"] == "euler_a"
    assert found["loras"] == [{"name": "other", "weight": 0.5, "known": False}]
    assert found["model"] == "gone" and not found["model_known"]
    for data in (png_bytes(picture()), b"", b"no image"):
        answer = client.post("/api/recipe", content=data)
        assert answer.status_code == 422 and "\n" not in answer.json()["message"]


def test_the_schema_has_every_setting():
    schema = {each["properties"]["kind"]["const"]: each["properties"] for each in any_request()["anyOf"]}
    assert set(schema) == set(REQUESTS)
    for kind, cls in REQUESTS.items():
        assert set(schema[kind]) == {f.name for f in fields(cls)} | {"kind"}
        assert set(schema[kind]["params"]["properties"]) == {f.name for f in fields(SamplingParams)}


def test_the_schema_and_the_page_of_the_interfaces(client):
    assert client.get("/api/schema").json()["anyOf"] == any_request()["anyOf"]
    page = client.get("/docs")
    assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    for path in ("/docs/docs.js", "/docs/docs.css", "/openapi.json"):
        assert client.get(path).status_code == 200
    texts = [page.text, client.get("/docs/docs.js").text, client.get("/docs/docs.css").text]
    assert not any("//" in text.replace("// ", "") for text in texts)  # no other host
    assert "innerHTML" not in texts[1] and "<style" not in texts[0] and "onclick" not in texts[0]
