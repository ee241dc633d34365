"""One clear message for whatever went wrong."""

from __future__ import annotations

import sys


def explain(fault: Exception) -> int:
    """Print the fault and the next step on stderr; return the exit code (1 a failed run, 2 a wrong use)."""
    from privfed.errors import PrivfedError, RunFailed

    if isinstance(fault, RunFailed):
        print(f"Error: the run failed: {fault.reason}", file=sys.stderr)
        return 1
    if isinstance(fault, PrivfedError):
        print(f"Error: {fault}", file=sys.stderr)
        return 2
    print(f"Error: {type(fault).__name__}: {fault}", file=sys.stderr)
    print("Use --debug for the traceback.", file=sys.stderr)
    return 1
