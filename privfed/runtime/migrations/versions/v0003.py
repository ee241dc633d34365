"""Where the SuperLink that serves is reached by those that pass calls on to it."""

from __future__ import annotations

import sqlalchemy as sql
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the addresses to the table of tenures."""
    op.add_column("tenures", sql.Column("addresses", sql.Text, nullable=False, server_default=""))
