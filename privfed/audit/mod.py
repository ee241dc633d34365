"""The property suite every mod must pass, ours and yours: `check_mod(mod)`.

It puts the mod between requests and replies of every dtype and shape that may travel and looks at what comes out. A
mod may change the values of arrays, and may turn a reply into an error; all else must come through as it went in. What
a mod remembers lives in `context.mod_state(name)`, so that it is stored, resumed and evicted with the node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from privfed.apps import Mod, compose, wrap
from privfed.array import Array
from privfed.context import Context
from privfed.message import Error, ErrorCode, Message
from privfed.record import ArrayRecord, ConfigRecord, ConfigValue, MetricRecord, MetricValue, Record, RecordDict
from privfed.update import RESERVED, UPDATE, is_finite, update_dtype

Problems = Iterator[str]

DTYPES = ("float16", "float32", "float64", "bfloat16", "int8", "uint8", "int32", "int64")
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (5,), (2, 3), (0, 3))
KINDS = ("train", "evaluate", "query", "train.warm_up")


class ModCheckFailed(AssertionError):
    """The mod breaks a property; `report.problems` says where."""

    def __init__(self, report: ModReport) -> None:
        self.report = report
        lines = [f"{check}: {problem}" for check, problem in report.problems]
        super().__init__(f"{report.mod} fails {len(lines)} checks:\n  " + "\n  ".join(lines))


@dataclass(frozen=True, slots=True)
class ModReport:
    """checks: names that ran. problems: (check, what went wrong)."""

    mod: str
    checks: tuple[str, ...]
    problems: tuple[tuple[str, str], ...]

    @property
    def passed(self) -> bool:
        return not self.problems


@dataclass(frozen=True, slots=True)
class Case:
    """A request, what the app answers to it, and how to say which case it is."""

    name: str
    kind: str
    request: RecordDict
    reply: RecordDict | Error

    def message(self) -> Message:
        """Return the request, with records of its own."""
        return Message(self.request.copy(), 1, self.kind)

    def app(self, calls: list[Message]) -> Callable[[Message, Context], Message]:
        """Return an app that notes what it was asked."""

        def answer(message: Message, context: Context) -> Message:
            calls.append(message)
            body = self.reply if isinstance(self.reply, Error) else self.reply.copy()
            return Message(body, reply_to=message)

        return answer


@dataclass(frozen=True, slots=True)
class Subject:
    """The mod under test. deterministic: equal inputs give equal outputs. refuses: it answers nothing but errors."""

    mod: Mod
    deterministic: bool
    refuses: bool
    withholds: bool = False


def check_mod(
    mod: Mod,
    *,
    deterministic: bool = True,
    refuses: bool = False,
    withholds: bool = False,
    raise_on_failure: bool = True,
) -> ModReport:
    """Check a mod: keys, shapes and dtypes, other records, shared requests, errors, hidden state, composition.

    deterministic: False for a mod that adds noise, whose outputs differ. refuses: True for a mod that must answer
    every plain message with an error, without asking the app. withholds: True for a mod that lets nothing leave but
    arrays and constants: what is beside the arrays must not depend on what the app put there, and a message that it
    refuses with an error need not reach the app. Returns a report; raises ModCheckFailed with it when a
    check fails, unless raise_on_failure is false.
    """
    subject = Subject(mod, deterministic, refuses, withholds)
    problems: list[tuple[str, str]] = []
    checks = REFUSALS if refuses else CHECKS
    for check in checks:
        name = check.__name__.removeprefix("_").replace("_", "-")
        try:
            problems += [(name, problem) for problem in check(subject)]
        except Exception as error:  # noqa: BLE001 - foreign code: whatever it raises is a finding
            problems.append((name, f"raised {type(error).__name__}: {error}"))
    report = ModReport(
        getattr(mod, "__qualname__", repr(mod)), tuple(c.__name__.strip("_") for c in checks), tuple(problems)
    )
    if raise_on_failure and not report.passed:
        raise ModCheckFailed(report)
    return report


def _array(dtype: str, shape: tuple[int, ...], fill: float) -> Array:
    count = int(np.prod(shape))
    values = (np.arange(count).reshape(shape) % 5 + 1) * fill
    if dtype == "bfloat16":
        return Array.from_float32_as_bfloat16(values.astype(np.float32))
    return Array(np.asarray(values, dtype))


def _case(name: str, arrays: ArrayRecord, answer: ArrayRecord, kind: str = "train") -> Case:
    settings: dict[str, ConfigValue] = {"server-round": 1, "rates": [0.1, 0.2]}
    notes: dict[str, ConfigValue] = {"text": "x", "flag": True}
    numbers: dict[str, MetricValue] = {"num-examples": 7, "loss": 0.5, "hits": [1, 2]}
    asked: dict[str, Record] = {"arrays": arrays, "config": ConfigRecord(settings)}
    answered: dict[str, Record] = {"arrays": answer, "metrics": MetricRecord(numbers), "notes": ConfigRecord(notes)}
    request, reply = RecordDict(asked), RecordDict(answered)
    return Case(name, kind, request, reply)


def _cases() -> Iterator[Case]:
    """Yield every dtype and shape alone, and all of them together, with small, large and no changes."""
    for change in (0.0, 1.0, 20.0):
        for dtype in DTYPES:
            shapes = {f"{dtype}{shape}": shape for shape in SHAPES}
            old = {key: _array(dtype, shape, 1) for key, shape in shapes.items()}
            new = {key: _array(dtype, shape, 1 + change) for key, shape in shapes.items()}
            yield _case(f"{dtype}, change {change:g}", ArrayRecord(old), ArrayRecord(new))
        mixed = {dtype: _array(dtype, (), 1) for dtype in DTYPES}
        moved = {dtype: _array(dtype, (), 1 + change) for dtype in DTYPES}
        yield _case(f"one 0-dimensional array of each dtype, change {change:g}", ArrayRecord(mixed), ArrayRecord(moved))
    only_empty = ArrayRecord([np.zeros(0, np.float32)])
    yield _case("one empty array", only_empty, only_empty)


def _clone(context: Context) -> Context:
    states = {name: state.copy() for name, state in context.mod_states.items()}
    return Context(context.run_id, context.node_id, dict(context.node_config), context.state.copy(), mod_states=states)


def _ask(mod: Mod, case: Case, context: Context | None = None, message: Message | None = None) -> Message:
    asked = message if message is not None else case.message()
    return mod(asked, context if context is not None else Context(node_id=1), case.app([]))


def _body(message: Message) -> RecordDict | Error:
    return message.content if message.has_content() else message.error


def _shape(subject: Subject) -> Problems:
    """Arrays keep their record, keys, order, shapes and dtypes; an update may hold int64 for other integers."""
    for case in _cases():
        reply = _ask(subject.mod, case)
        if not isinstance(case.reply, RecordDict) or reply.has_error():
            yield f"an ordinary reply became an error ({reply.error.reason if reply.has_error() else ''}): {case.name}"
            continue
        given, content = case.reply.array_records["arrays"], reply.content
        found = content.get("arrays")
        if not isinstance(found, ArrayRecord) or list(found) != list(given):
            yield f"keys changed or their order did: {case.name}"
            continue
        for key, array in given.items():
            allowed = {update_dtype(array.dtype)} if UPDATE in content else {array.dtype}
            if found[key].shape != array.shape or found[key].dtype not in allowed:
                yield f"{array!r} became {found[key]!r}: {case.name}"


def _other_records(subject: Subject) -> Problems:
    """Metrics and settings come through unchanged; added records have reserved names."""
    if subject.withholds:
        yield from _constant_records(subject)
        return
    for case in _cases():
        reply = _ask(subject.mod, case)
        if reply.has_error() or not isinstance(case.reply, RecordDict):
            continue
        for name, record in case.reply.items():
            if not isinstance(record, ArrayRecord) and reply.content.get(name) != record:
                yield f"record {name!r} changed: {case.name}"
        added = [n for n in reply.content if n not in case.reply and not n.startswith(RESERVED)]
        if added:
            yield f"records {added} were added: {case.name}"


def _constant_records(subject: Subject) -> Problems:
    """What leaves beside the arrays is the same whatever the app put there."""
    for case in _cases():
        if not isinstance(case.reply, RecordDict):
            continue
        other: dict[str, Record] = {"metrics": MetricRecord({"num-examples": 8, "loss": 0.25}), "more": ConfigRecord()}
        bare = Case(case.name, case.kind, case.request, RecordDict({"arrays": case.reply["arrays"], **other}))
        first, second = (_ask(subject.mod, one) for one in (case, bare))
        if first.has_error() or second.has_error():
            continue
        kept = [{n: r for n, r in reply.content.items() if n != "arrays"} for reply in (first, second)]
        if kept[0] != kept[1]:
            yield f"what left beside the arrays depends on what the app put there: {case.name}"


def _addressing(subject: Subject) -> Problems:
    """The answer is a reply to the request, and the app is asked once, about the same kind of message."""
    for kind in KINDS:
        base = next(_cases())
        case = Case(base.name, kind, base.request, base.reply)
        calls: list[Message] = []
        message = case.message()
        reply = subject.mod(message, Context(node_id=1), case.app(calls))
        if reply.metadata.reply_to_message_id != message.metadata.message_id:
            yield f"the answer to a {kind} message is no reply to it"
        if len(calls) != 1 and not (subject.withholds and not calls and reply.has_error()):
            yield f"the app was asked {len(calls)} times about a {kind} message"
        if any(call.metadata.message_type != kind for call in calls):
            yield f"the app was asked about another kind of message than {kind}"


def _shared_request(subject: Subject) -> Problems:
    """The request's records are shared by all nodes of a simulation, and are not changed."""
    for case in _cases():
        message = case.message()
        content = message.content
        _ask(subject.mod, case, message=message)
        if content != case.request:
            yield f"the request was changed in place: {case.name}"


