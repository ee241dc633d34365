"""FLTrust: the server's own small data set decides whom to trust [CFLG21]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from privfed.record import ArrayRecord
from privfed.strategies import rules
from privfed.strategies.strategy import Strategy, add_update
from privfed.strategies.view import Updates, View
from privfed.update import UpdateError, flatten, subtract

Train = Callable[[int, ArrayRecord], ArrayRecord]
"""(round, arrays) -> the model after the server's own training."""


class FLTrust(Strategy):
    """Weigh updates by their cosine with the server's own update, scaled to its norm.

    train: trains the model on the server's root data set. Any number of nodes may be Byzantine while those data are
    sound; updates that point away count nothing.
    """

    needs: ClassVar[type[View]] = Updates
    unbounded: ClassVar[str] = (
        "every update is scaled by its likeness to the server's own, so one node's change is not bounded by its clip"
    )

    def __init__(self, *, train: Train, **arguments: Any) -> None:
        if not callable(train):
            raise ValueError(f"train must be a function (round, arrays) -> ArrayRecord, got {type(train).__name__}")
        super().__init__(**arguments)
        self.train = train

    def update(self, server_round: int, arrays: ArrayRecord, view: View) -> ArrayRecord:
        """Add the trusted mean."""
        if not isinstance(view, Updates):
            raise TypeError(f"FLTrust needs Updates, got {type(view).__name__}")
        try:
            own = flatten(subtract(self.train(server_round, arrays), arrays), arrays)
        except UpdateError as cause:
            raise ValueError(f"the server's own training does not fit the model: {cause}") from cause
        found = rules.fltrust(view.rows, own.astype(np.float32))
        return add_update(arrays, np.asarray(found, np.float64))
