"""The webhook's certificate: who may make it, when it changes, in which order. `next_step` is pure.

A Secret holds the pair in use and, while one is being replaced, the next one; the webhook's configuration holds what the API server
trusts. Each certificate has an authority of its own, whose key is thrown away at once. A change has three steps, each safe to repeat, and
an operator may be killed between any two:

    the next pair is put beside the one in use -> the API server is told to trust both -> a while later, the next becomes the one in use

The authority before stays trusted for a while more: operators read the Secret in their own time.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from msgspec import Struct

from hotstart.adapters.kubernetes.objects import SECRETS, WEBHOOKS, Object, path
from hotstart.operator.decisions import Action, Change, Decision

LASTS = timedelta(days=90)
RENEW_BEFORE = timedelta(days=30)
SETTLE_S = 300.0  # until every API server has heard of a new authority
_LOOK_AGAIN_S = 60.0  # an upgrade of the installation may have taken the authority out again


class Pair(Struct, frozen=True):
    """A certificate with its key and the authority that signed it, PEM; seconds since 1970."""

    certificate: bytes
    key: bytes
    authority: bytes
    made: float
    ends: float


def next_step(secret: Object, webhook: Object, now: float, make: Callable[[], Pair]) -> Decision:
    """Decide what the certificates need; `make` is asked only if a pair is needed."""
    using, coming = read_pair(secret), read_pair(secret, "next-")
    if using is None or using.ends <= now:  # nothing that works could be lost
        using = make()
        return Decision(
            (_put(secret, {**_data(using), **_data(None, "next-")}), *_trust(webhook, [using.authority])), 0
        )
    actions: list[Action] = []
    if coming is None and using.ends - now < RENEW_BEFORE.total_seconds():
        coming = make()
        actions.append(_put(secret, _data(coming, "next-")))
    authorities = [using.authority, *([coming.authority] if coming else []), *_before(secret, now)]
    actions += _trust(webhook, authorities)
    if coming is not None and not actions and now - coming.made >= SETTLE_S:
        before = {"before-ca.crt": _encode(using.authority), "changed": _encode(str(now).encode())}
        actions.append(_put(secret, {**_data(coming), **_data(None, "next-"), **before}))
    return Decision(tuple(actions), _LOOK_AGAIN_S)


def _before(secret: Object, now: float) -> list[bytes]:
    """Return the authority of the certificate before this one, as long as an operator may not have heard of the change."""
    data = path(secret, "data") or {}
    try:
        return [_decode(data["before-ca.crt"])] if now - float(_decode(data["changed"])) < SETTLE_S else []
    except (KeyError, ValueError):
        return []


def read_pair(secret: Object, prefix: str = "") -> Pair | None:
    """Return the pair of a Secret; None if there is none that can be read."""
    data = path(secret, "data") or {}
    try:
        made, ends = (float(_decode(data[f"{prefix}{key}"])) for key in ("made", "ends"))
        certificate, key, authority = (_decode(data[f"{prefix}{n}"]) for n in ("tls.crt", "tls.key", "ca.crt"))
    except (KeyError, ValueError):
        return None
    return Pair(certificate, key, authority, made, ends)


def make_pair(names: list[str], now: datetime) -> Pair:
    """Make a certificate for these DNS names, signed by an authority that nobody can sign with again."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    begins, ends = now - timedelta(hours=1), now + LASTS  # the API server's clock may be behind
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority_name = named(f"hotstart webhook {now:%Y-%m-%d %H:%M:%S}")

    def builder(
        subject: x509.Name, public: ec.EllipticCurvePublicKey, *, is_authority: bool
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(authority_name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begins)
            .not_valid_after(ends)
            .add_extension(
                x509.BasicConstraints(ca=is_authority, path_length=0 if is_authority else None), critical=True
            )
        )

    authority = builder(authority_name, authority_key.public_key(), is_authority=True).sign(
        authority_key, hashes.SHA256()
    )
    certificate = (
        builder(named(names[0][:64]), key.public_key(), is_authority=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(n) for n in names]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    return Pair(
        certificate.public_bytes(pem),
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        authority.public_bytes(pem),
        now.timestamp(),
        ends.timestamp(),
    )


def service_names(service: str, namespace: str) -> list[str]:
    """Return the names under which the API server calls a Service."""
    return [f"{service}.{namespace}.svc", f"{service}.{namespace}.svc.cluster.local"]


def utc(now: float) -> datetime:
    """Return a time as certificates have it."""
    return datetime.fromtimestamp(int(now), UTC)


def _trust(webhook: Object, authorities: list[bytes]) -> list[Action]:
    """Tell the API server which authorities to trust, if that is not what it was told."""
    bundle = _encode(b"".join(authorities))
    hooks: list[Object] = path(webhook, "webhooks") or []
    if all(path(h, "clientConfig", "caBundle") == bundle for h in hooks):
        return []
    changed = [{**h, "clientConfig": {**h["clientConfig"], "caBundle": bundle}} for h in hooks]
    return [Change(WEBHOOKS, webhook, {"webhooks": changed})]


def _put(secret: Object, data: dict[str, str | None]) -> Change:
    return Change(SECRETS, secret, {"data": data})


def _data(pair: Pair | None, prefix: str = "") -> dict[str, str | None]:
    values: dict[str, bytes | None] = dict.fromkeys(("tls.crt", "tls.key", "ca.crt", "made", "ends"))
    if pair is not None:
        values = {
            "tls.crt": pair.certificate,
            "tls.key": pair.key,
            "ca.crt": pair.authority,
            "made": str(pair.made).encode(),
            "ends": str(pair.ends).encode(),
        }
    return {f"{prefix}{k}": None if v is None else _encode(v) for k, v in values.items()}


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _decode(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
