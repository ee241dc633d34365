"""Indexes of tasks by where they stand; the database itself sees that a node has one task out at most."""

from __future__ import annotations

import sqlalchemy as sql
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None
_OPEN, _OUT = "reply IS NULL", "token IS NOT NULL"
_UNIQUE = ("tasks_out", "tasks_token")
_INDEXES = (  # name, condition, columns
    ("tasks_queued", "reply IS NULL AND token IS NULL", ["id"]),
    ("tasks_open", _OPEN, ["node_id", "run_id", "id"]),
    ("tasks_expiring", _OPEN, ["expires_at"]),
    ("tasks_out", _OUT, ["node_id", "run_id"]),
    ("tasks_token", _OUT, ["token"]),
    ("tasks_lapsing", _OUT, ["lease_until"]),
    ("tasks_done", "reply IS NOT NULL", ["run_id"]),
)


def upgrade() -> None:
    """Replace the indexes."""
    for name in ("ix_tasks_message_id", "ix_tasks_expires_at", "ix_tasks_token", "tasks_of_node"):
        op.drop_index(name, "tasks")
    op.create_index("tasks_of_run", "tasks", ["run_id", "message_id"])
    for name, condition, columns in _INDEXES:
        where = sql.text(condition)
        op.create_index(name, "tasks", columns, unique=name in _UNIQUE, sqlite_where=where, postgresql_where=where)
