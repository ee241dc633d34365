"""Differential privacy: events, certified accounting, calibration, noise, ledgers. Names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from privfed.privacy.accountant import Accountant
    from privfed.privacy.bound import Bound
    from privfed.privacy.calibration import calibrate, calibrate_steps
    from privfed.privacy.events import (
        ZCDP,
        AboveThreshold,
        ApproximateDP,
        Central,
        Composed,
        DiscreteGaussian,
        DiscreteLaplace,
        DistributedDiscreteGaussian,
        DistributedSkellam,
        Event,
        Exponential,
        FixedSizeSampled,
        Gaussian,
        Laplace,
        MatrixGaussian,
        NonPrivate,
        PoissonSampled,
        PureDP,
        RandomAllocation,
        RandomizedResponse,
        Skellam,
        TruncatedPoisson,
        Unaccounted,
        event_from_json,
    )
    from privfed.privacy.filters import Budget, BudgetExceeded, GdpFilter, RenyiFilter, ZcdpFilter
    from privfed.privacy.ledger import Ledger
    from privfed.privacy.odometer import RenyiOdometer
    from privfed.privacy.sampling import (
        AvailabilitySampler,
        FixedSizeSampler,
        PoissonSampler,
        RandomAllocationSampler,
        TruncatedPoissonSampler,
    )

__all__ = [
    "ZCDP", "AboveThreshold", "Accountant", "ApproximateDP", "AvailabilitySampler", "Bound", "Budget",
    "BudgetExceeded", "Central", "Composed", "DiscreteGaussian", "DiscreteLaplace", "DistributedDiscreteGaussian",
    "DistributedSkellam", "Event", "Exponential", "FixedSizeSampled", "FixedSizeSampler", "Gaussian", "GdpFilter",
    "Laplace", "Ledger", "MatrixGaussian", "NonPrivate", "PoissonSampled", "PoissonSampler", "PureDP",
    "RandomAllocation", "RandomAllocationSampler", "RandomizedResponse", "RenyiFilter", "RenyiOdometer", "Skellam",
    "TruncatedPoisson", "TruncatedPoissonSampler", "Unaccounted", "ZcdpFilter", "calibrate", "calibrate_steps",
    "event_from_json",
]  # fmt: skip

_HOME = {
    "Accountant": "accountant",
    "Bound": "bound",
    "calibrate": "calibration",
    "calibrate_steps": "calibration",
    "Budget": "filters",
    "BudgetExceeded": "filters",
    "GdpFilter": "filters",
    "RenyiFilter": "filters",
    "ZcdpFilter": "filters",
    "Ledger": "ledger",
    "RenyiOdometer": "odometer",
    "AvailabilitySampler": "sampling",
    "FixedSizeSampler": "sampling",
    "PoissonSampler": "sampling",
    "RandomAllocationSampler": "sampling",
    "TruncatedPoissonSampler": "sampling",
}


def __getattr__(name: str) -> Any:
    """Load the module that defines a public name (PEP 562); names not listed above are events."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME.get(name, 'events')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
