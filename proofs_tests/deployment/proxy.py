"""TCP proxies before a listener: one that cuts connections and counts, one that falls silent, one that keeps all."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import Counter


class Proxy:
    """Forwards what comes to its address. Connections are numbered from 1; a kind of proxy says what passes."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self._open: list[socket.socket] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self._open.append(near)
                try:
                    far = socket.create_connection(self._target)
                except OSError:
                    near.close()
                    continue
                self._open.append(far)
                self.connections += 1
                for source, sink, upwards in ((near, far, True), (far, near, False)):
                    given = source, sink, self.connections, upwards
                    threading.Thread(target=self._forward, args=given, daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, number: int, upwards: bool) -> None:
        with contextlib.suppress(OSError):
            while (data := source.recv(1 << 16)) and self._passes(data, number, upwards):
                sink.sendall(data)
        if self._hangs_up(number):
            for stream in (source, sink):
                with contextlib.suppress(OSError):
                    stream.shutdown(socket.SHUT_RDWR)

    def _passes(self, data: bytes, number: int, upwards: bool) -> bool:
        """Whether data goes on to the other side; if not, no more is read of this one."""
        return True

    def _hangs_up(self, number: int) -> bool:
        """Whether a connection is closed on both sides once nothing more is read of one."""
        return True

    def refuse(self) -> None:
        """Take no more connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()

    def close(self) -> None:
        """Close all there is."""
        self.refuse()
        self._accepting.join(5)
        for stream in self._open:
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)
            stream.close()


class CuttingProxy(Proxy):
    """cuts: bytes upwards, or downwards, after which a connection is cut, one a connection in turn."""

    def __init__(self, target: str, cuts: list[int], *, downwards: bool = False) -> None:
        self._cuts = dict(enumerate(cuts, 1))
        self._downwards = downwards
        self._passed: Counter[int] = Counter()
        self.bytes_up = self.bytes_down = 0
        super().__init__(target)

    def _passes(self, data: bytes, number: int, upwards: bool) -> bool:
        if upwards != self._downwards and number in self._cuts:
            self._passed[number] += len(data)
            if self._passed[number] >= self._cuts[number]:
                return False
        if upwards:
            self.bytes_up += len(data)
        else:
            self.bytes_down += len(data)
        return True


class StallingProxy(Proxy):
    """Forwards until `stall`: connections then stay open and nothing of them passes; later ones are forwarded."""

    def __init__(self, target: str) -> None:
        self._silent: set[tuple[int, bool]] = set()
        super().__init__(target)

    def stall(self, *, upwards: bool = True, downwards: bool = True) -> None:
        """Fall silent on all connections there are, in one direction or both."""
        for number in range(1, self.connections + 1):
            self._silent |= ({(number, True)} if upwards else set()) | ({(number, False)} if downwards else set())

    def _passes(self, data: bytes, number: int, upwards: bool) -> bool:
        # Read no more, and close nothing: as a peer that stands still, or a cable that was pulled.
        return (number, upwards) not in self._silent

    def _hangs_up(self, number: int) -> bool:
        return not {(number, True), (number, False)} & self._silent


class Recorder(Proxy):
    """Keeps what every connection said to the SuperLink."""

    def __init__(self, target: str) -> None:
        self._heard: dict[int, bytearray] = {}
        super().__init__(target)

    @property
    def said(self) -> list[bytes]:
        return [bytes(heard) for heard in self._heard.values()]

    def _passes(self, data: bytes, number: int, upwards: bool) -> bool:
        if upwards:
            self._heard.setdefault(number, bytearray()).extend(data)
        return True
