"""Who made a snapshot: signatures as specified, trust by the whole key, nothing unsigned unless it was allowed."""

import base64
import hashlib
import json
import os
import stat
import subprocess
import sys
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotstart.errors import BadUsage, Damaged, HotstartError, NotFound, Refused
from hotstart.store.content import digest_of
from hotstart.store.signing import Keyring, Signature, Verdict, key_id, key_text, parse_key, parse_signature

DIGEST, OTHER = digest_of(b"a manifest"), digest_of(b"another one")

# RFC 8032, section 7.1, TEST 1 to TEST 3: secret key, public key, message, signature.
RFC_8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
]


@pytest.fixture
def keyring(tmp_path):
    return Keyring(str(tmp_path / "home" / "keys"))


@pytest.fixture(scope="module")
def alice(tmp_path_factory):
    return Keyring(str(tmp_path_factory.mktemp("alice") / "keys")).signer()


@pytest.fixture(scope="module")
def bob(tmp_path_factory):
    return Keyring(str(tmp_path_factory.mktemp("bob") / "keys")).signer()


def signed(signer, digest=DIGEST):
    return signer.sign(digest).to_bytes()


def forged(signer, digest=DIGEST):
    """A well-formed signature that does not fit."""
    signature = bytearray(signer.sign(digest).signature)
    signature[5] ^= 1
    return Signature(signer.key, bytes(signature)).to_bytes()


# ---- Ed25519, written a second time, slowly (RFC 8032, sections 5.1.5 and 5.1.6)

_P, _L = 2**255 - 19, 2**252 + 27742317777372353535851937790883648493
_D = -121665 * pow(121666, -1, _P) % _P
_BASE_Y = 4 * pow(5, -1, _P) % _P
_BASE = (15112221349535400772501151409588531511454012693041857206046113283949847762202, _BASE_Y)


def add(a, b):
    product = _D * a[0] * b[0] * a[1] * b[1] % _P
    return (
        (a[0] * b[1] + b[0] * a[1]) * pow(1 + product, -1, _P) % _P,
        (a[1] * b[1] + a[0] * b[0]) * pow(1 - product, -1, _P) % _P,
    )


def times(number, point):
    total = (0, 1)
    while number:
        if number & 1:
            total = add(total, point)
        point, number = add(point, point), number >> 1
    return total


def written(point):
    return (point[1] | (point[0] & 1) << 255).to_bytes(32, "little")


def number_of(*parts):
    return int.from_bytes(hashlib.sha512(b"".join(parts)).digest(), "little")


def naive_signature(secret, message):
    """(public key, signature)"""
    digest = hashlib.sha512(secret).digest()
    scalar = int.from_bytes(digest[:32], "little") & ((1 << 254) - 8) | 1 << 254
    public, r = written(times(scalar, _BASE)), number_of(digest[32:], message) % _L
    point = written(times(r, _BASE))
    return public, point + ((r + number_of(point, public, message) * scalar) % _L).to_bytes(32, "little")


def install(keyring, secret):
    """Make this secret the keyring's own key, in PKCS #8 as openssl writes it (RFC 8410)."""
    keyring.set_policy("required")  # makes the folder
    body = base64.b64encode(bytes.fromhex("302e020100300506032b657004220420") + secret).decode()
    with open(os.path.join(keyring._folder, "signing.key"), "w") as f:
        f.write(f"-----BEGIN PRIVATE KEY-----\n{body}\n-----END PRIVATE KEY-----\n")


@pytest.mark.parametrize(("secret", "public", "message", "signature"), RFC_8032)
def test_the_second_implementation_gives_the_signatures_of_the_standard(secret, public, message, signature):
    found = naive_signature(bytes.fromhex(secret), bytes.fromhex(message))
    assert found == (bytes.fromhex(public), bytes.fromhex(signature))


