"""Drive one session of a protocol through a Grid, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from privfed.array import Array
from privfed.message import Message
from privfed.protocols.errors import DecodeError, RemoteError
from privfed.protocols.session import Buffer, Protocol, Server, Session
from privfed.record import ArrayRecord, ConfigRecord, ConfigValue, RecordDict
from privfed.ring import BUFFER, REMOVED, REPLY, REQUEST, SECURE, Layout
from privfed.strategies.exchange import MESSAGE_BUDGET, Exchange, SharedNoise, stream_replies
from privfed.strategies.reply import BadReply, content_of
from privfed.strategies.view import Exclusion, Outcome

MIN_WINDOW, MAX_WINDOW = 4, 1024
INPUT_STAGES = ("mask", "send")


def input_stage(protocol: Protocol) -> str | None:
    """Return the stage at which nodes are asked for their input; None when unknown: then it may be any."""
    named = getattr(protocol, "input_stage", None)
    if isinstance(named, str):
        return named
    return next((stage for stage in protocol.stages if stage in INPUT_STAGES), None)


class SessionDrive:
    """The server's side of one session: requests out, replies in, exclusions noted.

    Raises LocalError when the protocol does not suit the session's cohort.
    """

    def __init__(
        self, exchange: Exchange, protocol: Protocol, session: Session, layout: Layout, description: ConfigRecord
    ) -> None:
        self.outcome = Outcome()
        self.server: Server = protocol.server(session)
        self._exchange = exchange
        self._session = session
        self._layout = layout
        self._stages = protocol.stages
        self._input = input_stage(protocol)
        self._shared = RecordDict({SECURE + ".layout": layout.to_config()})
        self._shared[SECURE + ".protocol"] = description
        self._requests: dict[int, Buffer] = {}
        self._silent: set[int] = set()
        self.inputs = 0  # of nodes whose input the server has taken
        self.keep: int | None = None  # the level of drops above which nodes give their noise away

    @property
    def binding(self) -> bytes:
        """What makes this session this one: the model and configuration it is bound to, and its number."""
        return self._session.binding + self._session.round.to_bytes(8, "big")

    @property
    def session(self) -> Session:
        """What all parties agree on."""
        return self._session

    @property
    def takes_input(self) -> bool:
        """Whether the open stage may be the one at which nodes train."""
        return self._input in (None, self.server.stage)

    def patience(self, stage_timeout: float) -> float:
        """Return the seconds the open stage may take.

        The exchange's deadline is that of the inputs. Stages before them leave them a share of what is left; stages
        after them have `stage_timeout` each, or one node that is late with its input would spoil the others' sum.
        """
        left, stages = self._exchange.remaining, self._stages
        if self._input is None:
            return left if self.server.stage == stages[0] else max(left, stage_timeout)
        if self._input not in stages:  # a beacon, which comes before a session
            return min(stage_timeout, left / (len(stages) + 1))
        before = stages.index(self._input) - stages.index(self.server.stage)
        if before < 0:
            return stage_timeout
        return min(stage_timeout, left / (before + 1)) if before else left

    def open(self, timeout: float) -> Iterator[Message]:
        """Yield the requests of the open stage, which nodes must answer within `timeout` seconds."""
        self._requests = self.server.outbound()
        self._silent = set(self._requests)
        return self._messages(timeout)

    def take(self, node: int, message: Message) -> None:
        """Take a node's reply, or exclude it."""
        stage = self.server.stage
        self._silent.discard(node)
        try:
            self.server.receive(node, self._buffer(message))
            self.inputs += stage == self._input and node in self._session.nodes
            if self._exchange.noise is not None and stage == self._stages[-1]:
                self._take_removed(node, message, self._exchange.noise)
        except BadReply as cause:
            self._exclude(node, f"stage {stage}: {cause}")
        except RemoteError as cause:
            self._exclude(node, f"stage {stage}: {cause.deviation}")
        except DecodeError:
            self._exclude(node, f"stage {stage}: malformed reply")

    def _take_removed(self, node: int, message: Message, noise: SharedNoise) -> None:
        """Take the keys that a node gives away, if they are what was asked for; without them more noise stays."""
        record = message.content.get(REMOVED)
        keys = record.get("keys") if isinstance(record, ConfigRecord) else None
        if self.keep is None or not isinstance(keys, list):
            return
        given = tuple(key for key in keys if isinstance(key, bytes) and len(key) == 32)
        if len(given) == len(noise.parameters.components) - 1 - self.keep:
            noise.removed[node] = self.keep, given

    def close(self) -> None:
        """End the stage. Raises TooFewSurvivors or RemoteError, which end the session."""
        for node in sorted(self._silent):
            self._exclude(node, f"stage {self.server.stage}: no reply before the deadline")
        self.server.close()

    @property
    def counts(self) -> tuple[int, int]:
        """Nodes asked and answered in the open stage."""
        return len(self._requests), len(self._requests) - len(self._silent)

    def _exclude(self, node: int, cause: str) -> None:
        self.outcome.excluded.append(Exclusion(node, cause))

    def _messages(self, timeout: float) -> Iterator[Message]:
        exchange = self._exchange
        head = RecordDict(dict(self._shared))
        head[SECURE] = ConfigRecord(self._header())
        if self.takes_input:
            head.update(exchange.content)
        contents: dict[int, tuple[RecordDict, int]] = {}
        ttl, group = max(timeout, 0.001), str(exchange.round)
        for node, request in sorted(self._requests.items()):
            if id(request) not in contents:  # equal requests are one object, and are sent once
                view = memoryview(request).cast("B")
                content = RecordDict(dict(head))
                content[REQUEST] = ArrayRecord({BUFFER: Array("uint8", (view.nbytes,), "raw", view)})
                contents[id(request)] = content, content.count_bytes()
            content, size = contents[id(request)]
            self.outcome.bytes_down += size
            yield Message(content, node, exchange.kind, ttl=ttl, group_id=group)

    def _header(self) -> dict[str, ConfigValue]:
        header: dict[str, ConfigValue] = {
            "number": self._session.round,
            "stage": self._stages.index(self.server.stage),
            "binding": self._session.binding,
            "input": self.takes_input,
            "arrays-key": self._exchange.arrays_key,
            "weight-key": self._exchange.weight_key or "",
        }
        if self.keep is not None:
            header["keep"] = self.keep
        return header

    def _buffer(self, message: Message) -> memoryview:
        content = content_of(message)
        self.outcome.bytes_up += content.count_bytes()
        record = content.get(REPLY)
        array = record.get(BUFFER) if isinstance(record, ArrayRecord) else None
        if array is None or array.dtype != "uint8":
            raise BadReply("the reply is not masked: give the ClientApp mods.secure_aggregation()")
        return array.data


