"""Health and metrics over plain HTTP, on a port of their own: `/healthz` and, with prometheus-client, `/metrics`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping

MAX_REQUEST = 8 << 10
MAX_CONNECTIONS = 64
READ_SECONDS = 5.0
Values = Callable[[], Mapping[str, float]]


class Monitor:
    """A tiny HTTP server that answers two paths. values: metrics by name, read when asked; health: "" when well."""

    def __init__(self, values: Values, health: Callable[[], str]) -> None:
        self._values = values
        self._health = health
        self._open = 0
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port."""
        self._server = await asyncio.start_server(self._serve, host, port, limit=MAX_REQUEST)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self._open <= MAX_CONNECTIONS:
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), READ_SECONDS)
                writer.write(self._answer(head))
                await asyncio.wait_for(writer.drain(), READ_SECONDS)
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError, OSError):
            pass  # not a request, or too slow a one
        finally:
            self._open -= 1
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _answer(self, head: bytes) -> bytes:
        line = head.split(b"\r\n", 1)[0].split(b" ")
        if len(line) != 3 or line[0] != b"GET":
            return _response("405 Method Not Allowed", "only GET\n")
        if line[1] == b"/healthz":
            fault = self._health()
            return _response("503 Service Unavailable", fault + "\n") if fault else _response("200 OK", "ok\n")
        if line[1] == b"/metrics":
            try:
                return _response("200 OK", self._exposition(), "text/plain; version=0.0.4")
            except ImportError:
                return _response("501 Not Implemented", "metrics need prometheus-client: pip install 'privfed[link]'\n")
        return _response("404 Not Found", "there is /healthz and /metrics\n")

    def _exposition(self) -> str:
        from prometheus_client import CollectorRegistry, Gauge, generate_latest

        registry = CollectorRegistry()
        for name, value in self._values().items():
            Gauge(f"privfed_{name}", name.replace("_", " "), registry=registry).set(value)
        return generate_latest(registry).decode()


def _response(status: str, body: str, kind: str = "text/plain; charset=utf-8") -> bytes:
    data = body.encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    return head.encode() + data
