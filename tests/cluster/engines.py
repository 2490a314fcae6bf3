"""Engines that `scripts/install-engine` installed, in pods: an empty image, and all the rest mounted from the node."""

import json
import os
import subprocess

from tests.cluster.kube import ROOT

MODEL = ROOT / ".engines" / "models" / "smollm2-135m-instruct"
PORT = 8000
_ARGUMENTS = {"transformers": (os.path.realpath(MODEL),), "torch": ("--gib", "1.2")}
_VARIABLES = {"HOME": "/tmp", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "2000"}


def python(engine):
    """The interpreter of its virtual environment."""
    return f"{os.path.realpath(ROOT / '.engines' / engine)}/bin/python"


def _folders(engine):
    """What a pod mounts of the node: the engine, its Python, the model, the example, and the libraries of /usr."""
    code = "import sys; print(sys.base_prefix)"
    base = subprocess.run([python(engine), "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    wanted = ["/usr", base, *map(os.path.realpath, (ROOT / ".engines" / engine, MODEL, ROOT / "examples" / engine))]
    return [path for path in dict.fromkeys(wanted) if os.path.exists(path)]


def volumes(engine):
    """Volumes of a pod for `container`."""
    return [{"name": f"v{i}", "hostPath": {"path": path}} for i, path in enumerate(_folders(engine))]


def container(engine):
    """A container that runs the example of an engine. It listens on the loopback, as examples do."""
    server = f"{os.path.realpath(ROOT / 'examples' / engine)}/server.py"
    return {
        "image": "localhost/host:1",
        "command": [python(engine), "-B", server, *_ARGUMENTS[engine], "--port", str(PORT)],
        "env": [{"name": name, "value": value} for name, value in _VARIABLES.items()],
        "ports": [{"containerPort": PORT}],
        "volumeMounts": [
            {"name": f"v{i}", "mountPath": path, "readOnly": True} for i, path in enumerate(_folders(engine))
        ],
    }


def warmup(engine):
    """Its warm-up requests as a Snapshot has them, whose bodies are text."""
    lines = (ROOT / "examples" / engine / "warmup.jsonl").read_text().splitlines()
    requests = [json.loads(line) for line in lines]
    return [{**request, "body": json.dumps(request["body"])} for request in requests]
