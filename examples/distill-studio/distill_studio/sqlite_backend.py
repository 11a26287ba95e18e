"""Images and captions in a table of an SQLite database."""

import io
import sqlite3
from contextlib import closing
from hashlib import blake2b
from pathlib import Path

import distill
from pydantic import Field

ROWS_AT_ONCE = 1000


class SQLite(distill.SampleBackend):
    """One image in each row: its bytes, its caption, and a name that no other has."""

    name = "sqlite"
    place_keys = ("database", "database")

    class Config(distill.SampleBackend.Config):
        """Where the table is, and which columns hold what."""

        database: Path
        """The database file (a relative path is relative to the file that names it)."""
        table: str = Field("images", min_length=1)
        """The table or view."""
        name_column: str = Field("name", min_length=1)
        """Column of the samples' names."""
        image_column: str = Field("image", min_length=1)
        """Column of the images' bytes, as PNG, JPEG or WebP."""
        caption_column: str = Field("caption", min_length=1)
        """Column of the captions."""

    @property
    def location(self):
        return f"{self.config.database} ({self.config.table})"

    def check(self):
        if not self.config.database.is_file():
            remedy = "name the database file: --set data.<id>.database=FILE"
            raise distill.BadValue("database", str(self.config.database), "does not exist", remedy)

    def check_samples(self, *, images, captions):
        config = self.config
        wanted = {"name_column": config.name_column}
        wanted |= {"image_column": config.image_column} if images else {}
        wanted |= {"caption_column": config.caption_column} if captions else {}
        with self._connection() as connection:
            there = [row[1] for row in connection.execute(f"PRAGMA table_info({quoted(config.table)})")]
        if not there:
            raise distill.BadValue("table", config.table, "is not in the database", "name one that is")
        for key, column in wanted.items():
            if column not in there:
                problem = f"is no column of the table {config.table!r}"
                raise distill.BadValue(key, column, problem, f"it has {', '.join(there)}")

    def identity(self):
        status = self.config.database.stat()
        return f"{status.st_size} {status.st_mtime_ns} {self.config.model_dump(exclude={'database'})}"

    def samples(self, *, images=True):
        return self._chunks("0", images)

    def samples_after(self, resume):
        return self._chunks(resume, True)

    def open(self, key):
        config = self.config
        query = f"SELECT {quoted(config.image_column)} FROM {quoted(config.table)} WHERE rowid = ?"
        with self._connection() as connection:
            row = connection.execute(query, (int(key),)).fetchone()
        if row is None or row[0] is None:
            raise FileNotFoundError(f"row {key} of {self.location}")
        return io.BytesIO(row[0])

    def _chunks(self, after, images):
        """Some thousand rows at a time, in the order of their numbers, behind the row `after`."""
        config = self.config
        image = quoted(config.image_column) if images else "NULL"
        columns = f"rowid, {quoted(config.name_column)}, {image}, {quoted(config.caption_column)}"
        query = f"SELECT {columns} FROM {quoted(config.table)} WHERE rowid > ? ORDER BY rowid LIMIT {ROWS_AT_ONCE}"
        while True:
            with self._connection() as connection:
                rows = connection.execute(query, (int(after),)).fetchall()
            if not rows:
                return
            after = str(rows[-1][0])
            yield chunk(rows, resume=after, images=images)

    @classmethod
    def example(cls, folder, files):
        """A database of `files` (bytes by key; a caption is the .txt of its image's name), to be checked on."""
        images = {key: data for key, data in files.items() if not key.endswith(".txt")}
        with closing(sqlite3.connect(folder / "example.sqlite")) as connection, connection:
            connection.execute("CREATE TABLE images (name TEXT PRIMARY KEY, image BLOB, caption TEXT)")
            for key, data in images.items():
                caption = files[Path(key).with_suffix(".txt").as_posix()].decode()
                connection.execute("INSERT INTO images VALUES (?, ?, ?)", (key, data, caption.strip()))
        return {"database": folder / "example.sqlite"}

    def _connection(self):
        """A connection of its own for each call, since rows are read by several threads; nothing can be written."""
        return closing(sqlite3.connect(f"{self.config.database.resolve().as_uri()}?mode=ro", uri=True))


def chunk(rows, *, resume, images):
    """Samples of rows (number, name, image, caption); the width and height 0 stand for: ask the image."""
    data = [row[2] or b"" for row in rows]
    return distill.SampleChunk(
        keys=[str(row[1]) for row in rows],
        positions=[str(row[0]) for row in rows],
        sizes=[len(each) for each in data],
        versions=[blake2b(each, digest_size=16).hexdigest() for each in data],
        captions=[[row[3]] if row[3] else [] for row in rows],
        widths=[0] * len(rows),
        heights=[0] * len(rows),
        problems=["it has no image" if images and not each else "" for each in data],
        resume=resume,
    )


def quoted(name):
    """A name as SQL writes it."""
    return '"' + name.replace('"', '""') + '"'


@distill.hookimpl
def register_data_backends():
    return [SQLite]
