"""A small HTTP server that has something odd about it.

usage: odd_server.py PORT userfaultfd|terminal|namespace|debugger|deleted-file
"""

import ctypes
import json
import os
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

USERFAULTFD, CLONE_NEWNET, PTRACE_SEIZE = 323, 0x40000000, 0x4206
libc = ctypes.CDLL(None, use_errno=True)
what = sys.argv[2]
kept = []
check = lambda: 0  # noqa: E731

if what == "userfaultfd":
    kept.append(libc.syscall(USERFAULTFD, os.O_CLOEXEC))
elif what == "terminal":
    kept.append(os.openpty())
elif what in ("namespace", "debugger"):
    pid = os.fork()
    if not pid:
        if what == "namespace":
            libc.unshare(CLONE_NEWNET)
        time.sleep(3600)
    if what == "debugger":
        libc.ptrace(PTRACE_SEIZE, pid, 0, 0)
    time.sleep(0.2)
elif what == "deleted-file":
    file = tempfile.TemporaryFile()
    content = os.urandom(1 << 20) * 5
    file.write(content)
    file.flush()
    check = lambda: int(os.pread(file.fileno(), 6 << 20, 0) != content)  # noqa: E731


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"wrong": check()}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
