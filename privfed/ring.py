"""The layout of a masked vector: updates, weight and metrics as integers modulo 2^bits, and back.

Server and nodes agree on a layout before anything is masked. Values are rounded to a public step, a power of two, and
the step is chosen so that the sum over the whole cohort fits the ring: a sum cannot wrap. A value beyond its public
range is sent as the nearest one within, and the sum says how many nodes did so. It is no error: the server picks the
ranges, and whether one node refuses would tell it, bit by bit and without any sum, what that node's value is. Entries
are, in this order: the update (times the node's share of `max_weight`), the weight, the metrics, the count of nodes
that clamped. Under distributed noise the vector is made by the node before, and passes as it is; a plan's sum has no
such count, and needs none, since updates are clipped.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.errors import PrivfedError
from privfed.record import ArrayRecord, ConfigRecord, ConfigValue, MetricRecord, RecordDict
from privfed.update import blocks, dimension

log = logging.getLogger("privfed.mods")

Float64s = NDArray[np.float64]
Ring = NDArray[Any]
"""uint32 for rings up to 2^32, uint64 above."""

SECURE = "privfed.secure"
"""A ConfigRecord in an instruction: one stage of a secure-aggregation session. "privfed.secure.": its other records."""
REQUEST = "privfed.secure.request"
REPLY = "privfed.secure.reply"
BUFFER = "bytes"
NOISED = "privfed.noised"
"""An ArrayRecord in a reply on its way to the mask: a ring vector with the node's share of the noise."""
VECTOR = "vector"
DEMANDS = "privfed.noised.demands"
"""Its ConfigRecord: what the node demands of the session that sums the vector."""
REMOVED = "privfed.secure.removed"
"""A ConfigRecord in a node's last reply: "keys" of the parts of its noise that so few drops do not need."""


LEAST, MOST = 2.0**-500, 2.0**500
"""Bounds of what a range may be: scales computed from it stay finite and above 0."""
MARGIN = 2.0**-40
FLOAT_ERROR = 2.0**-48
"""What float64 arithmetic adds to the fixed-point error of a mean, relative to max_value."""


