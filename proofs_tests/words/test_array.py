"""Array: immutable, exact, one content address; refused when it does not fit."""

from __future__ import annotations

import contextlib
import hashlib
import io
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from privfed import Array, ArrayRecord
from privfed.array import DTYPES, MAX_DIMENSIONS
from privfed.errors import WireError

NUMPY_DTYPES = sorted(set(DTYPES) - {"bfloat16"})
ndarrays = hnp.arrays(
    st.sampled_from([np.dtype(name) for name in NUMPY_DTYPES]), hnp.array_shapes(min_dims=0, min_side=0)
)


@settings(max_examples=150)
@given(ndarrays)
def test_values_shape_and_dtype_come_back(values: np.ndarray[Any, Any]) -> None:
    array = Array(values)
    assert (array.dtype, array.shape, array.nbytes) == (values.dtype.name, values.shape, values.nbytes)
    np.testing.assert_array_equal(array.view(), values)
    np.testing.assert_array_equal(array.numpy(), values)
    again = Array(array.dtype, array.shape, array.stype, array.data)
    assert again == array
    assert again.digest == array.digest
    assert Array.from_npy(array.to_npy()) == array
    loaded = np.load(io.BytesIO(array.to_npy()), allow_pickle=False)
    assert loaded.dtype == values.dtype
    np.testing.assert_array_equal(loaded, values)


@pytest.mark.parametrize(
    "make", [lambda v: v[::2], lambda v: v.T, lambda v: np.asfortranarray(v), lambda v: v.astype(">f4")]
)
def test_any_layout_and_byte_order_is_stored_little_endian_in_c_order(make: Any) -> None:
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    array = Array(make(values))
    assert bytes(array.data) == np.ascontiguousarray(make(values)).astype("<f4").tobytes()
    np.testing.assert_array_equal(array.view(), make(values))


def test_an_array_does_not_change_when_its_source_or_its_copies_do() -> None:
    values = np.zeros(3)
    array = Array(values)
    values[0] = 1
    array.numpy()[1] = 1
    assert not array.view().any()
    with pytest.raises(ValueError, match="read-only"):
        array.view()[0] = 1
    with pytest.raises(TypeError):
        array.data[0] = 1


def test_adopt_takes_the_memory_and_freezes_it() -> None:
    values = np.zeros(3)
    array = Array.adopt(values)
    assert np.shares_memory(array.view(), values)
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 1


def test_the_digest_is_sha256_of_dtype_shape_and_buffer() -> None:
    array = Array(np.array([[1, 2, 3]], dtype=np.int16))
    assert array.digest == hashlib.sha256(b"int16:1,3;" + struct.pack("<3h", 1, 2, 3)).digest()
    others = [np.array([[1], [2], [3]], np.int16), np.array([[1, 2, 3]], np.uint16), np.array([[1, 2, 4]], np.int16)]
    assert len({Array(other).digest for other in others} | {array.digest}) == 4


def test_equality_is_of_bytes() -> None:
    nan = Array(np.array([np.nan]))
    assert nan == Array(np.array([np.nan]))
    assert Array(np.array([0.0])) != Array(np.array([-0.0]))
    assert Array(np.zeros(2)) != Array(np.zeros((2, 1)))
    assert hash(nan) == hash(Array(np.array([np.nan])))
    assert nan != "nan"


