"""``kachery-fast hub``: run a hub, stop one, move one."""

from __future__ import annotations

import asyncio
import getpass
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ..config import Settings, load_settings
from ..errors import ActionRefused, HubError, InvalidArgument, NotOnHub
from ..protocol.names import check_channel_name, check_owner_id
from .background import start_detached
from .output import command_errors, emit, json_option
from .owner import read_hub_file

if TYPE_CHECKING:
    from ..hub.app import Hub

__all__ = ["hub"]

# The invitation that a first start prints is for everybody in the lab, for a week.
_INVITATION_DAYS = 7
_STOP_SECONDS = 15.0


class _Wish(NamedTuple):
    """What the caller wants to be there once the hub runs."""

    channel: str | None
    as_json: bool
    detached: bool


@click.group(invoke_without_command=True)
@click.option("--host", help="The address to listen on; 0.0.0.0 for other machines.")
@click.option("--port", type=click.IntRange(0, 65535), help="The port to listen on; 0: the system picks one.")
@click.option("--dir", "directory", type=click.Path(path_type=Path), help="Where the hub keeps everything.")
@click.option("--channel", metavar="NAME", help="Make this channel when missing, and an invitation to it.")
@click.option("--owner", metavar="ID", help="Who owns the hub's channels, at its first start. [default: you@machine]")
@click.option("--public-url", metavar="URL", help="The hub's address as other machines know it, behind a proxy.")
@click.option("--detach", is_flag=True, help="Run in the background; stop it with: kachery-fast hub stop")
@click.option("--verbose", "-v", is_flag=True, help="Log every request that changes something or is refused.")
@json_option
@click.pass_context
@command_errors
def hub(
    context: click.Context, host: str | None, port: int | None, directory: Path | None, channel: str | None,
    owner: str | None, public_url: str | None, detach: bool, verbose: bool, as_json: bool,
) -> None:
    """Run a hub: registry, API, embedded bucket and embedded broker, on one port and in one directory.

    It prints its address and what to do next, and runs until Ctrl-C.
    """
    if context.invoked_subcommand is not None:
        context.obj = directory
        return
    settings = load_settings(hub_host=host, hub_port=port, hub_dir=directory)
    _require_packages()
    if channel is not None:
        check_channel_name(channel)
    if owner is not None:
        check_owner_id(owner)
    wish = _Wish(channel, as_json, detach)
    if detach:
        arguments = [*(["--owner", owner] if owner else []), *(["--public-url", public_url] if public_url else [])]
        _run_detached(settings, arguments)
        asyncio.run(_announce(settings, wish))
        return
    from ..net.loop import imports_kept, run_on_loop

    with imports_kept():
        from ..hub.app import run_hub

    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    async def check_owner(running: Hub) -> None:
        found = await running.ensure_owner(owner or _default_owner())
        if owner not in (None, found):
            raise InvalidArgument(what=f"The hub in {settings.hub_dir} belongs to {found}, not to {owner}.")

    async def ready(_running: Hub) -> None:
        try:
            await _announce(settings, wish)
        except ActionRefused as error:  # another admin closed the owner's account: the hub goes on for the others
            click.echo(f"The hub runs, but cannot tell what to do next: {error}", err=True)

    run_on_loop(run_hub(settings, public_url=public_url, prepare=check_owner, ready=ready))


@hub.command("sign-in", short_help="Make a link that signs somebody in on the website.")
@click.argument("owner", required=False)
@click.option("--dir", "directory", type=click.Path(path_type=Path), help="The hub's directory.")
@json_option
@click.pass_context
@command_errors
def sign_in(context: click.Context, owner: str | None, directory: Path | None, as_json: bool) -> None:
    """Make a link that signs OWNER in on the website of the hub that runs on this machine: once, within a day.

    Without OWNER it is for the owner of the hub; for another one an account is made when there is none.
    """
    settings = load_settings(hub_dir=directory or context.obj)
    answer = asyncio.run(_ask_own_hub(settings, owner))
    emit(answer, f"Open this in a browser; it signs {answer['owner']} in, once, within a day:\n    {answer['link']}",
         as_json)


async def _ask_own_hub(settings: Settings, owner: str | None) -> dict[str, Any]:
    from ..net.hub import OwnerClient

    url, token = (read_hub_file(settings.hub_dir, name) for name in ("address", "owner-token"))
    if url is None or token is None:
        raise NotOnHub(kind="process; none runs on the directory", name=str(settings.hub_dir),
                       advice="Start it with: kachery-fast hub")
    async with OwnerClient(url, token, settings) as client:
        name = owner or (await client.call("listChannels"))["owner"]
        return await client.call("addAccount", owner=name)


@hub.command("stop")
@click.option("--dir", "directory", type=click.Path(path_type=Path), help="The hub's directory.")
@json_option
@click.pass_context
@command_errors
def stop(context: click.Context, directory: Path | None, as_json: bool) -> None:
    """Stop the hub that runs on a directory of this machine."""
    from ..hub.directory import running_hub

    path = load_settings(hub_dir=directory or context.obj).hub_dir
    process_id = running_hub(path)
    if process_id is None:
        raise NotOnHub(kind="process; none runs on the directory", name=str(path), advice="Nothing was stopped.")
    os.kill(process_id, signal.SIGTERM)
    end = time.monotonic() + _STOP_SECONDS
    while running_hub(path) == process_id:
        if time.monotonic() > end:
            raise HubError(url=str(path), why=f"its process {process_id} did not end within {_STOP_SECONDS:g} s")
        time.sleep(0.05)
    emit({"stopped": process_id, "dir": str(path)}, "The hub was stopped.", as_json)


