"""The smallest node: one FleetClient, the app in this process, state in memory."""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from privfed.apps import ClientApp, ServerApp
from privfed.runtime.app_folder import AppFolder
from privfed.runtime.bundle import open_bundle
from privfed.runtime.engine import Assignment, execute
from privfed.runtime.fleet import FleetClient, FleetOptions, Task
from privfed.runtime.handshake import NetworkError
from privfed.runtime.store import Lease, NodeState

_IMPORTS = threading.Lock()


def fresh(folder: Path) -> tuple[ServerApp, ClientApp]:
    """Load an app's components although this process may have loaded another copy of it."""
    with _IMPORTS:
        path = list(sys.path)
        try:
            for file in folder.glob("*.py"):
                sys.modules.pop(file.stem, None)
            return AppFolder.open(folder).load()
        finally:
            sys.path[:] = path
            for file in folder.glob("*.py"):
                sys.modules.pop(file.stem, None)


class SmallNode:
    """Serves tasks one after the other until told to end."""

    def __init__(self, address: str, node: int, count: int, cache: str | None = None) -> None:
        self.statuses: list[str] = []
        options = FleetOptions(on_status=self.statuses.append, cache=cache)
        self.client = FleetClient(address, None, node, options)
        self._config = {"partition-id": node - 1, "num-partitions": count}
        self._states: dict[int, NodeState] = {}
        self._apps: dict[int, ClientApp] = {}
        self._folder = tempfile.TemporaryDirectory()
        self.counted: list[bool] = []

    def app(self, run_id: int) -> ClientApp:
        if run_id not in self._apps:
            bundle = open_bundle(self.client.bundle(self.client.run(run_id).bundle))
            self._apps[run_id] = fresh(bundle.unpack(Path(self._folder.name)))[1]
        return self._apps[run_id]

    def serve(self, task: Task) -> None:
        run_id = task.message.metadata.run_id
        grant = self.client.run(run_id)
        assignment = Assignment(lambda node: dict(self._config), dict(grant.run_config), grant.seed)
        lease = Lease(task.token, task.message, self._states.get(run_id, NodeState()).copy(), task.expires_at)
        reply, state = execute(
            self.app(run_id), lease, assignment, lambda message, fault: self.statuses.append(repr(fault))
        )
        counted = self.client.reply(task.token, reply)
        self.counted.append(counted)
        if counted and state is not None:
            self._states[run_id] = state

    def close(self) -> None:
        self.client.close()
        self._folder.cleanup()

    def run(self, going: Callable[[], bool] = lambda: True) -> None:
        while going():
            task = self.client.receive(0.2)
            if task is not None:
                try:
                    self.serve(task)
                except NetworkError:
                    assert not going(), "only a client that was closed gives up"
