"""Every setting of the server: read by the program from its arguments, the environment, or a file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ..config import PRECISIONS
from ..settings import Check, OneOf, Range, check_settings, flag, number, setting, whole

MEGABYTE = 1 << 20
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def _texts(name: str, value: object) -> tuple[str, ...]:
    """Texts, or one with commas, as a tuple."""
    found = tuple(value.split(",")) if isinstance(value, str) else tuple(value)  # type: ignore[arg-type]
    if not all(isinstance(text, str) for text in found):
        raise ValueError(f"{name} must be texts, got {value!r:.100}")
    return tuple(text.strip() for text in found if text.strip())


def _texts_like(pattern: str, what: str) -> Check:
    """The check of texts that all match a pattern; `what` they are, for the error."""

    def check(name: str, value: object) -> tuple[str, ...]:
        found = _texts(name, value)
        for text in found:
            if not re.fullmatch(pattern, text):
                raise ValueError(f"{name} must be {what}, got {text!r:.100}")
        return found

    return check


_hosts = _texts_like(r"[\w.-]+(:\d+)?|\[?[\da-fA-F:.]+\]?", "names, such as box.example.org")
_origins = _texts_like(r"[a-zA-Z][a-zA-Z\d+.-]*://[^/*\s]+/?", "like https://example.org, without a path or *")


def _path(name: str, value: object) -> Path | None:
    """A path on this machine."""
    if isinstance(value, str | Path) and str(value):
        return Path(value).expanduser()
    raise ValueError(f"{name} must be a path, got {value!r:.100}")


@dataclass(frozen=True)
class ServerSettings:
    """Settings of the server. Raises ValueError for those that are out of range or would be unsafe."""

    host: str = setting("127.0.0.1", "address to listen at; any but the loopback needs api_key, or insecure")
    port: int = setting(7860, "port to listen at; 0 takes any that is free", Range(whole, 0, 65535))
    api_key: str | None = setting(None, "key that every request must have")
    insecure: bool = setting(False, "let anybody who reaches the address use the server", flag)
    hosts: Sequence[str] = setting(
        (), "names under which it may be reached besides its address, such as a proxy's", _hosts
    )
    origins: Sequence[str] = setting((), "other web pages that may use it, such as https://example.org", _origins)

    ckpt: Path | None = setting(None, "the model that is loaded first; None is the embedded one", _path)
    models: Path | None = setting(None, "folder of further models, which requests choose by name", _path)
    loras: Path | None = setting(None, "folder of LoRA files", _path)
    embeddings: Path | None = setting(None, "folder of textual inversion files, all of them added to prompts", _path)
    controls: Path | None = setting(None, "folder of control networks", _path)
    vaes: Path | None = setting(None, "folder of VAEs", _path)
    resident: int = setting(1, "models kept in memory; the one used least recently goes", Range(whole, 1))
    device: Sequence[str] = setting((), "devices, each with a worker of its own; none: the best", _texts)
    dtype: str | None = setting(
        None, "precision: float32, float16 or bfloat16; None: the best for the device", OneOf(PRECISIONS)
    )
    low_memory: bool = setting(False, "the networks take turns in memory; nothing is batched", flag)
    cache: Path | None = setting(None, "folder in which converted weights are kept", _path)

    queue: int = setting(256, "jobs that wait at most; more are refused with 429", Range(whole, 1))
    queue_per_client: int = setting(128, "of these, those of one client, which is an address", Range(whole, 1))
    together: int = setting(8, "requests whose steps are computed in one batch; 1: each alone", Range(whole, 1, 64))
    max_body: int = setting(64 * MEGABYTE, "bytes of a request's body", Range(whole, 1024))
    body_seconds: float = setting(
        30, "seconds in which the headers of a request must arrive, and then its body", Range(number, 0.1)
    )
    max_pixels: int = setting(2048 * 2048, "pixels of a generated image", Range(whole, 64 * 64))
    max_image_pixels: int = setting(
        4096 * 4096, "pixels of an image in a request, checked before decoding", Range(whole, 1)
    )
    max_waiting_pixels: int = setting(
        2**29, "pixels of the images in all requests that wait; half of it for one client", Range(whole, 1)
    )
    max_steps: int = setting(150, "steps of a request", Range(whole, 1, 1000))
    max_batch: int = setting(8, "images that a request generates at once", Range(whole, 1, 100))
    max_images: int = setting(64, "images of a request in all", Range(whole, 1, 10_000))
    grace: float = setting(30, "seconds to finish accepted jobs when the server is told to stop", Range(number, 0))
    log_prompts: bool = setting(False, "write prompts into the log", flag)

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.is_local and not self.api_key and not self.insecure:
            raise ValueError(
                f"host {self.host} can be reached from other machines: give a key with --api-key, or --insecure to "
                "let anybody use the server"
            )
        key = self.api_key
        if key is not None and (len(key) < 8 or not key.isprintable() or key != key.strip()):
            raise ValueError("the API key must have at least 8 printable characters, and no blanks around them")

    @property
    def is_local(self) -> bool:
        """Whether only programs of this machine reach the server."""
        return self.host in LOOPBACK


NAMES = tuple(f.name for f in fields(ServerSettings))
