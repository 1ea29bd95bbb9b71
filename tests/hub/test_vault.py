"""Secrets at rest."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kachery_fast.errors import CredentialsUnreadable
from kachery_fast.hub.vault import Vault

KEY = bytes(range(32))
SECRET = b'{"access_key":"AKIA","secret_key":"very secret"}'


def test_a_secret_comes_back_and_is_sealed_anew_each_time() -> None:
    vault = Vault(KEY)
    first, second = vault.seal("one", "{}", SECRET), vault.seal("one", "{}", SECRET)
    assert first != second
    assert b"secret" not in first
    assert Vault(KEY).open("one", "{}", first, "mine") == SECRET == vault.open("one", "{}", second, "mine")


@pytest.mark.parametrize(("key", "engine", "settings", "change"), [
    (bytes(32), "one", "{}", lambda sealed: sealed),  # another key
    (KEY, "two", "{}", lambda sealed: sealed),  # moved to another row
    (KEY, "one", '{"bucket":"x"}', lambda sealed: sealed),  # the row names another bucket
    (KEY, "one", "{}", lambda sealed: sealed[:-1] + bytes([sealed[-1] ^ 1])),
    (KEY, "one", "{}", lambda sealed: b"\x02" + sealed[1:]),
    (KEY, "one", "{}", lambda sealed: sealed[:10]),
    (KEY, "one", "{}", lambda sealed: b""),
])
def test_what_was_sealed_otherwise_is_refused_with_what_to_do(
    key: bytes, engine: str, settings: str, change: Callable[[bytes], bytes]
) -> None:
    sealed = change(Vault(KEY).seal("one", "{}", SECRET))
    with pytest.raises(CredentialsUnreadable) as refused:
        Vault(key).open(engine, settings, sealed, "mine")
    assert "kachery-fast channel engines --renew mine" in refused.value.message
