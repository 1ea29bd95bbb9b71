"""The commands on feeds, on a node that is on no channel; between nodes they are tested with the whole system."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.commands import PROGRAM, Program

STRANGER = "feed://" + "ab" * 32


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    program = Program(tmp_path_factory.mktemp("node") / "store")
    with program.node():
        yield program


@pytest.fixture
def name(running: Program, request: pytest.FixtureRequest) -> str:
    """The name of a fresh feed."""
    name = re.sub(r"\W", "-", request.node.name)
    running.ok("feed", "create", name)
    return name


def feed_input(program: Program, data: bytes, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*PROGRAM, "feed", *arguments], env=program.env, input=data, capture_output=True, timeout=60,
                          check=False)


def error_of(program: Program, *arguments: str) -> tuple[int, str]:
    """Run a command that fails, demand one line on the standard error, and return the exit code and that line."""
    done = program.run("feed", *arguments)
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    return done.returncode, done.stderr


def test_create_prints_a_uri_and_keeps_what_is_there(running: Program) -> None:
    uri = running.ok("feed", "create", "kept").strip()
    assert re.fullmatch(r"feed://[0-9a-f]{64}", uri)
    assert running.json("feed", "create", "kept") == {"uri": uri, "feedId": uri[7:], "name": "kept"}
    assert running.ok("feed", "create").strip() != running.ok("feed", "create").strip()


def test_append_takes_messages_as_arguments(running: Program, name: str) -> None:
    assert running.ok("feed", "append", f"{name}/main", '{"i": 0}', '{"i": 1}') == (
        "2 messages appended, the last is number 1.\n")
    assert running.ok("feed", "append", f"{name}/main", "{}") == "1 message appended, the last is number 2.\n"
    assert running.ok("feed", "read", f"{name}/main") == '{"i": 0}\n{"i": 1}\n{}\n'


def test_append_reads_lines(running: Program, name: str) -> None:
    lines = b"".join(b'{"i": %d}\n' % i for i in range(2500)) + b'\n  \r\n{"i": 2500}'
    done = feed_input(running, lines, "append", f"{name}/main", "--json")
    assert done.returncode == 0, done.stderr
    found = running.json("feed", "read", f"{name}/main")
    assert json.loads(done.stdout) == {"uri": found["uri"], "first": 0, "end": 2501}
    assert (found["first"], found["position"]) == (0, 2501)
    assert found["messages"] == [{"i": i} for i in range(2501)]
    assert feed_input(running, b"", "append", f"{name}/main").stdout == b"Nothing was appended.\n"


def test_a_bad_line_is_named_and_what_came_before_its_batch_stays(running: Program, name: str) -> None:
    lines = b'{"i": 0}\n' * 1500 + b"nonsense\n"
    done = feed_input(running, lines, "append", f"{name}/main")
    assert done.returncode == 2
    assert done.stderr.startswith(b"Error: Line 1501 is not JSON")
    assert running.json("feed", "read", f"{name}/main")["position"] == 1000
    text = error_of(running, "append", f"{name}/main", "{}", "[]")[1]
    assert text.startswith("Error: Message 2 is not a JSON object")


def test_read_begins_and_ends_where_told(running: Program, name: str) -> None:
    running.ok("feed", "append", f"{name}/main", *(json.dumps({"i": i}) for i in range(5)))
    assert running.ok("feed", "read", f"{name}/main", "--position", "1", "--max", "2") == '{"i": 1}\n{"i": 2}\n'
    assert running.ok("feed", "read", f"{name}/main", "--position", "9") == ""
    signed = running.json("feed", "read", f"{name}/main", "--signed", "--max", "1")["messages"]
    assert (signed[0]["body"]["message"], signed[0]["body"]["messageNumber"]) == ({"i": 0}, 0)
    assert running.run("feed", "read", f"{name}/main", "--position", "-1").returncode == 2
    assert running.run("feed", "read", f"{name}/main", "--max", "0").returncode == 2


def test_a_subfeed_is_named_in_four_ways(running: Program, name: str) -> None:
    uri = running.json("feed", "append", f'{name}/{{"type": "x"}}', "{}")["uri"]
    hashed = uri.rpartition("/")[2]
    assert hashed.startswith("~")
    for subfeed in (uri, f"{name}/{hashed}", f'{name}/{{"type":"x"}}'):
        assert running.ok("feed", "read", subfeed) == "{}\n"
    feed_id = uri.split("/")[2]
    assert running.ok("feed", "read", f"{feed_id}/{hashed}") == "{}\n"
    for wrong in (name, f"{name}/", f"feed://{feed_id}", f"{name}/{{", f"{name}/{{1}}", f"{name}/~x"):
        assert error_of(running, "read", wrong)[0] == 2


def test_what_a_message_holds_cannot_work_on_a_terminal(running: Program, name: str) -> None:
    running.ok("feed", "append", f"{name}/main", json.dumps({"x": "é \x1b[2J \x9b2J \u202e \U000e0001 \u2028"}))
    line = running.ok("feed", "read", f"{name}/main")
    assert line == '{"x": "é \\u001b[2J \\u009b2J \\u202e \\udb40\\udc01 \\u2028"}\n'
    assert json.loads(line) == {"x": "é \x1b[2J \x9b2J \u202e \U000e0001 \u2028"}


def test_watch_tells_which_subfeed_a_message_is_of(running: Program, name: str) -> None:
    a = running.json("feed", "append", f"{name}/a", '{"i": 0}')["uri"]
    b = running.json("feed", "append", f"{name}/b", '{"j": 0}', '{"j": 1}')["uri"]
    assert running.ok("feed", "watch", f"{name}/b", "--max", "2") == '{"j": 0}\n{"j": 1}\n'
    assert running.ok("feed", "watch", f"{name}/b", "--max", "1", "--position", "1") == '{"j": 1}\n'
    lines = running.ok("feed", "watch", f"{name}/a", f"{name}/b", "--max", "3").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"uri": a, "number": 0, "message": {"i": 0}}, {"uri": b, "number": 0, "message": {"j": 0}},
        {"uri": b, "number": 1, "message": {"j": 1}}]
    line = running.ok("feed", "watch", f"{name}/b", "--max", "1", "--position", "1", "--json", "--signed")
    assert json.loads(line)["message"]["body"]["message"] == {"j": 1}


def test_watch_begins_with_what_is_new_when_told(running: Program, name: str) -> None:
    running.ok("feed", "append", f"{name}/main", '{"i": "old"}')
    watcher = subprocess.Popen([*PROGRAM, "feed", "watch", f"{name}/main", "--new", "--max", "1"], env=running.env,
                               stdout=subprocess.PIPE)
    number = 0
    while watcher.poll() is None:  # until it has begun to watch
        running.ok("feed", "append", f"{name}/main", json.dumps({"i": number}))
        number += 1
    out, _ = watcher.communicate(timeout=60)
    assert isinstance(json.loads(out)["i"], int)


def test_list_and_info_show_subfeeds(running: Program, name: str) -> None:
    running.ok("feed", "append", f"{name}/main", "{}", "{}")
    running.ok("feed", "append", f'{name}/{{"type": "x"}}', "{}")
    text = running.ok("feed", "info", name)
    assert re.fullmatch(rf'feed://[0-9a-f]{{64}}  {name}\n  main  2 messages\n  {{"type": "x"}}  1 messages\n', text)
    assert text in running.ok("feed", "list")
    found = running.json("feed", "info", name)
    assert found in running.json("feed", "list")
    assert found["name"] == name


def test_an_export_is_verified_without_a_node(running: Program, name: str, tmp_path: Path) -> None:
    running.ok("feed", "append", f"{name}/main", '{"i": 0}', '{"i": 1}')
    running.ok("feed", "append", f'{name}/{{"type": "x"}}', "{}")
    export = tmp_path / "export.json"
    assert running.ok("feed", "export", name, "--dest", str(export)) == f"{export}\n"
    assert running.ok("feed", "export", name) == export.read_text()
    alone = Program(tmp_path / "store")
    lines = alone.ok("feed", "verify", str(export)).splitlines()
    assert [re.sub(r"feed://[0-9a-f]{64}|from .*", "", line) for line in lines] == [
        "ok  /main  2 messages, ", "ok  /~5eb28c0fdfe3b59e243776a2dc6fab6e4756bbeb  1 messages, "]
    assert lines == running.ok("feed", "verify", name).splitlines()
    assert alone.json("feed", "verify", str(export), "main")[0]["count"] == 2
    assert alone.json("feed", "verify", str(export), "absent")[0]["count"] == 0
    uri = alone.ok("store", str(export), "--label", "feed.json").strip()
    assert alone.ok("feed", "verify", uri).count("ok") == 2
    assert alone.json("feed", "info", uri)["subfeeds"][0]["count"] == 2
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_a_tampered_export_is_told_apart_to_the_message(running: Program, name: str, tmp_path: Path) -> None:
    running.ok("feed", "append", f"{name}/main", '{"i": 0}', '{"i": 1}', '{"i": 2}')
    running.ok("feed", "append", f"{name}/other", "{}")
    document = json.loads(running.ok("feed", "export", name))
    document["subfeeds"]["b28b7af69320201d1cf206ebf28373980add1451"]["messages"][1]["i"] = 7
    (tmp_path / "export.json").write_text(json.dumps(document))
    done = running.run("feed", "verify", str(tmp_path / "export.json"))
    assert done.returncode == 6
    assert done.stderr.startswith("Error: Message 1 of feed://")
    assert len(done.stdout.splitlines()) == 2  # the good beginning of the one, and the other
    done = running.run("feed", "verify", str(tmp_path / "export.json"), "--json")
    rows = {row["uri"].rpartition("/")[2]: row for row in json.loads(done.stdout)}
    assert (rows["main"]["count"], rows["main"]["error"], rows["other"]["count"]) == (1, "FeedInvalid", 1)
    assert "error" not in rows["other"]


def test_an_export_may_go_to_the_store(running: Program, name: str) -> None:
    running.ok("feed", "append", f"{name}/main", '{"i": 0}')
    uri = running.ok("feed", "export", name, "main", "--store").strip()
    assert re.fullmatch(r"sha1://[0-9a-f]{40}/feed\.json", uri)
    assert running.ok("feed", "read", f"{uri}?subfeedName=main") == '{"i": 0}\n'
    assert error_of(running, "export", name, "--store", "--dest", "x")[0] == 2
    for place in ("sha1", "sha1/x"):
        assert error_of(running, "export", name, "--dest", str(running.storage_dir / place))[0] == 2
    assert error_of(running, "append", f"{uri}?subfeedName=main", "{}")[0] == 4


def test_delete_asks_first(running: Program, name: str) -> None:
    running.ok("feed", "append", f"{name}/main", "{}")
    for answer in (b"", b"n\n", b"\n"):
        assert feed_input(running, answer, "delete", name).returncode == 130
    assert running.ok("feed", "read", f"{name}/main") == "{}\n"
    assert feed_input(running, b"y\n", "delete", name).stdout.startswith(b"Deleted feed://")
    assert error_of(running, "info", name)[0] == 3
    assert error_of(running, "delete", name, "--yes")[0] == 3


@pytest.mark.parametrize(("arguments", "code"), [
    (["read", "absent/main"], 3), (["info", STRANGER], 3), (["delete", STRANGER, "--yes"], 3),
    (["export", STRANGER], 3),
    (["append", f"{STRANGER}/main", "{}"], 4), (["read", f"{STRANGER}/main"], 3),
    (["read", f"{STRANGER}/main", "--channel", "lab"], 3), (["create", STRANGER], 2), (["create", ""], 2),
    (["verify", "sha1://" + "0" * 40 + "/feed.json"], 3), (["verify", "/etc/hostname"], 2), (["verify", "absent"], 3),
    (["read", "feed://x/main"], 2), (["watch", f"{STRANGER}/main"], 3),
])
def test_what_cannot_be_is_one_line_and_an_exit_code(running: Program, arguments: list[str], code: int) -> None:
    assert error_of(running, *arguments)[0] == code
    done = running.run("feed", *arguments, "--json")
    assert done.returncode == code
    assert json.loads(done.stdout)["message"]


def test_what_is_only_here_needs_no_channel(running: Program) -> None:
    assert running.ok("feed", "read", f"{STRANGER}/main", "--channel", "*local*") == ""


def test_without_a_node_the_commands_say_how_to_start_one(tmp_path: Path) -> None:
    program = Program(tmp_path / "store")
    for arguments in (["create", "x"], ["read", "x/main"], ["list"], ["verify", "x"]):
        code, text = error_of(program, *arguments)
        assert code == 5
        assert "kachery-fast node start" in text


def test_help_of_the_group_explains_names(running: Program) -> None:
    text = " ".join(running.ok("feed", "--help").split())
    assert "SUBFEED is feed://<feed id>/<subfeed>, or FEED/SUBFEED" in text
    for command in ("create", "append", "read", "watch", "export", "verify", "list", "info", "delete"):
        assert re.search(rf"\b{command} +[A-Z]", text)
