"""The tables of 0.1.0, and the claims on tasks that were added to them before there were migrations."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

__all__ = ["down_revision", "revision", "upgrade"]

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make what is not there; a registry of 0.1.0 has most of it."""
    there = set(sa.inspect(op.get_bind()).get_table_names())
    tables = sa.MetaData()

    def table(name: str, *columns: sa.schema.SchemaItem) -> None:
        made = sa.Table(name, tables, *columns)
        if name not in there:
            made.create(op.get_bind())

    table("owners", sa.Column("id", sa.String(254), primary_key=True),
          sa.Column("created", sa.BigInteger, nullable=False))
    table("owner_tokens", sa.Column("hash", sa.String(64), primary_key=True),
          sa.Column("owner", sa.ForeignKey("owners.id"), nullable=False),
          sa.Column("created", sa.BigInteger, nullable=False))
    table("nodes", sa.Column("id", sa.String(64), primary_key=True),
          sa.Column("owner", sa.ForeignKey("owners.id"), nullable=False),
          sa.Column("label", sa.String(100), nullable=False), sa.Column("version", sa.String(100), nullable=False),
          sa.Column("created", sa.BigInteger, nullable=False), sa.Column("last_seen", sa.BigInteger, nullable=False))
    table("channels", sa.Column("name", sa.String(64), primary_key=True),
          sa.Column("folded", sa.String(64), nullable=False, unique=True),
          sa.Column("owner", sa.ForeignKey("owners.id"), nullable=False),
          sa.Column("created", sa.BigInteger, nullable=False))
    table("memberships", sa.Column("channel", sa.ForeignKey("channels.name"), primary_key=True),
          sa.Column("node", sa.ForeignKey("nodes.id"), primary_key=True),
          sa.Column("owner", sa.ForeignKey("owners.id"), primary_key=True),
          sa.Column("requested", sa.String(200), nullable=False), sa.Column("granted", sa.String(200), nullable=False),
          sa.Column("state", sa.String(10), nullable=False), sa.Column("invitation", sa.String(64), nullable=False),
          sa.Column("created", sa.BigInteger, nullable=False), sa.Column("decided", sa.BigInteger, nullable=False),
          sa.Index("memberships_by_node", "node"))
    table("invitations", sa.Column("hash", sa.String(64), primary_key=True),
          sa.Column("channel", sa.ForeignKey("channels.name"), nullable=False, index=True),
          sa.Column("node_owner", sa.ForeignKey("owners.id"), nullable=False),
          sa.Column("permissions", sa.String(200), nullable=False), sa.Column("uses_left", sa.Integer),
          sa.Column("expires", sa.BigInteger, nullable=False), sa.Column("created", sa.BigInteger, nullable=False))
    table("damage_reports", sa.Column("id", sa.Integer, primary_key=True),
          sa.Column("channel", sa.String(64), nullable=False, index=True),
          sa.Column("node", sa.String(64), nullable=False), sa.Column("sha1", sa.String(40), nullable=False),
          sa.Column("found", sa.String(40), nullable=False), sa.Column("actual", sa.String(40)),
          sa.Column("time", sa.BigInteger, nullable=False))
    table("task_claims", sa.Column("channel", sa.ForeignKey("channels.name"), primary_key=True),
          sa.Column("task", sa.String(64), primary_key=True), sa.Column("kind", sa.String(20), nullable=False),
          sa.Column("function", sa.String(200), nullable=False), sa.Column("node", sa.String(64), nullable=False),
          sa.Column("attempt", sa.String(64), nullable=False), sa.Column("idempotent", sa.Boolean, nullable=False),
          sa.Column("state", sa.String(10), nullable=False), sa.Column("claimed", sa.BigInteger, nullable=False),
          sa.Column("expires", sa.BigInteger, nullable=False), sa.Column("receipt", sa.Text),
          sa.Column("changed", sa.BigInteger, nullable=False, index=True),
          sa.Column("revision", sa.Integer, nullable=False))
    # Programs from before there were migrations refuse a registry whose version is not theirs.
    table("schema_version", sa.Column("version", sa.Integer, primary_key=True))
    op.execute("DELETE FROM schema_version")
    op.execute("INSERT INTO schema_version VALUES (3)")
