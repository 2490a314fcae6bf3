"""hotstart k8s: manifests without a cluster; by kubectl where there is one."""

import json

import pytest

from hotstart.cli.main import main

KUBECTL = """#!/usr/bin/env python3
import json, sys
from pathlib import Path
here = Path(__file__).parent
if sys.argv[1] == "apply":
    (here / "applied").write_text(sys.stdin.read())
    print("applied")
elif (here / sys.argv[2]).exists():
    print((here / sys.argv[2]).read_text())
elif sys.argv[2].endswith("hotstart.dev"):
    sys.exit("error: the server doesn't have a resource type " + sys.argv[2])
"""


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
    program = tmp_path / "kubectl"
    program.write_text(KUBECTL)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path


def answers(folder, **objects):
    for name, obj in objects.items():
        (
            folder / {"snapshots": "snapshots.hotstart.dev", "pools": "warmpools.hotstart.dev"}.get(name, name)
        ).write_text(json.dumps(obj))


def well(folder):
    snapshot = {
        "metadata": {"namespace": "ns", "name": "chat"},
        "status": {"phase": "Ready", "nodes": ["n1"], "logicalBytes": 2048},
    }
    pool = {"metadata": {"namespace": "ns", "name": "warm"}, "spec": {"snapshot": "chat", "replicas": 2}}
    answers(
        folder,
        deployment={"status": {"readyReplicas": 2, "replicas": 2}},
        daemonset={"status": {"numberReady": 3, "desiredNumberScheduled": 3}},
        snapshots={"items": [snapshot]},
        pools={"items": [pool]},
    )


def test_a_dry_run_prints_manifests_and_needs_no_cluster(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["k8s", "install", "--dry-run", "--namespace", "mine", "--set", "operator.replicas=1"]) == 0
    text = capsys.readouterr().out
    assert text.count("kind: CustomResourceDefinition") == 3
    assert "namespace: mine" in text
    assert "hotstart-system" not in text.replace('"hotstart-system"', "").replace("- hotstart-system", "")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("operator.replicas=two", "takes JSON"),
        ("operator.cheese=1", "no value"),
        ("operator.replicas", "PATH=VALUE"),
        ('agent.tolerations={"a":1}', "takes something like"),
    ],
)
def test_a_wrong_value_is_told_in_one_line(capsys, setting, said):
    assert main(["k8s", "install", "--dry-run", "--set", setting]) == 2
    assert said in capsys.readouterr().err


def test_install_gives_the_manifests_to_kubectl(kubectl, capsys):
    assert main(["k8s", "install", "--set", "agent.image=registry/agent:7"]) == 0
    assert "registry/agent:7" in (kubectl / "applied").read_text()


def test_without_kubectl_it_says_what_to_do(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["k8s", "install"]) == 5
    assert "kubectl" in capsys.readouterr().err


def test_status_lists_what_there_is(kubectl, capsys):
    well(kubectl)
    assert main(["k8s", "status"]) == 0
    text = capsys.readouterr().out
    assert "operator: 2 of 2 ready" in text
    assert "2.0 KiB" in text
    assert "warm" in text


def test_status_as_json_and_an_agent_that_is_missing(kubectl, capsys):
    well(kubectl)
    answers(kubectl, daemonset={"status": {"numberReady": 1, "desiredNumberScheduled": 3}})
    assert main(["k8s", "status", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is False
    assert said["snapshots"] == [
        {"namespace": "ns", "name": "chat", "phase": "Ready", "message": "", "logical_bytes": 2048, "nodes": ["n1"]}
    ]
    assert said["warm_pools"][0]["wanted"] == 2


def test_a_cluster_without_hotstart_is_told_in_one_line(kubectl, capsys):
    assert main(["k8s", "status"]) == 1
    assert "resource type" in capsys.readouterr().err
