"""A store that speaks S3, on loopback, in a process of its own: moto's, behind what moto leaves out.

moto keeps the objects and answers as S3 does, but takes presigned URLs without looking at them. So this process checks
each before moto sees the request, as AWS describes it ("Authenticating Requests: Using Query Parameters", Signature
Version 4): key, region, age, signed headers, signature, and what the key may do. It shares no code with the hub or
botocore.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qsl, quote, unquote

from .store_server import BUCKET, Gate, StoreServer, announce, key_file, reset

REGION = "eu-central-1"
ACCESS_KEY = "AKIAOFTHELAB"
SECRET_KEY = "the/secret+of/the+lab's+bucket"

_CODES = {400: "Bad Request", 403: "Forbidden", 404: "Not Found", 429: "Too Many Requests", 503: "Slow Down"}


class S3Server(StoreServer):
    """A running one.

    Of its own are ``forgetful`` (``If-None-Match`` is not heeded) and ``region``. Requests are those by signed URLs, or
    without any.
    """

    kind = "s3"
    action = "addS3Bucket"
    operations: ClassVar = {"upload": "PutObject", "read": "GetObject", "list": "ListBucket", "remove": "DeleteObject"}

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.place["region"] = REGION
        self.credentials = {"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}
        self.secrets = (SECRET_KEY, ACCESS_KEY)

    def place_options(self) -> list[str]:
        return [*super().place_options(), "--region", REGION]

    def write_credentials(self, directory: Path) -> list[str]:
        (directory / "credentials").write_text(key_file(ACCESS_KEY, SECRET_KEY))
        return ["--credentials", str(directory / "credentials"), "--profile", "lab"]


class _Gate(Gate):
    """Looks at each request before moto does."""

    UPLOAD = "PutObject"
    STATE: ClassVar = {"forgetful": False, "region": REGION}

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        super().__init__()
        self._application = application

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        if path == "/_gate":
            answer = self.control(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
            start("200 OK", [("Content-Type", "application/json")])
            return [answer]
        if "HTTP_AUTHORIZATION" not in environ:
            self.requests.append(f"{method} {path}")
            fault = self.count(method)
            if fault is not None:
                return _fail(environ, start, fault, self.state["retry_after"])
            found = self._refusal(environ, method)
            if found is not None:
                return _refuse(start, method, *found)
            if self.state["forgetful"]:
                environ.pop("HTTP_IF_NONE_MATCH", None)
        return self._application(environ, start)

    def begin(self, bucket: bool) -> None:
        from moto.core.models import DEFAULT_ACCOUNT_ID
        from moto.s3.models import s3_backends

        backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        backend.reset()
        if bucket:
            backend.create_bucket(BUCKET, REGION)

    def _refusal(self, environ: dict[str, Any], method: str) -> tuple[int, str, str] | None:
        query = dict(parse_qsl(environ["QUERY_STRING"], keep_blank_values=True))
        operation = ("ListBucket" if "list-type" in query else
                     {"PUT": "PutObject", "GET": "GetObject", "HEAD": "GetObject"}.get(method, "DeleteObject"))
        if "X-Amz-Signature" not in query:
            public = self.state["public"] and method in ("GET", "HEAD")
            return None if public else (403, "AccessDenied", "Access Denied")
        key, day, region, service, end = query["X-Amz-Credential"].split("/")
        if key != ACCESS_KEY:
            return 403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records."
        if (region, service, end) != (self.state["region"], "s3", "aws4_request"):
            return 400, "AuthorizationQueryParametersError", (
                f"Error parsing the X-Amz-Credential parameter; the region '{region}' is wrong; expecting "
                f"'{self.state['region']}'")
        begun = datetime.strptime(query["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc).timestamp()
        now = time.time() + self.state["offset"]
        if now < begun - 900:
            return 403, "AccessDenied", "Request is not valid yet"
        if now > begun + int(query["X-Amz-Expires"]):
            return 403, "AccessDenied", "Request has expired"
        if not hmac.compare_digest(_signature(environ, method, query, f"{day}/{region}/{service}/{end}"),
                                   query["X-Amz-Signature"]):
            return 403, "SignatureDoesNotMatch", "The request signature we calculated does not match"
        if self.forbids(operation):
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


def _fail(environ: dict[str, Any], start: Callable[..., Any], status: int, retry_after: str) -> Iterable[bytes]:
    if status:
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        return _refuse(start, environ["REQUEST_METHOD"], status, "SlowDown", "Reduce your request rate",
                       *([("Retry-After", retry_after)] if retry_after else []))
    reset(environ["werkzeug.socket"])
    raise ConnectionAbortedError


def _serve() -> None:
    from moto.moto_server.werkzeug_app import create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *arguments: Any) -> None:
            pass

    server = make_server("127.0.0.1", 0, _Gate(create_backend_app("s3")), threaded=True, request_handler=Handler)
    announce(server.port)
    server.serve_forever()


if __name__ == "__main__":
    _serve()
