"""Finding a snapshot in a store: the right one, signed by somebody who is trusted, or a refusal that says why."""

import pytest
from msgspec import structs

from hotstart.errors import Damaged, NotFound, Refused
from hotstart.store.content import digest_of
from hotstart.store.memory import MemoryStore
from hotstart.store.mending import mend
from hotstart.store.publishing import LocalSource, StoredSource, publish
from hotstart.store.signing import Keyring
from tests.store.samples import make_local, objects_of, push, repository


@pytest.fixture
def keyring(tmp_path):
    return Keyring(str(tmp_path / "keys"))


@pytest.fixture
def local(tmp_path):
    return make_local(tmp_path / "home")


@pytest.fixture
def store(local, keyring):
    store = MemoryStore()
    push(local, repository(store, keyring=keyring))
    return store


def test_what_we_signed_is_found(store, keyring, local):
    found = repository(store, keyring=keyring).find("llm-1")
    assert (found.digest, found.document, found.manifest) == (local.digest(), local.document, local.manifest)


def test_what_somebody_else_signed_is_refused_until_its_key_is_trusted(tmp_path, store, keyring):
    ours = Keyring(str(tmp_path / "ours"))
    with pytest.raises(Refused, match="signed by the unknown key hsk1_") as refused:
        repository(store, keyring=ours).find("llm-1")
    assert refused.value.exit_code == 4 and not isinstance(refused.value, Damaged)
    ours.trust(keyring.signer().key)
    assert repository(store, keyring=ours).find("llm-1")


def test_what_nobody_signed_is_refused_unless_the_policy_lets_it(tmp_path, local, keyring):
    store = MemoryStore()
    push(local, repository(store))
    with pytest.raises(Refused, match="is not signed"):
        repository(store, keyring=keyring).find("llm-1")
    keyring.set_policy("optional")
    assert repository(store, keyring=keyring).find("llm-1")


def test_a_signature_that_was_removed_or_damaged_comes_back_with_the_next_push_or_repair(local, store, keyring):
    repo = repository(store, keyring=keyring)
    ((key, _),) = store.list("signatures/")
    good = store.read(key)
    for bad in (None, b"", b"{}", good[:-9], good.replace(b"signature", b"signaturf")):
        for again in ("push", "mend"):
            store.delete(key)
            if bad is not None:
                store.write(key, bad)
            with pytest.raises(Refused):
                repo.find("llm-1")
            if again == "push":
                push(local, repo)
            else:
                with LocalSource(local) as source:
                    mend(source, repo)
            assert store.read(key) == good
            assert repo.find("llm-1")


def test_a_signature_of_another_snapshot_is_of_no_use(tmp_path, store, keyring):
    other = make_local(tmp_path / "other", "llm-2", "aaaa")
    push(other, repository(store, keyring=keyring))
    (one, _), (two, _) = store.list("signatures/")
    first, second = store.read(one), store.read(two)
    store.delete(one)
    store.write(one, second)
    name = "llm-1" if repository(store).digest_named("llm-1") in one else "llm-2"
    with pytest.raises(Refused, match="bad signature by a trusted key"):
        repository(store, keyring=keyring).find(name)
    assert first != second


def test_a_manifest_with_another_meaning_is_not_what_was_signed(store, keyring, local):
    document = structs.replace(local.manifest, root_pid=1).to_bytes()
    digest = digest_of(document)
    store.write(f"manifests/{digest}", document)
    store.delete("names/llm-1")
    store.write("names/llm-1", digest.encode())
    with pytest.raises(Refused, match="is not signed"):
        repository(store, keyring=keyring).find("llm-1")


def test_a_manifest_is_not_parsed_before_it_is_known_who_signed_it(store, keyring, monkeypatch, tmp_path):
    monkeypatch.setattr("hotstart.store.repository.parse_manifest", lambda _: pytest.fail("parsed"))
    with pytest.raises(Refused):
        repository(store, keyring=Keyring(str(tmp_path / "ours"))).find("llm-1")


def test_a_swapped_manifest_a_torn_name_and_a_lost_one_are_told_apart(store, keyring, local):
    repo, objects = repository(store, keyring=keyring), objects_of(store)
    name, key = "names/llm-1", f"manifests/{local.digest()}"
    for victim, data, error, reason in (
        (name, objects[name][:30], Damaged, "leads to something that is no digest"),
        (name, None, NotFound, "no snapshot llm-1"),
        (name, b"0" * 64, Damaged, "manifest of snapshot llm-1 is missing"),
        (key, None, Damaged, "manifest of snapshot llm-1 is missing"),
        (key, objects[key].replace(b"llm-1", b"llm-2"), Damaged, "manifest of snapshot llm-1 is damaged"),
    ):
        store.delete(victim)
        if data is not None:
            store.write(victim, data)
        with pytest.raises(error, match=reason):
            repo.find("llm-1")
        store.delete(victim)
        store.write(victim, objects[victim])
    assert repo.find("llm-1")


def test_what_was_taken_from_another_store_is_vouched_for_by_whoever_put_it_into_theirs(tmp_path, store, keyring):
    ours = Keyring(str(tmp_path / "ours"))
    ours.trust(keyring.signer().key)
    mine = repository(MemoryStore(), keyring=ours)
    publish(StoredSource(repository(store, keyring=ours), "llm-1"), mine)
    assert mine.find("llm-1")
    assert ours.signer().key != keyring.signer().key
