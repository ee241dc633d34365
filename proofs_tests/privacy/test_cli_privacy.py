"""The command line says what the library says, and never an epsilon without its unit, relation and observer."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from privfed.cli.privacy import privacy
from privfed.privacy import Accountant, FixedSizeSampled, Gaussian, PoissonSampled, calibrate
from privfed.privacy.bound import printed
from privfed.privacy.filters import Budget
from privfed.privacy.ledger import Ledger, Terms

PLAN = ["--rate", "0.05", "--rounds", "40"]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(privacy, [str(argument) for argument in arguments])


def ask(*arguments: object) -> Any:
    result = call(*arguments, "--format", "json")
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def accountant(relation: str = "add_remove", observer: str = "output") -> Accountant:
    made = Accountant(unit="client", relation=relation, observer=observer)
    made.step(PoissonSampled(0.05, Gaussian(1.5)), count=40)
    return made


def test_epsilon_is_the_accountants() -> None:
    answer = ask("epsilon", "--noise-multiplier", 1.5, "--delta", 1e-6, *PLAN)
    bound = accountant().epsilon(1e-6)
    assert answer["epsilon"]["upper"] == pytest.approx(bound.upper, rel=1e-9)
    assert answer["epsilon"]["lower"] == pytest.approx(bound.lower, rel=1e-9)
    assert (answer["unit"], answer["relation"], answer["observer"]) == ("client", "add_remove", "output")


def test_delta_is_the_accountants() -> None:
    answer = ask("delta", "--noise-multiplier", 1.5, "--epsilon", 0.8, *PLAN)
    assert answer["delta"]["upper"] == pytest.approx(accountant().delta(0.8).upper, rel=1e-9)


def test_the_observer_matters() -> None:
    output = ask("epsilon", "--noise-multiplier", 1.5, "--delta", 1e-6, *PLAN)
    server = ask("epsilon", "--noise-multiplier", 1.5, "--delta", 1e-6, "--observer", "server", *PLAN)
    assert server["epsilon"]["upper"] > 5 * output["epsilon"]["upper"]
    assert server["observer"] == "server"


def test_calibrated_noise_keeps_the_budget() -> None:
    answer = ask("calibrate", "--epsilon", 1.0, "--delta", 1e-6, *PLAN)
    wanted = calibrate(lambda z: PoissonSampled(0.05, Gaussian(z)), count=40, epsilon=1.0, delta=1e-6)
    assert answer["noise_multiplier"] == pytest.approx(wanted, rel=1e-9)
    assert answer["epsilon"]["upper"] <= 1.0


def test_any_event_can_be_given_as_json() -> None:
    event = PoissonSampled(0.05, Gaussian(1.5))
    answer = ask("epsilon", "--event", event.to_json(), "--rounds", 40, "--delta", 1e-6)
    assert answer["epsilon"]["upper"] == pytest.approx(accountant().epsilon(1e-6).upper, rel=1e-9)


def test_fixed_size_cohorts() -> None:
    answer = ask(
        *("epsilon", "--noise-multiplier", 3.0, "--delta", 1e-6, "--relation", "replace_one"),
        *("--sample-size", 5, "--population", 100, "--rounds", 1),
    )
    made = Accountant(unit="client", relation="replace_one", observer="output")
    made.step(FixedSizeSampled(5, 100, Gaussian(3.0)), count=1)
    assert answer["epsilon"]["upper"] == pytest.approx(made.epsilon(1e-6).upper, rel=1e-9)


def test_tradeoff_bounds_the_attacker() -> None:
    answer = ask("tradeoff", "--noise-multiplier", 1.5, "--alpha", 0.01, "--alpha", 0.2)
    made = Accountant(unit="client", relation="add_remove", observer="output").step(Gaussian(1.5))
    assert [point["alpha"] for point in answer["points"]] == [0.01, 0.2]
    for point in answer["points"]:
        assert point["beta"]["lower"] == pytest.approx(made.tradeoff(point["alpha"]).lower, rel=1e-9)
        assert 0 < point["beta"]["lower"] < 1 - point["alpha"]


@pytest.mark.parametrize(
    "command",
    [
        ["epsilon", "--noise-multiplier", "1.5", "--delta", "1e-6", *PLAN],
        ["delta", "--noise-multiplier", "1.5", "--epsilon", "1", *PLAN],
        ["calibrate", "--epsilon", "1", "--delta", "1e-6", "--rounds", "2"],
        ["tradeoff", "--noise-multiplier", "1.5"],
    ],
)
def test_text_names_its_terms(command: list[str]) -> None:
    result = call(*command)
    assert result.exit_code == 0, result.output
    assert "unit client, relation add_remove, observer output" in result.output


@given(st.floats(1e-12, 1e6), st.integers(2, 10))
def test_bounds_are_printed_rounded_to_the_side_on_which_they_hold(value: float, digits: int) -> None:
    low, high = (float(printed(value, up=up, digits=digits)) for up in (False, True))
    assert low <= value <= high
    assert high - low <= 1.01 * value * 10.0 ** (1 - digits)
    assert (printed(math.inf, up=True), printed(0.0, up=False)) == ("inf", "0")


def test_the_printed_noise_and_epsilon_hold_as_printed() -> None:
    text = call("calibrate", "--epsilon", 1.0, "--delta", 1e-6, "--rounds", 3).output
    noise = float(re.search(r"noise multiplier (\S+)", text)[1])  # type: ignore[index]  # it is printed
    claim = float(re.search(r"epsilon <= (\S+)", text)[1])  # type: ignore[index]  # it is printed
    assert Accountant().step(Gaussian(noise), 3).epsilon(1e-6).upper <= claim <= 1.0


def test_compare_shows_every_relation_and_observer() -> None:
    arguments = ["compare", "--noise-multiplier", 4.0, "--sample-size", 5, "--population", 100, "--delta", 1e-6]
    rows = ask(*arguments)["rows"]
    assert len(rows) == 3 * 3 * 2
    by_terms = {(row["sampler"], row["relation"], row["observer"]): row for row in rows}
    plain = by_terms["no sampling", "add_remove", "output"]["epsilon"]["upper"]
    assert by_terms["Poisson 0.05", "add_remove", "output"]["epsilon"]["upper"] < plain
    assert by_terms["Poisson 0.05", "add_remove", "server"]["epsilon"]["upper"] == pytest.approx(plain, rel=1e-6)
    assert "refused" in by_terms["fixed 5 of 100", "add_remove", "output"]
    assert by_terms["no sampling", "replace_one", "output"]["epsilon"]["upper"] > plain
    text = call(*arguments).output
    assert text.count("\n") == 19
    assert "not proved" in text


# --- ledgers ----------------------------------------------------------------------------------------------------


def filled(folder: Path) -> Path:
    terms = Terms(owner="node 4", budget=Budget(epsilon=2.0, delta=1e-6))
    with Ledger.create(folder / "l", terms) as book:
        for number in range(5):
            transcript = hashlib.sha256(str(number).encode()).hexdigest()
            book.charge(Gaussian(20.0), run="a", round=number, transcript=transcript)
    return folder / "l"


def test_a_ledger_is_checked_and_printed(tmp_path: Path) -> None:
    path = filled(tmp_path)
    book = Ledger.read(path)
    answer = ask("ledger", path)
    assert answer["spent"] == book.spent
    assert answer["charges"] == 5
    assert answer["head"] == book.head
    assert answer["agrees"] is True
    assert (answer["unit"], answer["relation"], answer["observer"]) == ("client", "add_remove", "output")
    text = call("ledger", path, "--head", book.head).output
    assert re.search(r"node 4: 5 charges, epsilon \S+ of 2 spent", text)
    assert "unit client, relation add_remove, observer output" in text


def test_an_edited_or_shortened_ledger_fails(tmp_path: Path) -> None:
    path = filled(tmp_path)
    head = Ledger.read(path).head
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    shortened = call("ledger", path, "--head", head)
    assert shortened.exit_code == 1
    assert "charges were removed or added" in shortened.output
    path.write_bytes(b"".join(lines).replace(b'"round":2', b'"round":9'))
    edited = call("ledger", path)
    assert edited.exit_code == 1
    assert "line 4: its hash does not match" in edited.output


def test_the_plot_shows_the_band_and_the_budget(tmp_path: Path) -> None:
    path = filled(tmp_path)
    result = call("ledger", path, "--plot", tmp_path / "spend.svg")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "spend.svg").read_text().count("<path") > 5
    from privfed.cli.spending import bands

    points = bands(Ledger.read(path))
    assert [number for number, _, _ in points] == [1, 2, 3, 4, 5]
    assert all(0 < low <= high <= 2 for _, low, high in points)
    assert points[-1][2] == pytest.approx(Ledger.read(path).spent, rel=1e-9)


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["epsilon", "--noise-multiplier", "-1", "--delta", "1e-6"], "noise_multiplier"),
        (["epsilon", "--noise-multiplier", "1", "--delta", "2"], "delta"),
        (["epsilon", "--noise-multiplier", "1", "--delta", "1e-6", "--rate", "1.5"], "rate"),
        (["epsilon", "--noise-multiplier", "1", "--delta", "1e-6", "--rounds", "-3"], "count"),
        (["epsilon", "--noise-multiplier", "1", "--delta", "1e-6", "--rate", ".1", "--sample-size", "3"], "exclude"),
        (["epsilon", "--noise-multiplier", "1", "--delta", "1e-6", "--sample-size", "3"], "--population"),
        (["epsilon", "--noise-multiplier", "1"], "--delta"),
        (["epsilon", "--delta", "1e-6"], "one of --noise-multiplier and --event"),
        (["epsilon", "--delta", "1e-6", "--event", "{}"], "event"),
        (["epsilon", "--delta", "1e-6", "--event", '{"event":"Gaussian","noise_multiplier":-2}'], "noise_multiplier"),
        (["epsilon", "--noise-multiplier", "1", "--delta", "1e-6", "--relation", "mixed"], "--relation"),
        (["calibrate", "--epsilon", "-1", "--delta", "1e-6"], "epsilon"),
        (["compare", "--noise-multiplier", "1", "--delta", "1e-6", "--unit", ""], "unit"),
        (["compare", "--noise-multiplier", "-1", "--delta", "1e-6"], "noise_multiplier"),
    ],
)
def test_refusals_are_usage_errors_that_name_the_argument(command: list[str], says: str) -> None:
    result = call(*command)
    assert result.exit_code == 2, result.output
    assert says in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["epsilon", "delta", "calibrate", "tradeoff", "compare", "ledger"])
def test_every_command_explains_itself(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert "--format" in result.output
    for line in re.findall(r"^  --\S+.*$", result.output, re.M):
        assert len(line.split()) >= 2


def test_the_group_lists_its_commands() -> None:
    output = call("--help").output
    for command in ("epsilon", "delta", "calibrate", "tradeoff", "compare", "ledger"):
        assert command in output
