"""Object storage against a real S3 server (OpenStack Swift), and against one that answers wrongly: no wrong byte gets through."""

import random
import threading
import time
import traceback
import uuid

import pytest

from hotstart.adapters.objects import ObjectStore, open_store
from hotstart.errors import BadUsage, HotstartError
from hotstart.store.directory import DirectoryStore
from hotstart.store.port import Busy, Missing
from hotstart.store.retrying import Retrying
from tests.conftest import skip_or_fail
from tests.store import swift
from tests.store.conformance import StoreConformance
from tests.store.faults import decides, faulty_server, hang_up, holds, resets, says, stalls, truncates
from tests.store.scripted import Clock

VARIABLES = ("AWS_", "GOOGLE_", "AZURE_")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    if not (swift.SWIFT / "swift-proxy-server").exists():
        skip_or_fail("there is no S3 server: scripts/install-swift installs OpenStack Swift")
    with swift.Swift(tmp_path_factory.mktemp("swift")) as running:
        yield running


def use(monkeypatch, environment):
    """Have just these variables tell about object storage."""
    import os

    for name in list(os.environ):
        if name.startswith(VARIABLES):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def url(server, monkeypatch):
    """A prefix of its own."""
    use(monkeypatch, server.environment)
    return f"s3://{swift.BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def one_line(monkeypatch):
    """Check an error as people see it."""

    def check(error):
        assert isinstance(error.value, HotstartError)
        assert "\n" not in str(error.value)
        shown = "".join(traceback.format_exception(error.value))
        assert swift.SECRET not in shown and "a-wrong-secret" not in shown
        return str(error.value)

    return check


# ---- a real server


class ConformanceOnSwift(StoreConformance):
    def test_of_concurrent_writers_one_wins_and_the_others_are_told(self, store):
        """Swift cannot promise that: it looks for the object before it receives the bytes, so several may be let through.

        Seen with 2.38. What has to hold even so: at least one is told that it won, and the bytes are those of one who was. That
        exactly one wins where the server decides is tested below.
        """
        for i in range(10):
            told = write_at_once(store, f"names/{i}", [bytes([n]) * 50_000 for n in range(3)])
            assert sorted(told) == [0, 1, 2]
            assert store.read(f"names/{i}")[0] in [n for n, created in told.items() if created]


