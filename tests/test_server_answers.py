"""What clients are told where several parts meet: no paths, no lost images, no long waits."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import threading
import time

import httpx2
import pytest
from PIL import Image
from server_a1111 import running

from sd.resources import EMBEDDED, resource
from sd.server import http
from sd.server.keys import Key
from sd.server.public import public_text
from sd.server.settings import ServerSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name in ("models", "controls"):
        (folder / name).mkdir()
    shutil.copy(resource(EMBEDDED), folder / "models" / "other.safetensors")
    (folder / "controls" / "broken.safetensors").write_text("garbage\n")
    return folder


@pytest.fixture(scope="module")
def served(folder):
    settings = ServerSettings(port=0, models=folder / "models", controls=folder / "controls")
    with running(settings) as (address, engine), httpx2.Client(base_url=address, timeout=120) as client:
        yield client, engine


def generate(client, **request):
    body = {"request": {"prompt": "a house", "params": {"steps": 2, "seed": 1}, **request}}
    return client.post("/api/generate", json=body)


def text_of(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_images_are_not_lost_while_models_are_switched(served):
    """With one model in memory, another one may be loaded before an answer is written."""
    client, _ = served
    statuses = []

    def ask(i):
        body = {"prompt": "a house", "model": ("pocket", "other")[i % 2], "steps": 2, "n": 1}
        answer = client.post("/v1/images/generations", json=body)
        statuses.append(
            (answer.status_code, answer.json()["usage"]["input_tokens"] if answer.is_success else answer.text)
        )

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [(200, 2)] * 6


def test_lists_are_there_while_no_model_is_loaded(served):
    client, engine = served
    assert client.post("/sdapi/v1/unload-checkpoint", json={}).status_code == 200
    until = time.monotonic() + 20
    while engine.workers[0].models and time.monotonic() < until:
        time.sleep(0.02)
    assert not engine.workers[0].models
    assert client.get("/api/models").json()["current"] == "pocket"
    answer = client.post("/api/tokens", json={"text": "a house"})
    assert answer.status_code == 503
    while answer.status_code == 503 and time.monotonic() < until:  # asking loads it
        time.sleep(0.05)
        answer = client.post("/api/tokens", json={"text": "a house"})
    assert answer.json()["count"] == 2


def test_no_path_of_a_control_network_is_told(served, folder):
    client, _ = served
    hint = text_of(Image.new("L", (128, 128)))
    answer = generate(client, controls=[{"name": "broken", "image": hint}])
    assert answer.status_code == 422 and "broken" in answer.json()["message"] and str(folder) not in answer.text


def test_folders_that_cannot_be_read_are_told_without_their_path(served, monkeypatch):
    client, engine = served

    def fail():
        raise ValueError("/secret/folder: more than 20,000 files in it")

    monkeypatch.setattr(engine.catalogue, "refresh", fail)
    answer = client.post("/api/refresh", json={})
    assert answer.status_code == 500 and "secret" not in answer.text and "log" in answer.json()["message"]


def test_a_body_of_many_values_is_refused_before_it_is_read(served):
    client, _ = served
    body = b'{"x": [' + b"[]," * 150_000 + b"[]]}"
    for path in ("/sdapi/v1/txt2img", "/api/generate", "/v1/images/generations"):
        begun = time.monotonic()
        answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422) and "too many values" in answer.text  # the first as OpenAI says it
        assert time.monotonic() - begun < 5


def test_numbers_that_json_does_not_have_are_refused(served):
    client, _ = served
    answer = client.post("/sdapi/v1/txt2img", content=b'{"s_churn": NaN}', headers={"Content-Type": "application/json"})
    assert answer.status_code == 422 and "NaN" in json.dumps(answer.json())


def test_long_prompts_as_jpeg(served):
    client, _ = served
    body = {
        "prompt": "a house " * 2000,
        "negative": "a boat " * 2000,
        "steps": 2,
        "guidance": 2,
        "output_format": "jpeg",
    }
    answer = client.post("/v1/images/generations", json=body)
    assert answer.status_code == 200
    assert Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))).format == "JPEG"


def test_an_interrupt_while_images_are_decoded_counts(served, monkeypatch):
    client, engine = served
    from sd.server.a1111 import generating

    plan, reached = generating.plan, threading.Event()

    def slow(*args):
        reached.set()
        time.sleep(0.5)
        return plan(*args)

    monkeypatch.setattr(generating, "plan", slow)
    answers = []
    body = {"prompt": "a house", "steps": 100, "width": 128, "height": 128}
    thread = threading.Thread(target=lambda: answers.append(client.post("/sdapi/v1/txt2img", json=body)))
    thread.start()
    assert reached.wait(20)
    client.post("/sdapi/v1/interrupt", json={})
    thread.join()
    assert answers[0].status_code == 409 or json.loads(answers[0].json()["info"])["steps"] < 100
    assert not engine.jobs()


def test_few_requests_decode_images_at_once(served, monkeypatch):
    """Those that wait for their turn hold only what was sent."""
    client, _ = served
    from sd.server.native import generate as module

    work_of, lock, now, most = module.work_of, threading.Lock(), [0], [0]

    def counted(*args):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        try:
            return work_of(*args)
        finally:
            with lock:
                now[0] -= 1

    monkeypatch.setattr(module, "work_of", counted)
    threads = [threading.Thread(target=generate, args=(client,), kwargs={"params": {"steps": 999}}) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 < most[0] <= 4


def test_a_key_alone_is_taken_as_basic():
    key = Key("correct horse")
    for text, opens in (("correct horse", True), ("any:correct horse", True), ("correct horse:", False)):
        header = {"authorization": "Basic " + base64.b64encode(text.encode()).decode()}
        assert key.opens(header) == opens


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("a: this is a LoRA: give it with --lora a", "a: this is a LoRA"),
        ("a: damaged; download it again", "a: damaged; download it again"),
        ("a: two kinds (if it is one: --lora lcm=FILE)", "a: two kinds"),
    ],
)
def test_options_of_the_command_line_are_left_out(message, told):
    assert public_text(ValueError(message), []) == told


def test_a_callback_that_fails_cancels_the_jobs(served):
    _, engine = served
    cancelled = []

    class Request:
        app = type("App", (), {"state": type("State", (), {"engine": engine})})

    def fail(jobs):
        raise RuntimeError("no")

    async def wait():
        job = type("Job", (), {"end": lambda self: asyncio.sleep(0)})()
        engine_cancel, engine.cancel = engine.cancel, cancelled.append
        try:
            await http.ended(Request(), [job], fail)
        finally:
            engine.cancel = engine_cancel

    with pytest.raises(RuntimeError):
        asyncio.run(wait())
    assert len(cancelled) == 1
