"""A real S3 server on loopback for tests: a process that can be stopped and come back with all that it holds.

from support.s3_server import s3, s3_server  # two fixtures; name both, the second serves the first

def test_something(s3):
    s3.put("bucket", "images/a.png", data)
    s3.fill("bucket", "images", folder)
    store = open_store("s3://bucket/images", access=s3.access(), retry=QUICK)
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from distill.core.storage import RetryPolicy
from distill.core.storage.s3 import S3Access

KEY_ID, SECRET, REGION = "AKIATESTKEYID", "a-very/secret+value", "us-east-1"
QUICK = RetryPolicy(attempts=3, base_seconds=0.01, max_seconds=0.05, timeout_seconds=5, connect_seconds=2)
"""Gives up within a second."""


class S3Server:
    """A moto server in a process; `client` is boto's own, so that the code under test is not tested with itself.

    Args:
        folder: Where it keeps what it holds, so that its process can be killed and come back.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self.port = folder, quiet_port() if folder else 0
        self._launch()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.client = boto_client(self.endpoint)
        self.running = True

    def _launch(self) -> None:
        given = [] if self.folder is None else [str(self.port), str(self.folder)]
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("s3_process.py")), *given],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def kill(self) -> None:
        """End the process with SIGKILL, in the middle of whatever it does."""
        self.close()
        self.running = False

    def revive(self) -> None:
        """Start it again, on the same port and with all that it held."""
        self._launch()
        self.running = True

    def freeze(self) -> None:
        """Let the process stand still: connections stay, and nothing is answered."""
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on with what came in meanwhile."""
        os.kill(self._process.pid, signal.SIGCONT)

    def requests(self) -> list[str]:
        """``METHOD /bucket/key`` of every request so far, of a server with a folder."""
        assert self.folder is not None
        return (self.folder / "requests.log").read_text().splitlines()

    def _tell(self, command: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "done\n"

    def stop(self) -> None:
        """End all connections and refuse new ones."""
        self._tell("stop")
        self.running = False

    def start(self) -> None:
        """Be there again, with all objects."""
        self._tell("start")
        self.running = True

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def access(self, **changes) -> S3Access:
        """How the server is reached."""
        return S3Access(**{"region": REGION, "endpoint": self.endpoint, "key_id": KEY_ID, "secret": SECRET, **changes})

    def keys(self, bucket: str, **more) -> dict[str, object]:
        """The keys of a data-file entry that reaches a bucket here."""
        return {
            "type": "s3", "aws_bucket_name": bucket, "aws_endpoint_url": self.endpoint, "aws_region_name": REGION,
            "aws_access_key_id": KEY_ID, "aws_secret_access_key": SECRET, **more,
        }  # fmt: skip

    # -- what it holds ------------------------------------------------------------------------------------------------

    def bucket(self, name: str) -> str:
        """An empty bucket."""
        if name in [found["Name"] for found in self.client.list_buckets()["Buckets"]]:
            for key in self.objects(name):
                self.client.delete_object(Bucket=name, Key=key)
        else:
            self.client.create_bucket(Bucket=name)
        return name

    def put(self, bucket: str, key: str, data: bytes) -> None:
        """An object."""
        self.client.put_object(Bucket=bucket, Key=key, Body=data)

    def fill(self, bucket: str, prefix: str, folder: Path) -> None:
        """All files of a folder, under their relative paths."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(bucket, f"{prefix}/{path.relative_to(folder).as_posix()}".lstrip("/"), path.read_bytes())

    def get(self, bucket: str, key: str) -> bytes:
        """An object's bytes."""
        return self.client.get_object(Bucket=bucket, Key=key)["Body"].read()

    def objects(self, bucket: str, prefix: str = "") -> list[str]:
        """All keys."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]


def quiet_port() -> int:
    """A free port that the system gives to nobody else while the server is away.

    One from the range of outgoing connections may be taken by a client that asks for it in vain: it then reaches
    itself, and the server cannot come back.
    """
    for port in range(21_000, 32_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def boto_client(endpoint: str, *, key_id: str = KEY_ID, secret: str = SECRET):
    """boto's own client of a server."""
    import botocore.session

    session = botocore.session.Session()
    return session.create_client(
        "s3", endpoint_url=endpoint, aws_access_key_id=key_id, aws_secret_access_key=secret, region_name=REGION
    )


@pytest.fixture(scope="session")
def s3_server():
    """The server of all tests of one session."""
    server = S3Server()
    yield server
    server.close()


def without_account(monkeypatch) -> None:
    """Take credentials out of the environment."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")


@pytest.fixture
def s3(s3_server, monkeypatch):
    """The server, running, in an environment without credentials of its own."""
    without_account(monkeypatch)
    if not s3_server.running:
        s3_server.start()
    return s3_server
