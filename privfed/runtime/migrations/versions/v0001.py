"""The first tables."""

from __future__ import annotations

import sqlalchemy as sql
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "facts",
        sql.Column("name", sql.String(40), primary_key=True),
        sql.Column("value", sql.Text, nullable=False),
    )
    op.create_table(
        "runs",
        sql.Column("run_id", sql.BigInteger, primary_key=True, autoincrement=False),
        sql.Column("state", sql.String(16), nullable=False),
        sql.Column("reason", sql.Text, nullable=False),
    )
    op.create_table(
        "nodes",
        sql.Column("run_id", sql.BigInteger, primary_key=True),
        sql.Column("node_id", sql.BigInteger, primary_key=True),
    )
    _tasks()
    op.create_table(
        "counted",
        sql.Column("token", sql.String(32), primary_key=True),
        sql.Column("run_id", sql.BigInteger, nullable=False, index=True),
        sql.Column("node_id", sql.BigInteger, nullable=False),
        sql.Column("message_id", sql.Text, nullable=False),
    )
    op.create_table(
        "states",
        sql.Column("run_id", sql.BigInteger, primary_key=True),
        sql.Column("node_id", sql.BigInteger, primary_key=True),
        sql.Column("envelope", sql.LargeBinary, nullable=False),
    )
    op.create_table(
        "buffers",
        sql.Column("digest", sql.LargeBinary(32), primary_key=True),
        sql.Column("data", sql.LargeBinary, nullable=False),
    )
    op.create_table(
        "holds",
        sql.Column("holder", sql.Text, primary_key=True),
        sql.Column("digest", sql.LargeBinary(32), primary_key=True, index=True),
    )


def _tasks() -> None:
    op.create_table(
        "tasks",
        sql.Column("id", sql.BigInteger().with_variant(sql.Integer, "sqlite"), primary_key=True, autoincrement=True),
        sql.Column("run_id", sql.BigInteger, nullable=False),
        sql.Column("node_id", sql.BigInteger, nullable=False),
        sql.Column("message_id", sql.Text, nullable=False, index=True),
        sql.Column("envelope", sql.LargeBinary, nullable=False),
        sql.Column("expires_at", sql.Float, nullable=False, index=True),
        sql.Column("token", sql.String(32), index=True),
        sql.Column("lease_until", sql.Float),
        sql.Column("withdrawn", sql.Boolean, nullable=False),
        sql.Column("reply", sql.LargeBinary),
    )
    op.create_index("tasks_of_node", "tasks", ["run_id", "node_id"])
