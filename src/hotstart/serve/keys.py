"""Keys: who may ask a model. Only digests are kept, and compared in a time that tells nothing."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


class Keys:
    """Some keys, any of which will do; without any, everybody may."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(_digest_of(key) for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, key: str) -> bool:
        """Say whether this is one of them."""
        given = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = False
        for digest in self._digests:
            found |= hmac.compare_digest(given, digest)
        return found


def _digest_of(key: str) -> bytes:
    digest = _DIGEST.fullmatch(key)
    return bytes.fromhex(digest[1]) if digest else hashlib.sha256(key.encode()).digest()


def key_of(headers: Mapping[str, str]) -> str:
    """Return the key that a request carries, names of headers in lower case; empty if there is none.

    >>> key_of({"authorization": "Bearer abc"})
    'abc'
    """
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        return credentials.strip()
    return headers.get("x-api-key") or headers.get("api-key") or ""
