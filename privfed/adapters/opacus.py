"""Record-level DP-SGD with Opacus: its per-sample gradients; our sampling, noise and accounting.

    engine = PrivacyEngine(context, epsilon=3.0, delta=1e-5)
    model, optimizer, loader = engine.make_private(module=model, optimizer=optimizer, data_loader=loader,
                                                   noise_multiplier=1.1, max_grad_norm=1.0)
    for batch in loader:            # one pass: about len(dataset) / batch size batches, drawn by coin, some maybe empty
        ...; loss.backward(); optimizer.step(); optimizer.zero_grad()

Unit: record. Relation: zero_out (a record's gradients become zero; the data set's size is public). Observer: output:
whoever sees what leaves the node, the server included, since the node draws its batches in secret. One step costs
`PoissonSampled(q, Gaussian(z))` [ACG+16], charged before the step; with `epsilon` the step that would exceed it raises
BudgetExceeded and changes nothing.

What Opacus does and this does not: shuffled batches accounted as Poisson batches, noise and batches from torch's
generator, floating-point noise, float32 sums, division by a batch size. Batches come from operating-system coins; noise
is an exact discrete Gaussian on a lattice; clipped gradients are added in float64.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from privfed.errors import AppError, PrivfedError
from privfed.privacy.accountant import Accountant
from privfed.privacy.bound import Bound
from privfed.privacy.calibration import calibrate, calibrate_steps
from privfed.privacy.events import Event, Gaussian, PoissonSampled, event_from_json
from privfed.privacy.filters import BudgetExceeded
from privfed.privacy.mechanisms import add_discrete_gaussian
from privfed.record import ConfigRecord, ConfigValue

try:
    import torch
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer
    from torch import nn
    from torch.utils import data
except ImportError:  # the extra is optional
    raise AppError("record-level privacy needs torch and Opacus: pip install 'privfed[torch]'") from None

STATE = "record_privacy"
Random = Callable[[int], bytes]
_FLOAT_SLACK = 1 + 2.0**-20
_SHUFFLES = (data.RandomSampler, data.SequentialSampler)


class TrainingNotPrivate(PrivfedError):
    """Training in a way that the claimed guarantee does not cover; says what, why, and what to do instead."""


class PoissonBatches(data.Sampler[list[int]]):  # type: ignore[misc]  # torch is optional, and untyped without it
    """Batches in which every record is with probability q, by its own operating-system coin; maybe nobody."""

    def __init__(self, size: int, q: float, batches: int, random: Random = os.urandom) -> None:
        self._size, self._random, self._batches = size, random, batches
        # A coin is a uniform 64-bit number; rounding up the threshold would make q larger than what is charged.
        self._threshold = math.floor(q * 2.0**64)
        self.last = -1
        self.open = False

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self._batches):
            if self.open:
                raise TrainingNotPrivate(
                    "a batch was drawn, and no optimizer.step() followed: every batch needs one, empty ones too, or "
                    "the number of steps tells about the data"
                )
            coins = np.frombuffer(self._random(8 * self._size), np.uint64)
            batch = np.flatnonzero(coins < np.uint64(min(self._threshold, 2**64 - 1))).tolist()
            self.last, self.open = len(batch), True
            yield batch


class _Collate:
    """The loader's own collate function, and for an empty batch the same structure with nothing in it."""

    def __init__(self, collate: Callable[[list[Any]], Any], example: Any) -> None:
        self._collate = collate
        self._empty = _emptied(collate([example]))

    def __call__(self, records: list[Any]) -> Any:
        return self._collate(records) if records else self._empty


