"""Chains of signed messages for tests: ours, and as the network of 2022 wrote them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from kachery_fast.protocol.canonical import canonical_bytes
from kachery_fast.protocol.feeds import Tail, sign_messages, tail_after
from kachery_fast.protocol.names import subfeed_hash
from kachery_fast.protocol.signing import private_key, public_id, sign, sign_2022

KEY = private_key(bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"))
FEED = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
OTHER = private_key(bytes(range(32)))
SUBFEED = subfeed_hash("main")
ELSEWHERE = subfeed_hash("elsewhere")
START = Tail(FEED, SUBFEED)
TIME_MS = 1795175653433
assert public_id(KEY) == FEED


def plain(signed: Sequence[bytes]) -> list[Any]:
    """The messages as they come out of a segment or a band."""
    return [json.loads(message) for message in signed]


def ours(contents: Sequence[dict[str, Any]], tail: Tail = START, key: Any = KEY, time_ms: int = TIME_MS) -> list[bytes]:
    """Signed messages of this program after ``tail``."""
    return sign_messages(tail, contents, key, time_ms)[0]


def of_2022(contents: Sequence[dict[str, Any]], tail: Tail = START, *, meta: Any = None, legacy: bool = False,
            key: Any = KEY) -> list[bytes]:
    """Signed messages of 2022 after ``tail``; ``legacy``: over the canonical JSON, as its oldest programs signed."""
    signed = []
    previous = tail.signature
    for number, content in enumerate(contents, tail.count):
        body: dict[str, Any] = {"message": content, "messageNumber": number, "timestamp": TIME_MS}
        if number:
            body["previousSignature"] = previous
        if meta is not None:
            body["metaData"] = meta
        previous = (sign if legacy else sign_2022)(body, key)
        signed.append(canonical_bytes({"body": body, "signature": previous}))
    return signed


def mixed(old: int, new: int) -> list[bytes]:
    """A feed begun in 2022 and continued by this program."""
    signed = of_2022([{"i": number} for number in range(old)])
    tail = tail_after(FEED, SUBFEED, signed[-1]) if signed else START
    return signed + ours([{"i": number} for number in range(old, old + new)], tail)


def resigned(original: bytes, /, key: Any = KEY, *, form: Any = sign, drop: Sequence[str] = (), **changes: Any) -> Any:
    """The same message with other fields in its body, signed anew: what only the owner, or a liar's own key, can do."""
    body = {**json.loads(original)["body"], **changes}
    for name in drop:
        del body[name]
    return {"body": body, "signature": form(body, key)}
