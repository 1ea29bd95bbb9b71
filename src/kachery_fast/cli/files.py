"""Commands on files: store, link, load, cat, upload, why, verify."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

import click

from ..errors import InvalidArgument, KacheryError
from .output import command_errors, emit, human_size, json_option, progress_bar, quiet_option, show_error

__all__ = ["Answers", "cat", "link", "load", "store", "upload", "verify", "why"]

channel_option = click.option("--channel", metavar="NAME",
                              help="The channel to ask on; without it the one of KACHERY_CHANNEL.")
direct_option = click.option("--direct", metavar="HUB_URL", help=(
    "Read from the bucket of the channel of this hub, without a node; without it as KACHERY_DIRECT_HUB says."))
label_option = click.option("--label", help="The label in the URI; without it the file's own name. For one file only.")


@click.command(short_help="Copy files into the local store and print their URIs.")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@label_option
@quiet_option
@json_option
@command_errors
def store(files: tuple[str, ...], label: str | None, quiet: bool, as_json: bool) -> None:
    """Copy files into the local store and print their content URIs, one on each line.

    Nothing is uploaded before somebody asks for it. A file that cannot be stored is reported, and the others are
    stored; the exit code is then that of the first failure. With --json the result is a list, a member for each file.
    """
    from ..client.storing import store_file

    _check_label(files, label)
    if len(files) > 1:
        _store_many(files, as_json, quiet)
        return
    _each(files, as_json, quiet, lambda path, progress: store_file(path, label=label, progress=progress))


@click.command(short_help="Make files part of the local store where they lie.")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@label_option
@quiet_option
@json_option
@command_errors
def link(files: tuple[str, ...], label: str | None, quiet: bool, as_json: bool) -> None:
    """Make files part of the local store where they lie, without a copy, and print their content URIs.

    A linked file must not be changed or moved; if it is, the link says so and is not served. Several files are
    treated as by store.
    """
    from ..client.storing import link_file

    _check_label(files, label)
    _each(files, as_json, quiet, lambda path, progress: link_file(path, label=label, progress=progress))


@click.command(short_help="Get a file by its URI and print where it is.")
@click.argument("uri")
@click.option("--dest", type=click.Path(), help="Put a copy there, outside the store, and print that path.")
@channel_option
@direct_option
@quiet_option
@json_option
@command_errors
def load(uri: str, dest: str | None, channel: str | None, direct: str | None, quiet: bool, as_json: bool) -> None:
    """Get a file by its content URI and print where it is.

    A file of the local store is there already; another is requested on the channel, verified, and kept in the store.
    With --direct no node is needed, and only what is in the channel's bucket already can be had.
    Ctrl-C withdraws the request; what was transferred is kept for the next time.
    """
    from ..client import files as client

    with progress_bar(_short(uri), hidden=quiet or as_json) as progress:
        loaded = client.load(uri, dest=dest, channel=channel, progress=progress, direct=direct)
    emit(loaded._asdict(), loaded.path, as_json)


@click.command(short_help="Write the bytes of a file, or a range of them, to the standard output.")
@click.argument("uri")
@click.option("--start", type=click.IntRange(min=0), metavar="BYTE", help="The first byte; without it the file's.")
@click.option("--end", type=click.IntRange(min=0), metavar="BYTE", help="The byte after the last; without it the end.")
@channel_option
@direct_option
@json_option
@command_errors
def cat(uri: str, start: int | None, end: int | None, channel: str | None, direct: str | None,
        as_json: bool) -> None:
    """Write the bytes of a file, or a range of them, to the standard output.

    Of a file that is not in the local store only the chunks of that range are fetched. With --json the bytes come as
    base64 in an object with their range.
    """
    from ..client.files import open_range

    with closing(open_range(uri, start, end, channel=channel, direct=direct)) as pieces:
        if as_json:
            data = b"".join(pieces)
            begin = start or 0
            emit({"uri": uri, "start": begin, "end": begin + len(data), "base64": base64.b64encode(data).decode()},
                 "", as_json)
            return
        output = sys.stdout.buffer
        for piece in pieces:
            output.write(piece)


@click.command(short_help="Bring files into a channel's bucket before anybody asks.")
@click.argument("files", nargs=-1, required=True, metavar="FILE_OR_URI...")
@click.option("--channel", metavar="NAME", help="The channel; without it the one of KACHERY_CHANNEL.")
@quiet_option
@json_option
@command_errors
def upload(files: tuple[str, ...], channel: str | None, quiet: bool, as_json: bool) -> None:
    """Bring files into a channel's bucket before anybody asks for them, and print their content URIs.

    Nodes need no such thing: they are asked. It is for those who load without a node (--direct), and for a machine
    that will be off. A file is stored first, sha1://… must be in the store. What the bucket has already is not sent
    again. Several files are treated as by store.
    """
    from ..client.uploading import upload_file

    _each(files, as_json, quiet, lambda path, progress: upload_file(path, channel=channel, progress=progress))


@click.command(short_help="Say where a file is, or why it cannot be had.")
@click.argument("uri")
@channel_option
@json_option
@command_errors
def why(uri: str, channel: str | None, as_json: bool) -> None:
    """Say where a file is, or why it cannot be had: the local store, the bucket, and what each node answers.

    Nothing is loaded. Without a channel, all channels of the node are asked.
    """
    from ..client import files as client

    found = client.why(uri, channel=channel)
    emit(found, lambda: _why_text(found), as_json)


@click.command(short_help="Read files of the local store and check their bytes.")
@click.argument("uris", nargs=-1, metavar="[URI...]")
@click.option("--all", "everything", is_flag=True, help="Verify every file of the local store.")
@quiet_option
@json_option
@command_errors
def verify(uris: tuple[str, ...], everything: bool, quiet: bool, as_json: bool) -> None:
    """Read files of the local store and check that their bytes are those that their URIs name.

    Prints a line for each. The exit code is that of the first failure: 6 for a damaged file, 3 for one that is not
    in the store.
    """
    from ..client import files as client

    if everything == bool(uris):
        raise InvalidArgument(what="Name the URIs to verify, or give --all.")
    answers = Answers(as_json)
    if everything:
        _verify_all(answers, hidden=quiet or as_json)
    for uri in uris:
        with progress_bar(_short(uri), hidden=quiet or as_json) as progress:
            try:
                answer: Any = _verified(client.verify(uri, progress=progress))
            except KacheryError as error:
                answer = error
        answers.add({"uri": uri}, answer)
    answers.end()


# --- several at once


class Answers:
    """Answers for several names: printed as they come, or as one JSON list; the first failure gives the exit code."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._rows: list[dict[str, Any]] = []
        self._exit_code = 0

    def add(self, row: dict[str, Any], answer: str | dict[str, Any] | KacheryError) -> None:
        """Take the answer for ``row``: a URI, more members and their ``text``, or an error."""
        if isinstance(answer, KacheryError):
            self._exit_code = self._exit_code or answer.exit_code
            show_error(answer)
            row = {**row, **answer.to_dict()}
        elif isinstance(answer, str):
            row = {**row, "uri": answer}
            emit(None, "" if self._as_json else answer, as_json=False)
        else:
            text = answer.pop("text")
            row = {**row, **answer}
            emit(None, "" if self._as_json else text, as_json=False)
        if self._as_json:
            self._rows.append(row)

    def attempt(self, row: dict[str, Any], act: Callable[[], str | dict[str, Any]]) -> None:
        """Take what ``act`` returns, or the error that it raises."""
        try:
            answer: str | dict[str, Any] | KacheryError = act()
        except KacheryError as error:
            answer = error
        self.add(row, answer)

    def end(self) -> None:
        """Print the JSON list, and exit when anything failed."""
        if self._as_json:
            emit(self._rows, "", as_json=True)
        if self._exit_code:
            sys.stdout.flush()
            sys.exit(self._exit_code)


