"""LightSecAgg: coded masks, one decoding whatever the dropouts."""

from privfed.protocols.lightsecagg.protocol import LightSecAgg

__all__ = ["LightSecAgg"]
