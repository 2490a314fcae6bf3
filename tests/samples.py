"""Values that several tests begin from."""

from hotstart.snapshot.manifest import (
    Chunk,
    File,
    HostFingerprint,
    Manifest,
    MemoryFile,
    NeededFile,
    Process,
    RecordedRestore,
    WeightFile,
)
from hotstart.snapshot.warmup import Answer, Oracle, Request
from hotstart.snapshot.worker import WorkerSpec

# Drawing from a few characters spares Hypothesis its table of all Unicode, which takes seconds to make.
CHARACTERS = "aZ09._-/\\ \n\r\0\t\"'{}[]:,~$*\x7f\x85é١日\u2028\u202e😀"

HOST = HostFingerprint("x86_64", "6.18.44", ("avx", "avx2", "sse2"), "glibc 2.36", "4.2.1")
LIBRARY = NeededFile("/usr/lib/libssl.so.3", 4096, 1_700_000_000_000_000_000)


def a_worker() -> WorkerSpec:
    """A worker in which every field says something."""
    return WorkerSpec(
        command=("python", "server.py"),
        cwd="/srv/größe",
        environment={"PATH": "/usr/bin", "HOME": "/root"},
        port=8000,
        ready_url="http://127.0.0.1:8000/health",
        ready_timeout_s=30.5,
        network="isolated",
        memory_bytes=4 << 30,
        cpus=1.5,
        writable=("/srv/cache",),
        visible=("/tmp/work",),
        omitted=("API_TOKEN",),
    )


def a_manifest(**changes: object) -> Manifest:
    """A manifest in which every field says something; tests/snapshot/golden holds its bytes."""
    fields: dict[str, object] = {
        "name": "llm-1",
        "created_unix_s": 1_700_000_000,
        "hotstart": "0.1.0",
        "worker": a_worker(),
        "host": HOST,
        "root_pid": 1000,
        "log_pipe": "pipe:[4711]",
        "processes": (
            Process(1000, "python", 12, "00ff00ff00ff00ff/ab-0.mem", "mapped"),
            Process(1010, "helper", 1, None, "copied", "a plain dump was asked for"),
        ),
        "files": (
            File("files.pack", 8, (Chunk("11" * 32, 8),)),
            File("images/pstree.img", 1_048_577, (Chunk("22" * 32, 1 << 20), Chunk("33" * 32, 1))),
        ),
        "memory": (
            MemoryFile("00ff00ff00ff00ff/ab-0.mem", (64 << 30) + (8 << 20), 8 << 20, 6 << 20, "memory-0.index"),
        ),
        "needs": (LIBRARY,),
        "logical_bytes": 400 << 20,
        "oracle": Oracle(
            Request("POST", "/v1/completions", {"content-type": "application/json"}, b'{"prompt":"hi"}'),
            Answer(200, b'{"id":1,"text":"\xc3\xa9"}'),
            ("id", "created"),
        ),
        "recorded": RecordedRestore(0.031, 0.125, 0.1),
        "working_set": "working-set.json",
        "weights": (WeightFile("/models/llm/model.safetensors", 256 << 20),),
    }
    return Manifest(**{**fields, **changes})
