"""The public suite: it passes what keeps the contract, and names what is broken in protocols made to break it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from privfed.audit import CheckFailed, check_protocol
from privfed.protocols import LightSecAgg
from privfed.protocols.errors import LocalError, RemoteError, TooFewSurvivors
from privfed.protocols.lightsecagg.client import LightSecAggClient
from privfed.protocols.session import (
    FACTS,
    Buffer,
    Client,
    Identity,
    Policy,
    Random,
    RingSum,
    Server,
    Session,
    Source,
)


@pytest.mark.parametrize("protocol", [LightSecAgg(), LightSecAgg(0.9, privacy=1)])
def test_what_keeps_the_contract_passes(protocol: LightSecAgg) -> None:
    report = check_protocol(protocol)
    assert report.passed and report.sessions > 300 and len(report.checks) == 15


@dataclass
class Part:
    """A role that passes everything on, for others to override a part of."""

    inner: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@dataclass(frozen=True)
class Spoiled:
    """LightSecAgg with its roles wrapped."""

    client_part: Callable[[Any], Any] = field(default=lambda inner: inner)
    server_part: Callable[[Any], Any] = field(default=lambda inner: inner)
    loosen: Callable[[Policy], Policy] = field(default=lambda policy: policy)
    forget_identity: bool = False
    random: Random | None = None
    inner: LightSecAgg = field(default_factory=LightSecAgg)

    @property
    def stages(self) -> tuple[str, ...]:
        return self.inner.stages

    def server(self, session: Session, *, random: Random = os.urandom) -> Server:
        made: Server = self.server_part(self.inner.server(session, random=random))
        return made

    def client(
        self,
        node: int,
        *,
        identity: Identity | None = None,
        policy: Policy = Policy(),
        random: Random = os.urandom,
    ) -> Client:
        who = None if self.forget_identity else identity
        honest = self.inner.client(node, identity=who, policy=self.loosen(policy), random=self.random or random)
        made: Client = self.client_part(honest)
        return made


class OffByOne(Part):
    @property
    def result(self) -> RingSum | None:
        found: RingSum | None = self.inner.result
        return None if found is None else RingSum(found.total + np.uint64(1), found.survivors)


class LosesASurvivor(Part):
    @property
    def result(self) -> RingSum | None:
        found: RingSum | None = self.inner.result
        return None if found is None else RingSum(found.total, frozenset(sorted(found.survivors)[1:]))


class WrongCount(Part):
    def close(self) -> None:
        try:
            self.inner.close()
        except TooFewSurvivors as error:
            raise TooFewSurvivors(9, 9) from error


class CutsReplies(Part):
    """Takes a reply for its longest prefix that is one."""

    def receive(self, node: int, reply: Buffer) -> None:
        try:
            self.inner.receive(node, reply)
        except RemoteError:
            self.inner.receive(node, bytes(reply)[:-1])


class CutsRequests(Part):
    def step(self, kept: bytes, request: Buffer, source: Source) -> tuple[bytes, Buffer]:
        try:
            answer: tuple[bytes, Buffer] = self.inner.step(kept, request, source)
        except RemoteError:
            answer = self.inner.step(kept, bytes(request)[:-1], source)
        return answer


class Stumbles(Part):
    """Raises what a parser without checks raises."""

    def step(self, kept: bytes, request: Buffer, source: Source) -> tuple[bytes, Buffer]:
        bytes(request)[40]
        answer: tuple[bytes, Buffer] = self.inner.step(kept, request, source)
        return answer


class AnswersAgain(Part):
    """Falls back to what it kept before the last step, as a node restored from a backup would."""

    def step(self, kept: bytes, request: Buffer, source: Source) -> tuple[bytes, Buffer]:
        size = int.from_bytes(kept[:4], "big")
        before, now = kept[4 : 4 + size], kept[4 + size :]
        try:
            after, reply = self.inner.step(now, request, source)
        except RemoteError:
            now = before
            after, reply = self.inner.step(now, request, source)
        return len(now).to_bytes(4, "big") + now + bytes(after), reply


class Wraps(Part):
    """Reduces whatever input it is given to what fits."""

    def step(self, kept: bytes, request: Buffer, source: Source) -> tuple[bytes, Buffer]:
        answer: tuple[bytes, Buffer] = self.inner.step(
            kept, request, lambda: np.resize(source(), 5) & np.uint64(0xFFFF)
        )
        return answer


class AsksTwice(Part):
    def step(self, kept: bytes, request: Buffer, source: Source) -> tuple[bytes, Buffer]:
        def twice() -> Any:
            source()
            return source()

        answer: tuple[bytes, Buffer] = self.inner.step(kept, request, twice)
        return answer


class TakesStrangers(Part):
    def receive(self, node: int, reply: Buffer) -> None:
        if node in self.inner.outbound():
            self.inner.receive(node, reply)


def same_each_time(client: LightSecAggClient) -> LightSecAggClient:
    return replace(client, random=lambda size: bytes([client.node]) * size)


def without_floors(policy: Policy) -> Policy:
    return Policy(binding=policy.binding, max_dimension=policy.max_dimension, **facts_of(policy))


def facts_of(policy: Policy) -> dict[str, Any]:
    return {name: getattr(policy, name) for name in FACTS}


def without(name: str) -> Callable[[Policy], Policy]:
    return lambda policy: replace(policy, **{name: getattr(Policy(), name)})


def refuse_every_run(policy: Policy) -> Policy:
    return policy if policy.run is None else replace(policy, run=1 << 40)


@pytest.mark.parametrize(
    ("protocol", "checks"),
    [
        (Spoiled(server_part=OffByOne), {"sums", "dropouts"}),
        (Spoiled(server_part=LosesASurvivor), {"sums", "dropouts"}),
        (Spoiled(server_part=WrongCount), {"dropouts"}),
        (Spoiled(server_part=CutsReplies), {"deformed-replies"}),
        (Spoiled(server_part=TakesStrangers), {"strange-replies"}),
        (Spoiled(client_part=CutsRequests), {"deformed-requests"}),
        (Spoiled(client_part=Stumbles), {"deformed-requests"}),
        (Spoiled(client_part=AnswersAgain, inner=LightSecAgg(2)), {"repeated-requests", "second-views"}),
        (Spoiled(client_part=Wraps), {"bad-inputs"}),
        (Spoiled(client_part=AsksTwice), {"sums"}),
        (Spoiled(loosen=without_floors), {"policy"}),
        (Spoiled(loosen=without_floors, forget_identity=True), {"policy", "impostor"}),
        *((Spoiled(loosen=without(name)), {"facts"}) for name in (*FACTS, "binding", "max_dimension")),
        (Spoiled(loosen=refuse_every_run), {"facts"}),
        (Spoiled(loosen=without("min_survivors")), {"policy"}),
        (Spoiled(random=os.urandom), {"determinism"}),
        (Spoiled(client_part=same_each_time), {"determinism"}),
    ],
)
def test_each_break_is_named(protocol: Spoiled, checks: set[str]) -> None:
    size = 3 if "second-views" in checks else 2  # who is left must still be enough
    report = check_protocol(protocol, sizes=(size,), bits=(16,), raise_on_failure=False)
    named = {check for check, _ in report.problems}
    assert checks <= named
    # A break may show in more than one place, not everywhere: the suite says where to look.
    assert len(named) <= len(checks) + 2


@dataclass
class PlainServer:
    """Adds vectors sent in the clear; trusts everybody."""

    session: Session
    open: bool = True
    replies: dict[int, np.ndarray[Any, np.dtype[np.uint64]]] = field(default_factory=dict)
    result: RingSum | None = None

    @property
    def stage(self) -> str:
        return "send" if self.open else ""

    def outbound(self) -> dict[int, Buffer]:
        return dict.fromkeys(self.session.nodes, b"send")

    def receive(self, node: int, reply: Buffer) -> None:
        if len(reply) != 8 * self.session.dimension:
            raise RemoteError("malformed", (node,))
        before = self.replies.get(node, np.uint64(0))
        self.replies[node] = before + np.frombuffer(reply, dtype=np.uint64)

    def close(self) -> None:
        self.open = False
        if len(self.replies) < 2:
            raise TooFewSurvivors(len(self.replies), 2)
        total = sum(self.replies.values(), np.zeros(self.session.dimension, dtype=np.uint64))
        self.result = RingSum(total & np.uint64(2**self.session.bits - 1), frozenset(self.replies))


@dataclass
class PlainClient:
    def step(self, kept: bytes, request: Buffer, source: Source) -> tuple[bytes, Buffer]:
        if request != b"send":
            raise RemoteError("malformed", (0,))
        return kept, source().tobytes()


@dataclass(frozen=True)
class Plain:
    least: int = 2
    stages: tuple[str, ...] = ("send",)

    def server(self, session: Session, *, random: Random = os.urandom) -> PlainServer:
        if len(session.nodes) < self.least:
            raise LocalError("too small a cohort")
        return PlainServer(session)

    def client(self, node: int, **given: object) -> PlainClient:
        return PlainClient()


def test_no_security_at_all_is_noticed() -> None:
    report = check_protocol(Plain(), raise_on_failure=False)
    named = {check for check, _ in report.problems}
    assert named == {
        "hidden-input", "determinism", "repeated-requests", "strange-replies", "foreign-cohort", "policy",
        "facts", "bad-inputs", "impostor",
    }  # fmt: skip


def test_failures_raise_with_the_report() -> None:
    with pytest.raises(CheckFailed, match=r"hidden-input: node .* reply at 'send' holds its input") as caught:
        check_protocol(Plain())
    assert not caught.value.report.passed


def test_sizes_that_do_not_suit_are_passed_over_unless_none_does() -> None:
    assert check_protocol(LightSecAgg(4), sizes=(2, 3, 4), bits=(16,)).passed
    with pytest.raises(CheckFailed, match="feasible"):
        check_protocol(LightSecAgg(5), sizes=(2, 3, 4))


def test_exhaustive_runs_every_pattern() -> None:
    few = check_protocol(Plain(), sizes=(4,), bits=(16,), raise_on_failure=False)
    all_of_them = check_protocol(Plain(), sizes=(4,), bits=(16,), exhaustive=True, raise_on_failure=False)
    assert all_of_them.sessions - few.sessions == 2**4 - 5
