"""Replies that come together are committed together; each caller hears what came of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sql

from privfed import ConfigRecord, Message, RecordDict
from privfed.runtime.federation_link import FederationLink
from privfed.runtime.sqlstore import SqlStore
from privfed.runtime.store import Lease, NodeState
from privfed.wire import MAX_TEXT
from proofs_tests.runtime.store_case import RUN, instruction

NODES = 6


class Noting(SqlStore):
    """A store that notes how many replies each commit brought. broken: no commit succeeds."""

    batches: list[int]
    broken = False

    def complete_many(self, done: Sequence[tuple[str, Message, NodeState | None]]) -> list[str | None]:
        self.batches.append(len(done))
        if self.broken:
            raise sql.exc.OperationalError("COMMIT", None, Exception("the disk is gone"))
        return super().complete_many(done)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Noting]:
    found = Noting(tmp_path)
    found.batches = []
    yield found
    found.close()


def handed_out(link: FederationLink) -> list[Lease]:
    link.create_run(RUN, range(1, NODES + 1))
    link.set_run_state(RUN, "running")
    link.push(RUN, [instruction(node) for node in range(1, NODES + 1)])
    leases = link.lease_for(range(1, NODES + 1))
    assert {lease.message.metadata.dst_node_id for lease in leases} == set(range(1, NODES + 1))
    assert link.lease_for(range(1, NODES + 1)) == []
    return list(leases)


def counted_at_once(link: FederationLink, replies: Sequence[tuple[str, Message]]) -> list[Future[bool]]:
    """Count replies that all came while something else was under way."""
    with ThreadPoolExecutor(len(replies)) as pool, link._lock:
        futures = [pool.submit(link.count, token, RUN, reply) for token, reply in replies]
        deadline = time.monotonic() + 60
        while len(link._arrived) < len(replies):
            assert time.monotonic() < deadline
            time.sleep(0.001)
    return futures


def reply_to(lease: Lease, text: str = "") -> Message:
    return Message(RecordDict({"c": ConfigRecord({"text": text})}), reply_to=lease.message)


def test_replies_that_come_together_are_one_commit(store: Noting) -> None:
    link = FederationLink(store)
    leases = handed_out(link)
    # One is sent twice, and one was never asked for.
    given = [(lease.token, reply_to(lease)) for lease in (*leases, leases[0])] + [("x" * 32, reply_to(leases[0]))]
    found = [future.result() for future in counted_at_once(link, given)]
    assert found == [True] * (NODES + 1) + [False]
    assert store.batches == [len(given)]
    assert len(link.pull(RUN, [lease.message.metadata.message_id for lease in leases])) == NODES
    assert link.count(*given[0][:1], RUN, given[0][1]), "it counted before"


def test_a_reply_that_cannot_be_kept_does_not_take_others_with_it(store: Noting) -> None:
    link = FederationLink(store)
    leases = handed_out(link)
    given = [(lease.token, reply_to(lease)) for lease in leases]
    given[2] = (leases[2].token, reply_to(leases[2], "a" * (MAX_TEXT + 1)))
    futures = counted_at_once(link, given)
    with pytest.raises(ValueError, match="cannot travel"):
        futures[2].result()
    assert all(future.result() for at, future in enumerate(futures) if at != 2)
    assert store.batches == [NODES] + [1] * NODES
    assert link.count(leases[2].token, RUN, reply_to(leases[2]))


def test_everybody_hears_that_the_storage_refuses_and_may_come_again(store: Noting) -> None:
    link = FederationLink(store)
    leases = handed_out(link)
    given = [(lease.token, reply_to(lease)) for lease in leases]
    store.broken = True
    for future in counted_at_once(link, given):
        with pytest.raises(sql.exc.OperationalError):
            future.result()
    assert "the disk is gone" in link.trouble
    store.broken = False
    assert all(future.result() for future in counted_at_once(link, given))
    assert link.trouble == ""
