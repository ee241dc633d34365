"""The grouped stage: random groups, a session each; the server sees group means and no node's update.

With f Byzantine nodes at most f groups are spoiled, so a rule that withstands f of G rows withstands f nodes when its
precondition holds for G: G > 2 f, Krum G >= 2 f + 3. Each rule checks that for the groups it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from privfed.errors import PlanRefused, RunFailed
from privfed.protocols.beacon import anonymity
from privfed.protocols.errors import ProtocolError
from privfed.protocols.session import Protocol, Session
from privfed.record import MetricRecord
from privfed.ring import Decoded, Layout
from privfed.strategies.exchange import Exchange
from privfed.strategies.grouping import Grouping
from privfed.strategies.secure import JournaledDrive, Ranges, SecureStage, noise_releaser
from privfed.strategies.session import run_stage
from privfed.strategies.stage import Stage
from privfed.strategies.view import Exclusion, GroupMeans, Outcome, Sum, Unreleased, View

if TYPE_CHECKING:
    from privfed.plan import PrivacyPlan


LATE = "it was not there when the groups of this run were drawn"


class GroupedStage(SecureStage):
    """Run one session of the protocol per group of `group_size` nodes, all at once.

    Groups are drawn once, by a commit-reveal beacon over the nodes that are connected when the run first needs them,
    and stay for the run. Each node computes its group itself and joins no session over other nodes. A sample of nodes
    becomes a sample of whole groups. A node that connects later is in no group and left out until the next run. Groups
    have `group_size` nodes or, to leave none over, some more; one that ends with too few survivors is left out.

    corrupt: share of the nodes that may collude with the server; `anonymity` among a round's metrics is how many honest
    nodes, at least and but for a chance of 2^-40, each released sum hides a node among; 0 where a group may hold more
    corrupt ones than the protocol's parameters withstand, so that they could open more than its sum.
    redraw: groups of their own for every round; refused, as no plan gives each group's sum noise of its own. The other
    arguments are SecureStage's.
    """

    offers: ClassVar[frozenset[type[View]]] = frozenset({GroupMeans, Sum})

    def __init__(
        self,
        protocol: Protocol,
        group_size: int,
        *,
        corrupt: float = 1 / 3,
        redraw: bool = False,
        bits: int = 32,
        max_value: float = 8.0,
        max_weight: float = 10_000,
        train_metrics: Ranges | None = None,
        evaluate_metrics: Ranges | None = None,
        stage_timeout: float = 60.0,
    ) -> None:
        if group_size < 2:
            raise ValueError(f"group_size must be >= 2: a group of one is no group, got {group_size}")
        if not 0 <= corrupt < 1:
            raise ValueError(f"corrupt must be a share of the nodes in [0, 1), got {corrupt}")
        if getattr(protocol, "beacon", None) is not None:
            raise ValueError(
                f"{protocol!r}: its committee would be drawn from all nodes and open the sums of every group; leave "
                "committee at None, then each group is its own"
            )
        if redraw:
            raise PlanRefused(
                "redraw: groups that change every round let the server average a node out of their means, unless every "
                "group's sum carries noise of its own, and no PrivacyPlan gives that: its noise is for the sum over "
                "all nodes; leave redraw at False"
            )
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
        self.corrupt = float(corrupt)
        self._grouping = Grouping(group_size, self.next_number, stage_timeout)

    def __repr__(self) -> str:
        return f"GroupedStage({self.protocol!r}, {self.group_size})"

    def check_privacy(self, plan: PrivacyPlan) -> None:
        """Refuse noise of the nodes: it is planned for one sum of all of them."""
        Stage.check_privacy(self, plan)

    def collect(self, exchange: Exchange) -> Outcome:
        """Return the group means, or their sum when that is what the strategy needs."""
        return super().collect(exchange)

    def _collect(self, exchange: Exchange) -> Outcome:
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
                outcome.view = Unreleased(noise_releaser(whole, layout, bound), layout.step)
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

    def _measure(self, exchange: Exchange) -> Outcome:
        return self._run_groups(exchange, 1.0, False)[0]

    def recovered(self, exchange: Exchange) -> Exchange:
        """Return the exchange as it is: its sessions are over the run's groups."""
        return exchange

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The groups of the run; empty before its first exchange."""
        return self._grouping.groups

    def _run_groups(
        self, exchange: Exchange, max_value: float, private: bool
    ) -> tuple[Outcome, Layout, dict[int, Decoded]]:
        groups = self._grouping.asked(exchange)
        present = set(exchange.grid.get_node_ids())
        # One layout for all, so that sums of different groups have the same step.
        largest = max((len(group) for group in self.groups), default=2)
        layout = self.layout(exchange, max_value, private, largest)
        drives = {
            index: self.session(exchange, layout, group, present=present, part=f"-g{index:05}")
            for index, group in groups.items()
        }
        outcome = Outcome()
        grouped = {node for group in self.groups for node in group}
        late = sorted(set(exchange.nodes) - grouped)
        outcome.excluded += [
            Exclusion(node, "it was not there when the groups of this run were drawn") for node in late
        ]
        members = {index: drive for index, drive in drives.items() if drive.server.stage}
        while members:
            by_node = {node: drive for index, drive in members.items() for node in groups[index]}
            run_stage(exchange, by_node, layout.size, self.stage_timeout)
            for index, drive in list(members.items()):
                try:
                    drive.close()
                except ProtocolError as cause:
                    text = f"group {index} of {len(groups[index])} nodes: {cause}"
                    outcome.excluded += [*drive.outcome.excluded, Exclusion(0, text)]
                    drive.journal.discard()
                    del drives[index]
            members = {index: drive for index, drive in drives.items() if drive.server.stage}
        found = self._gather(exchange, outcome, layout, drives)
        return outcome, layout, found

    def _gather(
        self, exchange: Exchange, outcome: Outcome, layout: Layout, drives: dict[int, JournaledDrive]
    ) -> dict[int, Decoded]:
        found: dict[int, Decoded] = {}
        sizes: list[int] = []
        for index, drive in drives.items():
            ring = self.result(drive, f"{exchange.kind} round {exchange.round}, group {index}")
            found[index] = layout.decode(ring.total, len(ring.survivors))
            sizes.append(len(ring.survivors))
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
            if clamped := sum(decoded.clamped for decoded in found.values()):
                outcome.notes["clamped"] = clamped
            outcome.notes["anonymity"] = self._anonymity(drives, sizes)
        return found

    def _anonymity(self, drives: dict[int, JournaledDrive], survivors: list[int]) -> int:
        """Return the least anonymity of the groups whose sum was opened: those who dropped out hide nobody.

        Nobody is hidden where so many corrupt members could open more than the sum.
        """
        nodes = sum(len(group) for group in self.groups)
        least = []
        for (index, drive), left in zip(drives.items(), survivors, strict=True):
            size = len(self.groups[index])
            corrupt = size - anonymity(nodes, size, self.corrupt)
            least.append(max(0, left - corrupt) if self._withstands(drive.session) >= corrupt else 0)
        return min(least)

    def _withstands(self, session: Session) -> int:
        """Return how many corrupt nodes the protocol's parameters are safe with; none where it does not say."""
        withstands: Callable[[Session], int] = getattr(self.protocol, "withstands", lambda session: 0)
        return withstands(session)
