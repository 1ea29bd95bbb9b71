"""A store that behaves as Google Cloud Storage, on loopback, in a process of its own: an emulator behind a gate.

gcp-storage-emulator keeps the objects. It looks at no signature, and knows half of the XML API. So this process looks
at each request first, as Google documents it: V4 signatures ("Canonical requests", "V4 signing process with your own
program"), their age, and what the account may do; for the JSON API, a token that the account has signed itself. It
shares no code with the hub, and none with Google's library. What the emulator lacks is done here: HEAD,
``x-goog-generation``, ``x-goog-if-generation-match``, ``x-goog-content-length-range``, ``x-goog-hash`` of what
arrives, ``list-type=2``, resumable sessions begun by ``x-goog-resumable: start`` (of a part that breaks off, whole
256 KiB are kept), ranges past the end, errors in XML, and of the JSON API the pages of listings and
``ifGenerationMatch``.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import json
import re
import secrets
import sys
import time
from datetime import datetime, timezone
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from urllib.parse import parse_qsl, quote, unquote

from .store_server import BUCKET, Gate, StoreServer, announce, key_file, reset

EMAIL = "hub@lab.iam.gserviceaccount.com"
ACCESS_KEY = "GOOG1ELAB"
SECRET_KEY = "the/secret+of/the+lab's+hmac+key"
KEYS = ("account", "hmac", "both")  # what the hub may have
KEPT_BYTES = 256 * 1024
_SKEW_SECONDS = 900
_QUOTED = "-_.~"


def rsa_key(bits: int) -> str:
    """A private key, as a key file has it."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    return rsa.generate_private_key(65537, bits).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()).decode()


@lru_cache
def service_account() -> str:
    """The key file of the only service account, made once; all of its addresses lead nowhere."""
    return json.dumps({"type": "service_account", "project_id": "lab", "client_email": EMAIL,
                       "private_key": rsa_key(2048), "token_uri": "http://127.0.0.1:9/token",
                       "auth_uri": "http://127.0.0.1:9/auth", "universe_domain": "elsewhere.example"})


