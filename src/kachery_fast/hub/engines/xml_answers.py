"""What stores answer when they refuse: errors in XML, of S3 and of Google's XML API, and what to do about them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..outbound import Reply, shown

__all__ = ["GCS_ADVICE", "S3_ADVICE", "advice_for", "code_of", "refusal_of"]

_CODE = re.compile(rb"<Code>\s*([A-Za-z0-9.]{1,64})\s*</Code>")
# Google's details name the permission that is missing.
_MESSAGE = re.compile(rb"<Message>([^<]{1,1000})</Message>(?:\s*<Details>([^<]{1,1000})</Details>)?")

S3_ADVICE = {
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
    "": "Is it a server that speaks S3?",
}

GCS_ADVICE = {
    "NoSuchBucket": "Make the bucket, or correct its name.",
    "AccessDenied": "Let the account create, get, delete and list objects there (storage.objects.create, .get, "
                    ".delete, .list): the role Storage Object User on the bucket has all four.",
    "InvalidAccessKeyId": "The HMAC key is not known there: give the credentials anew.",
    "SignatureDoesNotMatch": "The key is not the account's (any more), or something on the way changes requests: give "
                             "the credentials anew.",
    "ExpiredToken": "The clock of the hub's machine is wrong: set it.",
    "RequestTimeTooSkewed": "The clock of the hub's machine is wrong: set it.",
    "BadDigest": "The bytes changed on the way: try again.",
    "SlowDown": "Google asks for fewer requests: try again later.",
    "UserProjectAccountProblem": "The project of the bucket has no billing account, or it is not in order: see "
                                 "Google's console.",
    "": "Is it Google Cloud Storage?",
}
_PERMISSION = re.compile(rb"storage\.(objects|buckets)\.([a-z]{3,10})")
_PERMITS = {
    "objects.create": "upload", "objects.get": "read", "objects.delete": "remove, and replace,",
    "objects.list": "list objects, and tell what is missing from what is forbidden",
}


def refusal_of(reply: Reply) -> str:
    """What a store answered, as it may be shown."""
    message = _MESSAGE.search(reply.body)
    code = code_of(reply)
    said = ": ".join(part for part in (code, *(shown(text) for text in (message.groups() if message else ()) if text))
                     if part)
    return f"HTTP {reply.status}{f', {said}' if said else ''}"


def advice_for(reply: Reply, advice: Mapping[str, str]) -> str:
    """What to do about such an answer. :param advice: by the store's codes, and for all others by ""."""
    code = code_of(reply)
    permission = _PERMISSION.search(reply.body) if reply.status in (401, 403) and advice is GCS_ADVICE else None
    if permission is not None:
        return _permission_advice(permission[1].decode(), permission[2].decode())
    if code in advice and code:
        return advice[code]
    if reply.status in (301, 302, 307, 308):
        return advice.get("PermanentRedirect", advice[""])
    if reply.status in (401, 403):
        return advice["AccessDenied"]
    if reply.status == 404:
        return advice["NoSuchBucket"]
    if reply.status == 429:
        return advice["SlowDown"]
    return "Try again later." if reply.status >= 500 else advice[""]


def _permission_advice(of: str, action: str) -> str:
    if of == "buckets":
        return ("The account lacks storage.buckets.get or storage.buckets.update, to set rules for the bucket: give it "
                "the role Storage Admin on the bucket for a moment, or set them yourself. Nodes do without.")
    permits = _PERMITS.get(f"{of}.{action}", "do that")
    return f"The account lacks storage.{of}.{action}, to {permits}: give it the role Storage Object User on the bucket."


def code_of(reply: Reply) -> str:
    """The code of an error (``NoSuchKey``), "" where there is none."""
    found = _CODE.search(reply.body)
    return found[1].decode() if found else ""
