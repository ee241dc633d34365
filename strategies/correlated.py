"""The release of a run under correlated noise: one charge for the whole run, and noise that later rounds take back."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import numpy as np

from privfed.errors import PlanRefused, RunFailed
from privfed.failpoint import around
from privfed.privacy.correlated import Correlation, noise_in_steps, row_sensitivity, sensitivity
from privfed.privacy.events import Central, Event, Gaussian, MatrixGaussian, PureDP
from privfed.privacy.filters import BudgetExceeded
from privfed.privacy.mechanisms import LatticeSum
from privfed.record import ConfigRecord, ConfigValue
from privfed.strategies.release import CentralRelease, Seen
from privfed.strategies.view import Float64s, Unreleased

_EXACT = 2.0**52
_NOTHING = PureDP(0.0)


class MatrixRelease(CentralRelease):
    """The server adds noise that is correlated over the rounds of a run whose length was fixed when it began.

    Nodes take part in turns: those whose id leaves the same remainder modulo `separation` in the same round. The run
    is charged as one event in its first round. A round that was charged and is run again, because the process died
    before it was committed, is charged again as a release of its own.
    """

    def resolve(self, num_rounds: int) -> None:
        plan = self.plan
        if plan.correlation is None:
            raise PlanRefused("correlation: the plan has none")
        self.rounds = plan.rounds if plan.rounds is not None else num_rounds
        if num_rounds > self.rounds:
            raise PlanRefused(f"rounds: the noise is planned for {self.rounds} rounds, the run has {num_rounds}")
        self._correlation: Correlation = plan.correlation
        self._whole = sensitivity(self._correlation, self.rounds, plan.separation)
        self._multiplier = noise_in_steps(self._correlation, self.rounds, plan.separation)
        self.noise_multiplier = plan.resolve(self.rounds)
        self.event: Event = Central(MatrixGaussian(self.noise_multiplier * self._whole, self._whole))
        self.sampler = plan.cohorts
        self.denominator = self.denominator / plan.separation
        self._stream = self._correlation.stream(self.size)

    def draw(self, nodes: Sequence[int], server_round: int) -> tuple[int, ...]:
        """Return the nodes whose turn it is."""
        apart = self.plan.separation
        return tuple(sorted(node for node in nodes if node % apart == server_round % apart))

    def authorise(self, server_round: int) -> None:
        """Refuse a round the noise was not planned for, and the first when the budget does not cover the run."""
        if server_round > self.rounds:
            raise RunFailed(f"round {server_round}: the noise is planned for {self.rounds} rounds")
        if server_round == 1:
            super().authorise(server_round)

    def pay(self, server_round: int, transcript: str) -> float:
        """Charge the run in its first round, and again what is released again; return the epsilon spent so far."""
        ledger = self._ledger
        if ledger is None:
            return float("inf")
        mine = [entry for entry in ledger.entries if entry.run == self.run]
        charged = {entry.round for entry in mine}
        if not any(entry.event == self.event for entry in mine):  # whatever else the run has paid for
            event = self.event
        elif server_round in charged:
            row = self._correlation.encoder(self.rounds)[server_round - 1]
            alone = row_sensitivity(row, self.plan.separation)
            event = Central(Gaussian(self.noise_multiplier * self._whole / alone))
        else:
            event = _NOTHING
        try:
            attempt = sum(entry.round == server_round for entry in ledger.entries)
            with around("charge"):
                entry = ledger.charge(event, run=self.run, round=server_round, attempt=attempt, transcript=transcript)
        except BudgetExceeded as refusal:
            raise RunFailed(f"round {server_round} was not released: {refusal}") from refusal
        return entry.spent

    def charge(self, server_round: int, view: Seen) -> dict[str, object]:
        """Charge the round, encode its sum, noise the row, and decode the release."""
        transcript = hashlib.sha256(f"{self.run}:{server_round}:".encode() + os.urandom(32)).hexdigest()
        epsilon = self.pay(server_round, transcript)
        if not isinstance(view, Unreleased):
            nobody = LatticeSum(self.size, sensitivity=self.clip)
            view = Unreleased(
                lambda multiplier, random: nobody.release(noise_multiplier=multiplier, random=random)[0],
                nobody.granularity,
            )
        multiplier = self._multiplier(self.noise_multiplier, self.size, view.granularity / self.clip)
        total = view.release(0.0, os.urandom)
        noised = view.release(multiplier, self.random("noise", server_round))
        past = self._stream.encode(server_round, total) - total
        # The sum and its noise lie on the lattice; what earlier rounds add is rounded to it before anybody sees it.
        steps = np.rint(past / view.granularity)
        if max(np.abs(noised).max() / view.granularity, np.abs(steps).max()) >= _EXACT:
            raise RunFailed(f"round {server_round}: the sum is too large for the lattice it is noised on")
        release = self._stream.decode(server_round, total, noised + steps * view.granularity)
        return self.said(epsilon) | self._keep(np.asarray(release / self.denominator))

    def state(self) -> ConfigRecord:
        """Return what a resumed run must know: earlier sums among it, so a run folder is as secret as the updates."""
        saved = {name: rows.astype("<f8").tobytes() for name, rows in self._stream.save().items()}
        kept: dict[str, ConfigValue] = {**super().state(), "done": self._stream.done, **saved}
        return ConfigRecord(kept)

    def restore(self, state: ConfigRecord) -> None:
        """Take up where a run was interrupted."""
        super().restore(state)
        saved: dict[str, Float64s] = {
            name: np.frombuffer(rows, "<f8").reshape(-1, self.size)
            for name in ("sums", "releases")
            if isinstance(rows := state.get(name), bytes)
        }
        self._stream.load(int(str(state["done"])), saved)

    def instruction(self, server_round: int) -> ConfigRecord:
        """Return what the nodes are told; `event` is the price of the whole run, paid once."""
        instruction = super().instruction(server_round)
        instruction["once"] = True
        instruction["separation"] = self.plan.separation
        return instruction