def _emptied(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch[:0]
    if isinstance(batch, dict):
        return {key: _emptied(value) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(_emptied(value) for value in batch)
    raise TrainingNotPrivate(
        f"the data loader's batches hold a {type(batch).__name__}: only tensors, and dicts, lists and tuples of them, "
        "can be empty"
    )


class _Optimizer(DPOptimizer):  # type: ignore[misc]  # Opacus has no types
    """Clip each record's gradient in float64, add exact noise to the sum, divide by a public constant."""

    def __init__(self, optimizer: Any, engine: PrivacyEngine, batches: PoissonBatches, terms: _Terms) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=terms.noise_multiplier,
            max_grad_norm=terms.max_grad_norm,
            expected_batch_size=1,
        )
        self._engine, self._batches, self._terms = engine, batches, terms

    def signal_skip_step(self, do_skip: bool = True) -> None:
        if do_skip:
            raise TrainingNotPrivate("steps cannot be skipped or accumulated: draw smaller batches instead")

    def clip_and_accumulate(self) -> None:
        samples = [self._samples(parameter) for parameter in self.params]
        count = len(samples[0])
        if not self._batches.open or {len(one) for one in samples} != {self._batches.last}:
            raise TrainingNotPrivate(
                f"the gradients are of {count} records, the loader's last batch has {self._batches.last}: train on "
                "each batch once, whole, and on nothing else"
            )
        squares = torch.zeros(count, dtype=torch.float64)
        for one in samples:
            squares += one.reshape(count, -1).double().square().sum(dim=1).cpu() if count else squares
        norms = squares.sqrt()
        if not bool(torch.isfinite(norms).all()):
            raise TrainingNotPrivate("a record's gradient is NaN or infinite: nothing was released")
        factors = (self.max_grad_norm / norms.clamp(min=1e-300)).clamp(max=1.0)
        for parameter, one in zip(self.params, samples, strict=True):
            weights = factors.to(one.device)
            parameter.summed_grad = torch.einsum("i,i...->...", weights, one.double())
            parameter.grad_sample = None

    @staticmethod
    def _samples(parameter: Any) -> Any:
        found = parameter.grad_sample
        if isinstance(found, list):
            if len(found) != 1:
                raise TrainingNotPrivate("the batch went forward and backward more than once before this step")
            found = found[0]
        if found is None:
            raise TrainingNotPrivate("a trainable parameter has no gradients: call loss.backward() before every step")
        return found

    def add_noise(self) -> None:
        terms = self._terms
        flat = np.concatenate([p.summed_grad.reshape(-1).cpu().numpy() for p in self.params])
        self._engine.charge(terms.event)
        self._batches.open = False
        noised, _ = add_discrete_gaussian(
            flat,
            sensitivity=terms.max_grad_norm * _FLOAT_SLACK,
            noise_multiplier=terms.noise_multiplier,
            # float64 sums of at most all records: each addition rounds by at most 2^-53 of what is summed so far.
            rounding_error=terms.records**2 * 2.0**-52 * terms.max_grad_norm,
            random=terms.random,
        )
        mean = torch.from_numpy(noised / terms.expected_batch)
        place = 0
        for parameter in self.params:
            part = mean[place : place + parameter.numel()].reshape(parameter.shape)
            parameter.grad = part.to(parameter.dtype).to(parameter.device)
            parameter.summed_grad = None
            place += parameter.numel()

    def scale_grad(self) -> None:
        """The mean was taken with the noise."""


class _Terms:
    """What was agreed for one training: public numbers all of them."""

    def __init__(
        self, records: int, q: float, noise_multiplier: float, max_grad_norm: float, random: Random | None
    ) -> None:
        self.records, self.noise_multiplier, self.max_grad_norm = records, noise_multiplier, max_grad_norm
        self.expected_batch = q * records
        self.event = PoissonSampled(q, Gaussian(noise_multiplier if random is None else 0.0))
        self.random = random or os.urandom


class PrivacyEngine:
    """Makes a training loop private, and counts what it has cost this node in this run.

    context: the app's; what was spent is kept in its state, over rounds and crashes; None: in this object. epsilon,
    delta: the budget of all training under it; epsilon None: spending is counted and not limited.
    """

    unit, relation, observer = "record", "zero_out", "output"

    def __init__(self, context: Any = None, *, epsilon: float | None = None, delta: float = 1e-5) -> None:
        if epsilon is not None and not (math.isfinite(epsilon) and epsilon > 0):
            raise ValueError(f"epsilon must be finite and > 0, got {epsilon}")
        if not 0 < delta < 1:
            raise ValueError(f"delta must be in (0, 1), got {delta}")
        self._context, self._epsilon, self._delta = context, epsilon, delta
        self._spent: dict[str, int] = {}
        self._allowed: dict[str, int] = {}

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: data.DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float,
        batches: int | None = None,
        insecure_test_random: Random | None = None,
    ) -> tuple[GradSampleModule, DPOptimizer, data.DataLoader[Any]]:
        """Return private twins of a model, its optimizer and its loader; train with these and with nothing else.

        noise_multiplier: standard deviation of the noise over max_grad_norm, the L2 bound on a record's gradient. The
        loader's batch size and data set set q = batch size / size, both public. batches: of one pass over the loader;
        None: size / batch size, rounded up. insecure_test_random: bytes for batches and noise in a test, instead of the
        operating system's; they protect nothing, so every step costs an infinite epsilon.

        Raises TrainingNotPrivate for what the guarantee does not cover: BatchNorm, weighted or other samplers, batch
        samplers, iterable data sets, parameters in the optimizer that are not the module's, more than one device group.
        """
        for name, value in (("noise_multiplier", noise_multiplier), ("max_grad_norm", max_grad_norm)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and > 0, got {value}")
        size, batch = _check_loader(data_loader)
        _check_module(module)
        _check_optimizer(module, optimizer)
        q = min(1.0, batch / size)
        count = batches if batches is not None else math.ceil(size / batch)
        if count < 1:
            raise ValueError(f"batches must be >= 1, got {batches}")
        drawn = PoissonBatches(size, q, count, insecure_test_random or os.urandom)
        collate = _Collate(data_loader.collate_fn, data_loader.dataset[0])
        loader = data.DataLoader(data_loader.dataset, batch_sampler=drawn, collate_fn=collate)
        terms = _Terms(size, q, noise_multiplier, max_grad_norm, insecure_test_random)
        private = module if isinstance(module, GradSampleModule) else GradSampleModule(module, strict=True)
        return private, _Optimizer(optimizer, self, drawn, terms), loader

    def make_private_with_epsilon(
        self, *, data_loader: data.DataLoader[Any], epochs: int, rounds: int = 1, **options: Any
    ) -> tuple[GradSampleModule, DPOptimizer, data.DataLoader[Any]]:
        """Do as `make_private`, with the least noise for which `rounds` times `epochs` passes keep the budget."""
        if self._epsilon is None:
            raise ValueError("epsilon: give the engine a budget to calibrate the noise to")
        size, batch = _check_loader(data_loader)
        batches = options.get("batches") or math.ceil(size / batch)
        q = min(1.0, batch / size)
        noise = calibrate(
            lambda z: PoissonSampled(q, Gaussian(z)),
            count=batches * epochs * rounds,
            epsilon=self._epsilon,
            delta=self._delta,
            unit=self.unit,
            relation=self.relation,
            observer=self.observer,
        )
        return self.make_private(data_loader=data_loader, noise_multiplier=noise, **options)

    def get_epsilon(self, delta: float | None = None) -> Bound:
        """Return what all steps have cost: epsilon at delta (default: the budget's), unit record, zero_out, output."""
        return self._accountant().epsilon(delta=self._delta if delta is None else delta)

    def charge(self, event: Event) -> None:
        """Count a step. Raises BudgetExceeded, and counts nothing, when it would cost more than the budget."""
        counts, text = self._counts(), event.to_json()
        after = counts | {text: counts.get(text, 0) + 1}
        self._check(after, event, text)
        self._spent = after
        if self._context is not None:
            kept: dict[str, ConfigValue] = dict(after)
            self._context.state[STATE] = ConfigRecord(kept)

    def _check(self, after: dict[str, int], event: Event, text: str) -> None:
        if self._epsilon is None:
            return
        if set(after) == {text}:  # one kind of step: how many there may be is found once
            if text not in self._allowed:
                self._allowed[text] = calibrate_steps(
                    event,
                    epsilon=self._epsilon,
                    delta=self._delta,
                    unit=self.unit,
                    relation=self.relation,
                    observer=self.observer,
                )
            if after[text] <= self._allowed[text]:
                return
        spent = self._accountant(after).epsilon(delta=self._delta).upper
        if not spent <= self._epsilon:
            before = self._accountant().epsilon(delta=self._delta).upper
            raise BudgetExceeded("this node's records", before, spent, self._epsilon, "epsilon")

    def _counts(self) -> dict[str, int]:
        kept = self._context.state.get(STATE) if self._context is not None else None
        if isinstance(kept, ConfigRecord):
            return {text: int(str(count)) for text, count in kept.items()}
        return dict(self._spent)

    def _accountant(self, counts: dict[str, int] | None = None) -> Accountant:
        accountant = Accountant(unit=self.unit, relation=self.relation, observer=self.observer)
        for text, count in (self._counts() if counts is None else counts).items():
            accountant.step(event_from_json(text), count)
        return accountant


def _check_loader(loader: data.DataLoader[Any]) -> tuple[int, int]:
    """Return (records, batch size), or say why the loader's batches cannot be accounted."""
    if isinstance(loader.dataset, data.IterableDataset):
        raise TrainingNotPrivate("an iterable data set cannot be sampled record by record: use one with a length")
    if not isinstance(loader.sampler, _SHUFFLES) or getattr(loader.sampler, "replacement", False):
        raise TrainingNotPrivate(
            f"sampler {type(loader.sampler).__name__}: some records would be drawn more often than the accounting says;"
            " use a plain shuffled loader, whose batches are then drawn by fair coins"
        )
    if type(loader.batch_sampler) is not data.BatchSampler or loader.batch_size is None:
        raise TrainingNotPrivate("a batch sampler of one's own is not accounted: give the loader a batch_size")
    size = len(loader.dataset)
    if size == 0:
        raise TrainingNotPrivate("the data set is empty")
    return size, min(loader.batch_size, size)


def _check_module(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            raise TrainingNotPrivate(
                f"layer {name!r} is a {type(part).__name__}: it mixes the records of a batch, so one record changes "
                "the gradients of all; use GroupNorm (opacus.validators.ModuleValidator.fix replaces it)"
            )
        if getattr(part, "track_running_stats", False):
            raise TrainingNotPrivate(f"layer {name!r} keeps running statistics of the data, which nothing noises")
    if not module.training:
        raise TrainingNotPrivate("the module is in eval mode: call module.train() first")
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise TrainingNotPrivate("the module has no trainable parameter")


def _check_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if isinstance(optimizer, DPOptimizer):
        raise TrainingNotPrivate("the optimizer is private already: give the one it was made of")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    wanted = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
    if not wanted >= {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}:
        raise TrainingNotPrivate("the optimizer holds parameters that are not the module's: they would get no noise")
    if not held & wanted:
        raise TrainingNotPrivate("the optimizer holds none of the module's trainable parameters")
