"""Nodes that attack the server of LightSecAgg, or come too late: it names them and is not changed by them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from privfed.audit.rehearsal import Rehearsal, Stage, stream
from privfed.protocols import codec, keys
from privfed.protocols.errors import LocalError, TooFewSurvivors
from privfed.protocols.lightsecagg import LightSecAgg
from privfed.protocols.lightsecagg.messages import Advertisement
from privfed.protocols.lightsecagg.server import LightSecAggServer
from privfed.protocols.session import Session
from proofs_tests.protocols.lightsecagg_rehearsal import LOW_ORDER, PASSIVE, refusal


def attack(stage: str, deform: Callable[[Stage], bytes], lab: Rehearsal = PASSIVE) -> tuple[str, tuple[int, ...]]:
    """Node 4 sends something else at this stage; the session must end as if it had not."""
    caught: list[tuple[str, tuple[int, ...]]] = []

    def hook(seen: Stage) -> None:
        if seen.name == stage and seen.node == 4:
            caught.append(refusal(lambda: seen.receive(deform(seen))))

    run = lab.run(before_reply=hook)
    assert run.sum_is_right()
    return caught[0]


def resigned(seen: Stage, secret: bytes = b"e" * 32, **change: bytes) -> bytes:
    given = Advertisement.decode(memoryview(seen.reply)[33:])
    changed = replace(given, verify_key=keys.signing_public(secret), **change)
    return seen.reply[:33] + changed.sign(seen.node, secret).encode()


def test_the_server_names_bad_advertisements() -> None:
    assert attack("advertise", lambda s: s.reply[:-1] + b"\0") == ("bad-signature", (4,))
    assert attack("advertise", lambda s: resigned(s, binding=bytes(32))) == ("inconsistent-session", (4,))
    assert attack("advertise", lambda s: resigned(s, digest=bytes(32))) == ("inconsistent-session", (4,))
    for point in LOW_ORDER:
        assert attack("advertise", partial(resigned, public_key=point)) == ("low-order-key", (4,))
    first = PASSIVE.run().replies[0][3]
    taken = Advertisement.decode(memoryview(first)[33:]).public_key
    assert attack("advertise", lambda s: resigned(s, public_key=taken)) == ("duplicate-key", (4,))


def test_the_server_names_bad_shares_and_confirmations() -> None:
    def without_one(seen: Stage) -> bytes:
        rows = codec.decode(seen.reply[33:], lambda r: r.table(22))
        return seen.reply[:33] + codec.table((n, bytes(d)) for n, d in rows.items() if n != 3)

    size = (len(PASSIVE.run().replies[1][4]) - 33 - 4) // 3 - 8
    assert size == 22
    assert attack("share", without_one) == ("wrong-shares", (4,))
    assert attack("confirm", lambda s: s.reply[:-1] + b"\0") == ("bad-confirmation", (4,))


def test_a_late_or_second_masked_input_is_refused() -> None:
    """Once the stage is closed a masked input opens nothing; and one node has one."""
    run = PASSIVE.run()

    def second(seen: Stage) -> None:
        if seen.name == "mask":
            other = seen.reply[:-1] + bytes([seen.reply[-1] ^ 1])
            assert refusal(lambda: seen.receive(other)) == ("second-reply", (seen.node,))
            seen.receive(seen.reply)

    assert PASSIVE.run(after_reply=second).sum_is_right()
    late = run.replies[2][4]
    for stage in ("confirm", "reveal"):
        assert attack(stage, lambda s: late) == ("malformed-reply", (4,))


def test_a_node_that_vanished_stays_out() -> None:
    late: list[tuple[str, tuple[int, ...]]] = []

    def hook(seen: Stage) -> None:
        if seen.name == "mask" and not late:
            late.append(refusal(lambda: seen.receive(seen.reply, node=6)))

    assert PASSIVE.run(vanish={6: 1}, before_reply=hook).sum_is_right()
    assert late == [("foreign-node", (6,))]


def test_a_wrong_sum_of_shares_is_noticed() -> None:
    """Four answer where three suffice: one that lies about its sum makes them contradict one another."""
    server = LightSecAgg().server(PASSIVE.session(), random=stream("one server"))
    clients = {node: PASSIVE.client(node, "one") for node in PASSIVE.nodes}
    kept = dict.fromkeys(PASSIVE.nodes, b"")
    for stage in PASSIVE.protocol.stages:
        for node, request in server.outbound().items():
            kept[node], reply = clients[node].step(kept[node], request, lambda: np.ones(5, np.uint64))
            lie = stage == "reveal" and node == 5
            server.receive(node, bytes(reply)[:-1] + bytes([bytes(reply)[-1] ^ 1]) if lie else reply)
        if stage != "reveal":
            server.close()
    assert refusal(server.close)[0] == "inconsistent-shares"
    assert server.result is None


def served(liars: int, answering: tuple[int, ...], lying: tuple[int, ...] = ()) -> LightSecAggServer:
    """A session of nodes 1 to 5, threshold 3, up to the last close: some answer the last stage, some of them lie."""
    protocol, nodes = LightSecAgg(3, liars=liars), (1, 2, 3, 4, 5)
    server = protocol.server(Session(1, 1, "train", nodes, 5, 16), random=stream("liars"))
    clients = {node: protocol.client(node, random=stream(f"liars {node}")) for node in nodes}
    kept = dict.fromkeys(nodes, b"")
    for stage in protocol.stages:
        for node, request in server.outbound().items():
            if stage == "reveal" and node not in answering:
                continue
            kept[node], reply = clients[node].step(kept[node], request, lambda: np.ones(5, np.uint64))
            lie = stage == "reveal" and node in lying
            server.receive(node, bytes(reply)[:-1] + bytes([bytes(reply)[-1] ^ node]) if lie else reply)
        if stage != "reveal":
            server.close()
    return server


def test_with_liars_no_lie_passes_and_without_one_can() -> None:
    """With exactly `threshold` answers nothing contradicts a lie: that many more are awaited as may lie."""
    alone = served(0, (1, 2, 3), lying=(3,))
    alone.close()
    assert alone.result is not None
    assert not np.array_equal(alone.result.total, np.full(5, 5)), "what liars > 0 is for"
    with pytest.raises(TooFewSurvivors) as few:
        served(1, (1, 2, 3), lying=(3,)).close()
    assert (few.value.have, few.value.threshold) == (3, 4)
    for liars, answering, lying in ((1, (1, 2, 3, 4), (3,)), (2, (1, 2, 3, 4, 5), (2, 5)), (1, (1, 2, 4, 5), (1,))):
        server = served(liars, answering, lying)
        assert refusal(server.close)[0] == "inconsistent-shares"
        assert server.result is None
    honest = served(1, (1, 2, 3, 4))
    honest.close()
    assert honest.result is not None
    np.testing.assert_array_equal(honest.result.total, np.full(5, 5))


def test_liars_beyond_the_cohort_are_refused() -> None:
    with pytest.raises(LocalError, match="liars"):
        LightSecAgg(4, liars=2).server(Session(1, 1, "train", (1, 2, 3, 4, 5), 5, 16))
    for wrong in (-1, 0.5, True):
        with pytest.raises(ValueError, match="liars"):
            LightSecAgg(4, liars=wrong)  # type: ignore[arg-type]  # wrong on purpose


def test_a_session_that_ended_takes_nothing() -> None:
    server = LightSecAgg().server(Session(1, 1, "train", (1, 2), 1, 16), random=stream("s"))
    clients = {node: LightSecAgg().client(node, random=stream(str(node))) for node in (1, 2)}
    kept, reply = dict.fromkeys((1, 2), b""), b""
    while server.stage:
        for node, request in server.outbound().items():
            kept[node], answer = clients[node].step(kept[node], request, lambda: np.ones(1, np.uint64))
            reply = bytes(answer)
            server.receive(node, reply)
        server.close()
    assert refusal(lambda: server.receive(2, reply)) == ("session-over", (2,))
    with pytest.raises(LocalError, match="over"):
        server.close()
