"""Chunks that only the holder of a key can read: where the key comes from, data keys wrapped by it, ciphers of packs.

AES-256-GCM throughout (NIST SP 800-38D). The operator's key, the key-encryption key, wraps data keys, which the store keeps
(docs/format.md, Keys); a data key gives each pack a key of its own (HKDF, RFC 5869). So the operator's key can be changed
without writing a pack again. What is encrypted is up to the caller. `cryptography` is loaded when a key is used, not before.
"""

from __future__ import annotations

import base64
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from blake3 import blake3

from hotstart.errors import BadUsage, Damaged, HotstartError, Refused
from hotstart.store.port import Bytes, Store

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY, KEY_FILE, KEY_COMMAND = "HOTSTART_STORE_KEY", "HOTSTART_STORE_KEY_FILE", "HOTSTART_STORE_KEY_COMMAND"
SALT_BYTES = 16
SEAL_BYTES = 16  # the tag: so much longer is a sealed chunk
_KEY_BYTES, _NONCE_BYTES, _SET_BYTES = 32, 12, 16
_KEY_ID_CONTEXT = "hotstart 2026 key id"
_PACK_INFO = b"hotstart pack"
_COMMAND_TIMEOUT_S = 30.0
_WRAPPED = re.compile(r"keys/([0-9a-f]{32})/([0-9a-f]{16})")


# ---- the operator's key


class KeySource:
    """Where the operator's key comes from. It is fetched when it is asked for; nothing prints it."""

    def __init__(self, variable: str, value: str) -> None:
        self.variable = variable
        self._value = value

    def read(self) -> bytes:
        """Fetch the key, 32 bytes. Raises BadUsage if there is none or it is malformed, HotstartError if the command fails."""
        if self.variable == KEY_FILE:
            return read_key_file(self._value)
        if self.variable == KEY_COMMAND:
            return parse_store_key(_output_of(self._value), f"what the command of {KEY_COMMAND} prints")
        return parse_store_key(self._value, KEY)


def key_source_from_environment(environment: Mapping[str, str]) -> KeySource | None:
    """Return where the operator's key comes from; None if none is named. Raises BadUsage if several are."""
    named = [KeySource(v, environment[v]) for v in (KEY, KEY_FILE, KEY_COMMAND) if environment.get(v)]
    if len(named) > 1:
        raise BadUsage(f"{' and '.join(source.variable for source in named)} are both set: leave one")
    return named[0] if named else None


def read_key_file(path: str) -> bytes:
    """Read a key from a file. Raises BadUsage."""
    try:
        with open(path, encoding="ascii", errors="replace") as f:
            return parse_store_key(f.read(4096), path)
    except OSError as e:
        raise BadUsage(f"the key file {path} cannot be read: {e.strerror}") from e


def parse_store_key(text: str, what: str) -> bytes:
    """Read 32 bytes in hexadecimal digits or base64 of either alphabet. Raises BadUsage, which does not repeat them."""
    text = text.strip()
    try:
        if len(text) == 2 * _KEY_BYTES:
            return bytes.fromhex(text)
        raw = base64.b64decode(text.rstrip("=").translate({45: "+", 95: "/"}) + "=", validate=True)
    except ValueError:
        raw = b""
    if len(raw) != _KEY_BYTES:
        raise BadUsage(f"{what} is no key: it takes 32 bytes in hexadecimal or base64, like `openssl rand -hex 32`")
    return raw


def _output_of(command: str) -> str:
    """Run a command of the operator's and return what it printed. Its words and what it complains may be secret: neither shows."""
    import signal
    import subprocess

    try:
        words = shlex.split(command)
    except ValueError as e:
        raise BadUsage(f"{KEY_COMMAND} is no command: a quotation mark is missing") from e
    try:
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
    except (OSError, ValueError, IndexError) as e:
        raise BadUsage(
            f"the command of HOTSTART_STORE_KEY_COMMAND cannot be run: {getattr(e, 'strerror', None) or 'is it one?'}"
        ) from e
    with child:
        try:
            said, _ = child.communicate(timeout=_COMMAND_TIMEOUT_S)
        except BaseException as e:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # with whatever it has started
            if isinstance(e, subprocess.TimeoutExpired):  # which quotes the command
                raise HotstartError(
                    f"the command of HOTSTART_STORE_KEY_COMMAND gave no key within {_COMMAND_TIMEOUT_S:g} s: "
                    "run it by hand to see why"
                ) from None
            raise
    if child.returncode:
        raise HotstartError(
            f"the command of HOTSTART_STORE_KEY_COMMAND failed with status {child.returncode}: run it by hand to see why"
        )
    return said.decode("ascii", "replace")


def store_key_id(key: bytes) -> str:
    """Return a name of an operator's key that gives nothing of it away: 16 hexadecimal digits."""
    return blake3(key, derive_key_context=_KEY_ID_CONTEXT).hexdigest()[:16]


# ---- data keys


class PackCipher:
    """Seals and opens the chunks of one pack."""

    def __init__(self, key: bytes) -> None:
        self._aead = _aead(key)

    def seal(self, ordinal: int, digest: str, data: Bytes) -> bytes:
        """Encrypt a chunk, bound to its place in the pack and to its digest.

        Never use an ordinal twice: a nonce that repeats gives both chunks away (SP 800-38D, section 8). Whoever begins a pack
        anew draws a new salt.
        """
        return self._aead.encrypt(_nonce(ordinal), data, bytes.fromhex(digest))

    def open(self, ordinal: int, digest: str, data: Bytes) -> bytes:
        """Decrypt a chunk. Raises Damaged if it is anything but what was sealed for this place and digest."""
        from cryptography.exceptions import InvalidTag

        try:
            return self._aead.decrypt(_nonce(ordinal), data, bytes.fromhex(digest))
        except InvalidTag as e:
            raise Damaged(f"chunk {digest[:12]} cannot be decrypted: it is damaged, or another one") from e


