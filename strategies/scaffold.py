"""SCAFFOLD: control variates undo the drift of nodes whose data differ [KKM+20], Algorithm 1, option II.

The server keeps c, every node its own c_i. A node adds c - c_i to each of its gradients, and after K steps of size
eta_l from x to y sets c_i+ = c_i - c + (x - y) / (K eta_l). The server moves by the plain means over the cohort:
x += eta_g mean(y - x) and c += |S| / N mean(c_i+ - c_i).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from privfed.array import Array
from privfed.context import Context
from privfed.message import Message
from privfed.record import ArrayRecord, RecordDict
from privfed.strategies.companion import CompanionStrategy
from privfed.strategies.exchange import Exchange
from privfed.strategies.strategy import add_update
from privfed.strategies.view import Float64s
from privfed.update import arrays_of

if TYPE_CHECKING:
    from privfed.strategies.strategy import _Run

CONTROL = "control."
STATE = "scaffold"


class SCAFFOLD(CompanionStrategy):
    """Average models and control variates over the nodes, unweighted as in the paper.

    The ClientApp trains through `ControlVariate`. server_learning_rate: eta_g, > 0. Only means are read, so any stage
    will do. A node that is excluded after it has trained leaves c behind its c_i by that round's change.
    """

    equal = True

    def __init__(self, *, server_learning_rate: float = 1.0, **arguments: Any) -> None:
        if not (math.isfinite(server_learning_rate) and server_learning_rate > 0):
            raise ValueError(f"server_learning_rate must be finite and > 0, got {server_learning_rate}")
        super().__init__(**arguments)
        self.server_learning_rate = server_learning_rate
        self._control: ArrayRecord | None = None
        self._nodes = 0

    def companions(self, arrays: ArrayRecord) -> ArrayRecord:
        """Return c, zero in the first round."""
        for name, array in arrays.items():
            if not array.dtype.startswith(("float", "bfloat")):
                raise ValueError(f"initial_arrays[{name!r}] is {array.dtype}: SCAFFOLD needs floating-point arrays")
        if self._control is None:
            zeros = arrays.map(np.zeros_like)
            self._control = ArrayRecord({CONTROL + name: array for name, array in zeros.items()})
        return self._control

    def apply(self, arrays: ArrayRecord, model: Float64s, beside: Float64s, weight: float) -> ArrayRecord:
        """Move model and control variate."""
        moved = add_update(arrays, self.server_learning_rate * model)
        self._control = add_update(self.companions(arrays), beside * (weight / max(self._nodes, weight)))
        return moved

    def save(self) -> RecordDict:
        """Return c."""
        return RecordDict() if self._control is None else RecordDict({STATE: self._control})

    def load(self, state: RecordDict) -> None:
        """Take up c."""
        self._control = state.array_records.get(STATE)

    def _exchange(
        self, run: _Run, server_round: int, kind: str, content: RecordDict, cohort: tuple[int, ...]
    ) -> Exchange:
        if kind == "train":
            self._nodes = len(run.grid.get_node_ids())
        return super()._exchange(run, server_round, kind, content, cohort)


class ControlVariate:
    """A node's side of a SCAFFOLD round; its c_i lives in `context.state`.

        control = ControlVariate(message, context)
        for _ in range(steps):
            for weight, gradient, correction in zip(weights, gradients(weights), control.corrections):
                weight -= learning_rate * (gradient + correction)
        reply = RecordDict({"arrays": control.finish(weights, steps, learning_rate), ...})

    weights: copies of the model's arrays, to train in place. corrections: c - c_i, array by array.
    """

    def __init__(self, message: Message, context: Context) -> None:
        received = arrays_of(message.content)
        self._names = [name for name in received if CONTROL + name in received]
        if not self._names or 2 * len(self._names) != len(received):
            raise ValueError("the instruction holds no control variates: run the SCAFFOLD strategy on the server")
        self._received = received
        self._context = context
        own = context.state.array_records.get(STATE)
        self.weights: list[NDArray[Any]] = [received[name].numpy() for name in self._names]
        self._server = [received[CONTROL + name].compute() for name in self._names]
        self._own: list[NDArray[Any]] = [
            own[name].compute() if own is not None else np.zeros_like(c)
            for name, c in zip(self._names, self._server, strict=True)
        ]
        self.corrections = [c - mine for c, mine in zip(self._server, self._own, strict=True)]

    def finish(self, weights: list[NDArray[Any]], steps: int, learning_rate: float) -> ArrayRecord:
        """Return the arrays to reply with, and keep the new c_i for the next round.

        Raises ValueError for steps < 1 or a learning_rate that is not > 0.
        """
        if steps < 1 or not learning_rate > 0:
            raise ValueError(f"steps must be >= 1 and learning_rate > 0, got {steps} and {learning_rate}")
        kept, reply, controls = {}, {}, {}
        for name, new, c, mine in zip(self._names, weights, self._server, self._own, strict=True):
            old = self._received[name].compute()
            renewed = mine - c + (old - new) / (steps * learning_rate)
            template = self._received[CONTROL + name]
            kept[name] = Array(np.asarray(renewed))
            reply[name] = self._received[name].replace(np.asarray(new))
            controls[CONTROL + name] = template.replace(np.asarray(c + (renewed - mine)))
        self._context.state[STATE] = ArrayRecord(kept)
        return ArrayRecord({**reply, **controls})
