"""The user's side of the network: submit apps, follow runs, decide about nodes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import grpc

from privfed.runtime.credentials import BearerToken, Credentials
from privfed.runtime.frame import CHUNK, Frame, chunks, pack, unpack
from privfed.runtime.handshake import STORAGE, NetworkError, Refused, agree, explain, greeting
from privfed.runtime.line import PROBE_SECONDS, Line
from privfed.runtime.result import ResultFile, ResultPart, ResultQuery, ResultRows

SERVICE = "/privfed.Control/"
CALL_SECONDS = 30.0
MAX_ROWS = 1000
F = TypeVar("F", bound=Frame)


class Submit(Frame, frozen=True):
    """The head of a submission; the archive follows in chunks."""

    digest: bytes
    size: int
    settings: dict[str, str]
    seed: int | None
    nodes: int | None
    keep: str


class RunName(Frame, frozen=True):
    """Names a run: its name, or the beginning of it."""

    name: str


class RunRow(Frame, frozen=True):
    """A run. started: seconds since the epoch. reason: what it waits for, or why it ended."""

    name: str
    app: str
    state: str
    round: int
    reason: str
    by: str
    nodes: int
    started: float


class RunRows(Frame, frozen=True):
    """Runs, oldest first."""

    rows: tuple[RunRow, ...]


class NodeRow(Frame, frozen=True):
    """A node: "approved", "revoked" or "waiting". seen: seconds since the epoch."""

    node_id: int
    name: str
    state: str
    connected: bool
    seen: float


class NodeRows(Frame, frozen=True):
    """Nodes, by id."""

    rows: tuple[NodeRow, ...]


class Listing(Frame, frozen=True):
    """Asks for at most so many rows; those of nodes begin after an id."""

    limit: int
    after: int = 0


class NodeChange(Frame, frozen=True):
    """Approves or revokes a node."""

    node_id: int
    approve: bool


class Follow(Frame, frozen=True):
    """Asks for the "log" or the "events" of a run, from a byte on, and to go on until it ends."""

    name: str
    what: str
    offset: int
    follow: bool


class Piece(Frame, frozen=True):
    """A part of a log. offset: of the byte after it. state: of the run; the last piece has an ended one."""

    offset: int
    data: bytes
    state: str
    reason: str


class RosterTaken(Frame, frozen=True):
    """The version of the roster that is in force now."""

    version: int


class Done(Frame, frozen=True):
    """A request was carried out."""


@dataclass(frozen=True, slots=True)
class Submission:
    """What a user submits: the app's archive, settings as text, and how the run is to be."""

    archive: bytes
    settings: Mapping[str, str]
    seed: int | None = None
    nodes: int | None = None
    keep: str = "last:3"


