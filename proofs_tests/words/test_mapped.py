"""Arrays in files: the same values, however often their pages are let go of, and memory for a few pieces."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed import Array, ArrayRecord, mapped
from privfed.strategies.fold import MeanFold
from privfed.strategies.strategy import add_update


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Keep working memory of any size in files."""
    monkeypatch.setattr(mapped, "LARGE", 1)
    mapped.work_in(tmp_path)
    yield tmp_path
    mapped.work_in(None)


def test_working_memory_is_a_file_without_a_name_and_keeps_what_is_let_go_of(files: Path) -> None:
    values = mapped.zeros(100_000)
    assert mapped.file_of(values[10:20]) is not None and not list(files.iterdir())
    values += np.arange(100_000)
    for start in range(0, 100_000, 777):
        mapped.let_go(values[start : start + 777])
    assert np.array_equal(values, np.arange(100_000))


def test_memory_is_used_where_there_is_no_folder_or_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mapped.file_of(mapped.zeros(1 << 22)) is None
    monkeypatch.setattr(mapped, "LARGE", 1)
    for folder in (tmp_path / "missing", tmp_path):
        mapped.work_in(folder)
        monkeypatch.setattr("os.posix_fallocate", refuse)
        found = mapped.zeros(1000)
        assert mapped.file_of(found) is None and not found.any()
    mapped.work_in(None)


def refuse(descriptor: int, start: int, size: int) -> None:
    raise OSError(28, "No space left on device")


@given(st.binary(max_size=50), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_pieces_are_the_buffer(data: bytes, size: int) -> None:
    found = list(mapped.pieces(data, size))
    assert b"".join(found) == data and all(1 <= len(piece) <= size for piece in found)


def test_a_file_is_read_as_it_is_after_it_was_removed(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)) * 100)
    found = mapped.read_file(path)
    path.unlink()
    for piece in mapped.pieces(found, 1000):
        assert piece.readonly
    assert found == bytes(range(256)) * 100
    path.touch()
    assert mapped.read_file(path) == b""


@given(st.sampled_from(["float32", "float64", "float16", "int32", "bfloat16"]), st.integers(0, 2**32 - 1))
@settings(max_examples=6, deadline=None)
def test_a_mean_over_files_has_the_bits_of_one_in_memory(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)

    def record() -> ArrayRecord:
        found = {}
        for name, shape in (("a", (300, 400)), ("b", ()), ("c", (0, 3)), ("d", (70_001,))):
            values = 100 * rng.standard_normal(shape, np.float32)
            bits = np.asarray(values)
            plain = Array.from_float32_as_bfloat16(bits) if dtype == "bfloat16" else Array(bits.astype(dtype))
            found[name] = plain
        return ArrayRecord(found)

    model, replies = record(), [record() for _ in range(3)]

    def mean() -> ArrayRecord:
        fold = MeanFold(model)
        for number, reply in enumerate(replies):
            fold.add(reply, 1.5 + number, update=number == 1)
        return add_update(model, fold.finish().mean)

    expected = mean()
    mapped.work_in(tmp_path_factory.mktemp("work"))
    large, mapped.LARGE = mapped.LARGE, 1
    try:
        found = mean()
    finally:
        mapped.work_in(None)
        mapped.LARGE = large
    assert found == expected and [a.dtype for a in found.values()] == [a.dtype for a in model.values()]


SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from privfed import Array, ArrayRecord, mapped
from privfed.strategies.fold import MeanFold
from privfed.strategies.strategy import add_update
from privfed.update import check_arrays
mapped.LARGE = 1 << 24  # a sixteenth, as the models are

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) >> 10

folder, layers = Path(sys.argv[1]), int(sys.argv[2])
size = 64 << 20

def read():
    data, each = mapped.read_file(folder / "reply"), size // layers
    return ArrayRecord(
        {str(n): Array("float32", (each // 4,), "raw", data[n * each : (n + 1) * each]) for n in range(layers)}
    )

(folder / "reply").write_bytes(bytes(size))
mapped.work_in(folder)
before = peak()
model = read()
for _ in range(2):
    fold = MeanFold(model)
    for _ in range(3):
        reply = read()
        digests = [array.digest for array in reply.values()]
        check_arrays(model, reply)
        fold.add(reply, 1.0, update=False)
    model = add_update(model, fold.finish().mean)
    digests = [array.digest for array in model.values()]
print(peak() - before)
"""


@pytest.mark.parametrize("layers", [1, 64])
def test_a_mean_over_files_needs_memory_for_a_few_pieces(tmp_path: Path, layers: int) -> None:
    """Two rounds of three replies of 64 MiB; a model held in memory would show as 64 MiB, a sum as 128."""
    words = [sys.executable, "-c", SCRIPT, str(tmp_path), str(layers)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 24, done.stdout
