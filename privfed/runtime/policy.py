"""A node's policy: what it lets anybody do with its data, whatever apps and servers ask. Enforced by the node.

[apps]                              # which code may run; nothing does by default
signers = ["user-alice"]            # members whose signature approves a bundle
bundles = ["9f86d0..."]             # digests approved one by one (`privfed policy approve`)

[privacy]
plans = ["distributed"]             # of "none", "central", "distributed", "local"
observer = "server"                 # whom the ledger guards against: the server, or ("output") only those who
                                    # see what it releases
delta = 1e-5
max-epsilon-per-run = 8.0
max-epsilon-per-period = 20.0
period-days = 365
min-cohort = 10                     # nodes whose noise a distributed plan counts on; central noise needs no number
min-separation = 1                  # rounds from one participation to the next, at least
unaccounted = []                    # of "evaluate", "query": answered without a plan and not counted. Otherwise a query
                                    # needs a plan as training does, and an evaluation passes where "none" is a plan

[secure-aggregation]
required = true                     # nothing leaves in the clear
require-active = true               # signed keys, consistency round
protocols = ["SecAgg", "SecAggPlus", "LightSecAgg", "OneShot"]
min-cohort = 10
min-threshold = 7
corrupt = 0.33
weight-key = "num-examples"         # the only metric that updates may be weighed by
grouped = false                     # true: no session before a beacon gave this node a group

[mods]
clip = 4.0                          # L2 bound on every update, around whatever the app does

[outward]
records = ["arrays", "metrics"]     # names of records a reply may hold; ["*"] for any. Where the update is clipped
                                    # or noised, nothing but it may leave as arrays
metrics = ["num-examples", "loss"]  # names of metrics in them, and of those that a masked sum holds

[limits]
task-seconds = 3600
memory-mib = 4096
cpu-seconds = 36000
network = false
"""

from __future__ import annotations

import fnmatch
import math
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec

from privfed.decoder import converted
from privfed.errors import PrivfedError
from privfed.runtime.bundle import Bundle
from privfed.runtime.credentials import Trust
from privfed.runtime.disk import write_atomically

Plan = Literal["none", "central", "distributed", "local"]
Protocol = Literal["SecAgg", "SecAggPlus", "LightSecAgg", "OneShot"]
EVERY_PROTOCOL: tuple[Protocol, ...] = ("SecAgg", "SecAggPlus", "LightSecAgg", "OneShot")


class PolicyError(PrivfedError):
    """A policy file that cannot be read: says the file, the key and what is allowed there."""


class PolicyRefusal(PrivfedError):
    """Something the node's policy does not allow. The text is safe to show to the server."""


class Apps(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """Which code may run."""

    signers: tuple[str, ...] = ()
    bundles: tuple[str, ...] = ()


class Privacy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """Which plans the node takes part in, and how much it spends."""

    plans: tuple[Plan, ...] = ("none", "central", "distributed", "local")
    observer: Literal["server", "output"] = "server"
    delta: float = 1e-5
    max_epsilon_per_run: float | None = None
    max_epsilon_per_period: float | None = None
    period_days: int = 365
    min_cohort: int = 1
    min_separation: int = 1
    relation: Literal["zero_out", "add_remove", "replace_one"] = "zero_out"
    unaccounted: tuple[Literal["evaluate", "query"], ...] = ()

    def __post_init__(self) -> None:
        for name, value in (
            ("max-epsilon-per-run", self.max_epsilon_per_run),
            ("max-epsilon-per-period", self.max_epsilon_per_period),
        ):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and > 0, got {value}")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must be in (0, 1), got {self.delta}")
        for name, count in (
            ("period-days", self.period_days),
            ("min-cohort", self.min_cohort),
            ("min-separation", self.min_separation),
        ):
            if count < 1:
                raise ValueError(f"{name} must be >= 1, got {count}")

    @property
    def limited(self) -> bool:
        """Whether the node limits what it spends."""
        return self.max_epsilon_per_run is not None or self.max_epsilon_per_period is not None


class SecureAggregation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """What the node asks of a secure sum; the floors of `privfed.protocols.session.Policy`."""

    required: bool = False
    require_active: bool = False
    protocols: tuple[Protocol, ...] = EVERY_PROTOCOL
    min_cohort: int = 2
    min_threshold: int = 2
    min_neighbours: int = 1
    min_bits: int = 8
    corrupt: float = 0.0
    weight_key: str | None = None
    min_survivors: int = 2
    max_dimension: int = 1 << 28
    grouped: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.corrupt < 1:
            raise ValueError(f"corrupt must be in [0, 1), got {self.corrupt}")
        for name in ("min_cohort", "min_threshold", "min_neighbours", "min_survivors", "max_dimension"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} must be >= 1, got {getattr(self, name)}")