def run_stage(exchange: Exchange, drives: Mapping[int, SessionDrive], size: int, stage_timeout: float) -> None:
    """Run one stage of several sessions at once (of one, mostly); the caller closes them.

    drives: by node. size: entries of a masked vector, which bounds how many replies may be on their way.
    """
    sessions = list({id(drive): drive for drive in drives.values()}.values())
    stage = sessions[0].server.stage
    timeout = max(drive.patience(stage_timeout) for drive in sessions)
    window = max(MIN_WINDOW, min(MAX_WINDOW, MESSAGE_BUDGET // (8 * size + 1)))
    down, up = _traffic(sessions)
    facts = {"round": exchange.round, "kind": exchange.kind, "stage": stage}
    exchange.grid.recorder.report("asking", **facts, timeout=round(timeout, 3))
    requests = (message for drive in sessions for message in drive.open(timeout))
    for node, message in stream_replies(exchange.grid, requests, timeout=timeout, window=window):
        drives[node].take(node, message)
    asked, answered = (sum(values) for values in zip(*(drive.counts for drive in sessions), strict=True))
    total_down, total_up = _traffic(sessions)
    exchange.grid.recorder.report(
        "stage",
        **facts,
        sessions=len(sessions),
        asked=asked,
        answered=answered,
        bytes_down=total_down - down,
        bytes_up=total_up - up,
    )


def _traffic(drives: list[SessionDrive]) -> tuple[int, int]:
    return sum(d.outcome.bytes_down for d in drives), sum(d.outcome.bytes_up for d in drives)
