"""Stores of objects on loopback, our signers of URLs for them, and the clients that people use there without us.

S3 is rclone's server (``rclone serve s3``), which checks each signature; Google is the emulator of the tests, with its
gate: slow, as it keeps objects in Python.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tests.gcs_server import GcsServer, service_account
from tests.s3_server import ACCESS_KEY, REGION, SECRET_KEY
from tests.store_server import BUCKET

from benchmarks.moving import CHANNEL
from benchmarks.objects import CHUNK_SIZE_BYTES, CONCURRENCY, program
from kachery_fast.cli.lab import free_port
from kachery_fast.config import load_settings
from kachery_fast.hub.engines import BucketEngine
from kachery_fast.hub.engines.gcs import GcsBucket
from kachery_fast.hub.engines.gcs_settings import GcsCredentials, GcsSettings, check_gcs_credentials
from kachery_fast.hub.engines.s3 import S3Bucket
from kachery_fast.hub.engines.s3_settings import S3Credentials, S3Settings
from kachery_fast.hub.outbound import Outbound

__all__ = [
    "Boto3", "Google", "Opener", "Rclone", "Store", "by_account", "by_hmac_key", "open_gcs", "open_s3",
    "s3_bucket", "s3_client",
]


class Rival(Protocol):
    """Another client of a store. ``names`` are those of objects, and of files below ``folder``."""

    name: str

    def upload(self, folder: Path, names: list[str]) -> None:
        """Send each file."""

    def download(self, folder: Path, names: list[str]) -> None:
        """Fetch each object, verified no further than the client does it by itself."""


class Store(NamedTuple):
    """A running store: our signer of URLs for it, the other client, and what it is."""

    bucket: BucketEngine
    rival: Rival
    about: str

    def empty(self) -> None:
        """Remove what there is, by the store's own API."""
        self.bucket.remove_channel(CHANNEL)


Opener = Callable[[Path], AbstractContextManager[Store]]


# --- S3


class Boto3:
    """boto3's transfer manager, told to send neither checksums nor a digest of each body."""

    name = "boto3's transfer manager"

    def __init__(self, url: str) -> None:
        from boto3.s3.transfer import TransferConfig, create_transfer_manager

        self._client = s3_client(url)
        self._manager = partial(create_transfer_manager, self._client, TransferConfig(
            multipart_threshold=4 * CHUNK_SIZE_BYTES, max_concurrency=CONCURRENCY))

    def upload(self, folder: Path, names: list[str]) -> None:
        """See ``Rival``."""
        with self._manager() as manager:
            for sent in [manager.upload(str(folder / name), BUCKET, name) for name in names]:
                sent.result()

    def download(self, folder: Path, names: list[str]) -> None:
        """See ``Rival``."""
        _make_folders(folder, names)
        with self._manager() as manager:
            for fetched in [manager.download(BUCKET, name, str(folder / name)) for name in names]:
                fetched.result()


class Rclone:
    """``rclone copy`` of all there is, told to send and compare no checksums and to look at nothing beforehand."""

    name = "rclone copy"

    def __init__(self, url: str) -> None:
        self._command = [
            program("rclone"), "copy", "--config", os.devnull, "--transfers", str(CONCURRENCY), "--retries", "1",
            "--no-check-dest", "--ignore-checksum", "--s3-provider", "Rclone", "--s3-endpoint", url,
            "--s3-region", REGION, "--s3-access-key-id", ACCESS_KEY, "--s3-secret-access-key", SECRET_KEY,
            "--s3-use-unsigned-payload", "true", "--s3-disable-checksum", "--s3-no-check-bucket", "--s3-no-head",
            "--s3-upload-cutoff", "64M"]

    def upload(self, folder: Path, names: list[str]) -> None:
        """See ``Rival``."""
        subprocess.run([*self._command, folder, f":s3:{BUCKET}"], check=True)

    def download(self, folder: Path, names: list[str]) -> None:
        """See ``Rival``."""
        subprocess.run([*self._command, f":s3:{BUCKET}", folder], check=True)


