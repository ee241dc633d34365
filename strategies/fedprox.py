"""FedProx: averaging, with a proximal term that nodes add to their loss [LSZ+20]."""

from __future__ import annotations

import math
from typing import Any

from privfed.record import ArrayRecord, ConfigRecord, RecordDict
from privfed.strategies.fedavg import FedAvg


class FedProx(FedAvg):
    """FedAvg that tells every node `proximal-mu` in its configuration.

    The node adds mu / 2 * ||w - w_received||^2 to its loss; without that in the ClientApp this is FedAvg.
    """

    def __init__(self, *, proximal_mu: float = 0.0, **arguments: Any) -> None:
        if not (math.isfinite(proximal_mu) and proximal_mu >= 0):
            raise ValueError(f"proximal_mu must be finite and >= 0, got {proximal_mu}")
        super().__init__(**arguments)
        self.proximal_mu = float(proximal_mu)

    def configure(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord) -> RecordDict:
        """Add `proximal-mu` to the configuration."""
        config["proximal-mu"] = self.proximal_mu
        return super().configure(server_round, arrays, config)
