"""Types that many threads read into at the same time for the first time."""

from __future__ import annotations

import subprocess
import sys
import textwrap

CROWD = """
    import sys, threading
    import msgspec
    from privfed.decoder import converted, json_decoder, msgpack_decoder

    sys.setswitchinterval(1e-6)
    inner = {"a": 1, "b": "x", "c": {"k": [1]}}
    plain = {"v": 1, "rows": [inner, inner], "more": {"x": inner}}
    text, packed = msgspec.json.encode(plain), msgspec.msgpack.encode(plain)
    for number in range(40):
        row = msgspec.defstruct("Row", [("a", int), ("b", str), ("c", dict[str, list[int]])], frozen=True)
        kind = msgspec.defstruct(
            "Kind", [("v", int), ("rows", tuple[row, ...]), ("more", dict[str, row])], forbid_unknown_fields=True
        )
        gate, found = threading.Barrier(24), []
        ways = (
            lambda: json_decoder(kind).decode(text),
            lambda: msgpack_decoder(kind).decode(packed),
            lambda: converted(plain, kind),
        )

        def read(way):
            gate.wait()
            found.append(way())

        crowd = [threading.Thread(target=read, args=(ways[place % 3],)) for place in range(24)]
        for one in crowd:
            one.start()
        for one in crowd:
            one.join()
        assert len(found) == 24 and all(one == found[0] for one in found)
"""


def test_a_type_that_many_threads_read_into_at_once_crashes_nobody() -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(CROWD)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{done.returncode}\n{done.stderr}"
