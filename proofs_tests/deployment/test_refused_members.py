"""Members that are refused, and send what they are not asked for, cost little of a SuperLink's memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from privfed.runtime.authority import Authority
from privfed.runtime.frame import MAX_FRAME
from privfed.runtime.handshake import greeting
from proofs_tests.deployment.hostile_wire import resident_kib
from proofs_tests.deployment.kill_federation import member
from proofs_tests.deployment.superlink_process import SuperLinkProcess

CONNECTIONS, CALLS = 150, 4
MOST_KIB = 64 * 1024


@pytest.mark.long
def test_a_crowd_of_members_of_another_role_takes_little_memory(tmp_path: Path) -> None:
    """Each could fill a window of a megabyte while its call was judged: 200 of them took 230 MiB."""
    authority = Authority.create(tmp_path / "authority", "crowded")
    keys = member(authority, tmp_path / "link", "link", "main").folder
    viewer = member(authority, tmp_path / "viewer", "viewer", "vera").channel_credentials()
    link = SuperLinkProcess(tmp_path / "home", keys=keys)
    own = [("grpc.use_local_subchannel_pool", 1)]
    with link:
        channels = [grpc.secure_channel(link.fleet, viewer, own) for _ in range(CONNECTIONS)]

        def refused(channel: grpc.Channel) -> set[grpc.StatusCode]:
            method = channel.unary_unary("/privfed.Fleet/Answer")
            calls = [method.future(bytes(MAX_FRAME), metadata=greeting(), timeout=60) for _ in range(CALLS)]
            return {call.exception().code() for call in calls}

        before = resident_kib(link.pid)
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            codes = set().union(*pool.map(refused, channels))
        grown = resident_kib(link.pid) - before
        for channel in channels:
            channel.close()
        assert codes == {grpc.StatusCode.PERMISSION_DENIED}
        assert grown <= MOST_KIB, f"{grown / 1024:.0f} MiB"
        assert link.end() == 0
