"""Nodes against a SuperLink on paper: they come and go as processes do, and run apps in themselves or confined."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from privfed import ConfigRecord, Message, RecordDict
from privfed.context import shared_settings
from privfed.runtime.confinement import Limits
from privfed.runtime.launcher import InlineLauncher, Launcher, ProcessLauncher
from privfed.runtime.link import LinkGrid
from privfed.runtime.node_store import NodeStore
from privfed.runtime.supernode import NodeOptions, SuperNode
from proofs_tests.deployment.paper_fleet import RUN, PaperFleet, PaperLink


class Place:
    """One node on the disk, whose process may come and go."""

    def __init__(
        self, paper: PaperLink, node_id: int, folder: Path, way: Callable[[], Launcher] = InlineLauncher
    ) -> None:
        self.paper, self.node_id, self.folder, self.way = paper, node_id, folder, way
        self.fleet = PaperFleet(paper, node_id)

    def start(self, **options: object) -> SuperNode:
        self.fleet = PaperFleet(self.paper, self.node_id)
        store = NodeStore(self.folder / "state")
        self.node = SuperNode(self.fleet, store, self.way(), self.folder, NodeOptions(drain_seconds=5, **options))  # type: ignore[arg-type]  # a test's
        self.thread = threading.Thread(target=self.node.run, daemon=True)
        self.thread.start()
        return self.node

    def stop(self) -> None:
        self.node.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.node.store.close()


@contextlib.contextmanager
def running(*places: Place, **options: object) -> Iterator[None]:
    for place in places:
        place.start(**options)
    try:
        yield
    finally:
        for place in places:
            place.stop()


def confined(folder: Path) -> Callable[[], Launcher]:
    """Run apps in processes of their own, which write into the folder alone."""
    return lambda: ProcessLauncher(folder / "work", Limits(writable=(str(folder),)))


def grid_of(paper: PaperLink) -> LinkGrid:
    grant = paper.grant
    shared = shared_settings(grant.run_config, grant.seed, grant.bundle, grant.nodes)
    return LinkGrid(paper.link, RUN, seed=grant.seed, shared=shared)


def ask(grid: LinkGrid, kind: str = "train") -> list[Message]:
    return [Message(RecordDict({"q": ConfigRecord({"n": 1})}), node, kind) for node in grid.get_node_ids()]


def exchange(paper: PaperLink, kind: str = "train", timeout: float = 20) -> list[Message]:
    grid = grid_of(paper)
    return grid.send_and_receive(ask(grid, kind), timeout=timeout)


def seen(reply: Message) -> int:
    return int(str(reply.content.metric_records["metrics"]["seen"]))
