"""The runs of a federation and where they are kept.

home/runs/NAME/    a run folder for each run      home/apps/DIGEST/   unpacked apps
home/bundles/      apps as they were submitted, named by the SHA-256 of the file
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privfed.errors import AppError, PrivfedError
from privfed.runtime.app_folder import AppFolder
from privfed.runtime.bundle import open_bundle
from privfed.runtime.credentials import Credentials
from privfed.runtime.disk import write_atomically
from privfed.runtime.federation_link import FederationLink
from privfed.runtime.federation_run import FederationRun
from privfed.runtime.frame import Grant
from privfed.runtime.launcher import Launcher
from privfed.runtime.run_folder import ENDED, Keep, RunFolder, RunFolderError
from privfed.runtime.store import StoreError

log = logging.getLogger("privfed.superlink")
MAX_RUNS = 32
MAX_WAITING = 256
STOP_SECONDS = 10.0


class FederationError(PrivfedError):
    """A request about a run that cannot be done."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a user asks for. settings: as text, by key. nodes: how many must be connected before it begins."""

    archive: bytes
    settings: Mapping[str, str]
    seed: int | None = None
    nodes: int | None = None
    keep: str = "last:3"
    by: str = ""


class Federation:
    """Starts runs, goes on with them after a restart, and knows them all. Threads may share it.

    insecure_test_randomness: seeds the noise of privacy plans, which then protect nothing and say so; for tests.
    """

    def __init__(self, home: Path, link: FederationLink, launcher: Launcher, approved: Callable[[], set[int]]) -> None:
        self.home = home
        self.link = link
        self.change = threading.Condition()
        self.connected: Callable[[], Mapping[int, str]] = dict
        self.noted: Callable[..., None] = lambda event, **fields: None
        self.insecure_test_randomness: int | None = None
        self._launcher = launcher
        self._approved = approved
        self._active: dict[str, FederationRun] = {}
        self._by_id: dict[int, FederationRun] = {}
        for name in ("runs", "apps", "bundles"):
            (home / name).mkdir(mode=0o700, parents=True, exist_ok=True)

    def nodes_changed(self) -> None:
        """Note that a node came, went or was approved."""
        with self.change:
            self.change.notify_all()

    def _available(self) -> set[int]:
        return self._approved() & self.connected().keys()

    def submit(self, asked: Asked, noted: Callable[[RunFolder], None] = lambda folder: None) -> RunFolder:
        """Check an app, start a run of it, and return its folder. Raises PrivfedError naming what is wrong.

        noted: called before the run starts; when it raises, there is no run.
        """
        self._sweep()
        if len(self._active) >= MAX_WAITING:
            raise FederationError(f"{MAX_WAITING} runs are open already: stop one, or wait")
        bundle = open_bundle(asked.archive)
        app = AppFolder.open(bundle.unpack(self.home / "apps"))
        digest = hashlib.sha256(asked.archive).hexdigest()
        nodes = asked.nodes if asked.nodes is not None else max(1, len(self._approved()))
        if nodes < 1:
            raise FederationError(f"a run needs at least one node, got {nodes}")
        config: dict[str, Any] = {
            "run-id": secrets.randbits(62) + 1,
            "app": str(app.path),
            "name": app.name,
            "bundle": digest,
            "run-config": app.with_config(asked.settings),
            "nodes": nodes,
            "seed": asked.seed,
            "by": asked.by,
        }
        keep = Keep.parse(asked.keep)
        place = self.home / "bundles" / digest
        if not place.exists():
            write_atomically(place, asked.archive)
        name = time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(3)
        path = self.home / "runs" / name
        try:
            folder = RunFolder.create(path, config, keep=keep)
            write_atomically(path / "keep", asked.keep.encode())
            noted(folder)
        except BaseException:  # what is refused must not begin when the SuperLink is started again
            shutil.rmtree(path, ignore_errors=True)
            raise
        self._start(folder)
        return folder

    def _start(self, folder: RunFolder) -> None:
        folder.insecure_test_randomness = self.insecure_test_randomness
        run = FederationRun(folder, self.link, self._launcher, self._available, self.change, self.noted)
        with self.change:
            self._active[folder.name] = self._by_id[run.run_id] = run
        run.start()

    def take_up(self) -> int:
        """Go on with the runs that were open when the SuperLink ended; return how many."""
        count = 0
        for folder in self.folders():
            with contextlib.suppress(RunFolderError):
                if folder.recorded_status.state not in ENDED:
                    keep = folder.path / "keep"
                    folder.keep = Keep.parse(keep.read_text()) if keep.exists() else Keep()
                    self._start(folder)
                    count += 1
        return count

    def resume(self, name: str) -> RunFolder:
        """Go on with a run that failed or was stopped."""
        folder = self.find(name)
        state = folder.recorded_status.state
        if state not in ("failed", "stopped"):
            raise FederationError(f"run {folder.name} is {state}: only a failed or stopped run can be resumed")
        self._sweep()
        (folder.path / "stop").unlink(missing_ok=True)
        status = folder.recorded_status
        status.state, status.reason = "pending", ""
        folder.set_status(status)
        self._start(folder)
        return folder

    def stop(self, name: str) -> RunFolder:
        """Ask a run to stop after its current round."""
        folder = self.find(name)
        run = self._active.get(folder.name)
        if run is None or folder.recorded_status.state in ENDED:
            raise FederationError(f"run {folder.name} is {folder.recorded_status.state} already")
        run.request_stop()
        return folder

    def _sweep(self) -> None:
        with self.change:
            for name in [name for name, run in self._active.items() if run.join(0.0)]:
                del self._active[name]

    def open_runs(self) -> int:
        """Return how many runs are not over."""
        self._sweep()
        return len(self._active)

    def folders(self) -> list[RunFolder]:
        """Return all runs, oldest first."""
        return [RunFolder(path.parent) for path in sorted((self.home / "runs").glob("*/format"))]

    def find(self, name: str) -> RunFolder:
        """Return a run by its name, or the unambiguous beginning of it."""
        names = [folder.name for folder in self.folders()]
        found = [one for one in names if one == name] or [one for one in names if name and one.startswith(name)]
        if len(found) == 1:
            return RunFolder.open(self.home / "runs" / found[0])
        if found:
            raise FederationError(f"{name!r} is the beginning of {len(found)} runs: {', '.join(found[:5])}")
        raise FederationError(f"there is no run {name!r} here: see `privfed ls --superlink`")

    def waits_for(self, folder: RunFolder) -> str:
        """Say what a run waits for, or why it ended."""
        run = self._active.get(folder.name)
        status = folder.recorded_status
        if run is None or status.state in ENDED:
            return status.reason
        return run.waits_for(self.connected())

    def progress(self, run_id: int) -> tuple[tuple[int, ...], int]:
        """Return the last committed round of a run when each attempt began, and now."""
        run = self._by_id.get(run_id)
        return (run.began, run.commit) if run is not None else ((), 0)

    def grant(self, run_id: int, node: int) -> Grant | None:
        """Return what a node of a run is told of it; None for a node that has no part in it."""
        run = self._by_id.get(run_id)
        if run is None:
            return None
        try:
            nodes = tuple(self.link.nodes(run_id))
        except StoreError:
            return None
        if node not in nodes:
            return None
        config = run.config
        bundle = self.home / "bundles" / config["bundle"]
        return Grant(
            run_id=run_id,
            name=run.folder.name,
            bundle=bytes.fromhex(config["bundle"]),
            bundle_size=bundle.stat().st_size,
            run_config=dict(config["run-config"]),
            seed=config["seed"],
            nodes=nodes,
        )

    def has_ended(self, run_id: int) -> bool:
        """Return whether a run is over, or was never here."""
        run = self._by_id.get(run_id)
        return run is None or run.folder.recorded_status.state in ENDED

    def archive(self, digest: bytes, node: int) -> Path | None:
        """Return the file of an app that a node runs; None for any other."""
        name = digest.hex()
        for run in list(self._by_id.values()):
            if run.config["bundle"] == name and self.grant(run.run_id, node) is not None:
                return self.home / "bundles" / name
        return None

    def close(self) -> None:
        """Let go of all runs; they go on when the SuperLink is back."""
        runs = list(self._active.values())
        for run in runs:
            run.interrupt()
        self.link.close()
        self._launcher.close()
        deadline = time.monotonic() + STOP_SECONDS
        for run in runs:
            if not run.join(max(0.0, deadline - time.monotonic())):
                log.warning("the ServerApp of run %s does not end", run.folder.name)


def open_app(path: Path, signer: Credentials | None = None) -> bytes:
    """Pack an app folder to be submitted, signed by who submits it; a bundle is taken as it is.

    Raises AppError, BundleError.
    """
    from privfed.runtime.bundle import build

    if not path.exists():
        raise AppError(f"{path} does not exist: give the folder of an app, or a bundle made by `privfed build`")
    return path.read_bytes() if path.is_file() else build(path, signer)
