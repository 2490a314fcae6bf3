"""Encrypted chunks: only for the holder of the key, only where they were sealed, never other bytes; keys that can be changed."""

import base64
import hashlib
import hmac
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotstart.errors import BadUsage, Damaged, HotstartError, Refused
from hotstart.store import encryption
from hotstart.store.content import digest_of
from hotstart.store.directory import DirectoryStore
from hotstart.store.encryption import (
    SALT_BYTES,
    SEAL_BYTES,
    DataKey,
    DataKeys,
    PackCipher,
    key_source_from_environment,
    parse_store_key,
    read_key_file,
    rotate,
    store_key_id,
)
from hotstart.store.memory import MemoryStore

OLD, NEW, THIRD = (random.Random(n).randbytes(32) for n in range(3))
SALT = bytes(range(16))
SET_0, SET_1 = f"{0:032x}", f"{1:032x}"


@pytest.fixture(params=[MemoryStore, DirectoryStore])
def store(request, tmp_path):
    return request.param() if request.param is MemoryStore else DirectoryStore(str(tmp_path / "store"))


# ---- known answers

# McGrew and Viega, The Galois/Counter Mode of Operation, appendix B, test cases 14 and 16 (AES-256), as submitted to NIST.
# Case 16 has additional data of 20 bytes; our digests have 32, and seal() takes either.
CASE_14 = (
    bytes(32),
    0,
    "",
    bytes(16),
    "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919",
)
CASE_16 = (
    bytes.fromhex("feffe9928665731c6d6a8f9467308308" * 2),
    int("cafebabefacedbaddecaf888", 16),
    "feedfacedeadbeeffeedfacedeadbeefabaddad2",
    bytes.fromhex(
        "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
        "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39"
    ),
    "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
    "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f66276fc6ece0f4e1768cddf8853bb2d551b",
)


@pytest.mark.parametrize(("key", "ordinal", "digest", "data", "sealed"), [CASE_14, CASE_16], ids=["14", "16"])
def test_sealing_is_aes_256_gcm_of_the_standard(key, ordinal, digest, data, sealed):
    assert PackCipher(key).seal(ordinal, digest, data).hex() == sealed
    assert PackCipher(key).open(ordinal, digest, bytes.fromhex(sealed)) == data


def naive_hkdf(key, salt, info, length):
    """RFC 5869, section 2, with SHA-256."""
    extracted, expanded, block = hmac.digest(salt, key, "sha256"), b"", b""
    while len(expanded) < length:
        block = hmac.digest(extracted, block + info + bytes([len(expanded) // 32 + 1]), "sha256")
        expanded += block
    return expanded[:length]


def test_the_second_implementation_of_key_derivation_gives_the_answer_of_the_standard():
    # RFC 5869, appendix A.1.
    found = naive_hkdf(b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)), 42)
    assert found.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    assert hashlib.sha256().digest_size == 32


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=16, max_size=16), st.binary(max_size=50))
def test_a_packs_key_is_derived_as_the_standard_says(key, salt, data):
    digest = digest_of(data)
    expected = PackCipher(naive_hkdf(key, salt, b"hotstart pack", 32)).seal(7, digest, data)
    assert DataKey("00" * 16, key).pack_cipher(salt).seal(7, digest, data) == expected


def test_the_id_of_a_key_is_pinned():
    # BLAKE3 derive_key, context "hotstart 2026 key id": stores are full of these.
    assert store_key_id(bytes(32)) == "f810706bc88c0a3f"
    assert store_key_id(OLD) != store_key_id(NEW)


# ---- chunks


@given(st.binary(max_size=300), st.integers(0, (1 << 64) - 1), st.binary(min_size=16, max_size=16))
def test_a_chunk_comes_back_as_it_was(data, ordinal, salt):
    digest = digest_of(data)
    sealed = DataKey("00" * 16, OLD).pack_cipher(salt).seal(ordinal, digest, data)
    assert len(sealed) == len(data) + SEAL_BYTES
    assert DataKey("00" * 16, OLD).pack_cipher(salt).open(ordinal, digest, sealed) == data
    if len(data) >= 16:
        assert data not in sealed


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_can_be_sealed_and_opened(kind):
    cipher = DataKey("00" * 16, OLD).pack_cipher(SALT)
    sealed = cipher.seal(0, digest_of(b"chunk"), kind(b"chunk"))
    assert cipher.open(0, digest_of(b"chunk"), kind(sealed)) == b"chunk"


