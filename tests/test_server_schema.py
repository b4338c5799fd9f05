"""Requests made from /openapi.json of the whole application: none of them may make the server fail.

schemathesis generates them: what the document allows, and what it does not.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from dataclasses import replace

import httpx2
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from safetensors.torch import load_file, save_file
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from sd.config import POCKET
from sd.resources import EMBEDDED, resource
from sd.server.app import create_app
from sd.server.settings import ServerSettings

STEPS, SIZE = 2, 64  # of a request that gives none, so that a hundred of them take seconds


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A server that generates small images in few steps, whatever happens to its model."""
    file = tmp_path_factory.mktemp("model") / "small.safetensors"
    config = replace(POCKET, steps=STEPS, size=SIZE)
    save_file(load_file(resource(EMBEDDED)), file, {"sd.config": config.to_json()})
    settings = ServerSettings(port=0, ckpt=file, max_steps=3, max_pixels=128 * 128, max_batch=2, max_images=2)
    app = create_app(settings)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    engine = app.state.engine
    while not server.started or not engine.is_ready:
        assert thread.is_alive()
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(20)


def run(address, examples, **quiet):
    """Send so many requests to each operation, allowed ones and others."""
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    seen = Counter()
    for operation in (found.ok() for found in schema.get_all_operations()):
        has_json = any(body.media_type == "application/json" for body in operation.body)  # others are hardly wrong
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)[: 2 if has_json else 1]:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), **quiet)
            def send(case):
                answer = case.call(timeout=60)
                case.validate_response(answer, checks=[not_a_server_error])
                seen[answer.status_code] += 1
                if answer.status_code >= 400:
                    assert answer.headers["content-type"] == ["application/json"], answer.headers
                    assert answer.text.count("\n") == 0

            with contextlib.suppress(Unsatisfiable):  # an operation without parameters has no wrong ones
                send()
        assert httpx2.get(f"{address}/healthz").status_code == 200, operation.label
    return seen


@pytest.mark.exhaustive
def test_no_request_makes_the_server_fail(address):
    seen = run(address, 2, derandomize=True, phases=[Phase.generate])
    assert seen[200] > 40 and seen[422] > 10, seen


@pytest.mark.exhaustive
def test_no_request_of_many_makes_the_server_fail(address):
    seen = run(address, 30, phases=[Phase.generate, Phase.shrink])
    assert seen[200] > 60 and seen[422] > 150, seen
