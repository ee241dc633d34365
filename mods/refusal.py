"""What a node refuses: the text stays in its log, the class name is what leaves."""

from __future__ import annotations


class Refused(Exception):
    """This node does not do what it was asked; the text stays in its log, the class name is what leaves."""


class SecureAggregationRequired(Refused):
    """The instruction asks for a reply in the clear."""


class SessionOutOfOrder(Refused):
    """Another request of a stage that was answered, a stage out of order, or a session that is not new."""


class BindingMismatch(Refused):
    """The model or configuration is not the one the session was opened for."""


class SumAlreadyOpened(Refused):
    """This node helped to open a sum over this very model and action: two sums differ by somebody's input."""


class LayoutMismatch(Refused):
    """The layout the session was opened with is not for the model that came."""


class WeightMismatch(Refused):
    """The session weighs updates by another metric than this node's policy lets it."""


class UpdateNotClipped(Refused):
    """The update is longer than the privacy plan allows: put mods.clip() inside mods.secure_aggregation()."""


class NodePolicyTooWeak(Refused):
    """The node masks this reply itself, under a policy that is weaker than this mod's: raise the node's."""


class NotGrouped(Refused):
    """This node's policy wants sums over a group that a beacon drew, and none was drawn in this run."""


class CommitteeNamed(Refused):
    """The server names a committee that no beacon drew, to a node that neither pins it nor counts corrupt members."""


class NoiseMissing(Refused):
    """The session sums vectors that carry their noise: put mods.distributed_dp() inside mods.secure_aggregation()."""


class WeakSession(Refused):
    """The session would sum this node's noised vector with fewer survivors, or in another ring, than its plan says."""
