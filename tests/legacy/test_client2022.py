"""What kachery-client 1.2.0 documents, done by itself against this node: real hub, bucket, nodes and processes."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import kachery_fast as kf
from kachery_fast.cli.lab import Lab, LabNode
from kachery_fast.store.mutables import ADMITTED_KEY
from tests.legacy.client2022 import Client2022
from tests.system.support import make_recording, wait_until

PERMISSIONS = ("all",)
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab"), "ch1") as made:
        made.hub.arguments += ["--public-url", made.hub_url]  # else it tells the name that the proxy was asked for
        made.start_hub()
        made.add_node("a", permissions=PERMISSIONS)
        made.add_node("b", permissions=PERMISSIONS)
        yield made


@pytest.fixture(scope="module")
def a(lab: Lab) -> LabNode:
    return lab.nodes["a"]


@pytest.fixture(scope="module")
def on_a(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Client2022:
    return Client2022(lab, lab.nodes["a"], tmp_path_factory.mktemp("user-a"))


@pytest.fixture(scope="module")
def on_b(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Client2022:
    return Client2022(lab, lab.nodes["b"], tmp_path_factory.mktemp("user-b"))


def test_info_tells_node_owner_and_access(a: LabNode, on_a: Client2022) -> None:
    node_id = (a.storage_dir / "kachery-node-id").read_text()
    assert on_a.command("kachery-info").decode().splitlines() == [
        f"Node ID: {node_id}", "Owner: lab@localhost", "You have access to this daemon"]


@pytest.mark.parametrize("size", [0, 14, 45 * MEGABYTE], ids=["empty", "short", "chunks"])
def test_files_are_stored_loaded_and_shown(on_a: Client2022, size: int) -> None:
    path = make_recording(on_a.directory / f"file-{size}.bin", size)
    sha1 = hashlib.sha1(path.read_bytes()).hexdigest()

    uri = on_a.command("kachery-store", path.name).decode().strip()

    assert uri.startswith(f"sha1://{sha1}/{path.name}")
    assert ("?manifest=" in uri) == (size > 20 * 2**20)
    stored = on_a.command("kachery-load", uri).decode().strip()
    assert Path(stored).read_bytes() == path.read_bytes()
    assert on_a.command("kachery-load", uri, "--dest", "copy.bin").decode().strip() == "copy.bin"
    assert (on_a.directory / "copy.bin").read_bytes() == path.read_bytes()
    assert on_a.command("kachery-cat", uri) == path.read_bytes()
    if size:
        assert on_a.command("kachery-cat", uri, "--start", "3", "--end", "9") == path.read_bytes()[3:9]


def test_linked_files_are_loaded_from_their_place(on_a: Client2022) -> None:
    path = make_recording(on_a.directory / "linked.bin", 21 * MEGABYTE, seed=2)
    uri = on_a.command("kachery-link", path.name).decode().strip()
    assert on_a.command("kachery-load", uri).decode().strip() == str(path)


def test_texts_json_arrays_and_pickles_come_back_as_they_were(on_a: Client2022) -> None:
    assert on_a.run("""
        array = np.arange(10, dtype=np.float32).reshape(2, 5)
        found = [
            kc.load_text(kc.store_text('a text, ä')),
            kc.load_json(kc.store_json({'a': [1, 2.5, None]})),
            bool((kc.load_npy(kc.store_npy(array)) == array).all()),
            bool((kc.load_pkl(kc.store_pkl({'x': array, 'y': [1, 'z']}))['x'] == array).all()),
            kc.load_bytes(kc.store_text('0123456789'), 2, 5).decode(),
            kc.load_file('sha1://' + 40 * '0'),
        ]
        print(json.dumps(found))
    """) == ["a text, ä", {"a": [1, 2.5, None]}, True, True, "234", None]


def test_a_file_comes_from_the_other_node(on_a: Client2022, on_b: Client2022) -> None:
    path = make_recording(on_a.directory / "recording.bin", 45 * MEGABYTE, seed=3)
    uri = on_a.command("kachery-store", path.name).decode().strip()
    found = on_b.run(f"""
        part = kc.load_bytes({uri!r}, 25_000_000, 25_000_010, channel='ch1')
        assert kc.load_file({uri!r}) is None
        print(json.dumps([part.hex(), kc.load_file({uri!r}, channel='ch1')]))
    """)
    assert found[0] == path.read_bytes()[25_000_000:25_000_010].hex()
    assert Path(found[1]).read_bytes() == path.read_bytes()


def test_nobody_has_a_file_is_none_as_in_2022(on_a: Client2022) -> None:
    assert on_a.run(f"print(json.dumps(kc.load_file('sha1://{40 * 'b'}', channel='ch1')))") is None


def test_a_file_is_uploaded_to_a_channel_and_read_from_it_directly(lab: Lab, on_a: Client2022,
                                                                    on_b: Client2022) -> None:
    path = make_recording(on_a.directory / "uploaded.bin", 45 * MEGABYTE, seed=4)
    uri = on_a.command("kachery-store", path.name, "--upload-to-channel", "ch1").decode().splitlines()[-1]
    sha1 = hashlib.sha1(path.read_bytes()[:20 * 2**20]).hexdigest()
    assert (lab.bucket_dir / "sha1" / sha1[:2] / sha1[2:4] / sha1[4:6] / sha1).stat().st_size == 20 * 2**20
    loaded = on_b.command("kachery-load", uri, "--direct-channel", "ch1").decode().splitlines()[-1]
    assert Path(loaded).read_bytes() == path.read_bytes()
    assert on_a.run("""
        uri = kc.upload_json({'a': 1}, channel='ch1')
        print(json.dumps(kc.load_json(kc.upload_file(uri, channel='ch1'))))
    """) == {"a": 1}


def test_on_a_private_channel_files_go_through_the_node_as_ever(lab: Lab, on_a: Client2022, on_b: Client2022) -> None:
    path = make_recording(on_a.directory / "private.bin", 25 * MEGABYTE, seed=5)
    lab.owner("set", "ch1", "--private")
    try:
        uri = on_a.command("kachery-store", path.name, "--upload-to-channel", "ch1").decode().splitlines()[-1]
        loaded = on_b.command("kachery-load", uri, "--channel", "ch1").decode().splitlines()[-1]
        assert Path(loaded).read_bytes() == path.read_bytes()
    finally:
        lab.owner("set", "ch1", "--public")


def test_feeds_are_made_appended_read_watched_and_deleted(on_a: Client2022, on_b: Client2022) -> None:
    made = on_a.run("""
        feed = kc.create_feed('notebook')
        assert feed.is_writeable and kc.load_feed('notebook').feed_id == feed.feed_id
        trials = feed.load_subfeed('trials')
        trials.append_messages([{'i': 0}, {'i': 1, 'text': 'ä'}])
        named = feed.load_subfeed({'b': 2, 'a': 1})
        named.append_message({'x': 1})
        assert trials.get_num_local_messages() == 2
        snapshot = feed.create_snapshot(['trials', {'a': 1, 'b': 2}])
        assert snapshot.load_subfeed('trials').get_next_messages() == [{'i': 0}, {'i': 1, 'text': 'ä'}]
        watches = {'w': {'feedId': feed.feed_id, 'subfeedName': 'trials', 'position': 1}}
        signed = kc.watch_for_new_messages(watches, wait_msec=0, signed=True)['w'][0]
        assert signed['body']['messageNumber'] == 1 and len(signed['signature']) == 128
        assert trials.get_next_messages(wait_msec=10, max_num_messages=1) == [{'i': 0}]
        assert trials.get_next_message(wait_msec=10) == {'i': 1, 'text': 'ä'}
        assert trials.get_next_messages(wait_msec=50) == []
        print(json.dumps([feed.uri, trials.uri, named.uri]))
    """)
    assert on_b.run(f"""
        found = []
        for uri in {made[1:]!r}:
            subfeed = kc.load_subfeed(uri, channel='ch1')
            assert not subfeed.is_writeable
            found.append(subfeed.get_next_messages(wait_msec=20000))
        print(json.dumps(found))
    """) == [[{"i": 0}, {"i": 1, "text": "ä"}], [{"x": 1}]]
    assert on_a.run("""
        kc.load_feed('notebook').delete()
        print(json.dumps(kc.load_feed('notebook').is_writeable))
    """) is False


def test_a_long_subfeed_is_given_in_one_answer(on_a: Client2022) -> None:
    """The old client asks once, and a snapshot holds what it got."""
    assert on_a.run("""
        feed = kc.create_feed('long')
        for name in ('main', 'other'):
            subfeed = feed.load_subfeed(name)
            for first in range(0, 9000, 3000):
                subfeed.append_messages([{'i': first + i, 'text': 'x' * 1000} for i in range(3000)])
        watches = {name: {'feedId': feed.feed_id, 'subfeedName': name, 'position': 1} for name in ('main', 'other')}
        found = [[message['i'] for message in messages] == list(range(1, 9000))
                 for messages in kc.watch_for_new_messages(watches, wait_msec=0).values()]
        snapshot = feed.create_snapshot(['main', 'other'])
        print(json.dumps(found + [snapshot.load_subfeed('main').get_num_local_messages(),
                                  len(subfeed.get_next_messages(wait_msec=0, max_num_messages=5000))]))
    """) == [True, True, 9000, 5000]


def test_a_message_is_seen_by_a_watcher_as_it_is_appended(on_a: Client2022, on_b: Client2022) -> None:
    uri = on_a.run("print(json.dumps(kc.create_feed('live').load_subfeed('s').uri))")
    watcher = on_b.begin(f"""
        subfeed = kc.load_subfeed({uri!r}, channel='ch1')
        for message in subfeed.message_stream():
            print(json.dumps(message))
            break
    """)
    try:
        on_a.run("kc.load_feed('live').load_subfeed('s').append_message({'n': 7}); print(1)")
        out, err = watcher.communicate(timeout=60)
    finally:
        watcher.kill()
        watcher.wait()
    assert out.decode().splitlines()[-1:] == ['{"n": 7}'], err.decode()


def test_mutables_are_set_read_and_deleted(on_a: Client2022) -> None:
    assert on_a.run("""
        key = {'b': 1, 'a': ['ä']}
        found = [kc.get(key), kc.set(key, {'v': 1}), kc.get({'a': ['ä'], 'b': 1}), kc.set(key, 2, update=False),
                 kc.get_string(key), kc.set('large', 'x' * 500_000), kc.delete(key), kc.delete(key), kc.get(key)]
        print(json.dumps(found))
    """) == [None, True, {"v": 1}, False, "{'v': 1}", True, True, False, None]


BACKEND = """
    @kc.taskfunction('add.1', type='pure-calculation')
    def add(a, b):
        return a + b

    @kc.taskfunction('look.1', type='query')
    def look():
        return {'seen': True}

    @kc.taskfunction('act.1', type='action')
    def act(path):
        open(path, 'a').write('done ')

    @kc.taskfunction('fail.1', type='pure-calculation')
    def fail():
        raise ValueError('no such session')

    @kc.taskfunction('long.1', type='pure-calculation')
    def long():
        return ['x' * 100] * 20_000

    if __name__ == '__main__':
        kc.run_task_backend(channels=['ch1'], task_function_ids=['add.1', 'look.1', 'act.1', 'fail.1', 'long.1'])