def credentials_of(keys: str) -> dict[str, str]:
    """The fields of these KEYS."""
    account, pair = {"serviceAccount": service_account()}, {"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}
    return {"account": account, "hmac": pair, "both": {**account, **pair}}[keys]


class GcsServer(StoreServer):
    """A running one.

    Of its own are ``cut`` (bytes of its session after which the next upload is broken off), ``flip`` (the first byte of
    the next upload changes on the way) and ``strict`` (uploads have to tell their CRC-32C). Requests of the JSON API
    are ``JSON METHOD PATH``; faults are for the others.

    :param keys: one of KEYS.
    """

    kind = "gcs"
    action = "addGcsBucket"
    operations: ClassVar = {
        "upload": "storage.objects.create", "read": "storage.objects.get", "list": "storage.objects.list",
        "remove": "storage.objects.delete"}

    def __init__(self, port: int, keys: str = "both") -> None:
        super().__init__(port)
        self.credentials = credentials_of(keys)
        self.secrets = (SECRET_KEY, json.loads(service_account())["private_key"].split("\n")[1])

    @classmethod
    def arguments(cls) -> list[str]:
        from cryptography.hazmat.primitives import serialization

        key = serialization.load_pem_private_key(json.loads(service_account())["private_key"].encode(), None)
        return [key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()]

    def write_credentials(self, directory: Path) -> list[str]:
        (directory / "account.json").write_text(service_account())
        (directory / "hmac").write_text(key_file(ACCESS_KEY, SECRET_KEY))
        return ["--credentials", str(directory / "account.json"), "--hmac", str(directory / "hmac"), "--profile", "lab"]


class _Refused(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, code: str, message: str, details: str = "") -> None:
        super().__init__(code)
        self.status, self.code, self.message, self.details = status, code, message, details


class _Session(NamedTuple):
    name: str
    headers: dict[str, str]
    data: bytearray


class _Emulator:
    """gcp-storage-emulator, in a thread of this process."""

    def __init__(self) -> None:
        from gcp_storage_emulator.server import create_server

        self._server = create_server("127.0.0.1", 0, in_memory=True)
        self._server.start()
        while (served := self._server._api._httpd) is None:
            time.sleep(0)
        self._port = served.server_address[1]

    def begin(self, bucket: bool) -> None:
        from gcp_storage_emulator.handlers import buckets

        self._server.wipe()
        if bucket:
            buckets.create_bucket(BUCKET, self._server._storage)

    def ask(self, method: str, path: str, headers: dict[str, str] | None = None,
            body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            connection.request(method, path, body or None, {**(headers or {}), "Content-Length": str(len(body))})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def find(self, name: str) -> dict[str, Any] | None:
        status, _, body = self.ask("GET", f"/storage/v1/b/{BUCKET}/o/{quote(name, safe='')}")
        found: dict[str, Any] | None = json.loads(body) if status == 200 else None
        return found

    def names(self, prefix: str) -> list[dict[str, Any]]:
        _, _, body = self.ask("GET", f"/storage/v1/b/{BUCKET}/o?prefix={quote(prefix, safe='')}")
        items: list[dict[str, Any]] = json.loads(body).get("items", [])
        return sorted(items, key=lambda item: str(item["name"]))


class _Gate(Gate):
    """What this store is, and does."""

    UPLOAD = "storage.objects.create"
    STATE: ClassVar = {"cut": None, "flip": False, "strict": False}

    def __init__(self, public_key: str) -> None:
        from cryptography.hazmat.primitives import serialization

        super().__init__()
        self.key: Any = serialization.load_pem_public_key(public_key.encode())
        self.emulator = _Emulator()
        self.sessions: dict[str, _Session] = {}

    def begin(self, bucket: bool) -> None:
        self.sessions.clear()
        self.emulator.begin(bucket)

    def may(self, permission: str) -> None:
        if self.forbids(permission):
            raise _Refused(403, "AccessDenied", "Access denied.", (
                f"{EMAIL} does not have {permission} access to the Google Cloud Storage object. Permission "
                f"'{permission}' denied on resource (or it may not exist)."))

    # --- who asks

    def check_token(self, authorization: str) -> None:
        """A JWT by the account's own key, for this service's scope (RFC 7519, RS256)."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric import padding
        from cryptography.hazmat.primitives.hashes import SHA256

        try:
            head, claims, signature = (_unpacked(part) for part in authorization.removeprefix("Bearer ").split("."))
            signed = authorization.removeprefix("Bearer ").rpartition(".")[0].encode()
            self.key.verify(signature, signed, padding.PKCS1v15(), SHA256())
            said = json.loads(claims)
        except (ValueError, InvalidSignature):
            raise _Refused(401, "AuthenticationRequired", "Invalid Credentials") from None
        fresh = said["iat"] - 60 <= time.time() < said["exp"] <= said["iat"] + 3600
        if json.loads(head)["alg"] != "RS256" or said["iss"] != EMAIL or said["sub"] != EMAIL or not fresh or (
                said["scope"] != "https://www.googleapis.com/auth/devstorage.full_control"):
            raise _Refused(401, "AuthenticationRequired", "Invalid Credentials")

    def check_signature(self, method: str, path: str, query: dict[str, str], headers: dict[str, str]) -> None:
        account, day, *scope = query["X-Goog-Credential"].split("/")
        if query["X-Goog-Date"][:8] != day or scope != ["auto", "storage", "goog4_request"]:
            raise _Refused(400, "InvalidArgument", "Invalid argument.", "The credential scope is wrong.")
        begun = datetime.strptime(query["X-Goog-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc).timestamp()
        now = time.time() + self.state["offset"]
        if now < begun - _SKEW_SECONDS:
            raise _Refused(403, "AccessDenied", "Access denied.", "Request is not valid yet.")
        if now > begun + int(query["X-Goog-Expires"]):
            raise _Refused(400, "ExpiredToken", "Invalid argument.", "The provided token has expired.")
        signed = query["X-Goog-SignedHeaders"].split(";")
        if "host" not in signed or any(name.startswith("x-goog-") and name not in signed for name in headers):
            raise _Refused(403, "SignatureDoesNotMatch", "A header with the prefix x-goog- is not signed.")
        canonical = "\n".join([
            method, quote(unquote(path), safe=f"/{_QUOTED}"),
            "&".join(sorted(f"{quote(name, safe=_QUOTED)}={quote(value, safe=_QUOTED)}"
                            for name, value in query.items() if name != "X-Goog-Signature")),
            "".join(f"{name}:{' '.join(headers.get(name, '').split())}\n" for name in sorted(signed)),
            ";".join(sorted(signed)), "UNSIGNED-PAYLOAD"])
        text = "\n".join([query["X-Goog-Algorithm"], query["X-Goog-Date"], "/".join([day, *scope]),
                          hashlib.sha256(canonical.encode()).hexdigest()]).encode()
        if not self._holds(query["X-Goog-Algorithm"], account, [day, *scope], text,
                           bytes.fromhex(query["X-Goog-Signature"])):
            raise _Refused(403, "SignatureDoesNotMatch", (
                "Access denied."), "The request signature we calculated does not match the signature you provided.")

    def _holds(self, algorithm: str, account: str, scope: list[str], text: bytes, signature: bytes) -> bool:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric import padding
        from cryptography.hazmat.primitives.hashes import SHA256

        if algorithm == "GOOG4-HMAC-SHA256":
            if account != ACCESS_KEY:
                raise _Refused(403, "InvalidAccessKeyId", "The access key ID you provided does not exist.")
            key = b"GOOG4" + SECRET_KEY.encode()
            for part in scope:
                key = hmac.new(key, part.encode(), hashlib.sha256).digest()
            return hmac.compare_digest(hmac.new(key, text, hashlib.sha256).digest(), signature)
        try:
            self.key.verify(signature, text, padding.PKCS1v15(), SHA256())
        except InvalidSignature:
            return False
        return account == EMAIL

    # --- objects

    def store(self, name: str, headers: dict[str, str], data: bytes) -> None:
        """Create or replace an object, if its headers allow it."""
        low, _, high = headers.get("x-goog-content-length-range", f"0,{2**62}").partition(",")
        if not int(low) <= len(data) <= int(high):
            raise _Refused(400, *(("EntityTooLarge", "Your proposed upload is larger than the maximum object size")
                                  if len(data) > int(high) else ("EntityTooSmall", "Your proposed upload is smaller")))
        if self.state["flip"] and data:
            self.state["flip"] = False
            data = bytes([data[0] ^ 1]) + data[1:]
        wanted = re.search(r"crc32c=([^,]+)", headers.get("x-goog-hash", ""))
        if wanted is None and self.state["strict"]:
            raise _Refused(400, "InvalidDigest", "This test wants a CRC-32C.")
        if wanted is not None and wanted[1] != _crc32c(data):
            raise _Refused(400, "BadDigest", "The CRC32C you specified did not match what we computed.")
        with self.lock:
            found = self.emulator.find(name)
            if found is not None and "x-goog-if-generation-match" in headers:
                self.check_generation(found, headers["x-goog-if-generation-match"])
            if found is not None:
                self.may("storage.objects.delete")
            self.emulator.ask("PUT", f"/{BUCKET}/{quote(name)}", {"Content-Type": "application/octet-stream"}, data)

    @staticmethod
    def check_generation(found: dict[str, Any], wanted: str) -> None:
        if wanted != found["generation"]:
            raise _Refused(412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold.")

    def require(self, name: str) -> dict[str, Any]:
        found = self.emulator.find(name)
        if found is None:
            self.may("storage.objects.list")
            raise _Refused(404, "NoSuchKey", "The specified key does not exist.")
        return found

    def listing(self, query: dict[str, str]) -> bytes:
        assert query["list-type"] == "2"
        found = [item for item in self.emulator.names(query["prefix"]) if item["name"] > query.get("start-after", "")]
        page = found[:int(query["max-keys"])]
        items = "".join(f"<Contents><Key>{item['name']}</Key><LastModified>{item['timeCreated'][:23]}Z</LastModified>"
                        f"<Size>{item['size']}</Size></Contents>" for item in page)
        return (f"<?xml version='1.0'?><ListBucketResult xmlns='http://doc.s3.amazonaws.com/2006-03-01'>"
                f"<IsTruncated>{str(len(found) > len(page)).lower()}</IsTruncated>{items}</ListBucketResult>").encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    gate: _Gate

    def _handle(self) -> None:
        path, _, text = self.path.partition("?")
        query = dict(parse_qsl(text, keep_blank_values=True))
        headers = {name.lower(): value for name, value in self.headers.items()}
        gate = self.gate
        if path == "/_gate":
            return self._answer(200, gate.control(self._body(headers)))
        of_json = path.startswith(("/storage/v1/", "/upload/", "/download/", "/batch/"))
        gate.requests.append(f"{'JSON ' if of_json else ''}{self.command} {unquote(path)}")
        try:
            if of_json:
                return self._json(path, query, headers, self._body(headers))
            fault = gate.count(self.command)
            if fault == 0:
                return self._reset()
            if "upload_id" in query:
                return self._session(query["upload_id"], headers, fault)
            body = self._body(headers)
            if fault is not None:
                return self._fault(fault)
            return self._xml(path, query, headers, body)
        except _Refused as refused:
            return self._refuse(refused, of_json)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _handle  # noqa: N815

    # --- the XML API

    def _xml(self, path: str, query: dict[str, str], headers: dict[str, str], body: bytes) -> None:
        gate, method = self.gate, self.command
        if "X-Goog-Signature" in query:
            gate.check_signature(method, path, query, headers)
        elif not (gate.state["public"] and method in ("GET", "HEAD")):
            raise _Refused(403, "AccessDenied", "Access denied.", (
                "Anonymous caller does not have storage.objects.get access to the Google Cloud Storage object."))
        bucket, _, name = unquote(path).lstrip("/").partition("/")
        if bucket != BUCKET or not gate.state["bucket"]:
            raise _Refused(404, "NoSuchBucket", "The specified bucket does not exist.")
        if not name:
            gate.may("storage.objects.list")
            return self._answer(200, gate.listing(query), {"Content-Type": "application/xml"})
        if method in ("PUT", "POST"):
            gate.may("storage.objects.create")
            if method == "PUT":
                gate.store(name, headers, body)
                return self._answer(200, b"")
            assert headers["x-goog-resumable"] == "start"
            assert not body
            found = gate.emulator.find(name)
            if found is not None and "x-goog-if-generation-match" in headers:
                gate.check_generation(found, headers["x-goog-if-generation-match"])
            upload = secrets.token_hex(16)
            gate.sessions[upload] = _Session(name, headers, bytearray())
            return self._answer(201, b"", {"Location": f"http://{headers['host']}{path}?upload_id={upload}"})
        gate.may("storage.objects.delete" if method == "DELETE" else "storage.objects.get")
        found = gate.require(name)
        if method == "DELETE":
            if "x-goog-if-generation-match" in headers:
                gate.check_generation(found, headers["x-goog-if-generation-match"])
            gate.emulator.ask("DELETE", f"/storage/v1/b/{BUCKET}/o/{quote(name, safe='')}")
            return self._answer(204, b"")
        return self._read(name, found, headers)

    def _read(self, name: str, found: dict[str, Any], headers: dict[str, str]) -> None:
        size = int(found["size"])
        about = {"x-goog-generation": found["generation"], "ETag": f'"{found["etag"]}"',
                 "x-goog-hash": f"crc32c={found['crc32c']}"}
        if self.command == "HEAD":
            return self._answer(200, b"", about, length=size)
        asked = re.match(r"bytes=(\d+)-", headers.get("range", ""))
        if asked is not None and int(asked[1]) >= size:
            return self._answer(416, b"", {"Content-Range": f"bytes */{size}"})
        status, answered, data = self.gate.emulator.ask(
            "GET", f"/{BUCKET}/{quote(name)}", {"Range": headers["range"]} if "range" in headers else {})
        if "content-range" in answered:
            about["Content-Range"] = answered["content-range"]
        return self._answer(status, data, about)

    def _session(self, upload: str, headers: dict[str, str], fault: int | None) -> None:
        gate = self.gate
        session = gate.sessions.get(upload)
        length = int(headers.get("content-length", "0"))
        cut = gate.state["cut"] if length else None
        if session is not None and cut is not None and len(session.data) + length > cut >= len(session.data):
            gate.state["cut"] = None
            session.data.extend(self.rfile.read(cut - len(session.data)))
            del session.data[len(session.data) // KEPT_BYTES * KEPT_BYTES:]
            return self._reset()
        body = self.rfile.read(length)
        if fault is not None:
            return self._fault(fault)
        if session is None or not gate.state["bucket"]:
            raise _Refused(404, "NoSuchUpload", "The upload does not exist.")
        span = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)", headers["content-range"])
        assert span is not None
        total = int(span[3])
        if span[1] is not None and int(span[1]) <= len(session.data):  # what it has already is passed over
            assert int(span[2]) - int(span[1]) + 1 == len(body)
            session.data.extend(body[len(session.data) - int(span[1]):])
        if len(session.data) < total:
            reached = {"Range": f"bytes=0-{len(session.data) - 1}"} if session.data else {}
            return self._answer(308, b"", reached)
        gate.store(session.name, session.headers, bytes(session.data))
        return self._answer(200, b"")

    def _reset(self) -> None:
        self.close_connection = True
        reset(self.connection)

    # --- the JSON API

    def _json(self, path: str, query: dict[str, str], headers: dict[str, str], body: bytes) -> None:
        gate, method = self.gate, self.command
        gate.check_token(headers.get("authorization", ""))
        if not gate.state["bucket"]:
            raise _Refused(404, "notFound", "The specified bucket does not exist.")
        if path.startswith("/batch/"):
            gate.may("storage.objects.delete")
        of = re.fullmatch(r"/(?:(?:upload|download)/)?storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", path)
        assert of is not None or path.startswith("/batch/"), path
        if of is not None:
            if of[1] != BUCKET:
                raise _Refused(404, "notFound", "The specified bucket does not exist.")
            if path.endswith("/o") and method == "GET":
                gate.may("storage.objects.list")
                return self._page(query)
            if of[2] is None and not path.endswith("/o"):
                gate.may("storage.buckets.get" if method == "GET" else "storage.buckets.update")
            if method == "DELETE":
                gate.may("storage.objects.delete")
                found = gate.emulator.find(unquote(of[2]))
                if found is None:
                    raise _Refused(404, "notFound", "No such object.")
                if "ifGenerationMatch" in query:
                    gate.check_generation(found, query["ifGenerationMatch"])
        passed = {name: value for name, value in headers.items() if name in ("content-type", "range", "host")}
        status, answered, data = gate.emulator.ask(method, self.path, passed, body)
        about = {name: value for name, value in answered.items()
                 if name in ("content-type", "content-range", "x-goog-hash", "location")}
        return self._answer(status, data, about)

    def _page(self, query: dict[str, str]) -> None:
        begin, after = query.get("startOffset", ""), query.get("pageToken", "")
        items = [item for item in self.gate.emulator.names(query.get("prefix", ""))
                 if item["name"] >= begin and item["name"] > after]
        page = items[:int(query.get("maxResults", "1000"))]
        more = {"nextPageToken": page[-1]["name"]} if len(items) > len(page) else {}
        return self._answer(200, json.dumps({"kind": "storage#objects", "items": page, **more}).encode(),
                            {"Content-Type": "application/json"})

    # --- answers

    def _body(self, headers: dict[str, str]) -> bytes:
        return self.rfile.read(int(headers.get("content-length", "0")))

    def _fault(self, status: int) -> None:
        body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
        wait = self.gate.state["retry_after"]
        return self._answer(status, body, {"Retry-After": wait} if wait else {})

    def _refuse(self, refused: _Refused, of_json: bool) -> None:
        if of_json:
            said = refused.details or refused.message
            body = json.dumps({"error": {"code": refused.status, "message": said, "errors": [
                {"message": said, "domain": "global", "reason": refused.code}]}})
            return self._answer(refused.status, body.encode(), {"Content-Type": "application/json"})
        details = f"<Details>{refused.details}</Details>" if refused.details else ""
        body = (f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{refused.code}</Code><Message>{refused.message}"
                f"</Message>{details}</Error>")
        return self._answer(refused.status, body.encode(), {"Content-Type": "application/xml"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None,
                length: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD" and status != 204:
            self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""


def _unpacked(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _crc32c(data: bytes) -> str:
    import google_crc32c

    return base64.b64encode(google_crc32c.Checksum(data).digest()).decode()


def _serve() -> None:
    _Handler.gate = _Gate(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    announce(server.server_address[1])
    server.serve_forever()


if __name__ == "__main__":
    _serve()
