"""What docs/from-kc-to-kf.md says of the limits of kachery-client 1.2.0, shown by the client itself."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import kachery_fast as kf
from kachery_fast.cli.lab import Lab, LabNode
from tests.cli.commands import Program
from tests.legacy.client2022 import Client2022


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab"), "ch1") as made:
        made.hub.arguments += ["--public-url", made.hub_url]
        made.start_hub()
        made.add_node("a", permissions=("all",))
        yield made


@pytest.fixture
def a(lab: Lab) -> LabNode:
    return lab.nodes["a"]


@pytest.fixture
def on_a(lab: Lab, a: LabNode, tmp_path: Path) -> Client2022:
    return Client2022(lab, a, tmp_path / "user")


def test_a_hub_s_address_with_a_port_is_refused(lab: Lab, on_a: Client2022) -> None:
    on_a.environ["KACHERY_HUB_API_URI"] = lab.hub_url
    assert on_a.run("""
        found = []
        for call in (lambda: kc.upload_text('a', channel='ch1'), lambda: kc.DirectClient(channel='ch1')):
            try:
                call()
            except Exception as error:
                found.append('invalid value' in str(error))
        print(json.dumps(found))
    """) == [True, True]


def test_an_old_upload_is_what_ours_loads_directly_and_the_reverse(lab: Lab, a: LabNode, on_a: Client2022,
                                                                   tmp_path: Path) -> None:
    uri = on_a.run("print(json.dumps(kc.upload_json({'a': 1}, channel='ch1')))")
    reader = Program(tmp_path / "elsewhere")
    where = ["--direct", lab.hub_url, "--channel", "ch1"]
    assert json.loads(Path(reader.json("load", uri, *where)["path"]).read_bytes()) == {"a": 1}
    with a.used():
        uri = kf.upload_file(kf.store_text("ours"))
    on_a.environ.update(KACHERY_DAEMON_PORT="1", KACHERY_STORAGE_DIR=str(tmp_path / "old"))
    assert on_a.run(f"print(json.dumps(kc.DirectClient(channel='ch1').load_text({uri!r})))") == "ours"


def test_ephemeral_mode_has_no_effect_where_a_node_answers(on_a: Client2022) -> None:
    assert on_a.run("""
        kc.enable_ephemeral()
        print(json.dumps(kc.load_text(kc.store_text('a'))))
    """) == "a"


def test_the_key_of_a_colab_configuration_makes_the_same_node(on_a: Client2022, tmp_path: Path) -> None:
    on_a.environ.update(KACHERY_DAEMON_PORT="1", KACHERY_STORAGE_DIR=str(tmp_path / "colab"))
    found = on_a.run("""
        import io
        sys.stdin = io.StringIO('someone@example.org')
        kc.setup_colab_ephemeral('config.json')
        print(json.dumps(json.load(open('config.json'))))
    """)
    assert set(found) == {"publicKey", "privateKey", "ownerId"}
    program = Program(tmp_path / "store", None, KACHERY_NODE_PRIVATE_KEY=found["privateKey"])
    with program.node():
        assert program.json("node", "info")["nodeId"] == found["publicKey"]


def test_a_colab_configuration_overwrites_the_key_of_a_node(on_a: Client2022, tmp_path: Path) -> None:
    """The reason for the warning on the page."""
    storage_dir = tmp_path / "colab"
    on_a.environ.update(KACHERY_STORAGE_DIR=str(storage_dir))
    assert on_a.run(f"""
        import os
        from kachery_client.ephemeral.ephemeral_load_file import _generate_keypair, _private_key_from_hex
        public, private = _generate_keypair()
        json.dump({{'publicKey': public, 'privateKey': private, 'ownerId': 'x'}}, open('config.json', 'w'))
        os.mkdir({str(storage_dir)!r})
        for name in ('public.pem', 'private.pem'):
            open({str(storage_dir)!r} + '/' + name, 'w').write('those of a node')
        kc.setup_colab_ephemeral('config.json')
        print(json.dumps(open({str(storage_dir)!r} + '/private.pem').read() == _private_key_from_hex(private)))
    """) is True


def test_of_our_pickles_an_old_client_loads_what_it_could_write(a: LabNode, on_a: Client2022) -> None:
    with a.used():
        plain = kf.store_pkl({"a": [1, 2.5, None, "text", (True, range(3))]})
        dated = kf.store_pkl(datetime.date(2022, 3, 1))
    assert on_a.run(f"""
        found = [repr(kc.load_pkl({plain!r}))]
        try:
            kc.load_pkl({dated!r})
        except Exception as error:
            found.append('Not able to safe-unpickle' in str(error))
        print(json.dumps(found))
    """) == ["{'a': [1, 2.5, None, 'text', (True, range(0, 3))]}", True]


def test_a_task_that_nobody_asked_for_puts_no_result_into_the_channel(on_a: Client2022) -> None:
    assert on_a.run("""
        @kc.taskfunction('sum.1', type='pure-calculation')
        def add(a, b):
            return a + b

        value = kc._run_task(add, {'a': 1, 'b': 2}, channel='ch1')
        task = kc.request_task(task_function_id='sum.1', task_kwargs={'a': 1, 'b': 2}, channel='ch1',
                               task_function_type='pure-calculation')
        print(json.dumps([value, task.status]))
    """) == [3, "waiting"]