def write_at_once(store, key, values):
    told, barrier = {}, threading.Barrier(len(values))

    def write(n):
        barrier.wait()
        told[n] = store.write(key, values[n])

    threads = [threading.Thread(target=write, args=(n,)) for n in range(len(values))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


class TestObjectStore(ConformanceOnSwift):
    @pytest.fixture
    def store(self, url):
        return open_store(url)


class TestObjectStoreInAWholeBucket(ConformanceOnSwift):
    @pytest.fixture
    def store(self, server, monkeypatch):
        use(monkeypatch, server.environment)
        bucket = f"bucket-{uuid.uuid4().hex}"
        assert swift.make_bucket(server.port, bucket)
        return open_store(f"s3://{bucket}")


def test_stores_at_different_prefixes_of_a_bucket_do_not_see_each_other(url):
    one, other = open_store(f"{url}/one"), open_store(f"{url}/one-more")
    one.write("a", b"1")
    other.write("a", b"22")
    assert (one.read("a"), other.read("a")) == (b"1", b"22")
    assert list(one.list("")) == [("a", 1)]
    assert list(open_store(f"{url}/").list("")) == [("one-more/a", 2), ("one/a", 1)]


def test_an_object_of_70_mib_is_written_and_read_whole(url):
    store = open_store(url)
    data = random.Random(1).randbytes(70 << 20)
    half = len(data) // 2
    assert store.write("packs/a", memoryview(data)[:half], memoryview(data)[half:]) is True
    assert store.write("packs/a", b"other") is False
    assert store.read("packs/a") == data
    assert store.read("packs/a", half - 5, 10) == data[half - 5 : half + 5]
    assert list(store.list("packs/")) == [("packs/a", len(data))]


def test_more_objects_than_one_page_of_a_list_are_listed(url):
    store = open_store(url)
    keys = [f"packs/{i:04}" for i in range(2 * swift.PAGE + 5)]
    for key in keys:
        store.write(key, b"")
    assert [key for key, _ in store.list("packs/")] == keys


def test_a_wrong_secret_is_refused_in_one_line(url, monkeypatch, one_line):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret")
    store = open_store(url)
    for call in (
        lambda: store.read("a"),
        lambda: store.write("a", b"x"),
        lambda: list(store.list("")),
        lambda: store.delete("a"),
    ):
        with pytest.raises(HotstartError) as error:
            call()
        assert one_line(error) == (
            f"{url} refuses access (SignatureDoesNotMatch): check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "and what they permit"
        )
        assert not isinstance(error.value, Busy | Missing)


def test_a_bucket_that_is_not_there_is_said_to_be(server, url, one_line):
    store = open_store("s3://nothing-here/x")
    for call in (
        lambda: store.read("a"),
        lambda: store.read("a", 5),
        lambda: store.write("a", b"x"),
        lambda: list(store.list("")),
        lambda: store.delete("a"),
    ):
        with pytest.raises(HotstartError) as error:
            call()
        assert one_line(error) == "there is no bucket for s3://nothing-here/x: create it, or correct the name"
        assert not isinstance(error.value, Busy | Missing)


def test_a_server_that_is_gone_is_said_to_be_at_once(monkeypatch, one_line):
    (port,) = swift.free_ports(1)
    use(monkeypatch, swift.environment_for(port))
    store = open_store("s3://bucket/x")
    began = time.monotonic()
    for call in (lambda: store.read("a"), lambda: store.write("a", b"x"), lambda: list(store.list(""))):
        with pytest.raises(HotstartError) as error:
            call()
        assert one_line(error).startswith("s3://bucket/x cannot be reached: check AWS_ENDPOINT_URL")
    assert time.monotonic() - began < 300


# ---- a server that answers wrongly


@pytest.fixture
def faulty(monkeypatch):
    """Make (store, asked) for a server that follows a script."""
    import contextlib

    with contextlib.ExitStack() as stack:

        def make(*script, **options):
            port, asked = stack.enter_context(faulty_server(*script))
            use(monkeypatch, swift.environment_for(port))
            return ObjectStore("s3://bucket/x", **options), asked

        yield make


DATA = random.Random(7).randbytes(300_000)
RIGHT = holds(DATA)
SLOW_DOWN = says(503, b"<Error><Code>SlowDown</Code></Error>", Retry_After="3")


def patient(store):
    clock = Clock()
    return Retrying(store, clock=clock, sleep=clock.sleep, chance=lambda: 1.0), clock


@pytest.mark.parametrize(
    "fault",
    [
        SLOW_DOWN,
        says(429, b"<Error><Code>TooManyRequests</Code></Error>"),
        says(500),
        says(502, b"<html>bad gateway</html>"),
        says(408),
        hang_up,
        truncates(RIGHT, 0),
        truncates(RIGHT, 100_000),
        resets(RIGHT, 0),
        resets(RIGHT, 100_000),
    ],
)
@pytest.mark.parametrize("wanted", [(0, None), (1000, None), (1000, 200_000)])
def test_what_passes_is_busy_and_then_right(faulty, one_line, fault, wanted):
    store, asked = faulty(fault, fault, RIGHT)
    with pytest.raises(Busy) as error:
        store.read("a", *wanted)
    assert one_line(error).startswith(("s3://bucket/x is busy", "the connection to s3://bucket/x broke off"))
    assert len(asked) == 1  # one place retries, and this is not it
    asked_again, clock = patient(store)
    offset, length = wanted
    assert asked_again.read("a", *wanted) == DATA[offset : None if length is None else offset + length]
    assert len(asked) == 3 and len(clock.slept) == 1


@pytest.mark.parametrize(
    "fault",
    [
        says(200, DATA),  # the whole object, where a range was asked for
        says(206, DATA[:100]),  # no Content-Range
        says(206, DATA[:100], Content_Range="bytes 0-99/300000"),  # another range
        says(206, DATA[1000:1050], Content_Range="bytes 1000-1049/300000"),  # half of it
        says(206, DATA[1000:1050], Content_Range="bytes 1000-1099/300000"),  # half of it, though it says all
        says(206, DATA[1000:1150], Content_Range="bytes 1000-1099/300000"),  # more than it says
        says(206, DATA[1000:1100], Content_Range="bytes all of them"),
        says(206, DATA[1000:1100], Content_Range="bytes 1000-1099/*"),
        says(204),
        says(304),
        says(418),
    ],
)
def test_a_wrong_range_is_an_error_and_never_bytes(faulty, one_line, fault):
    store, _ = faulty(fault)
    with pytest.raises(HotstartError) as error:
        store.read("a", 1000, 100)
    assert one_line(error)
    assert not isinstance(error.value, Missing)


def test_a_range_that_is_denied_though_it_is_there_is_an_error(faulty, one_line):
    denied = says(416, b"<Error><Code>InvalidRange</Code></Error>")
    store, asked = faulty(denied, RIGHT)
    with pytest.raises(HotstartError) as error:
        store.read("a", 1000, 100)
    assert "HTTP 416 (InvalidRange)" in one_line(error)
    assert asked == ["GET", "HEAD"]
    store, asked = faulty(denied, says(200, DATA))
    assert store.read("a", len(DATA), 100) == b""
    assert asked == ["GET", "HEAD"]


def test_a_silent_server_is_not_waited_for_for_ever(faulty, one_line):
    store, _ = faulty(stalls(60), stall_s=0.3)
    began = time.monotonic()
    with pytest.raises(Busy) as error:
        store.read("a")
    assert "too slow" in one_line(error)
    assert time.monotonic() - began < 30


def test_a_hint_in_the_body_is_passed_on(faulty):
    store, _ = faulty(says(429, b"Too many requests. Please retry after 17 seconds.", Retry_After="17"))
    with pytest.raises(Busy) as error:
        store.read("a")
    assert error.value.retry_after_s == 17


def test_a_hint_in_a_header_cannot_be_seen(faulty):
    """What obstore does not give away; once it does, `Busy.retry_after_s` has to be set from it."""
    store, _ = faulty(SLOW_DOWN)
    with pytest.raises(Busy) as error:
        store.read("a")
    assert error.value.retry_after_s is None


@pytest.mark.parametrize("fault", [SLOW_DOWN, hang_up, says(409, b"<Code>ConditionalRequestConflict</Code>")])
def test_a_write_that_fails_on_the_way_is_busy_and_asked_once(faulty, fault):
    store, asked = faulty(fault)
    with pytest.raises(Busy):
        store.write("a", b"x")
    assert asked == ["PUT"]


def test_a_write_that_was_done_before_the_connection_broke_is_true(faulty):
    store, asked = faulty(hang_up, says(412), RIGHT)
    assert patient(store)[0].write("a", DATA) is True
    assert asked == ["PUT", "PUT", "GET"]


def test_a_write_that_another_did_before_the_connection_broke_is_false(faulty):
    store, asked = faulty(hang_up, says(412), RIGHT)
    assert patient(store)[0].write("a", b"other bytes") is False
    assert asked == ["PUT", "PUT", "GET"]


@pytest.mark.parametrize("status", [301, 400])
def test_a_wrong_region_is_a_matter_of_settings(faulty, one_line, status):
    store, _ = faulty(says(status, b"<Error><Code>AuthorizationHeaderMalformed</Code></Error>"))
    with pytest.raises(HotstartError) as error:
        store.read("a")
    assert "AWS_REGION" in one_line(error)


def test_no_credentials_are_said_to_be_none(faulty, monkeypatch, one_line):
    _, asked = faulty(says(404))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(HotstartError) as error:
        open_store("s3://bucket/x").read("a")
    assert one_line(error) == "no credentials for s3://bucket/x: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    assert asked == []


def test_http_without_leave_is_a_matter_of_settings(faulty, monkeypatch, one_line):
    faulty(RIGHT)
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(HotstartError) as error:
        open_store("s3://bucket/x").read("a")
    assert "AWS_ALLOW_HTTP=true" in one_line(error)


def test_of_concurrent_writers_one_wins_where_the_server_decides(faulty):
    """The server here is a stand-in that does what Amazon documents: 412 for what is there, 409 for what is being written."""
    store, asked = faulty(decides())
    for i in range(25):
        values = [bytes([n]) * 50_000 for n in range(4)]
        told = write_at_once(Retrying(store), f"names/{i}", values)
        winners = [n for n, created in told.items() if created]
        assert len(told) == 4 and len(winners) == 1
        assert store.read(f"names/{i}") == values[winners[0]]
    assert asked.count("PUT") > 4 * 25  # some were told 409 and asked again


# ---- URLs


def test_a_path_or_a_file_url_is_a_folder(tmp_path):
    for url in (str(tmp_path / "store"), f"file://{tmp_path}/store", f"{tmp_path}/store/"):
        store = open_store(url)
        assert isinstance(store, DirectoryStore)
        store.write(f"a{len(url)}", b"x")
    assert len(list(open_store(f"{tmp_path}/store").list(""))) == 3


@pytest.mark.parametrize(
    "url",
    [
        "",
        "store",
        "./store",
        "file://store",
        "file://host/x",
        "http://host/x",
        "ftp://host/x",
        "s3:/bucket",
        "s3://",
        "s3:///x",
        "s3://bucket/../x",
        "s3://bucket//x",
        "s3://bucket/a b",
        "s3://bucket?x=1",
        "s3://key:a-wrong-secret@bucket/x",
        "S3://bucket",
    ],
)
def test_what_names_no_store_is_bad_usage_and_is_not_repeated_with_its_secrets(url, one_line):
    with pytest.raises(BadUsage) as error:
        open_store(url)
    assert "s3://BUCKET/PREFIX" in one_line(error)


@pytest.mark.parametrize("url", ["gs://bucket/x", "az://container/x"])
def test_the_other_clouds_are_opened_without_asking_them(monkeypatch, url):
    use(monkeypatch, {"AZURE_STORAGE_ACCOUNT_NAME": "account", "AZURE_STORAGE_ACCOUNT_KEY": "a2V5"})
    assert isinstance(open_store(url), Retrying)


def test_azure_without_an_account_is_a_matter_of_settings(monkeypatch, one_line):
    use(monkeypatch, {})
    with pytest.raises(BadUsage) as error:
        open_store("az://container/x")
    assert "AZURE_STORAGE_ACCOUNT_NAME" in one_line(error)
