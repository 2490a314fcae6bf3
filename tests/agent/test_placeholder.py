"""A container is led until it needs nobody; whatever goes wrong meanwhile, somebody looks at it again."""

import os

import pytest

from hotstart.agent.placeholder import Placeholder
from hotstart.errors import HotstartError, MachineLacks, Refused
from hotstart.restore.pods import Container

POD = {
    "metadata": {"name": "p", "namespace": "n", "uid": "u", "annotations": {"hotstart.dev/restore-from": "snap"}},
    "spec": {"containers": [{"name": "worker"}]},
    "status": {},
}


class Reports:
    def __init__(self):
        self.said = []

    def cold(self, pod, why):
        self.said.append(("cold", why))

    def ready(self, pod, pid, reason, message):
        self.said.append(("ready", reason))

    def log(self, text):
        self.said.append(("log", text))


class Pods:
    def __init__(self, problem):
        self.problem = problem

    def take(self, pid, command):
        raise self.problem


def led(problem):
    reports = Reports()
    container = Container(id="c", name="worker", namespace="n", pod="p", uid="u", command=("x",), cwd="/")
    with os.popen("sleep 60 & echo $!") as shell:  # one that is young enough to be taken over
        pid = int(shell.readline())
        try:
            made = Placeholder(Pods(problem), reports, container, pid, POD, lambda *_: None, lambda *_: POD)
            return made.live(), reports.said
        finally:
            os.kill(pid, 9)


@pytest.mark.parametrize("problem", [Refused("a shared namespace"), MachineLacks("not on this processor")])
def test_a_container_that_cannot_be_taken_over_is_reported_once_and_its_gate_opened(problem):
    done, said = led(problem)
    assert done
    assert said == [("cold", str(problem)), ("ready", "ColdStarted")]


@pytest.mark.parametrize("problem", [HotstartError("the init does not listen"), OSError("no descriptors left")])
def test_a_container_whose_conversation_breaks_is_to_be_led_anew(problem):
    done, said = led(problem)
    assert not done
    assert said == [("log", f"n/p: {problem}")]