"""


def test_tasks_are_run_by_a_backend_of_2022_and_asked_for_by_a_client_of_2022(
        lab: Lab, a: LabNode, on_a: Client2022, on_b: Client2022) -> None:
    backend = on_a.begin(BACKEND)
    try:
        wait_until(lambda: bool(a.connection.info()["taskBackends"]["backends"]), "the backend is registered")
        found = on_b.run(f"""
            def ask(function, type, **kwargs):
                task = kc.request_task(task_function_id=function, task_kwargs=kwargs, task_function_type=type,
                                       channel='ch1')
                try:
                    return task.wait(60)
                except Exception as error:
                    return str(error)

            long = ask('long.1', 'pure-calculation')
            sums = [ask('add.1', 'pure-calculation', a=2, b=3.5) for _ in range(2)]
            done = ask('act.1', 'action', path={str(on_b.directory / 'act')!r})
            seen, failed = ask('look.1', 'query'), ask('fail.1', 'pure-calculation')
            print(json.dumps([*sums, seen, done, failed, len(long), len(long[0])]))
        """)
    finally:
        backend.send_signal(signal.SIGINT)
        backend.communicate(timeout=60)
    assert found[:4] == [5.5, 5.5, {"seen": True}, True]
    assert "no such session" in found[4]
    assert found[5:] == [20_000, 100]
    assert (on_b.directory / "act").read_text() == "done "


def test_a_lasting_code_opens_what_a_client_at_another_machine_needs(
        lab: Lab, a: LabNode, on_a: Client2022, tmp_path: Path) -> None:
    """Its storage directory is its own, with the code in it; of the node's it sees the files alone."""
    with a.used():
        kf.set(ADMITTED_KEY, ["a-lasting-code"])
    own = tmp_path / "own"
    own.mkdir()
    (own / "client-auth").write_text("a-lasting-code")
    (own / "kachery-node-id").write_text((a.storage_dir / "kachery-node-id").read_text())
    (own / "sha1").symlink_to(a.storage_dir / "sha1")
    user = Client2022(lab, a, tmp_path / "user")
    user.environ["KACHERY_STORAGE_DIR"] = str(own)
    secret = tmp_path / "secret"
    secret.write_text("a file of the node's user")
    wait_until(lambda: user.run("print(json.dumps(kc.set('remote', 1)))"), "the code is admitted")
    backend = on_a.begin(BACKEND)
    try:
        wait_until(lambda: bool(a.connection.info()["taskBackends"]["backends"]), "the backend is registered")
        assert user.run("""
            feed = kc.create_feed('remote')
            feed.load_subfeed('s').append_message({'i': 0})
            task = kc.request_task(task_function_id='add.1', task_kwargs={'a': 1, 'b': 2},
                                   task_function_type='pure-calculation', channel='ch1')
            print(json.dumps([kc.load_text(kc.store_text('remote')), kc.get('remote'), task.wait(60),
                              feed.load_subfeed('s').get_next_messages(wait_msec=10)]))
        """) == ["remote", 1, 3, [{"i": 0}]]
    finally:
        backend.send_signal(signal.SIGINT)
        backend.communicate(timeout=60)
    told = user.run(f"""
        from kachery_client._daemon_connection import _daemon_url
        from kachery_client._misc import _http_post_json
        url, headers = _daemon_url()
        found = [_http_post_json(url + '/storeFile', {{'localFilePath': {str(secret)!r}}}, headers=headers)['error']]
        try:
            kc.link_file({str(secret)!r})
        except Exception as error:
            found.append(str(error))
        print(json.dumps(found))
    """)
    assert len(told) == 2
    assert all("403" in text and "a lasting code does not open" in text for text in told)
    assert not list((a.storage_dir / "sha1").rglob(f"{hashlib.sha1(secret.read_bytes()).hexdigest()}*"))


def test_a_thousand_small_files_are_stored_and_none_fails(on_a: Client2022) -> None:
    assert on_a.run("""
        import hashlib, os
        uris = []
        for number in range(1000):
            with open('small.bin', 'wb') as file:
                file.write(hashlib.sha256(str(number).encode()).digest() * 313)
            uris.append(kc.store_file('small.bin'))
        print(json.dumps(len(set(uris))))
    """, timeout_seconds=250) == 1000