def test_a_chunk_opens_only_where_it_was_sealed():
    data, other = b"chunk", b"other"
    key = DataKey("00" * 16, OLD)
    sealed = key.pack_cipher(SALT).seal(3, digest_of(data), data)
    elsewhere = [
        (key.pack_cipher(SALT), 4, digest_of(data)),
        (key.pack_cipher(SALT), 3, digest_of(other)),
        (key.pack_cipher(bytes(16)), 3, digest_of(data)),
        (DataKey("00" * 16, NEW).pack_cipher(SALT), 3, digest_of(data)),
    ]
    for cipher, ordinal, digest in elsewhere:
        with pytest.raises(Damaged, match="cannot be decrypted"):
            cipher.open(ordinal, digest, sealed)


def test_no_changed_bit_of_a_sealed_chunk_is_overlooked():
    data = b"a small chunk of memory"
    cipher = DataKey("00" * 16, OLD).pack_cipher(SALT)
    sealed = cipher.seal(0, digest_of(data), data)
    for at in range(len(sealed)):
        for bit in range(8):
            changed = bytearray(sealed)
            changed[at] ^= 1 << bit
            with pytest.raises(Damaged):
                cipher.open(0, digest_of(data), changed)


def test_a_sealed_chunk_that_is_cut_off_or_goes_on_is_damaged():
    data = b"a small chunk of memory"
    cipher = DataKey("00" * 16, OLD).pack_cipher(SALT)
    sealed = cipher.seal(0, digest_of(data), data)
    for other in (*(sealed[:n] for n in range(len(sealed))), sealed + b"\0", b"\0" + sealed):
        with pytest.raises(Damaged):
            cipher.open(0, digest_of(data), other)


@pytest.mark.parametrize("salt", [b"", bytes(15), bytes(17)])
def test_a_salt_of_another_length_is_a_mistake_of_the_program(salt):
    with pytest.raises(ValueError, match=f"{SALT_BYTES} bytes"):
        DataKey("00" * 16, OLD).pack_cipher(salt)


@pytest.mark.parametrize("ordinal", [-1, 1 << 96])
def test_an_ordinal_that_does_not_fit_is_never_cut_short(ordinal):
    with pytest.raises(OverflowError):
        DataKey("00" * 16, OLD).pack_cipher(SALT).seal(ordinal, digest_of(b""), b"")


# ---- data keys


def sealed_by(key):
    return key.pack_cipher(SALT).seal(0, digest_of(b"chunk"), b"chunk")


def opened_by(key, sealed):
    return key.pack_cipher(SALT).open(0, digest_of(b"chunk"), sealed)


def objects(store):
    return {key: store.read(key) for key, _ in store.list("")}


def test_the_first_writer_makes_a_data_key_and_all_others_use_it(store):
    first = DataKeys(store, OLD)
    key = first.current()
    assert first.current() is key
    assert list(store.list("")) == [(f"keys/{key.set_id}/{store_key_id(OLD)}", 60)]
    other = DataKeys(store, OLD)
    assert other.current().set_id == key.set_id
    assert opened_by(other.get(key.set_id), sealed_by(key)) == b"chunk"


def test_no_two_stores_have_the_same_data_key():
    keys = [DataKeys(MemoryStore(), OLD).current() for _ in range(20)]
    assert len({k.set_id for k in keys}) == len({sealed_by(k) for k in keys}) == 20


def test_neither_key_can_be_seen_in_the_store(store):
    key = DataKeys(store, OLD).current()
    (data,) = objects(store).values()
    assert OLD not in data and key._key not in data
    assert OLD.hex() not in "".join(objects(store))


def test_a_writer_with_another_key_makes_a_data_key_of_its_own(store):
    ours, theirs = DataKeys(store, OLD).current(), DataKeys(store, NEW).current()
    assert ours.set_id != theirs.set_id
    assert len(list(store.list("keys/"))) == 2


