"""The results of a run, brought home: the bytes the SuperLink has, by whoever may have them, and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from privfed import ArrayRecord
from privfed.runtime.control import ControlClient
from privfed.runtime.handshake import NetworkError
from privfed.runtime.result import ResultFile, ResultRows
from privfed.runtime.run_folder import RunFolder, load_checkpoint
from privfed.runtime.take_home import MODEL, FetchError, fetch
from proofs_tests.deployment.local_link import EXAMPLES, LocalLink, nodes_at
from proofs_tests.deployment.proxy import CuttingProxy
from proofs_tests.deployment.test_roles import Members
from proofs_tests.deployment.waiting import eventually

LARGE_APP = """
import numpy as np
from privfed import ArrayRecord, ClientApp, ServerApp
from privfed.grid import Checkpoint

client, server = ClientApp(), ServerApp()

@server.main()
def main(grid, context):
    arrays = ArrayRecord([np.random.default_rng(7).random(SIZE, np.float64)])
    print("made")
    for number in (1, 2):
        grid.recorder.commit(Checkpoint(number, arrays, metrics=({"round": 1},) * number))
"""
SIZE = 1_500_000
MANIFEST = """
[project]
name = "made"
[tool.privfed.app.components]
serverapp = "made_app:server"
clientapp = "made_app:client"
"""


@pytest.fixture
def made(tmp_path: Path) -> Path:
    app = tmp_path / "made"
    app.mkdir()
    (app / "made_app.py").write_text(LARGE_APP.replace("SIZE", str(SIZE)))
    (app / "pyproject.toml").write_text(MANIFEST)
    return app


@pytest.fixture
def link(tmp_path: Path) -> Iterator[LocalLink]:
    with LocalLink(tmp_path / "home") as link, nodes_at(link.fleet, 2):
        yield link


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_fetched_is_what_the_superlink_has(link: LocalLink, tmp_path: Path) -> None:
    name = link.submit(EXAMPLES / "minimal", 2, num_rounds=3)
    assert link.wait(name).state == "completed"
    there = link.folder(name)
    with ControlClient(link.control) as control:
        rows = fetch(control, name[:-2], tmp_path / "all", "all")
        fetch(control, name, tmp_path / "none", "none")
        fetch(control, name, tmp_path / "newest", "newest")
    here = RunFolder.open(tmp_path / "all")
    assert (rows.state, rows.round) == ("completed", 3) and here.status.state == "completed"
    assert here.rounds == there.rounds and here.config == there.config and here.operations == there.operations
    found = content(tmp_path / "all")
    kept = {f"checkpoints/{path.name}" for path in (there.path / "checkpoints").iterdir()}
    assert {path for path in found if path.startswith("checkpoints/")} == {p for p in kept if "states" not in p}
    assert all(found[path] == (there.path / path).read_bytes() for path in found if path.startswith("checkpoints/"))
    model = ArrayRecord.from_safetensors(found[MODEL])
    assert model == there.restore().arrays == load_checkpoint(sorted(here.path.glob("checkpoints/*"))[-1]).arrays
    assert not list((tmp_path / "none").glob("checkpoints/*")) and not (tmp_path / "none" / MODEL).exists()
    assert len(list((tmp_path / "newest").glob("checkpoints/*"))) == 1
    assert not {"lock", "stop", "attempts", "keep", "events.jsonl"} & found.keys()
    assert (tmp_path / "all").stat().st_mode & 0o777 == 0o700


def test_a_transfer_that_is_cut_goes_on_where_it_broke_off(link: LocalLink, made: Path, tmp_path: Path) -> None:
    name = link.submit(made, 2)
    assert link.wait(name).state == "completed"
    proxy = CuttingProxy(link.control, [5_000_000, 4_000_000], downwards=True)
    seen: list[tuple[str, int]] = []
    with ControlClient(proxy.address) as control:
        fetch(control, name, tmp_path / "here", "newest", lambda path, here, size: seen.append((path, here)))
        again = proxy.bytes_down
        fetch(control, name, tmp_path / "here", "newest")
    assert proxy.connections >= 3
    size = 8 * SIZE
    # At most what the window of a connection holds is lost with each of the two cuts.
    assert size < again < size + 2 * (3 << 20)
    assert proxy.bytes_down < again + 100_000  # what is here is not sent again
    assert [here for path, here in seen if path.endswith(".pfw")] == sorted(
        here for path, here in seen if path.endswith(".pfw")
    )
    model = ArrayRecord.from_safetensors((tmp_path / "here" / MODEL).read_bytes())
    assert np.array_equal(model["0"].view(), np.random.default_rng(7).random(SIZE))
    assert not list((tmp_path / "here").rglob(".*.part"))
    proxy.close()


def test_a_run_that_goes_on_is_fetched_as_it_was_at_one_moment(link: LocalLink, tmp_path: Path) -> None:
    name = link.submit(EXAMPLES / "minimal", 2, num_rounds=100_000)
    with ControlClient(link.control) as control:
        eventually(lambda: control.show(name).round > 3)
        for _ in range(2):
            rows = fetch(control, name, tmp_path / "here", "newest")
            here = RunFolder.open(tmp_path / "here")
            assert (rows.state, here.status.state) == ("running", "stopped")
            assert "goes on at" in here.status.reason
            checkpoints = list((tmp_path / "here" / "checkpoints").iterdir())
            assert len(checkpoints) == 1 and load_checkpoint(checkpoints[0]).round >= here.status.round
        control.stop(name)
    link.wait(name)


def test_results_are_for_who_submitted_the_run_and_for_operators(tmp_path: Path) -> None:
    members = Members(tmp_path / "keys")
    with LocalLink(tmp_path / "home", members.join("link", "main")) as link:

        def user(role: str, name: str) -> ControlClient:
            return ControlClient(link.control, members.join(role, name))

        from privfed.runtime.control import Submission
        from privfed.runtime.federation import open_app

        with user("submitter", "sam") as sam, user("submitter", "sue") as sue, user("viewer", "vera") as vera:
            name = sam.submit(Submission(open_app(EXAMPLES / "minimal"), {}, nodes=1)).name
            rows = sam.results(name)
            assert {"config.json", "status.json"} <= {file.path for file in rows.files}
            (link.folder(name).path / "operations.jsonl").write_text("{}\n")
            with user("operator", "olga") as olga:
                paths = {file.path: file for file in olga.results(name).files}
                assert "operations.jsonl" in paths
                assert b"".join(olga.result(name, paths["operations.jsonl"])) == b"{}\n"
            assert "operations.jsonl" not in {file.path for file in sam.results(name).files}
            with pytest.raises(NetworkError, match="not among the results"):
                list(sam.result(name, paths["operations.jsonl"]))
            for other in (sue, vera):
                for ask in (lambda who: who.results(name), lambda who: list(who.result(name, rows.files[0]))):
                    with pytest.raises(NetworkError, match=r"user-(sue may only|vera is a viewer)"):
                        ask(other)
            sam.stop(name)


@pytest.mark.parametrize(
    "path", ["../nodes.json", "/etc/hostname", "checkpoints/../attempts", "stop", "sessions/x", "", "attempts"]
)
def test_nothing_else_of_the_superlink_can_be_fetched(link: LocalLink, path: str) -> None:
    name = link.submit(EXAMPLES / "minimal", 2, num_rounds=1)
    link.wait(name)
    with ControlClient(link.control) as control, pytest.raises(NetworkError, match="not among the results"):
        list(control.result(name, ResultFile(path=path, size=1, digest=bytes(32))))


def test_states_of_nodes_are_not_results(link: LocalLink) -> None:
    name = link.submit(EXAMPLES / "minimal", 2, num_rounds=1)
    link.wait(name)
    states = "checkpoints/round-00001.states.pfw"
    (link.folder(name).path / states).write_bytes(b"secret")
    with ControlClient(link.control) as control:
        assert states not in {file.path for file in control.results(name, "all").files}
        with pytest.raises(NetworkError, match="not among the results"):
            list(control.result(name, ResultFile(path=states, size=6, digest=hashlib.sha256(b"secret").digest())))
        with pytest.raises(NetworkError, match="bytes now"):
            list(control.result(name, ResultFile(path="format", size=10**9, digest=bytes(32))))
        with pytest.raises(NetworkError, match="say none, newest, all"):
            control.results(name, "every")


@dataclass
class LyingLink:
    """What a SuperLink may answer that means no good."""

    rows: tuple[ResultFile, ...]
    data: bytes = b""
    address: str = "link.example.org:7811"
    asked: list[str] = field(default_factory=list)

    def results(self, name: str, models: str) -> ResultRows:
        del models
        return ResultRows(run=name, state="completed", round=1, files=self.rows)

    def result(self, run: str, file: ResultFile, offset: int) -> Iterator[bytes]:
        del run, offset
        self.asked.append(file.path)
        while True:  # it does not end either
            yield self.data


@pytest.mark.parametrize(
    "path",
    ["../../.bashrc", "/etc/passwd", "checkpoints/round-../../x.pfw", "checkpoints/round-1/../../../x.pfw", "fetched"],
)
def test_a_superlink_cannot_name_other_files_here(tmp_path: Path, path: str) -> None:
    lying = LyingLink((ResultFile(path=path, size=3, digest=hashlib.sha256(b"abc").digest()),), b"abc")
    with pytest.raises(FetchError, match="which is no"):
        fetch(lying, "run", tmp_path / "here", "all")  # type: ignore[arg-type]  # answers like one
    assert not lying.asked and not list(tmp_path.iterdir())


def test_bytes_that_are_not_what_was_listed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("privfed.runtime.take_home.PAUSE_SECONDS", 0.0)
    for data, size in ((b"abd", 3), (b"abc", 4), (b"abcabc", 3)):
        lying = LyingLink((ResultFile(path="format", size=size, digest=hashlib.sha256(b"abc").digest()),), data)
        with pytest.raises(FetchError, match="does not have the hash"):
            fetch(lying, "run", tmp_path / "here", "none")  # type: ignore[arg-type]  # answers like one
        assert not (tmp_path / "here" / "format").exists()


def test_a_folder_of_something_else_is_left_alone(link: LocalLink, tmp_path: Path) -> None:
    names = [link.submit(EXAMPLES / "minimal", 2, num_rounds=1) for _ in range(2)]
    for name in names:
        link.wait(name)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with ControlClient(link.control) as control:
        with pytest.raises(FetchError, match="holds something else"):
            fetch(control, names[0], mine, "none")
        fetch(control, names[0], tmp_path / "run", "none")
        with pytest.raises(FetchError, match="holds something else"):
            fetch(control, names[1], tmp_path / "run", "none")
    assert content(mine) == {"thesis.txt": b"years of work"}
