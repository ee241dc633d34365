"""What a writer that was killed leaves behind is removed at the next start, and what is being written is not."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

from privfed.runtime.array_folder import ArrayFolder
from privfed.runtime.bundle import build, open_bundle
from privfed.runtime.disk import STRAY_SECONDS
from proofs_tests.deployment import odd_app


def age(path: Path) -> None:
    long_ago = time.time() - STRAY_SECONDS - 60
    os.utime(path, (long_ago, long_ago))


def test_parts_of_arrays_go_and_arrays_stay(tmp_path: Path) -> None:
    data = b"model" * 100
    digest = hashlib.sha256(data).digest()
    ArrayFolder(tmp_path).write(digest, data)
    (kept,) = (path for path in tmp_path.rglob("*") if path.is_file())
    left, written = kept.with_name(".left.0123abcd.tmp"), kept.with_name(".written.0123abcd.tmp")
    for path in (left, written):
        path.write_bytes(data)
    age(left)
    age(kept)
    found = ArrayFolder(tmp_path)
    assert (left.exists(), written.exists(), list(found)) == (False, True, [digest])
    assert bytes(found.read(digest)) == data


def test_half_unpacked_apps_go_when_another_is_unpacked(tmp_path: Path) -> None:
    left, written = tmp_path / "apps" / ".unpack-left", tmp_path / "apps" / ".unpack-written"
    for path in (left, written):
        (path / "app").mkdir(parents=True)
        (path / "app" / "half.py").write_text("x")
    age(left)
    place = open_bundle(build(odd_app.write(tmp_path / "odd"))).unpack(tmp_path / "apps")
    assert set(place.parent.iterdir()) == {place, written}
