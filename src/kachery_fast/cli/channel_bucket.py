"""``kachery-fast channel bucket | engines | test``: buckets of a channel's owner's, what else he has at the hub, and
whether it works."""

from __future__ import annotations

import configparser
from pathlib import Path
from typing import Any

import click

from ..errors import DiskError, EngineUnusable, InvalidArgument
from .output import command_errors, emit
from .owner import ask_hub, hub_options, read_secret

__all__ = ["bucket", "end_of_test", "engines", "steps_of", "test_option", "try_"]


_credentials_option = click.option(
    "--credentials", metavar="FILE", help="Of S3: the access key and its secret, as in ~/.aws/credentials; of Google: "
                                          "a service account's key file (JSON).")
_hmac_option = click.option(
    "--hmac", "hmac_key", metavar="FILE", help="Of Google: an HMAC key, kept as an access key of S3 is; URLs are "
                                               "signed faster by it. With or without --credentials.")
_profile_option = click.option("--profile", default="default", show_default=True, help="The section of that file.")
test_option = click.option(
    "--test/--no-test", "tested", default=None,
    help="Whether to test it then, as kachery-fast channel test NAME does. [default: where the hub did not know it]")


@click.command()
@click.argument("name")
@click.option("--s3", "s3_bucket", metavar="BUCKET", help="Use this bucket, which speaks S3; needs --credentials.")
@click.option("--gcs", "gcs_bucket", metavar="BUCKET", help="Use this one of Google Cloud Storage; needs --credentials "
                                                            "or --hmac.")
@click.option("--folder", metavar="DIRECTORY", help="Use this folder, which the machines of the hub and of all nodes "
                                                    "have at the same path.")
@click.option("--use", "used", metavar="BUCKET", help="Use one that the hub knows (kachery-fast channel engines).")
@click.option("--own", is_flag=True, help="Use the hub's own bucket.")
@click.option("--endpoint", default="", metavar="URL", help="The server of the bucket. [default: Amazon's, Google's]")
@click.option("--region", default="", help="The region of the bucket; Amazon's want it.")
@_credentials_option
@_hmac_option
@_profile_option
@click.option("--expire-days", type=click.IntRange(1), metavar="N", help="Of Google: objects below --prefix go at this "
                                                                        "age.")
@click.option("--prefix", default="", help="Before the names of all objects.")
@click.option("--path-style/--host-style", default=None, help="Whether URLs name the bucket in their path, or in the "
                                                              "host's name. [default: in the path, but for Amazon's]")
