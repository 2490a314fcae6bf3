"""A relay in front of a server on the loopback: it counts what comes from there, and can be cut."""

import contextlib
import socket
import threading


class Relay:
    """Passes connections on while the `with` lasts. `received` counts bytes of answers; `cut` ends and refuses connections."""

    def __init__(self, port: int) -> None:
        self._to, self.received, self._cut = port, 0, False
        self._lock, self._open = threading.Lock(), set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]

    def __enter__(self) -> "Relay":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def cut(self) -> None:
        """End every connection, and each new one at once."""
        with self._lock:
            self._cut = True
            for one in self._open:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Pass connections on again."""
        self._cut = False

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._to)) as server:
            with self._lock:
                if self._cut:
                    return
                self._open |= {client, server}
            up = threading.Thread(target=self._pass, args=(client, server, False), daemon=True)
            up.start()
            self._pass(server, client, True)
            up.join()
        with self._lock:
            self._open -= {client, server}

    def _pass(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 18):
                if counted:
                    with self._lock:
                        self.received += len(data)
                target.sendall(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
