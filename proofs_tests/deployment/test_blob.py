"""Buffers that arrive in chunks: resumed, bounded, and whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.runtime.blob import BlobError, BlobFolder

A, B, C = (bytes([mark]) * 32 for mark in (1, 2, 3))


def put(folder: BlobFolder, digest: bytes, data: bytes, step: int = 3) -> None:
    for at in range(0, len(data), step):
        folder.add(digest, at, len(data), memoryview(data[at : at + step]))


@given(st.binary(min_size=1, max_size=40), st.integers(1, 9), st.integers(0, 40))
@settings(max_examples=25, deadline=None)
def test_a_transfer_goes_on_after_a_restart_where_it_broke_off(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, step: int, cut: int
) -> None:
    path = tmp_path_factory.mktemp("blobs")
    cut = min(cut, len(data) - 1)
    put_part = BlobFolder(path, 100)
    for at in range(0, cut, step):
        put_part.add(A, at, len(data), memoryview(data[at : min(at + step, cut)]))
    again = BlobFolder(path, 100)
    assert again.arrived(A) == cut and A not in again
    again.add(A, cut, len(data), memoryview(data[cut:]))
    assert again[A] == data
    assert BlobFolder(path, 100)[A] == data


def test_chunks_out_of_order_or_of_another_size_are_refused_and_change_nothing(tmp_path: Path) -> None:
    folder = BlobFolder(tmp_path, 100)
    folder.add(A, 0, 10, memoryview(b"01234"))
    with pytest.raises(BlobError, match="5 bytes have arrived"):
        folder.add(A, 7, 10, memoryview(b"789"))
    with pytest.raises(BlobError):
        folder.add(A, 5, 4, memoryview(b"x"))
    assert folder.add(A, 0, 10, memoryview(b"01234")) is False  # sent again
    assert folder.add(A, 5, 10, memoryview(b"56789")) is True
    assert folder.add(A, 0, 10, memoryview(b"xxxxx")) is True
    assert folder[A] == b"0123456789"
    with pytest.raises(KeyError):
        folder[B]


def test_what_is_announced_counts_against_the_budget(tmp_path: Path) -> None:
    folder = BlobFolder(tmp_path, 10)
    put(folder, A, b"123456")
    with pytest.raises(BlobError, match="the limit is 10"):
        folder.add(B, 0, 5, memoryview(b"1"))
    folder.drop([A])
    put(folder, B, b"12345")
    assert set(folder) == {B} and folder.size == 5


def test_a_cache_drops_what_was_used_longest_ago_and_mapped_buffers_stay_readable(tmp_path: Path) -> None:
    folder = BlobFolder(tmp_path, 10, evict=True)
    put(folder, A, b"aaaa")
    put(folder, B, b"bbbb")
    kept = folder[A]
    put(folder, C, b"cccc")
    assert set(folder) == {A, C}
    folder.clear()
    assert kept == b"aaaa" and not list(tmp_path.iterdir())
    with pytest.raises(BlobError):
        folder.add(A, 0, 11, memoryview(b"1"))
