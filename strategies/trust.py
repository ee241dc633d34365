"""Rules that weigh directions: FLTrust, FoolsGold, FLAME."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.strategies.gram import Gram, Square, Vector, as_gram, center_of, combine, gram
from privfed.strategies.guard import Exclusion, Refusal, Screened, guarded, screen, trusted_row
from privfed.strategies.matrix import Floats, Matrix, as_matrix


def cosines(G: Square | Gram) -> Square:
    """Return cosines between rows; a zero row has cosine 0 with every other and 1 with itself."""
    inner = as_gram(G).origin
    norm = np.sqrt(np.diagonal(inner))
    safe = np.where(norm > 0, norm, 1.0)
    out = np.clip(inner / safe[:, None] / safe[None, :], -1.0, 1.0)
    np.fill_diagonal(out, 1.0)
    return np.asarray(out)


def fltrust_weights(G: Square | Gram) -> Vector:
    """Return the weights of FLTrust [CFLG21]; the last row of G is the server's own update, whose weight is zero.

    Trust is max(0, cosine with the server's update); rows are scaled to the server's norm.
    """
    inner = as_gram(G).origin
    norm = np.sqrt(np.diagonal(inner))
    trust = np.maximum(cosines(G)[:-1, -1], 0.0)
    if not norm[-1] > 0:
        raise Refusal("the server's update is zero; it gives fltrust no direction to trust")
    if not trust.sum() > 0:
        raise Refusal("no row points along the server's update; fltrust has nobody to trust")
    scaled = np.where(norm[:-1] > 0, norm[-1] / np.where(norm[:-1] > 0, norm[:-1], 1.0), 0.0)
    return np.append(trust / trust.sum() * scaled, 0.0)


def fltrust(X: Any, server: Any, *, center: Any = None) -> Any:
    """Return the trust-weighted mean of updates scaled to the norm of the server's own update [CFLG21].

    X: n updates; server: the server's update from its root data set, one row. With center = the global model, X and
    server are models. Guarantee: no longer than the server's update, and within 90 degrees of it; no kappa, since it
    looks at no majority. Breakdown point: none, any number of clients may lie while the server's data are sound. Cost:
    n^2 d / 2 multiplications.
    """

    def body(rows: Matrix, f: int) -> Floats:
        own = trusted_row(server, rows, "server")
        origin = center_of(rows, center)
        weights = fltrust_weights(gram(rows.append(own), origin))
        return combine(rows, weights[:-1], origin)

    rows = X if not isinstance(X, list | tuple | np.ndarray) else as_matrix(X)
    return guarded(rows, rows.count - 1 if isinstance(rows, Matrix) else None, body)


def foolsgold_weights(G: Square | Gram) -> Vector:
    """Return the weights of FoolsGold from inner products of the clients' summed updates [FYB20].

    Clients whose history resembles another's lose weight; the most similar pair has none. They sum to one.
    """
    similar = cosines(G)
    np.fill_diagonal(similar, -np.inf)
    most = similar.max(axis=1)
    pardon = np.where(most[:, None] < most[None, :], most[:, None] / np.where(most > 0, most, 1.0)[None, :], 1.0)
    pardon = np.where(most[None, :] > 0, pardon, 1.0)
    np.fill_diagonal(pardon, 0.0)
    np.fill_diagonal(similar, 0.0)
    weights = np.clip(1.0 - (similar * pardon).max(axis=1), 0.0, 1.0)
    if not weights.max() > 0:
        raise Refusal("all histories point the same way; foolsgold tells sybils by that and has nobody left")
    weights = weights / weights.max()
    weights[weights >= 1.0] = 0.99
    positive = weights > 0
    logit = np.full(len(weights), -np.inf)
    logit[positive] = np.log(weights[positive] / (1.0 - weights[positive])) + 0.5
    weights = np.clip(logit, 0.0, 1.0)
    if not weights.sum() > 0:
        raise Refusal("foolsgold left no row any weight")
    return np.asarray(weights / weights.sum())


def foolsgold(X: Any, history: Any = None, *, center: Any = None) -> Any:
    """Return the mean of updates weighted by how little each client's history resembles another's [FYB20].

    X: n updates; history: the clients' summed updates, rows in the same order (X alone in the first round). A client
    whose update or history is unusable is left out of both. Made against sybils that push one way; honest clients with
    the same data look like sybils. Guarantee: none is known. Breakdown point: 0, one attacker that resembles nobody
    counts in full, as long as its update is usable. Cost: n^2 d multiplications.
    """
    given, record = (X, None) if history is None else _same_clients(X, history)

    def body(rows: Matrix, f: int) -> Floats:
        origin = center_of(rows, center)
        G = gram(rows, origin) if record is None else gram(record)
        weights = foolsgold_weights(G) if rows.count > 1 else np.ones(1)
        return combine(rows, weights, origin)

    return guarded(given, None, body)


def _same_clients(X: Any, history: Any) -> tuple[Screened, Matrix]:
    """Return usable rows and the histories of the same clients, who may lack neither."""
    rows = X if isinstance(X, Screened) else as_matrix(X)
    now = rows if isinstance(rows, Screened) else screen(rows, (rows.count - 1) // 2)
    past = as_matrix(history)
    if past.count == len(now.kept) + len(now.excluded) and len(now.kept) == now.rows.count:
        past = past.take(now.kept)
    if past.count != now.rows.count:
        raise Refusal(
            f"history has {past.count} rows, X has {now.rows.count} usable ones; they must be the same clients"
        )
    then = screen(past, now.f)
    if not then.excluded:
        return now, then.rows
    gone = tuple(Exclusion(now.kept[e.index], f"has a history that {e.reason}") for e in then.excluded)
    left = Screened(now.rows.take(then.kept), now.excluded + gone, then.f, tuple(now.kept[i] for i in then.kept))
    return left, then.rows


def flame_rows(G: Square | Gram) -> NDArray[np.intp]:
    """Return the majority cluster of directions [NRC22]: HDBSCAN with clusters of more than n/2 rows.

    Cosine distances, single linkage: the first component to hold floor(n/2) + 1 rows as the threshold rises.
    """
    far = 1.0 - cosines(G)
    n = len(far)
    label = np.arange(n)
    upper = np.triu_indices(n, 1)
    for k in np.argsort(far[upper], kind="stable"):
        a, b = label[upper[0][k]], label[upper[1][k]]
        if a != b:
            label[label == max(a, b)] = min(a, b)
            members = np.flatnonzero(label == min(a, b))
            if len(members) > n // 2:
                return members
    return np.arange(n)


def flame_weights(G: Square | Gram) -> Vector:
    """Return the weights of FLAME: the majority cluster, each row clipped to the median norm of all."""
    norm = np.sqrt(np.diagonal(as_gram(G).origin))
    members = flame_rows(G)
    bound = np.median(norm)
    factor = np.minimum(1.0, bound / np.where(norm > 0, norm, 1.0))
    weights = np.zeros(len(norm))
    weights[members] = factor[members] / len(members)
    return weights


def flame(X: Any, *, center: Any = None, noise: float = 0.0, rng: np.random.Generator | None = None) -> Any:
    """Return the mean of the majority cluster of directions, clipped to the median norm, with noise [NRC22].

    X: n updates, or models with center = the global model. noise: standard deviation in units of the median norm; it
    smooths backdoors away and needs rng. It is no differential privacy: nothing here accounts for it. Guarantee:
    without noise, no longer than the median norm; no kappa is known. Breakdown point: 1/2. Cost: n^2 d / 2
    multiplications and n^2 log n for the clusters.
    """
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise must be finite and at least 0, got {noise}")
    if noise and rng is None:
        raise ValueError("noise needs rng, the generator it is drawn from")

    def body(rows: Matrix, f: int) -> Floats:
        origin = center_of(rows, center)
        G = gram(rows, origin)
        out = combine(rows, flame_weights(G), origin)
        if noise and rng is not None:
            scale = noise * float(np.median(np.sqrt(np.diagonal(G.origin))))
            out += rng.normal(0.0, scale, out.size).astype(out.dtype)
        return out

    return guarded(X, None, body)
