"""The property suite every secure-aggregation protocol must pass, ours and yours: `check_protocol(protocol)`.

It drives the protocol's two roles in this process with fixed randomness, first honestly under every pattern of
vanishing nodes, then with a server or a network that truncates, extends, repeats, reorders and swaps messages, and
asks for what a node's policy forbids. It looks only at what the contract in `privfed.protocols.session` promises.
A protocol that passes can still be insecure: secrecy needs a proof. One that fails is broken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations_with_replacement, product
from typing import Any

import numpy as np

from privfed.audit.rehearsal import Rehearsal, Role, Stage
from privfed.protocols.errors import DecodeError, LocalError, ProtocolError, RemoteError, TooFewSurvivors
from privfed.protocols.session import FACTS, Policy, Protocol

Problems = Iterator[str]


class CheckFailed(AssertionError):
    """The protocol breaks the contract; `report.problems` says where."""

    def __init__(self, report: Report) -> None:
        self.report = report
        lines = [f"{check}: {problem}" for check, problem in report.problems]
        super().__init__(f"{report.protocol} fails {len(lines)} checks:\n  " + "\n  ".join(lines))


@dataclass(frozen=True, slots=True)
class Report:
    """checks: names that ran. problems: (check, what went wrong). sessions: how many were driven."""

    protocol: str
    checks: tuple[str, ...]
    problems: tuple[tuple[str, str], ...]
    sessions: int

    @property
    def passed(self) -> bool:
        return not self.problems


def check_protocol(
    protocol: Protocol,
    *,
    sizes: Sequence[int] = (2, 3, 4),
    bits: Sequence[int] = (16, 32),
    dimension: int = 5,
    exhaustive: bool = False,
    raise_on_failure: bool = True,
) -> Report:
    """Check a protocol against the contract: sums, dropouts, malformed and repeated messages, policy, determinism.

    sizes: cohort sizes to try; those for which the protocol's parameters are infeasible (LocalError) are passed over.
    bits: rings to try, likewise. exhaustive: every dropout pattern from 4 nodes on, not only those that differ by
    more than a renaming of the nodes. Returns a Report; raises CheckFailed with it when a check fails, unless
    raise_on_failure is false. Takes seconds: it runs every stage of hundreds of small sessions.
    """
    plain = Rehearsal(protocol, dimension=dimension)
    labs = [
        lab
        for active in (False, True)
        for size in sorted(sizes)
        for width in bits
        if _feasible(lab := replace(plain, nodes=tuple(range(3, 3 + size)), bits=width, active=active))
    ]
    problems: list[tuple[str, str]] = []
    ran: list[str] = []
    sessions = plain.counter
    if not labs:
        problems.append(("feasible", f"no session starts with sizes {tuple(sizes)} and bits {tuple(bits)}"))
    for check, name in CHECKS.items() if labs else ():
        ran.append(name)
        for lab in _chosen(check, labs):
            where = f"n={len(lab.nodes)}, bits={lab.bits}, {'active' if lab.active else 'semi-honest'}"
            try:
                problems += [(name, f"{problem} ({where})") for problem in check(lab, exhaustive)]
            except ProtocolError as error:
                problems.append((name, f"an honest session failed: {error!r} ({where})"))
            except Exception as error:  # noqa: BLE001 - foreign code: whatever it raises is a finding
                problems.append((name, f"raised {type(error).__name__}: {error} ({where})"))
    report = Report(repr(protocol), tuple(ran), tuple(problems), sessions[0])
    if raise_on_failure and not report.passed:
        raise CheckFailed(report)
    return report


def _feasible(lab: Rehearsal) -> bool:
    """Whether the parameters suit this cohort: if not, roles say so before anything is sent."""
    try:
        lab.run()
    except LocalError:
        return False
    except Exception:  # noqa: BLE001 - any other failure is a finding of the checks
        return True
    return True


def _chosen(check: Callable[..., Problems], labs: list[Rehearsal]) -> list[Rehearsal]:
    """Sums are checked everywhere; dropouts once per size; the rest on the largest cohort, active if it can be."""
    if check is _sums:
        return labs
    narrow = [lab for lab in labs if lab.bits == labs[0].bits]
    if check is _dropouts:
        return [lab for lab in narrow if not lab.active or all(other.active for other in labs)]
    return narrow[-1:]


def _sums(lab: Rehearsal, exhaustive: bool) -> Problems:
    """The result is the exact sum in the ring, for random, zero and largest inputs, and appears only at the end."""
    for kind in ("random", "zero", "largest"):
        run = lab.run(inputs=lab.inputs(kind))
        if run.result is None:
            yield f"no result for {kind} inputs"
        elif run.result.survivors != frozenset(lab.nodes):
            yield f"survivors are {sorted(run.result.survivors)} though nobody vanished"
        elif not run.sum_is_right():
            yield f"the sum of {kind} inputs is wrong"
        if run.early_result:
            yield f"a result appears before the last stage closed, at {run.early_result!r}"
        if run.names != list(lab.protocol.stages):
            yield f"stages ran as {run.names}, promised are {list(lab.protocol.stages)}"
        if run.source_calls != dict.fromkeys(lab.nodes, 1):
            yield f"inputs were asked for {run.source_calls} times, not once per node"


def _patterns(lab: Rehearsal, exhaustive: bool) -> Iterator[dict[int, int]]:
    """Node -> the stage before which it vanishes."""
    stages = range(len(lab.protocol.stages) + 1)
    if exhaustive or len(lab.nodes) < 4:
        choices: Iterator[tuple[int, ...]] = product(stages, repeat=len(lab.nodes))
    else:
        choices = combinations_with_replacement(stages, len(lab.nodes))
    for choice in choices:
        yield dict(zip(lab.nodes, choice, strict=True))


def _dropouts(lab: Rehearsal, exhaustive: bool) -> Problems:
    """Whoever vanishes before whichever stage: the exact sum of those whose input arrived, or TooFewSurvivors."""
    for vanish in _patterns(lab, exhaustive):
        try:
            run = lab.run(vanish=vanish)
        except TooFewSurvivors as error:
            if error.have >= error.threshold:
                yield f"TooFewSurvivors although {error.have} >= {error.threshold}, vanishing at {vanish}"
            if all(stage >= len(lab.protocol.stages) for stage in vanish.values()):
                yield "TooFewSurvivors although nobody vanished"
            continue
        if run.result is None or not run.sum_is_right():
            yield f"the sum is wrong when nodes vanish at {vanish}"
        elif run.result.survivors != run.delivered:
            yield f"survivors {sorted(run.result.survivors)}, inputs came from {sorted(run.delivered)}: {vanish}"
        elif len(run.result.survivors) < 2:
            yield f"a single node's input was revealed, vanishing at {vanish}"


def _determinism(lab: Rehearsal, exhaustive: bool) -> Problems:
    """Given randomness fixes every byte; other randomness changes what carries the input."""
    first, again, other = lab.run(), lab.run(), lab.run(label="other")
    if first.transcript() != again.transcript():
        yield "two runs with the same randomness differ: something else than `random` was read"
    for node in lab.nodes:
        stage = first.source_stage[node]
        if first.replies[stage][node] == other.replies[stage][node]:
            yield f"node {node} hides its input the same way whatever its randomness"


def _hidden_input(lab: Rehearsal, exhaustive: bool) -> Problems:
    """No reply holds an input in the clear."""
    run = lab.run(inputs=lab.inputs("random"))
    for stage, replies in enumerate(run.replies):
        for node, reply in replies.items():
            vector = run.inputs[node]
            for kind in ("<u2", "<u4", "<u8", ">u4", ">u8", "<f4", "<f8"):
                if vector.astype(kind).tobytes() in reply:
                    yield f"node {node}'s reply at {lab.protocol.stages[stage]!r} holds its input as {kind}"


def _deformed(message: bytes) -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "halved", message[: len(message) // 2]
    yield "short of a byte", message[:-1]
    yield "extended by a byte", message + b"\0"
    yield "doubled", message + message


def _refused(action: Callable[[], object], what: str) -> Problems:
    """A peer's fault must come out as RemoteError or DecodeError."""
    try:
        action()
    except (RemoteError, DecodeError):
        return
    except Exception as error:  # noqa: BLE001 - foreign code: whatever it raises is a finding
        yield f"{what} raised {type(error).__name__} ({error}), not RemoteError or DecodeError"
    else:
        yield f"{what} was accepted"


