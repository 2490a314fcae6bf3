"""A worker as PyTorch would be one, on the emulated driver: weights on the device, an HTTP server, a device call for each answer.

    GET  /health             is it ready?
    POST /infer {"add": n}   adds n to each byte of the activations, answers their digest and that of the weights
    GET  /memory             a digest of all device memory
    POST /spin {"ms": n}     keeps the device busy

Environment: WORKER_BYTES of weights for each device, WORKER_DEVICES, WORKER_PROCESSES (children that hold device memory, too, and answer
through pipes).
"""

import ctypes
import hashlib
import http.server
import json
import multiprocessing
import os
import random

BYTES = int(os.environ.get("WORKER_BYTES", str(4 << 20)))


class DriverError(Exception):
    """A call of the driver failed."""


class Device:
    """One device of this process: its primary context, weights and activations."""

    def __init__(self, cuda, ordinal: int, seed: int):
        self._cuda, self._context, device = cuda, ctypes.c_void_p(), ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self._call("cuCtxSetCurrent", self._context)
        module = ctypes.c_void_p()
        self._kernels = {}
        self._call("cuModuleLoadData", ctypes.byref(module), b"")
        for name in (b"add", b"spin"):
            self._kernels[name] = ctypes.c_void_p()
            self._call("cuModuleGetFunction", ctypes.byref(self._kernels[name]), module, name)
        self._weights, self._activations = self._allocate(BYTES), self._allocate(4096)
        noise = random.Random(seed).randbytes(BYTES)
        self._call("cuMemcpyHtoD_v2", self._weights, noise, ctypes.c_size_t(BYTES))
        self._call("cuMemsetD8_v2", self._activations, ctypes.c_ubyte(seed % 256), ctypes.c_size_t(4096))

    def _call(self, name: str, *arguments: object) -> None:
        if error := getattr(self._cuda, name)(*arguments):
            raise DriverError(f"{name}: error {error}")

    def _allocate(self, size: int) -> ctypes.c_ulonglong:
        address = ctypes.c_ulonglong()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address

    def _read(self, address: ctypes.c_ulonglong, size: int) -> bytes:
        buffer = ctypes.create_string_buffer(size)
        self._call("cuMemcpyDtoH_v2", buffer, address, ctypes.c_size_t(size))
        return buffer.raw

    def _launch(self, kernel: bytes, *arguments: object) -> None:
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        self._call("cuCtxSetCurrent", self._context)
        self._call("cuLaunchKernel", self._kernels[kernel], *[1] * 6, 0, None, pointers, None)

    def infer(self, add: int) -> str:
        """Add to the activations; their digest together with the weights'."""
        self._launch(b"add", self._activations, ctypes.c_size_t(4096), ctypes.c_ubyte(add))
        return self.digest()

    def spin(self, ms: int) -> None:
        """Keep the device busy."""
        self._launch(b"spin", ctypes.c_uint(ms))

    def digest(self) -> str:
        """Digest of all its memory."""
        return hashlib.sha256(self._read(self._weights, BYTES) + self._read(self._activations, 4096)).hexdigest()


def open_devices(seed: int) -> list[Device]:
    """Initialise the driver, fill the devices."""
    cuda = ctypes.CDLL("libcuda.so.1")
    if error := cuda.cuInit(0):
        raise DriverError(f"cuInit: error {error}")
    return [Device(cuda, i, seed + i) for i in range(int(os.environ.get("WORKER_DEVICES", "1")))]


def child(line, seed: int) -> None:
    """A process of the tree that has device memory of its own."""
    devices = open_devices(seed)
    line.send("ready")
    while (add := line.recv()) is not None:
        line.send([d.infer(add) if add else d.digest() for d in devices])


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers."""

    devices: list[Device]
    lines: list

    def do_GET(self):
        """GET."""
        self._answer({"ready": True} if self.path == "/health" else {"digests": self._all(0)})

    def do_POST(self):
        """POST."""
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/spin":
            self.devices[0].spin(request["ms"])
            self._answer({"done": True})
        else:
            self._answer({"digests": self._all(request["add"])})

    def _all(self, add: int) -> list:
        found = [d.infer(add) if add else d.digest() for d in self.devices]
        for line in self.lines:
            line.send(add)
            found += line.recv()
        return found

    def _answer(self, value: dict):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""


if __name__ == "__main__":
    Handler.lines = []
    fork = multiprocessing.get_context("fork")
    for number in range(1, int(os.environ.get("WORKER_PROCESSES", "1"))):
        ours, theirs = fork.Pipe()
        fork.Process(target=child, args=(theirs, 100 * number), daemon=True).start()
        theirs.close()
        ours.recv()
        Handler.lines.append(ours)
    Handler.devices = open_devices(1)
    http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
