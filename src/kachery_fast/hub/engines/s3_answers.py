"""What stores that speak S3 answer when they refuse, and what to do about it."""

from __future__ import annotations

import re

from ..outbound import Reply, shown

__all__ = ["advice_for", "code_of", "refusal_of"]

_CODE = re.compile(rb"<Code>\s*([A-Za-z0-9.]{1,64})\s*</Code>")
_MESSAGE = re.compile(rb"<Message>([^<]{1,1000})</Message>")

_ADVICE = {
    "NoSuchBucket": "Make the bucket, or correct its name.",
    "AccessDenied": "Let these credentials put, get, delete and list objects there (s3:PutObject, s3:GetObject, "
                    "s3:DeleteObject on its objects, s3:ListBucket on the bucket).",
    "AllAccessDisabled": "Make another bucket.",
    "InvalidAccessKeyId": "The access key is not known there: give the credentials anew.",
    "SignatureDoesNotMatch": "The secret does not belong to the access key, or something on the way changes requests: "
                             "give the credentials anew.",
    "AuthorizationHeaderMalformed": "The region is another one: correct it.",
    "AuthorizationQueryParametersError": "The region is another one: correct it.",
    "PermanentRedirect": "The bucket is in another region, or at another address: correct them.",
    "TemporaryRedirect": "The bucket was made just now, or is in another region: correct the region, or wait.",
    "RequestTimeTooSkewed": "The clock of the hub's machine, or of the store, is wrong: set it.",
    "RequestExpired": "The clock of the hub's machine, or of the store, is wrong: set it.",
    "SlowDown": "The store asks for fewer requests: try again later.",
    "NotImplemented": "The store does not know If-None-Match: say so with --no-create-only.",
    "QuotaExceeded": "Make room in the store.",
}


def refusal_of(reply: Reply) -> str:
    """What a store answered, as it may be shown."""
    message = _MESSAGE.search(reply.body)
    code = code_of(reply)
    said = ": ".join(part for part in (code, shown(message[1]) if message else "") if part)
    return f"HTTP {reply.status}{f', {said}' if said else ''}"


def advice_for(reply: Reply) -> str:
    """What to do about such an answer."""
    code = code_of(reply)
    if code in _ADVICE:
        return _ADVICE[code]
    if reply.status in (301, 302, 307, 308):
        return _ADVICE["PermanentRedirect"]
    if reply.status in (401, 403):
        return _ADVICE["AccessDenied"]
    if reply.status == 404:
        return _ADVICE["NoSuchBucket"]
    return "Try again later." if reply.status >= 500 else "Is it a server that speaks S3?"


def code_of(reply: Reply) -> str:
    """The code of an error of S3's (``NoSuchKey``), "" where there is none."""
    found = _CODE.search(reply.body)
    return found[1].decode() if found else ""
