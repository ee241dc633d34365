"""What a version names in a buffered run: one model, trained on once, and no update opened alone in its version."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from privfed.protocols.errors import LocalError, RemoteError, TooFewSurvivors
from privfed.protocols.lightsecagg import buffered, messages
from privfed.protocols.lightsecagg.buffered import Memory
from proofs_tests.protocols.buffered_run import BINDINGS, TERMS, Run, expected, refusal, update


def test_one_version_is_one_model() -> None:
    run = Run()
    run.contribute(1, 2)
    run.contribute(2, 2)
    run.kept[3], message = run.nodes[3].contribute(run.kept[3], 2, bytes(32), update(3, 2))
    run.server.contribute(3, message)
    assert refusal(run, run.server.begin(2)[5]) == "inconsistent-model"


def test_a_version_is_contributed_once() -> None:
    run = Run()
    run.contribute(1, 2)
    for version in (2, 1):
        with pytest.raises(LocalError, match="version"):
            run.contribute(1, version)


def test_a_binding_has_32_bytes() -> None:
    run = Run()
    with pytest.raises(LocalError, match="version"):
        run.nodes[1].contribute(run.kept[1], 1, b"", update(1, 1))


def test_a_version_stays_the_model_it_was_for_a_node() -> None:
    """Two buffers, each of one model for itself, and a version that is another model in the second."""
    run = Run()
    for node in (1, 2, 3):
        run.contribute(node, 3)
    run.buffer(3)
    for node in (4, 5):
        forged = replace(Memory.decode(run.kept[node]), models={}).encode()  # as if it had not seen the first buffer
        _, message = run.nodes[node].contribute(forged, 3, bytes(32), update(node, 3))
        run.server.contribute(node, message)
    run.contribute(1, 4)
    request = run.server.begin(4)[2]
    assert refusal(run, request, node=2) == "inconsistent-model"


def test_a_node_holds_a_buffer_to_the_model_it_trained_on_itself() -> None:
    run = Run()
    run.contribute(5, 2)
    for node in (1, 2, 3):
        run.kept[node], message = run.nodes[node].contribute(run.kept[node], 2, bytes(32), update(node, 2))
        run.server.contribute(node, message)
    rows = run.server.begin(2)[5]
    digest = bytes(rows[1:33])
    current, entries = messages.body(rows, buffered.BUFFER, digest, buffered.read_buffer)
    others = buffered.listing(current, tuple(entry for entry in entries if entry.node != 5))
    assert refusal(run, messages.sealed(buffered.BUFFER, digest, others), node=5) == "inconsistent-model"


def test_a_node_trains_no_version_that_was_another_model_before() -> None:
    run = Run()
    for node in (1, 2, 3):
        run.contribute(node, 3)
    run.buffer(3)
    with pytest.raises(RemoteError, match="inconsistent-model"):
        run.nodes[4].contribute(run.kept[4], 3, bytes(32), update(4, 3))
    assert Memory.decode(run.kept[4]).models == {3: BINDINGS[3]}
    for node in (1, 2, 3):
        run.contribute(node, 9)
    run.buffer(9)
    assert Memory.decode(run.kept[4]).models == {9: BINDINGS[9]}, "what no buffer can hold any more is forgotten"


def test_a_model_is_trained_on_once_whatever_its_version_is_called() -> None:
    """Two buffers over updates of one model would differ by what a single node sent."""
    run = Run()
    for node in TERMS.nodes:
        run.contribute(node, 3)
    run.buffer(3)
    run.contribute(1, 20)  # long after, when nothing stale is remembered
    for binding, version in ((BINDINGS[3], 21), (BINDINGS[20], 22)):
        with pytest.raises(RemoteError, match="repeated-model"):
            run.nodes[1].contribute(run.kept[1], version, binding, update(1, version))
    run.contribute(1, 23)


def test_a_server_that_makes_a_model_up_for_every_node_does_not_learn_its_update() -> None:
    """Node 1 trains, 2 and 3 are given models without a gradient under other versions: the sum would be 1's update."""
    dead = np.zeros(9, np.uint32)
    for terms in (TERMS, replace(TERMS, per_version=None), replace(TERMS, per_version=2)):
        run = Run(terms)
        run.contribute(1, 3)
        run.contribute(2, 4, dead)
        run.contribute(3, 5, dead)
        if terms.alike == 1:
            np.testing.assert_array_equal(run.buffer(5).total, expected({1: 3}, 5))
            continue
        assert not run.server.ready(5)
        with pytest.raises(TooFewSurvivors):
            run.server.begin(5)
        run.server._terms = replace(terms, per_version=1)
        assert refusal(run, run.server.begin(5)[5]) == "lonely-version"


def test_an_update_alone_in_its_version_waits_for_company_and_not_for_ever() -> None:
    run = Run(replace(TERMS, goal=3, privacy=0, per_version=None))
    for node, version in ((1, 5), (2, 5), (3, 5), (4, 4)):
        run.contribute(node, version)
    found = run.buffer(5)
    assert found.weights == {1: 8, 2: 8, 3: 8}
    assert run.server.waiting == {4: 4}, "it has a weight for one version more"
    for node in (1, 2, 3):
        run.contribute(node, 6)
    run.contribute(5, 4)
    assert run.buffer(6).weights == {1: 8, 2: 8, 3: 8, 4: 2, 5: 2}
    run.contribute(5, 5)
    for node in (1, 2, 3):
        run.contribute(node, 8)
    assert run.buffer(8).weights == {1: 8, 2: 8, 3: 8}
    assert run.server.waiting == {}, "it has a weight in no buffer to come"
