"""A TCP proxy that falls silent: connections stay open on both sides, and nothing of them goes through any more."""

from __future__ import annotations

import contextlib
import socket
import threading


class StallingProxy:
    """Forwards to an address until `stall`; connections made after that are forwarded again."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._silent: set[int] = set()
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._open += [near, far]
                self.connections += 1
                for source, sink, heard in ((near, far, True), (far, near, False)):
                    given = source, sink, self.connections, heard
                    threading.Thread(target=self._forward, args=given, daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, number: int, upwards: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                key = number if upwards else -number
                if key in self._silent:
                    return  # read no more, and close nothing: as a peer that stands still, or a cable that was pulled
                sink.sendall(data)
        for stream in (source, sink):
            if number not in self._silent and -number not in self._silent:
                with contextlib.suppress(OSError):
                    stream.shutdown(socket.SHUT_RDWR)

    def stall(self, *, upwards: bool = True, downwards: bool = True) -> None:
        """Fall silent on all connections there are, in one direction or both."""
        for number in range(1, self.connections + 1):
            self._silent |= ({number} if upwards else set()) | ({-number} if downwards else set())

    def refuse(self) -> None:
        """Take no more connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def close(self) -> None:
        """Close all there is."""
        self.refuse()
        for stream in self._open:
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)
            stream.close()