def test_with_another_key_it_is_refused_and_the_right_one_named(store):
    set_id = DataKeys(store, OLD).current().set_id
    with pytest.raises(
        Refused, match=f"key with id {store_key_id(OLD)}, not {store_key_id(NEW)}: set HOTSTART_STORE_KEY"
    ) as e:
        DataKeys(store, NEW).get(set_id)
    assert not isinstance(e.value, Damaged)
    with pytest.raises(Refused, match=f"key with id {store_key_id(OLD)}: set HOTSTART_STORE_KEY,"):
        DataKeys(store, None).get(set_id)


def test_without_a_key_nothing_can_be_encrypted(store):
    with pytest.raises(BadUsage, match="set HOTSTART_STORE_KEY"):
        DataKeys(store, None).current()
    assert objects(store) == {}


def test_a_data_key_that_is_gone_is_damage(store):
    DataKeys(store, OLD).current()
    for keys in (DataKeys(store, OLD), DataKeys(store, None)):
        with pytest.raises(Damaged, match="lost the data key"):
            keys.get("ab" * 16)


def test_a_data_key_is_read_once(store):
    keys = DataKeys(store, OLD)
    key = keys.current()
    for name in objects(store):
        store.delete(name)
    assert keys.get(key.set_id) is key


def test_no_changed_bit_of_a_wrapped_key_is_overlooked():
    store = MemoryStore()
    set_id = DataKeys(store, OLD).current().set_id
    ((name, good),) = objects(store).items()
    bad = [good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :] for at in range(len(good)) for bit in range(8)]
    for data in (*bad, *(good[:n] for n in range(len(good))), good + b"\0"):
        store.delete(name)
        store.write(name, data)
        with pytest.raises(Damaged, match=f"{name} of the store is damaged"):
            DataKeys(store, OLD).get(set_id)


def test_a_wrapped_key_under_another_name_is_damaged():
    store = MemoryStore()
    DataKeys(store, OLD).current()
    ((_, data),) = objects(store).items()
    store.write(f"keys/{'ab' * 16}/{store_key_id(OLD)}", data)
    with pytest.raises(Damaged):
        DataKeys(store, OLD).get("ab" * 16)


def test_other_objects_below_keys_are_passed_over(store):
    for name in ("keys/README", "keys/ab/cd", f"keys/{'ab' * 16}/{'c' * 15}", f"keys/{'ab' * 16}/{'c' * 17}"):
        store.write(name, b"?")
    assert DataKeys(store, OLD).current().set_id != "ab" * 16


# ---- changing the key


def encrypted_store(*keys):
    """A store with a data key of each, and what they sealed."""
    store = MemoryStore()
    sealed = {}
    for number, key in enumerate(keys):
        set_id = f"{number:032x}"
        data_key = random.Random(number).randbytes(32)
        store.write(f"keys/{set_id}/{store_key_id(key)}", encryption._wrap(data_key, key, set_id))
        sealed[set_id] = sealed_by(DataKey(set_id, data_key))
    return store, sealed


def opens_all(store, key, sealed):
    keys = DataKeys(store, key)
    try:
        return all(opened_by(keys.get(set_id), data) == b"chunk" for set_id, data in sealed.items())
    except Refused:
        return False


def test_after_a_change_the_new_key_opens_all_and_the_old_one_nothing():
    store, sealed = encrypted_store(OLD, OLD, OLD)
    assert rotate(store, OLD, NEW) == 3
    assert opens_all(store, NEW, sealed)
    for set_id in sealed:
        with pytest.raises(Refused, match=f"id {store_key_id(NEW)}, not {store_key_id(OLD)}"):
            DataKeys(store, OLD).get(set_id)
    assert len(objects(store)) == 3
    assert rotate(store, OLD, NEW) == 0
    assert DataKeys(store, NEW).current().set_id in sealed


def test_what_other_keys_open_stays_as_it_was():
    store, sealed = encrypted_store(OLD, THIRD)
    assert rotate(store, OLD, NEW) == 1
    assert opens_all(store, THIRD, {SET_1: sealed[SET_1]})
    assert opens_all(store, NEW, {SET_0: sealed[SET_0]})


