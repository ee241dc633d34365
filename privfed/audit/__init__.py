"""Property checks and empirical audits for users' own protocols and training."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "CanaryAudit": "privfed.audit.canary",
    "CheckFailed": "privfed.audit.protocol",
    "ModCheckFailed": "privfed.audit.mod",
    "ModReport": "privfed.audit.mod",
    "Report": "privfed.audit.protocol",
    "audit_plan": "privfed.audit.canary",
    "check_mod": "privfed.audit.mod",
    "check_protocol": "privfed.audit.protocol",
}

__all__ = [
    "CanaryAudit",
    "CheckFailed",
    "ModCheckFailed",
    "ModReport",
    "Report",
    "audit_plan",
    "check_mod",
    "check_protocol",
]

if TYPE_CHECKING:
    from privfed.audit.canary import CanaryAudit, audit_plan
    from privfed.audit.mod import ModCheckFailed, ModReport, check_mod
    from privfed.audit.protocol import CheckFailed, Report, check_protocol


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'privfed.audit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
