"""A context as it travels to an app's process and back: configuration and state, never an identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from privfed.context import Context
from privfed.message import Message
from privfed.protocols.session import Policy
from privfed.record import ConfigRecord, RecordDict
from privfed.runtime.channel import ChannelError, Packet
from privfed.runtime.store import NodeState, pack_states, unpack_states


def pack_context(head: dict[str, Any], context: Context, message: Message | None = None) -> Packet:
    """Return a packet with a message, if there is one, and all of the context that an app may see."""
    head |= {"run": context.run_id, "node": context.node_id, "seed": context.seed}
    head["shared"] = context.shared.hex()
    if context.masked is not None:
        policy = asdict(context.masked)
        head["masked"] = {**policy, "binding": policy["binding"].hex() if policy["binding"] else None}
    head["noised"] = context.noised
    settings = RecordDict({"run": ConfigRecord(context.run_config), "node": ConfigRecord(context.node_config)})
    return Packet(head, (message if message is not None else RecordDict(), settings, state_of(context)))


def read_context(packet: Packet) -> Context:
    """Return the context of a packet that `pack_context` made."""
    head, settings, state = packet.head, packet.records(1).config_records, _read_state(packet.values[2:3])
    return Context(
        run_id=head["run"],
        node_id=head["node"],
        node_config=dict(settings["node"]),  # type: ignore[arg-type]  # packed from a UserConfig
        state=state.app,
        run_config=dict(settings["run"]),  # type: ignore[arg-type]  # packed from a UserConfig
        seed=head["seed"],
        mod_states=state.mods,
        masked=_read_policy(head.get("masked")),
        noised=head.get("noised") is True,
        shared=bytes.fromhex(head["shared"]),
    )


def _read_policy(told: dict[str, Any] | None) -> Policy | None:
    if told is None:
        return None
    binding = told["binding"]
    known = {one.name: told[one.name] for one in fields(Policy)}
    return Policy(**{**known, "binding": bytes.fromhex(binding) if binding else None})


def state_of(context: Context) -> RecordDict:
    """Return what an app and its mods keep, as one RecordDict."""
    return pack_states({0: NodeState(context.state, context.mod_states)})


def take_state(context: Context, packet: Packet, place: int) -> None:
    """Put the state in a packet from an app's process into the context. Raises ChannelError."""
    state = _read_state(packet.values[place : place + 1])
    context.state, context.mod_states = state.app, state.mods


def _read_state(values: Sequence[Message | RecordDict]) -> NodeState:
    if len(values) != 1 or not isinstance(values[0], RecordDict):
        raise ChannelError("a packet has no state")
    try:
        states = unpack_states(values[0])
    except (ValueError, TypeError) as fault:
        raise ChannelError(f"the state in a packet does not decode: {fault}") from None
    if not states.keys() <= {0}:
        raise ChannelError("a packet has the state of others")
    return states.get(0, NodeState())
