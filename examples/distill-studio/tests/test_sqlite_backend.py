"""The backend on a small database."""

import sqlite3
from contextlib import closing

import pytest
from distill import BadValue
from distill_studio.sqlite_backend import SQLite


@pytest.fixture
def backend(tmp_path):
    file = tmp_path / "images.sqlite"
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("CREATE TABLE images (name TEXT PRIMARY KEY, image BLOB, caption TEXT)")
        rows = [(f"{number:04d}.png", b"image %d" % number, f"number {number}") for number in range(2500)]
        connection.executemany("INSERT INTO images VALUES (?, ?, ?)", [*rows, ("none.png", None, None)])
    return SQLite(SQLite.Config(database=file))


def test_every_row_is_a_sample_that_can_be_opened(backend):
    chunks = list(backend.samples())
    assert [len(chunk) for chunk in chunks] == [1000, 1000, 501]
    assert (chunks[2].keys[499], chunks[2].captions[499]) == ("2499.png", ["number 2499"])
    assert backend.open(chunks[2].positions[499]).read() == b"image 2499"
    assert (chunks[2].problems[500], chunks[2].captions[500]) == ("it has no image", [])


def test_a_listing_goes_on_behind_any_chunk(backend):
    first, *rest = backend.samples()
    assert list(backend.samples_after(first.resume)) == rest


def test_a_row_that_is_not_there(backend):
    with pytest.raises(FileNotFoundError):
        backend.open("2502")


@pytest.mark.parametrize(("key", "value"), [("image_column", "photo"), ("table", "photos")])
def test_a_wrong_name_is_said_with_those_that_there_are(backend, key, value):
    wrong = SQLite(backend.config.model_copy(update={key: value}))
    with pytest.raises(BadValue, match=value) as raised:
        wrong.check_samples(images=True, captions=True)
    assert raised.value.remedy in ("it has name, image, caption", "name one that is")
