"""Errors of the framework.

    PrivfedError
    ├── AppError            an app's manifest, import or code is broken: says the file, the key and the next step
    ├── WireError           bytes that are not what they should be; the only error a decoder raises
    ├── RunFailed           a run that ended without a result; `reason` says why
    │   └── QuorumError     fewer valid replies than the round needs
    ├── RunStopped          somebody asked the run to stop; it can be resumed
    └── PlanRefused         a combination whose privacy is not proved

Errors of the protocols and of privacy accounting live beside them (`privfed.protocols.errors`, `privfed.privacy`).
"""

from __future__ import annotations


class PrivfedError(Exception):
    """Root of every error the framework raises on purpose."""


class AppError(PrivfedError):
    """An app cannot be loaded or used: a broken manifest, an import error, an unknown key."""


class WireError(PrivfedError):
    """Bytes that do not decode: truncated, extended, non-canonical, unknown dtype, wrong hash."""


class RunFailed(PrivfedError):
    """A run ended without a result.

    reason: one line for a person; it names the round, the cause and the counts.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class RunStopped(PrivfedError):
    """The run was asked to stop after its current round; what it committed is kept."""


class QuorumError(RunFailed):
    """A round had fewer valid replies than it needs; the model is unchanged."""

    def __init__(self, have: int, need: int, detail: str = "") -> None:
        self.have = have
        self.need = need
        super().__init__(f"{have} valid replies, {need} are needed" + (f": {detail}" if detail else ""))


class PlanRefused(PrivfedError):
    """A combination of strategy, stage and privacy plan whose guarantee is not proved."""
