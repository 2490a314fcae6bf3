"""Who made a snapshot: signatures, the keys that are trusted on this machine, what becomes of what none of them signed.

Ed25519 (RFC 8032, section 5.1) over a snapshot's digest, and so over all that its manifest names (docs/format.md). Knows neither
stores nor snapshots: digests and bytes come in, a verdict goes out. `cryptography` is loaded when a key is used, not before.
"""

from __future__ import annotations

import base64
import fcntl
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from msgspec import Struct

from hotstart.errors import BadUsage, Damaged, HotstartError, NotFound, Refused
from hotstart.snapshot import codec
from hotstart.store.content import digest_of
from hotstart.store.durable import sync, write_durably

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

POLICIES = ("required", "optional")
_PREFIX = "hsk1_"
_KEY = re.compile(rf"{_PREFIX}[A-Za-z0-9_-]{{43}}")
_KEY_ID = re.compile(r"[0-9a-f]{16}")
_KEY_BYTES, _SIGNATURE_BYTES = 32, 64
# What is signed begins with its own purpose: a signature cannot be passed off as one of anything else by this key.
_CONTEXT = b"hotstart snapshot 1\0"


class Signature(Struct, frozen=True):
    """That the holder of `key` vouches for a snapshot. `signature` is 64 bytes."""

    key: str
    signature: bytes

    def to_bytes(self) -> bytes:
        """Return the object that a store keeps."""
        return codec.encode(self)

    def fits(self, digest: str) -> bool:
        """Say whether `key` signed exactly this digest."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            Ed25519PublicKey.from_public_bytes(parse_key(self.key)).verify(self.signature, _signed_bytes(digest))
        except InvalidSignature:
            return False
        return True


def parse_signature(data: bytes) -> Signature:
    """Read a signature object. Raises Damaged."""
    try:
        signature = codec.decode(Signature, data)
        parse_key(signature.key)
    except (codec.IllFormedError, BadUsage) as e:
        raise Damaged("a signature in the store is damaged") from e
    if len(signature.signature) != _SIGNATURE_BYTES:
        raise Damaged("a signature in the store is damaged")
    return signature


def parse_key(text: str) -> bytes:
    """Return the 32 bytes of a public key that is written out. Raises BadUsage."""
    if _KEY.fullmatch(text):
        raw = base64.urlsafe_b64decode(text.removeprefix(_PREFIX) + "=")
        if len(raw) == _KEY_BYTES and key_text(raw) == text:  # 43 digits have two bits to spare: one key, one text
            return raw
    raise BadUsage(f"{text[:80]!r} is no key: it takes hsk1_..., as `hotstart keys new` printed it")


def key_text(raw: bytes) -> str:
    """Write a public key out: for people to copy, and in signatures.

    >>> key_text(bytes(32))
    'hsk1_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA'
    """
    return _PREFIX + base64.urlsafe_b64encode(raw).decode().rstrip("=")


def key_id(text: str) -> str:
    """Return a short name of a key: a file's or an object's. Trust is decided by the whole key, never by this."""
    return digest_of(parse_key(text))[:16]


def _signed_bytes(digest: str) -> bytes:
    return _CONTEXT + bytes.fromhex(digest)


class Signer:
    """This machine's signing key."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.key = key_text(private.public_key().public_bytes_raw())

    def sign(self, digest: str) -> Signature:
        """Vouch for a snapshot by its digest."""
        return Signature(self.key, self._private.sign(_signed_bytes(digest)))


class TrustedKey(Struct, frozen=True):
    """A public key whose snapshots may run here; the comment says whose it is."""

    key: str
    comment: str


class Verdict(Struct, frozen=True):
    """A snapshot may run here: the id of the trusted key that signed it, or null and a note that says what it lacks."""

    key_id: str | None
    note: str | None = None


