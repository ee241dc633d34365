"""In which sessions a node takes part: whose parameters hold, and what beacons drew for it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import replace

from privfed.mods.refusal import CommitteeNamed, NotGrouped, Refused, WeakSession
from privfed.protocols.beacon import committee_of, group_corrupt, group_of
from privfed.protocols.session import Policy, Protocol

BEACON = "Beacon"
KNOWN = ("SecAgg", "SecAggPlus", "LightSecAgg", "OneShot", BEACON)
LOCAL = ("threads",)
"""Parameters that are each party's own business: no server names them."""
GROUP, COMMITTEE = "beacon", "committee"
"""Where in its state a node keeps what it saw of the two kinds of beacon."""

Makers = Mapping[str, Protocol | Callable[..., Protocol]]


def place_of(parameters: Mapping[str, object]) -> str:
    """Return where what a beacon with these parameters draws is kept."""
    return COMMITTEE if parameters.get("committee") else GROUP


def as_drawn(policy: Policy, parameters: Mapping[str, object], kept: Callable[[str], bytes]) -> Policy:
    """Return the policy with what beacons of this run gave the node: its group as the only cohort, the committee.

    The share of corrupt nodes is then that of the group, which has more than its part of them now and then.

    parameters: of the session. kept: what the node has of the beacons of a kind.
    """
    group, committee = group_of(kept(GROUP)), committee_of(kept(COMMITTEE))
    if group is None and policy.grouped:
        raise NotGrouped("no beacon has drawn groups in this run")
    if group is not None:
        policy = replace(policy, nodes=group)
        if policy.corrupt:
            bad, size = group_corrupt(kept(GROUP), policy.corrupt), len(group)
            if bad > size - 2:
                raise WeakSession(
                    f"{bad} of the {size} nodes of this node's group may be corrupt: larger groups are needed"
                )
            policy = replace(policy, corrupt=max(policy.corrupt, bad / size))
    return policy if committee is None else replace(policy, committee=committee)


def make_protocol(name: str, parameters: Mapping[str, object], protocols: Makers | None, policy: Policy) -> Protocol:
    """Build the protocol a session names. Raises Refused when this node does not take part in it."""
    maker: Protocol | Callable[..., Protocol] | None
    if protocols is not None and (name in protocols or name != BEACON):  # a beacon opens nothing
        maker = protocols.get(name)
    else:
        maker = getattr(importlib.import_module("privfed.protocols"), name, None) if name in KNOWN else None
    if maker is None:
        raise Refused(f"this node does not take part in protocol {name!r}")
    if named := [parameter for parameter in LOCAL if parameter in parameters]:
        raise Refused(f"{', '.join(named)} of {name} are this node's own business")
    if not callable(maker):  # pinned: its client refuses a session under other parameters
        return maker
    if not isinstance(parameters.get("committee", 0), int) and not policy.corrupt:
        raise CommitteeNamed(
            "the server names the members of the committee, and they could all be its own: let a beacon draw them "
            "(committee=NUMBER), pin them on the nodes, or count the corrupt ones (Policy(corrupt=...))"
        )
    try:
        return maker(**parameters)
    except (TypeError, ValueError) as cause:
        raise Refused(f"{name} cannot be set up as asked: {cause}") from cause
