"""The server under load, as clients see it: every request is answered once, or refused with a time to come back."""

from __future__ import annotations

import base64
import io
import signal
import threading
import time
from collections import Counter

import pytest
from common import share_kernels
from PIL import Image

from scripts.benchmark.server import SETTINGS, ask, body_of, load, running
from sd import StableDiffusion
from sd.params import TextToImage

FEW = {"steps": 2, "sampler": "ddim", "guidance": 4.0}


def few(number):
    return body_of(number, FEW)


def pixels(answer):
    (image,) = answer.content["images"]
    return Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB").tobytes()


@pytest.mark.exhaustive
@pytest.mark.parametrize(("clients", "requests"), [(64, 1000)], ids=str)
def test_every_request_is_answered_once(clients, requests):
    model = StableDiffusion.load()
    model.txt2img("a red house in the snow", **FEW)
    share_kernels()
    with running("--queue-per-client", "64") as (address, _):
        answers = load(address, clients, requests, few)
        assert ask(address, "GET", "/healthz")[0] == 200
    assert sorted(answer.number for answer in answers) == list(range(requests))
    assert Counter(answer.status for answer in answers) == {200: requests}
    assert [answer.content["seeds"] for answer in answers] == [[answer.number] for answer in answers]
    assert len({answer.content["id"] for answer in answers}) == requests
    for answer in answers[:: max(requests // 20, 1)]:
        request = TextToImage.of("a red house in the snow", seed=answer.number, **FEW)
        assert pixels(answer) == model.prepare(request).result().images[0].tobytes()


@pytest.mark.exhaustive
def test_a_full_queue_refuses_with_a_time_to_come_back():
    with running("--queue", "3", "--queue-per-client", "2", "--together", "1") as (address, _):
        answers = load(address, 12, 24, lambda number: body_of(number, SETTINGS | {"steps": 20}), patient=False)
        statuses = Counter(answer.status for answer in answers)
        assert set(statuses) == {200, 429} and sum(statuses.values()) == 24
        refused = next(answer for answer in answers if answer.status == 429)
        assert b"wait" in refused.body
        patient = load(address, 6, 8, few)
    assert Counter(answer.status for answer in patient) == {200: 8}


@pytest.mark.parametrize("grace", [pytest.param("60", marks=pytest.mark.exhaustive), "0.3"])
def test_termination_under_load_loses_no_accepted_job(grace):
    """Each client that was connected gets its image, or an error that says that the server stopped."""
    answers = []
    with running("--grace", grace, "--queue-per-client", "64") as (address, process):
        body = lambda number: body_of(number, SETTINGS | {"steps": 40})  # noqa: E731
        clients = threading.Thread(target=lambda: answers.extend(load(address, 16, 16, body, patient=False)))
        clients.start()
        until = time.monotonic() + 20
        while b'"running"' not in ask(address, "GET", "/api/jobs")[2] and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        clients.join()
        assert process.wait(30) == 0
    statuses = Counter(answer.status for answer in answers)
    assert sum(statuses.values()) == 16 and 0 not in statuses  # no connection was just closed
    assert set(statuses) <= {200, 503}
    if grace == "60":
        assert statuses == {200: 16}
    else:
        assert statuses[503] > 0
        assert all(b"again" in answer.body or b"stop" in answer.body for answer in answers if answer.status == 503)
