"""The node's side of the network: one outbound connection to a SuperLink, which pushes tasks over it.

Whatever the network does, a caller sees tasks, replies that count exactly once, and time passing. The connection is
made again by itself, after a pause that doubles up to `MAX_PAUSE` and is scattered, so that a SuperLink that refuses is
not asked by all its nodes at once; one that could not be reached is asked as soon as it can be.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import grpc

from privfed import wire
from privfed.errors import WireError
from privfed.failpoint import around
from privfed.message import Error, ErrorCode, Message
from privfed.record import RecordDict
from privfed.runtime.blob import BlobError, BlobFolder
from privfed.runtime.certificate import CertificateError
from privfed.runtime.credentials import Credentials
from privfed.runtime.disk import disk_fault
from privfed.runtime.fleet_options import FleetOptions as FleetOptions
from privfed.runtime.frame import (
    CHUNK,
    Answer,
    Buffer,
    Down,
    Ended,
    Frame,
    Grant,
    Hello,
    Offer,
    Part,
    Progress,
    RunQuery,
    Verdict,
    Waiting,
    Welcome,
    chunk_size,
    chunks,
    pack,
    parcel,
    read_chunk,
    unpack,
    unpack_down,
    wanted,
)
from privfed.runtime.handshake import ACKNOWLEDGED, OLDEST, STORAGE, NetworkError, Refused, agree, explain, greeting
from privfed.runtime.line import Line
from privfed.runtime.task import RunGrant as RunGrant
from privfed.runtime.task import Task as Task
from privfed.runtime.transfer import fetch, fetch_roster, send
from privfed.runtime.voice import Voice

logger = logging.getLogger("privfed.node")
MAX_PAUSE = 15.0
MAX_SWIFT_PAUSE = 2.0  # where there is another SuperLink to try
R = TypeVar("R")
F = TypeVar("F", bound=Frame)


_SERVICE = "/privfed.Fleet/"
CALL_SECONDS = 60.0
_FIRST_PAUSE = 0.2
_TRIES = 3
_FINAL = frozenset({grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.PERMISSION_DENIED})
_CACHE_BYTES = 8 << 30


class FleetClient:
    """A blocking facade over the connection; every method may be called by any thread.

    address: "host:port", or several with commas: of SuperLinks one of which serves; the node goes to that one.
    credentials: None is an unencrypted connection, and node_id is then who the node says it is;
    with credentials the certificate says it.
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials | None,
        node_id: int | None = None,
        options: FleetOptions | None = None,
    ) -> None:
        self.options = options or FleetOptions()
        self._credentials = credentials
        self.node_id = node_id or 0
        self._temporary = None if self.options.cache else tempfile.TemporaryDirectory(prefix="privfed-node-")
        folder = Path(self._temporary.name if self._temporary else self.options.cache or "")
        self._blobs = BlobFolder(folder, _CACHE_BYTES, evict=True)
        self._line = Line(address, credentials)
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._greeting = greeting(node_id=None if credentials else self.node_id)
        self._version = OLDEST  # until the SuperLink says what it speaks
        self._held = set(self.options.holding)
        self._fetching: set[str] = set()
        self._holding, self._downloading = threading.Lock(), threading.Lock()
        self._runs: dict[int, RunGrant | None] = dict.fromkeys(self.options.runs)
        self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._welcomed = threading.Condition()
        self._welcomes = 0
        self._fatal: Refused | None = None
        self._status = ""
        self._voice = Voice()
        self._hangup: Callable[[], object] = bool
        self._fetchers = ThreadPoolExecutor(self.options.slots, thread_name_prefix="privfed-fetch")
        self._thread = threading.Thread(target=self._stay_connected, name="privfed-fleet", daemon=True)
        self._thread.start()

    def receive(self, timeout: float | None = None) -> Task | None:
        """Return the next task the SuperLink pushes; None after `timeout` seconds, or when closed.

        Raises Refused when the SuperLink will never serve this node: another protocol version, for one.
        """
        try:
            task = self._tasks.get(timeout=timeout)
        except queue.Empty:
            return None
        if task is None:
            self._tasks.put(None)  # for the next caller
            if self._fatal is not None:
                raise self._fatal
        return task

    def reply(self, token: str, reply: Message) -> bool:
        """Hand in a reply: True when it counts, now or earlier; False when the lease was lost.

        Blocks while the SuperLink cannot be reached; the same reply may be sent again, after a restart too.
        Raises NetworkError when the reply is refused, or the client closed first.
        """
        sealed, outside = parcel(reply)
        answer = pack(Answer(token=token, parcel=sealed))
        reached, tries, pause = -1, 0, _FIRST_PAUSE
        while tries < _TRIES:
            verdict = self._call("Answer", answer, Verdict)
            if not verdict.missing:
                self._held.discard(token)
                return verdict.counted
            arrived = sum(len(buffer) for buffer in outside.values()) - sum(
                len(outside[one.digest]) - one.size for one in verdict.missing if one.digest in outside
            )
            if arrived > reached:
                reached, tries, pause = arrived, 0, _FIRST_PAUSE
            if self._upload(verdict.missing, outside):
                tries += 1
            else:  # not taken, for want of a connection or of room: that passes, and each try may bring it further
                self._closing.wait(pause)
                pause = min(MAX_PAUSE, 2 * pause)
        raise NetworkError(f"{self.address} does not take the reply: what is uploaded does not have its hash there")

    def run(self, run_id: int) -> RunGrant:
        """Return what the SuperLink says of a run this node takes part in; blocks while it cannot be reached."""
        known = self._runs.get(run_id)
        if known is None:
            found = self._call("Run", pack(RunQuery(run_id=run_id)), Grant)
            facts = (found.bundle.hex(), found.run_config, found.seed, found.nodes)
            known = self._runs[run_id] = RunGrant(run_id, found.name, *facts)
        return known

    def bundle(self, digest: str) -> bytes:
        """Return an app's archive, its hash checked; blocks while the SuperLink cannot be reached."""
        name = bytes.fromhex(digest)
        for _ in range(_TRIES):
            self._download([Part(digest=name, size=0)])
            data = bytes(self._blobs[name])
            if hashlib.sha256(data).digest() == name:
                return data
            self._blobs.drop([name])
        raise NetworkError(f"{self.address} sends something else as the app {digest[:16]}")

    def ended(self) -> list[int]:
        """Return the runs that ended since the last call."""
        return [self._ended.get() for _ in range(self._ended.qsize())]

    def report_wait(self, reason: str) -> None:
        """Tell the SuperLink what this node's tasks wait for, so that it can say so; nothing when they go on."""
        self._voice.report_wait(reason)

    def close(self) -> None:
        """Close the connection; whoever waits is released."""
        with self._holding:  # whoever hands a fetch over holds this, and looks at the flag first
            self._closing.set()
            self._fetchers.shutdown(wait=False, cancel_futures=True)
        with self._welcomed:
            self._welcomed.notify_all()
        self._hangup()
        self._line.channel.close()
        self._thread.join(5.0)
        self._tasks.put(None)
        if self._temporary is not None:
            self._temporary.cleanup()

    def _tell(self, status: str) -> None:
        if status != self._status:
            self._status = status
            self.options.on_status(status)

    @property
    def address(self) -> str:
        """Where the node connects now."""
        return self._line.address

    def _stay_connected(self) -> None:
        pause, early = _FIRST_PAUSE, False
        longest = MAX_SWIFT_PAUSE if self._line.has_others else MAX_PAUSE
        while not self._closing.is_set():
            served = False
            try:
                for data in self._open():
                    served = self._take(unpack_down(data)) or served
                self._tell("the SuperLink closed the connection")
            except Refused as fault:
                self._fatal = fault
                self._tasks.put(None)
                self._tell(f"refused: {fault}")
                return
            except (NetworkError, WireError, ValueError) as fault:
                self._tell(str(fault))
            except grpc.RpcError as fault:
                if self._closing.is_set():
                    return
                told = explain(fault, self.address)
                self._tell(str(told))
                if isinstance(told, Refused):
                    self._fatal = told
                    self._tasks.put(None)
                    return
            pause = _FIRST_PAUSE if served else min(longest, 2 * pause)
            early = self._line.rest(pause, self._closing, watching=not early)
            if not self._closing.is_set():
                self._redial()

    def _redial(self) -> None:
        """Turn to the next address, or to new certificates; say what is wrong with the ones there are."""
        try:
            self._line.turn()
            if self._credentials is not None:
                self._credentials.check()
        except CertificateError as fault:
            self._tell(f"waits for a certificate: {fault}")

    def _open(self) -> Iterator[bytes]:
        """Open the session and introduce the node; yield what the SuperLink pushes."""
        call: grpc.StreamStreamMultiCallable[bytes, bytes] = self._line.channel.stream_stream(_SERVICE + "Session")

        def hello() -> Hello:
            with self._holding:
                self._fetching.clear()  # what was not received whole is handed out again
                held, runs = tuple(sorted(self._held)), tuple(sorted(self._runs))
            return Hello(slots=self.options.slots, holding=held, runs=runs)

        words, end = self._voice.begin(hello)
        stream = call(words, metadata=self._greeting)
        if not stream.add_callback(end):  # it is over already
            end()
        self._hangup = stream.cancel
        if self._closing.is_set():
            stream.cancel()
        for number, data in enumerate(stream):
            if not number:  # there is metadata now; while nobody is there, there is none
                self._version = agree(stream.initial_metadata(), self.address)
            yield data

    def _take(self, frame: Down) -> bool:
        """Act on what the SuperLink pushed; return whether it serves us."""
        if isinstance(frame, Waiting):
            self._tell(frame.reason)
            return False
        if isinstance(frame, Welcome):
            self.node_id = frame.node_id
            with self._welcomed:
                self._welcomes += 1
                self._welcomed.notify_all()
            self._update_roster(frame.roster)
            self._tell(f"connected to {frame.link} as node {frame.node_id}")
        elif isinstance(frame, Ended):
            self._runs.pop(frame.run_id, None)
            self._ended.put(frame.run_id)
            self.options.on_ended(frame.run_id)
        elif frame.token not in self._held:
            with self._holding:
                if not self._closing.is_set():  # an offer may still arrive while we hang up: it is handed out again
                    self._fetching.add(frame.token)
                    self._fetchers.submit(self._fetch, frame)
        return True

    def _update_roster(self, version: int) -> None:
        """Take a newer signed roster before any task that may need it."""
        held = self._credentials
        if held is None or version <= held.trust.roster.version:
            return
        try:
            held.take_roster(fetch_roster(self._line.channel, self._greeting, held.trust.roster.version, CALL_SECONDS))
        except CertificateError as fault:
            raise NetworkError(f"the roster of {self.address} is not accepted: {fault}") from None

    def _fetch(self, offer: Offer) -> None:
        """Complete a task, and hand it to whoever receives; the SuperLink is told of one that cannot be completed."""
        for number in range(1, _TRIES + 1):
            try:
                self._complete(offer)
                break
            except Exception as fault:  # noqa: BLE001 - told, tried again, and told to the SuperLink
                if self._closing.is_set() or offer.token not in self._fetching:
                    break
                self._tell(f"a task arrived damaged and is fetched again: {type(fault).__name__}: {fault}")
                if number == _TRIES:
                    self._put_down(offer, fault)
                self._closing.wait(_FIRST_PAUSE * 2**number)
        self._fetching.discard(offer.token)

    def _complete(self, offer: Offer) -> None:
        """Fetch what did not fit into a task's frame, and queue it if it is wanted still."""
        outside = offer.parcel.outside()
        self._download(outside, lambda: offer.token in self._fetching)
        if offer.token not in self._fetching:
            return
        try:
            message = offer.parcel.open(self._blobs)
        except (WireError, KeyError):
            self._blobs.drop([part.digest for part in outside])
            raise
        with self._holding:
            if offer.token in self._fetching:
                self._held.add(offer.token)
                self._tasks.put(Task(offer.token, message, offer.expires_at, offer.began, offer.commit))

    def _put_down(self, offer: Offer, fault: Exception) -> None:
        """Answer a task that did not arrive with an error; without its envelope it waits for the next connection."""
        if not isinstance(fault, NetworkError):  # which says that it is over already, as a rule
            logger.error("a task does not arrive, and the SuperLink is told so", exc_info=fault)
        envelope = offer.parcel.envelope
        try:
            found = wire.peek(envelope.data if envelope.is_inside else self._blobs[envelope.digest])
            error = Error(ErrorCode.MESSAGE_UNAVAILABLE, type(fault).__name__)
            self.reply(offer.token, Message(error, reply_to=Message.restore(found, RecordDict())))
        except (WireError, KeyError, NetworkError) as again:
            self._tell(f"a task was lost until the next connection, or its time is over: {again}")

    def _call(self, method: str, request: bytes, kind: type[F]) -> F:
        def ask() -> bytes:
            call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._line.channel.unary_unary(_SERVICE + method)
            return call(request, metadata=self._greeting, timeout=CALL_SECONDS)

        with around("query"):
            answered = self._patiently(ask)
        try:
            return unpack(answered, kind)
        except WireError as fault:
            raise NetworkError(f"{self.address}: {fault}") from None

    def _download(self, parts: list[Part], going: Callable[[], bool] = lambda: True) -> None:
        """Fetch what is not here yet. going: whether it is still wanted, which a reconnect may change."""

        def keep(frame: bytes) -> None:
            self._blobs.add(*read_chunk(frame))

        def transfer() -> None:
            with self._downloading:  # what two tasks want is fetched once
                missing = [part for part in parts if going() and part.digest not in self._blobs]
                if not missing:
                    return
                have = {part.digest: self._blobs.arrived(part.digest) for part in missing}
                want, channel = wanted(missing, have), self._line.channel
                with around("download"):
                    if self._version >= ACKNOWLEDGED:
                        fetch(channel.stream_stream(_SERVICE + "Fetch"), self._greeting, want, keep)
                        return
                    old: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(_SERVICE + "Download")
                    for frame in old(pack(want), metadata=self._greeting):
                        keep(frame)

        self._patiently(transfer)

    def _upload(self, missing: Sequence[Progress], outside: Mapping[bytes, Buffer]) -> bool:
        """Send what is missing; return whether all of it was taken. Raises NetworkError when it is refused."""
        if any(one.digest not in outside for one in missing):
            raise NetworkError(f"{self.address} asks for something that is not in the reply")
        acknowledged = self._version >= ACKNOWLEDGED

        def frames() -> Iterator[bytes]:
            for one in missing:
                buffer = outside[one.digest]
                yield from chunks(one.digest, buffer, one.size, chunk_size(len(buffer)) if acknowledged else CHUNK)

        channel = self._line.channel
        try:
            with around("upload"):
                if acknowledged:
                    send(channel.stream_stream(_SERVICE + "Send"), self._greeting, frames())
                else:
                    old: grpc.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(_SERVICE + "Upload")
                    old(frames(), metadata=self._greeting)
        except grpc.RpcError as fault:
            if fault.code() in _FINAL:
                raise NetworkError(fault.details()) from None
            self._tell(f"an upload is taken up again: {explain(fault, self.address)}")
            return False  # the next answer says where to go on
        except ValueError:  # as in _patiently
            if not self._closing.is_set() and channel is self._line.channel:
                raise
            return False
        return True

    def _patiently(self, attempt: Callable[[], R]) -> R:
        """Do something over the network until it succeeds, is refused, or the client closes."""
        pause = _FIRST_PAUSE
        while not self._closing.is_set():
            seen, channel = self._welcomes, self._line.channel
            try:
                return attempt()
            except BlobError as fault:
                self._tell(f"a transfer is taken up again: {fault}")
            except OSError as fault:
                if not disk_fault(fault):
                    raise
                self._tell(f"a transfer waits for this node's disk: {disk_fault(fault)}")
            except grpc.RpcError as fault:
                told = explain(fault, self.address)
                if isinstance(told, Refused) or fault.code() in _FINAL:
                    raise told from None
                if fault.code() == grpc.StatusCode.UNAUTHENTICATED:  # a certificate that has expired meanwhile
                    self._tell(str(told))
                    self._hangup()
                elif (fault.details() or "").startswith(STORAGE):
                    self._tell(str(told))
            except ValueError:  # gRPC says so when its channel was closed meanwhile
                if not self._closing.is_set() and channel is self._line.channel:
                    raise
            again = self._await_welcome(seen, pause * (0.5 + secrets.randbelow(1000) / 1000))
            pause = _FIRST_PAUSE if again else min(MAX_PAUSE, 2 * pause)
        raise NetworkError("the connection was closed")

    def _await_welcome(self, seen: int, seconds: float) -> bool:
        """Wait, but not when the SuperLink welcomes the node again meanwhile; return whether it did."""
        with self._welcomed:
            self._welcomed.wait_for(lambda: self._welcomes != seen or self._closing.is_set(), seconds)
            return self._welcomes != seen