def _deformed_requests(lab: Rehearsal, exhaustive: bool) -> Problems:
    """A node refuses a request that is cut, empty or longer than it should be, at every stage."""
    run = lab.run()
    for role in run.roles():
        for how, request in _deformed(role.request):
            yield from _refused(partial(role.step, request), f"a request {how} at {role.name!r}")


def _deformed_replies(lab: Rehearsal, exhaustive: bool) -> Problems:
    """The server refuses such replies, is not changed by them, and still takes the right one."""
    problems: list[str] = []

    def tamper(stage: Stage) -> None:
        for how, reply in _deformed(stage.reply):
            problems.extend(_refused(partial(stage.receive, reply), f"a reply {how} at {stage.name!r}"))

    run = lab.run(before_reply=tamper)
    yield from problems
    if run.result is None or not run.sum_is_right() or run.result.survivors != frozenset(lab.nodes):
        yield "refused replies left a trace: the session's sum changed"


def _told_again(role: Role, request: bytes, answered: bytes) -> None:
    """Feed a request to a node that answered it before; the very same bytes in reply reveal nothing new."""
    if role.after(request) == answered:
        raise RemoteError("redelivery", (0,), "answered with the same bytes")


def _repeated_requests(lab: Rehearsal, exhaustive: bool) -> Problems:
    """Once a stage is answered, no request for it or an earlier one gets a new answer, in this session or another."""
    run, other = lab.run(), lab.run(label="other", round_offset=1)
    for role in run.roles():
        for earlier in range(role.stage + 1):
            request, reply = run.requests[earlier][role.node], run.replies[earlier][role.node]
            what = f"the request of {lab.protocol.stages[earlier]!r}, once {role.name!r} was answered,"
            yield from _refused(partial(_told_again, role, request, reply), what)
        foreign = other.requests[role.stage][role.node]
        yield from _refused(partial(role.after, foreign), f"another session's request after {role.name!r}")
        if role.stage:
            yield from _refused(partial(role.step, foreign), f"another session's request at {role.name!r}")


