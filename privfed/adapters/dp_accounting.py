"""Translate events to and from dp-accounting's, where both mean the same."""

from __future__ import annotations

from typing import Any

from privfed.privacy import events as ev


def _library() -> Any:
    try:
        import dp_accounting
    except ImportError as missing:
        raise ImportError("dp_accounting: not installed; `pip install dp-accounting` to translate events") from missing
    return dp_accounting


def to_dp_event(event: ev.Event) -> Any:
    """Return dp-accounting's event; ValueError where it has none with this meaning.

    Matrix mechanisms become the Gaussian they are worth. dp-accounting 0.6 ignores the count of randomised response
    in compositions, and its RDP accountant takes a sum to change by C under replace_one, where it changes by 2C: what
    it reports there for Gaussian noise, all of it or sampled without replacement, is too little. Ask its PLD
    accountant, or privfed.
    """
    dp = _library()
    if isinstance(event, ev.Gaussian):
        return dp.GaussianDpEvent(event.noise_multiplier)
    if isinstance(event, ev.MatrixGaussian) and event.sensitivity > 0:
        return dp.GaussianDpEvent(event.noise_multiplier / event.sensitivity)
    if isinstance(event, ev.Laplace):
        return dp.LaplaceDpEvent(event.noise_multiplier)
    if isinstance(event, ev.RandomizedResponse):
        return dp.RandomizedResponseDpEvent(event.noise, event.categories)
    if isinstance(event, ev.ZCDP):
        return dp.ZCDpEvent(event.rho)
    if isinstance(event, ev.Unaccounted):
        return dp.NonPrivateDpEvent()
    if isinstance(event, ev.PoissonSampled):
        return dp.PoissonSampledDpEvent(event.rate, to_dp_event(event.inner))
    if isinstance(event, ev.FixedSizeSampled):
        return dp.SampledWithoutReplacementDpEvent(event.population, event.sample_size, to_dp_event(event.inner))
    if isinstance(event, ev.TruncatedPoisson) and isinstance(event.inner, ev.Gaussian):
        return dp.TruncatedSubsampledGaussianDpEvent(
            event.population, event.rate, event.cap, event.inner.noise_multiplier
        )
    if isinstance(event, ev.Composed):
        return dp.ComposedDpEvent([dp.SelfComposedDpEvent(to_dp_event(part), count) for part, count in event.parts])
    raise ValueError(f"event: dp-accounting has nothing that means {type(event).__name__}")


def from_dp_event(event: Any) -> ev.Event:
    """Return privfed's event for one of dp-accounting's; ValueError for kinds without a counterpart."""
    dp = _library()
    if isinstance(event, dp.NoOpDpEvent):
        return ev.Composed(())
    if isinstance(event, dp.GaussianDpEvent):
        return ev.Gaussian(event.noise_multiplier)
    if isinstance(event, dp.LaplaceDpEvent):
        return ev.Laplace(event.noise_multiplier)
    if isinstance(event, dp.RandomizedResponseDpEvent):
        return ev.RandomizedResponse(event.noise_parameter, event.num_buckets)
    if isinstance(event, dp.NonPrivateDpEvent):
        return ev.Unaccounted("dp-accounting's NonPrivateDpEvent")
    if isinstance(event, dp.PoissonSampledDpEvent):
        return ev.PoissonSampled(event.sampling_probability, from_dp_event(event.event))
    if isinstance(event, dp.SampledWithoutReplacementDpEvent):
        return ev.FixedSizeSampled(event.sample_size, event.source_dataset_size, from_dp_event(event.event))
    if isinstance(event, dp.SelfComposedDpEvent):
        return ev.Composed(((from_dp_event(event.event), int(event.count)),))
    if isinstance(event, dp.ComposedDpEvent):
        return ev.Composed(tuple((from_dp_event(part), 1) for part in event.events))
    if isinstance(event, dp.ZCDpEvent) and event.xi == 0:
        return ev.ZCDP(event.rho)
    if isinstance(event, dp.TruncatedSubsampledGaussianDpEvent):
        inner = ev.Gaussian(event.noise_multiplier)
        return ev.TruncatedPoisson(event.sampling_probability, event.dataset_size, event.truncated_batch_size, inner)
    raise ValueError(f"event: privfed has nothing that means {type(event).__name__}")