class ControlClient:
    """Speaks to a SuperLink on behalf of a user. Raises NetworkError, with what the SuperLink said.

    address: "host:port", or several with commas: of SuperLinks one of which serves; calls go to that one.
    """

    def __init__(self, address: str, credentials: Credentials | BearerToken | None = None) -> None:
        self.address = address
        self._line = Line(address, credentials)
        self._settled = False

    @property
    def _channel(self) -> grpc.Channel:
        """The connection; where there are several addresses, to one that answers if any does."""
        self._settled = self._settled or self._line.settle(_answers)
        return self._line.channel

    def _failed(self, fault: grpc.RpcError) -> NetworkError:
        told = explain(fault, self._line.address)
        self._settled = isinstance(told, Refused)
        return told

    def close(self) -> None:
        """Close the connection."""
        self._line.channel.close()

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *fault: object) -> None:
        self.close()

    def _call(self, method: str, request: Frame, kind: type[F]) -> F:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(SERVICE + method)
        return self._talk(lambda: unpack(call(pack(request), metadata=greeting(), timeout=CALL_SECONDS), kind))

    def _talk(self, attempt: Callable[[], F]) -> F:
        try:
            return attempt()
        except grpc.RpcError as fault:
            raise self._failed(fault) from None

    def submit(self, submission: Submission) -> RunRow:
        """Submit an app; return its run."""
        digest = hashlib.sha256(submission.archive).digest()
        head = Submit(
            digest=digest,
            size=len(submission.archive),
            settings=dict(submission.settings),
            seed=submission.seed,
            nodes=submission.nodes,
            keep=submission.keep,
        )

        def say() -> Iterator[bytes]:
            yield pack(head)
            yield from chunks(digest, submission.archive)

        call: grpc.StreamUnaryMultiCallable[bytes, bytes] = self._channel.stream_unary(SERVICE + "Submit")
        return self._talk(lambda: unpack(call(say(), metadata=greeting()), RunRow))

    def resume(self, name: str) -> RunRow:
        """Go on with a run that failed or was stopped."""
        return self._call("Resume", RunName(name=name), RunRow)

    def stop(self, name: str) -> RunRow:
        """Ask a run to stop after its current round."""
        return self._call("Stop", RunName(name=name), RunRow)

    def show(self, name: str) -> RunRow:
        """Return where a run stands."""
        return self._call("Show", RunName(name=name), RunRow)

    def runs(self, limit: int = 20) -> tuple[RunRow, ...]:
        """Return the newest runs, oldest first."""
        return self._call("Runs", Listing(limit=limit), RunRows).rows

    def nodes(self) -> Iterator[NodeRow]:
        """Return all nodes, by id."""
        after = 0
        while rows := self._call("Nodes", Listing(limit=MAX_ROWS, after=after), NodeRows).rows:
            yield from rows
            after = rows[-1].node_id

    def approve(self, node_id: int) -> None:
        """Serve a node from now on."""
        self._call("Node", NodeChange(node_id=node_id, approve=True), Done)

    def revoke(self, node_id: int) -> None:
        """Serve a node no more, and disconnect it."""
        self._call("Node", NodeChange(node_id=node_id, approve=False), Done)

    def hand_roster(self, document: bytes) -> int:
        """Hand on a signed roster; return the version in force, the newest of both."""

        def say() -> Iterator[bytes]:
            for at in range(0, len(document), CHUNK):
                yield document[at : at + CHUNK]
            yield b""  # the end; without it a cut would look like one

        call: grpc.StreamUnaryMultiCallable[bytes, bytes] = self._channel.stream_unary(SERVICE + "Roster")
        answer = self._talk(lambda: unpack(call(say(), metadata=greeting(), timeout=CALL_SECONDS), RosterTaken))
        return answer.version

    def results(self, name: str, models: str = "newest") -> ResultRows:
        """Return what may be fetched of a run. models: which checkpoints, "none", "newest" or "all" that were kept."""
        return self._call("Results", ResultQuery(name=name, models=models), ResultRows)

    def result(self, run: str, file: ResultFile, offset: int = 0) -> Iterator[bytes]:
        """Return the bytes of a listed file from an offset on; whoever reads them checks their hash."""
        call: grpc.UnaryStreamMultiCallable[bytes, bytes] = self._channel.unary_stream(SERVICE + "Result")
        stream = call(pack(ResultPart(run=run, file=file, offset=offset)), metadata=greeting())
        try:
            yield from stream
        except grpc.RpcError as fault:
            raise self._failed(fault) from None
        finally:
            stream.cancel()

    def follow(self, name: str, what: str, offset: int = 0, *, until_end: bool = True) -> Iterator[Piece]:
        """Return the pieces of a run's "log" or "events" as they come; the last one says how the run ended."""
        call: grpc.UnaryStreamMultiCallable[bytes, bytes] = self._channel.unary_stream(SERVICE + "Follow")
        stream = call(pack(Follow(name=name, what=what, offset=offset, follow=until_end)), metadata=greeting())
        try:
            for number, data in enumerate(stream):
                if not number:
                    agree(stream.initial_metadata(), self.address)
                yield unpack(data, Piece)
        except grpc.RpcError as fault:
            raise self._failed(fault) from None
        finally:
            stream.cancel()


def _answers(channel: grpc.Channel) -> bool:
    """Return whether a SuperLink answers, be it that it refuses or has trouble with its storage."""
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(SERVICE + "Runs")
    try:
        call(pack(Listing(limit=1)), metadata=greeting(), timeout=PROBE_SECONDS)
    except grpc.RpcError as fault:
        away = fault.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        return not away or (fault.details() or "").startswith(STORAGE)
    return True
