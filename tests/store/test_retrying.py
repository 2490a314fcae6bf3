"""A busy store is asked again, politely and not for ever; a write whose answer was lost is neither lost nor done twice."""

import pytest

from hotstart.errors import HotstartError
from hotstart.store.memory import MemoryStore
from hotstart.store.port import Busy, Missing
from hotstart.store.retrying import Retrying
from tests.store.conformance import StoreConformance
from tests.store.scripted import Clock, ScriptedStore


class TestRetryingStore(StoreConformance):
    @pytest.fixture
    def store(self):
        return Retrying(MemoryStore())


@pytest.fixture
def clock():
    return Clock()


def retrying(store, clock, chance=1.0, **options):
    return Retrying(store, clock=clock, sleep=clock.sleep, chance=lambda: chance, **options)


def busy(count, retry_after_s=None):
    return [Busy("not now", retry_after_s) for _ in range(count)]


@pytest.mark.parametrize("method", ["read", "list", "delete"])
def test_what_is_busy_is_asked_again_until_it_answers(clock, method):
    scripted = ScriptedStore(**{method: busy(3)})
    scripted.inner.write("a", b"data")
    store = retrying(scripted, clock)
    argument = "" if method == "list" else "a"
    answer = getattr(store, method)(argument)
    if method == "list":
        answer = list(answer)
    assert answer == {"read": b"data", "list": [("a", 4)], "delete": None}[method]
    assert scripted.calls[method] == 4


def test_pauses_double_up_to_ten_seconds(clock):
    scripted = ScriptedStore(read=busy(10))
    scripted.inner.write("a", b"x")
    assert retrying(scripted, clock, patience_s=1000).read("a") == b"x"
    assert clock.slept == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10, 10])


def test_pauses_are_drawn_between_none_and_all(clock):
    scripted = ScriptedStore(read=busy(3))
    scripted.inner.write("a", b"x")
    draws = iter([0.0, 0.5, 0.25])
    Retrying(scripted, clock=clock, sleep=clock.sleep, chance=lambda: next(draws)).read("a")
    assert clock.slept == pytest.approx([0, 0.1, 0.1])


def test_the_time_that_the_store_names_is_waited_for(clock):
    scripted = ScriptedStore(read=busy(1, retry_after_s=7))
    scripted.inner.write("a", b"x")
    retrying(scripted, clock).read("a")
    assert clock.slept == pytest.approx([7.1])


def test_patience_ends_without_a_last_sleep(clock):
    scripted = ScriptedStore(read=busy(1000))
    with pytest.raises(Busy, match="not now"):
        retrying(scripted, clock, patience_s=5).read("a")
    assert sum(clock.slept) <= 5
    assert sum(clock.slept) == pytest.approx(0.1 + 0.2 + 0.4 + 0.8 + 1.6)
    assert scripted.calls["read"] == 6


def test_a_named_time_beyond_patience_is_not_begun(clock):
    with pytest.raises(Busy):
        retrying(ScriptedStore(read=busy(5, retry_after_s=120)), clock, patience_s=60).read("a")
    assert clock.slept == []


@pytest.mark.parametrize("error", [Missing("a"), HotstartError("no access"), ValueError("not a store key")])
def test_only_busy_is_asked_again(clock, error):
    scripted = ScriptedStore(read=[error])
    with pytest.raises(type(error)):
        retrying(scripted, clock).read("a")
    assert scripted.calls["read"] == 1 and clock.slept == []


def test_a_write_that_was_done_though_its_answer_was_lost_is_true(clock):
    scripted = ScriptedStore()
    scripted.after["write"] = busy(1)
    assert retrying(scripted, clock).write("names/a", b"ours", b"!") is True
    assert scripted.calls == {"write": 2, "read": 1}
    assert scripted.inner.read("names/a") == b"ours!"


def test_a_write_that_found_another_after_a_lost_answer_is_false(clock):
    scripted = ScriptedStore(write=busy(1))
    scripted.inner.write("names/a", b"theirs")
    assert retrying(scripted, clock).write("names/a", b"ours") is False
    assert scripted.inner.read("names/a") == b"theirs"


def test_a_write_that_was_not_done_is_done_once(clock):
    scripted = ScriptedStore(write=busy(2))
    assert retrying(scripted, clock).write("names/a", b"ours") is True
    assert scripted.calls == {"write": 3}


def test_a_write_that_was_told_at_once_is_not_read_back(clock):
    scripted = ScriptedStore()
    scripted.inner.write("names/a", b"same")
    assert retrying(scripted, clock).write("names/a", b"same") is False
    assert scripted.calls == {"write": 1}


def test_reading_back_may_be_busy_too(clock):
    scripted = ScriptedStore(read=busy(2))
    scripted.after["write"] = busy(1)
    assert retrying(scripted, clock).write("names/a", b"ours") is True


def test_what_vanishes_before_it_is_read_back_is_written_again(clock):
    scripted = ScriptedStore(write=busy(1), read=[Missing("names/a")])
    scripted.inner.write("names/a", b"theirs")

    def sleep(seconds):
        if scripted.calls["read"]:
            scripted.inner.delete("names/a")
        clock.sleep(seconds)

    assert Retrying(scripted, clock=clock, sleep=sleep, chance=lambda: 1).write("names/a", b"ours") is True
    assert scripted.inner.read("names/a") == b"ours"


def test_a_list_that_breaks_off_gives_no_key_twice(clock):
    class BreaksOff(MemoryStore):
        broken = False

        def list(self, prefix):
            for i, item in enumerate(super().list(prefix)):
                if i == 2 and not self.broken:
                    self.broken = True
                    raise Busy("broke off")
                yield item

    inner = BreaksOff()
    for name in "abcd":
        inner.write(name, b"x")
    assert [key for key, _ in retrying(inner, clock).list("")] == ["a", "b", "c", "d"]
