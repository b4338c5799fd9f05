"""OpenAI's images interface: its SDK, unmodified, against the real server, with the library's images."""

from __future__ import annotations

import base64
import io
import time

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image
from server_browser import serving

from sd import StableDiffusion
from sd.imaging.files import png_bytes
from sd.params import HighRes, ImageToImage, Inpaint, TextToImage
from sd.recipes import read_request_bytes
from sd.server.openai.bodies import nested
from sd.server.settings import ServerSettings

SMALL = {"steps": 3, "seed": 5}
KEY = "a key for the tests"


@pytest.fixture(scope="module")
def address():
    with serving(ServerSettings(port=0, api_key=KEY, max_batch=2)) as address:
        while httpx2.get(f"{address}/healthz").status_code != 200:
            time.sleep(0.05)
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def library():
    return StableDiffusion.load()


@pytest.fixture(scope="module")
def photo():
    """An image with detail everywhere."""
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8))


def image_of(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def images_of(answer):
    return [image_of(each.b64_json) for each in answer.data]


def same(found, expected):
    return [a.convert("RGB").tobytes() for a in found] == [b.tobytes() for b in expected]


def hole(size=(64, 64), box=(16, 24, 40, 48)):
    mask = Image.new("RGBA", size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), box)
    return mask


def test_images_are_the_librarys(client, library):
    before = time.time()
    answer = client.images.generate(
        prompt="a red house", model="gpt-image-1", size="64x96", quality="high", user="someone", extra_body=SMALL
    )
    (expected,) = library.txt2img("a red house", width=64, height=96, **SMALL)
    assert same(images_of(answer), [expected]) and answer.data[0].seed == 5
    assert answer.size == "64x96" and answer.output_format == "png" and answer.background == "opaque"
    assert before - 1 <= answer.created <= time.time() and answer.model.startswith("pocket")
    assert answer.usage.input_tokens_details.text_tokens == 3 and answer.usage.output_tokens == 8 * 12
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert read_request_bytes(base64.b64decode(answer.data[0].b64_json)).request.params.seed == 5


def test_our_settings_stand_beside_theirs(client, library):
    settings = {**SMALL, "sampler": "ddim", "eta": 0.5, "web_ui_prompts": True, "width": 64, "height": 64}
    answer = client.images.generate(prompt="a (red:1.3) house", extra_body={**settings, "negative": "fog"})
    expected = library.prepare(TextToImage.of("a (red:1.3) house", "fog", **settings)).result().images
    assert same(images_of(answer), expected)
    settings = {**SMALL, "width": 64, "height": 64, "hires": 1.5}
    answer = client.images.generate(prompt="a tree", extra_body=settings)
    assert same(images_of(answer), library.prepare(HighRes.of("a tree", **settings)).result().images)
    assert answer.size == "96x96"


@pytest.mark.parametrize("loras", [{"pocket-lcm": 0.5}, [{"name": "pocket-lcm", "weight": 0.5}]], ids=["map", "list"])
def test_loras(client, loras):
    answer = client.images.generate(prompt="a tree", size="64x64", extra_body={**SMALL, "loras": loras})
    assert "<lora:pocket-lcm:0.5>" in images_of(answer)[0].text["parameters"]
    plain = client.images.generate(prompt="a tree", size="64x64", extra_body=SMALL)
    assert plain.data[0].b64_json != answer.data[0].b64_json


def test_several_images_have_seeds_that_follow(client):
    answer = client.images.generate(prompt="a tree", n=3, size="64x64", extra_body=SMALL)  # in two jobs of at most 2
    assert [each.seed for each in answer.data] == [5, 6, 7]
    again = client.images.generate(prompt="a tree", size="64x64", extra_body={**SMALL, "seed": 7})
    assert same(images_of(again), images_of(answer)[2:])


def test_seeds_are_random_unless_given(client):
    seeds = {client.images.generate(prompt="a", size="64x64", extra_body={"steps": 1}).data[0].seed for _ in range(3)}
    assert len(seeds) == 3 and all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
