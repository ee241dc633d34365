"""Recover the secrets the sum still hides behind, check them, and list the masks to take off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import numpy as np

from privfed.protocols import keys
from privfed.protocols.errors import RemoteError, TooFewSurvivors
from privfed.protocols.secagg.client import pair_seed, self_seed
from privfed.protocols.secagg.messages import Advertisement, Terms
from privfed.protocols.shamir import Ints, decode_share, inconsistent, interpolate, secret_of

_TRIES = 64
Revealed = Mapping[int, Mapping[int, tuple[int, bytes]]]


@dataclass(frozen=True, slots=True)
class Secrets:
    """self_secrets: of the survivors. mask_keys: of the nodes that dropped after sharing. culprits: wrong shares."""

    self_secrets: Mapping[int, bytes] = field(repr=False)
    mask_keys: Mapping[int, bytes] = field(repr=False)
    culprits: tuple[int, ...]


def recover(
    terms: Terms,
    rows: Mapping[int, Advertisement],
    survivors: Set[int],
    revealed: Revealed,
    holders_of: Mapping[int, Sequence[int]],
) -> Secrets:
    """Interpolate every secret from its first `threshold` holders, all owners with the same holders in one product.

    A secret is accepted only if it fits what its owner advertised: the commitment, or the public key. If not, other
    holders are tried, and those whose shares are off the accepted polynomial are named. Raises TooFewSurvivors when a
    secret has too few shares, RemoteError "bad-share" when no choice of holders fits.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for owner, holding in holders_of.items():
        if len(holding) < terms.threshold:
            raise TooFewSurvivors(len(holding), terms.threshold, "reveal")
        groups.setdefault(tuple(holding), []).append(owner)
    found: dict[int, bytes] = {}
    culprits: set[int] = set()
    for holding, owners in groups.items():
        shares = _stack(revealed, holding, owners)
        points = [terms.point(node) for node in holding]
        values = interpolate(shares[: terms.threshold], points[: terms.threshold])
        for index, owner in enumerate(owners):
            secret = _accepted(terms, owner, rows[owner], values[index], owner in survivors)
            if secret is None:
                secret, wrong = _search(terms, owner, rows[owner], shares[:, index], holding, owner in survivors)
                culprits.update(wrong)
            found[owner] = secret
    return Secrets(
        {node: secret for node, secret in found.items() if node in survivors},
        {node: secret for node, secret in found.items() if node not in survivors},
        tuple(sorted(culprits)),
    )


def _stack(revealed: Revealed, holding: Sequence[int], owners: Sequence[int]) -> Ints:
    raw = []
    for holder in holding:
        share = decode_share(b"".join(revealed[holder][owner][1] for owner in owners), len(owners))
        assert share is not None, "checked when it was received"
        raw.append(share)
    return np.stack(raw)


def _accepted(terms: Terms, owner: int, row: Advertisement, values: Ints, survived: bool) -> bytes | None:
    secret = secret_of(values)
    if secret is None:
        return None
    if survived:
        commitment = keys.digest(b"self-mask commitment", terms.digest(), keys.node_bytes(owner), secret)
        return secret if keys.same(commitment, row.commitment) else None
    return secret if keys.same(keys.exchange_public(secret), row.mask_key) else None


def _search(
    terms: Terms, owner: int, row: Advertisement, shares: Ints, holding: Sequence[int], survived: bool
) -> tuple[bytes, list[int]]:
    size, need = len(holding), terms.threshold
    points = [terms.point(node) for node in holding]
    for shift in range(1, min(size, _TRIES)):
        order = [(shift + place) % size for place in range(size)]
        turned, at = shares[order], [points[place] for place in order]
        secret = _accepted(terms, owner, row, interpolate(turned[:need], at[:need]), survived)
        if secret is not None:
            off = set(inconsistent(turned, at, need))
            return secret, [holding[place] for place in order if points[place] in off]
    which = "self-mask" if survived else "mask key"
    raise RemoteError("bad-share", (), f"the shares of the {which} of node {owner} fit nothing it advertised")


def unmask(
    rows: Mapping[int, Advertisement],
    view: bytes,
    secrets: Secrets,
    edges: Mapping[int, Set[int]],
) -> tuple[list[bytes], list[bytes]]:
    """Return the seeds of the masks to add and to subtract, so that the sum of the survivors' inputs is left."""
    minus = [self_seed(secret, node, view) for node, secret in sorted(secrets.self_secrets.items())]
    plus: list[bytes] = []
    for node, secret in sorted(secrets.mask_keys.items()):
        masking = keys.load(secret)
        for peer in sorted(edges[node]):
            seed = pair_seed(masking, peer, rows[peer].mask_key, node, view, peer)
            # The survivor added the mask when its id is the lower one.
            (minus if peer < node else plus).append(seed)
    return plus, minus
