"""Secure aggregation on a node: nothing leaves it but messages of a protocol that reveals only sums."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.apps import DEFAULT_ACTION, CallNext, Mod
from privfed.array import Array
from privfed.context import Context
from privfed.errors import PlanRefused
from privfed.message import Error, ErrorCode, Message
from privfed.mods.clipping import clip_record
from privfed.mods.level import Levels
from privfed.mods.participation import BEACON, Makers, as_drawn, make_protocol, place_of
from privfed.mods.refusal import (
    BindingMismatch,
    LayoutMismatch,
    NodePolicyTooWeak,
    NoiseMissing,
    Refused,
    SecureAggregationRequired,
    SessionOutOfOrder,
    SumAlreadyOpened,
    UpdateNotClipped,
    WeakSession,
    WeightMismatch,
)
from privfed.plan import joint_clip, tracked
from privfed.protocols.errors import DecodeError, ProtocolError, RemoteError
from privfed.protocols.session import FACTS, Identity, Policy
from privfed.record import ArrayRecord, ConfigRecord, ConfigValue, RecordDict
from privfed.ring import BUFFER, DEMANDS, NOISED, REMOVED, REPLY, REQUEST, SECURE, VECTOR, Layout, RingOverflow, bind
from privfed.update import (
    PLAN,
    NotFinite,
    UpdateError,
    arrays_of,
    dimension,
    is_update,
    norm,
    subtract,
    update_of,
    zeros_of,
)

log = logging.getLogger("privfed.mods")

STATE = "secure_aggregation"
KINDS = ("train", "evaluate", "query")
_SLACK = 1 + 2.0**-30
_MARK_BYTES = 16
# The session's own layout depends on the cohort, and so does its binding: the mark must not.
_ANY_LAYOUT = Layout(32, 2, 0, 1.0, None, ())

Identities = Identity | Callable[[Context], Identity | None] | None


class _Failed(Exception):
    """The app, or a mod inside, answered with an error."""

    def __init__(self, error: Error) -> None:
        self.error = error
        super().__init__(str(error))


@dataclass(frozen=True, slots=True)
class _Stage:
    """One stage's instruction, decoded. kind: the message's."""

    kind: str
    protocol: str
    parameters: dict[str, object]
    number: int
    stage: int
    binding: bytes
    layout: Layout
    with_input: bool
    arrays_key: str
    weight_key: str
    request: memoryview = field(repr=False)
    digest: bytes = b""
    keep: int | None = None

    @property
    def facts(self) -> bytes:
        """Hash of what must not change from stage to stage: a weaker parameter later would be a weaker session."""
        parameters = sorted(self.parameters.items())
        keys = self.arrays_key, self.weight_key
        what = (self.kind, self.protocol, parameters, self.binding, self.layout, keys)
        return hashlib.sha256(repr(what).encode()).digest()

    @classmethod
    def read(cls, message: Message) -> _Stage:
        """Decode; Refused when the instruction is malformed."""
        content, kind = message.content, message.metadata.message_type
        try:
            config = content.config_records[SECURE]
            array = content.array_records[REQUEST][BUFFER]
            layout = Layout.from_config(content.config_records[SECURE + ".layout"])
            given = content.config_records[SECURE + ".protocol"]
            parameters: dict[str, object] = {name: value for name, value in given.items() if name != "name"}
            state = hashlib.sha256(array.digest)
            state.update(repr((kind, list(config.items()), layout, list(given.items()))).encode())
            binding = config["binding"]
            if array.dtype != "uint8" or not isinstance(binding, bytes):
                raise TypeError("request or binding is malformed")
            return cls(
                kind=kind,
                protocol=str(given["name"]),
                parameters=parameters,
                number=int(str(config["number"])),
                stage=int(str(config["stage"])),
                binding=binding,
                layout=layout,
                with_input=bool(config["input"]),
                arrays_key=str(config["arrays-key"]),
                weight_key=str(config["weight-key"]),
                request=array.data,
                digest=state.digest(),
                keep=int(str(config["keep"])) if "keep" in config else None,
            )
        except (KeyError, TypeError, ValueError) as cause:
            raise Refused(f"the instruction is no stage of a session: {cause!r}") from cause


def secure_aggregation(
    policy: Policy | None = None,
    *,
    identity: Identities = None,
    protocols: Makers | None = None,
    kinds: tuple[str, ...] = KINDS,
) -> Mod:
    """Let updates, weights and metrics leave this node only masked; make it the outermost mod.

    policy: what this node refuses, whatever the server asks. identity: its long-term key for active security, or a
    function of the context; None takes the one the runtime gives the node (a simulation makes one for each).
    protocols: those it takes part in, by name (default: `privfed.protocols`): a class, whose parameters the server
    names, or an instance, which pins them: `{"SecAgg": SecAgg(threshold=20)}`. kinds: the messages that are protected;
    one in the clear is refused, it gets no reply but an error. Messages of other kinds pass.

    The app runs only at the stage that needs its reply, after the key stages succeeded. Its update must be finite, fit
    the model, the public ranges of the layout and the plan's clip. The session's state lives in the node's context; an
    identical redelivery gets the same bytes, another request of the same stage is refused, and so is all that
    follows a request that broke the protocol's rules. A session must be of the context's run, the message's kind and
    the layout's ring and size, whatever the request says. A node helps to open one sum for each model and action of a
    run (for a query: for each question); a session that failed before its last stage may be tried again. A server
    that changes the model by a bit asks for another sum: against that only noise helps.

    Inside another one, as where the node masks around the app's process, it stands aside if that one's policy is at
    least as strict as its own, and refuses otherwise.
    """
    rules = policy if policy is not None else Policy()
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ValueError(f"kinds must be among {', '.join(KINDS)}, got {', '.join(unknown)}")

    def mask_reply(message: Message, context: Context, call_next: CallNext) -> Message:
        if message.metadata.message_type.partition(".")[0] not in kinds:
            return call_next(message, context)
        try:
            if SECURE not in message.content and context.masked is not None:
                if identity is not None or protocols is not None or not _covers(context.masked, rules):
                    raise NodePolicyTooWeak(f"the node masks under {context.masked}, this mod asks for {rules}")
                return call_next(message, context)
            if SECURE not in message.content:
                raise SecureAggregationRequired(f"a {message.metadata.message_type} message came in the clear")
            session = _Session(message, context, _under(rules, call_next))
            return session.answer(rules, identity, protocols)
        except _Failed as failed:
            return Message(failed.error, reply_to=message)
        except (Refused, PlanRefused, ProtocolError) as cause:
            log.warning("node %d refuses: %s: %s", context.node_id, type(cause).__name__, cause)
            return Message(Error(ErrorCode.POLICY_REFUSED, type(cause).__name__), reply_to=message)
        except (UpdateError, RingOverflow) as cause:
            log.warning("node %d: nothing was masked: %s", context.node_id, cause)
            return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, type(cause).__name__), reply_to=message)

    return mask_reply


def _covers(outer: Policy, inner: Policy) -> bool:
    """Return whether everything that `inner` refuses, `outer` refuses."""
    floors = (
        "min_cohort",
        "min_survivors",
        "min_threshold",
        "min_neighbours",
        "min_bits",
        "require_active",
        "grouped",
        "min_round",
        "corrupt",
    )
    higher = all(getattr(outer, name) >= getattr(inner, name) for name in floors)
    names = (*FACTS, "binding", "nodes", "committee", "weight_key")
    known = all(getattr(inner, name) in (None, getattr(outer, name)) for name in names)
    return higher and known and outer.max_dimension <= inner.max_dimension


def _under(policy: Policy, call_next: CallNext) -> CallNext:
    """Let what is called know that its reply is masked before it leaves the node."""

    def call(message: Message, context: Context) -> Message:
        before, context.masked = context.masked, policy
        try:
            return call_next(message, context)
        finally:
            context.masked = before

    return call


class _Session:
    """One instruction against what the node remembers of the session."""

    def __init__(self, message: Message, context: Context, call_next: CallNext) -> None:
        self._message, self._context, self._call_next = message, context, call_next
        self._stage = _Stage.read(message)
        self._state = context.mod_state(STATE)
        self._mark = b""
        self._levels = Levels(self._state)

    def answer(self, policy: Policy, identity: Identities, protocols: Makers | None) -> Message:
        """Answer the stage once, or again with the same bytes."""
        stage = self._stage
        last = self._state.get("session")
        kept = b""
        if isinstance(last, ConfigRecord):
            if last["digest"] == stage.digest:
                return self._reply()
            kept = self._continue(last)
            if kept:
                self._mark = bytes(last["mark"]) if isinstance(last["mark"], bytes) else b""
        elif stage.stage != 0:
            raise SessionOutOfOrder(f"stage {stage.stage} of a session this node did not join")
        if stage.stage == 0:
            policy = self._with_facts(policy)
            if stage.protocol == BEACON:
                kept = self._drawn(place_of(stage.parameters))
            else:
                policy = as_drawn(policy, stage.parameters, self._drawn)
            self._levels.forget()
        floor = max(policy.min_survivors, stage.layout.min_survivors, self._levels.floor(stage.stage, stage.keep))
        policy = replace(policy, min_survivors=floor)
        protocol = make_protocol(stage.protocol, stage.parameters, protocols, policy)
        known = identity(self._context) if callable(identity) else identity or self._context.identity()
        client = protocol.client(self._context.node_id, identity=known, policy=policy)
        try:
            after, reply = client.step(kept, stage.request, self._source)
            if stage.with_input and not self._mark:  # a member of a committee that gives no input helps to open it
                self._admit()
        except (RemoteError, DecodeError) as cause:
            if kept and isinstance(last, ConfigRecord):  # a server that broke a rule gets no second try
                self._state["session"] = ConfigRecord({**last, "kept": b""})
                self._context.lasting.add(STATE)
            if isinstance(cause, DecodeError):
                raise Refused(f"the request does not decode: {cause}") from cause
            raise
        # After the last stage nothing secret is needed again; the reply is, for a redelivery.
        over = stage.stage + 1 == len(protocol.stages)
        if over and not self._mark and stage.protocol != BEACON:
            raise SessionOutOfOrder("a sum would be opened over a model that this node was not shown")
        self._levels.answered(stage.keep, over=over)
        remembered: dict[str, ConfigValue] = {
            "number": stage.number,
            "stage": stage.stage,
            "digest": stage.digest,
            "facts": stage.facts,
            "kept": b"" if over else bytes(after),
            "mark": self._mark,
        }
        if stage.protocol == BEACON:  # what was drawn outlives the session that drew it
            self._state[place_of(stage.parameters)] = ConfigRecord({"kept": bytes(after)})
        if over:
            self._state["opened"] = ConfigRecord({"marks": self._opened() + self._mark})
        self._state["session"] = ConfigRecord(remembered)
        view = memoryview(reply).cast("B")
        self._state["reply"] = ArrayRecord({BUFFER: Array("uint8", (view.nbytes,), "raw", view)})
        return self._reply()

    def _with_facts(self, policy: Policy) -> Policy:
        """Return the policy for this session only: the one of this run, message and layout, whatever the request says.

        The run is the one whose state this node looked up: a session under another run's id would escape its marks.
        The round is the number, which rises. What the node's own policy says must hold as well.
        """
        stage, layout = self._stage, self._stage.layout
        if policy.binding not in (None, stage.binding):
            raise BindingMismatch("the session is bound to another model or configuration than this node's policy")
        if layout.max_weight is not None and policy.weight_key not in (None, stage.weight_key):
            raise WeightMismatch(f"weighed by {stage.weight_key!r}, this node's policy has {policy.weight_key!r}")
        own = (self._context.run_id, stage.number, stage.kind, layout.bits, layout.size)
        for name, value in zip(FACTS, own, strict=True):
            if getattr(policy, name) not in (None, value):
                raise Refused(f"the session's {name} is {value!r}, this node's policy has {getattr(policy, name)!r}")
        run, number, action, bits, size = own
        return replace(policy, run=run, round=number, action=action, bits=bits, dimension=size, binding=stage.binding)

    def _continue(self, last: ConfigRecord) -> bytes:
        """Return the kept state this stage continues, b"" for a new session; SessionOutOfOrder otherwise."""
        stage, number, done = self._stage, int(str(last["number"])), int(str(last["stage"]))
        if stage.stage == 0 and stage.number > number:
            return b""
        if stage.number != number or stage.stage != done + 1 or stage.facts != last["facts"]:
            raise SessionOutOfOrder(
                f"session {stage.number} stage {stage.stage} was asked after session {number} stage {done}"
            )
        kept = last["kept"]
        if not isinstance(kept, bytes) or not kept:
            raise SessionOutOfOrder(f"session {number} is over")
        return kept

    def _drawn(self, place: str) -> bytes:
        """Return what this node kept of the run's beacons of a kind."""
        record = self._state.get(place)
        kept = record["kept"] if isinstance(record, ConfigRecord) else b""
        assert isinstance(kept, bytes)
        return kept

    def _opened(self) -> bytes:
        """Return the marks of the sums this node helped to open in this run, one after the other."""
        record = self._state.get("opened")
        marks = record["marks"] if isinstance(record, ConfigRecord) else b""
        assert isinstance(marks, bytes)
        return marks

    def _check_layout(self, inner: RecordDict) -> None:
        """Refuse a layout for another model before the app runs. Integers are padded, and checked when they come."""
        layout = self._stage.layout
        if layout.integers or not layout.dimension:
            return
        size = dimension(tracked(arrays_of(inner, self._stage.arrays_key), _clip_of(inner)[1]))
        if size != layout.dimension:
            raise LayoutMismatch(f"the model has {size} elements, the layout {layout.dimension}")

    def _open_once(self, kind: str, inner: RecordDict) -> None:
        """Refuse the input for a model and action whose sum was opened. A query's question is all of its content."""
        asked = inner
        kind = kind.removesuffix("." + DEFAULT_ACTION)  # the app hears both names alike
        if kind.partition(".")[0] != "query":
            asked = RecordDict({"arrays": arrays_of(inner, self._stage.arrays_key)})
        self._mark = bind(asked, _ANY_LAYOUT, kind)[:_MARK_BYTES]
        opened = self._opened()
        if self._mark in {opened[at : at + _MARK_BYTES] for at in range(0, len(opened), _MARK_BYTES)}:
            raise SumAlreadyOpened(f"a {kind} sum over this model was opened in this run")

    def _reply(self) -> Message:
        content = RecordDict({REPLY: self._state["reply"]})
        removed = self._levels.removed
        if removed is not None:
            content[REMOVED] = removed
        return Message(content, reply_to=self._message)

    def _admit(self) -> RecordDict:
        """Return what the app is asked, once it is what the session is for and no sum over it was opened."""
        stage, message, kind = self._stage, self._message, self._stage.kind
        if not stage.with_input:
            raise SessionOutOfOrder("the protocol asks for the input at a stage that came without the instructions")
        keys, group = (stage.arrays_key, stage.weight_key), message.metadata.group_id
        told = bind(message.content, stage.layout, kind, keys=keys, shared=self._context.shared, group=group)
        if told != stage.binding:
            raise BindingMismatch("the model, configuration or settings differ from what the session was opened for")
        inner = RecordDict({name: record for name, record in message.content.items() if not _is_session(name)})
        self._check_layout(inner)
        self._open_once(kind, inner)
        return inner

    def _source(self) -> NDArray[np.uint64]:
        """Run the app and return its reply as a ring vector."""
        stage, inner = self._stage, self._admit()
        reply = self._call_next(self._message.with_content(inner), self._context)
        if reply.has_error():
            raise _Failed(reply.error)
        if stage.layout.integers:
            return self._noised(reply.content)
        metrics = _numbers(reply.content)
        weight = metrics.get(stage.weight_key) if stage.layout.max_weight is not None else 1.0
        if not isinstance(weight, int | float):
            raise RingOverflow(f"metric {stage.weight_key!r}, the weight, is {weight!r}")
        update = None
        try:
            update = self._update(inner, reply.content) if stage.layout.dimension else None
        except NotFinite as cause:  # a server that picks the model would read data from who refuses
            log.warning("node %d counts for nothing in this sum: %s", self._context.node_id, cause)
            update, weight = zeros_of(tracked(arrays_of(inner, stage.arrays_key), _clip_of(inner)[1])), math.nan
        return stage.layout.encode(update, float(weight), metrics)

    def _noised(self, reply: RecordDict) -> NDArray[Any]:
        """Return the vector that the node made itself, if the session keeps what it was made for."""
        record, demands = reply.get(NOISED), reply.get(DEMANDS)
        if not isinstance(record, ArrayRecord) or not isinstance(demands, ConfigRecord):
            raise NoiseMissing("the reply has no vector with noise in it")
        layout = self._stage.layout
        if layout.bits != demands["bits"] or layout.min_survivors < int(str(demands["min-survivors"])):
            raise WeakSession(f"the vector is for {dict(demands)}, the session has {layout}")
        self._levels.keep(demands, self._stage.stage)
        return layout.admit(record[VECTOR].view())

    def _update(self, request: RecordDict, reply: RecordDict) -> ArrayRecord:
        received, arrays = arrays_of(request, self._stage.arrays_key), arrays_of(reply, self._stage.arrays_key)
        clip, weight = _clip_of(request)
        if is_update(reply):
            update = update_of(arrays, tracked(received, weight), update=True, silent=False)
        elif math.isfinite(clip):  # whatever its norm: whether it is refused must not tell
            raise UpdateNotClipped(f"the plan clips to {clip:g}, and no mods.clip() made this update")
        else:
            update = subtract(arrays, received)
        if not norm(update) <= joint_clip(clip, weight) * _SLACK:  # an app's own update; a refusal would tell its norm
            log.warning("the update's norm is %g, and is clipped to the plan's %g", norm(update), clip)
            update = clip_record(update, joint_clip(clip, weight))
        return update


def _clip_of(request: RecordDict) -> tuple[float, float]:
    """Return the plan's bound on an update, infinity without a plan, and the weight of its bit."""
    plan = request.get(PLAN)
    if not isinstance(plan, ConfigRecord):
        return math.inf, 0.0
    try:
        clip, weight = float(str(plan["clip"])), float(str(plan.get("bit-weight", 0.0)))
    except (KeyError, ValueError) as cause:
        raise Refused(f"the plan in the message has no clip: {cause!r}") from cause
    if not (clip > 0 and 0 <= weight < math.inf):
        raise Refused(f"the plan in the message clips to {clip:g}, with a bit of weight {weight:g}")
    return clip, weight


def _is_session(name: str) -> bool:
    return name == SECURE or name.startswith(SECURE + ".")


def _numbers(content: RecordDict) -> dict[str, object]:
    found: dict[str, object] = {}
    for record in content.metric_records.values():
        for name, value in record.items():
            found.setdefault(name, value)
    return found
