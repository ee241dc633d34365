"""A node's own memory, on its disk: what apps keep between messages, and every reply before it is sent.

For each run and node there are three things. What the *app* and its mods keep; what the *node's own* mods keep; and the
*answers* given. An answer and the state that goes with it are committed in one transaction before the answer is sent,
so a crash at any moment loses neither, and a message that comes again gets the stored answer and never runs twice.

The app's state can go back: a reply that the SuperLink did not count takes its state with it, and a run that goes on
from an earlier round goes on from what the app kept then. The state of the node's mods never goes back. It says which
masks were used, which sums were opened and what privacy was spent, and a server that could make a node forget that by
claiming a crash could open a second sum.
"""

from __future__ import annotations

import fcntl
import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from privfed import wire
from privfed.message import Message
from privfed.record import RecordDict
from privfed.runtime.node_blob import BlobDatabase, NodeStoreError
from privfed.runtime.store import NodeState, pack_states, unpack_states

FORMAT = "1"
KEPT_COMMITS = 4
"""How many rounds a run may go back."""
_TABLES = """
CREATE TABLE IF NOT EXISTS nodes (
  run TEXT NOT NULL, node TEXT NOT NULL, attempt INTEGER NOT NULL, round INTEGER NOT NULL, pruned INTEGER NOT NULL,
  app INTEGER, mods INTEGER, ended REAL, PRIMARY KEY (run, node));
CREATE TABLE IF NOT EXISTS marks (
  run TEXT NOT NULL, node TEXT NOT NULL, round INTEGER NOT NULL, app INTEGER, PRIMARY KEY (run, node, round));
CREATE TABLE IF NOT EXISTS answers (
  run TEXT NOT NULL, node TEXT NOT NULL, message TEXT NOT NULL, asked BLOB NOT NULL, token TEXT NOT NULL,
  status TEXT NOT NULL, reply INTEGER, other INTEGER, changed INTEGER NOT NULL, PRIMARY KEY (run, node, message));
CREATE TABLE IF NOT EXISTS forgotten (run TEXT PRIMARY KEY);
"""
_REFERENCES = (
    "SELECT 1 FROM nodes WHERE app = ? LIMIT 1",
    "SELECT 1 FROM nodes WHERE mods = ? LIMIT 1",
    "SELECT 1 FROM marks WHERE app = ? LIMIT 1",
    "SELECT 1 FROM answers WHERE reply = ? LIMIT 1",
    "SELECT 1 FROM answers WHERE other = ? LIMIT 1",
)
_PENDING, _COUNTED, _LOST = "pending", "counted", "lost"


class MessageReused(NodeStoreError):
    """A message comes with the id of another one that was answered."""


class ReplyGone(NodeStoreError):
    """A message was answered so long ago that its reply is not kept any more."""


class StateGone(NodeStoreError):
    """A run goes back further than the node remembers, or comes back after it was forgotten."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a node keeps of one run. app: the app's records and its mods'. mods: the node's own mods'."""

    app: NodeState = field(default_factory=NodeState)
    mods: dict[str, RecordDict] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Unsent:
    """An answer that the SuperLink has not taken or refused yet."""

    run_id: int
    node_id: int
    message_id: str
    token: str


