"""Which protocol the mod that masks takes part in, and with which parameters: the node's word, not the server's."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.protocols import LightSecAgg, OneShot, SecAgg, SecAggPlus
from privfed.record import ConfigRecord, RecordDict
from privfed.ring import SECURE
from proofs_tests.mods.federation import KINDS, PROTOCOLS, Federation, only_at


@KINDS
def test_an_instance_pins_the_parameters(protocol: Any) -> None:
    name = type(protocol).__name__
    assert Federation(protocol, protocols={name: protocol}).session(1)[0].result is not None
    pinned = {name: replace(protocol, threshold=3)}
    lab = Federation(protocol, protocols=pinned)
    assert lab.session(1)[1] == {"RemoteError"}
    assert lab.trained == 0
    # A class takes what the server says, and is held to the policy alone.
    assert Federation(protocol, protocols={name: type(protocol)}).session(1)[0].result is not None


def test_a_pinned_sparse_graph_is_kept() -> None:
    pinned = {"SecAggPlus": SecAggPlus(neighbours=2, threshold=2)}
    assert Federation(SecAggPlus(threshold=2), protocols=pinned).session(1)[0].result is not None
    other = {"SecAggPlus": SecAggPlus(neighbours=2, threshold=3)}
    assert Federation(SecAggPlus(threshold=2), protocols=other).session(1)[1] == {"RemoteError"}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("SecureSum", {"total": 0, "survivors": 0, "traffic": 0, "error_bound": 0.0}),
        ("secure_sum", {"inputs": 0, "protocol": 0}),
        ("importlib", {}),
        ("Toy", {"threshold": 2}),
    ],
)
def test_only_protocols_are_protocols(name: str, parameters: dict[str, Any]) -> None:
    """Name and parameters come from the server: they must not call any other object of the package."""
    lab = Federation(SecAgg(threshold=2))

    def rename(content: RecordDict) -> None:
        content[SECURE + ".protocol"] = ConfigRecord({"name": name, **parameters})

    assert lab.session(1, change=only_at(0, rename))[1] == {"Refused"}
    assert Federation(SecAgg(threshold=2), protocols={"OneShot": OneShot}).session(1)[1] == {"Refused"}


@pytest.mark.parametrize(
    ("name", "value"), [("threshold", 1), ("threshold", "many"), ("no-such-parameter", 1), ("threads", 1)]
)
def test_parameters_that_no_protocol_has_are_refused(name: str, value: Any) -> None:
    def set_parameter(content: RecordDict) -> None:
        content.config_records[SECURE + ".protocol"][name] = value

    lab = Federation(SecAgg(threshold=2))
    assert lab.session(1, change=only_at(0, set_parameter))[1] == {"Refused"}


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 5), st.integers(-3, 2**70), st.sampled_from([0.0, 1.0, 2.0, 0.67]),
    st.floats(), st.text(max_size=4), st.binary(max_size=4), st.lists(st.integers(-1, 9), max_size=4),
    st.lists(st.text(max_size=2), max_size=2), st.lists(st.sampled_from([1.0, 2.0, 3.0]), max_size=3),
)  # fmt: skip
FIELDS = sorted({field.name for one in (SecAgg, SecAggPlus, LightSecAgg, OneShot) for field in fields(one)})


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([*PROTOCOLS, SecAggPlus(threshold=2)]), st.sampled_from(FIELDS), VALUES)
def test_whatever_parameters_a_server_names_nothing_breaks(protocol: Any, name: str, value: Any) -> None:
    """A node joins or refuses; what is not as the session's request says is no other error than a refusal."""

    def set_parameter(content: RecordDict) -> None:
        if value is not None:
            content.config_records[SECURE + ".protocol"][name] = value

    lab = Federation(protocol)
    refusals = {"Refused", "CommitteeNamed", "RemoteError", "LocalError"}
    assert lab.session(1, upto=1, change=only_at(0, set_parameter))[1] <= refusals


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("weaken", ["parameter", "layout", "arrays-key", "weight-key", "binding", "number", "name"])
def test_nothing_changes_from_stage_to_stage(stage: int, weaken: str) -> None:
    def change(content: RecordDict) -> None:
        header = content.config_records[SECURE]
        if weaken == "parameter":
            content.config_records[SECURE + ".protocol"]["threshold"] = 3
        elif weaken == "name":
            content.config_records[SECURE + ".protocol"]["name"] = "SecAggPlus"
        elif weaken == "layout":
            content.config_records[SECURE + ".layout"]["max-value"] = 4.0
        elif weaken == "binding":
            header["binding"] = bytes(32)
        elif weaken == "number":
            header["number"] = 2
        else:
            header[weaken] = "other"

    lab = Federation(SecAgg(threshold=2))
    assert lab.session(1, change=only_at(stage, change))[1] == {"SessionOutOfOrder"}
    assert lab.trained == (3 if stage == 3 else 0)
