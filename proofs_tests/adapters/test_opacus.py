"""Record-level DP-SGD: clipped record by record, noised exactly, drawn by fair coins, counted, and traps refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytestmark = pytest.mark.torch

torch = pytest.importorskip("torch", reason="run by make test-torch, where torch is installed")
pytest.importorskip("opacus", reason="run by make test-torch, where Opacus is installed")

from opacus.utils.batch_memory_manager import BatchMemoryManager  # noqa: E402 - only where Opacus is installed
from torch import nn  # noqa: E402 - only where torch is installed
from torch.utils import data  # noqa: E402 - only where torch is installed

from privfed.adapters.opacus import PoissonBatches, PrivacyEngine, TrainingNotPrivate  # noqa: E402 - needs torch
from privfed.context import Context  # noqa: E402 - as above
from privfed.privacy import Accountant, Gaussian, PoissonSampled, calibrate_steps  # noqa: E402 - as above
from privfed.privacy.filters import BudgetExceeded  # noqa: E402 - as above

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]


def records(count: int = 40, width: int = 3, scale: float = 1.0) -> data.TensorDataset:
    rng = np.random.default_rng(1)
    x = torch.tensor(rng.normal(size=(count, width)) * scale, dtype=torch.float32)
    y = torch.tensor(rng.integers(0, 2, count), dtype=torch.int64)
    return data.TensorDataset(x, y)


def setting(engine: PrivacyEngine, dataset: data.Dataset | None = None, **options: object):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.ReLU(), nn.Linear(4, 2))
    held = dataset if dataset is not None else records()
    loader = data.DataLoader(held, batch_size=8, shuffle=True)
    arguments = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, **options}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return engine.make_private(module=model, optimizer=optimizer, data_loader=loader, **arguments)


def step(model, optimizer, batch) -> None:
    optimizer.zero_grad()
    x, y = batch
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def flat(model) -> np.ndarray:
    return np.concatenate([p.detach().numpy().reshape(-1) for p in model.parameters()])


def test_every_step_is_counted_as_what_it_was() -> None:
    context = Context()
    engine = PrivacyEngine(context)
    model, optimizer, loader = setting(engine)
    steps = 0
    for _ in range(3):
        for batch in loader:
            step(model, optimizer, batch)
            steps += 1
    assert steps == 15
    accountant = Accountant(unit="record", relation="zero_out", observer="output")
    accountant.step(PoissonSampled(8 / 40, Gaussian(1.0)), steps)
    assert engine.get_epsilon(1e-5) == accountant.epsilon(delta=1e-5)
    # The state is the app's, so the next round, or a resumed one, goes on counting.
    again = PrivacyEngine(context)
    assert again.get_epsilon(1e-5) == engine.get_epsilon(1e-5)


def test_the_budget_stops_training_before_it_is_exceeded() -> None:
    event = PoissonSampled(8 / 40, Gaussian(1.0))
    allowed = calibrate_steps(event, epsilon=3.0, delta=1e-5, unit="record", relation="zero_out")
    engine = PrivacyEngine(epsilon=3.0)
    model, optimizer, loader = setting(engine, batches=allowed + 1)
    done = 0
    with pytest.raises(BudgetExceeded):
        for batch in loader:
            before = flat(model)
            step(model, optimizer, batch)
            done += 1
    assert done == allowed >= 1
    assert (flat(model) == before).all()
    assert engine.get_epsilon().upper <= 3.0


def test_calibrated_noise_keeps_the_budget_to_the_last_step() -> None:
    engine = PrivacyEngine(epsilon=2.0)
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    private, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=data.DataLoader(records(), batch_size=8, shuffle=True),
        epochs=2,
        rounds=2,
        max_grad_norm=1.0,
    )
    for _ in range(4):
        for batch in loader:
            step(private, optimizer, batch)
    assert 1.98 < engine.get_epsilon().upper <= 2.0


def test_gradients_are_clipped_record_by_record() -> None:
    """With next to no noise the step is the sum of clipped gradients over the public batch size."""
    dataset = records(scale=50.0)
    engine = PrivacyEngine()
    model, optimizer, loader = setting(engine, dataset, noise_multiplier=1e-12, max_grad_norm=0.5)
    for batch in loader:
        before = flat(model)
        x, y = batch
        total = np.zeros(before.size)
        for record, label in zip(x, y, strict=True):
            optimizer.zero_grad()
            module = model._module
            loss = nn.functional.cross_entropy(module(record[None]), label[None])
            gradient = np.concatenate(
                [g.numpy().reshape(-1) for g in torch.autograd.grad(loss, list(module.parameters()))]
            )
            total += gradient * min(1.0, 0.5 / np.linalg.norm(gradient))
        step(model, optimizer, batch)
        moved = (before - flat(model)) / 0.1
        assert np.allclose(moved, total / 8.0, atol=2e-5)


def test_noise_has_the_stated_deviation() -> None:
    """Variance of 2,000 x 22 coordinates of noise alone, 6 standard errors: false alarms 2e-9."""
    zero = data.TensorDataset(torch.zeros(40, 3), torch.zeros(40, dtype=torch.int64))
    model = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(model.weight)
    engine = PrivacyEngine()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    private, twin, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=data.DataLoader(zero, batch_size=8),
        noise_multiplier=3.0,
        max_grad_norm=2.0,
        batches=2_000,
    )
    drawn = []
    for batch in loader:
        before = flat(private)
        step(private, twin, batch)
        drawn.append((before - flat(private)) * 8.0)
    values = np.concatenate(drawn)
    assert abs(values.var() / 36.0 - 1) < 6 * math.sqrt(2 / values.size)
    assert abs(values.mean()) < 6 * 6.0 / math.sqrt(values.size)


def test_batches_are_drawn_by_coins_of_the_stated_chance() -> None:
    """40 records, 4,000 batches: each record's count within 6 sd of its binomial; pairs are independent."""
    batches = PoissonBatches(40, 0.2, 4_000)
    seen = np.zeros((4_000, 40))
    for place, batch in enumerate(batches):
        batches.open = False
        seen[place, batch] = 1
    sd = math.sqrt(4_000 * 0.2 * 0.8)
    assert np.abs(seen.sum(axis=0) - 800).max() < 6 * sd
    correlation = np.corrcoef(seen.T) - np.eye(40)
    assert np.abs(correlation).max() < 6 / math.sqrt(4_000)
    sizes = seen.sum(axis=1)
    assert abs(sizes.var() / (40 * 0.16) - 1) < 6 * math.sqrt(2 / 4_000)


