"""Apps and mods: handlers by message type, mods outermost first, the laws of composition."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privfed import ClientApp, ConfigRecord, Context, LocalGrid, Message, RecordDict, ServerApp
from privfed.apps import CallNext, Mod, compose, wrap
from privfed.errors import AppError


def tracing(name: str, trace: list[str]) -> Mod:
    def mod(message: Message, context: Context, call_next: CallNext) -> Message:
        trace.append(f"{name} in")
        reply = call_next(message, context)
        trace.append(f"{name} out")
        return reply

    return mod


def answering(trace: list[str]) -> CallNext:
    def app(message: Message, context: Context) -> Message:
        trace.append("app")
        return Message(RecordDict(), reply_to=message)

    return app


def ask(kind: str = "train") -> Message:
    return Message(RecordDict(), 1, kind)


def traced(make: Any) -> list[str]:
    trace: list[str] = []
    make(trace)(ask(), Context())
    return trace


@given(st.lists(st.sampled_from("abc"), max_size=5), st.integers(0, 5), st.integers(0, 5))
def test_composition_is_associative_with_an_identity(names: list[str], left: int, right: int) -> None:
    low, high = sorted((min(left, len(names)), min(right, len(names))))

    def flat(trace: list[str]) -> CallNext:
        return wrap([tracing(name, trace) for name in names], answering(trace))

    def nested(trace: list[str]) -> CallNext:
        mods = [tracing(name, trace) for name in names]
        inner = compose(compose(), compose(*mods[:low]), compose(*mods[low:high]), *mods[high:], compose())
        return wrap([inner], answering(trace))

    expected = [f"{name} in" for name in names] + ["app"] + [f"{name} out" for name in reversed(names)]
    assert traced(flat) == traced(nested) == expected


def test_one_mod_composed_is_that_mod() -> None:
    mod = tracing("a", [])
    assert compose(mod) is mod


def test_handlers_are_found_by_type_and_action() -> None:
    app = ClientApp()
    called: list[str] = []
    for name, register in {
        "train": app.train(),
        "train.warm_up": app.train("warm_up"),
        "evaluate": app.evaluate(),
        "query.count": app.query("count"),
    }.items():

        def handler(message: Message, context: Context, name: str = name) -> Message:
            called.append(name)
            return Message(RecordDict(), reply_to=message)

        assert register(handler) is handler
    assert app.message_types == ["evaluate", "query.count", "train", "train.warm_up"]
    for kind in ("train", "train.default", "train.warm_up", "evaluate", "query.count"):
        app(ask(kind), Context())
    assert called == ["train", "train", "train.warm_up", "evaluate", "query.count"]
    with pytest.raises(AppError, match=r"no handler for 'query' messages \(it has: evaluate, query\.count"):
        app(ask("query"), Context())
    with pytest.raises(ValueError, match="already registered"):
        app.train()(answering([]))
    for action in ("", "1x", "a b", answering([])):
        with pytest.raises(ValueError, match="identifier"):
            app.train(action)  # type: ignore[arg-type]  # the mistake under test


def test_app_mods_wrap_handler_mods() -> None:
    trace: list[str] = []
    app = ClientApp(mods=[tracing("app", trace)])
    app.train(mods=[tracing("handler", trace)])(answering(trace))
    app(ask(), Context())
    assert trace == ["app in", "handler in", "app", "handler out", "app out"]


def test_mods_from_the_context_are_made_once_per_run_and_node() -> None:
    made: list[tuple[int, int]] = []

    def mods(context: Context) -> list[Mod]:
        made.append((context.run_id, context.node_id))
        return []

    app = ClientApp(mods=mods)
    app.train()(answering([]))
    for run, node in [(1, 1), (1, 2), (1, 1), (2, 1), (1, 2)]:
        app(ask(), Context(run_id=run, node_id=node))
    assert made == [(1, 1), (1, 2), (2, 1)]


@pytest.mark.parametrize("mods", [3, ["clip"], lambda context: ["clip"]])
def test_what_is_no_mod_is_refused(mods: Any) -> None:
    with pytest.raises(TypeError, match="mod"):
        app = ClientApp(mods=mods)
        app.train()(answering([]))
        app(ask(), Context())


def test_a_server_app_has_one_main_and_returns_what_it_returns() -> None:
    app = ServerApp()
    with pytest.raises(AppError, match=r"@app.main\(\)"):
        app(LocalGrid(ClientApp(), 1), Context())
    app.main()(lambda grid, context: list(grid.get_node_ids()))
    assert app(LocalGrid(ClientApp(), 3), Context()) == [1, 2, 3]
    with pytest.raises(ValueError, match="already"):
        app.main()(lambda grid, context: None)


def test_a_server_mod_can_answer_instead_of_the_node() -> None:
    def cached(message: Message, context: Context, call_next: CallNext) -> Message:
        content = RecordDict({"c": ConfigRecord({"cached": True})})
        return Message(content, reply_to=message) if message.metadata.dst_node_id == 2 else call_next(message, context)

    client = ClientApp()
    client.train()(answering([]))
    server = ServerApp(mods=[cached])

    @server.main()
    def main(grid: Any, context: Context) -> list[bool]:
        sent = [Message(RecordDict(), node, "train") for node in (1, 2, 3)]
        return ["c" in reply.content for reply in grid.stream(sent, timeout=30, ordered=True)]

    assert server(LocalGrid(client, 3), Context()) == [False, True, False]