def test_a_key_is_never_changed_for_itself():
    store, sealed = encrypted_store(OLD)
    with pytest.raises(BadUsage, match="the new key is the old one"):
        rotate(store, OLD, bytes(OLD))
    assert opens_all(store, OLD, sealed)


class Killed(BaseException):
    pass


class Dying(MemoryStore):
    """A store whose user is killed before its n-th change, or right after it."""

    def __init__(self, objects, changes, after):
        super().__init__()
        self._objects, self._left, self._after = dict(objects), changes, after

    def _change(self, change):
        if not self._left and not self._after:
            raise Killed
        change()
        if not self._left:
            raise Killed
        self._left -= 1

    def write(self, key, *parts):
        done = []
        self._change(lambda: done.append(MemoryStore.write(self, key, *parts)))
        return done[0]

    def delete(self, key):
        self._change(lambda: MemoryStore.delete(self, key))


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_point_one_key_opens_all_and_doing_it_again_finishes(after):
    whole, sealed = encrypted_store(OLD, OLD, OLD)
    finished = 0
    for changes in range(10):
        store = Dying(objects(whole), changes, after)
        try:
            rotate(store, OLD, NEW)
            finished += 1
        except Killed:
            pass
        survivor = MemoryStore()
        survivor._objects = store._objects
        assert opens_all(survivor, OLD, sealed) or opens_all(survivor, NEW, sealed)
        rotate(survivor, OLD, NEW)
        assert opens_all(survivor, NEW, sealed)
        assert len(objects(survivor)) == 3
    assert finished == 4  # of 6 changes, and a tenth of none


def test_while_a_wrapping_is_damaged_nothing_is_deleted():
    store, sealed = encrypted_store(OLD, OLD)
    name = f"keys/{1:032x}/{store_key_id(OLD)}"
    data = store.read(name)
    store.delete(name)
    store.write(name, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(Damaged, match=f"{name} of the store is damaged"):
        rotate(store, OLD, NEW)
    good = {SET_0: sealed[SET_0]}
    assert opens_all(store, OLD, good) and opens_all(store, NEW, good)


@pytest.mark.parametrize("there", [b"", bytes(60), "another"])
def test_the_old_wrapping_stays_if_the_new_one_would_not_open_it(there):
    store, sealed = encrypted_store(OLD)
    set_id = f"{0:032x}"
    there = encryption._wrap(bytes(32), NEW, set_id) if there == "another" else there
    store.write(f"keys/{set_id}/{store_key_id(NEW)}", there)
    with pytest.raises(Damaged):
        rotate(store, OLD, NEW)
    assert opens_all(store, OLD, sealed)


# ---- where the operator's key comes from


def key_of(**environment):
    source = key_source_from_environment(environment)
    return source and source.read()


@pytest.mark.parametrize(
    "text",
    [
        OLD.hex(),
        OLD.hex().upper(),
        f"  {OLD.hex()}\n",
        base64.b64encode(OLD).decode(),
        base64.urlsafe_b64encode(OLD).decode(),
        base64.urlsafe_b64encode(OLD).decode().rstrip("=") + "\n",
    ],
)
def test_a_key_is_read_in_every_usual_form_from_every_source(text, tmp_path):
    (tmp_path / "key").write_text(text)
    assert key_of(HOTSTART_STORE_KEY=text) == OLD
    assert key_of(HOTSTART_STORE_KEY_FILE=str(tmp_path / "key")) == OLD
    assert key_of(HOTSTART_STORE_KEY_COMMAND=f"cat '{tmp_path}/key'") == OLD
    assert read_key_file(str(tmp_path / "key")) == OLD


@given(st.binary(min_size=32, max_size=32))
def test_every_key_survives_being_written_and_read(key):
    for text in (key.hex(), base64.b64encode(key).decode(), base64.urlsafe_b64encode(key).decode().rstrip("=")):
        assert parse_store_key(text, "it") == key


def test_without_a_variable_there_is_no_source():
    assert key_source_from_environment({}) is None
    assert key_source_from_environment({"HOTSTART_STORE_KEY": "", "HOTSTART_HOME": "/x"}) is None


def test_two_sources_are_one_too_many():
    with pytest.raises(BadUsage, match="HOTSTART_STORE_KEY and HOTSTART_STORE_KEY_FILE are both set"):
        key_of(HOTSTART_STORE_KEY=OLD.hex(), HOTSTART_STORE_KEY_FILE="/x")


MALFORMED = [
    "hunter2",
    "0" * 63,
    "0" * 65,
    "g" * 64,
    base64.b64encode(bytes(31)).decode(),
    "A" * 42,
    "A" * 44,
    "é" * 32,
]


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_key_is_refused_without_repeating_it(text, tmp_path):
    (tmp_path / "key").write_text(text)
    for environment in (
        {"HOTSTART_STORE_KEY": text},
        {"HOTSTART_STORE_KEY_FILE": str(tmp_path / "key")},
        {"HOTSTART_STORE_KEY_COMMAND": f"cat {tmp_path}/key"},
    ):
        with pytest.raises(BadUsage, match="is no key: it takes 32 bytes") as caught:
            key_of(**environment)
        assert text not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_empty_answer_is_no_key(tmp_path):
    (tmp_path / "key").write_text("")
    with pytest.raises(BadUsage, match="is no key"):
        key_of(HOTSTART_STORE_KEY_FILE=str(tmp_path / "key"))
    with pytest.raises(BadUsage, match="is no key"):
        key_of(HOTSTART_STORE_KEY_COMMAND="true")


def test_a_key_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BadUsage, match=f"{tmp_path}/key cannot be read: No such file"):
        key_of(HOTSTART_STORE_KEY_FILE=str(tmp_path / "key"))


