"""Clocks that are hours wrong, and certificates that run out while they are in use: named, and nothing is lost."""

from __future__ import annotations

import datetime
import shutil
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from privfed import Message, RecordDict
from privfed.runtime import authority as authority_module
from privfed.runtime import certificate as certificate_module
from privfed.runtime.authority import utc_now
from privfed.runtime.control import ControlClient
from privfed.runtime.credentials import Credentials, accept_answer
from privfed.runtime.federation_link import FederationLink, steady_clock
from privfed.runtime.fleet import FleetClient, FleetOptions
from privfed.runtime.memory_store import MemoryStore
from privfed.runtime.run_folder import ENDED, RunFolder
from proofs_tests.deployment.kill_federation import member
from proofs_tests.deployment.local_link import LocalLink
from proofs_tests.deployment.node_process import NodeProcess
from proofs_tests.deployment.superlink_process import SuperLinkProcess
from proofs_tests.deployment.test_full_disk import submit, undisturbed
from proofs_tests.deployment.test_roles import Members
from proofs_tests.deployment.waiting import eventually

HOURS = 3
ROUNDS = 5
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
int clock_gettime(clockid_t clock, struct timespec *found) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, found);
    const char *seconds = getenv("SKEW");
    if (!result && clock == CLOCK_REALTIME && seconds) found->tv_sec += atol(seconds);
    return result;
}
int gettimeofday(struct timeval *found, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    found->tv_sec = now.tv_sec;
    found->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *found) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (found) *found = now.tv_sec;
    return now.tv_sec;
}
"""
"""The system's clock as a process sees it: Python, gRPC and TLS alike."""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("a process's clock is set by a library that a C compiler on Linux makes")
    folder = tmp_path_factory.mktemp("clock")
    (folder / "skew.c").write_text(SHIM)
    made = folder / "skew.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(made), str(folder / "skew.c"), "-ldl"], check=True)
    return str(made)


def skew(shim: str, monkeypatch: pytest.MonkeyPatch, hours: float) -> None:
    """Have processes that are started now run with a clock that is hours away from this one's."""
    monkeypatch.setenv("LD_PRELOAD", shim)
    monkeypatch.setenv("SKEW", str(int(hours * 3600)))
    code = "import time; print(time.time())"
    told = float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert abs(told - time.time() - hours * 3600) < 60, "the clock is wrong indeed"


def test_nodes_whose_clocks_are_hours_ahead_and_behind_change_no_bit(
    shim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SuperLinkProcess(tmp_path / "link") as link, ControlClient(link.control) as control:
        nodes = []
        for number, hours in ((1, HOURS), (2, -HOURS)):
            skew(shim, monkeypatch, hours)
            node = NodeProcess(tmp_path / str(number), link.fleet, number, ["--isolation", "inline"])
            node.start()
            nodes.append(node)
        try:
            name = submit(control, ROUNDS)
            eventually(lambda: control.show(name).state in ENDED, 60)
            assert (control.show(name).state, control.show(name).reason) == ("completed", "")
        finally:
            for node in nodes:
                node.kill()
        expected, found = undisturbed(ROUNDS), RunFolder.open(link.home / "runs" / name).restore()
        assert found is not None and (found.arrays, found.metrics) == (expected.arrays, expected.metrics)
        assert "Traceback" not in link.output + nodes[0].output + nodes[1].output


def test_a_superlinks_clock_that_is_set_while_it_runs_loses_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, real = steady_clock(), time.time
    link = FederationLink(MemoryStore())
    link.create_run(7, [1])
    link.set_run_state(7, "running")
    for hours in (HOURS, -HOURS):
        monkeypatch.setattr(time, "time", lambda hours=hours: real() + hours * 3600)
        assert abs(clock() - real()) < 5
        (asked,) = link.push(7, [Message(RecordDict(), 1, "train", ttl=60.0)])
        (lease,) = link.lease_for([1])
        assert lease.message.metadata.message_id == asked
        assert link.count(lease.token, 7, Message(RecordDict(), reply_to=lease.message))
        assert [reply.has_content() for reply in link.pull(7, [asked])] == [True]


def renewed(members: Members, name: str) -> None:
    """Have the authority answer a member's request again, and put the answer into its folder."""
    folder = members.folder / name
    _, answer = members.authority.answer((folder / "request.json").read_bytes())
    accept_answer(folder, msgspec.json.encode(answer))


def test_a_nodes_certificate_that_runs_out_is_named_and_the_new_one_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node is connected all the while; after the renewal it is again, in the same process."""
    members = Members(tmp_path / "keys")
    link_keys, olga = members.join("link", "main"), members.join("operator", "olga")
    ends = utc_now() + datetime.timedelta(seconds=6)
    issue = certificate_module.issue
    monkeypatch.setattr(authority_module.cert, "issue", lambda *given: _ending(issue(*given), given, ends))
    node = members.join("node", "hospital-a")
    monkeypatch.undo()
    (members.folder / "main" / "roster.json").write_bytes(members.authority.roster_document)
    monkeypatch.setattr("privfed.runtime.superlink.RELOAD_SECONDS", 0.5)
    statuses: list[str] = []
    with LocalLink(tmp_path / "home", Credentials.load(members.folder / "main")) as link:
        assert link_keys.peer.role == "link"
        client = FleetClient(link.fleet, node, options=FleetOptions(on_status=statuses.append))
        with ControlClient(link.control, olga) as control:
            eventually(lambda: [row.connected for row in control.nodes()] == [True], 5)
            told = "waits for a certificate: "
            eventually(lambda: any(told in text and "expired on" in text for text in statuses), 20)
            assert [row.connected for row in control.nodes()] == [False]
            renewed(members, "hospital-a")
            eventually(lambda: [row.connected for row in control.nodes()] == [True], 40)
        client.close()


def _ending(certificate: object, given: tuple[object, ...], ends: datetime.datetime) -> object:
    """Issue a certificate again, that ends soon."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    assert isinstance(certificate, x509.Certificate)
    builder = (
        x509.CertificateBuilder()
        .subject_name(certificate.subject)
        .issuer_name(certificate.issuer)
        .public_key(certificate.public_key())
        .serial_number(certificate.serial_number)
        .not_valid_before(certificate.not_valid_before_utc)
        .not_valid_after(ends)
    )
    for extension in certificate.extensions:
        builder = builder.add_extension(extension.value, critical=extension.critical)
    return builder.sign(given[1], hashes.SHA384())  # type: ignore[arg-type]  # the authority's key


def test_a_certificate_that_is_not_valid_yet_says_that_the_clock_may_be_wrong(
    shim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from privfed.runtime.authority import Authority

    authority = Authority.create(tmp_path / "authority", "test")
    member(authority, tmp_path / "a", "node", "a")
    skew(shim, monkeypatch, -HOURS)
    words = ["supernode", "--superlink", "127.0.0.1:1", "--keys", str(tmp_path / "a"), "--policy", "none.toml"]
    told = subprocess.run(
        [sys.executable, "-m", "privfed.cli.main", *words], capture_output=True, text=True, check=False
    )
    assert told.returncode == 2
    assert "check this machine's clock" in told.stderr
    assert "Traceback" not in told.stderr
