"""The secure stage: the server drives a secure-aggregation protocol and sees only the sum."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from privfed.errors import PlanRefused, QuorumError, RunFailed
from privfed.protocols.errors import LocalError, ProtocolError, TooFewSurvivors
from privfed.protocols.session import Protocol, RingSum, Server, Session
from privfed.record import ConfigRecord
from privfed.ring import Decoded, Layout, bind
from privfed.strategies.drawing import Drawing
from privfed.strategies.endpoint import Endpoint, PresentServer
from privfed.strategies.exchange import Exchange, SharedNoise
from privfed.strategies.journal import SessionJournal, journal_path
from privfed.strategies.repeat import ANY_LAYOUT, REPEATED, Repeats
from privfed.strategies.session import SessionDrive, input_stage, run_stage
from privfed.strategies.stage import Stage
from privfed.strategies.view import Exclusion, Float64s, Outcome, RandomBytes, Sum, Unreleased, View
from privfed.update import dimension

if TYPE_CHECKING:
    from privfed.plan import PrivacyPlan

Ranges = Mapping[str, tuple[float, float]]
ALL: Set[int] = frozenset()
"""Every node is asked."""
LOCAL = ("threads",)
"""Parameters that are each party's own business."""
CLIP_SLACK = 2.0**-29
"""What float rounding may add to a clipped norm, as nodes check it, doubled."""


