"""The mods a node puts around every app, in its own process: what they keep and sign with the app never sees."""

from __future__ import annotations

from collections.abc import Callable

from privfed.apps import CallNext, Mod, wrap
from privfed.context import Context
from privfed.message import Message
from privfed.mods import secure_aggregation
from privfed.protocols.session import Policy
from privfed.ring import SECURE
from privfed.runtime.policy import NodePolicy


def node_wrap(policy: NodePolicy | None) -> Callable[[CallNext], CallNext]:
    """Return what puts the node's mods around an app. policy: the node's; None asks for nothing."""
    mods = [_masking(policy)]
    return lambda app: wrap(mods, app)


def _masking(policy: NodePolicy | None) -> Mod:
    """Mask here what is asked for as a masked sum; the app's own `secure_aggregation` then stands aside.

    Without `required`, a message that does not ask for a sum goes to the app, whose own mod may still refuse it.
    """
    mod = secure_aggregation(_floors(policy))
    required = policy is not None and policy.secure_aggregation.required

    def mask(message: Message, context: Context, call_next: CallNext) -> Message:
        if required or SECURE in message.content:
            return mod(message, context, call_next)
        return call_next(message, context)

    return mask


def _floors(policy: NodePolicy | None) -> Policy:
    if policy is None:
        return Policy()
    asked = policy.secure_aggregation
    return Policy(
        min_cohort=asked.min_cohort,
        min_threshold=asked.min_threshold,
        min_neighbours=asked.min_neighbours,
        min_bits=asked.min_bits,
        require_active=asked.require_active,
        corrupt=asked.corrupt,
    )
