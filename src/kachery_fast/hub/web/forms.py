"""From a form to the request of an action: the fields of the form are those of the struct, in the names of the API."""

from __future__ import annotations

from typing import Any

import msgspec
from multidict import MultiMapping

from ...errors import BadMessage
from ..actions import Request

__all__ = ["read_form"]


def read_form(kind: type[Request], form: MultiMapping[Any]) -> Request:
    """Return the request that a form describes; fields that the struct has not are left out.

    A list is a field that may come several times. Of a check box, which a browser leaves out when it is not checked,
    the form has a hidden field of the same name before it: the last one counts. An empty field is null where it can be.

    :raises BadMessage: a field is missing, or is not what it should be.
    """
    found: dict[str, Any] = {}
    for field in msgspec.structs.fields(kind):
        values = [value for value in form.getall(field.encode_name, []) if isinstance(value, str)]
        info = msgspec.inspect.type_info(field.type)
        if _is_list(info):
            if values or field.required:
                found[field.encode_name] = [value for value in values if value]
        elif values:
            found[field.encode_name] = None if not values[-1].strip() and _takes_null(info) else values[-1].strip()
    try:
        return msgspec.convert(found, kind, strict=False)
    except msgspec.ValidationError as error:
        raise BadMessage(why=str(error)) from None


def _is_list(info: msgspec.inspect.Type) -> bool:
    return isinstance(info, msgspec.inspect.ListType | msgspec.inspect.VarTupleType)


def _takes_null(info: msgspec.inspect.Type) -> bool:
    if isinstance(info, msgspec.inspect.UnionType):
        return any(isinstance(part, msgspec.inspect.NoneType) for part in info.types)
    return isinstance(info, msgspec.inspect.NoneType)