@hub.command("export")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--dir", "directory", type=click.Path(path_type=Path), help="The hub's directory.")
@click.option("--no-objects", is_flag=True, help="Leave out the objects of the embedded bucket.")
@json_option
@click.pass_context
@command_errors
def export(context: click.Context, file: Path, directory: Path | None, no_objects: bool, as_json: bool) -> None:
    """Write a whole hub into a new FILE: registry, key, and the objects of the embedded bucket.

    Whoever has FILE has the hub: it holds the hub's key. The hub may run meanwhile. The registry is written as at one
    moment; what is uploaded or removed later may be in the file or not.
    """
    settings = load_settings(hub_dir=directory or context.obj)
    _require_packages()
    from ..hub.moving import export_hub

    moved = export_hub(settings, file, objects=not no_objects)
    emit({"file": str(file), **moved._asdict()},
         f"{file} has the hub in {settings.hub_dir}: {moved.rows} rows, {moved.objects} objects. Keep it secret.",
         as_json)


@hub.command("import")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--dir", "directory", type=click.Path(path_type=Path), help="The hub's directory, to be made.")
@json_option
@click.pass_context
@command_errors
def import_(context: click.Context, file: Path, directory: Path | None, as_json: bool) -> None:
    """Make a hub of a FILE that hub export wrote, in an empty directory or database.

    It has the same owners, channels, nodes and objects; nodes go on when it answers at the old one's address. A FILE
    that is damaged leaves nothing.
    """
    settings = load_settings(hub_dir=directory or context.obj)
    _require_packages()
    from ..hub.moving import import_hub

    moved = asyncio.run(import_hub(settings, file, int(time.time() * 1000)))
    emit({"dir": str(settings.hub_dir), **moved._asdict()},
         f"The hub is in {settings.hub_dir}: {moved.rows} rows, {moved.objects} objects. Start it with: "
         "kachery-fast hub", as_json)


def _run_detached(settings: Settings, arguments: list[str]) -> None:
    from ..hub.directory import HubDirectory

    path = settings.hub_dir
    directory = HubDirectory(path)
    directory.acquire()
    directory.release()
    address = path / "address"
    command = [
        sys.executable, "-m", "kachery_fast", "hub", "--verbose", "--host", settings.hub_host,
        "--port", str(settings.hub_port), "--dir", str(path), *arguments]
    # Written last, once the owner is known to be the one that was asked for.
    start_detached(command, path / "hub.log", address.exists,
                   failed=lambda why: HubError(url=f"in {path}", why=why.rstrip(".")))


async def _announce(settings: Settings, wish: _Wish) -> None:
    """Make the channel that was asked for, and print where the hub is and what to do next."""
    from ..net.hub import OwnerClient

    path = settings.hub_dir
    url = (path / "address").read_text().strip()
    token = (path / "owner-token").read_text().strip()
    async with OwnerClient(url, token, settings) as client:
        standing = await client.call("listChannels")
        # Before anything else of the account: the link works once, and for a day.
        sign_in = await client.call("addAccount", owner=standing["owner"])
        answer: dict[str, Any] = {
            "signIn": sign_in["link"], "url": standing["hub"], "localUrl": url, "dir": str(path),
            "owner": standing["owner"], "ownerToken": str(path / "owner-token")}
        if wish.channel is not None:
            if wish.channel not in [item["name"] for item in standing["channels"]]:
                await client.call("createChannel", name=wish.channel)
            invitation = await client.call("invite", channel=wish.channel, uses=None, days=_INVITATION_DAYS)
            answer.update(channel=wish.channel, invitation=invitation["code"], link=invitation["link"])
    emit(answer, _next_steps(answer, wish), wish.as_json)
    sys.stdout.flush()


def _next_steps(answer: dict[str, Any], wish: _Wish) -> str:
    end = "Stop it with: kachery-fast hub stop" if wish.detached else "Stop it with Ctrl-C."
    lines = [f"The hub runs at {answer['url']} and keeps its data in {answer['dir']}. {end}"]
    if answer["url"].startswith(("http://127.", "http://localhost", "http://[::1]")):
        lines.append("Only this machine can reach it; for others start it with --host 0.0.0.0")
    lines += [f"Owner of its channels: {answer['owner']} (token in {answer['ownerToken']})",
              f"Its website signs you in by this link, once, within a day: {answer['signIn']}", ""]
    if "link" in answer:
        lines += [
            f"On each machine that is to join the channel {answer['channel']!r}:",
            "    kachery-fast node start --detach",
            f"    kachery-fast node join {answer['link']}",
            f"The invitation holds for {_INVITATION_DAYS} days and lets nodes request and provide files; for feeds and "
            f"tasks: kachery-fast channel grant {answer['channel']} NODE all"]
    else:
        lines += [
            "Next, make a channel and an invitation to it:",
            "    kachery-fast channel create NAME",
            "    kachery-fast channel invite NAME"]
    return "\n".join(lines)


def _require_packages() -> None:
    try:
        import sqlalchemy  # noqa: F401
    except ModuleNotFoundError:
        raise InvalidArgument(
            what="A hub needs packages that are not installed. Install them with: pip install 'kachery-fast[hub]'"
        ) from None


def _default_owner() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without an entry in the password file
        user = f"user{os.getuid()}"
    return f"{user}@{socket.gethostname()}"
