"""Gives a Python process new random numbers once it goes on as a replica. Nothing but the standard library, and little of it.

Two ways lead here. In a sandbox every Python process imports this file as `hotstart_renewal` when it starts (sitecustomize.py),
whether or not the worker knows of Hotstart: it leaves a file named like its pid in /run/hotstart/renewal, gets SIGURG in a
replica, renews itself and says so. And `hotstart.worker.checkpoint` calls `renew`. Any Python from 3.8 may run this.
"""
# ruff: noqa: ANN001, SIM105  # typing and contextlib would have to be imported

import _signal  # type: ignore[import-not-found]  # not `signal`: that imports enum, which takes longer than all of this
import _thread
import atexit
import os
import sys

_FOLDER = "/run/hotstart"
_RENEWAL = _FOLDER + "/renewal"
_KEEP = "HOTSTART_KEEP_RANDOM"
_lock = _thread.RLock()  # the signal may strike while its own thread renews
_renewed_for = b""


def renew(identity: bytes) -> str:
    """Seed every global generator that is loaded from the kernel's, once for each identity; return the names of those that failed.

    Generators that a program made for itself are its own affair, and so is a seed that it sets afterwards.
    """
    global _renewed_for
    failed = []
    with _lock:
        if identity == _renewed_for or os.environ.get(_KEEP):
            return ""
        _renewed_for = identity
        for module, seed in _SEEDERS:
            if module in sys.modules:
                try:
                    seed(sys.modules[module])
                except Exception:  # noqa: BLE001  # a foreign library, half imported perhaps: the others are renewed all the same
                    failed.append(module)
    return ",".join(failed)


def _seed_random(random) -> None:  # type: ignore[no-untyped-def]
    random.seed()


def _seed_numpy(numpy_random) -> None:  # type: ignore[no-untyped-def]
    lock = numpy_random.mtrand._rand._bit_generator.lock  # before NumPy 2 its own thread may hold it, for good
    if not lock.acquire(timeout=0.02):
        raise TimeoutError
    lock.release()
    numpy_random.seed(
        [int.from_bytes(os.urandom(4), "little") for _ in range(8)]
    )  # nine times faster than without a seed


def _seed_torch(torch) -> None:  # type: ignore[no-untyped-def]
    torch.default_generator.manual_seed(int.from_bytes(os.urandom(8), "little"))
    if "torch.cuda" in sys.modules and torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(int.from_bytes(os.urandom(8), "little"))


def _seed_openssl(ssl) -> None:  # type: ignore[no-untyped-def]
    if _has_shared_libcrypto(ssl):
        return
    # Seeds the first generator anew; those of the threads, which hang on it, follow when they see that.
    ssl.RAND_add(os.urandom(32), 32.0)


def _has_shared_libcrypto(ssl) -> bool:  # type: ignore[no-untyped-def]
    """Say whether the shim (shim.c) lets this OpenSSL notice by itself: asking one that was never drawn from takes 2 ms."""
    try:
        libc, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        if libc != "glibc" or int(version.split(".")[1]) < 35 or _FOLDER + "/shim.so" not in os.environ["LD_PRELOAD"]:
            return False
        with open(ssl.__file__, "rb") as f:
            return b"libcrypto.so" in f.read(1 << 16)  # the names of needed libraries stand near the beginning
    except (AttributeError, KeyError, OSError, ValueError):
        return False


def _seed_cryptography(rust) -> None:  # type: ignore[no-untyped-def]
    rust._openssl.lib.RAND_add(os.urandom(32), 32, 32.0)  # it brings an OpenSSL of its own


# numpy's takes a lock that other threads may hold while they need this one: last.
_SEEDERS = (
    ("random", _seed_random),
    ("_ssl", _seed_openssl),
    ("cryptography.hazmat.bindings._rust", _seed_cryptography),
    ("torch", _seed_torch),
    ("numpy.random", _seed_numpy),
)


def _renew_when_told(*_: object) -> None:
    try:
        with open(_FOLDER + "/identity", "rb") as f:
            identity = f.read()
        failed = renew(identity) if b'"kind":"replica"' in identity else ""
        answers = os.open(_RENEWAL + "/.answers", os.O_WRONLY | os.O_NONBLOCK)
        os.write(answers, f"{os.getpid()} {failed}".rstrip().encode() + b"\n")
        os.close(answers)
    except OSError:  # nobody waits: it was somebody else's signal, or we are too late
        pass


def _register() -> None:
    try:
        os.close(os.open(f"{_RENEWAL}/{os.getpid()}", os.O_WRONLY | os.O_CREAT, 0o600))
    except OSError:
        pass


def _unregister() -> None:
    try:
        os.unlink(f"{_RENEWAL}/{os.getpid()}")
    except OSError:
        pass


def arm() -> None:
    """Renew this process and those that it forks whenever Hotstart says so. Raises ValueError outside the first interpreter."""
    if os.environ.get(_KEEP) or not os.path.isdir(_RENEWAL):
        return
    if _signal.getsignal(_signal.SIGURG) not in (_signal.SIG_DFL, _signal.SIG_IGN):
        return
    _signal.signal(_signal.SIGURG, _renew_when_told)
    _register()
    os.register_at_fork(after_in_child=_register)
    atexit.register(_unregister)
