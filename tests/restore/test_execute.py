"""Starting replicas, against simulated sandboxes and workers: success, CRIU's failure, a wrong answer, none, no port."""

import pytest

from hotstart.errors import HotstartError, MachineLacks
from hotstart.restore.execute import ANSWER_TIMEOUT_S, RESTORE_TIMEOUT_S, Replica, finish_replica, start_replicas
from hotstart.restore.receipt import measure_stages, stages_of_init
from hotstart.snapshot.sandbox import ProgramFailed, SandboxSpec
from hotstart.snapshot.warmup import Answer, Oracle, Request

ORACLE = Oracle(Request("POST", "/generate", {}, b"{}"), Answer(200, b'{"id": 1, "text": "hi"}'), ("id",))


class Clock:
    """Time that passes only when somebody says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


class SimulatedSandbox:
    """A sandbox in which CRIU does what the simulation says, and no more than once a call to wait_for allows."""

    init_pid = 4711

    def __init__(self, clock, fate, spec):
        self._clock, self._fate, self.spec = clock, fate, spec
        self.events = {}
        self.unrenewed = ()
        self.killed = self.committed = False

    def wait_for(self, event, timeout_s):
        for name, seconds in (("namespaces", 0.002), ("mounts", 0.003), ("started", 0.001)):
            self._pass(name, seconds)
        if isinstance(self._fate, HotstartError):
            raise self._fate
        if self._fate > timeout_s:
            self._clock.pass_(timeout_s)
            raise HotstartError(f"the sandbox did not report {event!r} within {timeout_s:g} s")
        self._pass("restored", self._fate)
        self._pass("renewed", 0.002)
        assert event in self.events
        self._clock.pass_(0.0001)  # until the news is read

    def _pass(self, name, seconds):
        began = self._clock()
        self._clock.pass_(seconds)
        self.events[name] = began, self._clock()

    def commit(self):
        self.committed = True

    def kill(self):
        self.killed = True

    def alive(self):
        return not self.killed


class SimulatedSandboxes:
    """Starts simulated sandboxes; `fates` are seconds until each is restored, or what it fails with."""

    def __init__(self, clock, *fates):
        self._clock, self._fates = clock, list(fates)
        self.started = []

    def start(self, spec):
        fate = self._fates[len(self.started)]
        if isinstance(fate, MachineLacks):
            raise fate
        self._clock.pass_(0.001)
        self.started.append(SimulatedSandbox(self._clock, fate, spec))
        return self.started[-1]


class SimulatedWorker:
    """What answers at the port inside; `answer` None: nobody does."""

    def __init__(self, clock, answer):
        self._clock, self._answer = clock, answer
        self.asked = []

    def ask(self, door_path, port, request, timeout_s):
        self.asked.append(("ask", door_path, port, request, timeout_s))
        self._clock.pass_(0.05)
        if self._answer is None:
            raise HotstartError(
                f"the worker gave no answer to {request.method} {request.path}: the connection was closed"
            )
        return self._answer

    def wait_port(self, door_path, port, timeout_s):
        self.asked.append(("wait_port", door_path, port, None, timeout_s))
        self._clock.pass_(0.01)
        if self._answer is None:
            raise HotstartError(f"nothing listens on port {port} inside: is --port right?")


def a_spec(name="llm-1-1"):
    return SandboxSpec(
        program=("criu", "restore"),
        cwd="/",
        environment={},
        root_pid=1000,
        hostname=name,
        log_path=f"/logs/{name}",
        result_path=f"/run/{name}/result",
        door_path=f"/run/{name}/door",
    )


class Restore:
    """One restore in the simulation."""

    def __init__(self, fate=0.03, answer=ORACLE.answer):
        self.clock = Clock()
        self.sandboxes = SimulatedSandboxes(self.clock, fate)
        self.worker = SimulatedWorker(self.clock, answer)
        self.replica = Replica("llm-1-1", a_spec())
        self.logs_read = []
        self.spans = {"check": (self.clock(), self.clock() + 0.001)}
        self.clock.pass_(0.001)
        self.began = self.clock()

    def start(self):
        start_replicas([self.replica], self.sandboxes, self.spans, self.began, self.clock)
        return self

    def why(self, path):
        self.logs_read.append(path)
        return "Can't open file /usr/lib/x.so"

    def finish(self, oracle=ORACLE, port=8000, wait=True):
        finish_replica(self.replica, oracle, port, self.worker, self.why, "/run/llm-1-1/work", self.clock, wait=wait)
        return self.replica


# ---- starting


def test_all_sandboxes_are_started_before_any_is_waited_for():
    clock = Clock()
    sandboxes = SimulatedSandboxes(clock, 1.0, 1.0, 1.0)
    replicas = [Replica(f"r-{i}", a_spec(f"r-{i}")) for i in range(3)]
    start_replicas(replicas, sandboxes, {}, 99.0, clock)
    assert [s.spec for s in sandboxes.started] == [r.spec for r in replicas]
    assert [r.running for r in replicas] == sandboxes.started
    assert not any(s.events for s in sandboxes.started)
    assert clock() == pytest.approx(100.003)


def test_each_replica_is_measured_for_itself_and_waits_for_those_before_it():
    clock, before = Clock(), {"check": (98.0, 99.0)}
    replicas = [Replica(f"r-{i}", a_spec()) for i in range(2)]
    start_replicas(replicas, SimulatedSandboxes(clock, 1.0, 1.0), before, 99.5, clock)
    assert [r.spans for r in replicas] == [
        {"check": (98.0, 99.0), "spawn": (99.5, pytest.approx(100.001))},
        {"check": (98.0, 99.0), "spawn": (99.5, pytest.approx(100.002))},
    ]
    assert before == {"check": (98.0, 99.0)}


def test_a_sandbox_that_cannot_be_started_leaves_the_others_to_be_ended():
    clock = Clock()
    sandboxes = SimulatedSandboxes(clock, 1.0, MachineLacks("no namespaces here"))
    replicas = [Replica(f"r-{i}", a_spec()) for i in range(3)]
    with pytest.raises(MachineLacks):
        start_replicas(replicas, sandboxes, {}, 99.0, clock)
    assert [r.sandbox is not None for r in replicas] == [True, False, False]
    with pytest.raises(HotstartError, match="replica r-2 was not started"):
        _ = replicas[2].running


def test_a_replica_that_failed_before_it_had_a_sandbox_says_why():
    replica = Replica("r-1", a_spec(), error=HotstartError("the disk is full"))
    with pytest.raises(HotstartError, match="the disk is full"):
        _ = replica.running


# ---- finishing


def test_a_replica_that_answers_as_the_warm_worker_did_is_right():
    restore = Restore(answer=Answer(200, b'{"text":"hi","id":77}')).start()
    replica = restore.finish()
    assert replica.oracle_ok is True
    assert restore.worker.asked == [("ask", "/run/llm-1-1/door", 8000, ORACLE.request, ANSWER_TIMEOUT_S)]
    assert list(replica.spans) == ["check", "spawn", "notice", "first_answer"]
    assert replica.error is None


def test_the_receipt_of_a_simulated_restore_adds_up_to_the_time_that_passed_and_nothing_is_unaccounted():
    restore = Restore().start()
    replica = restore.finish()
    stages = measure_stages({**replica.spans, **stages_of_init(replica.running.events)}, 100.0, replica.answered_at)
    assert sum(stages.values()) == pytest.approx(restore.clock() - 100.0)
    assert stages["criu"] == pytest.approx(0.03)
    assert stages["renew"] == pytest.approx(0.002)
    assert stages["first_answer"] == pytest.approx(0.05)
    assert stages["unaccounted"] == pytest.approx(0, abs=1e-9)


def test_time_that_passes_between_the_steps_of_a_restore_is_unaccounted():
    restore = Restore().start()
    restore.clock.pass_(2.0)
    replica = restore.finish()
    stages = measure_stages({**replica.spans, **stages_of_init(replica.running.events)}, 90.0, replica.answered_at)
    assert stages["unaccounted"] == pytest.approx(12.0)


@pytest.mark.parametrize(
    "answer", [Answer(200, b'{"id": 1, "text": "ho"}'), Answer(500, ORACLE.answer.body), Answer(200, b"")]
)
def test_a_replica_that_answers_otherwise_is_not_right_but_its_answer_is_timed(answer):
    replica = Restore(answer=answer).start().finish()
    assert replica.oracle_ok is False
    assert replica.answered_at > replica.resumed_at


def test_a_replica_that_does_not_answer_is_an_error_and_never_called_right():
    restore = Restore(answer=None).start()
    with pytest.raises(HotstartError, match="gave no answer to POST /generate"):
        restore.finish()
    assert restore.replica.oracle_ok is None
    assert restore.replica.resumed_at is not None
    assert restore.replica.answered_at is None


def test_a_worker_without_a_port_is_done_once_it_is_resumed():
    restore = Restore(answer=None).start()
    replica = restore.finish(oracle=None, port=None)
    assert restore.worker.asked == []
    assert replica.oracle_ok is None
    assert list(replica.spans) == ["check", "spawn", "notice"]


@pytest.mark.parametrize(("oracle", "wait"), [(None, True), (None, False), (ORACLE, False)])
def test_without_an_oracle_or_the_wish_to_wait_a_port_that_accepts_is_enough(oracle, wait):
    restore = Restore().start()
    replica = restore.finish(oracle=oracle, wait=wait)
    assert restore.worker.asked == [("wait_port", "/run/llm-1-1/door", 8000, None, ANSWER_TIMEOUT_S)]
    assert replica.oracle_ok is None
    assert replica.answered_at is None


def test_a_port_at_which_nothing_listens_is_an_error():
    with pytest.raises(HotstartError, match="nothing listens on port 8000"):
        Restore(answer=None).start().finish(oracle=None)


def test_when_criu_fails_its_own_log_says_why():
    failure = ProgramFailed("exit status 1")
    restore = Restore(fate=failure).start()
    with pytest.raises(HotstartError, match=r"CRIU could not restore: Can't open file /usr/lib/x\.so") as error:
        restore.finish()
    assert restore.logs_read == ["/run/llm-1-1/work/restore.log"]
    assert error.value.__cause__ is failure
    assert restore.worker.asked == []
    assert restore.replica.resumed_at is None


def test_when_criu_ends_without_a_word_its_exit_status_is_told():
    restore = Restore(fate=ProgramFailed("it was ended by signal 9")).start()
    restore.why = lambda _: ""
    with pytest.raises(HotstartError, match=r"CRIU could not restore: it was ended by signal 9"):
        restore.finish()


def test_when_something_else_of_the_sandbox_fails_criu_is_not_blamed():
    restore = Restore(fate=HotstartError("the sandbox failed: /srv/models: No such file or directory")).start()
    with pytest.raises(HotstartError, match=r"^the sandbox failed: /srv/models: No such file or directory$"):
        restore.finish()
    assert restore.logs_read == []


def test_when_a_restore_takes_too_long_no_log_is_blamed():
    restore = Restore(fate=RESTORE_TIMEOUT_S + 1).start()
    with pytest.raises(HotstartError, match="did not report 'renewed' within 120 s"):
        restore.finish()
    assert restore.logs_read == []


def test_a_machine_that_lacks_something_is_told_as_that():
    lacks = MachineLacks("making namespaces is not permitted: run as root")
    restore = Restore(fate=0.03)
    restore.start()
    restore.replica.sandbox._fate = lacks
    with pytest.raises(MachineLacks):
        restore.finish()
    assert restore.logs_read == []


def test_a_replica_that_was_never_started_cannot_be_finished():
    with pytest.raises(HotstartError, match="was not started"):
        Restore().finish()
