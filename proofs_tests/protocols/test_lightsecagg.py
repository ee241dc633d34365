"""LightSecAgg end to end: exact sums under every dropout pattern, parameters, and what the server's view says."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import combinations_with_replacement, product
from pathlib import Path

import numpy as np
import pytest
from Crypto.Cipher import AES
from Crypto.Hash import SHA256
from Crypto.Protocol.KDF import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.audit.rehearsal import Rehearsal, Vector, stream
from privfed.protocols import keys
from privfed.protocols.errors import LocalError, RemoteError, TooFewSurvivors
from privfed.protocols.lightsecagg import LightSecAgg
from privfed.protocols.lightsecagg.code import Code
from privfed.protocols.lightsecagg.secret import Secrets
from privfed.protocols.session import Policy, Session

VECTORS = Path(__file__).parent.parent / "vectors"


def lab(n: int, threshold: int | float | None = None, **change: object) -> Rehearsal:
    chosen = Rehearsal(LightSecAgg(threshold), dimension=5, nodes=tuple(range(11, 11 + n)), bits=16)
    return replace(chosen, **change)  # type: ignore[arg-type]  # names checked by replace


def outcome(chosen: Rehearsal, vanish: dict[int, int]) -> None:
    """The law of a session: a stage needs `threshold` nodes; survivors are those present when masks were due."""
    threshold, _ = chosen.protocol.resolve(len(chosen.nodes))  # type: ignore[attr-defined]  # a LightSecAgg
    left = [sum(at > stage for at in vanish.values()) for stage in range(5)]
    short = next((stage for stage in range(5) if left[stage] < threshold), None)
    if short is None:
        run = chosen.run(vanish=vanish)
        assert run.sum_is_right() and run.result is not None
        assert run.result.survivors == {node for node, at in vanish.items() if at > 2}
    else:
        with pytest.raises(TooFewSurvivors) as caught:
            chosen.run(vanish=vanish)
        assert (caught.value.have, caught.value.threshold) == (left[short], threshold)
        assert caught.value.stage == chosen.protocol.stages[short]


@pytest.mark.parametrize(("n", "threshold"), [(2, 2), (3, 2), (3, 3), (4, 3)])
def test_every_dropout_pattern(n: int, threshold: int) -> None:
    chosen = lab(n, threshold)
    for choice in product(range(6), repeat=n):
        outcome(chosen, dict(zip(chosen.nodes, choice, strict=True)))


@pytest.mark.parametrize(("n", "threshold"), [(5, 3), (6, 4)])
def test_every_dropout_pattern_but_for_the_nodes_names(n: int, threshold: int) -> None:
    chosen = lab(n, threshold, dimension=2)
    for choice in combinations_with_replacement(range(6), n):
        outcome(chosen, dict(zip(chosen.nodes, choice, strict=True)))


@pytest.mark.long
@pytest.mark.parametrize(("n", "threshold"), [(4, 4), (5, 3), (5, 4), (6, 4)])
def test_every_dropout_pattern_of_more_nodes(n: int, threshold: int) -> None:
    chosen = lab(n, threshold, dimension=2)
    for choice in product(range(6), repeat=n):
        outcome(chosen, dict(zip(chosen.nodes, choice, strict=True)))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(1, 64), st.integers(0, 40), st.booleans(), st.data())
def test_random_cohorts_rings_and_dropouts(
    n: int, bits: int, dimension: int, active: bool, data: st.DataObject
) -> None:
    threshold = data.draw(st.integers(max(2, (n + 2) // 2), n))
    policy = Policy(min_bits=1)
    chosen = lab(n, threshold, bits=bits, dimension=dimension, active=active, policy=policy)
    outcome(chosen, {node: data.draw(st.sampled_from((0, 1, 2, 3, 4, 5, 5, 5))) for node in chosen.nodes})


def test_a_hundred_nodes_lose_thirty_at_random() -> None:
    chosen = lab(100, 70, dimension=50, bits=32)
    order = np.random.default_rng(1).permutation(chosen.nodes).tolist()
    stages = np.random.default_rng(2).integers(0, 5, 30).tolist()
    outcome(chosen, {**dict.fromkeys(chosen.nodes, 5), **dict(zip(order, stages, strict=False))})


def test_a_shrinking_model_of_no_entries_works() -> None:
    assert lab(3, dimension=0).run().sum_is_right()


def test_equal_requests_are_one_object() -> None:
    """So that a driver sends or stores them once."""
    chosen = lab(4)
    server = chosen.protocol.server(chosen.session(), random=stream("one"))
    assert len({id(request) for request in server.outbound().values()}) == 1


@pytest.mark.parametrize(
    ("parameters", "n", "resolved"),
    [
        (LightSecAgg(), 2, (2, 1)),
        (LightSecAgg(), 4, (3, 1)),
        (LightSecAgg(), 100, (67, 33)),
        (LightSecAgg(0.7), 100, (70, 39)),
        (LightSecAgg(70), 100, (70, 39)),
        (LightSecAgg(70, 30), 100, (70, 30)),
        (LightSecAgg(3), 5, (3, 0)),
        (LightSecAgg(1.0), 3, (3, 2)),
    ],
)
def test_thresholds_resolve_per_cohort(parameters: LightSecAgg, n: int, resolved: tuple[int, int]) -> None:
    assert parameters.resolve(n) == resolved


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 300), st.floats(0.51, 1.0))
def test_every_resolution_allows_one_opening_only(n: int, share: float) -> None:
    for parameters in (LightSecAgg(), LightSecAgg(share)):
        try:
            threshold, privacy = parameters.resolve(n)
        except LocalError:
            continue
        assert 2 * threshold > n + privacy and privacy < threshold <= n


@pytest.mark.parametrize(
    ("parameters", "n"),
    [(LightSecAgg(2), 4), (LightSecAgg(5), 4), (LightSecAgg(3, 2), 4), (LightSecAgg(), 1), (LightSecAgg(0.5), 8)],
)
def test_infeasible_parameters_raise_before_any_message(parameters: LightSecAgg, n: int) -> None:
    session = Session(1, 1, "train", tuple(range(1, n + 1)), 4, 16)
    with pytest.raises(LocalError):
        if not parameters.server(session).outbound():
            pytest.fail("a session started")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"nodes": (2, 1)}, "nodes"),
        ({"nodes": (0, 1)}, "nodes"),
        ({"bits": 0}, "bits"),
        ({"bits": 65}, "bits"),
        ({"dimension": -1}, "dimension"),
        ({"binding": b""}, "binding"),
        ({"action": "x" * 65}, "action"),
    ],
)
def test_sessions_that_are_none_are_refused(change: dict[str, object], name: str) -> None:
    session = Session(1, 1, "train", (1, 2), 4, 16)
    with pytest.raises(LocalError, match=name):
        LightSecAgg().server(replace(session, **change))  # type: ignore[arg-type]  # names checked by replace


@pytest.mark.parametrize("bad", [{"threshold": 1}, {"threshold": 0.0}, {"threshold": 1.5}, {"privacy": -1}])
def test_parameters_out_of_range_name_the_argument(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        LightSecAgg(**bad)


@pytest.mark.parametrize("n", [0, 1, 1024])
def test_cohorts_out_of_range_are_named(n: int) -> None:
    with pytest.raises(LocalError, match="between 2 and 1023"):
        LightSecAgg(1.0).resolve(n)


BAD_INPUTS = [
    np.zeros(4, np.uint64),
    np.zeros((5, 1), np.uint64),
    np.zeros(5, np.int64),
    np.zeros(5, np.float64),
    np.full(5, 1 << 16, np.uint64),
]


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=str)
def test_inputs_that_are_no_ring_vectors_are_the_callers_mistake(bad: Vector) -> None:
    """Wrong shape, wrong type, and 2^16 in a ring of 16 bits, which would wrap around unseen."""
    chosen = lab(3)
    with pytest.raises(LocalError, match="input"):
        chosen.run(inputs=dict.fromkeys(chosen.nodes, bad))


def test_secrets_do_not_print() -> None:
    chosen = lab(3, active=True)
    run = chosen.run()
    client = chosen.client(11, "one")
    assert "secret" not in repr(client) and len(repr(client)) < 400
    assert repr(Secrets(b"\x77" * 32, bytes(32))).count("w") == 0
    root = run.kept[0][11][1][:32]
    assert repr(root) not in repr(Secrets(root, bytes(32)))


@pytest.mark.parametrize(("bits", "width"), [(7, 4), (32, 4), (33, 8), (64, 8)])
def test_masks_and_noise_are_keystreams_of_another_library(bits: int, width: int) -> None:
    secrets = Secrets(b"r" * 32, b"d" * 32)
    for label, ours in (("mask", secrets.mask(9, bits)), ("noise", secrets.noise(9, bits))):
        info = b"privfed v1 lightsecagg " + label.encode() + b"\0" + b"d" * 32
        seed = HKDF(b"r" * 32, 16, b"", SHA256, context=info)
        cipher = AES.new(seed, AES.MODE_CTR, nonce=b"", initial_value=(2).to_bytes(16, "big"))
        expected = np.frombuffer(cipher.encrypt(bytes(9 * width)), dtype=f"<u{width}") & ((1 << bits) - 1)
        np.testing.assert_array_equal(ours, expected)


def test_every_key_has_one_purpose() -> None:
    """Mask, noise and channels of a session, of two sessions, of both directions: all different."""
    first, second = Secrets(b"r" * 32, b"a" * 32), Secrets(b"r" * 32, b"b" * 32)
    drawn = [s.mask(4, 64).tobytes() for s in (first, second)] + [s.noise(4, 64).tobytes() for s in (first, second)]
    drawn += [s.signing_key() for s in (first, second)] + [first.version(v).mask(4, 64).tobytes() for v in (0, 1)]
    for context in (b"c" * 32, b"d" * 32):
        channel = keys.Channel(b"s" * 32, context)
        drawn += [channel.seal(1, 2, bytes(32)), channel.seal(2, 1, bytes(32)), channel.seal(1, 3, bytes(32))]
    assert len(set(drawn)) == len(drawn)


def two_node_view(inputs: tuple[int, int], bits: int) -> Counter[tuple[int, ...]]:
    """All the server of two nodes can see of masks, over all masks and noise: enumerated, not sampled."""
    code, ring = Code(2, 2, 1, bits), range(1 << bits)
    seen: Counter[tuple[int, ...]] = Counter()
    coded = {}
    for mask, noise in product(ring, product(ring, repeat=code.noise_size(1))):
        coded[mask, noise] = code.encode(np.array([mask], np.uint32), np.array(noise, np.uint32)).astype(int)
    for (z1, n1), (z2, n2) in product(coded, repeat=2):
        sums = (coded[z1, n1] + coded[z2, n2]) % (1 << bits)
        masked = ((inputs[0] + z1) % (1 << bits), (inputs[1] + z2) % (1 << bits))
        seen[masked + tuple(sums.ravel().tolist())] += 1
    return seen


def test_the_server_sees_the_same_for_inputs_of_equal_sum() -> None:
    """Exactly: every value of (masked inputs, opened sums of shares) is as likely for one as for the other."""
    assert two_node_view((1, 1), 1) == two_node_view((0, 0), 1)
    assert two_node_view((0, 1), 1) == two_node_view((1, 0), 1)
    assert two_node_view((0, 1), 1) != two_node_view((0, 0), 1)  # the sum itself is seen


def test_masked_inputs_are_uniform_in_real_sessions() -> None:
    """Chi-square over the 4 x 4 values of two masked inputs of 2 bits, 480 sessions of fixed randomness, input 0:
    false alarm 10^-6 (quantile of 15 degrees of freedom)."""
    chosen = lab(2, bits=2, dimension=1, policy=Policy(min_bits=2))
    seen: Counter[tuple[int, ...]] = Counter()
    for trial in range(480):
        run = chosen.run(inputs=chosen.inputs("zero"), label=f"trial {trial}")
        seen[tuple(reply[-1] for reply in run.replies[2].values())] += 1
    assert sum((seen[pair] - 30) ** 2 / 30 for pair in product(range(4), repeat=2)) < 56.5


def transcript(raw: dict[str, str]) -> bytes:
    return bytes.fromhex(raw["hex"])


def test_a_recorded_session_is_reproduced() -> None:
    """lightsecagg.json: every message of a session of three nodes with fixed randomness, and its result."""
    vector = json.loads((VECTORS / "lightsecagg.json").read_text())
    nodes = tuple(vector["nodes"])
    chosen = Rehearsal(LightSecAgg(vector["threshold"]), vector["dimension"], nodes, vector["bits"], active=True)
    inputs: dict[int, Vector] = {int(k): np.array(v, np.uint64) for k, v in vector["inputs"].items()}
    run = chosen.run(inputs=inputs, label="vector", vanish={int(k): v for k, v in vector["vanish"].items()})
    assert run.result is not None
    assert run.result.total.tolist() == vector["total"]
    assert sorted(run.result.survivors) == vector["survivors"]
    for recorded, happened in ((vector["requests"], run.requests), (vector["replies"], run.replies)):
        assert [{int(k): bytes.fromhex(v) for k, v in stage.items()} for stage in recorded] == happened


BAD = json.loads((VECTORS / "bad_lightsecagg.json").read_text())


@pytest.mark.parametrize("case", BAD["requests"], ids=lambda case: case["name"])
def test_bad_requests_are_refused_by_name(case: dict[str, str]) -> None:
    good = json.loads((VECTORS / "lightsecagg.json").read_text())
    chosen = Rehearsal(LightSecAgg(good["threshold"]), good["dimension"], tuple(good["nodes"]), good["bits"], True)
    client = chosen.client(int(case["node"]), label="vector")
    with pytest.raises(RemoteError) as caught:
        client.step(bytes.fromhex(case["kept"]), bytes.fromhex(case["request"]), lambda: np.zeros(1, np.uint64))
    assert caught.value.deviation == case["deviation"]