def test_empty_batches_take_a_step_of_noise() -> None:
    engine = PrivacyEngine()
    fixed = {"insecure_test_random": lambda size: b"\xff" * size if size == 320 else bytes(size)}
    model, optimizer, loader = setting(engine, **fixed)
    batch = next(iter(loader))
    assert [tuple(one.shape) for one in batch] == [(0, 3), (0,)]
    step(model, optimizer, batch)
    assert engine.get_epsilon(1e-5).lower == math.inf  # of a test's randomness
    with pytest.raises(BudgetExceeded):
        limited = PrivacyEngine(epsilon=8.0)
        model, optimizer, loader = setting(limited, **fixed)
        step(model, optimizer, next(iter(loader)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: data.DataLoader(d, batch_size=8, sampler=data.WeightedRandomSampler([1.0] * 40, 40)), "Weighted"),
        (lambda d: data.DataLoader(d, batch_size=8, sampler=data.RandomSampler(d, replacement=True)), "RandomSampler"),
        (lambda d: data.DataLoader(d, batch_size=8, sampler=data.SubsetRandomSampler(range(9))), "SubsetRandom"),
        (lambda d: data.DataLoader(d, batch_sampler=[[0, 1], [2]]), "batch sampler"),
        (lambda d: data.DataLoader(d, batch_size=None), "batch sampler"),
    ],
)
def test_loaders_that_cannot_be_accounted_are_refused(make, message: str) -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(TrainingNotPrivate, match=message):
        PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=make(records()),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )


def test_modules_and_optimizers_that_break_the_guarantee_are_refused() -> None:
    def attempt(module: nn.Module, optimizer: object | None = None) -> None:
        PrivacyEngine().make_private(
            module=module,
            optimizer=optimizer or torch.optim.SGD(module.parameters(), lr=0.1),  # type: ignore[arg-type]  # either
            data_loader=data.DataLoader(records(), batch_size=8),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )

    with pytest.raises(TrainingNotPrivate, match="GroupNorm"):
        attempt(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    with pytest.raises(TrainingNotPrivate, match="running statistics"):
        attempt(nn.Sequential(nn.Conv1d(3, 4, 1), nn.InstanceNorm1d(4, track_running_stats=True)))
    with pytest.raises(TrainingNotPrivate, match=r"module\.train"):
        attempt(nn.Linear(3, 2).eval())
    other = nn.Linear(3, 2)
    both = [*other.parameters(), nn.Parameter(torch.zeros(1))]
    with pytest.raises(TrainingNotPrivate, match="not the module's"):
        attempt(other, torch.optim.SGD(both, lr=0.1))
    with pytest.raises(TrainingNotPrivate, match=r"none of the module|not the module"):
        attempt(nn.Linear(3, 2), torch.optim.SGD(other.parameters(), lr=0.1))


def test_a_loop_that_goes_its_own_way_is_stopped() -> None:
    engine = PrivacyEngine()
    model, optimizer, loader = setting(engine)
    x, y = records()[:12]
    with pytest.raises(TrainingNotPrivate, match="on nothing else"):
        step(model, optimizer, (x, y))  # not a batch of the loader
    model, optimizer, loader = setting(engine)
    with pytest.raises(TrainingNotPrivate, match="every batch needs one"):
        for _ in loader:
            pass  # a step is left out
    model, optimizer, loader = setting(engine)
    batch = next(one for one in loader if step(model, optimizer, one) is None and len(one[0]))
    with pytest.raises(TrainingNotPrivate, match="on nothing else"):
        step(model, optimizer, batch)  # a second step on the same batch
    model, optimizer, loader = setting(engine)
    x, y = next(iter(loader))
    optimizer.zero_grad()
    for _ in range(2):
        nn.functional.cross_entropy(model(x), y).backward()
    with pytest.raises(TrainingNotPrivate, match=r"more than once|on nothing else"):
        optimizer.step()
    model, optimizer, loader = setting(engine)
    with (
        pytest.raises(TrainingNotPrivate, match="skipped or accumulated"),
        BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as small,
    ):
        for batch in small:
            step(model, optimizer, batch)
    assert engine.get_epsilon(1e-5).upper < 10


def test_bad_numbers_are_named() -> None:
    for name, value in (("noise_multiplier", 0.0), ("max_grad_norm", math.inf)):
        with pytest.raises(ValueError, match=name):
            setting(PrivacyEngine(), **{name: value})
    for arguments in ({"epsilon": 0.0}, {"epsilon": 1.0, "delta": 0.0}):
        with pytest.raises(ValueError, match=list(arguments)[-1]):
            PrivacyEngine(**arguments)
