"""The grouped stage: random groups, a session each; the server sees group means and no node's update.

With f Byzantine nodes at most f groups are spoiled, so a rule that withstands f of G rows withstands f nodes when its
precondition holds for G: G > 2 f, Krum G >= 2 f + 3. Each rule checks that for the groups it is given.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from privfed.errors import RunFailed
from privfed.grid import Grid
from privfed.protocols.errors import ProtocolError
from privfed.protocols.session import Protocol
from privfed.record import MetricRecord
from privfed.ring import Decoded, Layout
from privfed.strategies.exchange import Exchange
from privfed.strategies.secure import Ranges, SecureStage, noise_releaser
from privfed.strategies.session import SessionDrive, run_stage
from privfed.strategies.stage import Stage
from privfed.strategies.view import Exclusion, GroupMeans, Outcome, Sum, Unreleased, View

if TYPE_CHECKING:
    from privfed.plan import PrivacyPlan


class GroupedStage(SecureStage):
    """Run one session of the protocol per group of `group_size` nodes, all at once.

    Groups are fixed for the run (for one cohort of nodes): were they drawn anew every round, the server could average
    a persistent node out of the group means. They come from the grid's seed, or from the operating system of the
    server, and have `group_size` nodes or, to leave none over, some more. A group that ends with too few survivors is
    left out. The other arguments are SecureStage's.
    """

    offers: ClassVar[frozenset[type[View]]] = frozenset({GroupMeans, Sum})

    def __init__(
        self,
        protocol: Protocol,
        group_size: int,
        *,
        bits: int = 32,
        max_value: float = 8.0,
        max_weight: float = 10_000,
        train_metrics: Ranges | None = None,
        evaluate_metrics: Ranges | None = None,
        stage_timeout: float = 60.0,
    ) -> None:
        if group_size < 2:
            raise ValueError(f"group_size must be >= 2: a group of one is no group, got {group_size}")
        super().__init__(
            protocol,
            bits=bits,
            max_value=max_value,
            max_weight=max_weight,
            train_metrics=train_metrics,
            evaluate_metrics=evaluate_metrics,
            stage_timeout=stage_timeout,
        )
        self.group_size = group_size
        self._key = secrets.token_bytes(16)

    def __repr__(self) -> str:
        return f"GroupedStage({self.protocol!r}, {self.group_size})"

    def check_privacy(self, plan: PrivacyPlan) -> None:
        """Refuse noise of the nodes: it is planned for one sum of all of them."""
        Stage.check_privacy(self, plan)

    def collect(self, exchange: Exchange) -> Outcome:
        """Return the group means, or their sum when that is what the strategy needs."""
        private = exchange.clip is not None
        bound = exchange.clip if exchange.clip is not None else self.max_value
        outcome, layout, found = self._run_groups(exchange, bound, private)
        groups = {group: decoded for group, decoded in found.items() if decoded.weight > 0}
        if not groups:
            return outcome
        weight = sum(decoded.weight for decoded in groups.values())
        if exchange.need is Sum:
            total = sum((decoded.total for decoded in groups.values()), np.zeros(layout.dimension))
            if private:
                whole = Decoded(total, 1.0, weight, MetricRecord(), 0.0)
                outcome.view = Unreleased(noise_releaser(whole, layout, bound))
                return outcome
            scale = next(iter(groups.values())).scale
            total *= scale / weight
            outcome.view = Sum(total, weight)
            return outcome
        rows = np.empty((len(groups), layout.dimension), np.float32)
        for row, decoded in zip(rows, groups.values(), strict=True):
            row[:] = decoded.total * (decoded.scale / decoded.weight)
        outcome.view = GroupMeans(rows, tuple(groups), tuple(decoded.weight for decoded in groups.values()))
        return outcome

    def measure(self, exchange: Exchange) -> Outcome:
        """Return the survivors' metrics over all groups."""
        return self._run_groups(exchange, 1.0, False)[0]

    def draw_groups(self, grid: Grid, nodes: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Split nodes into random groups of at least `group_size` (one smaller group if there are fewer nodes).

        The same nodes are in the same groups whenever they are drawn.
        """
        count = max(1, len(nodes) // self.group_size)
        key = self._key if grid.seed is None else str(grid.seed).encode()
        order = sorted(nodes, key=lambda node: hashlib.sha256(key + b"/groups/" + str(node).encode()).digest())
        return [tuple(sorted(order[start::count])) for start in range(count)]

    def _run_groups(
        self, exchange: Exchange, max_value: float, private: bool
    ) -> tuple[Outcome, Layout, dict[int, Decoded]]:
        groups = self.draw_groups(exchange.grid, exchange.nodes)
        # One layout for all, so that sums of different groups have the same step.
        layout = self.layout(exchange, max_value, private, max(len(group) for group in groups))
        drives = {index: self.session(exchange, layout, group) for index, group in enumerate(groups)}
        outcome = Outcome()
        members = dict(drives)
        while members:
            by_node = {node: drive for index, drive in members.items() for node in groups[index]}
            run_stage(exchange, by_node, layout.size, self.stage_timeout)
            for index, drive in list(members.items()):
                try:
                    drive.close()
                except ProtocolError as cause:
                    outcome.excluded.append(Exclusion(0, f"group {index} of {len(groups[index])} nodes: {cause}"))
                    del drives[index]
            members = {index: drive for index, drive in drives.items() if drive.server.stage}
        found = self._gather(exchange, outcome, layout, drives)
        return outcome, layout, found

    def _gather(
        self, exchange: Exchange, outcome: Outcome, layout: Layout, drives: dict[int, SessionDrive]
    ) -> dict[int, Decoded]:
        found: dict[int, Decoded] = {}
        for index, drive in drives.items():
            ring = self.result(drive, f"{exchange.kind} round {exchange.round}, group {index}")
            found[index] = layout.decode(ring.total, len(ring.survivors))
            outcome.valid += len(ring.survivors)
            outcome.excluded += [one for one in drive.outcome.excluded if one.node not in ring.survivors]
            outcome.bytes_down += drive.outcome.bytes_down
            outcome.bytes_up += drive.outcome.bytes_up
        weight = sum(decoded.weight for decoded in found.values())
        if found and weight <= 0:
            raise RunFailed(f"{exchange.kind} round {exchange.round}: all weights are 0")
        for name, _, _ in layout.metrics:
            total = sum(float(str(one.metrics[name])) * one.weight for one in found.values() if one.weight > 0)
            outcome.metrics[name] = total / weight if weight else 0.0
        if found:
            outcome.notes["groups"] = len(found)
        return found