@settings(max_examples=100)
@given(st.lists(st.floats(width=32), max_size=8))
def test_bfloat16_is_the_nearest_with_ties_to_even(values: list[float]) -> None:
    source = np.array(values, np.float32)
    rounded = Array.from_float32_as_bfloat16(source).compute()
    finite = np.isfinite(source) & (np.abs(source) < 3.38e38)
    bits = source.view(np.uint32)
    below = (bits & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
    above = ((bits & np.uint32(0xFFFF0000)).astype(np.uint64) + 0x10000).astype(np.uint32).view(np.float32)
    for place in np.flatnonzero(finite):
        low, high, value = below[place], float(above[place]), float(source[place])
        closest = min((low, high), key=lambda one: abs(one - value))
        if abs(low - value) == abs(high - value):
            closest = low if not int(bits[place] >> 16) & 1 else high
        assert rounded[place] == closest
    np.testing.assert_array_equal(np.isnan(rounded), np.isnan(source))
    np.testing.assert_array_equal(rounded[np.isinf(source)], source[np.isinf(source)])


def test_bfloat16_computes_in_float32_and_views_its_bits() -> None:
    array = Array.from_float32_as_bfloat16(np.array([[1.0, -2.5]], np.float32))
    assert (array.dtype, array.shape, array.nbytes) == ("bfloat16", (1, 2), 4)
    assert array.compute().dtype == np.float32
    assert array.view().dtype == np.uint16
    np.testing.assert_array_equal(array.numpy(), [[1.0, -2.5]])
    assert array.replace(np.array([[2.0, 3.0]])).dtype == "bfloat16"


@pytest.mark.parametrize("dtype", ["complex64", "object", "U3", "datetime64[s]", "longdouble"])
def test_other_dtypes_are_refused(dtype: str) -> None:
    with pytest.raises(TypeError, match="cannot travel"):
        Array(np.zeros(2, dtype=dtype))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("float32", (2,), "raw", bytes(7)), "needs 8"),
        (("float32", (2,), "raw", bytes(9)), "needs 8"),
        (("float99", (2,), "raw", bytes(8)), "dtype"),
        (("object", (1,), "raw", bytes(8)), "dtype"),
        (("float32", (-1,), "raw", b""), "shape"),
        (("float32", (True,), "raw", bytes(4)), "shape"),
        (("float32", (1,) * (MAX_DIMENSIONS + 1), "raw", bytes(4)), "shape"),
        (("bool", (2,), "raw", b"\x00\x02"), "bytes 0 and 1"),
        (("float32", (1,), "pickle", bytes(4)), "stype"),
        (("float32", (3,), "numpy.ndarray", Array(np.zeros(2, np.float32)).to_npy()), "holds"),
    ],
)
def test_buffers_that_do_not_fit_are_refused(arguments: tuple[Any, ...], why: str) -> None:
    with pytest.raises(WireError, match=why):
        Array(*arguments)


@settings(max_examples=100)
@given(st.binary(max_size=150))
def test_any_bytes_are_an_array_or_a_wire_error(data: bytes) -> None:
    for read in (Array.from_npy, ArrayRecord.from_safetensors):
        for candidate in (data, b"\x93NUMPY\x01\x00" + data, struct.pack("<Q", len(data)) + data):
            with contextlib.suppress(WireError):
                read(candidate)


def test_replace_rounds_and_refuses_what_does_not_fit() -> None:
    array = Array(np.zeros(3, np.int8))
    np.testing.assert_array_equal(array.replace(np.array([1.5, -2.5, 126.9])).view(), [2, -2, 127])
    for values in ([128.0, 0, 0], [0, np.nan, 0], [-129, 0, 0], [np.inf, 0, 0]):
        with pytest.raises(ValueError, match="do not fit"):
            array.replace(np.array(values))
    with pytest.raises(ValueError, match="shape"):
        array.replace(np.zeros(2))


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_replace_does_not_wrap_at_the_ends_of_64_bits(dtype: str) -> None:
    array = Array(np.zeros(1, dtype))
    top = 2.0**63 if dtype == "int64" else 2.0**64
    with pytest.raises(ValueError, match="do not fit"):
        array.replace(np.array([top]))
    below = np.nextafter(top, 0)
    assert array.replace(np.array([below])).view()[0] == int(below)


def test_an_array_record_survives_safetensors_and_the_reference_reader_agrees() -> None:
    from safetensors.numpy import load, save

    record = ArrayRecord(
        {"w": Array(np.arange(6, dtype=np.float32).reshape(2, 3)), "n": Array(np.array([1, 2], np.int64))}
    )
    found = load(record.to_safetensors())
    for name, array in record.items():
        np.testing.assert_array_equal(found[name], array.view())
    back = ArrayRecord.from_safetensors(save({name: array.numpy() for name, array in record.items()}))
    assert dict(back) == dict(record)