@click.option("--public-reads", is_flag=True, help="Everybody may read there who knows a name; reads are not signed.")
@click.option("--no-create-only", is_flag=True, help="The store does not know If-None-Match.")
@test_option
@click.option("--as", "known_as", metavar="NAME", help="What to call it at the hub. [default: as the bucket]")
@hub_options
@command_errors
def bucket(
    name: str, s3_bucket: str | None, gcs_bucket: str | None, folder: str | None, used: str | None, own: bool,
    hub_url: str | None, token: str | None, as_json: bool, known_as: str | None, tested: bool | None, **options: Any,
) -> None:
    """Show which bucket the channel NAME uses, or have it use another one: --s3, --gcs, --folder, --use or --own.

    The other bucket begins empty, as far as the channel is concerned; nodes upload again what is asked for. The hub
    keeps the credentials encrypted, signs URLs with them, and shows them to nobody. One of Google's is also set up, for
    browsers that read, and for --expire-days. One that the hub did not know is tested, and the command ends with exit
    code 5 if something is wrong.
    """
    if [s3_bucket, gcs_bucket, folder, used, own or None].count(None) < 4:
        raise InvalidArgument(what="Choose one of --s3, --gcs, --folder, --use and --own.")
    done: dict[str, Any] = {}
    if s3_bucket is not None:
        used = ask_hub(hub_url, token, "addS3Bucket", name=known_as or s3_bucket, bucket=s3_bucket,
                       **_fields_of_s3(**options))["id"]
    elif gcs_bucket is not None:
        fields = _fields_of_gcs(**options)
        used = ask_hub(hub_url, token, "addGcsBucket", name=known_as or gcs_bucket, bucket=gcs_bucket, **fields)["id"]
        if fields["serviceAccount"]:
            done["setUp"] = ask_hub(hub_url, token, "setUpBucket", engine=used)
    elif folder is not None and not any(value for option, value in options.items() if option != "profile"):
        used = ask_hub(hub_url, token, "addDirectoryBucket", name=known_as or Path(folder).name, folder=folder)["id"]
    elif known_as or any(value for option, value in options.items() if option != "profile"):
        raise InvalidArgument(what="Name the bucket that this is said of, with --s3 or --gcs; a folder has none of it.")
    if used is None and not own:
        answer = ask_hub(hub_url, token, "showChannel", channel=name)
        shown = {"channel": name, "name": answer["bucket"]}
    else:
        shown = ask_hub(hub_url, token, "setBucket", channel=name, engine=used)
    if tested or (tested is None and (s3_bucket or gcs_bucket or folder)):
        done["test"] = ask_hub(hub_url, token, "testChannel", channel=name)
    text = f"{name}: " + ("the hub's own bucket" if shown["name"] is None else f"the bucket {shown['name']!r}")
    emit({**shown, **done}, "\n".join([text, *(line for answer in done.values() for line in steps_of(answer))]),
         as_json)
    for answer in done.values():
        end_of_test(answer)


def _fields_of_s3(
    *, endpoint: str, region: str, credentials: str | None, hmac_key: str | None, profile: str, prefix: str,
    path_style: bool | None, public_reads: bool, no_create_only: bool, expire_days: int | None,
) -> dict[str, Any]:
    if credentials is None:
        raise InvalidArgument(what="--s3 needs --credentials FILE.")
    if hmac_key or expire_days:
        raise InvalidArgument(what="--hmac and --expire-days are for a bucket of Google's, --gcs.")
    return {"endpoint": endpoint, "region": region, "prefix": prefix, "pathStyle": path_style,
            "publicReads": public_reads, "createOnly": not no_create_only, **_read_credentials(credentials, profile)}


def _fields_of_gcs(
    *, endpoint: str, region: str, credentials: str | None, hmac_key: str | None, profile: str, prefix: str,
    path_style: bool | None, public_reads: bool, no_create_only: bool, expire_days: int | None,
) -> dict[str, Any]:
    if credentials is None and hmac_key is None:
        raise InvalidArgument(what="--gcs needs --credentials FILE, or --hmac FILE, or both.")
    if region or path_style is not None or no_create_only:
        raise InvalidArgument(what="--region, --path-style, --host-style and --no-create-only are for S3.")
    return {"endpoint": endpoint, "prefix": prefix, "publicReads": public_reads, "expireDays": expire_days or 0,
            **_keys_of_gcs(credentials, hmac_key, profile)}


def _keys_of_gcs(credentials: str | None, hmac_key: str | None, profile: str) -> dict[str, str]:
    return {"serviceAccount": "" if credentials is None else _read_file(credentials),
            **({} if hmac_key is None else _read_credentials(hmac_key, profile))}


@click.command("test")
@click.argument("name")
@hub_options
@command_errors
def try_(name: str, hub_url: str | None, token: str | None, as_json: bool) -> None:
    """Test the bucket and the messages of the channel NAME: do there what nodes do.

    An object is written, read, listed and removed by signed URLs, and a message is echoed. Ends with exit code 5 when
    something is wrong.
    """
    answer = ask_hub(hub_url, token, "testChannel", channel=name)
    emit(answer, lambda: "\n".join(steps_of(answer)), as_json)
    end_of_test(answer)


