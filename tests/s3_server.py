"""A store that speaks S3, on loopback, in a process of its own: moto's, behind what moto leaves out.

moto keeps the objects and answers as S3 does, but takes presigned URLs without looking at them. So this process checks
each before moto sees the request, as AWS describes it ("Authenticating Requests: Using Query Parameters", Signature
Version 4): key, region, age, signed headers, signature, and what the key may do. It shares no code with the hub or
botocore. Run as a program it prints its port.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, unquote

if TYPE_CHECKING:
    from kachery_fast.cli.lab import Lab

BUCKET = "lab-bucket"
REGION = "eu-central-1"
ACCESS_KEY = "AKIAOFTHELAB"
SECRET_KEY = "the/secret+of/the+lab's+bucket"
_ROOT = Path(__file__).parent.parent

_CODES = {400: "Bad Request", 403: "Forbidden", 404: "Not Found", 429: "Too Many Requests", 503: "Slow Down"}


class S3Server:
    """A running one."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.host = f"127.0.0.1:{port}"
        self.url = f"http://{self.host}"
        self.settings: dict[str, Any] = {
            "bucket": BUCKET, "endpoint": self.url, "region": REGION, "accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}

    def set(self, **state: Any) -> None:
        """Change how it is: ``denied`` (operations), ``offset`` (of its clock, in seconds), ``public`` (reads need no
        signature), ``forgetful`` (``If-None-Match`` is not heeded), ``region``, ``slow`` (seconds that each request
        takes), ``fault`` of each request whose number is a multiple of ``every``: a status (429, 503), with which
        ``Retry-After`` comes, or 0 for a reset connection."""
        self._request("POST", "/_gate", json.dumps(state).encode())

    def reset(self) -> None:
        """Begin anew, with an empty bucket."""
        self.set(denied=[], offset=0, public=False, forgetful=False, region=REGION, bucket=True, fault=None, slow=0)

    def remove_bucket(self) -> None:
        """Have the bucket be gone."""
        self.set(bucket=False)

    def requests(self) -> list[str]:
        """What was asked for by signed URLs, or without any, since the last reset: each as ``METHOD PATH``."""
        found: list[str] = json.loads(self._request("GET", "/_gate", None))
        return found

    def _request(self, method: str, path: str, data: bytes | None) -> bytes:
        request = urllib.request.Request(self.url + path, data=data, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return bytes(answer.read())


@contextmanager
def running_s3() -> Iterator[S3Server]:
    """Start one with an empty bucket; end its process at the end."""
    process = subprocess.Popen([sys.executable, "-m", "tests.s3_server"], cwd=_ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)
    try:
        assert process.stdout is not None
        server = S3Server(int(process.stdout.readline()))
        server.reset()
        yield server
    finally:
        process.terminate()
        process.communicate(timeout=20)


def use_bucket(lab: Lab, s3: S3Server, *options: str, profile: str = "default") -> Any:
    """Have the lab's channel use the server's bucket, by the command of its owner; the key is in ``credentials``."""
    credentials = lab.directory / "credentials"
    credentials.write_text(f"[{profile}]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key={SECRET_KEY}\n")
    return lab.owner("bucket", lab.channel, "--s3", BUCKET, "--endpoint", s3.url, "--region", REGION, "--credentials",
                     str(credentials), "--profile", profile, *options)


class _Gate:
    """Looks at each request before moto does."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application
        self._state: dict[str, Any] = {"denied": [], "offset": 0, "public": False, "forgetful": False, "region": REGION,
                                       "fault": None, "every": 1, "slow": 0}
        self._requests: list[str] = []

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        if path == "/_gate":
            if method == "POST":
                self._change(json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))))
            start("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(self._requests).encode()]
        if "HTTP_AUTHORIZATION" not in environ:
            self._requests.append(f"{method} {path}")
            if self._state["slow"]:
                time.sleep(self._state["slow"])
            if self._state["fault"] is not None and len(self._requests) % self._state["every"] == 0:
                return _fail(environ, start, method, self._state["fault"])
            found = self._refusal(environ, method)
            if found is not None:
                return _refuse(start, method, *found)
            if self._state["forgetful"]:
                environ.pop("HTTP_IF_NONE_MATCH", None)
        return self._application(environ, start)

    def _change(self, state: dict[str, Any]) -> None:
        from moto.core.models import DEFAULT_ACCOUNT_ID
        from moto.s3.models import s3_backends

        bucket = state.pop("bucket", None)
        if bucket is not None:
            self._requests.clear()
            backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
            backend.reset()
            if bucket:
                backend.create_bucket(BUCKET, REGION)
        self._state.update(state)

    def _refusal(self, environ: dict[str, Any], method: str) -> tuple[int, str, str] | None:
        query = dict(parse_qsl(environ["QUERY_STRING"], keep_blank_values=True))
        operation = ("ListBucket" if "list-type" in query else
                     {"PUT": "PutObject", "GET": "GetObject", "HEAD": "GetObject"}.get(method, "DeleteObject"))
        if "X-Amz-Signature" not in query:
            public = self._state["public"] and method in ("GET", "HEAD")
            return None if public else (403, "AccessDenied", "Access Denied")
        key, day, region, service, end = query["X-Amz-Credential"].split("/")
        if key != ACCESS_KEY:
            return 403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records."
        if (region, service, end) != (self._state["region"], "s3", "aws4_request"):
            return 400, "AuthorizationQueryParametersError", (
                f"Error parsing the X-Amz-Credential parameter; the region '{region}' is wrong; expecting "
                f"'{self._state['region']}'")
        begun = datetime.strptime(query["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc).timestamp()
        now = time.time() + self._state["offset"]
        if now < begun - 900:
            return 403, "AccessDenied", "Request is not valid yet"
        if now > begun + int(query["X-Amz-Expires"]):
            return 403, "AccessDenied", "Request has expired"
        if not hmac.compare_digest(_signature(environ, method, query, f"{day}/{region}/{service}/{end}"),
                                   query["X-Amz-Signature"]):
            return 403, "SignatureDoesNotMatch", "The request signature we calculated does not match"
        if operation in self._state["denied"]:
            return 403, "AccessDenied", "Access Denied"
        return None


def _signature(environ: dict[str, Any], method: str, query: dict[str, str], scope: str) -> str:
    signed = query["X-Amz-SignedHeaders"]
    assert "host" in signed.split(";")
    headers = "".join(f"{name}:{_header(environ, name)}\n" for name in signed.split(";"))
    canonical = "\n".join([
        method, quote(unquote(environ["RAW_URI"].partition("?")[0]), safe="/-_.~"),
        "&".join(sorted(f"{quote(name, safe='-_.~')}={quote(value, safe='-_.~')}" for name, value in query.items()
                        if name != "X-Amz-Signature")),
        headers, signed, "UNSIGNED-PAYLOAD"])
    key = b"AWS4" + SECRET_KEY.encode()
    for part in scope.split("/"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    text = "\n".join(["AWS4-HMAC-SHA256", query["X-Amz-Date"], scope, hashlib.sha256(canonical.encode()).hexdigest()])
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _header(environ: dict[str, Any], name: str) -> str:
    variable = name.upper().replace("-", "_")
    return str(environ.get(variable if name in ("content-length", "content-type") else f"HTTP_{variable}", ""))


def _refuse(start: Callable[..., Any], method: str, status: int, code: str, message: str,
            *headers: tuple[str, str]) -> Iterable[bytes]:
    body = f"<?xml version='1.0' encoding='UTF-8'?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    start(f"{status} {_CODES[status]}", [
        ("Content-Type", "application/xml"), ("Content-Length", str(len(body))), *headers])
    return [] if method == "HEAD" else [body.encode()]


def _fail(environ: dict[str, Any], start: Callable[..., Any], method: str, status: int) -> Iterable[bytes]:
    if status:
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        return _refuse(start, method, status, "SlowDown", "Reduce your request rate", ("Retry-After", "1"))
    connection = environ["werkzeug.socket"]
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing it sends a reset
    connection.close()
    raise ConnectionAbortedError


def _serve() -> None:
    from moto.moto_server.werkzeug_app import create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *arguments: Any) -> None:
            pass

    server = make_server("127.0.0.1", 0, _Gate(create_backend_app("s3")), threaded=True, request_handler=Handler)
    sys.stdout.write(f"{server.port}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    _serve()
