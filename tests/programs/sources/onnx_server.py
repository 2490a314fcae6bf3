"""An ONNX Runtime session behind HTTP: an answer depends on every weight.

usage: onnx_server.py PORT MODEL
"""

import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[2], providers=["CPUExecutionProvider"])


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        seed = int(self.path.rpartition("=")[2]) if "=" in self.path else 0
        x = np.random.default_rng(seed).standard_normal((16, 512), dtype=np.float32)
        (y,) = session.run(None, {"x": x})
        body = json.dumps({"digest": hashlib.sha256(y.tobytes()).hexdigest(), "sum": float(np.abs(y).sum())}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