@pytest.mark.parametrize(("secret", "public"), [vector[:2] for vector in RFC_8032])
def test_a_signature_is_ed25519_over_the_purpose_and_the_digest(keyring, secret, public):
    install(keyring, bytes.fromhex(secret))
    signature = keyring.signer().sign(DIGEST)
    assert signature.key == key_text(bytes.fromhex(public))
    message = b"hotstart snapshot 1\0" + bytes.fromhex(DIGEST)
    assert len(message) == 52
    assert signature.signature == naive_signature(bytes.fromhex(secret), message)[1]
    assert keyring.check(DIGEST, [signature.to_bytes()]) == Verdict(key_id(signature.key))


def test_the_bytes_of_a_signature_are_as_documented(keyring):
    install(keyring, bytes.fromhex(RFC_8032[0][0]))
    signature = keyring.signer().sign("00" * 32)
    assert signature.to_bytes() == (
        b'{"key":"hsk1_11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo","signature":"'
        + base64.b64encode(signature.signature)
        + b'"}'
    )


# ---- keys written out


@given(st.binary(min_size=32, max_size=32))
def test_a_key_survives_being_written_out_and_read(raw):
    text = key_text(raw)
    assert len(text) == 48 and text.startswith("hsk1_")
    assert parse_key(text) == raw
    assert key_id(text) == digest_of(raw)[:16]


@given(st.binary(min_size=32, max_size=32), st.data())
def test_one_key_has_one_text(raw, data):
    text = key_text(raw)
    at = data.draw(st.integers(0, len(text) - 1))
    other = text[:at] + data.draw(st.sampled_from("ABCyz019-_+/= \n")) + text[at + 1 :]
    if other != text:
        with suppress(BadUsage):
            assert parse_key(other) != raw


@given(st.binary(min_size=32, max_size=32), st.integers(1, 3))
def test_the_bits_that_a_key_has_to_spare_are_zero(raw, spare):
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    text = key_text(raw)
    with pytest.raises(BadUsage):
        parse_key(text[:-1] + digits[digits.index(text[-1]) + spare])


@pytest.mark.parametrize("text", ["", "hsk1_", "hsk2_" + "A" * 43, "hsk1_" + "A" * 42, "hsk1_" + "A" * 44, "A" * 48])
@pytest.mark.parametrize("end", ["", "\n", "=", " x"])
def test_what_is_no_key_is_refused_by_name(text, end):
    with pytest.raises(BadUsage, match="is no key: it takes hsk1_"):
        parse_key(text + end)


# ---- our own key


def test_there_is_no_key_until_one_is_needed(keyring):
    assert keyring.own() is None
    assert keyring.trusted() == []
    assert keyring.policy() == "required"
    assert not os.path.exists(keyring._folder)


def test_the_key_is_made_once_for_its_owner_alone(keyring, tmp_path):
    key = keyring.signer().key
    assert Keyring(keyring._folder).signer().key == key == keyring.own().key
    path = os.path.join(keyring._folder, "signing.key")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(keyring._folder).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(tmp_path / "home").st_mode) == 0o700
    assert os.listdir(keyring._folder) == ["signing.key"]
    with open(path) as f:
        assert f.readline() == "-----BEGIN PRIVATE KEY-----\n"


def test_processes_that_race_for_the_key_end_up_with_one(tmp_path):
    code = (
        "import sys; from hotstart.store.signing import Keyring; keyring = Keyring(sys.argv[1]); keyring.own(); "
        "input(); print(keyring.signer().key)"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "keys")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    keys = {racer.communicate(timeout=60)[0].strip() for racer in racers}
    assert keys == {Keyring(str(tmp_path / "keys")).own().key}


def test_who_comes_second_to_making_the_key_takes_the_first_ones(keyring):
    first = Keyring(keyring._folder).signer().key
    assert keyring._make_key().key == first  # it had looked before there was one
    assert keyring.own().key == first


def test_what_a_killed_maker_left_aside_is_never_the_key(keyring):
    keyring.set_policy("required")
    aside = os.path.join(keyring._folder, "signing.key.aside")
    with open(aside, "w") as f:
        f.write("half of a k")
    os.chmod(aside, 0o644)
    assert keyring.own() is None
    keyring.signer()
    assert sorted(os.listdir(keyring._folder)) == ["policy", "signing.key"]
    assert stat.S_IMODE(os.stat(os.path.join(keyring._folder, "signing.key")).st_mode) == 0o600


