"""Checks of a publisher before it publishes: it reports problems, without the network."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from .checks import Subject, expect, failing
from .suite import Named


def checks(subject: Subject) -> list[Named]:
    """Return the checks; publishing itself is left to its author, since it needs an account of the service."""
    return [
        ("problems() are told without the network", partial(_problems, subject)),
        ("a run asks for it by its name", partial(_asked_for, subject)),
    ]


@contextmanager
def _offline() -> Iterator[list[Any]]:
    """Refuse every connection inside the block; yield the list of attempts."""
    asked: list[Any] = []

    def refuse(self: socket.socket, address: Any) -> Any:
        asked.append(address)
        raise ConnectionRefusedError(f"no network during this check: {address}")

    def unknown(host: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "no network during this check")

    before = (socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo)
    socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo = refuse, refuse, unknown  # type: ignore[method-assign,assignment]
    try:
        yield asked
    finally:
        socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo = before  # type: ignore[method-assign]


def _problems(subject: Subject) -> None:
    subject.need_packages()
    publisher = subject.cls(subject.config())
    with _offline() as asked, failing("problems()", "it returns what it lacks (a token, an id) as sentences"):
        found = publisher.problems()
    expect(
        not asked, f"problems() asked the network for {asked[:1]}", "it is called at every start: look at files alone"
    )
    sentences = isinstance(found, list) and all(isinstance(line, str) and line for line in found)
    expect(sentences, f"problems() returned {found!r}", "return a list of sentences, empty where nothing is wrong")


def _asked_for(subject: Subject) -> None:
    from ..settings.run_settings import RunSettings

    cls, config = subject.cls, subject.config()
    with failing("from_run()", "it is given the run's keys and its own settings, or None"):
        silent = cls.from_run(RunSettings(), None)
        named = cls.from_run(RunSettings(publish_to=(cls.name,)), config)
    expect(silent is None, "it publishes although nobody asked for it", "return None from from_run() then")
    expect(
        isinstance(named, cls.Config),
        f"from_run() of a run with publish_to={cls.name} returned {named!r}",
        "return its settings: its Config",
    )
