"""A dataset opened by the `datasets` library: of the hub, a folder, files or ``save_to_disk``, as a table or a stream.

The library runs no code of datasets; of its readers only those of the formats below are used, none of which unpickles.
"""

from __future__ import annotations

import atexit
import io
import json
import re
import sys
import tarfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from ..core.data.tables.columns import Row
from ..core.errors import BadValue, OutOfReach
from ..core.utils.suggest import did_you_mean

READERS = ("parquet", "arrow", "json", "csv", "text", "imagefolder", "webdataset")
"""Formats of the library that are read, and names that stand for them as ``dataset_name``."""
COLUMNAR = frozenset({"parquet"})
"""Formats that keep columns apart, so that some are read without the others."""
CACHED = "cache"
"""The library's reader of what it has downloaded and prepared earlier, without a network."""
SUFFIXES = {
    ".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tar": "webdataset",
}  # fmt: skip
FEW_SHARDS = 32
"""Up to this many files a stream is cut finer where the format allows it (row groups), to resume nearer by."""
LOG_IN = "log in: hf auth login (or HF_TOKEN)"
COMMIT = re.compile(r"[0-9a-f]{40}")
SLICE = re.compile(r"(?P<name>[^\[\]+]+)\[(?P<start>\d*):(?P<end>\d*)\]")
THREADS_END_SECONDS = 0.3
"""Arrow's threads end a little after a broken-off stream; an interpreter that ends before them is aborted."""

RowScan = Generator[tuple[int, Row, Callable[[], str]], None, None]
"""(number of the row, the row, a function that returns the token by which reading goes on behind it)."""


