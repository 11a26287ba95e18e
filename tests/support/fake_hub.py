"""A Hugging Face hub on this machine: repositories are folders, and what was sent of each file is counted."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0" * 40


@dataclass
class Hub:
    """Repositories below a folder, as ``owner/name``.

    Attributes:
        root: The folder.
        address: URL.
        sent: File of a repository -> bytes of it that were sent.
    """

    root: Path
    address: str = ""
    sent: dict[str, int] = field(default_factory=dict)

    def weights(self) -> dict[str, int]:
        """What was sent of files of weights."""
        return {name: sent for name, sent in self.sent.items() if name.endswith(".safetensors")}


class Answers(BaseHTTPRequestHandler):
    """What the hub's client asks for: files or ranges of them, the facts of a repository, and its tree."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/").split("/")
        if path[:2] == ["api", "models"]:
            self.describe(self.hub.root / path[2] / path[3], tree="tree" in path)
        else:
            self.give(self.hub.root / path[0] / path[1], "/".join(path[4:]))

    def describe(self, folder: Path, *, tree: bool) -> None:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        named = [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]
        facts: Any = {"id": folder.name, "sha": COMMIT, "siblings": [{"rfilename": name} for name, _ in named]}
        found = [{"type": "file", "path": name, "size": size, "oid": COMMIT} for name, size in named]
        self.send(200, json.dumps(found if tree else facts).encode(), {"Content-Type": "application/json"})

    def give(self, folder: Path, file: str) -> None:
        if not (folder / file).is_file():
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = (folder / file).read_bytes()
        head = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status, asked = 200, self.headers.get("Range")
        if asked:
            first, last = asked.removeprefix("bytes=").split("-")
            head["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            status, content = 206, content[int(first) : int(last) + 1 if last else None]
        if self.command == "GET":
            self.hub.sent[file] = self.hub.sent.get(file, 0) + len(content)
        self.send(status, content, head)

    def send(self, status: int, content: bytes, head: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**head, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def fake_hub(root: Path, *, cache: Path) -> Iterator[Hub]:
    """The hub of this process inside the block, with an empty cache."""
    from distill.model_families.files.hub import hub_answers
    from huggingface_hub import constants

    hub = Hub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfHub", (Answers,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub_answers.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HF_HUB_OFFLINE": False, "ENDPOINT": hub.address, "HF_HUB_CACHE": str(cache)}.items():
            patch.setattr(constants, name, value)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setenv("NO_PROXY", "127.0.0.1")
        try:
            yield hub
        finally:
            hub_answers.cache_clear()
            server.shutdown()
            server.server_close()
