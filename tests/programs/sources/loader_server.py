"""A PyTorch server whose data come from two forked DataLoader processes through shared memory.

usage: loader_server.py PORT
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

import torch
from torch.utils.data import DataLoader, Dataset

ROWS, WIDTH, BATCH = 64, 131072, 4  # a batch has 2 MiB


class Rows(Dataset):
    """Row i is a function of i and of a table that the children inherit."""

    def __init__(self):
        self.table = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(7))

    def __len__(self):
        return ROWS

    def __getitem__(self, i):
        return self.table[i] * (i + 1)


rows = Rows()
expected = [(rows[i] * 1.0).double().sum().item() for i in range(ROWS)]
loader = DataLoader(rows, batch_size=BATCH, num_workers=2, persistent_workers=True, prefetch_factor=4)
unfinished = iter(loader)  # at a snapshot, batches are on their way


def check():
    global unfinished
    wrong = batches = 0
    for i, batch in enumerate(unfinished if unfinished is not None else loader, start=check.seen):
        got = batch.double().sum(dim=1).tolist()
        wrong += sum(a != b for a, b in zip(got, expected[i * BATCH : (i + 1) * BATCH], strict=True))
        batches += 1
    unfinished, check.seen = iter(loader), 0
    for _ in range(2):
        next(unfinished)
        check.seen += 1
    return {"wrong": wrong, "batches": batches}


check.seen = 0


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps(check() if self.path == "/check" else {"ok": True}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
