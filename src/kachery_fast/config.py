"""Every limit and address of the program in one table, read once into a frozen object.

A setting has a name (units last), a default, a unit, an environment variable and a line of help.
``docs/settings.md`` is generated from the table and checked by a test.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import InvalidSetting
from .setting import Setting, convert

__all__ = ["SETTINGS", "Setting", "Settings", "load_settings"]

MIB = 1024 * 1024


@dataclass(frozen=True)
class Settings:
    """The values in force. Field names are those of the table; sizes are bytes, times are seconds."""

    storage_dir: Path
    offline_storage_dir: str
    node_host: str
    node_port: int
    node_names: str
    node_private_key: str = field(repr=False)
    channel: str
    direct_hub: str
    hub_dir: Path
    hub_host: str
    hub_port: int
    hub_token: str
    hub_connections_max: int
    hub_database: str
    hub_key_file: str
    hub_bucket_dir: str
    hub_bucket_folders: str
    hub_engine_hosts: str
    hub_oidc_issuer: str
    hub_oidc_client_id: str
    hub_oidc_client_secret: str = field(repr=False)
    hub_oidc_name: str
    hub_oidc_allowed: str
    sha1_kernel: str
    chunk_size_bytes: int
    upload_concurrency: int
    download_concurrency: int
    small_read_size_bytes: int
    fingerprint_size_bytes: int
    partial_keep_days: float
    cache_size_bytes_max: int
    cache_keep_seconds: float
    cache_check_seconds: float
    trash_keep_days: float
    client_auth_seconds: float
    client_auth_code: str
    client_auth_file: str
    client_auth_group: str
    connect_timeout_seconds: float
    stall_seconds: float
    retry_attempts_max: int
    retry_base_seconds: float
    retry_cap_seconds: float
    url_life_seconds: float
    sign_batch_max: int
    sign_rate_per_node_max: float
    token_life_seconds: float
    message_size_bytes_max: int
    message_age_seconds_max: float
    publish_timeout_seconds: float
    offer_wait_seconds: float
    offer_gather_seconds: float
    want_rounds_max: int
    patience_seconds: float
    provider_silence_seconds: float
    provider_stall_seconds: float
    stripe_providers_max: int
    progress_interval_seconds: float
    ready_batch_seconds: float
    assign_chunks_max: int
    provide_requests_max: int
    load_requests_max: int
    corrupt_retries_max: int
    absent_probes_max: int
    channel_refresh_seconds: float
    feed_message_size_bytes_max: int
    feed_batch_size_bytes_max: int
    feed_subscription_seconds: float
    feed_renew_seconds: float
    feed_relay_wait_seconds: float
    feed_push_interval_seconds: float
    feed_followed_max: int
    mutable_size_bytes_max: int
    task_kwargs_size_bytes_max: int
    task_result_size_bytes_max: int
    task_lease_seconds: float
    task_requests_max: int
    task_keep_seconds: float
    task_workers: int
    api_body_size_bytes_max: int
    bucket_connections_max: int
    bucket_rate_bytes_max: int


SETTINGS: tuple[Setting, ...] = (
    Setting("storage_dir", "~/kachery-storage", "path", "KACHERY_STORAGE_DIR",
            "The local store: files, keys and the node's configuration."),
    Setting("offline_storage_dir", "", "directory", "KACHERY_OFFLINE_STORAGE_DIR",
            "Work offline: this directory, which must exist, is the local store; no node is asked. Empty: online."),
    Setting("node_host", "127.0.0.1", "host", "KACHERY_DAEMON_HOST",
            "Where the node's local API listens, and where clients look for it."),
    Setting("node_port", 20431, "port", "KACHERY_DAEMON_PORT", "The port of the node's local API."),
    Setting("node_names", "", "names", "KACHERY_NODE_NAMES",
            "Names by which clients of other machines reach this node, besides its address; with spaces or commas."),
    Setting("node_private_key", "", "secret key", "KACHERY_NODE_PRIVATE_KEY",
            "The node's identity, 64 hex digits (node key makes one), kept in no file. Empty: it is in private.pem."),
    Setting("channel", "", "name", "KACHERY_CHANNEL", "The channel to ask on when none is named."),
    Setting("direct_hub", "", "URL", "KACHERY_DIRECT_HUB",
            "A hub from whose channels' buckets clients load straight, without a node. Empty: they ask the node."),
    Setting("hub_dir", "~/kachery-hub", "path", "KACHERY_HUB_DIR",
            "Everything a hub keeps: its registry, its keys, the embedded bucket."),
    Setting("hub_host", "127.0.0.1", "host", "KACHERY_HUB_HOST",
            "The address a hub listens on; 0.0.0.0 for other machines."),
    Setting("hub_port", 20440, "port", "KACHERY_HUB_PORT", "The port of the hub."),
    Setting("hub_token", "", "secret", "KACHERY_HUB_TOKEN",
            "The owner's token for channel commands; found in the hub's directory when on its machine."),
    Setting("hub_connections_max", 10000, "count", "KACHERY_HUB_CONNECTIONS_MAX",
            "Connections that a hub holds at once, those to the bucket apart; beyond, who has most gives up "
            "some.", minimum=16),
    Setting("hub_database", "", "secret URL", "KACHERY_HUB_DATABASE",
            "The hub's registry: postgresql://USER:PASSWORD@HOST/DATABASE. Empty: hub.db in the hub's directory."),
    Setting("hub_key_file", "", "file", "KACHERY_HUB_KEY_FILE",
            "The key that all hubs on one PostgreSQL share, 64 hex digits. Empty: hub-key in the hub's directory."),
    Setting("hub_bucket_dir", "", "directory", "KACHERY_HUB_BUCKET_DIR",
            "Where the embedded bucket's objects are, if several hubs share them. Empty: in the hub's directory."),
    Setting("hub_bucket_folders", "", "directories", "KACHERY_HUB_BUCKET_FOLDERS",
            "Folders that owners of channels may have as buckets, and what is below them; separated as in PATH."),
    Setting("hub_engine_hosts", "", "names", "KACHERY_HUB_ENGINE_HOSTS",
            "Hosts of owners' buckets and pub/sub services that the hub connects to though their addresses are private "
            "ones, as HOST or HOST:PORT; with spaces or commas."),
    Setting("hub_oidc_issuer", "", "URL", "KACHERY_HUB_OIDC_ISSUER",
            "The OpenID Connect provider that people sign in by, such as https://accounts.google.com. Empty: they sign "
            "in by links of the hub."),
    Setting("hub_oidc_client_id", "", "name", "KACHERY_HUB_OIDC_CLIENT_ID",
            "What the provider calls this hub; it was told when the hub was registered there."),
    Setting("hub_oidc_client_secret", "", "secret", "KACHERY_HUB_OIDC_CLIENT_SECRET",
            "By which the provider knows the hub. Empty: it is registered without one."),
    Setting("hub_oidc_name", "", "name", "KACHERY_HUB_OIDC_NAME",
            "What the button for signing in calls the provider. Empty: its host name."),
    Setting("hub_oidc_allowed", "", "addresses", "KACHERY_HUB_OIDC_ALLOWED",
            "Who may make an account: e-mail addresses, or @example.org for all of a domain; with spaces or commas. "
            "Empty: everybody whom the provider knows."),
    Setting("sha1_kernel", "", "name", "KACHERY_SHA1_KERNEL",
            "Demand one SHA-1 kernel: sha-ni, armv8 or portable. Empty: the best that this CPU has."),
    Setting("chunk_size_bytes", 20 * MIB, "bytes", "KACHERY_CHUNK_SIZE_BYTES",
            "The length of a chunk in new manifests; a multiple of 64.", minimum=64),
    Setting("upload_concurrency", 4, "count", "KACHERY_UPLOAD_CONCURRENCY",
            "Objects a node uploads at once.", minimum=1),
    Setting("download_concurrency", 4, "count", "KACHERY_DOWNLOAD_CONCURRENCY",
            "Chunks a node downloads at once, over all its transfers.", minimum=1),
    Setting("small_read_size_bytes", MIB, "bytes", "KACHERY_SMALL_READ_SIZE_BYTES",
            "The span of one read or write on a socket or a file.", minimum=4096),
    Setting("fingerprint_size_bytes", 65536, "bytes", "KACHERY_FINGERPRINT_SIZE_BYTES",
            "How much of a linked file's head and of its tail is fingerprinted.", minimum=1),
    Setting("partial_keep_days", 7.0, "days", "KACHERY_PARTIAL_KEEP_DAYS",
            "How long an unfinished download is kept for a later resume."),
    Setting("cache_size_bytes_max", 0, "bytes", "KACHERY_CACHE_SIZE_BYTES_MAX",
            "What copies fetched from channels may take in the store; 0: as maxCacheSizeGiB in kachery.yaml says, and "
            "without that no bound."),
    Setting("cache_keep_seconds", 600.0, "seconds", "KACHERY_CACHE_KEEP_SECONDS",
            "A copy that came or was used within this time is not evicted."),
    Setting("cache_check_seconds", 60.0, "seconds", "KACHERY_CACHE_CHECK_SECONDS",
            "How often a node looks whether there are more copies than may be.", minimum=0.05),
    Setting("trash_keep_days", 1.0, "days", "KACHERY_TRASH_KEEP_DAYS",
            "How long the node keeps what was evicted or removed in the trash."),
    Setting("client_auth_seconds", 180.0, "seconds", "KACHERY_CLIENT_AUTH_SECONDS",
            "How often the code in the file client-auth changes; the one before stays valid.", minimum=1),
    Setting("client_auth_code", "", "secret", "KACHERY_CLIENT_AUTH_CODE",
            "A lasting code that the node's owner has admitted, for clients that cannot read the file client-auth."),
    Setting("client_auth_file", "", "file", "KACHERY_CLIENT_AUTH_FILE",
            "Where clients read the node's code; empty: the file client-auth of the local store."),
    Setting("client_auth_group", "", "name", "KACHERY_CLIENT_AUTH_GROUP",
            "The group, by name or number, that the node hands the file client-auth to; empty: as the system does."),
    Setting("connect_timeout_seconds", 10.0, "seconds", "KACHERY_CONNECT_TIMEOUT_SECONDS",
            "How long a connection may take to open.", minimum=0.01),
    Setting("stall_seconds", 30.0, "seconds", "KACHERY_STALL_SECONDS",
            "A transfer without a byte for this long is broken off and tried again.", minimum=0.01),
    Setting("retry_attempts_max", 5, "count", "KACHERY_RETRY_ATTEMPTS_MAX",
            "How often one HTTP exchange with hub or bucket is tried.", minimum=1),
    Setting("retry_base_seconds", 0.25, "seconds", "KACHERY_RETRY_BASE_SECONDS",
            "The first pause between tries; it doubles, with full jitter."),
    Setting("retry_cap_seconds", 15.0, "seconds", "KACHERY_RETRY_CAP_SECONDS",
            "The longest pause between tries."),
    Setting("url_life_seconds", 300.0, "seconds", "KACHERY_URL_LIFE_SECONDS",
            "How long a signed URL is valid.", minimum=1),
    Setting("sign_batch_max", 64, "count", "KACHERY_SIGN_BATCH_MAX",
            "Signed URLs asked for, and given, in one request to the hub.", minimum=1),
    Setting("sign_rate_per_node_max", 200.0, "URLs per second", "KACHERY_SIGN_RATE_PER_NODE_MAX",
            "Upload URLs a hub gives one node, averaged over ten seconds; of those for reading, ten times as many.",
            minimum=1),
    Setting("token_life_seconds", 900.0, "seconds", "KACHERY_TOKEN_LIFE_SECONDS",
            "How long a pub/sub token is valid; it is renewed before it ends.", minimum=1),
    Setting("message_size_bytes_max", 60000, "bytes", "KACHERY_MESSAGE_SIZE_BYTES_MAX",
            "The longest message on a band, signature included.", minimum=1024),
    Setting("message_age_seconds_max", 120.0, "seconds", "KACHERY_MESSAGE_AGE_SECONDS_MAX",
            "Older signed messages, and ones from the future, are refused.", minimum=1),
    Setting("publish_timeout_seconds", 10.0, "seconds", "KACHERY_PUBLISH_TIMEOUT_SECONDS",
            "How long a message on a band is tried before the channel is called unreachable.", minimum=0.01),
    Setting("offer_wait_seconds", 3.0, "seconds", "KACHERY_OFFER_WAIT_SECONDS",
            "How long to wait for a first offer before asking again.", minimum=0.01),
    Setting("offer_gather_seconds", 0.1, "seconds", "KACHERY_OFFER_GATHER_SECONDS",
            "How long to wait for further offers after the first."),
    Setting("want_rounds_max", 2, "count", "KACHERY_WANT_ROUNDS_MAX",
            "How often a channel is asked when nobody has answered at all.", minimum=1),
    Setting("patience_seconds", 45.0, "seconds", "KACHERY_PATIENCE_SECONDS",
            "How long to go on asking after every provider of a begun transfer was lost.", minimum=0.01),
    Setting("provider_silence_seconds", 8.0, "seconds", "KACHERY_PROVIDER_SILENCE_SECONDS",
            "A provider not heard of for this long is given up, and its chunks asked for elsewhere.",
            minimum=0.01),
    Setting("provider_stall_seconds", 600.0, "seconds", "KACHERY_PROVIDER_STALL_SECONDS",
            "A provider that says it is at work, but brings no chunk for this long, is given up.", minimum=0.01),
    Setting("stripe_providers_max", 8, "count", "KACHERY_STRIPE_PROVIDERS_MAX",
            "Providers that work on one request at the same time.", minimum=1),
    Setting("progress_interval_seconds", 1.0, "seconds", "KACHERY_PROGRESS_INTERVAL_SECONDS",
            "How often a provider says how far it is.", minimum=0.01),
    Setting("ready_batch_seconds", 0.25, "seconds", "KACHERY_READY_BATCH_SECONDS",
            "A provider announces uploaded chunks at most this often for each request."),
    Setting("assign_chunks_max", 64, "count", "KACHERY_ASSIGN_CHUNKS_MAX",
            "Chunks assigned to one provider at a time.", minimum=1),
    Setting("provide_requests_max", 64, "count", "KACHERY_PROVIDE_REQUESTS_MAX",
            "Requests a provider serves at once; further ones are told that it is busy.", minimum=1),
    Setting("load_requests_max", 256, "count", "KACHERY_LOAD_REQUESTS_MAX",
            "Files a node loads at once; further ones wait.", minimum=1),
    Setting("corrupt_retries_max", 3, "count", "KACHERY_CORRUPT_RETRIES_MAX",
            "How often one chunk may arrive damaged before the load fails.", minimum=1),
    Setting("absent_probes_max", 4, "count", "KACHERY_ABSENT_PROBES_MAX",
            "Chunks in a row that the bucket lacks before the others are taken to be absent too.", minimum=1),
    Setting("channel_refresh_seconds", 30.0, "seconds", "KACHERY_CHANNEL_REFRESH_SECONDS",
            "How often a node asks its hubs for its channels and their members.", minimum=0.1),
    Setting("feed_message_size_bytes_max", MIB, "bytes", "KACHERY_FEED_MESSAGE_SIZE_BYTES_MAX",
            "The longest message of a feed, as canonical JSON. What is longer belongs into a file, by its URI.",
            minimum=1024),
    Setting("feed_batch_size_bytes_max", 64 * MIB, "bytes", "KACHERY_FEED_BATCH_SIZE_BYTES_MAX",
            "The longest batch of messages that is appended in one call.", minimum=1024),
    Setting("feed_subscription_seconds", 60.0, "seconds", "KACHERY_FEED_SUBSCRIPTION_SECONDS",
            "How long an owner pushes new messages after a reader last asked for them.", minimum=0.1),
    Setting("feed_renew_seconds", 20.0, "seconds", "KACHERY_FEED_RENEW_SECONDS",
            "How often a reader that follows a subfeed asks anew.", minimum=0.05),
    Setting("feed_relay_wait_seconds", 1.0, "seconds", "KACHERY_FEED_RELAY_WAIT_SECONDS",
            "How long a node with a copy waits for the owner's answer before it answers itself."),
    Setting("feed_push_interval_seconds", 0.02, "seconds", "KACHERY_FEED_PUSH_INTERVAL_SECONDS",
            "An owner pushes new messages at most this often for each subfeed; what comes between goes together."),
    Setting("feed_followed_max", 1000, "count", "KACHERY_FEED_FOLLOWED_MAX",
            "Subfeeds of other nodes that a node follows at once.", minimum=1),
    Setting("mutable_size_bytes_max", MIB, "bytes", "KACHERY_MUTABLE_SIZE_BYTES_MAX",
            "The longest value of a mutable, as JSON. What is longer belongs into a file, by its URI.", minimum=64),
    Setting("task_kwargs_size_bytes_max", 32768, "bytes", "KACHERY_TASK_KWARGS_SIZE_BYTES_MAX",
            "The longest arguments of a task, as canonical JSON. What is longer belongs into a file, by its URI.",
            minimum=64),
    Setting("task_result_size_bytes_max", MIB, "bytes", "KACHERY_TASK_RESULT_SIZE_BYTES_MAX",
            "The longest result that is kept in the answer itself; a longer one becomes a file, passed by its URI.",
            minimum=64),
    Setting("task_lease_seconds", 20.0, "seconds", "KACHERY_TASK_LEASE_SECONDS",
            "How long a node that fell silent keeps a task to itself.", minimum=0.2),
    Setting("task_requests_max", 10000, "count", "KACHERY_TASK_REQUESTS_MAX",
            "Tasks that a node keeps in mind at once, its own requests and those it runs for others each.", minimum=1),
    Setting("task_keep_seconds", 3600.0, "seconds", "KACHERY_TASK_KEEP_SECONDS",
            "How long a node remembers a task of its own that has ended."),
    Setting("task_workers", 0, "count", "KACHERY_TASK_WORKERS",
            "Functions that a task backend runs at once in its own process pool; 0: as many as the machine has CPUs."),
    Setting("api_body_size_bytes_max", 4 * MIB, "bytes", "KACHERY_API_BODY_SIZE_BYTES_MAX",
            "The longest JSON body that a node or a hub reads.", minimum=1024),
    Setting("bucket_connections_max", 128, "count", "KACHERY_BUCKET_CONNECTIONS_MAX",
            "Connections the embedded bucket serves at once.", minimum=1),
    Setting("bucket_rate_bytes_max", 0, "bytes per second", "KACHERY_BUCKET_RATE_BYTES_MAX",
            "What the embedded bucket gives to all downloads together, and to all uploads together; 0: no bound."),
)

# How the directory of offline_storage_dir is read, which unlike other paths may be absent.
_OFFLINE_STORE = Setting("offline_storage_dir", "", "path", "KACHERY_OFFLINE_STORAGE_DIR", "The store, offline.")


def load_settings(environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
    """Read the settings: defaults, then the environment, then ``overrides`` by name (``None`` is no override).

    :param environ: the environment to read, ``os.environ`` when None.
    :raises InvalidSetting: a value is not of the setting's type, not from its minimum to its maximum, or of an unknown
        name; or the directory of offline_storage_dir is not there.
    """
    if environ is None:
        # A copy: looking up what os.environ lacks costs a microsecond each, and clients read the settings at each call.
        environ = dict(os.environ)
        if not overrides and "HOME" in environ:
            return _read_again(environ)
    known = {setting.name for setting in SETTINGS}
    for name in overrides:
        if name not in known:
            raise InvalidSetting(name=name, value=overrides[name], source="a call", why="there is no such setting")
    values: dict[str, Any] = {}
    for setting in SETTINGS:
        text = environ.get(setting.env, "")
        if overrides.get(setting.name) is not None:
            value = convert(setting, overrides[setting.name], "a call")
        elif text != "":
            value = convert(setting, text, f"the environment variable {setting.env}")
        elif setting.unit == "path":  # with the home directory of now
            value = convert(setting, setting.default, "the defaults")
        else:
            value = setting.default
        values[setting.name] = value
    if values["offline_storage_dir"] and overrides.get("storage_dir") is None:
        values["storage_dir"] = convert(_OFFLINE_STORE, values["offline_storage_dir"],
                                         "the setting offline_storage_dir")
        _check_offline_store(values["offline_storage_dir"], values["storage_dir"])
    settings = Settings(**values)
    if settings.chunk_size_bytes % 64:
        raise InvalidSetting(name="chunk_size_bytes", value=settings.chunk_size_bytes, source="the settings",
                             why="it must be a multiple of 64")
    return settings


_latest: tuple[Mapping[str, str], str, Settings] | None = None


def _read_again(environ: Mapping[str, str]) -> Settings:
    """Return the settings: those of the last call, in half the time, while what they depend on is the same."""
    global _latest
    try:
        folder = str(Path.cwd())  # where relative paths begin
    except OSError:
        folder = ""
    latest = _latest
    if latest is None or latest[1] != folder or latest[0] != environ:
        latest = _latest = (environ, folder, load_settings(environ))
    elif latest[2].offline_storage_dir:
        _check_offline_store(latest[2].offline_storage_dir, latest[2].storage_dir)
    return latest[2]


def _check_offline_store(value: str, path: Path) -> None:
    """An offline store is often on a disk that is carried about; without it, files would land in its mount point.

    :raises InvalidSetting: there is no such directory.
    """
    if not path.is_dir():
        raise InvalidSetting(name=_OFFLINE_STORE.name, value=value, source=f"the environment variable "
                             f"{_OFFLINE_STORE.env}", why="there is no such directory. Is its disk mounted? A new "
                             "store begins as an empty directory that you make")


if {setting.name for setting in SETTINGS} != {field.name for field in fields(Settings)}:  # pragma: no cover
    raise AssertionError("the settings table and the Settings object differ")
