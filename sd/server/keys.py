"""The API key of a request: in Authorization, as a bearer or as the password of HTTP Basic, or in X-API-Key."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
from collections.abc import Iterator, Mapping


class Key:
    """The key that requests must have. Only a hash of it is kept."""

    def __init__(self, key: str) -> None:
        self._digest = hashlib.sha256(key.encode()).digest()

    def client(self, address: str) -> str:
        """The name of a client that has the key, for the queue and the log."""
        return hashlib.sha256(self._digest + address.encode()).hexdigest()[:16]

    def opens(self, headers: Mapping[str, str]) -> bool:
        """Whether the headers of a request hold the key. Takes the same time for any wrong one of a length.

        >>> key = Key("correct horse")
        >>> key.opens({"authorization": "Bearer correct horse"}), key.opens({"x-api-key": "wrong horse"})
        (True, False)
        >>> key.opens({"authorization": "Basic " + base64.b64encode(b"anyone:correct horse").decode()})
        True
        """
        opened = False
        for given in _given(headers):
            opened |= hmac.compare_digest(hashlib.sha256(given).digest(), self._digest)
        return opened


def _given(headers: Mapping[str, str]) -> Iterator[bytes]:
    """The keys in the headers. Their bytes are those of UTF-8 where a header has other than ASCII letters."""
    scheme, _, value = headers.get("authorization", "").strip().partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer":
        yield value.encode("latin-1", "replace")
    elif scheme.lower() == "basic":
        with contextlib.suppress(binascii.Error, ValueError):
            before, colon, password = base64.b64decode(value, validate=True).partition(b":")
            yield password if colon else before  # some clients send nothing but the key
    if "x-api-key" in headers:
        yield headers["x-api-key"].strip().encode("latin-1", "replace")