def test_formats_and_data_urls(client, name):
    asked = {"prompt": "a tree", "size": "64x64", "output_format": name, "extra_body": SMALL}
    answer = client.images.generate(**asked, output_compression=60, response_format="url")
    start, text = answer.data[0].url.split(",")
    assert start == f"data:image/{name};base64" and answer.data[0].b64_json is None
    image, data = image_of(text), base64.b64decode(text)
    assert image.format == name.upper() and answer.output_format == name
    recipe = read_request_bytes(data)
    assert recipe.request.prompt == ("a tree",) and recipe.request.params.seed == 5
    if name != "png":
        assert len(data) < len(base64.b64decode(client.images.generate(**asked).data[0].b64_json))


def test_a_masked_edit_leaves_all_other_pixels(client, library, photo):
    answer = client.images.edit(
        image=("a.png", png_bytes(photo)), mask=("b.png", png_bytes(hole())), prompt="a car", extra_body=SMALL
    )
    (found,) = images_of(answer)
    mask = Image.new("L", photo.size)
    mask.paste(255, (16, 24, 40, 48))
    request = Inpaint.of("a car", image=photo, mask=mask, **SMALL)
    assert same([found], library.prepare(request).result().images)
    changed = (np.asarray(found.convert("RGB")) != np.asarray(photo)).any(-1)
    inside = np.asarray(mask) > 0
    assert not changed[~inside].any() and changed[inside].mean() > 0.9
    assert answer.usage.input_tokens_details.image_tokens == 64


def test_the_size_of_a_masked_edit_is_that_of_generating_only(client, photo):
    image, mask = png_bytes(photo), png_bytes(hole())
    answer = client.images.edit(image=image, mask=mask, prompt="a car", size="96x96", extra_body=SMALL)
    (found,) = images_of(answer)
    changed = (np.asarray(found.convert("RGB")) != np.asarray(photo)).any(-1)
    assert answer.size == "64x64" and not changed[:24].any() and changed[24:48, 16:40].any()


def test_the_transparent_part_of_the_image_is_a_mask_too(client, photo):
    holed = photo.copy()
    holed.putalpha(hole().getchannel("A"))
    with_mask = client.images.edit(image=png_bytes(photo), mask=png_bytes(hole()), prompt="a car", extra_body=SMALL)
    without = client.images.edit(image=png_bytes(holed), prompt="a car", extra_body=SMALL)
    assert without.data[0].b64_json == with_mask.data[0].b64_json


def test_an_edit_without_a_mask_and_a_variation(client, library, photo):
    settings = {**SMALL, "strength": 0.7, "negative": "fog", "web_ui_prompts": False, "options": None}
    answer = client.images.edit(image=[png_bytes(photo)], prompt="a car", size="auto", extra_body=settings)
    request = ImageToImage.of("a car", "fog", image=photo, strength=0.7, **SMALL)
    assert same(images_of(answer), library.prepare(request).result().images)
    with pytest.warns(DeprecationWarning):
        answer = client.images.create_variation(image=png_bytes(photo), n=2, size="128x128", extra_body={"steps": 2})
    assert answer.size == "128x128" and len(answer.data) == 2
    assert answer.data[1].seed == answer.data[0].seed + 1


def test_an_edit_as_json(address, client, photo):
    url = f"data:image/png;base64,{base64.b64encode(png_bytes(photo)).decode()}"
    mask = f"data:image/png;base64,{base64.b64encode(png_bytes(hole())).decode()}"
    body = {"images": [{"image_url": url}], "mask": {"image_url": mask}, "prompt": "a car", **SMALL}
    answer = httpx2.post(f"{address}/v1/images/edits", json=body, headers={"Authorization": f"Bearer {KEY}"})
    form = client.images.edit(image=png_bytes(photo), mask=png_bytes(hole()), prompt="a car", extra_body=SMALL)
    assert answer.json()["data"][0]["b64_json"] == form.data[0].b64_json


@pytest.mark.parametrize("task", ["image_generation", "image_edit"])
def test_streaming(client, photo, task):
    asked = {"prompt": "a tree", "stream": True, "partial_images": 2, "extra_body": {**SMALL, "steps": 9}}
    if task == "image_edit":
        image, mask = png_bytes(photo), png_bytes(hole())
        found = list(client.images.edit(image=image, mask=mask, **asked))
        whole = client.images.edit(image=image, mask=mask, **asked | {"stream": False})
    else:
        found = list(client.images.generate(size="64x64", **asked))
        whole = client.images.generate(size="64x64", **asked | {"stream": False})
    assert [event.type for event in found] == [f"{task}.partial_image"] * 2 + [f"{task}.completed"]
    assert [event.partial_image_index for event in found[:2]] == [0, 1]
    assert all(event.size == "64x64" and event.output_format == "png" for event in found)
    assert image_of(found[0].b64_json).size == (64, 64) and found[0].b64_json != found[1].b64_json
    assert found[2].b64_json == whole.data[0].b64_json and found[2].usage.total_tokens > 0 and found[2].seed == 5


