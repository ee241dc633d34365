"""ClientApp, ServerApp, and the composition of mods around them."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from privfed.context import Context
from privfed.errors import AppError
from privfed.message import Message

if TYPE_CHECKING:
    from privfed.grid import Grid

CallNext = Callable[[Message, Context], Message]
"""The rest of the chain: the next mod, or the app itself."""

Mod = Callable[[Message, Context, CallNext], Message]
"""A function around a message and its reply; whatever it keeps lives in `context.mod_state(name)`."""

Mods = Sequence[Mod] | Callable[[Context], Sequence[Mod]]
"""Mods outermost first, or a function of the context that returns them, called once per run and node."""

ServerMain = TypeVar("ServerMain", bound="Callable[[Grid, Context], object]")

DEFAULT_ACTION = "default"
MAX_CACHED_CONTEXTS = 100_000
_ACTION = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def compose(*mods: Mod) -> Mod:
    """Compose mods, outermost first, into one mod.

    Laws: `compose()` is the identity; `compose(m) == m`; `compose(a, compose(b, c)) == compose(compose(a, b), c)`.
    """
    if len(mods) == 1:
        return mods[0]

    def composed(message: Message, context: Context, call_next: CallNext) -> Message:
        return wrap(mods, call_next)(message, context)

    return composed


def wrap(mods: Sequence[Mod], app: CallNext) -> CallNext:
    """Wrap an app in mods, outermost first."""
    chain = app
    for mod in reversed(mods):
        chain = _link(mod, chain)
    return chain


def _link(mod: Mod, call_next: CallNext) -> CallNext:
    def call(message: Message, context: Context) -> Message:
        return mod(message, context, call_next)

    return call


class ModChain:
    """Mods given as a list or as a function of the context, resolved once per run and node."""

    def __init__(self, mods: Mods | None) -> None:
        self._fixed: list[Mod] | None = None
        self._make: Callable[[Context], Sequence[Mod]] | None = None
        self._made: OrderedDict[tuple[int, int], list[Mod]] = OrderedDict()
        if mods is None:
            self._fixed = []
        elif isinstance(mods, Sequence):
            self._fixed = _checked(mods)
        elif callable(mods):
            self._make = mods
        else:
            raise TypeError(f"mods must be a list of mods or a function (context) -> list, got {type(mods).__name__}")

    def resolve(self, context: Context) -> list[Mod]:
        """Return the mods for this run and node."""
        if self._fixed is not None or self._make is None:
            return self._fixed or []
        key = (context.run_id, context.node_id)
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = _checked(self._make(context))
            if len(self._made) > MAX_CACHED_CONTEXTS:
                self._made.popitem(last=False)
        return made


def _checked(mods: Sequence[Mod]) -> list[Mod]:
    for mod in mods:
        if not callable(mod):
            raise TypeError(f"a mod is a function (message, context, call_next) -> Message, got {mod!r:.80}")
    return list(mods)


class ClientApp:
    """What a node runs: handlers for train, evaluate and query messages, wrapped in mods.

    Example:
        app = ClientApp(mods=[clip(1.0)])

        @app.train()
        def train(message: Message, context: Context) -> Message: ...
    """

    def __init__(self, mods: Mods | None = None) -> None:
        self._mods = ModChain(mods)
        self._handlers: dict[str, tuple[CallNext, ModChain]] = {}

    def train(self, action: str = DEFAULT_ACTION, *, mods: Mods | None = None) -> Callable[[CallNext], CallNext]:
        """Register the handler of "train" messages (or "train.<action>")."""
        return self._register("train", action, mods)

    def evaluate(self, action: str = DEFAULT_ACTION, *, mods: Mods | None = None) -> Callable[[CallNext], CallNext]:
        """Register the handler of "evaluate" messages (or "evaluate.<action>")."""
        return self._register("evaluate", action, mods)

    def query(self, action: str = DEFAULT_ACTION, *, mods: Mods | None = None) -> Callable[[CallNext], CallNext]:
        """Register the handler of "query" messages (or "query.<action>")."""
        return self._register("query", action, mods)

    def _register(self, kind: str, action: str, mods: Mods | None) -> Callable[[CallNext], CallNext]:
        if not isinstance(action, str) or not _ACTION.fullmatch(action):
            raise ValueError(
                f"action {action!r} must be a Python identifier: write @app.{kind}() or @app.{kind}('name')"
            )
        name = kind if action == DEFAULT_ACTION else f"{kind}.{action}"

        def register(handler: CallNext) -> CallNext:
            if name in self._handlers:
                raise ValueError(f"a handler for {name!r} is already registered")
            self._handlers[name] = (handler, ModChain(mods))
            return handler

        return register

    @property
    def message_types(self) -> list[str]:
        """The message types this app handles."""
        return sorted(self._handlers)

    def __call__(self, message: Message, context: Context) -> Message:
        """Run the handler of the message inside the app's mods, then its own."""
        kind = message.metadata.message_type
        kind = kind.removesuffix(f".{DEFAULT_ACTION}")
        if kind not in self._handlers:
            known = ", ".join(self.message_types) or "none"
            raise AppError(f"the ClientApp has no handler for {kind!r} messages (it has: {known})")
        handler, own = self._handlers[kind]
        mods = [*self._mods.resolve(context), *own.resolve(context)]
        return wrap(mods, handler)(message, context)


class ServerApp:
    """What the server runs: one main function, with mods around every message of its Grid.

    A server-side mod is a mod: it sees each instruction on its way out and the reply on its way back. Instructions of
    one round run their mods concurrently, each in a thread of its own.
    """

    def __init__(self, mods: Mods | None = None) -> None:
        self._mods = ModChain(mods)
        self._main: Callable[[Grid, Context], object] | None = None

    def main(self) -> Callable[[ServerMain], ServerMain]:
        """Register the main function `(grid, context)`; what it returns becomes the run's `result`."""

        def register(function: ServerMain) -> ServerMain:
            if self._main is not None:
                raise ValueError("a ServerApp has one main function, and it is already registered")
            self._main = function
            return function

        return register

    def __call__(self, grid: Grid, context: Context) -> object:
        """Run the main function and return what it returns."""
        if self._main is None:
            raise AppError("the ServerApp has no main function: decorate one with @app.main()")
        mods = self._mods.resolve(context)
        if mods:
            from privfed.grid import ModGrid

            grid = ModGrid(grid, mods, context)
        return self._main(grid, context)
