"""The server under load: many clients at once, each request answered once, and how fast.

    library    one request after another, in this process
    one        one client, which waits for each answer
    many       64 clients at once: the server computes their requests side by side

Throughput is in requests per second, and compared with the library's own loop. Each request has another seed.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from sd.params import TextToImage
from sd.pipeline import StableDiffusion

CLIENTS, REQUESTS = 64, 1000
SERVE = Path(__file__).resolve().parents[1] / "serve.py"
WAIT = 120  # seconds in which the server must have loaded its model
SETTINGS: dict[str, Any] = {"steps": 10, "sampler": "ddim", "guidance": 4.0}
MOST_TRIES = 100  # of a request that is refused because the queue is full


class Answer(NamedTuple):
    """What came back for one request."""

    number: int
    status: int  # of the last try
    seconds: float  # from the first try to the answer
    tries: int
    body: bytes

    @property
    def content(self) -> dict[str, Any]:
        """The body as JSON."""
        found: dict[str, Any] = json.loads(self.body)
        return found


def body_of(number: int, settings: Mapping[str, object] = SETTINGS) -> bytes:
    """The body of a request with the seed `number`."""
    params = {**settings, "seed": number}
    return json.dumps({"request": {"kind": "txt2img", "prompt": "a red house in the snow", "params": params}}).encode()


@contextmanager
def running(
    *arguments: str, environment: Mapping[str, str] = os.environ
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server in a process of its own: its address, once its model is loaded, and the process."""
    command = [sys.executable, str(SERVE), "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    try:
        assert process.stdout is not None
        address = next((found[0] for line in process.stdout if (found := re.search(r"http://[^\s]+", line))), None)
        if address is None:
            raise RuntimeError(f"the server did not start: exit status {process.wait()}")
        until = time.monotonic() + WAIT
        while ask(address, "GET", "/healthz")[0] != 200:
            if time.monotonic() > until or process.poll() is not None:
                raise RuntimeError("the server did not load its model")
            time.sleep(0.1)
        yield address.rstrip("/."), process
    finally:
        process.terminate()
        process.wait()


def ask(
    address: str, method: str, path: str, body: bytes | None = None, timeout: float = 600
) -> tuple[int, Any, bytes]:
    """(status, headers, body) of one request; status 0 if there is no connection."""
    url = urlsplit(address)
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=timeout)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json", "Accept": "application/json"})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    except (OSError, http.client.HTTPException) as error:
        return 0, {}, str(error).encode()
    finally:
        connection.close()


def load(
    address: str, clients: int, requests: int, body: Callable[[int], bytes] = body_of, patient: bool = True
) -> list[Answer]:
    """Send so many requests from so many clients; returns the answer of each.

    patient   whether clients that are refused with 429 try again after the time that the answer says
    """
    numbers, answers, lock = iter(range(requests)), [], threading.Lock()

    def client() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            begun, tries, status, content = time.perf_counter(), 0, 429, b""
            while status == 429 and tries < (MOST_TRIES if patient else 1):
                tries += 1
                status, headers, content = ask(address, "POST", "/api/generate", body(number))
                if status == 429 and patient:
                    time.sleep(float(headers["Retry-After"]))
            with lock:
                answers.append(Answer(number, status, time.perf_counter() - begun, tries, content))

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share of the values lies."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def measure(say: Callable[[str], object], clients: int = CLIENTS, requests: int = REQUESTS) -> None:
    """Measure, and say each line of the table when it is known."""
    few = max(requests // 20, 5)
    model = StableDiffusion.load()
    model.txt2img("a red house in the snow", **SETTINGS)
    rates: dict[str, float] = {}

    def library() -> float:
        begun = time.perf_counter()
        for seed in range(few):
            model.prepare(TextToImage.of("a red house in the snow", seed=seed, **SETTINGS)).result()
        return few / (time.perf_counter() - begun)

    rates["library"] = library()
    say(f"library, {few} requests: {rates['library']:.2f} requests/s")
    with running("--queue-per-client", str(max(clients, 1))) as (address, _):
        for name, count, total in (("one client", 1, few), (f"{clients} clients", clients, requests)):
            load(address, count, min(2 * count, total))  # which layers differ in batches is found now
            begun = time.perf_counter()
            answers = load(address, count, total)
            rate = total / (time.perf_counter() - begun)
            seconds = [answer.seconds for answer in answers]
            statuses = ", ".join(f"{n} x {status}" for status, n in sorted(Counter(a.status for a in answers).items()))
            say(
                f"{name}, {total} requests: {rate:.2f} requests/s, {rate / rates['library']:.2f} of the library; "
                f"p50 {percentile(seconds, 0.5):.2f} s, p95 {percentile(seconds, 0.95):.2f} s; answers: {statuses}; "
                f"refused and sent again: {sum(answer.tries - 1 for answer in answers)}"
            )
    say(f"library again: {library():.2f} requests/s")