def _second_views(lab: Rehearsal, exhaustive: bool) -> Problems:
    """A node that answered for one set of nodes does not answer for another: differences of sums stay hidden."""
    run = lab.run()
    for vanished in range(len(lab.protocol.stages)):
        try:
            variant = lab.run(vanish={lab.nodes[-1]: vanished})
        except TooFewSurvivors:
            continue
        for role in run.roles():
            request = variant.requests[role.stage].get(role.node)
            if request not in (None, role.request):
                what = f"a {role.name!r} request with a node less, after one with all,"
                yield from _refused(partial(role.after, request), what)


def _skipped_stages(lab: Rehearsal, exhaustive: bool) -> Problems:
    """No request is answered before the one that must precede it."""
    run = lab.run()
    for role in run.roles():
        for later in range(role.stage + 1, len(lab.protocol.stages)):
            request = run.requests[later].get(role.node)
            if request is None:  # a node that is on no committee is asked no more
                continue
            yield from _refused(
                partial(role.step, request),
                f"the request of {lab.protocol.stages[later]!r} in place of {role.name!r}",
            )


def _strange_replies(lab: Rehearsal, exhaustive: bool) -> Problems:
    """The server takes nothing from nodes outside the session, no second reply, no reply of another stage."""
    problems: list[str] = []
    stranger = max(lab.nodes) + 1

    def before(stage: Stage) -> None:
        problems.extend(
            _refused(partial(stage.receive, stage.reply, stranger), f"a stranger's reply at {stage.name!r}")
        )
        if stage.earlier is not None:
            problems.extend(
                _refused(partial(stage.receive, stage.earlier), f"an earlier stage's reply at {stage.name!r}")
            )

    def after(stage: Stage) -> None:
        with suppress(RemoteError, DecodeError):  # refusing it and ignoring it are both right
            stage.receive(stage.reply)

    run = lab.run(before_reply=before, after_reply=after)
    yield from problems
    if run.result is None or not run.sum_is_right() or run.result.survivors != frozenset(lab.nodes):
        yield "strange or repeated replies changed the session's sum"