@click.command()
@click.option("--renew", metavar="NAME", help="Give this one other credentials; needs --credentials.")
@click.option("--remove", "removed", metavar="NAME", help="Have the hub forget this one; what is in a bucket stays.")
@click.option("--credentials", metavar="FILE", help="Of S3: the access key and its secret, as in ~/.aws/credentials; "
              "of Google: a service account's key file (JSON); else the API key, or the seed.")
@_hmac_option
@_profile_option
@hub_options
@command_errors
def engines(
    renew: str | None, removed: str | None, credentials: str | None, hmac_key: str | None, profile: str,
    hub_url: str | None, token: str | None, as_json: bool,
) -> None:
    """List your buckets and pub/sub services that the hub knows, and which channels use them; or change or remove one.
    """
    if renew is not None:
        kinds = {item[key]: item["kind"] for item in ask_hub(hub_url, token, "listEngines")["engines"]
                 for key in ("id", "name")}
        if credentials is None and (hmac_key is None or kinds.get(renew) != "gcs"):
            raise InvalidArgument(what="--renew needs --credentials FILE.")
        services = ask_hub(hub_url, token, "listPubsubs")["engines"]
        if any(renew in (item["id"], item["name"]) for item in services):
            answer = ask_hub(hub_url, token, "changePubsubCredentials", engine=renew,
                             secret=read_secret(credentials or ""))
        else:
            keys = _keys_of_gcs(credentials, hmac_key, profile) if kinds.get(renew) == "gcs" else _read_credentials(
                credentials or "", profile)
            answer = ask_hub(hub_url, token, "changeCredentials", engine=renew, **keys)
        emit(answer, f"{answer['name']!r} has other credentials now.", as_json)
        return
    if removed is not None:
        answer = ask_hub(hub_url, token, "removeEngine", engine=removed)
        emit(answer, f"The hub has forgotten {answer['name']!r}. What is in a bucket stays there.", as_json)
        return
    answer = ask_hub(hub_url, token, "listEngines")
    answer["pubsubs"] = ask_hub(hub_url, token, "listPubsubs")["engines"]
    emit(answer, lambda: "\n".join(_line(item) for item in [*answer["engines"], *answer["pubsubs"]])
         or "The hub knows no bucket and no pub/sub service of yours.", as_json)


def steps_of(answer: dict[str, Any]) -> list[str]:
    """What a test came to, line by line."""
    lines = []
    for step in answer["steps"]:
        took = f"{step['seconds']:6.2f} s" if "seconds" in step else " " * 8
        lines.append(f"  {took}  {step['name']}" + ("" if step["ok"] else f": FAILED, {step['why']}"))
        if step["advice"]:
            lines.append(f"            {step['advice']}")
    return lines


def end_of_test(answer: dict[str, Any]) -> None:
    """End the command with exit code 5 where a test has found something wrong."""
    if not answer["ok"]:
        click.get_current_context().exit(EngineUnusable.exit_code)


def _line(item: dict[str, Any]) -> str:
    users = f"used by {', '.join(item['channels'])}" if item["channels"] else "not used"
    return f"{item['name']}  {item['url']}  {users}"


def _read_credentials(path: str, profile: str) -> dict[str, str]:
    """Read an access key as Amazon's tools keep it; no error shows what is in the file."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(_read_file(path))
        section = parser[profile]
        return {"accessKey": section["aws_access_key_id"], "secretKey": section["aws_secret_access_key"]}
    except (configparser.Error, KeyError):
        raise InvalidArgument(what=f"{path} has no section [{profile}] with aws_access_key_id and "
                                   "aws_secret_access_key.") from None


def _read_file(path: str) -> str:
    try:
        return Path(path).expanduser().read_text("utf-8")
    except OSError as error:
        raise DiskError(action="reading", path=path, why=error.strerror) from None
    except UnicodeDecodeError:
        raise InvalidArgument(what=f"{path} holds no credentials.") from None
