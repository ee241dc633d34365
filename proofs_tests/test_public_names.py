"""The promised names exist, and importing them is light."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import privfed

PROMISED = {
    "privfed": "Array ArrayRecord MetricRecord ConfigRecord RecordDict Message Metadata MessageType Error Context "
    "ClientApp ServerApp Grid run_simulation PrivacyPlan PlainStage SecureStage GroupedStage Result RunResult "
    "RunFailed",
    "privfed.protocols": "SecAgg SecAggPlus LightSecAgg OneShot secure_sum",
    "privfed.protocols.graph": "solve_parameters Parameters",
    "privfed.privacy": "Gaussian Laplace DiscreteGaussian Skellam RandomizedResponse PoissonSampled FixedSizeSampled "
    "Accountant Bound calibrate",
    "privfed.strategies": "FedAvg FedAvgM FedProx FedAdagrad FedAdam FedYogi FedMedian FedTrimmedAvg Krum "
    "MultiKrum Bulyan rules PlainStage SecureStage GroupedStage QFedAvg RFA CenteredClipping NearestNeighborMixing "
    "FLTrust FedXgbBagging FedXgbCyclic SCAFFOLD FedNova FedBuff FedAnalytics",
    "privfed.strategies.rules": "median trimmed_mean krum multi_krum bulyan geometric_median centered_clipping meamed "
    "minimum_diameter_mean nearest_neighbor_mixing bucketing cge",
    "privfed.mods": "clip secure_aggregation message_size compose",
}


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in PROMISED.items() for n in names.split()])
def test_promised_name_exists(module: str, name: str) -> None:
    assert getattr(importlib.import_module(module), name) is not None


def test_attacks_are_there_without_further_imports() -> None:
    statement = "from privfed import attacks; attacks.client.forge(attacks.forgery.mimic), attacks.search.strongest"
    subprocess.run([sys.executable, "-c", statement], check=True)


def test_everything_in_all_exists() -> None:
    for name in privfed.__all__:
        assert getattr(privfed, name) is not None
    assert set(privfed.__all__) <= set(dir(privfed))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        privfed.nothing  # noqa: B018 - the access is the test


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import privfed", "numpy scipy sqlalchemy grpc click rich msgspec cryptography matplotlib"),
        ("import privfed; privfed.Message, privfed.ClientApp", "scipy sqlalchemy grpc matplotlib rich click"),
        ("import privfed.cli.main", "scipy sqlalchemy grpc matplotlib numpy"),
        ("import privfed.privacy", "scipy.stats sqlalchemy grpc matplotlib"),
    ],
)
def test_import_is_light(statement: str, forbidden: str) -> None:
    probe = f"import sys; {statement}; print([n for n in {forbidden.split()!r} if n in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True).stdout
    assert loaded.strip() == "[]"