class SecureStage(Stage):
    """Run one session of a protocol per exchange; nodes answer through `mods.secure_aggregation`.

    protocol: any object that satisfies `privfed.protocols.session.Protocol`. bits: the ring is Z_2^bits.
    max_value: largest change of any one element of the model; under a privacy plan its clip is used.
    max_weight: largest weight. train_metrics, evaluate_metrics: name -> (lowest, highest) of the metrics that travel
    inside the masked vector; every node must report them, others stay on the node. These are public; a node whose value
    lies outside sends the nearest one inside, and `clamped` in the round's metrics is how many nodes did (a refusal
    would tell the server, which picks the ranges, about one node). stage_timeout: seconds each stage but the training
    one may take.

    Guarantees: the mean's fixed-point error per element is at most `error-bound` in the round's metrics, which is
    survivors * step / 2 * max_weight / total weight; sums never wrap.

    A protocol that names a number of committee members, `OneShot(committee=20)`, has a commit-reveal beacon draw them
    from the nodes that are connected when the run first needs them; the committee stays for the run, and its members
    help to open every sum, also of exchanges that their input is not asked for. A node that saw no draw, as one that
    connects later, refuses the session and is left out.

    Where the run's recorder has a place for it (`journal_path`), every reply is on the disk before the stage acts on
    it, and a run that is resumed after a crash finishes the session that was cut off; if too many nodes lost what they
    kept of it, it begins anew with fresh keys.
    """

    offers: ClassVar[frozenset[type[View]]] = frozenset({Sum})

    def __init__(
        self,
        protocol: Protocol,
        *,
        bits: int = 32,
        max_value: float = 8.0,
        max_weight: float = 10_000,
        train_metrics: Ranges | None = None,
        evaluate_metrics: Ranges | None = None,
        stage_timeout: float = 60.0,
    ) -> None:
        if not stage_timeout > 0:
            raise ValueError(f"stage_timeout must be > 0 seconds, got {stage_timeout}")
        self.protocol = protocol
        self.bits = bits
        self.max_value = float(max_value)
        self.max_weight = float(max_weight)
        self.stage_timeout = stage_timeout
        self._metrics = {
            kind: tuple((name, float(low), float(high)) for name, (low, high) in sorted((ranges or {}).items()))
            for kind, ranges in (("train", train_metrics), ("evaluate", evaluate_metrics))
        }
        self._number = 0
        self._repeats = Repeats()
        beacon = getattr(protocol, "beacon", None)
        self._drawing = None if beacon is None else Drawing(beacon, "committee", self.next_number, stage_timeout)
        describe_protocol(protocol)
        for kind in self._metrics:  # ranges and caps are checked now, with the smallest cohort
            Layout(bits, 2, 0, self.max_value, self.max_weight, self._metrics[kind])

    def __repr__(self) -> str:
        return f"SecureStage({self.protocol!r})"

    def check_evaluation(self) -> None:
        """Refuse to evaluate without public metric ranges: metrics would have to travel in the clear."""
        if not self._metrics["evaluate"]:
            raise ValueError(
                f"stage: {self!r} has no metrics to aggregate in evaluation rounds; pass "
                "SecureStage(..., evaluate_metrics={'loss': (0, 10)}) or fraction_evaluate=0"
            )

    def collect(self, exchange: Exchange) -> Outcome:
        """Return the sum of the survivors' updates; QuorumError when too few survive, RunFailed on a deviation."""
        self._repeats.find(exchange)
        return self._repeats.note(exchange, self._collect(self.recovered(exchange)))

    def measure(self, exchange: Exchange) -> Outcome:
        """Return the survivors' metrics; for a model that was evaluated in this run already, those of that time."""
        return self._repeats.find(exchange) or self._repeats.note(exchange, self._measure(self.recovered(exchange)))

    def _collect(self, exchange: Exchange) -> Outcome:
        if exchange.noise is not None:
            return self._collect_noised(exchange, exchange.noise)
        private = exchange.clip is not None
        layout = self.layout(exchange, exchange.clip if exchange.clip is not None else self.max_value, private)
        outcome, decoded = self._run(exchange, layout)
        if private:
            outcome.view = Unreleased(noise_releaser(decoded, layout, exchange.clip or 0.0), layout.step)
            outcome.notes.clear()
        elif decoded.weight > 0:
            mean = decoded.total
            mean *= decoded.scale / decoded.weight
            outcome.view = Sum(mean, decoded.weight)
        return outcome

    def check_privacy(self, plan: PrivacyPlan) -> None:
        """Refuse noise of the nodes where it is not known that the sum stays shut until it is paid for."""
        if plan.distributed and input_stage(self.protocol) in (None, self.protocol.stages[-1]):
            raise PlanRefused(
                f"privacy: {self.protocol!r} does not say at which stage nodes give their input (input_stage), or "
                "opens the sum at that very stage, so that a round could not be charged, or refused, before"
            )

    def _collect_noised(self, exchange: Exchange, noise: SharedNoise) -> Outcome:
        """Return the mean of updates that carry their noise: integers that the nodes made, summed as they are."""
        asked = noise.parameters
        least = asked.least_survivors
        layout = Layout(asked.bits, len(exchange.nodes), asked.padded, 1.0, None, min_survivors=least, integers=True)
        ring, outcome = self.drive(exchange, layout)
        outcome.valid = len(ring.survivors)
        outcome.excluded = [one for one in outcome.excluded if one.node not in ring.survivors]
        total = ring.total
        for node in sorted(ring.survivors & noise.removed.keys()):
            level, keys = noise.removed[node]
            total = asked.remove(total, [keys], level)
        mean = asked.decode(total, noise.seed, len(ring.survivors), noise.denominator)
        outcome.view = Sum(mean, noise.denominator)
        return outcome

    def _measure(self, exchange: Exchange) -> Outcome:
        return self._run(exchange, self.layout(exchange, 1.0, False))[0]

    def layout(self, exchange: Exchange, max_value: float, private: bool, cohort: int | None = None) -> Layout:
        """Return the layout of an exchange. Raises RunFailed when the ring is too small for its cohort."""
        arrays = exchange.kind != "evaluate"
        try:
            return Layout(
                self.bits,
                cohort if cohort is not None else len(exchange.nodes),
                dimension(exchange.model) if arrays else 0,
                max_value,
                None if private or exchange.weight_key is None else self.max_weight,
                () if private else self._metrics.get(exchange.kind, ()),
            )
        except ValueError as cause:
            raise RunFailed(f"{exchange.kind} round {exchange.round}: {cause}") from cause

    def next_number(self) -> int:
        """Return a session number above all before it, also those of an interrupted run that is resumed."""
        self._number = max(self._number + 1, time.time_ns() // 1000)
        return self._number

    def _run(self, exchange: Exchange, layout: Layout) -> tuple[Outcome, Decoded]:
        ring, outcome = self.drive(exchange, layout)
        decoded = layout.decode(ring.total, len(ring.survivors))
        outcome.valid = len(ring.survivors)
        outcome.excluded = [one for one in outcome.excluded if one.node not in ring.survivors]
        if layout.max_weight is not None and decoded.weight <= 0:
            outcome.valid = 0
            outcome.excluded.append(Exclusion(0, "all weights are 0"))
            return outcome, decoded
        outcome.metrics = decoded.metrics
        if layout.dimension:
            outcome.notes["error-bound"] = decoded.error_bound
        if decoded.clamped:
            outcome.notes["clamped"] = decoded.clamped
        return outcome, decoded

    def recovered(self, exchange: Exchange) -> Exchange:
        """Return the exchange over the nodes of its session that a crash cut off, if there is one."""
        pending = self.journal(exchange).pending
        return exchange if pending is None else replace(exchange, nodes=pending.nodes)

    def journal(self, exchange: Exchange, part: str = "") -> SessionJournal:
        """Return the journal of an exchange's session. part: which one, where there are several."""
        asked = bind(exchange.content, ANY_LAYOUT, exchange.kind)[:12].hex()
        path = journal_path(exchange, f"{exchange.kind.partition('.')[0]}-{asked}{part}.journal")
        return SessionJournal(path, exchange.grid.run_id, exchange.kind)

    def drive(self, exchange: Exchange, layout: Layout) -> tuple[RingSum, Outcome]:
        """Run a session over the exchange's nodes. Raises QuorumError or RunFailed; nothing is revealed then."""
        where = f"{exchange.kind} round {exchange.round}"
        drive = self.session(exchange, layout, exchange.nodes)
        parties = dict.fromkeys((*exchange.nodes, *self.committee), drive)
        try:
            while drive.server.stage:
                self._authorise(exchange, drive)
                run_stage(exchange, parties, layout.size, self.stage_timeout)
                drive.close()
        except TooFewSurvivors as cause:
            if drive.journal.replayed:  # nodes lost what they kept of it: fresh keys, unless they opened it
                drive.journal.discard()
                return self.drive(exchange, layout)
            raise _too_few(where, cause, drive.outcome) from cause
        except ProtocolError as cause:
            drive.journal.discard()
            raise RunFailed(f"{where}: {cause}") from cause
        return self.result(drive, where), drive.outcome

    def _authorise(self, exchange: Exchange, drive: SessionDrive) -> None:
        """Open no sum with too little noise in it; charge the plan before the stage that opens it."""
        noise, stages, given = exchange.noise, self.protocol.stages, input_stage(self.protocol)
        if noise is None or given is None or stages.index(drive.server.stage) <= stages.index(given):
            return
        if drive.inputs < noise.parameters.least_survivors:
            raise TooFewSurvivors(drive.inputs, noise.parameters.least_survivors, given)
        if noise.parameters.drop_levels:
            drive.keep = noise.parameters.level(drive.inputs)
        if drive.server.stage == stages[-1]:
            noise.charge(drive.binding)

    @property
    def committee(self) -> tuple[int, ...]:
        """The committee that a beacon drew for the run; empty before its first exchange, and where none is drawn."""
        groups = () if self._drawing is None else self._drawing.outcome.groups
        return groups[0] if groups else ()

    def _agreed(self, exchange: Exchange) -> Protocol:
        """Return the protocol with what its beacon draws for the run."""
        if self._drawing is None:
            return self.protocol
        bare: Any = self.protocol  # the contract of a protocol that has a beacon: with_drawn
        agreed: Protocol = bare.with_drawn(self._drawing.of(exchange).committee)
        return agreed

    def session(
        self, exchange: Exchange, layout: Layout, nodes: tuple[int, ...], *, present: Set[int] = ALL, part: str = ""
    ) -> JournaledDrive:
        """Open a session over some nodes, or take up the one a crash cut off. RunFailed: the protocol does not suit.

        present: nodes that are asked; the others count as dropped out. part: of the journal's name.
        """
        where = f"{exchange.kind} round {exchange.round}"
        try:
            protocol = self._agreed(exchange)
        except LocalError as cause:
            raise RunFailed(f"{where}: {self.protocol!r} cannot run: {cause}") from cause
        journal = self.journal(exchange, part)
        session = Session(
            run=exchange.grid.run_id,
            round=journal.pending.round if journal.pending is not None else 0,
            action=exchange.kind,
            nodes=nodes,
            dimension=layout.size,
            bits=layout.bits,
            binding=bind(
                exchange.content,
                layout,
                exchange.kind,
                keys=(exchange.arrays_key, exchange.weight_key or ""),
                shared=exchange.grid.shared,
                group=str(exchange.round),
            ),
        )
        if session != journal.pending:
            session = replace(session, round=self.next_number())

        def make(agreed: Session) -> Server:
            server = journal.serve(protocol, agreed)
            return server if present is ALL else PresentServer(server, present)

        try:
            endpoint = Endpoint(protocol, make)
            return JournaledDrive(exchange, endpoint, session, layout, describe_protocol(self.protocol), journal)
        except LocalError as cause:
            raise RunFailed(f"{where}: {self.protocol!r} cannot run with {len(nodes)} nodes: {cause}") from cause

    def result(self, drive: SessionDrive, where: str) -> RingSum:
        """Return a finished session's sum."""
        if drive.server.result is None:
            raise RunFailed(f"{where}: {self.protocol!r} ended without a sum")
        return drive.server.result


class JournaledDrive(SessionDrive):
    """A session's drive with the journal its server writes; what the journal has counts as taken."""

    def __init__(
        self,
        exchange: Exchange,
        protocol: Protocol,
        session: Session,
        layout: Layout,
        description: ConfigRecord,
        journal: SessionJournal,
    ) -> None:
        super().__init__(exchange, protocol, session, layout, description)
        self.journal = journal
        self.inputs += journal.replayed.get(input_stage(protocol) or "", 0)


def _too_few(where: str, cause: TooFewSurvivors, outcome: Outcome) -> RunFailed:
    """Say what ended a session, and what to do where the nodes will say the same again."""
    counts = "; ".join(f"{count} x {text}" for text, count in outcome.causes().items())
    if "SumAlreadyOpened" in counts:
        return RunFailed(f"{where}: {REPEATED} ({counts})")
    return QuorumError(cause.have, cause.threshold, f"{where}, {cause}" + (f": {counts}" if counts else ""))


def describe_protocol(protocol: Protocol) -> ConfigRecord:
    """Return the protocol's class name and parameters. Raises ValueError for a parameter that cannot travel."""
    record = ConfigRecord({"name": type(protocol).__name__})
    parameters: list[str] = (
        [field.name for field in fields(protocol) if field.init and field.name not in LOCAL]
        if is_dataclass(protocol)
        else []
    )
    for name in parameters:
        value: Any = getattr(protocol, name)
        if value is None:
            continue
        try:
            record[name] = list(value) if isinstance(value, tuple) else value
        except TypeError as cause:
            raise ValueError(f"protocol: parameter {name}={value!r} of {protocol!r} cannot travel") from cause
    return record


def noise_releaser(decoded: Decoded, layout: Layout, clip: float) -> Callable[[float, RandomBytes], Float64s]:
    """Noise for the decoded sum. One node's entries are rounded by themselves: its part is within sqrt(d)/2 steps."""

    def release(noise_multiplier: float, random: RandomBytes) -> Float64s:
        from privfed.privacy.mechanisms import add_discrete_gaussian

        # `rounding_error` counts twice, before and after the change; only one node's rounding changes.
        moved = math.nextafter(math.sqrt(layout.dimension) * layout.step / 4, math.inf)
        return add_discrete_gaussian(
            decoded.total,
            sensitivity=clip * (1 + CLIP_SLACK),
            noise_multiplier=noise_multiplier,
            granularity=layout.step,
            rounding_error=moved,
            random=random,
        )[0]

    return release