class DataKey:
    """A key that encrypts packs; `set_id` is its name in the store."""

    def __init__(self, set_id: str, key: bytes) -> None:
        self.set_id = set_id
        self._key = key

    def pack_cipher(self, salt: bytes) -> PackCipher:
        """Return the cipher of the pack that drew this salt, 16 random bytes."""
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        if len(salt) != SALT_BYTES:
            raise ValueError(f"a salt has {SALT_BYTES} bytes, not {len(salt)}")
        return PackCipher(HKDF(SHA256(), _KEY_BYTES, salt, _PACK_INFO).derive(self._key))


class DataKeys:
    """The data keys of a store, as far as the operator's key opens them. Several threads may use it at once."""

    def __init__(self, store: Store, key: bytes | None) -> None:
        self._store = store
        self._key = key
        self._known: dict[str, DataKey] = {}

    def current(self) -> DataKey:
        """Return a data key for new packs: one that the operator's key opens, else a new one. Raises BadUsage without a key."""
        if self._key is None:
            raise BadUsage(f"no key to encrypt with: {_SET_IT}")
        mine = store_key_id(self._key)
        for set_id, key_id in _wrapped(self._store):
            if key_id == mine:
                return self.get(set_id)
        set_id = os.urandom(_SET_BYTES).hex()
        self._store.write(f"keys/{set_id}/{mine}", _wrap(os.urandom(_KEY_BYTES), self._key, set_id))
        return self.get(set_id)  # as the store has it: nothing is encrypted with a key that only we know

    def get(self, set_id: str) -> DataKey:
        """Return the data key of a pack. Raises Refused if our key does not open it, Damaged if it is damaged or gone."""
        if set_id not in self._known:
            self._known[set_id] = DataKey(set_id, self._unwrapped(set_id))
        return self._known[set_id]

    def _unwrapped(self, set_id: str) -> bytes:
        openers = [key_id for of, key_id in _wrapped(self._store, set_id) if of == set_id]
        if not openers:
            raise Damaged(f"the store has lost the data key {set_id}: what it encrypted cannot be read")
        mine = None if self._key is None else store_key_id(self._key)
        if self._key is None or mine not in openers:
            but = f", not {mine}" if mine else ""
            raise Refused(f"it is encrypted, and opened by the key with id {' or '.join(openers)}{but}: {_SET_IT}")
        return _read_wrapped(self._store, set_id, self._key)


_SET_IT = f"set {KEY}, {KEY_FILE} or {KEY_COMMAND}"


def rotate(store: Store, old: bytes, new: bytes) -> int:
    """Have a new operator's key open all that the old one does, and the old one nothing; return how many data keys that were.

    All are wrapped by the new key before any wrapping by the old one is deleted: killed at any point, one of the two opens
    them all, and doing it again finishes. Packs stay as they are. Raises BadUsage if the keys are the same, Damaged before
    anything is deleted.
    """
    old_id, new_id = store_key_id(old), store_key_id(new)
    if old_id == new_id:
        raise BadUsage("the new key is the old one: make another, like `openssl rand -hex 32`")
    sets = [set_id for set_id, key_id in _wrapped(store) if key_id == old_id]
    for set_id in sets:
        key = _read_wrapped(store, set_id, old)
        store.write(f"keys/{set_id}/{new_id}", _wrap(key, new, set_id))  # False: somebody was killed after it
        if _read_wrapped(store, set_id, new) != key:
            raise Damaged(f"keys/{set_id}/{new_id} of the store is another key than keys/{set_id}/{old_id}")
    for set_id in sets:
        store.delete(f"keys/{set_id}/{old_id}")
    return len(sets)


def _wrapped(store: Store, set_id: str = "") -> Iterator[tuple[str, str]]:
    """Which data key is wrapped by which operator's key, as (set id, key id)."""
    for name, _ in store.list(f"keys/{set_id}"):
        if found := _WRAPPED.fullmatch(name):
            yield found[1], found[2]


def _wrap(data_key: bytes, key: bytes, set_id: str) -> bytes:
    # A random nonce is good for 2^32 wrappings by one key (SP 800-38D, section 8.3).
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + _aead(key).encrypt(nonce, data_key, bytes.fromhex(set_id))


def _read_wrapped(store: Store, set_id: str, key: bytes) -> bytes:
    from cryptography.exceptions import InvalidTag

    name = f"keys/{set_id}/{store_key_id(key)}"
    data = store.read(name)
    try:
        data_key = _aead(key).decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], bytes.fromhex(set_id))
    except (InvalidTag, ValueError) as e:  # ValueError: too short for a nonce
        raise Damaged(f"{name} of the store is damaged: bring it back, or what it encrypted is lost") from e
    if len(data_key) != _KEY_BYTES:
        raise Damaged(f"{name} of the store holds no key")
    return data_key


def _nonce(ordinal: int) -> bytes:
    return ordinal.to_bytes(_NONCE_BYTES, "big")


def _aead(key: bytes) -> AESGCM:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key)
