"""The description of the API for scripts, made from the table of actions (OpenAPI 3.1).

``POST /api/v1/<action>`` takes the fields of the action's request as one JSON object, and a token as bearer.
"""

from __future__ import annotations

import inspect
from typing import Any

import msgspec

from .._version import __version__
from .actions import Act, Answer

__all__ = ["describe_api"]

_REF = "#/components/schemas/{name}"
_REFUSALS = {
    "400": "The request is malformed, or asks for what cannot be.",
    "401": "The token is missing, wrong or expired.",
    "403": "This is not allowed to whose token it is, or to the token.",
    "404": "There is no such channel, node or account.",
    "409": "There is one already.",
    "413": "The request is too large.",
    "429": "Too many requests; wait as long as it says.",
}


class Failure(Answer):
    """Why a request was refused: ``error`` is the kind, ``message`` is for people."""

    error: str
    message: str
    details: dict[str, Any]


def describe_api(acts: dict[str, Act], url: str) -> dict[str, Any]:
    """Return the OpenAPI document.

    :param acts: the actions by name. :param url: the hub's address.
    """
    requests = [act.request for act in acts.values()]
    types: list[Any] = [*requests, *(act.answer for act in acts.values()), Failure]
    references, components = msgspec.json.schema_components(types, ref_template=_REF)
    for request in requests:
        schema = components[request.__name__]
        # The path says which action it is.
        schema["properties"].pop("type", None)
        schema["required"] = [name for name in schema.get("required", []) if name != "type"]
    by_type = dict(zip(types, references, strict=True))
    return {
        "openapi": "3.1.0",
        "info": {"title": "kachery-fast hub", "version": __version__, "description": inspect.getdoc(
            inspect.getmodule(describe_api)) or ""},
        "servers": [{"url": url}],
        "security": [{"token": []}],
        "paths": {f"/api/v1/{name}": {"post": _operation(act, by_type)} for name, act in acts.items()},
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(act: Act, references: dict[Any, Any]) -> dict[str, Any]:
    text = inspect.getdoc(act.request) or ""
    summary, _, more = text.partition(". ")
    notes = [f"Needs a token with the scope `{act.scope.value}`" + (" of an admin." if act.admin else ".")]
    if act.changes:
        notes.append("It is written into the audit log.")
    return {
        "operationId": act.name,
        "summary": " ".join(summary.split()).rstrip("."),
        "description": " ".join(f"{more} {' '.join(notes)}".split()),
        "tags": [act.scope.value],
        "requestBody": {"required": True, "content": {"application/json": {"schema": references[act.request]}}},
        "responses": {
            "200": {"description": " ".join((inspect.getdoc(act.answer) or "Done.").split()),
                    "content": {"application/json": {"schema": references[act.answer]}}},
            **{status: {"description": why, "content": {"application/json": {"schema": references[Failure]}}}
               for status, why in _REFUSALS.items()}},
    }
