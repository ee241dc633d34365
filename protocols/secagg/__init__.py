"""SecAgg [BIK+17] and SecAgg+ [BBGLR+20]: one engine, the graph is a parameter."""

from privfed.protocols.secagg.protocol import SecAgg, SecAggPlus

__all__ = ["SecAgg", "SecAggPlus"]
