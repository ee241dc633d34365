"""Random values of the wire format, for tests."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from privfed import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from privfed.array import DTYPES
from privfed.message import Metadata

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
integers = st.one_of(st.integers(-3, 3), st.integers(-(1 << 80), 1 << 80))
floats = st.floats(allow_nan=False)


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    name = draw(st.sampled_from(sorted(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    dtype = DTYPES[name]
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    data = draw(st.binary(min_size=size, max_size=size))
    if name == "bool":
        data = bytes(byte & 1 for byte in data)
    return Array(name, shape, "raw", data)


def lists(values: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.one_of(values, st.lists(values, max_size=3))


metric_records = st.dictionaries(names, st.one_of(lists(integers), lists(floats)), max_size=3).map(MetricRecord)
config_records = st.dictionaries(
    names,
    st.one_of(lists(integers), lists(floats), lists(st.booleans()), lists(names), lists(st.binary(max_size=5))),
    max_size=3,
).map(ConfigRecord)
array_records = st.dictionaries(names, arrays(), max_size=3).map(ArrayRecord)
record_dicts = st.dictionaries(names, st.one_of(array_records, metric_records, config_records), max_size=3).map(
    RecordDict
)
ids = st.integers(0, (1 << 64) - 1)
metadata = st.builds(
    Metadata, ids, names, ids, ids, names, names, floats, floats, st.sampled_from(["train", "query.x"]), floats
)
errors = st.builds(Error, st.integers(-(1 << 31), (1 << 31) - 1), st.none() | names)
messages = st.builds(Message.restore, metadata, st.one_of(record_dicts, errors))
values = st.one_of(messages, record_dicts)


def same(left: Message | RecordDict, right: Message | RecordDict) -> bool:
    """Return whether two values are equal, types of numbers included."""
    if isinstance(left, Message) and isinstance(right, Message):
        if left.metadata != right.metadata or left.has_error() != right.has_error():
            return False
        return left.error == right.error if left.has_error() else same(left.content, right.content)
    return type(left) is type(right) and left == right and repr(left) == repr(right)