def _verify_all(answers: Answers, *, hidden: bool) -> None:
    """Verify the whole store. Answers are printed as they come, or after the progress bar where there is one."""
    from ..client import files as client
    from ..client.progress import Progress

    found: list[tuple[str, Any]] = []
    with progress_bar("the local store", hidden=hidden) as progress:
        if progress is None:
            client.verify_all(lambda sha1, answer: answers.add({"uri": f"sha1://{sha1}"}, _verified(answer)))
        else:
            done = 0

            def show(sha1: str, answer: Any) -> None:
                nonlocal done
                done += getattr(answer, "size", 0)
                found.append((sha1, answer))
                progress(Progress(done, None, f"{len(found)} files"))

            client.verify_all(show)
    for sha1, answer in found:
        answers.add({"uri": f"sha1://{sha1}"}, _verified(answer))


def _store_many(files: tuple[str, ...], as_json: bool, quiet: bool) -> None:
    """Store in batches. Answers are printed as they come, or after the progress bar where there is one."""
    from ..client.progress import Progress
    from ..client.storing import store_files

    answers = Answers(as_json)
    with progress_bar(f"{len(files)} files", hidden=quiet or as_json) as progress:
        if progress is None:
            store_files(files, on_done=lambda path, answer: answers.add({"path": os.fspath(path)}, answer))
            found = []
        else:
            total = sum(_size_of(path) for path in files)
            done = 0

            def show(path: Any, _: Any) -> None:
                nonlocal done
                done += _size_of(path)
                progress(Progress(done, total))

            found = store_files(files, on_done=show)
    for path, answer in zip(files, found, strict=False):
        answers.add({"path": path}, answer)
    answers.end()


