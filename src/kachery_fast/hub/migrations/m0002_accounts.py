"""Accounts, sessions, approvals, settings of channels, engines, the audit log, usage, and what several hubs share."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

__all__ = ["down_revision", "revision", "upgrade"]

revision = "0002"
down_revision = "0001"


def _time(name: str, *, nullable: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=nullable)


def _text(name: str, length: int, default: str = "") -> sa.Column[str]:
    return sa.Column(name, sa.String(length), nullable=False, server_default=default)


def _flag(name: str) -> sa.Column[bool]:
    return sa.Column(name, sa.Boolean, nullable=False, server_default=sa.false())


def _count(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=False, server_default="0")


def upgrade() -> None:
    """Go on from 0001."""
    added: dict[str, list[sa.Column[Any]]] = {
        "owners": [_text("name", 200), _flag("admin"), _time("closed", nullable=True), _count("sessions_from")],
        "owner_tokens": [
            _text("name", 100), _text("scope", 200, "all"), sa.Column("channel", sa.String(64)),
            _time("expires", nullable=True), _time("last_used", nullable=True)],
        "channels": [
            _text("description", 1000), _flag("listed"), _flag("private"), _text("inviters", 10, "owner"),
            sa.Column("size_bytes_max", sa.BigInteger), sa.Column("unread_days_max", sa.Integer),
            sa.Column("node_day_bytes_max", sa.BigInteger), sa.Column("bucket", sa.String(32)),
            sa.Column("pubsub", sa.String(32))],
        "nodes": [_time("forgotten", nullable=True)],
    }
    for table, columns in added.items():
        for column in columns:
            op.add_column(table, column)
    # Whoever was owner before there were accounts runs the hub.
    op.execute(sa.update(sa.table("owners", sa.column("admin", sa.Boolean))).values(admin=sa.true()))
    op.create_table(
        "identities", sa.Column("issuer", sa.String(400), primary_key=True),
        sa.Column("subject", sa.String(255), primary_key=True),
        sa.Column("owner", sa.String(254), sa.ForeignKey("owners.id"), nullable=False, index=True), _time("created"))
    op.create_table(
        "sign_in_links", sa.Column("hash", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(254), sa.ForeignKey("owners.id"), nullable=False), _time("created"),
        _time("expires"))
    op.create_table(
        "sessions", sa.Column("hash", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(254), sa.ForeignKey("owners.id"), nullable=False, index=True), _text("agent", 200),
        _time("created"), _time("last_seen"), _time("expires"))
    op.create_table(
        "approvals", sa.Column("code", sa.String(64), primary_key=True),
        sa.Column("node", sa.String(64), nullable=False, unique=True),
        sa.Column("label", sa.String(100), nullable=False), sa.Column("version", sa.String(100), nullable=False),
        _text("channel", 64), _text("requested", 200), _text("address", 50),
        sa.Column("state", sa.String(10), nullable=False), _time("created"), _time("expires"))
    op.create_table(
        "engines", sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("owner", sa.String(254), sa.ForeignKey("owners.id"), nullable=False, index=True),
        sa.Column("kind", sa.String(20), nullable=False), sa.Column("name", sa.String(100), nullable=False),
        sa.Column("settings", sa.Text, nullable=False), sa.Column("secret", sa.LargeBinary), _time("created"))
    op.create_table(
        "bucket_moves",
        sa.Column("channel", sa.String(64), sa.ForeignKey("channels.name"), primary_key=True),
        sa.Column("owner", sa.String(254), nullable=False), sa.Column("source", sa.String(32)),
        sa.Column("target", sa.String(32)), sa.Column("state", sa.String(10), nullable=False),
        sa.Column("after", sa.Text, nullable=False), sa.Column("objects", sa.BigInteger, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False), sa.Column("damaged", sa.BigInteger, nullable=False),
        sa.Column("why", sa.Text, nullable=False), _time("started"), _time("changed"))
    op.create_table(
        "audit", sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("time", sa.BigInteger, nullable=False, index=True),
        sa.Column("owner", sa.String(254), nullable=False, index=True),
        sa.Column("via", sa.String(40), nullable=False), sa.Column("action", sa.String(40), nullable=False),
        sa.Column("channel", sa.String(64), nullable=False, index=True),
        sa.Column("node", sa.String(64), nullable=False), sa.Column("detail", sa.Text, nullable=False))
    op.create_table(
        "usage", sa.Column("channel", sa.String(64), primary_key=True),
        sa.Column("day", sa.Integer, primary_key=True), sa.Column("node", sa.String(64), primary_key=True),
        _count("uploads"), _count("upload_bytes"), _count("downloads"), _count("download_bytes"))
    op.create_table(
        "seen_requests", sa.Column("node", sa.String(64), primary_key=True),
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("time", sa.BigInteger, nullable=False, index=True))
    op.create_table(
        "relayed", sa.Column("hub", sa.String(32), primary_key=True),
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("time", sa.BigInteger, nullable=False, index=True),
        sa.Column("body", sa.LargeBinary, nullable=False))
