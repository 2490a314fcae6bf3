#!/usr/bin/env python3
"""Write a container image, without a registry and without a daemon: a docker archive of one layer.

image.py OUT.tar NAME [--file SOURCE TARGET]... [--tree FOLDER] [--python] [--host] [--entry ARG]... [--env NAME=VALUE]...
    --host     nothing but links into /usr, which pods mount from the node
    --python   this machine's Python: interpreter, standard library and the shared libraries that they need
"""

import argparse
import glob
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile

FOLDERS = ("bin", "dev", "etc", "home", "proc", "root", "run", "sys", "tmp", "usr", "usr/bin", "usr/lib", "var", "var/tmp")
APPLETS = ("sh", "ls", "cat", "ps", "kill", "sleep", "env", "touch", "mkdir", "rm", "stat", "wget", "nc", "id", "head", "grep")


def add_folder(layer, name):
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name in ("tmp", "var/tmp") else 0o755
    layer.addfile(entry)


def add_link(layer, name, target):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = tarfile.SYMTYPE, target
    layer.addfile(entry)


def libraries(paths):
    """Shared libraries that programs need, as the loader finds them."""
    found = set()
    for path in paths:
        said = subprocess.run(["ldd", path], capture_output=True, text=True, check=False).stdout
        found |= {m[1] for m in re.finditer(r"(/\S+) \(0x", said)}
    return found


def add_python(layer):
    program = os.path.realpath(f"/usr/bin/python3.{sys.version_info.minor}")
    library = f"/usr/lib/python3.{sys.version_info.minor}"
    modules = glob.glob(f"{library}/lib-dynload/*.so")
    skipped = ("/test", "/idlelib", "/tkinter", "/ensurepip", "/lib2to3", "/turtledemo", "/config-3")

    def keep(entry):
        return None if any(s in "/" + entry.name for s in skipped) else entry

    layer.add(library, library.lstrip("/"), filter=keep)
    layer.add(program, program.lstrip("/"))
    add_link(layer, "usr/bin/python3", os.path.basename(program))
    # Also what engines need that are mounted into pods.
    more = ("stdc++.so.6", "gcc_s.so.1", "gomp.so.1", "rt.so.1", "pthread.so.0", "dl.so.2", "util.so.1", "m.so.6")
    wanted = libraries([program, *modules]) | {f"/usr/lib/x86_64-linux-gnu/lib{name}" for name in more}
    for name in ("lib", "lib64"):
        add_link(layer, name, f"usr/{name}")
    add_folder(layer, "usr/lib64")
    seen = set()
    for path in sorted(wanted):
        if not os.path.exists(path):
            continue
        target = os.path.join("/usr/lib64" if "ld-linux" in path else "/usr/lib/x86_64-linux-gnu", os.path.basename(path))
        if target in seen:
            continue
        seen.add(target)
        entry = layer.gettarinfo(os.path.realpath(path), target.lstrip("/"))
        with open(os.path.realpath(path), "rb") as f:
            layer.addfile(entry, f)


def main():
    options = argparse.ArgumentParser()
    options.add_argument("out")
    options.add_argument("name")
    options.add_argument("--file", nargs=2, action="append", default=[])
    options.add_argument("--tree")
    options.add_argument("--python", action="store_true")
    options.add_argument("--host", action="store_true")
    options.add_argument("--entry", action="append")
    options.add_argument("--env", action="append", default=[])
    chosen = options.parse_args()
    path = f"{chosen.out}.layer"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as layer:
        for folder in FOLDERS:
            if not chosen.host or folder != "bin":
                add_folder(layer, folder)
        if chosen.host:
            for name in ("bin", "sbin", "lib", "lib64"):
                add_link(layer, name, f"usr/{name}")
        if chosen.python:
            add_python(layer)
        if chosen.tree:
            for name in sorted(os.listdir(chosen.tree)):
                layer.add(os.path.join(chosen.tree, name), name)
        for source, target in chosen.file:
            layer.add(source, target.lstrip("/"))
            if os.path.basename(target) == "busybox":
                for applet in APPLETS:
                    add_link(layer, f"bin/{applet}", "busybox")
    with open(path, "rb") as f:
        digest = "sha256:" + hashlib.file_digest(f, "sha256").hexdigest()
    environment = ["PATH=/usr/local/bin:/usr/bin:/bin", *chosen.env]
    config = json.dumps(
        {
            "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine],
            "os": "linux",
            "config": {"Env": environment, "Entrypoint": chosen.entry},
            "rootfs": {"type": "layers", "diff_ids": [digest]},
            "history": [{"created_by": "image.py"}],
        }
    ).encode()
    config_name = hashlib.sha256(config).hexdigest() + ".json"
    with tarfile.open(f"{chosen.out}.new", "w") as archive:
        manifest = json.dumps([{"Config": config_name, "RepoTags": [chosen.name], "Layers": ["layer.tar"]}]).encode()
        for name, data in (("manifest.json", manifest), (config_name, config)):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        archive.add(path, "layer.tar")
    os.unlink(path)
    os.replace(f"{chosen.out}.new", chosen.out)


main()