def _size_of(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116
    except (OSError, ValueError):
        return 0


def _each(files: Iterable[str], as_json: bool, quiet: bool, act: Callable[[str, Any], str]) -> None:
    answers = Answers(as_json)
    for path in files:
        with progress_bar(os.path.basename(path), hidden=quiet or as_json) as progress:  # noqa: PTH119
            try:
                answer: str | KacheryError = act(path, progress)
            except KacheryError as error:
                answer = error
        answers.add({"path": path}, answer)
    answers.end()


def _check_label(files: tuple[str, ...], label: str | None) -> None:
    if label is not None and len(files) > 1:
        raise InvalidArgument(what="--label names one file; store several without it, or one at a time.")


def _verified(answer: Any) -> dict[str, Any] | KacheryError:
    if isinstance(answer, KacheryError):
        return answer
    kind = "linked" if answer.linked else "stored"
    return {"path": str(answer.path), "size": answer.size, "linked": answer.linked,
            "text": f"ok  sha1://{answer.sha1}  {human_size(answer.size)}, {kind} at {answer.path}"}


def _short(uri: str) -> str:
    """Return what a progress bar calls a URI: its label, else the beginning of its SHA-1."""
    label = uri.partition("?")[0].removeprefix("sha1://").partition("/")[2]
    return label or uri.removeprefix("sha1://")[:10]


def _why_text(found: dict[str, Any]) -> str:
    lines = [str(found.get("verdict", "")), f"  local store: {found.get('store', '')}"]
    for channel in found.get("channels", []):
        lines.append(f"  channel {channel.get('channel', '?')}")
        lines.append(f"    bucket: {channel.get('bucket', '?')}")
        answers = {answer.get("node"): answer for answer in channel.get("answers", [])}
        asked = {node.get("node"): node for node in channel.get("asked", [])}
        if not asked and not answers:
            lines.append("    no other node is there to ask")
        for node_id in [*asked, *(node for node in answers if node not in asked)]:
            node = answers.get(node_id) or asked.get(node_id) or {}
            name = node.get("label") or str(node_id)[:10]
            lines.append(f"    {name}: {node.get('answer', 'no answer')}")
    return "\n".join(lines)
