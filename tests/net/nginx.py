"""A private nginx on loopback, serving one directory: a foreign peer for range requests."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.programs import need_program

_CONFIGURATION = """
daemon off; master_process on; worker_processes {workers}; pid {home}/pid; error_log {home}/errors;
events {{ worker_connections 512; }}
http {{
  access_log off; sendfile on; sendfile_max_chunk 0; tcp_nopush on; keepalive_requests 1000000;
  client_body_temp_path {home}/body; proxy_temp_path {home}/proxy; fastcgi_temp_path {home}/fastcgi;
  uwsgi_temp_path {home}/uwsgi; scgi_temp_path {home}/scgi;
  server {{ listen 127.0.0.1:{port}; root {root}; keepalive_timeout {keepalive_seconds}s; }}
}}
"""


@contextmanager
def nginx(root: Path, home: Path, *, program: str | None = None, workers: int = 1,
          keepalive_seconds: int = 60) -> Iterator[str]:
    """Run nginx over ``root`` with its own files in ``home``; yields its URL.

    :param program: the path of nginx; when None it is looked up, and the test skipped where it is not installed.
    """
    program = need_program("nginx") if program is None else program
    home.mkdir(parents=True, exist_ok=True)
    for parent in (home, root):
        parent.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    configuration = home / "nginx.conf"
    user = "user root;" if home.owner() == "root" else ""
    configuration.write_text(user + _CONFIGURATION.format(home=home, root=root, port=port, workers=workers,
                                                          keepalive_seconds=keepalive_seconds))
    process = subprocess.Popen([program, "-p", str(home), "-e", str(home / "errors"), "-c", str(configuration)])
    try:
        for _ in range(1000):
            assert process.poll() is None, (home / "errors").read_text()
            try:
                socket.create_connection(("127.0.0.1", port), 0.05).close()
                break
            except OSError:
                continue
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)
