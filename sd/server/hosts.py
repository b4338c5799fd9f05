"""Which names the server answers to, and which other web pages may use it.

A browser lets any page send requests to any address, and tells by the headers Host, Origin and Sec-Fetch-Site for whom.
A name that an attacker controls may lead to 127.0.0.1 (DNS rebinding): its page and the server are then of one origin
for the browser, and only Host shows that the name is foreign.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

# a name or address, in brackets if it has colons, and a port
AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9_.-]+)(?::([0-9]{1,5}))?", re.ASCII)
PORTS = {"http": 80, "https": 443}


def split(authority: str) -> tuple[str, int | None] | None:
    """Host and port of a Host header, in lower case, without brackets; None for what is neither.

    >>> split("LocalHost:7860"), split("[::1]"), split("a b"), split("evil.example/"), split("")
    (('localhost', 7860), ('::1', None), None, None, None)
    """
    found = AUTHORITY.fullmatch(authority)
    if found is None:
        return None
    return found[1].strip("[]").lower(), None if found[2] is None else int(found[2])


def is_address(name: str) -> bool:
    """Whether a name is an IP address: no DNS is asked for it, so nobody can redirect it.

    >>> is_address("127.0.0.1"), is_address("::1"), is_address("127.0.0.1.example.org"), is_address("2130706433")
    (True, True, False, False)
    """
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True


class Hosts:
    """The names of this server."""

    def __init__(self, names: Iterable[str]) -> None:
        """names   besides localhost and all addresses; with or without a port, which does not count"""
        known = (split(name) or (name.lower(), None) for name in names)
        self._names = {"localhost", *(name for name, _ in known)}

    def knows(self, authority: str) -> bool:
        """Whether a Host header names this server.

        >>> hosts = Hosts(["box.lan"])
        >>> [hosts.knows(name) for name in ("localhost:7860", "10.0.0.7", "Box.LAN:80", "evil.example", "box.lan.evil")]
        [True, True, True, False, False]
        """
        found = split(authority)
        return found is not None and (found[0] in self._names or is_address(found[0]))


def same_origin(origin: str, host: str) -> bool:
    """Whether an Origin header is that of the server's own page. The scheme does not count: a proxy may speak TLS.

    >>> same_origin("http://localhost:7860", "localhost:7860"), same_origin("https://box.lan", "box.lan:443")
    (True, True)
    >>> same_origin("http://localhost:3000", "localhost:7860"), same_origin("null", "localhost")
    (False, False)
    """
    scheme, separator, authority = origin.partition("://")
    theirs, ours = split(authority), split(host)
    if not separator or scheme not in PORTS or theirs is None or ours is None:
        return False
    usual = PORTS[scheme]
    return theirs[0] == ours[0] and (theirs[1] or usual) == (ours[1] or usual)