class RingOverflow(PrivfedError, ValueError):
    """A reply that has no place in the layout, such as a weight that is no number; nothing was masked."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Public parameters of a masked vector.

    bits: the ring is Z_2^bits. cohort: most summands. dimension: elements of an update. max_value: largest absolute
    value of an element. max_weight: largest weight, None when all weigh the same. metrics: (name, lowest, highest).
    min_survivors: nodes that must be in the sum, or no node helps to open it. integers: the vector is a node's own
    `dimension` ring elements, without weight and metrics. Raises ValueError when the ring is too small.
    """

    bits: int
    cohort: int
    dimension: int
    max_value: float
    max_weight: float | None
    metrics: tuple[tuple[str, float, float], ...] = ()
    min_survivors: int = 2
    integers: bool = False

    def __post_init__(self) -> None:
        if not 8 <= self.bits <= 64:
            raise ValueError(f"bits must be in [8, 64], got {self.bits}")
        if self.integers and (self.max_weight is not None or self.metrics):
            raise ValueError("integers: such a vector holds no weight and no metrics")
        if self.cohort < 1 or self.dimension < 0:
            raise ValueError(f"a layout needs a cohort and a dimension, got {self.cohort} and {self.dimension}")
        if not (math.isfinite(self.max_value) and self.max_value > 0):
            raise ValueError(f"max_value must be finite and > 0, got {self.max_value}")
        for name, low, high in self.metrics:
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"the range of metric {name!r} must be finite and ascending, got ({low}, {high})")
        if self.reach < 1:
            raise ValueError(f"bits: 2^{self.bits} is too small a ring for the sum of {self.cohort} nodes")
        if not LEAST <= self.max_value <= MOST:
            raise ValueError(f"max_value must be in [{LEAST:g}, {MOST:g}], got {self.max_value}")
        for name, low, high in self.metrics:
            if not LEAST <= high - low <= MOST:
                raise ValueError(
                    f"the range of metric {name!r} must be {LEAST:g} to {MOST:g} wide, got ({low}, {high})"
                )
        if self.max_weight is not None:
            if not LEAST <= self.max_weight <= MOST:
                raise ValueError(f"max_weight must be in [{LEAST:g}, {MOST:g}], got {self.max_weight}")
            if self._safe_reach < self.max_weight:
                raise ValueError(
                    f"bits: {self.cohort} weights of up to {self.max_weight:g} do not fit 2^{self.bits}: "
                    "use more bits or a lower max_weight"
                )

    @property
    def reach(self) -> int:
        """Largest absolute entry of one node."""
        return int(((1 << (self.bits - 1)) - 1) // self.cohort)

    @property
    def step(self) -> float:
        """What one unit of an update's entry stands for: a power of two."""
        return 2.0 ** math.ceil(math.log2(self.max_value / self._safe_reach))

    @property
    def _safe_reach(self) -> float:
        """What float arithmetic may aim for without rounding past `reach`."""
        return self.reach * (1 - MARGIN)

    @property
    def _weight_scale(self) -> float:
        """A power of two, so that integer weights are exact."""
        return 2.0 ** math.floor(math.log2(self._safe_reach / self.max_weight)) if self.max_weight is not None else 0.0

    @property
    def _metric_scale(self) -> float:
        return 2.0 ** math.floor(math.log2(self._safe_reach)) if self.reach > 1 else 1.0

    @property
    def size(self) -> int:
        """Entries of the vector."""
        return self.dimension + (self.max_weight is not None) + len(self.metrics) + self.counts

    @property
    def counts(self) -> bool:
        """Whether the last entry is the number of nodes that clamped a value."""
        return self.max_weight is not None or bool(self.metrics)

    def to_config(self) -> ConfigRecord:
        """Return the layout as a record."""
        values: dict[str, ConfigValue] = {
            "bits": self.bits,
            "cohort": self.cohort,
            "dimension": self.dimension,
            "max-value": float(self.max_value),
            "metric-names": [name for name, _, _ in self.metrics],
            "metric-ranges": [float(bound) for _, low, high in self.metrics for bound in (low, high)],
        }
        if self.max_weight is not None:
            values["max-weight"] = float(self.max_weight)
        if self.min_survivors != 2 or self.integers:
            values["min-survivors"], values["integers"] = self.min_survivors, self.integers
        return ConfigRecord(values)

    @classmethod
    def from_config(cls, config: ConfigRecord) -> Layout:
        """Read what `to_config` wrote. Raises KeyError, TypeError or ValueError."""
        names, ranges = config["metric-names"], config["metric-ranges"]
        numbers = {name: config[name] for name in ("bits", "cohort", "dimension")}
        numbers["min-survivors"] = config.get("min-survivors", 2)
        weight, value = config.get("max-weight"), config["max-value"]
        if not (isinstance(names, list) and isinstance(ranges, list) and len(ranges) == 2 * len(names)):
            raise ValueError("the layout's metrics are malformed")
        if any(type(number) is not int for number in numbers.values()) or not isinstance(value, float):
            raise TypeError("the layout's numbers are malformed")
        bounds = [float(str(bound)) for bound in ranges]
        return cls(
            bits=int(str(numbers["bits"])),
            cohort=int(str(numbers["cohort"])),
            dimension=int(str(numbers["dimension"])),
            max_value=value,
            max_weight=None if weight is None else float(str(weight)),
            metrics=tuple((str(name), bounds[2 * i], bounds[2 * i + 1]) for i, name in enumerate(names)),
            min_survivors=int(str(numbers["min-survivors"])),
            integers=config.get("integers", False) is True,
        )

    def admit(self, vector: Ring) -> Ring:
        """Return a node's own ring vector after a look at it. Raises RingOverflow when it does not fit."""
        kind = np.uint32 if self.bits <= 32 else np.uint64
        if vector.shape != (self.dimension,) or vector.dtype != kind:
            raise RingOverflow(f"the vector is {vector.dtype}{vector.shape}, not {np.dtype(kind)}({self.dimension},)")
        if vector.size and int(vector.max()) >> self.bits:
            raise RingOverflow(f"an entry needs more than {self.bits} bits")
        return vector

    def encode(self, update: ArrayRecord | None, weight: float, metrics: Mapping[str, object]) -> Ring:
        """Return the ring vector of one node, values beyond a public range moved into it. Raises RingOverflow.

        A node with a NaN among its numbers counts with weight 0, or with the lowest value where all weigh the same.
        RingOverflow: a metric that is missing or no number, an update of another size.
        """
        share, clamped = 1.0, []
        if self.max_weight is not None:
            if any(value != value for value in (metrics.get(name) for name, _, _ in self.metrics)):
                weight = math.nan
            if not 0 <= weight <= self.max_weight:
                weight = self.max_weight if weight > 0 else 0.0
                clamped.append("the weight")
            share = weight / self.max_weight
        kind = np.uint32 if self.bits <= 32 else np.uint64
        vector = np.empty(self.size, kind)
        mask = (1 << self.bits) - 1
        place = self._encode_update(update, share, vector, clamped) if update is not None else 0
        if place != self.dimension:
            raise RingOverflow(f"the update has {place} elements, the layout {self.dimension}")
        if self.max_weight is not None:
            vector[place] = round(weight * self._weight_scale) & mask
            place += 1
        for name, low, high in self.metrics:
            value = metrics.get(name)
            if not isinstance(value, int | float):
                raise RingOverflow(f"metric {name!r} is {value!r}, not a number")
            if not low <= value <= high:
                value = high if value > high else low
                clamped.append(f"metric {name!r}")
            vector[place] = round(share * (2 * (value - low) / (high - low) - 1) * self._metric_scale) & mask
            place += 1
        if self.counts:
            vector[place] = bool(clamped)
        if clamped:
            log.warning("%s: beyond the public range, sent as its end", ", ".join(clamped))
        return vector

    def _encode_update(self, update: ArrayRecord, share: float, vector: Ring, clamped: list[str]) -> int:
        place, mask = 0, np.uint64((1 << self.bits) - 1)
        if dimension(update) != self.dimension:
            return dimension(update)
        factor = share / self.step
        for name, array in update.items():
            for _, block in blocks(array):
                largest = float(np.abs(block).max(initial=0.0))
                if not largest <= self.max_value:
                    np.clip(np.nan_to_num(block, copy=False), -self.max_value, self.max_value, out=block)
                    clamped.append(f"array {name!r}")
                block *= factor
                steps = np.rint(block, out=block).astype(np.int64).view(np.uint64)
                vector[place : place + block.size] = steps & mask
                place += block.size
        return place

    def _signed(self, total: NDArray[np.uint64]) -> NDArray[np.int64]:
        shift = np.uint64(64 - self.bits)
        return (total << shift).view(np.int64) >> np.int64(shift)

    def decode(self, total: NDArray[np.uint64], count: int) -> Decoded:
        """Read the sum of `count` nodes' vectors."""
        signed = self._signed(np.ascontiguousarray(total, np.uint64))
        update = signed[: self.dimension].astype(np.float64)
        update *= self.step
        place, weight, scale = self.dimension, float(count), 1.0
        if self.max_weight is not None:
            weight = float(signed[place]) / self._weight_scale
            scale = self.max_weight
            place += 1
        metrics = MetricRecord()
        for index, (name, low, high) in enumerate(self.metrics):
            if weight > 0:
                share = float(signed[place + index]) / self._metric_scale * scale / weight
                metrics[name] = low + (share + 1) / 2 * (high - low)
        rounding = count * self.step / 2 * scale / weight if weight > 0 else 0.0
        clamped = int(signed[self.size - 1]) if self.counts else 0
        return Decoded(update, scale, weight, metrics, rounding + self.max_value * FLOAT_ERROR, clamped)


@dataclass(frozen=True, slots=True)
class Decoded:
    """total * scale is the weighted sum of updates, weight its weight; error_bound: per element of the mean.

    clamped: how many nodes sent a value that had to be moved into its public range.
    """

    total: Float64s
    scale: float
    weight: float
    metrics: MetricRecord
    error_bound: float
    clamped: int = 0


def bind(
    content: RecordDict,
    layout: Layout,
    kind: str,
    *,
    keys: tuple[str, str] = ("", ""),
    shared: bytes = b"",
    group: str = "",
) -> bytes:
    """Return H(model, shared configuration): 32 bytes that differ when any node is told anything else.

    Covers every record of the content but those of the session itself, in their order, the layout, and the kind of
    message. keys: where the model is in a message, and the weight in a reply. shared: hash of the run's settings
    (`Context.shared`). group: of the message that brings the content, where an app may read its round.
    """
    state = hashlib.sha256(b"privfed binding v3\0")

    def put(*parts: bytes) -> None:
        for part in parts:
            state.update(len(part).to_bytes(8, "big"))
            state.update(part)

    put(kind.encode(), group.encode(), repr(layout).encode(), *(key.encode() for key in keys), shared)
    for name, record in content.items():  # not sorted: an app may take the first record of a kind
        if name == SECURE or name.startswith(SECURE + "."):
            continue
        put(name.encode(), type(record).__name__.encode(), len(record).to_bytes(8, "big"))
        for key, value in record.items():
            if isinstance(record, ArrayRecord):
                put(key.encode(), record[key].digest)
            else:
                put(key.encode(), type(value).__name__.encode(), repr(value).encode())
    return state.digest()
