#!/usr/bin/env python3
"""A PyTorch worker whose size is a parameter: a decoder-only transformer with made-up weights.

It owns a stack of layers in ordinary private memory and answers over HTTP. It knows no tokenizer
and no real model: what it says is meaningless, but depends on every weight that it reads, so one
wrong bit shows in the answer.

    GET  /health   {"status": "ok"}, once the weights are there
    GET  /ping     pong; touches no weight
    POST /infer    {"tokens": [int, ...], "layers": int (optional)}

Without "layers", /infer runs through as many layers as fit in 1.2 GiB, and so through all of a
worker of that size.
"""

import argparse
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

GIB = 1 << 30
WIDTH = 1024
HEADS = 16
HIDDEN = 4 * WIDTH
VOCABULARY = 8192
MAX_TOKENS = 64
TOUCHED_BY_DEFAULT_BYTES = 1.2 * GIB

# float32 parameters of one layer: 16 Mi, which is 64 MiB.
LAYER_SHAPES = {
    "query": (WIDTH, WIDTH),
    "key": (WIDTH, WIDTH),
    "value": (WIDTH, WIDTH),
    "output": (WIDTH, WIDTH),
    "gate": (HIDDEN, WIDTH),
    "up": (HIDDEN, WIDTH),
    "down": (WIDTH, HIDDEN),
}
LAYER_BYTES = 4 * sum(rows * columns for rows, columns in LAYER_SHAPES.values())


class WeightSource:
    """Deals out weights: the same sequence on every start, no two matrices alike, nothing on disk.

    Each matrix is a scaled window of one block of normal numbers. Drawing every weight afresh
    would take three times as long, and 8 GiB should not need half a minute.
    """

    def __init__(self, seed=2026):
        generator = torch.Generator().manual_seed(seed)
        self._largest = VOCABULARY * WIDTH
        self._block = torch.empty(2 * self._largest).normal_(0, 0.02, generator=generator)
        self._dealt = 0

    def matrix(self, rows, columns):
        self._dealt += 1
        start = self._dealt * 1_000_003 % self._largest
        scale = 0.75 + 0.5 * (self._dealt * 0.6180339887 % 1)
        window = self._block[start : start + rows * columns].view(rows, columns)
        return torch.mul(window, scale, out=torch.empty(rows, columns))


class Model:
    """Decoder layers of `gib` GiB in all, rounded to whole layers, and an embedding (32 MiB)."""

    def __init__(self, gib):
        source = WeightSource()
        self.embedding = source.matrix(VOCABULARY, WIDTH)
        self.layers = [
            {name: source.matrix(*shape) for name, shape in LAYER_SHAPES.items()}
            for _ in range(max(1, round(gib * GIB / LAYER_BYTES)))
        ]
        self.default_depth = min(len(self.layers), int(TOUCHED_BY_DEFAULT_BYTES // LAYER_BYTES))

    @torch.inference_mode()
    def infer(self, tokens, depth):
        """Return the float32 logits that follow `tokens`, after the first `depth` layers."""
        x = self.embedding[torch.tensor(tokens)]
        for layer in self.layers[:depth]:
            normed = rms_norm(x, (WIDTH,))
            x = x + project(layer["output"], attend(layer, normed))
            normed = rms_norm(x, (WIDTH,))
            hidden = silu(project(layer["gate"], normed)) * project(layer["up"], normed)
            x = x + project(layer["down"], hidden)
        return torch.mv(self.embedding, rms_norm(x[-1], (WIDTH,)))


def project(weight, rows):
    # Row by row: for a handful of tokens a matrix product repacks the weights and takes longer
    # than reading them once.
    return torch.stack([torch.mv(weight, row) for row in rows])


def attend(layer, x):
    heads = [project(layer[name], x).view(len(x), HEADS, -1).transpose(0, 1) for name in ("query", "key", "value")]
    mixed = scaled_dot_product_attention(*heads, is_causal=True)
    return mixed.transpose(0, 1).reshape(len(x), WIDTH)


def answer(model, body):
    """Turn the body of a request into the body of its answer; ValueError says what is wrong."""
    try:
        request = json.loads(body)
        tokens = request["tokens"]
        depth = request.get("layers", model.default_depth)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError('the body must be JSON with "tokens"') from error
    if not isinstance(tokens, list) or not 0 < len(tokens) <= MAX_TOKENS:
        raise ValueError(f'"tokens" must be a list of 1 to {MAX_TOKENS} numbers')
    if not all(type(token) is int and 0 <= token < VOCABULARY for token in tokens):
        raise ValueError(f"a token is a whole number from 0 to {VOCABULARY - 1}")
    if type(depth) is not int or not 0 < depth <= len(model.layers):
        raise ValueError(f'"layers" must be from 1 to {len(model.layers)}')
    logits = model.infer(tokens, depth)
    token = int(logits.argmax())
    return {
        "token": token,
        "logit": round(float(logits[token]), 4),
        "checksum": hashlib.sha256(logits.numpy().tobytes()).hexdigest()[:16],
        "layers": depth,
    }


def handler_for(model):
    # One thread computes, whatever the number of connections: requests queue instead of fighting
    # for the cores, and OpenMP keeps one team of threads instead of one for each connection.
    compute = ThreadPoolExecutor(1, thread_name_prefix="compute")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # headers and body leave in one packet
        disable_nagle_algorithm = True

        def do_GET(self):
            if self.path == "/ping":
                self.reply(200, b"pong", "text/plain")
            elif self.path == "/health":
                self.reply_json(200, {"status": "ok", "layers": len(model.layers)})
            else:
                self.reply_json(404, {"error": f"no such path: {self.path}"})

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path != "/infer":
                self.reply_json(404, {"error": f"no such path: {self.path}"})
                return
            try:
                self.reply_json(200, compute.submit(answer, model, body).result())
            except ValueError as error:
                self.reply_json(400, {"error": str(error)})

        def reply_json(self, status, value):
            self.reply(status, json.dumps(value).encode(), "application/json")

        def reply(self, status, body, content_type):
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    return Handler


class Server(ThreadingHTTPServer):
    request_queue_size = 128


def main():
    options = argparse.ArgumentParser(description="A PyTorch worker of a chosen size.")
    options.add_argument("--gib", type=float, default=1.2, help="size of the weights (0.25 to 8)")
    options.add_argument("--port", type=int, default=int(os.environ.get("PORT", "8000")))
    options.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    chosen = options.parse_args()

    torch.set_num_threads(chosen.threads)
    model = Model(chosen.gib)
    server = Server(("127.0.0.1", chosen.port), handler_for(model))
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