class Source:
    """One split of a dataset.

    Args:
        config: The entry's keys.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        path = Path(config.dataset_name)
        self.path = path if path.is_absolute() else None
        self.is_saved = path.is_absolute() and any(
            (path / name).is_file() for name in ("state.json", "dataset_dict.json")
        )

    @property
    def on_hub(self) -> bool:
        """True if the dataset comes from the hub, rather than from this machine."""
        return self.path is None and self.config.dataset_name not in READERS

    @property
    def folder(self) -> Path | None:
        """The folder that its images' names are relative to."""
        if self.path is not None:
            return self.path if self.path.is_dir() else self.path.parent
        files = [Path(file) for file in self.config.data_files if "*" not in file]
        return files[0].parent if files and not self.on_hub else None

    def check(self) -> None:
        """Check everything that can be seen without the network. Raises BadValue."""
        name, files = self.config.dataset_name, self.config.data_files
        if self.path is not None and not self.path.exists():
            raise BadValue("dataset_name", name, "does not exist", "give a folder or file that is there, or a hub id")
        if self.path is not None and not self.path.name:
            raise BadValue("dataset_name", name, "is the root of all folders", "name the dataset's own folder")
        if name in READERS and not files:
            remedy = 'name them, as "data_files": ["train.parquet"], or give the folder as dataset_name'
            raise BadValue("data_files", None, f"{name!r} reads files, and none is named", remedy)
        for file in files if name in READERS else ():
            if not Path(file).is_absolute() and "://" not in file:
                remedy = "relative paths are relative to the file that names them; with a * they begin with ./"
                raise BadValue("data_files", file, "does not exist", remedy)

    # -- opening ----------------------------------------------------------------------------------------------------

    @cached_property
    def _builder(self) -> Any:
        return self._build()

    def _build(self, **more: Any) -> Any:
        from datasets import disable_progress_bars, load_dataset_builder

        if not sys.stderr.isatty():
            disable_progress_bars()
        config, files = self.config, list(self.config.data_files)
        name: str = config.dataset_name
        if self.path is not None and self.path.is_file():
            name, files = SUFFIXES.get(self.path.suffix.lower(), str(name)), [str(self.path)]
        with self._explained():
            builder = load_dataset_builder(
                name, config.dataset_config, data_files=files or None, cache_dir=config.cache_dir,
                revision=config.revision if self.on_hub else None, **more,
            )  # fmt: skip
        reader = type(builder).__module__.rpartition(".")[2]
        if reader not in (*READERS, CACHED):
            problem = f"is read by the library's reader {reader!r}, which is not used here"
            raise BadValue("dataset_name", config.dataset_name, problem, f"use {', '.join(READERS)} or a hub id")
        return builder

    @property
    def _reader(self) -> str:
        return type(self._builder).__module__.rpartition(".")[2]

    def identity(self) -> str:
        """Return a text that changes whenever the rows may have: the commit on the hub, or names, sizes and times of
        files.
        """
        if self.is_saved:
            saved = self._saved()
            return json.dumps([saved._fingerprint, _stamps([file["filename"] for file in saved.cache_files])])
        if self.on_hub and COMMIT.fullmatch(self.config.revision):
            return self.config.revision
        files = [str(file) for each in (self._builder.config.data_files or {}).values() for file in each]
        return json.dumps([self._builder.hash, self._builder.config_id, _stamps(files)])

    def _saved(self) -> Any:
        from datasets import DatasetDict, load_from_disk

        assert self.path is not None
        with self._explained():
            found = load_from_disk(self.path)
        name = self._names_of_splits(
            [str(each) for each in found] if isinstance(found, DatasetDict) else [str(found.split or "train")]
        )
        return found[name[0]] if isinstance(found, DatasetDict) else found

    def _names_of_splits(self, there: Sequence[str]) -> list[str]:
        """Return the splits that `split` names. Raises BadValue with those that there are."""
        names = [part.partition("[")[0].strip() for part in self.config.split.split("+")]
        for name in names:
            if name not in there and name != "all":
                remedy = f"{did_you_mean(name, there)}name one of them as split"
                problem = f"the dataset has no split {name!r}; it has {', '.join(map(repr, there)) or 'none'}"
                raise BadValue("split", self.config.split, problem, remedy)
        return names

    # -- as a table or as a stream ----------------------------------------------------------------------------------

    @cached_property
    def features(self) -> dict[str, Any]:
        """The type of each column."""
        if self.is_saved:
            return dict(self._saved().features)
        if self._reader == CACHED:
            return dict(self._prepared(self._builder).features)
        return dict(self._streamed(self._builder).features)

    def _builder_of(self, columns: Sequence[str]) -> Any:
        """Return the builder that reads these columns alone, where its format stores columns separately."""
        apart = self._reader in COLUMNAR and len(columns) < len(self.features)
        return self._build(columns=list(columns)) if apart else self._builder

    def table(self, columns: Sequence[str], image: str | None) -> Any:
        """Open the split with random access, mapped from the library's cache, images as bytes."""
        if self.is_saved:
            dataset = self._saved_part()
        else:  # with images all columns are kept, so that another choice of them prepares nothing anew
            dataset = self._prepared(self._builder if image else self._builder_of(columns))
        return _undecoded(dataset.select_columns(list(columns)), image)

    def _prepared(self, builder: Any) -> Any:
        self._names_of_splits(_splits(builder))
        with self._explained():
            builder.download_and_prepare(num_proc=self.config.num_proc)
            return builder.as_dataset(split=self.config.split)

    def _saved_part(self) -> Any:
        saved, (_, start, end) = self._saved(), self._part()
        return saved.select(range(start, len(saved) if end is None else min(end, len(saved))))

    def _part(self) -> tuple[str, int, int | None]:
        """Return name, first row and end of the split. Raises BadValue for a part that is not given in rows."""
        split = self.config.split
        if "[" not in split:
            return split, 0, None
        match = SLICE.fullmatch(split)
        if match is None:
            kind = "of a stream" if self.config.streaming else "of a dataset made by save_to_disk"
            remedy = "write train[100:200]" + (", or set streaming to false" if not self.is_saved else "")
            raise BadValue("split", split, f"a part {kind} is given in rows", remedy)
        return match["name"], int(match["start"] or 0), int(match["end"]) if match["end"] else None

    def stream(self, columns: Sequence[str], image: str | None) -> Any:
        """Open the split for reading in its order, images as bytes."""
        if self.is_saved:
            dataset = self._saved_part().to_iterable_dataset()
        else:
            dataset = self._streamed(self._builder_of(columns))
            if dataset.num_shards <= FEW_SHARDS:
                with self._explained():
                    dataset = dataset.reshard()
            _, start, end = self._part()
            dataset = dataset.skip(start) if start else dataset
            dataset = dataset if end is None else dataset.take(end - start)
        return _undecoded(dataset.decode(False).select_columns(list(columns)), image)

    def _streamed(self, builder: Any) -> Any:
        names = "+".join(self._names_of_splits(_splits(builder)))
        with self._explained():
            dataset = builder.as_streaming_dataset(split=names)
            return dataset if dataset.features else dataset._resolve_features()

    # -- reading ----------------------------------------------------------------------------------------------------

    def scan(self, columns: Sequence[str], image: str | None, resume: str = "") -> RowScan:
        """Yield rows in order, from the start or from behind the row that gave `resume`."""
        start, state = json.loads(resume) if resume else (0, None)
        if not self.config.streaming:
            table = self.table(columns, image)
            if start >= len(table):  # nothing lies behind the last row, and select() refuses to say so
                return
            part = table.select(range(start, len(table))) if start else table
            with self._explained():
                for number, row in enumerate(part, start):
                    yield number, row, lambda number=number: json.dumps([number + 1, None])
            return
        dataset = self.stream(columns, image)
        if state is not None:
            dataset.load_state_dict(state)
        _let_threads_end()
        with self._explained(), closing(iter(dataset)) as rows:
            for number, row in enumerate(rows, start):
                yield number, row, lambda number=number: json.dumps([number + 1, dataset.state_dict()])

    def fetched(self, url: str) -> BinaryIO:
        """Fetch a file that the dataset names. Raises FileNotFoundError, OutOfReach."""
        from datasets.utils.file_utils import xopen

        try:
            with xopen(url, "rb") as stream:
                return io.BytesIO(stream.read())
        except FileNotFoundError:
            raise
        except _errors() as error:
            raise OutOfReach(url, " ".join(str(error).split())[:300]) from error

    # -- what goes wrong --------------------------------------------------------------------------------------------

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the library's errors inside the block into BadValue or OutOfReach."""
        try:
            yield
        except _errors() as error:
            raise self._explain(error) from error

    def _explain(self, error: Exception) -> Exception:
        from datasets import config as library
        from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

        chain, name = list(_chain(error)), self.config.dataset_name
        text = " ".join(str(chain[-1] if isinstance(chain[-1], Exception) else error).split())[:300]
        if any(isinstance(each, GatedRepoError) for each in chain) or "gated" in str(error):
            remedy = (
                f"ask for access on https://huggingface.co/datasets/{name}, then log in: hf auth login (or HF_TOKEN)"
            )
            return BadValue("dataset_name", name, "is a gated dataset, and this machine has no access to it", remedy)
        if any(isinstance(each, RevisionNotFoundError) for each in chain):
            return BadValue(
                "revision", self.config.revision, f"is no revision of {name}", "name a branch, tag or commit"
            )
        if self.on_hub and library.HF_HUB_OFFLINE and any(isinstance(each, ConnectionError) for each in chain):
            remedy = "unset HF_HUB_OFFLINE, or give a folder of this machine"
            return BadValue("dataset_name", name, "is on the hub, and HF_HUB_OFFLINE is set", remedy)
        broken_off = next((each for each in chain if _is_network(each)), None)
        if broken_off is not None and not isinstance(error, FileNotFoundError):
            place = f"the dataset {name} on the Hugging Face hub" if self.on_hub else f"the dataset {name}"
            return OutOfReach(place, " ".join(str(broken_off).split())[:300])
        return self._unreadable(error, text)

    def _unreadable(self, error: Exception, text: str) -> BadValue:
        name = self.config.dataset_name
        if text.startswith("BuilderConfig") and "not found" in text:
            problem = f"the dataset has no such configuration; {text.partition('. ')[2]}"
            return BadValue("dataset_config", self.config.dataset_config, problem, "name one of them as dataset_config")
        if isinstance(error, FileNotFoundError) and self.on_hub:
            remedy = f"check the spelling; for a private dataset {LOG_IN}"
            return BadValue("dataset_name", name, "is neither on the Hugging Face hub nor a path that is there", remedy)
        if self.config.data_files:
            remedy = "give files that are there and whole"
            return BadValue("data_files", list(self.config.data_files), f"cannot be read: {text}", remedy)
        remedy = "check its files: .parquet, .arrow, .tar, .jsonl, .csv, or images with metadata"
        return BadValue("dataset_name", name, f"cannot be read: {text}", remedy)


