"""POST /api/inside: what was seen in a run, as events; the image is that of /api/generate, and others are not seen."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from contextlib import ExitStack

import httpx2
import numpy as np
import pytest
import torch
from PIL import Image
from server_browser import serving

from sd import StableDiffusion
from sd.imaging.files import png_bytes
from sd.params import Inpaint, TextToImage
from sd.request_json import to_dict
from sd.server.engine import Engine
from sd.server.inside.pictures import heat_map, picture, side_for
from sd.server.inside.watcher import MOST_WORDS, InsideWatcher
from sd.server.jobs import Work
from sd.server.settings import ServerSettings
from sd.study.inside import look

OWN = 3  # jobs of a client that may wait


@pytest.fixture(scope="module")
def client():
    settings = ServerSettings(port=0, queue_per_client=OWN, max_steps=100)
    with serving(settings) as address, httpx2.Client(base_url=address, timeout=60) as client:
        while client.get("/api/models").status_code == 503:
            time.sleep(0.05)
        yield client


@pytest.fixture(scope="module")
def library():
    return StableDiffusion.load()


def body(prompt="a red house", kind="txt2img", params=(), **more):
    return {"request": {"kind": kind, "prompt": prompt, "params": {"steps": 3, "seed": 5, **dict(params)}, **more}}


def events(response):
    """(name, data) of each event of a stream."""
    name = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def inside(client, body):
    """The events of a run, by their names; of those with the same name, a list."""
    with client.stream("POST", "/api/inside", json=body) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        found = list(events(response))
    names = [name for name, _ in found if name != "queued"]
    if names[-1] == "error":
        return {"error": found[-1][1]}
    assert names == ["begin", *["step"] * found[-2][1]["steps"], "done"]
    return {
        "begin": found[-len(names)][1],
        "steps": [data for name, data in found if name == "step"],
        "done": found[-1][1],
    }


def values(map):
    """(h, w) of a map as it is sent."""
    rows = np.frombuffer(base64.b64decode(map["data"]), np.uint8).reshape(map["height"], map["width"])
    return torch.from_numpy(rows / 255 * map["max"]).float()


def opened(url):
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))


def idle(client):
    """Wait until none of the client's jobs is left."""
    until = time.monotonic() + 20
    while client.get("/api/jobs").json():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_events_tell_what_the_library_sees(client, library):
    wanted = body("a red triceratops", params={"steps": 4})
    found = inside(client, wanted)
    seen, watch = look(library, TextToImage.of("a red triceratops", steps=4, seed=5))
    begin, steps, done = found["begin"], found["steps"], found["done"]
    assert [word["text"] for word in begin["words"]] == ["a", "red", "triceratops"]
    assert begin["words"][2]["tokens"] == 4 and begin["parts"] == [1.0] and begin["guided"] and begin["seed"] == 5
    assert [begin[name] for name in ("steps", "width", "height", "latent")] == [4, 128, 128, [4, 16, 16]]
    assert len(begin["levels"]) == 5 and begin["curve"][0][0] == 0 and begin["curve"][-1][0] == 999
    for data, step in zip(steps, seen, strict=True):
        assert data["step"] == step.step + 1 and data["t"] == step.level.t
        assert data["alpha_bar"] == pytest.approx(step.level.alpha**2)
        for map, expected in zip(data["maps"], step.maps, strict=True):
            assert map["mean"] == pytest.approx(float(expected.mean()), rel=1e-4)
            assert torch.allclose(values(map), expected, atol=map["max"] / 500)
        assert torch.allclose(values(data["guidance"]), step.guidance, atol=data["guidance"]["max"] / 500)
        assert sum(map["mean"] for map in data["maps"]) + sum(data["special"].values()) == pytest.approx(1, abs=1e-3)
        expected = np.asarray(library.decode(step.x0)[0], dtype=float)
        assert opened(data["x0"]).size == opened(data["x"]).size == (128, 128)
        assert np.abs(np.asarray(opened(data["x0"]), dtype=float) - expected).mean() < 4  # JPEG
    assert steps[0]["change"] is None and all(0 < step["change"] < 1 for step in steps[1:])
    mean, special = watch.mean()
    for map, expected in zip(done["maps"], mean, strict=True):
        assert torch.allclose(values(map), expected, atol=map["max"] / 500)
    assert list(done["special"]) == ["start", "end", "padding"]
    assert done["special"]["padding"] == pytest.approx(float(special[2].mean()), rel=1e-4)


