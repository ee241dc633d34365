"""Messages: what travels between the server app and the nodes."""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass, replace
from typing import overload

from privfed.record import RecordDict

DEFAULT_TTL = 43_200.0
"""Seconds a message waits for its node before it expires: 12 hours."""

SERVER_NODE_ID = 0
_TYPE = re.compile(r"(train|evaluate|query|system)(\.[A-Za-z_][A-Za-z0-9_]*)?")


class MessageType:
    """The kinds of message an app handles; an action may follow a dot: "train.warm_up"."""

    TRAIN = "train"
    EVALUATE = "evaluate"
    QUERY = "query"
    SYSTEM = "system"


class ErrorCode:
    """Why a node has no answer. Only the code and a class name leave a node, never a text or a traceback."""

    UNKNOWN = 0
    LOAD_CLIENT_APP_EXCEPTION = 1
    CLIENT_APP_RAISED_EXCEPTION = 2
    MESSAGE_UNAVAILABLE = 3
    REPLY_MESSAGE_UNAVAILABLE = 4
    NODE_UNAVAILABLE = 5
    MOD_FAILED_PRECONDITION = 6
    INVALID_REPLY = 7
    POLICY_REFUSED = 8


@dataclass(frozen=True, slots=True)
class Error:
    """An answer that is no result: a code from ErrorCode and a short reason."""

    code: int
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Metadata:
    """Where a message comes from and goes to. Times are seconds since the epoch; ttl is seconds."""

    run_id: int
    message_id: str
    src_node_id: int
    dst_node_id: int
    reply_to_message_id: str
    group_id: str
    created_at: float
    ttl: float
    message_type: str
    delivered_at: float = 0.0

    @property
    def expires_at(self) -> float:
        """Seconds since the epoch after which the message is not delivered."""
        return self.created_at + self.ttl


class Message:
    """Content or an error, with metadata.

    `Message(content, dst_node_id, message_type, *, ttl=None, group_id="")` is an instruction;
    `Message(content_or_error, reply_to=message)` is the answer to one. The runtime fills in run and source.
    """

    __slots__ = ("_content", "_error", "metadata")

    metadata: Metadata
    _content: RecordDict | None
    _error: Error | None

    @overload
    def __init__(
        self,
        content: RecordDict,
        dst_node_id: int,
        message_type: str,
        *,
        ttl: float | None = None,
        group_id: str = "",
    ) -> None: ...

    @overload
    def __init__(self, content: RecordDict | Error, *, reply_to: Message, ttl: float | None = None) -> None: ...

    def __init__(
        self,
        content: RecordDict | Error,
        dst_node_id: int | None = None,
        message_type: str | None = None,
        *,
        ttl: float | None = None,
        group_id: str = "",
        reply_to: Message | None = None,
    ) -> None:
        if not isinstance(content, RecordDict | Error):
            raise TypeError(f"content must be a RecordDict or an Error, got {type(content).__name__}")
        if ttl is not None and not ttl > 0:
            raise ValueError(f"ttl must be > 0 seconds, got {ttl}")
        self._content = content if isinstance(content, RecordDict) else None
        self._error = content if isinstance(content, Error) else None
        if reply_to is not None:
            if dst_node_id is not None or message_type is not None:
                raise TypeError("a reply takes its destination and type from reply_to")
            self.metadata = _reply_metadata(reply_to.metadata, ttl)
            return
        if dst_node_id is None or message_type is None:
            raise TypeError("Message takes (content, dst_node_id, message_type) or (content, reply_to=message)")
        if isinstance(content, Error):
            raise TypeError("an instruction carries a RecordDict; an Error can only be a reply")
        if not _TYPE.fullmatch(message_type):
            raise ValueError(f"message_type {message_type!r} is not train, evaluate or query (with .action)")
        self.metadata = Metadata(
            run_id=0,
            message_id=new_message_id(),
            src_node_id=SERVER_NODE_ID,
            dst_node_id=dst_node_id,
            reply_to_message_id="",
            group_id=group_id,
            created_at=time.time(),
            ttl=DEFAULT_TTL if ttl is None else ttl,
            message_type=message_type,
        )

    @classmethod
    def restore(cls, metadata: Metadata, content: RecordDict | Error) -> Message:
        """Build a message from its parts, as a decoder does."""
        message = cls.__new__(cls)
        message.metadata = metadata
        message._content = content if isinstance(content, RecordDict) else None
        message._error = content if isinstance(content, Error) else None
        return message

    def with_content(self, content: RecordDict | Error) -> Message:
        """Return a message with the same metadata and other content."""
        return Message.restore(self.metadata, content)

    def with_metadata(self, **changes: str | int | float) -> Message:
        """Return a message with the same content and some metadata fields replaced."""
        metadata = replace(self.metadata, **changes)  # type: ignore[arg-type]  # dataclasses.replace checks names
        return Message.restore(metadata, self._body)

    @property
    def _body(self) -> RecordDict | Error:
        return self._content if self._content is not None else self.error

    def has_content(self) -> bool:
        """Return whether the message carries records."""
        return self._content is not None

    def has_error(self) -> bool:
        """Return whether the message carries an error."""
        return self._error is not None

    @property
    def content(self) -> RecordDict:
        """The records. Raises ValueError when the message carries an error."""
        if self._content is None:
            raise ValueError(f"the message carries an error, not content: {self._error}")
        return self._content

    @content.setter
    def content(self, value: RecordDict) -> None:
        if self._content is None:
            raise ValueError("the message carries an error, its content cannot be set")
        self._content = value

    @property
    def error(self) -> Error:
        """The error. Raises ValueError when the message carries content."""
        if self._error is None:
            raise ValueError("the message carries content, not an error")
        return self._error

    def __repr__(self) -> str:
        kind = f"error={self._error}" if self._error else f"records={list(self._content or ())}"
        data = self.metadata
        return f"Message({data.message_type}, {data.src_node_id} -> {data.dst_node_id}, {kind})"


def new_message_id() -> str:
    """Return 128 random bits in hex."""
    return secrets.token_hex(16)


def _reply_metadata(request: Metadata, ttl: float | None) -> Metadata:
    now = time.time()
    # A reply must not outlive its request.
    limit = max(request.expires_at - now, 0.001)
    return Metadata(
        run_id=request.run_id,
        message_id=new_message_id(),
        src_node_id=request.dst_node_id,
        dst_node_id=request.src_node_id,
        reply_to_message_id=request.message_id,
        group_id=request.group_id,
        created_at=now,
        ttl=limit if ttl is None else min(ttl, limit),
        message_type=request.message_type,
    )
