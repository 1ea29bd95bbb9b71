"""A bucket of Google Cloud Storage by google-cloud-storage: what is listed, removed, and set for the whole bucket.

The library reaches nothing but the one server: its requests go through ``Outbound``, and no others are made. A token is
a JWT that the account's own key signs (RFC 7523, AIP-4111), so no server is asked for one; proxies, certificates and
credentials that the environment names are not used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import requests
from google.api_core.exceptions import GoogleAPICallError, NotFound, PreconditionFailed
from google.auth import crypt, jwt
from google.auth.exceptions import GoogleAuthError
from google.auth.transport.requests import AuthorizedSession, Request
from google.cloud import storage
from requests.adapters import BaseAdapter

from ...errors import EngineUnusable
from ..outbound import Outbound, Reply, shown
from . import ObjectRecord
from .gcs_settings import GcsCredentials, GcsSettings
from .xml_answers import GCS_ADVICE, advice_for

__all__ = ["GcsLibrary"]

_SCOPE = "https://www.googleapis.com/auth/devstorage.full_control"
# How many removals Google takes in one request.
_BATCH_MAX = 100
_CORS = {"origin": ["*"], "method": ["GET", "HEAD"], "maxAgeSeconds": 3600, "responseHeader": [
    "Accept-Ranges", "Content-Length", "Content-Range", "Content-Type", "ETag", "Range", "X-Goog-Generation",
    "X-Goog-Hash"]}


class GcsLibrary:
    """One bucket, by a service account. Its methods block; each may raise ``EngineUnusable``.

    :param name: what to call the bucket in errors.
    """

    def __init__(self, settings: GcsSettings, credentials: GcsCredentials, outbound: Outbound, name: str) -> None:
        signer = crypt.RSASigner.from_string(credentials.private_key)
        token = jwt.Credentials(signer, credentials.client_email, credentials.client_email, None,
                                additional_claims={"scope": _SCOPE})
        session = AuthorizedSession(token, auth_request=Request(session=_only(settings.server_url, outbound)))
        _only(settings.server_url, outbound, session)
        # The project is in the names of buckets that are made, and none is.
        self._client = storage.Client("-", token, _http=session, client_options={"api_endpoint": settings.server_url})
        self._bucket = self._client.bucket(settings.bucket)
        self._settings = settings
        self._name = name

    def pages(self, prefix: str, after: str, size: int) -> Iterator[list[ObjectRecord]]:
        """Objects whose keys begin so and come after another one, by their keys, in order, page by page."""
        with self._explained():
            listed = self._client.list_blobs(
                self._bucket, prefix=prefix, start_offset=after or None, page_size=size, retry=None,
                fields="items(name,size,timeCreated),nextPageToken")
            for page in listed.pages:
                found = []
                for blob in page:
                    if blob.name.startswith(prefix) and blob.name > after and blob.time_created is not None:
                        after = blob.name
                        found.append(ObjectRecord(blob.name, int(blob.size), blob.time_created.timestamp(), None))
                if found:
                    yield found

    def remove(self, key: str, generation: str | None) -> bool:
        """Remove an object, only that with this generation where one is given; whether it was there."""
        with self._explained():
            try:
                self._bucket.blob(key).delete(
                    if_generation_match=None if generation is None else int(generation), retry=None)
            except (NotFound, PreconditionFailed) as error:
                if "bucket does not exist" in str(error):
                    raise
                return False
            return True

    def remove_all(self, keys: list[str]) -> None:
        """Remove objects; those that are gone already do not matter."""
        for start in range(0, len(keys), _BATCH_MAX):
            batch = keys[start:start + _BATCH_MAX]
            try:
                with self._explained(), self._client.batch():
                    for key in batch:
                        self._bucket.blob(key).delete(retry=None)
            except EngineUnusable:
                for key in batch:  # only the first failure was told, which may be that one was gone already
                    self.remove(key, None)

    def allow_browsers(self) -> None:
        """Have any page be allowed to read there, as far as it has leave to (CORS)."""
        with self._explained():
            bucket = self._client.get_bucket(self._settings.bucket, retry=None)
            rules = list(bucket.cors)
            if _CORS not in rules:
                bucket.cors = [*rules, _CORS]
                bucket.patch(if_metageneration_match=bucket.metageneration, retry=None)

    def expire(self) -> None:
        """Have what is below the prefix be removed at the age that was set; other rules stay."""
        prefixes = [f"{self._settings.prefix}/"]
        rule = {"action": {"type": "Delete"}, "condition": {
            "age": self._settings.expire_days, "matchesPrefix": prefixes}}
        with self._explained():
            bucket = self._client.get_bucket(self._settings.bucket, retry=None)
            before = [dict(found) for found in bucket.lifecycle_rules]
            others = [found for found in before if not (
                found.get("action") == rule["action"] and found["condition"].keys() == {"age", "matchesPrefix"}
                and found["condition"]["matchesPrefix"] == prefixes)]
            if [*others, rule] != before:
                bucket.lifecycle_rules = [*others, rule]
                bucket.patch(if_metageneration_match=bucket.metageneration, retry=None)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Translate the library's errors."""
        try:
            yield
        except GoogleAPICallError as error:
            # The message has the request before it, which is long.
            details = [found["message"] for found in error.errors if isinstance(found, dict) and "message" in found]
            said = str((details or [error.message])[0]).encode()
            reply = Reply(int(error.code or 0), {}, said)
            raise EngineUnusable(what=self._name, why=f"HTTP {reply.status}, {shown(said)}",
                                 advice=advice_for(reply, GCS_ADVICE)) from None
        except (GoogleAuthError, requests.RequestException, ValueError, KeyError, TypeError) as error:
            raise EngineUnusable(
                what=self._name, why=f"its answer cannot be read ({type(error).__name__})",
                advice=GCS_ADVICE[""]) from None


class _Only(BaseAdapter):
    """Sends what the library asks for to one server, by ``Outbound``."""

    def __init__(self, server_url: str, outbound: Outbound) -> None:
        super().__init__()
        self._server_url = server_url
        self._outbound = outbound

    def send(self, request: requests.PreparedRequest, stream: bool = False, timeout: Any = None, verify: Any = True,
             cert: Any = None, proxies: Mapping[str, str] | None = None) -> requests.Response:
        url, body = request.url or "", request.body or b""
        assert isinstance(body, str | bytes), "the library streams objects alone, and none are read by it"
        if not url.startswith(f"{self._server_url}/"):
            raise EngineUnusable(what="The bucket", why="it points elsewhere", advice="Is its address right?")
        headers = {name.lower(): value if isinstance(value, str) else value.decode("latin-1")
                   for name, value in request.headers.items()}
        for name in ("connection", "content-length", "host"):
            headers.pop(name, None)
        reply = self._outbound.request(request.method or "GET", url, headers={**headers, "accept-encoding": "identity"},
                                       body=body.encode() if isinstance(body, str) else body)
        response = requests.Response()
        response.status_code = reply.status
        response.headers.update(reply.headers)
        response._content = reply.body
        response.url = url
        response.request = request
        response.encoding = "utf-8"
        return response

    def close(self) -> None:
        """Nothing is kept open."""


def _only(server_url: str, outbound: Outbound, session: requests.Session | None = None) -> requests.Session:
    """Have a session reach one server, and nothing else."""
    session = session or requests.Session()
    session.trust_env = False
    session.max_redirects = 0
    for scheme in ("https://", "http://"):
        session.mount(scheme, _Only(server_url, outbound))
    return session
