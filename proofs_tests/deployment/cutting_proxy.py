"""A TCP proxy that cuts a connection after so many bytes, and counts what goes through."""

from __future__ import annotations

import contextlib
import socket
import threading


class CuttingProxy:
    """Forwards to an address. cuts: bytes towards it after which the connection is cut, one a connection in turn."""

    def __init__(self, target: str, cuts: list[int], *, downwards: bool = False) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._cuts = list(cuts)
        self._downwards = downwards
        self.bytes_up = self.bytes_down = self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(near)
            try:
                far = socket.create_connection(self._target)
            except OSError:
                near.close()
                continue
            self._open.append(far)
            self.connections += 1
            cut = self._cuts.pop(0) if self._cuts else None
            for source, target, up in ((near, far, True), (far, near, False)):
                limit = cut if up != self._downwards else None
                threading.Thread(target=self._forward, args=(source, target, up, limit), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, up: bool, limit: int | None) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if limit is not None and passed + len(data) >= limit:
                    break
                passed += len(data)
                if up:
                    self.bytes_up += len(data)
                else:
                    self.bytes_down += len(data)
                target.sendall(data)
        for stream in (source, target):
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        self._accepting.join(5)
        for stream in self._open:
            stream.close()