def base(size=(128, 128)):
    image = Image.new("RGB", size, (40, 120, 220))
    image.paste((90, 160, 60), (0, size[1] // 2, *size))
    return base64.b64encode(png_bytes(image)).decode()


MASK = base64.b64encode(png_bytes(Image.linear_gradient("L").resize((128, 128)))).decode()
BODIES = {
    "web ui": body("a (red:1.2) [house:tree:0.5] AND fog", web_ui_prompts=True),
    "few steps": {**body(params={"sampler": "lcm", "guidance": 1}), "loras": [{"name": "pocket-lcm", "weight": 1.0}]},
    "stochastic": body(params={"sampler": "dpmpp_2s_a"}, negative="fog"),
    "img2img": body(kind="img2img", image=base()),
    "hires": body(kind="hires", hires=1.5),
    "plain": body(),
    "inpaint": body(kind="inpaint", image=base(), mask=MASK),
    "margin": body(kind="inpaint", image=base((256, 128)), mask=MASK, margin=8),
    "no words": body(""),
}


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", BODIES)
def test_image_is_the_one_of_generate(client, name):
    found = inside(client, BODIES[name])
    answer = client.post("/api/generate", json=BODIES[name]).json()
    for key in ("images", "texts", "seeds", "model", "notes"):
        assert found["done"][key] == answer[key]
    assert found["done"]["aligned"] is (name != "margin")
    assert (found["steps"][0]["guidance"] is None) is (name == "few steps")
    assert len(found["done"]["maps"]) == len(found["begin"]["words"])
    if name == "web ui":
        assert [word["part"] for word in found["begin"]["words"]] == [0, 0, 0, 1, 0]
        absent = [[i for i, map in enumerate(step["maps"]) if map is None] for step in found["steps"]]
        assert absent[0] == [4] and absent[-1] == [2]


def test_a_client_that_goes_away_cancels_its_run(client):
    with client.stream("POST", "/api/inside", json=body(params={"steps": 100})) as response:
        for name, data in events(response):
            if name == "step" and data["step"] == 2:
                (job,) = client.get("/api/jobs").json()
                assert job["state"] == "running" and job["steps"] == 100
                break
    idle(client)
    assert inside(client, body())["done"]["images"]  # goes on, without hooks in the way


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (body(params={"n": 2}), "set n to 1"),
        (body(params={"steps": 101}), "at most 100"),
        (body(params={"width": 8192, "height": 8192}), "pixels"),
        (body(params={"stpes": 3}), "steps"),
        ({**body(), "lora": []}, "loras"),
        ({**body(), "model": "../../etc/passwd"}, "passwd"),
        ({"request": {"kind": "img2img", "prompt": "a", "image": "AAAA"}}, "image"),
        ({}, "request"),
    ],
    ids=range(8),
)
def test_wrong_requests_are_one_line(client, given, part):
    answer = client.post("/api/inside", json=given)
    assert answer.status_code == 422 and part in answer.json()["message"] and "\n" not in answer.json()["message"]


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (body("a " * (MOST_WORDS + 1), web_ui_prompts=True), f"at most {MOST_WORDS}"),
        (body(params={"width": 132}), "multiple"),
        (body(kind="img2img", image=base(), strength=0), "nothing to see"),
        (body(kind="inpaint", image=base(), mask=base64.b64encode(png_bytes(Image.new("L", (128, 128)))).decode()),
         "nothing to see"),
    ],
    ids=range(4),
)  # fmt: skip
def test_what_only_the_run_can_refuse_is_an_event(client, given, part):
    found = inside(client, given)
    assert found["error"]["status"] == 422 and part in found["error"]["message"]


def test_the_queue_is_bounded(client):
    long = body(params={"steps": 100})
    with ExitStack() as stack:
        kept = []  # an iterator that nobody holds closes its connection
        for _ in range(OWN + 1):  # one runs, the others wait
            response = stack.enter_context(client.stream("POST", "/api/inside", json=long))
            kept.append(events(response))
            assert response.status_code == 200 and next(kept[-1])[0] == "queued"
            while client.get("/api/jobs").json()[0]["state"] == "waiting":
                time.sleep(0.01)
        answer = client.post("/api/inside", json=long)
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
    idle(client)


class Alone(InsideWatcher):
    """Notes how many runs its worker has while this one is looked at."""

    def __init__(self, engine):
        super().__init__()
        self.engine, self.others = engine, set()

    def see(self, step):
        self.others.add(len(self.engine.jobs()) - sum(job.state == "waiting" for job in self.engine.jobs()))
        super().see(step)


@pytest.mark.exhaustive
def test_looked_at_alone_and_others_are_not_seen(library):
    engine = Engine(ServerSettings())
    engine.start()
    requests = [TextToImage.of("a red house", steps=6, seed=seed, sampler="ddim") for seed in range(5)]
    watchers = [Alone(engine) if seed in (1, 3) else None for seed in range(5)]

    async def run():
        works = [Work(each, watcher=watcher) for each, watcher in zip(requests, watchers, strict=True)]
        return [await job.end() for job in await engine.submit(works, "a")]

    try:
        jobs = asyncio.run(run())
        unet = engine.workers[0].models[0].model.unet
    finally:
        engine.close(0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())
    for job, wanted, watcher in zip(jobs, requests, watchers, strict=True):
        assert job.finished.images[0].tobytes() == library.prepare(wanted).result().images[0].tobytes()
        if watcher is not None:
            assert watcher.others == {1}
            mean = look(library, wanted)[1].mean()[0]
            (sent, *_) = watcher.summary(job.finished.images[0])["maps"]
            assert sent["mean"] == pytest.approx(float(mean[0].mean()), rel=1e-5)


def test_maps_and_pictures_are_small():
    large = torch.rand(96, 192)
    sent = heat_map(large, 64)
    assert (sent["width"], sent["height"]) == (64, 32) and sent["mean"] == pytest.approx(float(large.mean()), rel=1e-3)
    assert torch.allclose(values(sent), large.reshape(32, 3, 64, 3).mean((1, 3)), atol=0.01)
    assert heat_map(torch.zeros(4, 4), 64)["max"] == 0
    assert json.loads(json.dumps(heat_map(torch.full((4, 4), float("nan")), 64), allow_nan=False))["max"] == 0
    assert max(opened(picture(Image.new("RGB", (1024, 512)))).size) == 256
    assert side_for(5, 20) == 32 and side_for(150, 150) ** 2 * 150 * 150 < 4_000_000 and side_for(7500, 1000) == 8


def test_inpainted_maps_fit_the_region(library):
    image, mask = Image.new("RGB", (256, 128)), Image.new("L", (256, 128))
    mask.paste(255, (8, 8, 56, 56))
    wanted = Inpaint.of("a red house", steps=2, image=image, mask=mask, margin=8, width=128, height=128)
    assert to_dict(wanted)["margin"] == 8
    seen, _ = look(library, wanted)
    assert seen[0].maps.shape[1:] == (16, 16)
