"""Drive one session of a protocol through a Grid, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from privfed.array import Array
from privfed.message import Message
from privfed.protocols.errors import DecodeError, RemoteError
from privfed.protocols.session import Buffer, Protocol, Server, Session
from privfed.record import ArrayRecord, ConfigRecord, ConfigValue, RecordDict
from privfed.ring import BUFFER, REPLY, REQUEST, SECURE, Layout
from privfed.strategies.exchange import MESSAGE_BUDGET, Exchange
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
    """The server's side of one session: requests out, replies in, exclusions noted."""

    def __init__(
        self, exchange: Exchange, protocol: Protocol, session: Session, layout: Layout, description: ConfigRecord
    ) -> None:
        self.outcome = Outcome()
        self._exchange = exchange
        self._session = session
        self._layout = layout
        self._stages = protocol.stages
        self._input = input_stage(protocol)
        self._shared = RecordDict({SECURE + ".layout": layout.to_config()})
        self._shared[SECURE + ".protocol"] = description

    def run_stage(self, server: Server, stage_timeout: float) -> None:
        """Ask, take replies until all are there or the time is up, and close the stage."""
        stage, exchange = server.stage, self._exchange
        with_input = self._input in (None, stage)
        timeout = exchange.remaining if self._input == stage else min(stage_timeout, exchange.remaining)
        requests = server.outbound()
        down, up = self.outcome.bytes_down, self.outcome.bytes_up
        silent = set(requests)
        # A masked vector takes up to 8 bytes an entry; so many replies may be on their way at once.
        window = max(MIN_WINDOW, min(MAX_WINDOW, MESSAGE_BUDGET // (8 * self._layout.size + 1)))
        for message in exchange.grid.stream(
            self._messages(requests, stage, with_input), timeout=timeout, window=window
        ):
            node = message.metadata.src_node_id
            silent.discard(node)
            try:
                server.receive(node, self._buffer(message))
            except BadReply as cause:
                self._exclude(node, f"stage {stage}: {cause}")
            except RemoteError as cause:
                self._exclude(node, f"stage {stage}: {cause.deviation}")
            except DecodeError:
                self._exclude(node, f"stage {stage}: malformed reply")
        for node in sorted(silent):
            self._exclude(node, f"stage {stage}: no reply before the deadline")
        exchange.grid.recorder.report(
            "stage",
            round=exchange.round,
            kind=exchange.kind,
            stage=stage,
            asked=len(requests),
            answered=len(requests) - len(silent),
            bytes_down=self.outcome.bytes_down - down,
            bytes_up=self.outcome.bytes_up - up,
        )
        server.close()

    def _exclude(self, node: int, cause: str) -> None:
        self.outcome.excluded.append(Exclusion(node, cause))

    def _messages(self, requests: Mapping[int, Buffer], stage: str, with_input: bool) -> Iterator[Message]:
        exchange = self._exchange
        values: dict[str, ConfigValue] = {
            "number": self._session.round,
            "stage": self._stages.index(stage),
            "binding": self._session.binding,
            "input": with_input,
            "arrays-key": exchange.arrays_key,
            "weight-key": exchange.weight_key or "",
        }
        head = RecordDict(dict(self._shared))
        head[SECURE] = ConfigRecord(values)
        if with_input:
            head.update(exchange.content)
        contents: dict[int, tuple[RecordDict, int]] = {}
        ttl, group = max(exchange.remaining, 0.001), str(exchange.round)
        for node, request in sorted(requests.items()):
            if id(request) not in contents:  # equal requests are one object, and are sent once
                view = memoryview(request).cast("B")
                content = RecordDict(dict(head))
                content[REQUEST] = ArrayRecord({BUFFER: Array("uint8", (view.nbytes,), "raw", view)})
                contents[id(request)] = content, content.count_bytes()
            content, size = contents[id(request)]
            self.outcome.bytes_down += size
            yield Message(content, node, exchange.kind, ttl=ttl, group_id=group)

    def _buffer(self, message: Message) -> memoryview:
        content = content_of(message)
        self.outcome.bytes_up += content.count_bytes()
        record = content.get(REPLY)
        array = record.get(BUFFER) if isinstance(record, ArrayRecord) else None
        if array is None or array.dtype != "uint8":
            raise BadReply("the reply is not masked: give the ClientApp mods.secure_aggregation()")
        return array.data
