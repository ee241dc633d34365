"""FedNova: nodes that take different numbers of steps pull the same way [WLL+20].

With y_i the model of node i after a_i local steps, p_i its share of the weights and d_i = (y_i - x) / a_i, the model
moves by (sum p_i a_i) (sum p_i d_i). Averaging y_i itself would let a node that takes more steps count for more than
its data, and converge to the optimum of another objective.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.array import Array
from privfed.message import Message
from privfed.record import ArrayRecord
from privfed.strategies.companion import CompanionStrategy
from privfed.strategies.strategy import add_update
from privfed.strategies.view import Float64s
from privfed.update import arrays_of

STEPS = "local-steps"


class FedNova(CompanionStrategy):
    """Average updates per step, then take the average number of steps.

    The ClientApp replies with `normalize_update(message, weights, steps)`. Steps travel as one more array, so
    only the mean is read and any stage will do; under a SecureStage `max_value` must cover the largest number of steps.
    """

    def companions(self, arrays: ArrayRecord) -> ArrayRecord:
        """Return a zero, to which nodes add their steps."""
        return ArrayRecord({STEPS: Array(np.zeros((), np.float64))})

    def apply(self, arrays: ArrayRecord, model: Float64s, beside: Float64s, weight: float) -> ArrayRecord:
        """Take the effective number of steps."""
        steps = float(beside[0])
        if not steps > 0:
            raise ValueError(f"the nodes report {steps:g} local steps on average: reply with normalize_update(...)")
        return add_update(arrays, steps * model)


def normalize_update(message: Message, weights: list[NDArray[Any]], steps: float) -> ArrayRecord:
    """Return the arrays to reply with: the model moved by one average step, and the number of steps.

    weights: the trained arrays, in the model's order. steps: local steps taken; for other optimisers than plain SGD the
    norm |a_i| of the paper. Raises ValueError when steps is not > 0 or the server does not run FedNova.
    """
    if not (math.isfinite(steps) and steps > 0):
        raise ValueError(f"steps must be finite and > 0, got {steps}")
    received = arrays_of(message.content)
    if STEPS not in received:
        raise ValueError(f"the instruction holds no {STEPS!r}: run the FedNova strategy on the server")
    names = [name for name in received if name != STEPS]
    reply = {}
    for name, new in zip(names, weights, strict=True):
        old = received[name].compute()
        reply[name] = received[name].replace(np.asarray(old + (new - old) / steps))
    reply[STEPS] = Array(np.asarray(float(steps)))
    return ArrayRecord(reply)
