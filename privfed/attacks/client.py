"""Byzantine clients as mods: put one in a ClientApp's `mods` to red-team a federation of your own.

Attacks act on the update `reply - received` of floating-point arrays in replies to "train"; all else passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.attacks.forgery import Attack, Rows
from privfed.context import Context
from privfed.message import Message, MessageType
from privfed.record import ArrayRecord, RecordDict
from privfed.update import arrays_name, arrays_of, is_update

CallNext = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, CallNext], Message]
Change = Callable[[NDArray[np.float64], Message, Context], NDArray[np.float64]]
Known = Callable[[Message, Context], Rows]


def flip_sign(scale: float = 1.0) -> Mod:
    """Return a mod that sends minus `scale` times the honest update."""
    return change_update(lambda update, message, context: -scale * update)


def boost(factor: float) -> Mod:
    """Return a mod that scales the update: model replacement with factor = number of clients, on a backdoored app."""
    return change_update(lambda update, message, context: factor * update)


def add_noise(deviation: float, seed: int | None = None) -> Mod:
    """Return a mod that sends normal noise in place of the update; `seed` makes it repeatable per node."""

    def change(update: NDArray[np.float64], message: Message, context: Context) -> NDArray[np.float64]:
        rng = np.random.default_rng(None if seed is None else [seed, context.node_id])
        return rng.normal(0.0, deviation, update.size)

    return change_update(change)


def poison(value: float = np.nan, coordinate: int | None = None) -> Mod:
    """Return a mod that puts `value` (NaN, infinity, 1e38) into one coordinate of the update, or into all."""

    def change(update: NDArray[np.float64], message: Message, context: Context) -> NDArray[np.float64]:
        changed = update.copy()
        changed[slice(None) if coordinate is None else coordinate] = value
        return changed

    return change_update(change)


def forge(attack: Attack, known: Known | None = None) -> Mod:
    """Return a mod that sends attack(rows) in place of the update: any attack of `privfed.attacks.forgery`.

    known(message, context): the honest updates (rows) the attacker has seen, such as those of colluding clients; by
    default its own alone, which is enough for sign_flip, inner_product and mimic.
    """

    def change(update: NDArray[np.float64], message: Message, context: Context) -> NDArray[np.float64]:
        rows = update[None] if known is None else known(message, context)
        return np.asarray(attack(rows), dtype=np.float64)

    return change_update(change)


def change_update(change: Change) -> Mod:
    """Return a mod that replaces the flat update of a train reply by change(update, message, context)."""

    def mod(message: Message, context: Context, call_next: CallNext) -> Message:
        reply = call_next(message, context)
        if message.metadata.message_type.split(".")[0] != MessageType.TRAIN or not reply.has_content():
            return reply
        content = reply.content
        sent = arrays_of(content)
        base = None if is_update(content) else arrays_of(message.content)
        names = [name for name, array in sent.items() if array.compute().dtype.kind == "f"]
        if not names:
            return reply
        own = [sent[name].compute().astype(np.float64) for name in names]
        start = [
            np.zeros_like(x) if base is None else base[name].compute().astype(np.float64)
            for name, x in zip(names, own, strict=True)
        ]
        flat = np.concatenate([(x - s).reshape(-1) for x, s in zip(own, start, strict=True)])
        changed = change(flat, message, context)
        if changed.shape != flat.shape:
            raise ValueError(f"the attack returned shape {changed.shape} for an update of {flat.size} numbers")
        forged, at = dict(sent.items()), 0
        for name, s in zip(names, start, strict=True):
            with np.errstate(over="ignore", invalid="ignore"):
                forged[name] = sent[name].replace(s + changed[at : at + s.size].reshape(s.shape))
            at += s.size
        key = arrays_name(content)
        return reply.with_content(RecordDict({k: ArrayRecord(forged) if k == key else v for k, v in content.items()}))

    return mod


def flip_labels(labels: NDArray[Any], classes: int) -> NDArray[Any]:
    """Return labels y as classes - 1 - y: train on them for the label-flip attack [TTGL20]."""
    labels = np.asarray(labels)
    if labels.size and not (labels.min() >= 0 and labels.max() < classes):
        raise ValueError(f"labels must be from 0 to {classes - 1}")
    return np.asarray(classes - 1 - labels)


def stamp_backdoor(
    inputs: NDArray[Any], labels: NDArray[Any], *, coordinates: list[int], value: float, target: int, share: float = 1.0
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return data of which the first `share` carries a trigger and the label `target` [BVHES20].

    The trigger sets `coordinates` of each flattened input to `value`. Train on the result, then `boost` the update.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 to 1, got {share}")
    stamped, changed = np.array(inputs), np.array(labels)
    count = round(share * len(stamped))
    flat = stamped.reshape(len(stamped), -1)
    flat[:count, coordinates] = value
    changed[:count] = target
    return flat.reshape(stamped.shape), changed
