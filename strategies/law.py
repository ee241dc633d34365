"""What each rule promises about its output, in one table that the tests read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from privfed.strategies import coordinate, middle, mixing, selection, spectral, trust
from privfed.strategies.matrix import as_matrix, full_row

Apply = Callable[[Any, int], Any]
Kappa = Callable[[int, int], float]


@dataclass(frozen=True)
class Law:
    """The laws of one rule, with parameters as `apply(X, f)` fixes them.

    least: the fewest rows for this f. translation: F(X + t) = F(X) + t. scale: F(c X) = c F(X), any c > 0 at which
    squares are still numbers (with parameters that are lengths scaled too, in `apply`, by the row norms). permutation:
    the order of rows does not matter for rows in general position; False where ties are natural or one row has a part
    of its own. Ties go to the lowest index, so that rows in the order of node ids give one result whatever order they
    arrived in.
    idempotence: equal rows give that row. range: every coordinate stays between its least and greatest value.
    robust: outliers of any size move it by a bounded amount only. kappa, as published: for every S of n-f rows,
    |F(X) - mean_S|^2 <= kappa(n, f) * variance_S. sharp: the same with what docs/robustness.md proves, if that is less.
    """

    apply: Apply
    least: Callable[[int], int]
    translation: bool = True
    scale: bool = True
    permutation: bool = True
    idempotence: bool = True
    range: bool = True
    robust: bool = True
    kappa: Kappa | None = None
    sharp: Kappa | None = None


def kappa_trimmed(n: int, f: int) -> float:
    """Return 6f/(n-2f) (1 + f/(n-2f)), of the trimmed mean [AFGGPS23]."""
    return 6 * f / (n - 2 * f) * (1 + f / (n - 2 * f))


def kappa_krum(n: int, f: int) -> float:
    """Return 6 (1 + f/(n-2f)), of Krum with n-f neighbours, itself included [AFGGPS23]."""
    return 6 * (1 + f / (n - 2 * f))


def kappa_median(n: int, f: int) -> float:
    """Return 4 (1 + f/(n-2f))^2, of the coordinate-wise and the geometric median [AFGGPS23]."""
    return 4 * (1 + f / (n - 2 * f)) ** 2


def sharp_trimmed(n: int, f: int) -> float:
    """Return f/(n-2f), of the trimmed mean: no rule has less [AFGGPS23]."""
    return f / (n - 2 * f)


def sharp_median(n: int, f: int) -> float:
    """Return n/(n-2f), of the coordinate-wise median."""
    return n / (n - 2 * f)


def sharp_krum(n: int, f: int) -> float:
    """Return (sqrt(2(n-f)) + sqrt(f+1))^2 / (n-2f-1), of Krum with n-f-2 neighbours besides itself."""
    return float((np.sqrt(2 * (n - f)) + np.sqrt(f + 1)) ** 2 / (n - 2 * f - 1))


def _near(c: float) -> float:
    return float((np.sqrt(c) + np.sqrt(1 + c)) ** 2)


def sharp_meamed(n: int, f: int) -> float:
    """Return (sqrt(c) + sqrt(1+c))^2, c = n/(n-2f): of the mean of the n-f values nearest to the median."""
    return _near(sharp_median(n, f))


def sharp_phocas(n: int, f: int) -> float:
    """Return (sqrt(c) + sqrt(1+c))^2, c = f/(n-2f): of the mean of the n-f values nearest to the trimmed mean."""
    return _near(sharp_trimmed(n, f))


def sharp_bulyan(n: int, f: int) -> float:
    """Return ((sqrt(c) + sqrt(1+c))^2 + 1) (n-f)/(n-3f), c = (n-2f)/(n-4f): whichever n-2f rows Bulyan picks."""
    return (_near((n - 2 * f) / (n - 4 * f)) + 1) * (n - f) / (n - 3 * f)


def sharp_diameter(n: int, f: int) -> float:
    """Return 8f^2/(n-f), of the mean of the n-f rows of least diameter."""
    return 8 * f * f / (n - f)


def sharp_smea(n: int, f: int) -> float:
    """Return 4f/(n-2f), of the mean of the n-f rows whose covariance has the least top eigenvalue."""
    return 4 * f / (n - 2 * f)


def mixed_kappa(kappa: Kappa) -> Kappa:
    """Return 8f/(n-f) (kappa + 1): of a rule behind nearest-neighbour mixing [AFGGPS23]."""
    return lambda n, f: 8 * f / (n - f) * (kappa(n, f) + 1)


def majority(f: int) -> int:
    """Return 2f + 1."""
    return 2 * f + 1


def _radius(X: Any) -> float:
    """Return the median norm of rows: a length that scales with them."""
    rows = as_matrix(X)
    whole = [full_row(rows, i).astype(np.float64) for i in range(rows.count)]
    norms = [float(np.linalg.norm(row)) for row in whole if np.isfinite(row).all()]
    return max(float(np.median(norms)), 1e-300) if norms else 1.0


def _after_mixing(rule: Apply) -> Apply:
    return lambda X, f: rule(mixing.lazy_mixing(X, f), f)


def _origin_law(apply: Apply, *, idempotence: bool = True, range: bool = False, robust: bool = True) -> Law:
    """Return the law of a rule on updates, which looks at norms or directions about zero."""
    return Law(apply, majority, translation=False, idempotence=idempotence, range=range, robust=robust)


LAWS: dict[str, Law] = {
    "mean": Law(lambda X, f: middle.mean(X), lambda f: 1, robust=False),
    "weighted_mean": Law(
        lambda X, f: middle.weighted_mean(X, np.arange(1, 1 + as_matrix(X).count)),
        lambda f: 1,
        permutation=False,
        robust=False,
    ),
    "median": Law(lambda X, f: coordinate.median(X), majority, kappa=kappa_median, sharp=sharp_median),
    "trimmed_mean": Law(coordinate.trimmed_mean, majority, kappa=kappa_trimmed, sharp=sharp_trimmed),
    "meamed": Law(coordinate.meamed, majority, sharp=sharp_meamed),
    "phocas": Law(coordinate.phocas, majority, sharp=sharp_phocas),
    "krum": Law(selection.krum, lambda f: 2 * f + 3, sharp=sharp_krum),
    "krum_allouah": Law(
        lambda X, f: selection.krum(X, f, neighbours=as_matrix(X).count - f - 1), majority, kappa=kappa_krum
    ),
    "multi_krum": Law(selection.multi_krum, lambda f: 2 * f + 3, sharp=sharp_krum),
    # the last picks count one neighbour, and the two nearest rows always tie
    "bulyan": Law(selection.bulyan, lambda f: 4 * f + 3, permutation=False, sharp=sharp_bulyan),
    # several sets often share their two farthest rows, and with them their diameter
    "minimum_diameter_mean": Law(selection.minimum_diameter_mean, majority, permutation=False, sharp=sharp_diameter),
    # its pivot is one of the rows
    "monna": Law(selection.monna, majority, permutation=False),
    "cge": Law(selection.cge, majority, translation=False),
    "smea": Law(spectral.smea, majority, sharp=sharp_smea),
    "caf": Law(spectral.caf, majority),
    "dnc": Law(spectral.dnc, majority),
    "geometric_median": Law(lambda X, f: middle.geometric_median(X), majority, kappa=kappa_median),
    "centered_clipping": _origin_law(lambda X, f: middle.centered_clipping(X, _radius(X), steps=2)),
    "norm_bounding": _origin_law(lambda X, f: middle.norm_bounding(X, _radius(X))),
    "fltrust": _origin_law(lambda X, f: trust.fltrust(X, full_row(as_matrix(X), 0))),
    # made against many that push one way: one that resembles nobody counts in full
    "foolsgold": _origin_law(lambda X, f: trust.foolsgold(X), idempotence=False, robust=False),
    "flame": _origin_law(lambda X, f: trust.flame(X)),
    "nnm+trimmed_mean": Law(_after_mixing(coordinate.trimmed_mean), majority, kappa=mixed_kappa(kappa_trimmed)),
    "nnm+median": Law(_after_mixing(lambda X, f: coordinate.median(X)), majority, kappa=mixed_kappa(kappa_median)),
    "nnm+geometric_median": Law(
        _after_mixing(lambda X, f: middle.geometric_median(X)), majority, kappa=mixed_kappa(kappa_median)
    ),
    "nnm+krum": Law(
        _after_mixing(lambda X, f: selection.krum(X, f, neighbours=X.rows.count - f - 1)),
        majority,
        kappa=mixed_kappa(kappa_krum),
    ),
}
