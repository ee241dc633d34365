"""Attacks on aggregation, for testing and red-teaming federations of your own.

`forgery`: on matrices. `search`: the worst strength against a rule. `client`: as mods, and on training data.
"""

from privfed.attacks import client, forgery, search

__all__ = ["client", "forgery", "search"]