def _errors() -> tuple[type[Exception], ...]:
    """Return the errors that the library, and those under it, raise when something cannot be read."""
    import pyarrow as pa
    from datasets.exceptions import DatasetsError

    return (OSError, ValueError, KeyError, pa.ArrowException, tarfile.TarError, _http_error(), DatasetsError)


def _undecoded(dataset: Any, image: str | None) -> Any:
    from datasets import Image

    if image is None or not isinstance(dataset.features[image], Image):
        return dataset
    return dataset.cast_column(image, Image(decode=False))


def _splits(builder: Any) -> list[str]:
    return [str(name) for name in (builder.config.data_files or builder.info.splits or {})]


def _stamps(files: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return name, size and time of the files that are on this machine."""
    paths = [Path(file) for file in files]
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file()]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _http_error() -> type[Exception]:
    """Return the error class of the hub's HTTP library, whichever that is."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def _is_network(error: BaseException) -> bool:
    from huggingface_hub.errors import LocalEntryNotFoundError

    return isinstance(error, (ConnectionError, TimeoutError, _http_error(), LocalEntryNotFoundError))


def _let_threads_end() -> None:
    atexit.unregister(_wait)
    atexit.register(_wait)


def _wait() -> None:
    time.sleep(THREADS_END_SECONDS)