def _foreign_cohort(lab: Rehearsal, exhaustive: bool) -> Problems:
    """A node answers no session that does not have it."""
    run = lab.run()
    outsider = max(lab.nodes) + 1
    role = Role(replace(lab, nodes=(*lab.nodes, outsider)), outsider, 0, b"", run.requests[0][lab.nodes[0]])
    yield from _refused(partial(role.step, role.request), "a request for a cohort without the node")


def _policy(lab: Rehearsal, exhaustive: bool) -> Problems:
    """Whatever the server asks, a node's own floors hold: it hands over no input below them."""
    floors = {
        "min_cohort": Policy(min_cohort=len(lab.nodes) + 1),
        "min_threshold": Policy(min_threshold=len(lab.nodes) + 1),
        "min_survivors": Policy(min_survivors=len(lab.nodes) + 1),
        "min_bits": Policy(min_bits=lab.bits + 1),
        "min_round": Policy(min_round=10**6),
    }
    labs = {name: replace(lab, policy=policy) for name, policy in floors.items()}
    labs["require_active"] = replace(lab, active=False, policy=Policy(require_active=True))
    for name, strict in labs.items():
        try:
            strict.run()
        except (RemoteError, LocalError):
            continue
        yield f"the node's policy {name} was not obeyed"


def _facts(lab: Rehearsal, exhaustive: bool) -> Problems:
    """A node joins the session it knows of and no other, whatever the server opens: `Policy.check_facts`."""
    session = lab.session()
    known = replace(Policy(binding=session.binding), **{name: getattr(session, name) for name in FACTS})
    if not _obeys(replace(lab, policy=known)):
        yield "a session of the very facts that the node knows was refused"
    others: dict[str, Any] = {
        "run": session.run + 1,
        "round": session.round + 1,
        "action": session.action + ".other",
        "bits": session.bits + 1,
        "dimension": session.dimension + 1,
        "max_dimension": session.dimension - 1,
        "binding": bytes(32),
    }
    for name, value in others.items():
        try:
            replace(lab, policy=replace(Policy(), **{name: value})).run()
        except RemoteError:
            continue
        yield f"a session of another {name} than the node's policy knows was joined"


def _bad_inputs(lab: Rehearsal, exhaustive: bool) -> Problems:
    """An input that does not fit is the caller's mistake and leaves nothing behind."""
    run = lab.run()
    node = lab.nodes[0]
    role = next(r for r in run.roles() if r.node == node and r.stage == run.source_stage[node])
    for what, vector in {
        "too short": np.zeros(lab.dimension - 1, dtype=np.uint64),
        "too long": np.zeros(lab.dimension + 1, dtype=np.uint64),
        "out of the ring": np.full(lab.dimension, 1 << lab.bits, dtype=np.uint64),
    }.items():
        try:
            role.step(role.request, vector)
        except LocalError:
            continue
        except Exception as error:  # noqa: BLE001 - foreign code: whatever it raises is a finding
            yield f"an input {what} raised {type(error).__name__}, not LocalError"
        else:
            yield f"an input {what} was accepted"


def _impostor(lab: Rehearsal, exhaustive: bool) -> Problems:
    """A protocol that calls itself active puts no node in a sum whose key is not the roster's."""
    strict = replace(lab, policy=Policy(require_active=True))
    if not lab.active or not _obeys(strict):
        return
    node = lab.nodes[-1]
    with suppress(RemoteError, DecodeError, TooFewSurvivors):
        run = strict.run(impostor=node)
        if run.result is not None and node in run.result.survivors:
            yield f"node {node} took part with a key that is not on the roster"


def _obeys(lab: Rehearsal) -> bool:
    """Whether an honest session runs under this policy."""
    try:
        return lab.run().result is not None
    except (LocalError, RemoteError):
        return False


CHECKS: dict[Callable[[Rehearsal, bool], Problems], str] = {
    _sums: "sums",
    _dropouts: "dropouts",
    _determinism: "determinism",
    _hidden_input: "hidden-input",
    _deformed_requests: "deformed-requests",
    _deformed_replies: "deformed-replies",
    _repeated_requests: "repeated-requests",
    _second_views: "second-views",
    _skipped_stages: "skipped-stages",
    _strange_replies: "strange-replies",
    _foreign_cohort: "foreign-cohort",
    _policy: "policy",
    _facts: "facts",
    _bad_inputs: "bad-inputs",
    _impostor: "impostor",
}