def _errors_pass(subject: Subject) -> Problems:
    """An error stays that error."""
    base = next(_cases())
    failed = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "KeyError")
    for kind in KINDS:
        calls: list[Message] = []
        case = Case("an error", kind, base.request, failed)
        reply = subject.mod(case.message(), Context(node_id=1), case.app(calls))
        refused = subject.withholds and not calls
        if not reply.has_error() or (reply.error != failed and not refused):
            yield f"the error of a {kind} message became {_body(reply)!r:.80}"


def _not_a_number(subject: Subject) -> Problems:
    """NaN and infinity are refused or passed on, never repaired in silence; where all that leaves is noised, hidden."""
    old = ArrayRecord({"a": _array("float32", (5,), 1), "b": _array("float64", (), 1)})
    for value in (np.nan, np.inf, -np.inf):
        spoilt = ArrayRecord({"a": old["a"], "b": Array(np.array(value))})
        reply = _ask(subject.mod, _case(str(value), old, spoilt))
        finite = reply.has_content() and is_finite(reply.content.array_records["arrays"]["b"].compute())
        if finite and not subject.withholds:
            yield f"{value} became a finite number"


def _own_state(subject: Subject) -> Problems:
    """What the app keeps is not the mod's to change."""
    context = Context(node_id=1, state=RecordDict({"mine": ConfigRecord({"x": 1})}))
    for case in _cases():
        _ask(subject.mod, case, context)
    if context.state != RecordDict({"mine": ConfigRecord({"x": 1})}):
        yield "the app's own state was changed: use context.mod_state(name)"


