"""The context of an app: who it is, what it was configured with, and the state it keeps between messages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from privfed.protocols.session import Identity, Policy
from privfed.record import RecordDict

UserConfigValue = bool | float | int | str
UserConfig = dict[str, UserConfigValue]


@dataclass(slots=True)
class Context:
    """What an app is given with every message.

    state: records kept between messages of one run on one node; committed with the reply, lost with a failed one.
    run_config: the run's settings. node_config: the node's own ("partition-id", "num-partitions" in a simulation).
    seed: the run's seed, or None; see `rng`. identify: returns the node's identity, where the runtime has one.
    masked: the policy under which `mods.secure_aggregation` masks the reply outside of what is called, or None.
    noised: whether the noise of the plan in the message is added outside of what is called.
    lasting: mods whose records are kept although the reply is an error, as a refusal that must not be forgotten.
    shared: hash of what all nodes of the run are given alike (`shared_settings`); no secure sum is made with others'.
    """

    run_id: int = 0
    node_id: int = 0
    node_config: UserConfig = field(default_factory=dict)
    state: RecordDict = field(default_factory=RecordDict)
    run_config: UserConfig = field(default_factory=dict)
    seed: int | None = None
    mod_states: dict[str, RecordDict] = field(default_factory=dict, repr=False)
    identify: Callable[[], Identity | None] | None = field(default=None, repr=False)
    masked: Policy | None = None
    noised: bool = False
    shared: bytes = b""
    lasting: set[str] = field(default_factory=set, repr=False)

    def mod_state(self, name: str) -> RecordDict:
        """Return the records that the mod `name` keeps, apart from the app's own state."""
        return self.mod_states.setdefault(name, RecordDict())

    def identity(self) -> Identity | None:
        """Return the node's signing key and the roster it trusts, or None when the runtime gives it none."""
        return self.identify() if self.identify is not None else None

    def rng(self, *labels: int | str) -> np.random.Generator:
        """Return a generator for data, initialisation and training; never for a mask or a noise.

        With a seed it depends on (seed, partition, labels) alone, so it is the same in every engine and after a resume;
        pass the round among the labels. Without a seed it is fresh from the operating system.
        """
        return derived_rng(self.seed, self.node_config.get("partition-id", self.node_id), *labels)


def shared_settings(
    run_config: Mapping[str, UserConfigValue], seed: int | None, app: str = "", nodes: Sequence[int] = ()
) -> bytes:
    """Return a hash of what a server hands to every node of a run alike, beside its messages: 32 bytes.

    app: digest of the app's bundle, "" where there is none. nodes: the run's. A server that gives a node other settings
    than the rest would make its update stand out in a sum, so this is in what a secure session is bound to.
    """
    text = json.dumps([dict(run_config), seed, app, list(nodes)], sort_keys=True)
    return hashlib.sha256(b"privfed settings v1\0" + text.encode()).digest()


def derived_rng(seed: int | None, *labels: object) -> np.random.Generator:
    """Return a numpy generator that depends on the seed and the labels alone, or a fresh one when seed is None."""
    if seed is None:
        return np.random.default_rng()
    text = repr((seed, *labels)).encode()
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text).digest(), "big"))


def check_user_config(config: Mapping[str, object], where: str) -> UserConfig:
    """Return a copy of the config, or raise TypeError naming the key whose value is no bool, int, float or str."""
    checked: UserConfig = {}
    for key, value in config.items():
        if not isinstance(key, str) or not isinstance(value, bool | int | float | str):
            raise TypeError(f"{where}[{key!r}] must be bool, int, float or str, got {type(value).__name__}")
        checked[key] = value
    return checked
