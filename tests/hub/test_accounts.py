"""Whose account it is that a provider signs somebody in to; with people as a real provider knows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection

from kachery_fast.errors import (
    AccountTaken,
    ActionRefused,
    AlreadyExists,
    IdentityRefused,
    InvalidArgument,
    InvalidSetting,
    NotOnHub,
)
from kachery_fast.hub import identity
from kachery_fast.hub.accounts import Person, allowed_addresses, connect_identity, owner_of
from kachery_fast.hub.registry import Registry
from kachery_fast.hub.tables import identities, owners
from kachery_fast.net.hub import OwnerClient
from kachery_fast.protocol.names import check_owner_id

from ..network import LOOPS, run_on
from .openid import ACCOUNTS, REDIRECT_URI, browser, running_provider, sign_in
from .support import OWNER, running_world

T = TypeVar("T")
EVERYBODY: frozenset[str] = frozenset()
ISSUER = "https://accounts.example.org"
ANNA = Person(ISSUER, "1", "Anna@lab.org", True, "Anna")


def in_registry(tmp_path: Path, function: Callable[[Connection], T]) -> T:
    """Run ``function`` in one transaction of a registry."""
    async def scenario() -> T:
        registry = Registry(URL.create("sqlite", database=str(tmp_path / "hub.db")))
        await registry.open()
        try:
            return await registry.call(function)
        finally:
            await registry.close()

    return run_on("asyncio-debug", scenario())


# --- as a real provider knows them


@pytest.fixture(scope="module")
def people() -> Iterator[dict[str, Person]]:
    """Everybody of the provider, signed in."""
    async def everybody(issuer: str) -> dict[str, Person]:
        found = {}
        for login in ACCOUNTS:
            hub = sign_in(issuer)
            begun = await hub.begin(REDIRECT_URI)
            async with browser() as one:
                query = await one.go(begun.url, login)
            found[login] = await hub.finish(begun.kept, query, REDIRECT_URI)
        return found

    with running_provider() as issuer:
        yield run_on("asyncio-debug", everybody(issuer))


def test_a_first_sign_in_makes_an_account_and_the_next_ones_find_it(tmp_path: Path, people: dict[str, Person]) -> None:
    def scenario(connection: Connection) -> None:
        assert owner_of(connection, people["anna"], 5, EVERYBODY) == "anna@lab.org"
        row = connection.execute(sa.select(owners)).one()
        assert (row.name, row.admin, row.created, row.closed) == ("Anna A.", False, 5, None)
        # The provider may give her another address, and the old one to somebody else.
        moved = people["anna"]._replace(email="anna@new.org")
        assert owner_of(connection, moved, 6, allowed_addresses("@nobody.org")) == "anna@lab.org"
        assert owner_of(connection, people["ben"], 7, EVERYBODY) == "ben@elsewhere.org"

    in_registry(tmp_path, scenario)


def test_who_comes_with_the_address_of_another_account_is_refused(tmp_path: Path, people: dict[str, Person]) -> None:
    def scenario(connection: Connection) -> None:
        owner_of(connection, people["anna"], 5, EVERYBODY)
        with pytest.raises(AccountTaken, match=r"account 'anna@lab.org' already.*knows you as 'anna-again'"):
            owner_of(connection, people["anna-again"], 6, EVERYBODY)
        assert connection.execute(sa.select(sa.func.count()).select_from(identities)).scalar() == 1

    in_registry(tmp_path, scenario)


def test_an_address_that_is_not_verified_names_nobody(tmp_path: Path, people: dict[str, Person]) -> None:
    def scenario(connection: Connection) -> None:
        pretender, nobody = people["claims-to-be-anna"], people["nobody"]
        found = owner_of(connection, pretender, 5, EVERYBODY)
        assert "@" not in found
        assert found.startswith("127.0.0.1:")
        assert owner_of(connection, pretender, 6, EVERYBODY) == found
        assert owner_of(connection, nobody, 6, EVERYBODY) not in (found, "")
        assert owner_of(connection, people["anna"], 7, EVERYBODY) == "anna@lab.org"
        with pytest.raises(IdentityRefused, match=r"has not verified anna@lab\.org"):
            owner_of(connection, pretender._replace(subject="2"), 8, allowed_addresses("@lab.org"))
        with pytest.raises(IdentityRefused, match="has not verified yours"):
            owner_of(connection, nobody._replace(subject="2"), 8, allowed_addresses("@lab.org"))

    in_registry(tmp_path, scenario)


@pytest.mark.parametrize(("allowed", "login", "may"), [
    ("", "ben", True), ("@lab.org", "anna", True), ("@lab.org", "ben", False), ("ben@elsewhere.org", "ben", True),
    ("ben@elsewhere.org", "anna", False), ("@LAB.org, ben@elsewhere.org", "anna", True), ("@b.org @org", "anna", False),
])
def test_only_whom_the_hub_allows_can_make_an_account(
    tmp_path: Path, people: dict[str, Person], allowed: str, login: str, may: bool
) -> None:
    def scenario(connection: Connection) -> None:
        if may:
            owner_of(connection, people[login], 5, allowed_addresses(allowed))
            return
        with pytest.raises(IdentityRefused, match="may not have an account here"):
            owner_of(connection, people[login], 5, allowed_addresses(allowed))
        assert connection.execute(sa.select(owners)).first() is None

    in_registry(tmp_path, scenario)


def test_a_closed_account_lets_nobody_in(tmp_path: Path, people: dict[str, Person]) -> None:
    def scenario(connection: Connection) -> None:
        owner = owner_of(connection, people["anna"], 5, EVERYBODY)
        connection.execute(owners.update().where(owners.c.id == owner).values(closed=6))
        with pytest.raises(IdentityRefused, match=r"the account 'anna@lab\.org' is closed"):
            owner_of(connection, people["anna"], 7, EVERYBODY)
        with pytest.raises(AccountTaken):  # nor does another identity open it
            owner_of(connection, people["anna-again"], 7, EVERYBODY)

    in_registry(tmp_path, scenario)


# --- connecting


@pytest.mark.parametrize("embedded", ["anna@lab.org", "Anna@Lab.org"])
def test_the_owner_of_the_hub_signs_in_by_the_provider_once_the_two_are_connected(
    tmp_path: Path, embedded: str
) -> None:
    def scenario(connection: Connection) -> None:
        identity.ensure_owner(connection, embedded, 1, admin=True)
        with pytest.raises(AccountTaken, match="ask an admin"):
            owner_of(connection, ANNA, 2, EVERYBODY)
        connect_identity(connection, embedded, ANNA.issuer, ANNA.subject, 3)
        connect_identity(connection, embedded, ANNA.issuer, ANNA.subject, 4)
        assert owner_of(connection, ANNA, 5, allowed_addresses("@nobody.org")) == embedded

    in_registry(tmp_path, scenario)


def test_whom_a_provider_knows_has_one_account(tmp_path: Path) -> None:
    def scenario(connection: Connection) -> None:
        identity.ensure_owner(connection, OWNER, 1)
        owner_of(connection, ANNA, 2, EVERYBODY)
        with pytest.raises(AlreadyExists, match=r"'anna@lab\.org', exists already"):
            connect_identity(connection, OWNER, ANNA.issuer, ANNA.subject, 3)
        with pytest.raises(NotOnHub, match=r"no account 'nobody@lab\.org'"):
            connect_identity(connection, "nobody@lab.org", ANNA.issuer, "2", 3)

    in_registry(tmp_path, scenario)


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_admins_connect_an_identity_and_others_do_not(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path, channel=False) as world:
            wanted: dict[str, Any] = {"owner": OWNER, "issuer": ISSUER, "subject": "1"}
            assert await world.owner.call("connectIdentity", **wanted) == wanted
            with pytest.raises(InvalidArgument, match="1 to 255"):
                await world.owner.call("connectIdentity", **{**wanted, "subject": "1" * 256})
            registry = world.registry()
            await registry.open()
            try:
                assert await registry.call(owner_of, ANNA, 5, EVERYBODY) == OWNER
                ben = await registry.call(owner_of, ANNA._replace(subject="2", email="ben@lab.org"), 5, EVERYBODY)
                token = await registry.call(identity.issue_owner_token, ben, 5)
            finally:
                await registry.close()
            other = OwnerClient(world.url, token, world.settings, session=world.session)
            with pytest.raises(ActionRefused, match="for the hub's admins"):
                await other.call("connectIdentity", **{**wanted, "subject": "3"})

    run_on(loop_kind, scenario())


# --- names


@pytest.mark.parametrize(("one", "other"), [
    ({"subject": "1"}, {"subject": "2"}),
    ({"issuer": "https://keys.example.org/a"}, {"issuer": "https://keys.example.org/b"}),
    ({"subject": "a"}, {"subject": "A"}),
])
def test_two_people_without_a_verified_address_have_two_names(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any]
) -> None:
    def scenario(connection: Connection) -> None:
        unverified = ANNA._replace(email_verified=False)
        assert owner_of(connection, unverified._replace(**one), 5, EVERYBODY) \
            != owner_of(connection, unverified._replace(**other), 5, EVERYBODY)

    in_registry(tmp_path, scenario)


@pytest.mark.parametrize("email", [
    "anna@lаb.org",  # with a Cyrillic letter
    "\"anna\"@lab.org", "o'neill@lab.org", "anna", "anna@", "@lab.org", "a:b@lab.org", "a b@lab.org", "<b>@lab.org",
    "anna@lab.org@other.org", "anna@[127.0.0.1]", "../anna@lab.org", "",
])
def test_an_address_that_can_be_mistaken_names_nobody(tmp_path: Path, email: str) -> None:
    def scenario(connection: Connection) -> None:
        found = owner_of(connection, ANNA._replace(email=email), 5, EVERYBODY)
        assert check_owner_id(found).startswith("accounts.example.org:")

    in_registry(tmp_path, scenario)


@pytest.mark.parametrize("text", ["lab.org", "anna@", "@", "a@b@c", "@lab.org anna"])
def test_a_list_of_addresses_with_something_else_in_it_is_refused(text: str) -> None:
    with pytest.raises(InvalidSetting, match=r"hub_oidc_allowed.*write an e-mail address, or @example.org"):
        allowed_addresses(text)
