"""OneShot with a drawn committee between real processes: mutual TLS, a node policy, kill -9 of SuperLink and node."""

from __future__ import annotations

from pathlib import Path

from privfed import run_simulation
from privfed.runtime.app_folder import AppFolder
from privfed.runtime.bundle import open_bundle
from privfed.runtime.control import ControlClient, Submission
from privfed.runtime.federation import open_app
from privfed.runtime.run_folder import ENDED, RunFolder
from proofs_tests.deployment import odd_app
from proofs_tests.deployment.node_process import NodeProcess
from proofs_tests.deployment.superlink_process import SuperLinkProcess
from proofs_tests.deployment.test_roles import Members
from proofs_tests.deployment.waiting import eventually

NODES, ROUNDS = 4, 6
SERVER = odd_app.ACTIVE_SERVER.replace("import SecAgg", "import OneShot").replace(
    'SecAgg(threshold=3, mode="active")', "OneShot(threshold=2, committee=3)"
)
POLICY = """
[apps]
bundles = ["DIGEST"]
[secure-aggregation]
required = true
require-active = true
protocols = ["OneShot"]
min-cohort = 4
min-neighbours = 2
"""


def test_processes_draw_a_committee_and_survive_kills(tmp_path: Path) -> None:
    app = odd_app.write(tmp_path / "app", client=odd_app.ACTIVE_CLIENT, server=SERVER)
    members = Members(tmp_path / "keys")
    names = [f"node-{number}" for number in range(1, NODES + 1)]
    members.join("link", "main")
    for name in names:
        members.join("node", name)
    operator = members.join("operator", "olga")
    bundle = open_app(app)
    (tmp_path / "policy.toml").write_text(POLICY.replace("DIGEST", open_bundle(bundle).digest))
    link = SuperLinkProcess(tmp_path / "link", keys=tmp_path / "keys" / "main")
    with link:
        nodes = [
            NodeProcess(
                tmp_path / name, link.fleet, 0, ["--policy", str(tmp_path / "policy.toml")], members.folder / name
            )
            for name in names
        ]
        try:
            for node in nodes:
                node.start()
            with ControlClient(link.control, operator) as control:
                control.hand_roster(members.authority.roster_document)
                eventually(lambda: [row.connected for row in control.nodes()] == [True] * NODES)
                name = control.submit(Submission(bundle, {"rounds": str(ROUNDS)}, seed=1, nodes=NODES)).name
            run = RunFolder.open(link.home / "runs" / name)
            eventually(lambda: (run.path / "sessions" / "committee").exists())
            link.kill()
            nodes[0].kill()
            link.start()
            nodes[0].start()
            drawn = (run.path / "sessions" / "committee").read_bytes()
            with ControlClient(link.control, operator) as control:
                eventually(lambda: control.show(name).state in ENDED, 90)
                told = control.show(name)
            assert (told.state, told.round) == ("completed", ROUNDS), [told.reason, *(node.output for node in nodes)]
            assert (run.path / "sessions" / "committee").read_bytes() == drawn, "drawn once"
        finally:
            for node in nodes:
                node.__exit__()
    expected = run_simulation(*AppFolder.open(app).load(), NODES, run_config={"rounds": ROUNDS}, seed=1)
    found = run.restore()
    assert found is not None
    assert found.arrays == expected.arrays, "sums are exact in the ring: any committee, any crash, the same bits"