class Keyring:
    """The folder of keys: `signing.key`, `trusted/*.pub` with a key and a comment in one line, `policy`."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._signing = os.path.join(folder, "signing.key")
        self._trusted = os.path.join(folder, "trusted")
        self._policy = os.path.join(folder, "policy")

    # ---- our own key

    def own(self) -> Signer | None:
        """Return this machine's signing key, or None if it has none yet."""
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            with open(self._signing, "rb") as f:
                private = load_pem_private_key(f.read(), password=None)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, UnsupportedAlgorithm) as e:
            raise HotstartError(f"{self._signing} is no Ed25519 key: bring it back, or remove it for a new one") from e
        if not isinstance(private, Ed25519PrivateKey):
            raise HotstartError(f"{self._signing} is no Ed25519 key: bring it back, or remove it for a new one")
        return Signer(private)

    def signer(self) -> Signer:
        """Return this machine's signing key, made now if there is none; whoever asks at the same time gets the same."""
        return self.own() or self._make_key()

    def _make_key(self) -> Signer:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        with self._locked():
            if there := self.own():
                return there
            private = Ed25519PrivateKey.generate()
            _write(self._signing, private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
            return Signer(private)

    # ---- others' keys

    def trusted(self) -> list[TrustedKey]:
        """Return the keys that were trusted, without our own. Raises HotstartError for a file that is no key."""
        return [key for _, key in self._trusted_files()]

    def _trusted_files(self) -> Iterator[tuple[str, TrustedKey]]:
        with suppress(FileNotFoundError):
            for name in sorted(os.listdir(self._trusted)):
                path = os.path.join(self._trusted, name)
                if name.endswith(".pub"):
                    yield path, _read_trusted(path)

    def trust(self, key: str, comment: str = "") -> None:
        """Let snapshots that this key signed run here. Raises BadUsage."""
        parse_key(key)
        comment = comment.strip()
        if not comment.isprintable():
            raise BadUsage("a comment is one line of printable characters")
        with self._locked():
            os.makedirs(self._trusted, mode=0o700, exist_ok=True)
            _write(os.path.join(self._trusted, f"{key_id(key)}.pub"), f"{key} {comment}".rstrip().encode() + b"\n")

    def distrust(self, which: str) -> None:
        """Forget a trusted key, given in full or by its id. Raises BadUsage, NotFound."""
        if not _KEY_ID.fullmatch(which):
            parse_key(which)
        with self._locked():
            found = [path for path, trusted in self._trusted_files() if which in (trusted.key, key_id(trusted.key))]
            for path in found:
                os.unlink(path)
                sync(self._trusted)
        if found:
            return
        own = self.own()
        if own and which in (own.key, key_id(own.key)):
            raise BadUsage("that is this machine's own key, which is always trusted")
        raise NotFound(f"no trusted key {which}: `hotstart keys ls` lists them")

    # ---- what becomes of snapshots that no trusted key signed

    def policy(self) -> str:
        """Return 'required' or 'optional': whether a snapshot must be signed by a trusted key. Raises HotstartError."""
        try:
            with open(self._policy, "rb") as f:
                policy = f.read(80).decode("utf-8", "replace").strip()
        except FileNotFoundError:
            return POLICIES[0]
        if policy not in POLICIES:
            raise HotstartError(f"{self._policy} says {policy!r}: `hotstart keys policy required` puts it right")
        return policy

    def set_policy(self, policy: str) -> None:
        """Say whether snapshots must be signed by a trusted key. Raises BadUsage."""
        if policy not in POLICIES:
            raise BadUsage(f"the policy is required or optional, not {policy[:80]!r}")
        with self._locked():
            _write(self._policy, f"{policy}\n".encode())

    def check(self, digest: str, signatures: Iterable[bytes]) -> Verdict:
        """Decide whether a snapshot may run here, by the signature objects that came with it. Raises Refused.

        One good signature by a trusted key is enough, whatever else is there: anybody may have added that.
        """
        own = self.own()
        trusted = {key.key for key in self.trusted()} | ({own.key} if own else set())
        unknown: list[str] = []
        forged = spoilt = False
        for data in signatures:
            try:
                signature = parse_signature(data)
            except Damaged:
                spoilt = True
                continue
            fits, known = signature.fits(digest), signature.key in trusted
            if fits and known:
                return Verdict(key_id(signature.key))
            if fits:
                unknown.append(signature.key)
            forged, spoilt = forged or (known and not fits), spoilt or not fits
        which = f"snapshot {digest[:12]}"
        if forged:
            raise Refused(
                f"{which} has a bad signature by a trusted key: it is not what was signed, take it from elsewhere"
            )
        if unknown:
            return self._lacking(
                f"{which} is signed by the unknown key {unknown[0]}",
                f"`hotstart keys trust {unknown[0]}` if you trust who made it",
            )
        if spoilt:
            raise Refused(f"{which} has a damaged signature and no good one: take it from elsewhere")
        return self._lacking(
            f"{which} is not signed", "`hotstart keys policy optional` if you trust all that you restore"
        )

    def _lacking(self, what: str, remedy: str) -> Verdict:
        if self.policy() == "optional":
            return Verdict(None, what)
        raise Refused(f"{what}: {remedy}")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Make the folder if need be, and be the only one who writes in it."""
        for folder in (os.path.dirname(self._folder), self._folder):
            os.makedirs(folder, mode=0o700, exist_ok=True)
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _read_trusted(path: str) -> TrustedKey:
    try:
        with open(path, encoding="utf-8") as f:
            key, _, comment = f.readline().strip().partition(" ")
        parse_key(key)
    except (BadUsage, UnicodeDecodeError) as e:
        raise HotstartError(f"{path} is no trusted key: write a key and a comment in one line, or remove it") from e
    return TrustedKey(key, comment.strip())


def _write(path: str, data: bytes) -> None:
    """Replace a file's contents, for its owner's eyes. The caller holds the lock."""
    write_durably(path, data, 0o600)
    sync(os.path.dirname(path))
