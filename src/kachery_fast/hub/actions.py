"""What an action of a person at a hub is made of.

An action is a request struct (its docstring and fields are its documentation), the struct of its answer, the scope that
a token needs for it, and a function that performs it in one transaction of the registry. The website, scripts and the
command line use the same ones. The tables of them are in ``channel_actions``, ``node_actions`` and ``account_actions``;
``performing`` is the only way to them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Any, NamedTuple

import msgspec
from sqlalchemy.engine import Connection

from .buckets import Buckets, EngineRow
from .pubsubs import Pubsubs
from .usage import Usage
from .vault import Vault

__all__ = ["Act", "Actor", "Answer", "At", "Done", "Outside", "Request", "Scope"]


class Scope(str, Enum):
    """What a token can be for. Each opens its actions and no others."""

    READ = "read"
    GRANT = "grant"
    MANAGE = "manage"
    ACCOUNT = "account"


class Request(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", rename="camel", kw_only=True):
    """What is asked for. Unknown fields are refused, so that a misspelt permission never passes as granted."""


class Answer(msgspec.Struct, rename="camel", kw_only=True):
    """What comes back."""


class Actor(NamedTuple):
    """Who acts, as was found out before.

    ``via``: "web", or "token " and the beginning of its hash. ``channel``: the only one that the token is for.
    """

    owner: str
    via: str
    scopes: frozenset[Scope] = frozenset(Scope)
    channel: str | None = None


class At(NamedTuple):
    """When and where: the time in ms since the epoch, the hub's address as other machines know it, and what keeps
    secrets."""

    now_ms: int
    hub_url: str
    vault: Vault


class Outside(NamedTuple):
    """What is not in the registry."""

    buckets: Buckets
    pubsubs: Pubsubs
    usage: Usage
    try_channel: Callable[[str, str, EngineRow | None, EngineRow | None], Awaitable[Answer]]
    wake_mover: Callable[[], None]
    tell_nodes: Callable[..., None]  # as Teller.tell


class Done(NamedTuple):
    """What an action's transaction came to: the answer, or a second step, done outside once the transaction is over,
    that returns the answer.

    ``cut``: nodes whose connections end, before the second step, at the pub/sub service that the channel named in the
    request had before; ``left``: where it names none, the channels. ``node``: the id of the node that it was about, for
    the audit log, where the request names it in another way. ``channels_changed``: a channel came, went, or
    may have become public or private.
    """

    answer: Answer | Callable[[Outside], Awaitable[Answer]]
    cut: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    node: str = ""
    channels_changed: bool = False


class Act(NamedTuple):
    """An action.

    ``first``: awaited before the transaction; raises where the request cannot be. ``perform``: runs within a
    transaction, perhaps more than once. ``changes``: whether it goes into the audit log. ``admin``: whether only admins
    may. ``by_code``: it is about what a short code stands for, so that guesses at codes are counted.
    """

    request: type[Request]
    answer: type[Answer]
    scope: Scope
    perform: Callable[[Connection, Actor, Any, At], Done]
    changes: bool = True
    admin: bool = False
    by_code: bool = False
    first: Callable[[Any, Outside], Awaitable[None]] | None = None

    @property
    def name(self) -> str:
        """The name in addresses and in the field ``type``."""
        return str(self.request.__struct_config__.tag)