# Of another curve.
EC_KEY = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgevZzL1gdAFr88hb2
OF/2NxApJCzGCEDdfSp6VQO30hyhRANCAAQRWz+jn65BtOMvdyHKcvjBeBSDZH2r
1RTwjmYSi9R/zpBnuQ4EiMnCqfMPWiZqB4QdbAd0E7oH50VpuZ1P087G
-----END PRIVATE KEY-----
"""


@pytest.mark.parametrize("text", ["", "nonsense", EC_KEY, EC_KEY.replace("M", "N"), "\xff"])
def test_a_key_file_that_is_no_key_is_neither_used_nor_replaced(keyring, text):
    keyring.set_policy("required")
    path = os.path.join(keyring._folder, "signing.key")
    with open(path, "w") as f:
        f.write(text)
    for use in (keyring.own, keyring.signer, lambda: keyring.check(DIGEST, [])):
        with pytest.raises(HotstartError, match="is no Ed25519 key") as caught:
            use()
        assert not isinstance(caught.value, Refused)
    with open(path) as f:
        assert f.read() == text


# ---- trust


def test_our_own_snapshots_are_trusted(keyring):
    own = keyring.signer()
    assert keyring.check(DIGEST, [signed(own)]) == Verdict(key_id(own.key))


def test_a_key_is_trusted_until_it_is_distrusted_by_key_or_by_id(keyring, alice, bob):
    keyring.trust(alice.key, "Alice of the build farm")
    keyring.trust(bob.key)
    assert sorted((k.key, k.comment) for k in keyring.trusted()) == sorted(
        [(alice.key, "Alice of the build farm"), (bob.key, "")]
    )
    assert keyring.check(DIGEST, [signed(alice)]).key_id == key_id(alice.key)
    keyring.distrust(key_id(alice.key))
    with pytest.raises(Refused):
        keyring.check(DIGEST, [signed(alice)])
    assert keyring.check(DIGEST, [signed(bob)]).key_id == key_id(bob.key)
    keyring.distrust(bob.key)
    assert keyring.trusted() == []


def test_trusting_again_changes_the_comment(keyring, alice):
    keyring.trust(alice.key, "old")
    keyring.trust(alice.key, "new")
    assert [k.comment for k in keyring.trusted()] == ["new"]


def test_a_trusted_key_is_a_line_in_a_file_named_by_its_id(keyring, alice):
    keyring.trust(alice.key, "  Alice  ")
    with open(os.path.join(keyring._folder, "trusted", f"{key_id(alice.key)}.pub")) as f:
        assert f.read() == f"{alice.key} Alice\n"


def test_a_key_file_that_was_put_there_by_hand_may_have_any_name(keyring, alice):
    os.makedirs(os.path.join(keyring._folder, "trusted"))
    for name in ("alice.pub", "README"):
        with open(os.path.join(keyring._folder, "trusted", name), "w") as f:
            f.write(alice.key if name == "alice.pub" else "keys of colleagues")
    assert keyring.check(DIGEST, [signed(alice)]).key_id == key_id(alice.key)
    keyring.distrust(key_id(alice.key))
    assert keyring.trusted() == []


@pytest.mark.parametrize("text", [b"", b"\n", b"hsk1_AAAA\n", b"\xff\xfe", b" hsk1_"])
def test_a_trusted_file_that_is_no_key_is_an_error_and_not_passed_over(keyring, alice, text):
    keyring.trust(alice.key)
    with open(os.path.join(keyring._folder, "trusted", "odd.pub"), "wb") as f:
        f.write(text)
    with pytest.raises(HotstartError, match=r"odd\.pub is no trusted key"):
        keyring.check(DIGEST, [signed(alice)])


@pytest.mark.parametrize("which", ["", "alice", "hsk1_AAAA", "0" * 15, "0" * 17, "../policy"])
def test_only_a_key_or_an_id_can_be_distrusted(keyring, which):
    with pytest.raises(BadUsage):
        keyring.distrust(which)


def test_distrusting_what_was_not_trusted_says_so(keyring, alice):
    for which in (alice.key, key_id(alice.key)):
        with pytest.raises(NotFound, match="no trusted key"):
            keyring.distrust(which)


def test_our_own_key_cannot_be_distrusted(keyring):
    own = keyring.signer()
    for which in (own.key, key_id(own.key)):
        with pytest.raises(BadUsage, match="always trusted"):
            keyring.distrust(which)


@pytest.mark.parametrize("comment", ["two\nlines", "\x1b[31m", "a\0b"])
def test_a_comment_is_one_printable_line(keyring, alice, comment):
    with pytest.raises(BadUsage, match="one line"):
        keyring.trust(alice.key, comment)
    assert keyring.trusted() == []


def test_trust_goes_by_the_whole_key_and_not_by_its_id(keyring, alice, bob, monkeypatch):
    monkeypatch.setattr("hotstart.store.signing.key_id", lambda _key: "0" * 16)
    keyring.trust(alice.key)
    with pytest.raises(Refused, match="unknown key"):
        keyring.check(DIGEST, [signed(bob)])


# ---- the verdict


def test_a_snapshot_that_nobody_signed_is_refused(keyring):
    with pytest.raises(Refused, match=f"snapshot {DIGEST[:12]} is not signed: ") as caught:
        keyring.check(DIGEST, [])
    assert caught.value.exit_code == 4


def test_an_unknown_key_is_named_so_that_it_can_be_trusted(keyring, alice):
    keyring.signer()
    with pytest.raises(Refused) as caught:
        keyring.check(DIGEST, [signed(alice)])
    assert f"is signed by the unknown key {alice.key}: `hotstart keys trust {alice.key}` if you" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_signature_of_another_snapshot_is_a_bad_one(keyring, alice):
    keyring.trust(alice.key)
    with pytest.raises(Refused, match="bad signature by a trusted key"):
        keyring.check(DIGEST, [signed(alice, OTHER)])


def test_a_bad_signature_by_an_unknown_key_never_offers_to_trust_it(keyring, alice):
    with pytest.raises(Refused, match="damaged signature and no good one") as caught:
        keyring.check(DIGEST, [forged(alice)])
    assert alice.key not in str(caught.value)


def test_a_signature_is_of_the_key_that_it_names(keyring, alice, bob):
    keyring.trust(alice.key)
    with pytest.raises(Refused, match="bad signature"):
        keyring.check(DIGEST, [Signature(alice.key, bob.sign(DIGEST).signature).to_bytes()])


def test_a_key_that_is_no_point_of_the_curve_signs_nothing(keyring):
    with pytest.raises(Refused, match="damaged signature"):
        keyring.check(DIGEST, [Signature(key_text(b"\xff" * 32), bytes(64)).to_bytes()])


def test_what_else_lies_beside_a_good_signature_does_not_matter(keyring, alice, bob, tmp_path):
    carol = Keyring(str(tmp_path / "carol")).signer()
    keyring.trust(alice.key)
    keyring.trust(bob.key)
    others = [forged(bob), signed(bob, OTHER), signed(carol), forged(carol), b"", b"{}", b"\xff", b"null"]
    for at in range(len(others) + 1):
        assert keyring.check(DIGEST, [*others[:at], signed(alice), *others[at:]]).key_id == key_id(alice.key)


DAMAGED = [
    b"",
    b"{}",
    b"[]",
    b"null",
    b"\xff",
    json.dumps({"key": key_text(bytes(32))}).encode(),
    json.dumps({"key": key_text(bytes(32)), "signature": base64.b64encode(bytes(63)).decode()}).encode(),
    json.dumps({"key": key_text(bytes(32)), "signature": base64.b64encode(bytes(65)).decode()}).encode(),
    json.dumps({"key": key_text(bytes(32)), "signature": "?" * 88}).encode(),
    json.dumps({"key": "hsk1_\x1b[31m", "signature": base64.b64encode(bytes(64)).decode()}).encode(),
    json.dumps({"key": 1, "signature": base64.b64encode(bytes(64)).decode()}).encode(),
]


@pytest.mark.parametrize("data", DAMAGED)
def test_a_malformed_signature_is_damaged_and_alone_it_is_refused(keyring, data):
    with pytest.raises(Damaged, match="a signature in the store is damaged"):
        parse_signature(data)
    for policy in ("required", "optional"):
        keyring.set_policy(policy)
        with pytest.raises(Refused, match="damaged signature and no good one"):
            keyring.check(DIGEST, [data])


def test_whatever_bit_of_a_signature_object_is_changed_no_other_signature_passes(keyring, alice):
    keyring.trust(alice.key)
    good, passed = signed(alice), 0
    for at in range(len(good)):
        for bit in range(8):
            changed = bytearray(good)
            changed[at] ^= 1 << bit
            try:
                keyring.check(DIGEST, [bytes(changed)])
            except Refused:
                continue
            assert parse_signature(bytes(changed)) == alice.sign(DIGEST)  # base64 has four bits to spare at its end
            passed += 1
    assert passed <= 4


@given(st.lists(st.sampled_from(["alice", "bob", "forged", "other", "damaged"]), max_size=5), st.booleans())
def test_the_verdict_depends_on_what_is_there_and_not_on_the_order(tmp_path_factory, alice, bob, kinds, optional):
    keyring = Keyring(str(tmp_path_factory.mktemp("keys")))
    keyring.trust(alice.key)
    if optional:
        keyring.set_policy("optional")
    objects = {
        "alice": signed(alice),
        "bob": signed(bob),
        "forged": forged(alice),
        "other": signed(alice, OTHER),
        "damaged": b"{",
    }

    def outcome(order):
        try:
            verdict = keyring.check(DIGEST, [objects[kind] for kind in order])
        except Refused as e:
            return str(e)
        return verdict

    found = outcome(kinds)
    assert found == outcome(kinds[::-1])
    if "alice" in kinds:
        assert found == Verdict(key_id(alice.key))
    elif {"forged", "other"} & set(kinds):
        assert "bad signature" in found
    elif "bob" in kinds or not kinds:
        assert isinstance(found, Verdict) == optional
    else:
        assert "damaged" in found


# ---- policy


def test_where_signatures_are_optional_the_unsigned_and_unknown_pass_with_a_note(keyring, alice):
    keyring.set_policy("optional")
    assert keyring.check(DIGEST, []) == Verdict(None, f"snapshot {DIGEST[:12]} is not signed")
    verdict = keyring.check(DIGEST, [signed(alice)])
    assert verdict == Verdict(None, f"snapshot {DIGEST[:12]} is signed by the unknown key {alice.key}")
    keyring.set_policy("required")
    with pytest.raises(Refused):
        keyring.check(DIGEST, [])


def test_where_signatures_are_optional_bad_ones_are_refused_all_the_same(keyring, alice, bob):
    keyring.set_policy("optional")
    keyring.trust(alice.key)
    for signatures in ([forged(alice)], [forged(bob)], [forged(alice), signed(bob)]):
        with pytest.raises(Refused):
            keyring.check(DIGEST, signatures)


def test_an_odd_policy_is_neither_set_nor_obeyed(keyring):
    with pytest.raises(BadUsage):
        keyring.set_policy("sometimes")
    assert keyring.policy() == "required"
    keyring.set_policy("optional")
    for odd in ("Optional", "", "optional optional", "\xff"):
        with open(os.path.join(keyring._folder, "policy"), "w", encoding="latin-1") as f:
            f.write(odd)
        with pytest.raises(HotstartError, match="keys policy required"):
            keyring.check(DIGEST, [])


def test_loading_the_module_does_not_load_cryptography():
    code = "import sys, hotstart.store.signing, hotstart.store.encryption; print('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