class Mods(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """What the node wraps around every app."""

    clip: float | None = None
    local_noise_multiplier: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("clip", self.clip), ("local-noise-multiplier", self.local_noise_multiplier)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and > 0, got {value}")
        if self.local_noise_multiplier is not None and self.clip is None:
            raise ValueError("local-noise-multiplier needs clip: the noise is measured in it")


class Outward(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """What a reply may hold. Shell-style patterns; "privfed.*" records of the protocols are always allowed."""

    records: tuple[str, ...] = ("*",)
    metrics: tuple[str, ...] = ("*",)

    def foreign(self, records: Iterable[str], metrics: Iterable[str]) -> list[str]:
        """Return the names that may not leave."""
        bad = [name for name in records if not _matches(name, (*self.records, "privfed.*"))]
        return bad + [name for name in metrics if not _matches(name, self.metrics)]


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """What one app process may use. None: no limit."""

    task_seconds: float = 3600.0
    memory_mib: int | None = None
    cpu_seconds: int | None = None
    network: bool = False

    def __post_init__(self) -> None:
        for name in ("task_seconds", "memory_mib", "cpu_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name.replace('_', '-')} must be > 0, got {value}")


class NodePolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """A node's whole policy. The default runs no app at all."""

    apps: Apps = Apps()
    privacy: Privacy = Privacy()
    secure_aggregation: SecureAggregation = SecureAggregation()
    mods: Mods = Mods()
    outward: Outward = Outward()
    limits: Limits = Limits()

    @classmethod
    def load(cls, path: Path) -> NodePolicy:
        """Read a policy. Raises PolicyError naming the file, the key and the cause."""
        try:
            return cls.parse(tomllib.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise PolicyError(f"{path} does not exist: write a policy, or begin with `privfed policy new`") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError, msgspec.ValidationError) as cause:
            raise PolicyError(f"{path}: {cause}") from None

    @classmethod
    def parse(cls, document: dict[str, Any]) -> NodePolicy:
        """Check a document. Raises msgspec.ValidationError naming the key."""
        return converted(document, cls)

    def approve(self, bundle: Bundle, trust: Trust | None) -> str:
        """Return why the bundle may run: "approved by hash" or "signed by ...". Raises PolicyRefusal otherwise."""
        if bundle.digest in self.apps.bundles:
            return "approved by hash"
        signers = [peer.common_name for peer in bundle.signers(trust)] if trust is not None else []
        for name in signers:
            if name in self.apps.signers:
                return f"signed by {name}"
        by = f"signed by {', '.join(signers)}" if signers else "without a valid signature"
        raise PolicyRefusal(f"app {bundle.name!r} ({bundle.digest[:16]}, {by}) is not approved on this node")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def approve_in_file(path: Path, digest: str) -> bool:
    """Add a bundle's digest to the policy file, keeping everything else; return whether it was new.

    Raises PolicyError when the file is no policy, or its [apps] table has no `bundles` line this can extend.
    """
    if digest in NodePolicy.load(path).apps.bundles:
        return False
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    table = ""
    for index, line in enumerate(lines):
        bare = line.split("#")[0].strip()
        if bare.startswith("["):
            table = bare
        if table == "[apps]" and bare.partition("=")[0].strip() == "bundles":
            head, bracket, rest = line.partition("[")
            if not bracket:
                break
            empty = rest.lstrip().startswith("]")
            lines[index] = f'{head}["{digest}"{"" if empty else ", "}{rest.lstrip()}'
            break
    else:
        lines.append("" if not lines or lines[-1].endswith("\n") else "\n")
        at = next((i for i, line in enumerate(lines) if line.split("#")[0].strip() == "[apps]"), None)
        if at is None:
            lines += ["\n[apps]\n", f'bundles = ["{digest}"]\n']
        else:
            lines.insert(at + 1, f'bundles = ["{digest}"]\n')
    text = "".join(lines)
    try:
        after = NodePolicy.parse(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, msgspec.ValidationError):
        after = NodePolicy()
    before = NodePolicy.load(path)
    wanted = msgspec.structs.replace(
        before, apps=msgspec.structs.replace(before.apps, bundles=tuple({*before.apps.bundles, digest}))
    )
    if set(after.apps.bundles) != set(wanted.apps.bundles) or msgspec.structs.replace(
        after, apps=Apps()
    ) != msgspec.structs.replace(wanted, apps=Apps()):
        raise PolicyError(f'{path}: add it by hand to [apps]: bundles = ["{digest}"]')
    write_atomically(path, text.encode())
    return True


TEMPLATE = """\
# What this node lets anybody do with its data, whatever apps and servers ask.

[apps]
signers = []            # members whose signature approves a bundle, e.g. "user-alice"
bundles = []            # digests approved one by one: `privfed policy approve BUNDLE`

[privacy]
plans = ["distributed"]           # of "none", "central", "distributed", "local"
observer = "server"               # "output" trusts the server that adds the noise
delta = 1e-5
max-epsilon-per-run = 8.0
max-epsilon-per-period = 20.0
period-days = 365
min-cohort = 10
min-separation = 1

[secure-aggregation]
required = true
require-active = true
min-cohort = 10
min-threshold = 7
corrupt = 0.33
weight-key = "num-examples"

[outward]
records = ["arrays", "metrics"]
metrics = ["num-examples"]

[limits]
task-seconds = 3600
network = false
"""