def test_a_stream_of_several_images(client):
    found = list(client.images.generate(prompt="a", n=3, size="64x64", stream=True, extra_body=SMALL))
    assert [event.type for event in found] == ["image_generation.completed"] * 3
    assert [(event.image_index, event.seed) for event in found] == [(0, 5), (1, 6), (2, 7)]


def test_an_error_in_a_stream(client):
    with pytest.raises(openai.APIError, match="at most 1000") as caught:  # what only the model can refuse
        settings = {**SMALL, "hires": 1.5, "hires_steps": 20, "hires_strength": 0.01}
        list(client.images.generate(prompt="a", stream=True, extra_body=settings))
    assert caught.value.body["param"] == "hires_steps" and caught.value.type == "invalid_request_error"


def test_models(client):
    (found,) = client.models.list().data
    assert found.id == "pocket" and found.object == "model" and found.owned_by == "sd" and found.created > 0
    assert client.models.retrieve("pocket") == client.models.retrieve("pocket.safetensors") == found
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("../../etc/passwd")
    assert caught.value.code == "model_not_found" and "pocket" in caught.value.body["message"]


@pytest.mark.parametrize(
    ("asked", "param", "said"),
    [
        ({"size": "100x100"}, "size", "multiples of 8"),
        ({"size": "0x0"}, "size", "multiples of 8"),
        ({"size": "8192x8192"}, None, "pixels are too many"),
        ({"size": "64x64", "extra_body": {"width": 64}}, "size", "exclude"),
        ({"n": 11}, "n", "from 1 to 10"),
        ({"n": 0}, "n", "from 1 to 10"),
        ({"output_format": "gif"}, "output_format", "png or jpeg or webp"),
        ({"response_format": "file"}, "response_format", "b64_json or url"),
        ({"output_compression": 101}, "output_compression", "from 0 to 100"),
        ({"partial_images": 4, "stream": True}, "partial_images", "from 0 to 3"),
        ({"extra_body": {"stream": "yes"}}, "stream", "false or true"),
        ({"extra_body": {"stpes": 3}}, "stpes", "did you mean 'steps'?"),
        ({"extra_body": {"cfg_scale": 3}}, "cfg_scale", "did you mean 'guidance'?"),
        ({"extra_body": {"negative_prompt": "a"}}, "negative_prompt", "did you mean 'negative'?"),
        ({"extra_body": {"strength": 0.5}}, "strength", "/v1/images/edits"),
        ({"extra_body": {"svg": {"model": "x"}}}, "svg", "not supported"),
        ({"extra_body": {"image": "x"}}, "image", "/v1/images/edits"),
        ({"extra_body": {"steps": 999}}, "steps", "at most 150"),
        ({"extra_body": {"steps": "x"}}, "steps", "whole number"),
        ({"extra_body": {"seed": -1}}, "seed", "from 0"),
        ({"extra_body": {"eta": 3}}, "eta", "in [0, 1]"),
        ({"extra_body": {"negative": 3}}, "negative", "negative"),
        ({"extra_body": {"loras": {"none": 1}}}, "loras", "no LoRA is called"),
        ({"extra_body": {"loras": 3}}, "loras", "loras must be"),
        ({"extra_body": {"loras": [{"nme": "x"}]}}, "loras", "a name and a weight"),
        ({"extra_body": {"loras": {"pocket-lcm": "x"}}}, "loras", "float"),
        ({"extra_body": {"vae": 3}}, "vae", "vae must be a name"),
        ({"extra_body": {"controls": [{"name": "edges"}]}}, None, "needs an image"),
        ({"prompt": "a" * 30_000}, "prompt", "too long"),
        ({"prompt": None}, "prompt", "prompt is missing"),
    ],
)
def test_a_mistake_is_one_clear_line(client, asked, param, said):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**{"prompt": "a", **asked})
    body = caught.value.body
    assert set(body) == {"message", "type", "param", "code"} and body["type"] == "invalid_request_error"
    assert said in body["message"] and "\n" not in body["message"] and body["param"] == param