class NodeStore:
    """The memory of the nodes of one process, in a folder of mode 0700; safe for threads."""

    def __init__(self, folder: str | Path) -> None:
        """Open the folder, or make it. Raises NodeStoreError when another process has it, or its format is another."""
        folder = Path(folder)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._held = (folder / "lock").open("w")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._held.close()
            raise NodeStoreError(f"another process has {folder}: one node, one folder") from None
        try:
            self._blobs = BlobDatabase(folder, _TABLES, _REFERENCES, FORMAT)
        except BaseException:
            self._held.close()
            raise
        self._lock = threading.Lock()

    def begin(self, message: Message, token: str, began: Sequence[int] = (0,), commit: int = 0) -> Message | Kept:
        """Take up a message: return the answer it was given before, or what the node keeps, for answering it.

        token: the lease under which it came, and an answer is sent. began: the last committed round when each attempt
        of the run began, in order; what the app kept since one that it had not seen began is undone. commit: the last
        committed round now. Raises MessageReused, ReplyGone, StateGone.
        """
        run, node, _ = _here(message)
        with self._lock, self._blobs.transaction("begin") as database:
            here = _here(message)
            row = database.execute(
                "SELECT asked, reply FROM answers WHERE run = ? AND node = ? AND message = ?", here
            ).fetchone()
            if row is not None:
                if row[0] != _digest(message):
                    raise MessageReused(f"message {here[2]} was answered, and now asks for something else")
                if row[1] is None:
                    raise ReplyGone(f"message {here[2]} was answered, and later messages were since")
                database.execute(
                    "UPDATE answers SET token = ? WHERE run = ? AND node = ? AND message = ?", (token, *here)
                )
                return self._blobs.message(row[1])
            app, mods = self._stand(run, node, began, commit)
            states = unpack_states(self._blobs.records(app)), unpack_states(self._blobs.records(mods))
            return Kept(states[0].get(0, NodeState()), states[1].get(0, NodeState()).mods)

    def _stand(self, run: str, node: str, began: Sequence[int], commit: int) -> tuple[int | None, int | None]:
        """Note where the run stands; return the blobs of the app's state to go on from, and of the mods'."""
        database, attempt = self._blobs.database, len(began)
        row = database.execute(
            "SELECT attempt, round, pruned, app, mods FROM nodes WHERE run = ? AND node = ?", (run, node)
        ).fetchone()
        if row is None:
            # Who let a run id live twice would have its opened sums and used masks opened and used again.
            if database.execute("SELECT 1 FROM forgotten WHERE run = ?", (run,)).fetchone() is not None:
                raise StateGone(f"run {run} ended and what the node kept of it is gone: start a new run")
            database.execute(
                "INSERT INTO nodes VALUES (?, ?, ?, ?, -1, NULL, NULL, NULL)", (run, node, attempt, commit)
            )
            database.execute("INSERT INTO marks VALUES (?, ?, ?, NULL)", (run, node, commit))
            return None, None
        before, round_, pruned, app, mods = row
        if attempt > before:
            back = min(began[before:])
            if back <= round_:
                app = self._go_back(run, node, back, pruned, app)
                round_ = back
        if commit > round_:
            database.execute("INSERT INTO marks VALUES (?, ?, ?, ?)", (run, node, commit, app))
            round_ = commit
        pruned = self._prune(run, node, pruned)
        database.execute(
            "UPDATE nodes SET attempt = ?, round = ?, pruned = ?, app = ?, ended = NULL WHERE run = ? AND node = ?",
            (max(attempt, before), round_, pruned, app, run, node),
        )
        self._blobs.release(row[3])
        return app, mods

    def _go_back(self, run: str, node: str, commit: int, pruned: int, app: int | None) -> int | None:
        database, here = self._blobs.database, (run, node, commit)
        if pruned >= commit:
            raise StateGone(f"run {run} goes back to round {commit}, the node remembers those after {pruned}")
        marks = database.execute(
            "SELECT round, app FROM marks WHERE run = ? AND node = ? AND round >= ? ORDER BY round", here
        ).fetchall()
        found: int | None = marks[0][1] if marks else app
        database.execute("DELETE FROM marks WHERE run = ? AND node = ? AND round >= ?", here)
        database.execute("INSERT INTO marks VALUES (?, ?, ?, ?)", (*here, found))
        # What was answered since belongs to a round that is done again: it does not come back.
        undone = database.execute(
            "SELECT other FROM answers WHERE run = ? AND node = ? AND other IS NOT NULL", (run, node)
        ).fetchall()
        database.execute("UPDATE answers SET other = NULL, changed = 0 WHERE run = ? AND node = ?", (run, node))
        self._blobs.release(*(blob for _, blob in marks), *(blob for (blob,) in undone))
        return found

    def _prune(self, run: str, node: str, pruned: int) -> int:
        database = self._blobs.database
        marks = "SELECT round, app FROM marks WHERE run = ? AND node = ? ORDER BY round DESC LIMIT -1 OFFSET ?"
        rows = database.execute(marks, (run, node, KEPT_COMMITS)).fetchall()
        for round_, blob in rows:
            database.execute("DELETE FROM marks WHERE run = ? AND node = ? AND round = ?", (run, node, round_))
            self._blobs.release(blob)
            pruned = max(pruned, round_)
        return pruned

    def commit(self, message: Message, token: str, reply: Message, kept: Kept | None) -> None:
        """Keep an answer and the state that goes with it (None: unchanged), before it is sent; both or neither."""
        run, node, _ = _here(message)
        with self._lock, self._blobs.transaction("commit") as database:
            app, mods = database.execute(
                "SELECT app, mods FROM nodes WHERE run = ? AND node = ?", (run, node)
            ).fetchone()
            self._retire(run, node)
            answer = (*_here(message), _digest(message), token, _PENDING, self._blobs.put(reply), app, kept is not None)
            database.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", answer)
            if kept is not None:
                self._blobs_of(run, node, kept)
                self._blobs.release(app, mods)

    def _blobs_of(self, run: str, node: str, kept: Kept) -> None:
        packed = pack_states({0: kept.app}), pack_states({0: NodeState(mods=kept.mods)})
        app, mods = (self._blobs.put(records) if records else None for records in packed)
        self._blobs.database.execute(
            "UPDATE nodes SET app = ?, mods = ? WHERE run = ? AND node = ?", (app, mods, run, node)
        )

    def _retire(self, run: str, node: str) -> None:
        """Of the answers before the newest keep only that they were given; of one that is not settled, what to send.

        The state that went with that one stays, whatever comes of it: the newest was answered with it.
        """
        database = self._blobs.database
        old = database.execute(
            "SELECT reply, other, status FROM answers WHERE run = ? AND node = ? AND reply IS NOT NULL", (run, node)
        ).fetchall()
        database.execute(
            "UPDATE answers SET other = NULL, changed = 0, reply = CASE status WHEN ? THEN reply END "
            "WHERE run = ? AND node = ? AND reply IS NOT NULL",
            (_PENDING, run, node),
        )
        self._blobs.release(*(other for _, other, _ in old), *(reply for reply, _, was in old if was != _PENDING))

    def settle(self, answer: Unsent, counted: bool) -> None:
        """Note whether the SuperLink counted an answer; if not, the app's state goes back."""
        run, node, _ = here = (str(answer.run_id), str(answer.node_id), answer.message_id)
        with self._lock, self._blobs.transaction("settle") as database:
            row = database.execute(
                "SELECT status, other, changed FROM answers WHERE run = ? AND node = ? AND message = ?", here
            ).fetchone()
            if row is None:
                return
            status, other, changed = row
            after = _COUNTED if counted else _LOST
            swap = changed and (counted if status == _LOST else not counted and status == _PENDING)
            if swap:
                (now,) = database.execute("SELECT app FROM nodes WHERE run = ? AND node = ?", (run, node)).fetchone()
                database.execute("UPDATE nodes SET app = ? WHERE run = ? AND node = ?", (other, run, node))
                other = now
            left = None if counted else other
            database.execute(
                "UPDATE answers SET status = ?, other = ?, changed = ? WHERE run = ? AND node = ? AND message = ?",
                (after, left, 0 if counted else changed, *here),
            )
            self._blobs.release(row[1], other)

    def unsent(self) -> list[Unsent]:
        """Return the answers in runs that go on of which it is not known whether they were counted, oldest first."""
        with self._lock, self._blobs.transaction() as database:
            rows = database.execute(
                "SELECT run, node, message, token FROM answers JOIN nodes USING (run, node) "
                "WHERE status = ? AND ended IS NULL ORDER BY answers.rowid",
                (_PENDING,),
            ).fetchall()
        return [Unsent(int(run), int(node), message, token) for run, node, message, token in rows]

    def answer(self, unsent: Unsent) -> Message:
        """Return the answer to send again."""
        here = (str(unsent.run_id), str(unsent.node_id), unsent.message_id)
        with self._lock, self._blobs.transaction() as database:
            row = database.execute(
                "SELECT reply FROM answers WHERE run = ? AND node = ? AND message = ?", here
            ).fetchone()
            if row is None or row[0] is None:
                raise ReplyGone(f"there is no answer to message {unsent.message_id}")
            return self._blobs.message(row[0])

    def runs(self) -> list[int]:
        """Return the runs that are not known to have ended, ascending."""
        with self._lock, self._blobs.transaction() as database:
            rows = database.execute("SELECT DISTINCT run FROM nodes WHERE ended IS NULL").fetchall()
        return sorted(int(run) for (run,) in rows)

    def end(self, run_id: int, now: float) -> None:
        """Note that a run ended. It may be resumed, so what is kept of it goes later, by `evict`."""
        with self._lock, self._blobs.transaction("end") as database:
            database.execute("UPDATE nodes SET ended = ? WHERE run = ? AND ended IS NULL", (now, str(run_id)))

    def evict(self, before: float) -> list[int]:
        """Forget the runs that ended before a time (seconds since the epoch), all but their ids; return them."""
        with self._lock, self._blobs.transaction("evict") as database:
            runs = [run for (run,) in database.execute("SELECT DISTINCT run FROM nodes WHERE ended < ?", (before,))]
            for run in runs:
                blobs = database.execute("SELECT app, mods FROM nodes WHERE run = ?", (run,)).fetchall()
                blobs += database.execute("SELECT app, NULL FROM marks WHERE run = ?", (run,)).fetchall()
                blobs += database.execute("SELECT reply, other FROM answers WHERE run = ?", (run,)).fetchall()
                database.execute("INSERT OR IGNORE INTO forgotten VALUES (?)", (run,))
                database.execute("DELETE FROM nodes WHERE run = ?", (run,))
                database.execute("DELETE FROM marks WHERE run = ?", (run,))
                database.execute("DELETE FROM answers WHERE run = ?", (run,))
                self._blobs.release(*(blob for row in blobs for blob in row))
        return sorted(map(int, runs))

    def close(self) -> None:
        """Let go of the files."""
        with self._lock:
            self._blobs.close()
            self._held.close()


def _here(message: Message) -> tuple[str, str, str]:
    # Ids are unsigned 64-bit numbers, and SQLite's are signed.
    return str(message.metadata.run_id), str(message.metadata.dst_node_id), message.metadata.message_id


def _digest(message: Message) -> bytes:
    """Return a hash of what a message asks; how and when it travels does not matter."""
    data = message.metadata
    told = f"{data.message_type}\n{data.group_id}\n{data.src_node_id}\n".encode()
    return hashlib.sha256(told + wire.encode(message.content)[0]).digest()
