"""Records: typed on the way in, ordered, copied where they are mutable and shared where they are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privfed import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from proofs_tests.words import wire_value


def test_array_records_name_lists_and_keep_names() -> None:
    record = ArrayRecord([np.zeros((2, 3)), np.float32(1.5)])
    assert list(record) == ["0", "1"]
    assert record["1"].shape == ()
    assert ArrayRecord.from_numpy_ndarrays([np.zeros((2, 3)), np.asarray(np.float32(1.5))]) == record
    arrays = record.to_numpy_ndarrays()
    arrays[0][0, 0] = 9
    assert not record["0"].view().any()
    assert list(ArrayRecord({"b": record["0"], "a": record["1"]})) == ["b", "a"]
    assert ArrayRecord() == ArrayRecord([]) == ArrayRecord({})


@pytest.mark.parametrize("value", [np.zeros(2), [1.0], 3, None, "w"])
def test_array_records_hold_arrays_only(value: Any) -> None:
    with pytest.raises(TypeError, match="must be an Array"):
        ArrayRecord({"w": value})
    record = ArrayRecord()
    with pytest.raises(TypeError, match="must be an Array"):
        record["w"] = value
    assert not record


@pytest.mark.parametrize("value", [True, "1", b"1", None, [True], [1, 2.0], ["1"], [[1]], (1, 2), 1j])
def test_metric_records_hold_numbers_only(value: Any) -> None:
    with pytest.raises(TypeError, match="MetricRecord\\['k'\\]"):
        MetricRecord({"k": value})


@pytest.mark.parametrize("value", [None, [1, 2.0], [1, True], [None], [[1]], {"a": 1}, (1,), 1j, ConfigRecord()])
def test_config_records_hold_plain_settings_only(value: Any) -> None:
    with pytest.raises(TypeError, match="ConfigRecord\\['k'\\]"):
        ConfigRecord({"k": value})


@pytest.mark.parametrize("kind", [MetricRecord, ConfigRecord])
def test_numpy_scalars_become_plain(kind: type[MetricRecord] | type[ConfigRecord]) -> None:
    record = kind({"f": np.float32(0.5), "i": np.int8(3), "l": [np.int64(1), np.int64(2)]})
    assert [type(value) for value in record.values()] == [float, int, list]
    assert dict(record) == {"f": 0.5, "i": 3, "l": [1, 2]}
    assert type(record["l"][0]) is int


@pytest.mark.parametrize("kind", [ArrayRecord, MetricRecord, ConfigRecord, RecordDict])
def test_keys_are_texts(kind: Any) -> None:
    value = {ArrayRecord: Array(np.zeros(1)), RecordDict: ConfigRecord()}.get(kind, 1)
    with pytest.raises(TypeError, match="key must be str"):
        kind({1: value})


def test_a_record_dict_sorts_its_records_by_kind() -> None:
    content = RecordDict({"a": ArrayRecord(), "m": MetricRecord(), "c": ConfigRecord(), "b": ArrayRecord()})
    assert list(content.array_records) == ["a", "b"]
    assert list(content.metric_records) == ["m"]
    assert list(content.config_records) == ["c"]
    with pytest.raises(TypeError, match="must be an ArrayRecord, MetricRecord or ConfigRecord"):
        content["x"] = {"k": 1}  # type: ignore[assignment]  # the mistake under test


@given(wire_value.record_dicts)
def test_a_copy_is_equal_and_apart(content: RecordDict) -> None:
    copy = content.copy()
    assert copy == content
    assert repr(copy) == repr(content)
    for name in list(copy):
        assert copy[name] is not content[name]
        copy[name].clear()
        del copy[name]
    assert not copy
    assert content.copy() == content


def test_a_copy_shares_arrays() -> None:
    content = RecordDict({"a": ArrayRecord([np.zeros(3)])})
    assert content.copy().array_records["a"]["0"] is content.array_records["a"]["0"]


def test_order_is_part_of_a_record() -> None:
    assert ConfigRecord({"a": 1, "b": 2}) != ConfigRecord({"b": 2, "a": 1})
    assert ConfigRecord({"a": 1}) != MetricRecord({"a": 1})
    with pytest.raises(TypeError):
        hash(ConfigRecord())


@given(st.lists(st.binary(max_size=4)), st.text(st.characters(exclude_categories=["Cs"]), max_size=5))
def test_bytes_are_counted(items: list[bytes], name: str) -> None:
    size = len(name.encode())
    assert ConfigRecord({name: items}).count_bytes() == size + sum(map(len, items))
    assert ConfigRecord({name: True}).count_bytes() == size + 1
    assert MetricRecord({name: [1, 2, 3]}).count_bytes() == size + 24
    arrays = ArrayRecord({name: Array(np.zeros((2, 3), np.int16))})
    assert arrays.count_bytes() == size + 12
    assert RecordDict({"rec": arrays}).count_bytes() == 3 + size + 12


@given(wire_value.array_records)
def test_map_keeps_names_dtypes_and_shapes(record: ArrayRecord) -> None:
    with np.errstate(all="ignore"):
        mapped = record.map(lambda values: values.copy())
    assert [(name, a.dtype, a.shape) for name, a in mapped.items()] == [
        (n, a.dtype, a.shape) for n, a in record.items()
    ]
    plain = {name for name, array in record.items() if array.dtype != "bfloat16"}
    assert all(mapped[name] == record[name] for name in plain)