def _hidden_state(subject: Subject) -> Problems:
    """Equal contexts and requests give equal answers, whatever other nodes asked in between."""
    if not subject.deterministic:
        return
    context = Context(node_id=1)
    for case in _cases():
        twin, message = _clone(context), case.message()
        first = _body(_ask(subject.mod, case, context, message))
        for other in range(2, 4):
            _ask(subject.mod, next(_cases()), Context(node_id=other))
        again = _body(
            _ask(subject.mod, case, twin, case.message().with_metadata(message_id=message.metadata.message_id))
        )
        if first != again:
            yield f"the same context and request gave another answer later: {case.name}"
            return
        if context.mod_states != twin.mod_states:
            yield f"the same context and request left another state behind: {case.name}"
            return


def _composition(subject: Subject) -> Problems:
    """compose(m) is m, the identity changes nothing, and grouping does not matter."""

    def identity(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        return call_next(message, context)

    mod = subject.mod
    if compose(mod) is not mod:
        yield "compose(mod) is not mod"
    variants = {
        "compose(mod, identity)": compose(mod, identity),
        "compose(identity, mod)": compose(identity, mod),
        "compose(compose(identity, mod), compose())": compose(compose(identity, mod), compose()),
    }
    if not subject.deterministic:
        return
    for case in _cases():
        wanted = _body(_ask(mod, case))
        for name, variant in variants.items():
            if _body(_ask(variant, case)) != wanted:
                yield f"{name} differs from mod: {case.name}"
        left, right = compose(compose(mod, mod), mod), compose(mod, compose(mod, mod))
        chained = _body(wrap([mod, mod, mod], case.app([]))(case.message(), Context(node_id=1)))
        if not _body(_ask(left, case)) == _body(_ask(right, case)) == chained:
            yield f"compose(compose(m, m), m) differs from compose(m, compose(m, m)): {case.name}"


def _refusal(subject: Subject) -> Problems:
    """A plain message gets an error, and the app is not asked."""
    for kind in KINDS:
        base = next(_cases())
        calls: list[Message] = []
        case = Case(base.name, kind, base.request, base.reply)
        reply = subject.mod(case.message(), Context(node_id=1), case.app(calls))
        if not reply.has_error():
            yield f"a plain {kind} message was answered"
        if calls:
            yield f"the app was asked about a plain {kind} message"


CHECKS: tuple[Callable[[Subject], Problems], ...] = (
    _shape,
    _other_records,
    _addressing,
    _shared_request,
    _errors_pass,
    _not_a_number,
    _own_state,
    _hidden_state,
    _composition,
)
REFUSALS: tuple[Callable[[Subject], Problems], ...] = (_refusal, _shared_request, _own_state, _hidden_state)