@pytest.mark.parametrize(
    ("asked", "param", "said"),
    [
        ({"image": b"no image"}, "image", "image: "),
        ({"image": b""}, "image", "image"),
        ({"mask": png_bytes(Image.new("RGB", (64, 64)))}, "mask", "no transparent pixels"),
        ({"mask": png_bytes(hole((32, 32), (0, 0, 8, 8)))}, "mask", "must be the same"),
        ({"image": [png_bytes(Image.new("RGB", (64, 64)))] * 2}, "image", "2 images"),
        ({"extra_body": {"steps": "three"}}, "steps", "not a number"),
        ({"extra_body": {"web_ui_prompts": "perhaps"}}, "web_ui_prompts", "neither True nor False"),
        ({"extra_body": {"loras": "[{"}}, "loras", "not valid JSON"),
        ({"extra_body": {"content": "none"}}, "content", "content"),
        ({"extra_body": {"hires": 2}}, "hires", "hires"),
    ],
)
def test_a_mistake_in_a_form_too(client, photo, asked, param, said):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(**{"image": png_bytes(photo), "mask": png_bytes(hole()), "prompt": "a", **asked})
    body = caught.value.body
    assert said in body["message"] and "\n" not in body["message"] and body["param"] == param


def test_other_statuses(address, client):
    with pytest.raises(openai.AuthenticationError) as caught:
        openai.OpenAI(base_url=f"{address}/v1", api_key="a wrong key", max_retries=0).models.list()
    assert caught.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError) as missing:
        client.images.generate(prompt="a", model="sd_xl_base_1.0")
    assert missing.value.code == "model_not_found" and missing.value.body["param"] == "model"
    post = {"url": f"{address}/v1/images/generations", "headers": {"Authorization": f"Bearer {KEY}"}}
    for content, type, status in (
        ("{", "application/json", 400),
        ("[]", "application/json", 400),
        ("a", "a/b", 415),
        (r'{"prompt": "a", "\ud800": 1}', "application/json", 400),
    ):
        given = {**post, "headers": {**post["headers"], "Content-Type": type}}
        answer = httpx2.post(**given, content=content)
        assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"
    answer = httpx2.get(f"{address}/v1/nothing", headers=post["headers"])
    assert answer.status_code == 404 and answer.json()["error"]["message"]


def test_a_full_queue_says_when_to_come_back():
    with serving(ServerSettings(port=0, queue=2, together=1)) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        while httpx2.get(f"{address}/healthz").status_code != 200:
            time.sleep(0.05)
        slow = {"prompt": "a", "size": "64x64", "stream": True, "extra_body": {"steps": 150}}
        streams = [client.images.generate(**slow)]
        while [job["state"] for job in httpx2.get(f"{address}/api/jobs").json()] != ["running"]:
            time.sleep(0.01)
        streams += [client.images.generate(**slow) for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as caught:
            client.images.generate(prompt="a", extra_body=SMALL)
        assert int(caught.value.response.headers["Retry-After"]) >= 1 and caught.value.code == "rate_limit_exceeded"
        jobs = httpx2.get(f"{address}/api/jobs").json()
        assert [(job["state"], job["position"]) for job in jobs] == [("running", None), ("waiting", 0), ("waiting", 1)]
        for stream in streams:  # closing the connection cancels the job
            stream.close()
        for _ in range(200):
            if not httpx2.get(f"{address}/api/jobs").json():
                break
            time.sleep(0.02)
        assert httpx2.get(f"{address}/api/jobs").json() == []
        assert client.images.generate(prompt="a", size="64x64", extra_body=SMALL).data


def test_forms_with_lists_and_objects():
    assert nested([("a", ""), ("prompt", "")]) == {"prompt": ""}
    assert nested([("a[b][c]", "1"), ("a[d]", "2")]) == {"a": {"b": {"c": "1"}, "d": "2"}}
    assert nested([("a[][x]", "1"), ("a[][y]", "2"), ("a[][x]", "3")]) == {"a": [{"x": "1", "y": "2"}, {"x": "3"}]}
    for bad in ([("a[", "1")], [("a", "1"), ("a[b]", "2")], [("a[]", "1"), ("a[b]", "2")], [("a[b][c][d][e]", "1")]):
        with pytest.raises(Exception, match=r"cannot be read|both a list"):
            nested(bad)
