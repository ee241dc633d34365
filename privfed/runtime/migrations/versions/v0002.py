"""Who serves: one SuperLink at a time, for a term."""

from __future__ import annotations

import sqlalchemy as sql
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table of tenures."""
    op.create_table(
        "tenures",
        sql.Column("name", sql.String(40), primary_key=True),
        sql.Column("term", sql.BigInteger, nullable=False),
        sql.Column("session", sql.String(40), nullable=False),
        sql.Column("owner", sql.Text, nullable=False),
        sql.Column("expires", sql.Float, nullable=False),
    )