def test_the_command_is_run_only_when_the_key_is_asked_for(tmp_path):
    source = key_source_from_environment(
        {"HOTSTART_STORE_KEY_COMMAND": f"sh -c 'touch {tmp_path}/ran; echo {OLD.hex()}'"}
    )
    assert not (tmp_path / "ran").exists()
    assert source.read() == OLD
    assert (tmp_path / "ran").exists()


def test_the_command_is_run_without_a_shell(tmp_path):
    with pytest.raises(BadUsage):
        key_of(HOTSTART_STORE_KEY_COMMAND=f"echo {OLD.hex()[:-1]}; touch {tmp_path}/ran")
    assert not (tmp_path / "ran").exists()


def test_what_a_failing_command_says_is_kept_to_itself(capfd):
    with pytest.raises(HotstartError, match="failed with status 3: run it by hand") as caught:
        key_of(HOTSTART_STORE_KEY_COMMAND="sh -c 'echo the-secret >&2; echo the-secret; exit 3'")
    assert "the-secret" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("command", ["/nonexistent/kms --token hunter2", "echo 'hunter2", "''", "/ hunter2", " "])
def test_a_command_that_cannot_be_run_is_bad_usage_and_not_repeated(command):
    with pytest.raises(BadUsage) as caught:
        key_of(HOTSTART_STORE_KEY_COMMAND=command)
    assert "hunter2" not in str(caught.value)


def test_a_command_that_takes_too_long_is_ended_with_all_that_it_started(monkeypatch, tmp_path):
    monkeypatch.setattr(encryption, "_COMMAND_TIMEOUT_S", 0.5)
    with pytest.raises(HotstartError, match="gave no key within"):
        key_of(HOTSTART_STORE_KEY_COMMAND=f"sh -c 'sleep 60 & echo $! > {tmp_path}/pid; wait'")
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while _runs(pid):
        assert time.monotonic() < deadline, "what the command had started runs on"
        time.sleep(0.01)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_keys_do_not_show_when_things_are_printed():
    source = key_source_from_environment({"HOTSTART_STORE_KEY": OLD.hex()})
    key = DataKeys(MemoryStore(), OLD).current()
    for thing in (source, key, key.pack_cipher(SALT), DataKeys(MemoryStore(), OLD)):
        shown = repr(thing) + str(thing)
        assert OLD.hex() not in shown and repr(OLD) not in shown and repr(key._key) not in shown
