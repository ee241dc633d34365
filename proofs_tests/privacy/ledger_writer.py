"""Charge a ledger until killed; write one byte to standard output after each acknowledged charge.

Run as a script by test_ledger. Lines are written a few bytes at a time, so that a kill can tear them.
"""

from __future__ import annotations

import hashlib
import os
import sys

from privfed.privacy import ledger
from privfed.privacy.events import Gaussian


def main(path: str) -> None:
    """Charge rounds from wherever the ledger stands, one after the other."""
    write = os.write

    def dribble(handle: int, data: memoryview) -> int:
        return write(handle, data[:7])

    ledger.os.write = dribble  # type: ignore[attr-defined]  # tear lines where the kernel would not
    book = ledger.Ledger.open(path)
    number = len(book.entries)
    write(1, b"r")
    while True:
        transcript = hashlib.sha256(str(number).encode()).hexdigest()
        book.charge(Gaussian(noise_multiplier=50.0), run="run", round=number, transcript=transcript)
        write(1, b".")
        number += 1


if __name__ == "__main__":
    main(sys.argv[1])