def s3_client(url: str, region: str = REGION) -> Any:
    """boto3's client of the S3 server at a URL, without checksums."""
    import boto3
    from botocore.config import Config

    return boto3.client("s3", region_name=region, endpoint_url=url, aws_access_key_id=ACCESS_KEY,
                        aws_secret_access_key=SECRET_KEY, config=Config(
                            signature_version="s3v4", request_checksum_calculation="when_required",
                            response_checksum_validation="when_required",
                            s3={"addressing_style": "path", "payload_signing_enabled": False}))


def s3_bucket(url: str) -> S3Bucket:
    """Our signer for it, as the hub has it."""
    return S3Bucket(S3Settings(BUCKET, url, REGION, path_style=True), S3Credentials(ACCESS_KEY, SECRET_KEY),
                    _outbound(), ThreadPoolExecutor(1), time.time)


@contextmanager
def open_s3(rival: Callable[[str], Rival], place: Path) -> Iterator[Store]:
    """rclone's server, whose objects are files below ``place``.

    It compares neither what it has written with what came, nor hashes an object to answer a GET.
    """
    root = place / "s3" / BUCKET
    root.mkdir(parents=True)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([
        program("rclone"), "serve", "s3", root.parent, "--config", os.devnull, "--addr", f"127.0.0.1:{port}",
        "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", "--etag-hash", "", "--ignore-checksum", "--log-level", "CRITICAL"])
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except ConnectionRefusedError:
                if process.poll() is not None:
                    raise
                time.sleep(0.02)
        yield Store(s3_bucket(url), rival(url), "S3 (rclone's server)")
    finally:
        process.terminate()
        process.wait(20)


def _make_folders(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)


# --- Google


class Google:
    """google-cloud-storage's transfer manager, as it comes but in threads: it would start processes anew each time."""

    name = "google-cloud-storage's transfer manager"

    def __init__(self, url: str) -> None:
        from tests.google import google_client

        self._bucket = google_client(url).bucket(BUCKET)

    def upload(self, folder: Path, names: list[str]) -> None:
        """See ``Rival``."""
        from google.cloud.storage import transfer_manager

        self._check(transfer_manager.upload_many(
            [(str(folder / name), self._bucket.blob(name)) for name in names],
            worker_type=transfer_manager.THREAD, max_workers=CONCURRENCY))

    def download(self, folder: Path, names: list[str]) -> None:
        """See ``Rival``."""
        from google.cloud.storage import transfer_manager

        _make_folders(folder, names)
        self._check(transfer_manager.download_many(
            [(self._bucket.blob(name), str(folder / name)) for name in names],
            worker_type=transfer_manager.THREAD, max_workers=CONCURRENCY))

    @staticmethod
    def _check(outcomes: list[Exception | None]) -> None:
        for outcome in outcomes:
            if outcome is not None:
                raise outcome


def by_account(url: str = "") -> GcsBucket:
    """Our signer for Google, or the server at a URL, by the key of a service account."""
    return _gcs_bucket(check_gcs_credentials(service_account(), "", ""), url)


def by_hmac_key(url: str = "") -> GcsBucket:
    """The same by an HMAC key."""
    return _gcs_bucket(GcsCredentials(access_key=ACCESS_KEY, secret_key=SECRET_KEY), url)


def _gcs_bucket(credentials: GcsCredentials, url: str) -> GcsBucket:
    return GcsBucket(GcsSettings(BUCKET, url), credentials, _outbound(), ThreadPoolExecutor(1), time.time,
                     CHUNK_SIZE_BYTES)


def _outbound() -> Outbound:
    return Outbound(load_settings({}, hub_engine_hosts="127.0.0.1"))


@contextmanager
def open_gcs(place: Path) -> Iterator[Store]:
    """Google's emulator, in memory."""
    with GcsServer.running() as server:
        yield Store(by_account(server.url), Google(server.url), "Google's emulator")
