"""Checks of a data backend: the same files under the same keys, every time, and clear errors."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ..errors import OutOfReach, UserError
from ..plugin_api.backend import DataBackend, SampleBackend, SampleChunk
from .checks import ConformanceError, NotApplicable, Subject, expect, failing, said
from .suite import Named

SIZES = {"a/b/003.png": (24, 16), "a/b/001.png": (16, 16), "a/002.png": (8, 24), "c d/größe-004.png": (32, 8)}
"""Key of an image -> its width and height."""
MISSING = "nowhere/no-such-image.png"


@dataclass
class Place:
    """The files in a place of the backend's kind, made by its example.

    Attributes:
        subject: The backend under test.
    """

    subject: Subject

    @cached_property
    def files(self) -> dict[str, bytes]:
        """Images and captions by key."""
        from PIL import Image

        found = {}
        for number, (key, size) in enumerate(SIZES.items()):
            stream = io.BytesIO()
            Image.effect_noise(size, 50 + number).convert("RGB").save(stream, "PNG")
            found[key] = stream.getvalue()
            found[key.replace(".png", ".txt")] = f"image number {number}, größer\n".encode()
        return found

    @property
    def images(self) -> dict[str, bytes]:
        """The images alone."""
        return {key: data for key, data in self.files.items() if key in SIZES}

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """Keys of an entry that names the place. Raises NotApplicable where the backend offers no example."""
        self.subject.need_packages()
        self._keep = tempfile.TemporaryDirectory(prefix="distill-check-")
        with failing("example()", "it is given an empty folder and files by key"):
            found = self.subject.own_example(Path(self._keep.name), self.files)
        if found is None:
            raise NotApplicable(
                "it offers no place to try: define `example(cls, folder, files)`, which puts the files into a place of "
                "its kind and returns the keys of an entry"
            )
        return found

    def open(self) -> Any:
        """Return the backend opened on the place."""
        with failing("making it", "Config must take what example() returned"):
            return self.subject.cls(self.subject.cls.Config(**self.settings))


def checks(subject: Subject) -> list[Named]:
    """Return checks on eight files: four images with captions, with folders, spaces and umlauts in their names."""
    place = Place(subject)
    shared: list[Named] = [
        ("it finds its place", partial(_finds, place)),
        ("a listing is complete and stable", partial(_lists, place)),
        ("it reads what is there", partial(_reads, place)),
        ("it reads in several threads", partial(_reads_in_threads, place)),
        ("what is not there is a FileNotFoundError", partial(_missing, place)),
        ("it writes, or says that it does not", partial(_writes, place)),
        ("a place that is not there is said", partial(_gone, place)),
    ]
    if not issubclass(subject.cls, SampleBackend):
        return shared
    return [
        *shared,
        ("samples come with captions and sizes", partial(_samples, place)),
        ("an image that has gone since is a FileNotFoundError", partial(_vanished, place)),
        ("a broken listing goes on where it stopped", partial(_resumes, place)),
        ("images pass in their order", partial(_passes, place)),
    ]


def _finds(place: Place) -> None:
    backend = place.open()
    with failing("check()", "the place is there"):
        backend.check()
    expect(isinstance(backend.location, str) and backend.location, "location is no text", "say the root, for messages")


def _lists(place: Place) -> None:
    backend = place.open()
    with failing("list()", "it yields an Entry for each object"):
        found = [list(backend.list()), list(backend.list()), list(place.open().list())]
    keys = [[entry.key for entry in entries] for entries in found]
    expect(
        all(entries == found[0] for entries in found),
        f"listed again, it is another listing: {keys[0]} and then {keys[1] if keys[1] != keys[0] else keys[2]}",
        "keys, sizes and versions change only when the content does, and come in sorted order",
    )
    samples = isinstance(backend, SampleBackend)
    wanted = place.images if samples else place.files
    for key in wanted:
        expect(key in keys[0], f"list() lacks {key!r}; it has {keys[0]}", "keys are POSIX paths relative to the root")
    strange = sorted(set(keys[0]) - set(place.files))
    expect(not strange, f"list() has {strange}, which nobody put there", "list what is under the root alone")
    expect(
        samples or keys[0] == sorted(keys[0]),
        f"list() is not sorted: {keys[0]}",
        "yield entries in order of their keys",
    )
    for entry in found[0]:
        right = entry.size in ({0, len(place.files[entry.key])} if samples else {len(place.files[entry.key])})
        expect(right, f"the size of {entry.key!r} is {entry.size}, and it has {len(place.files[entry.key])} bytes",
               "give the bytes of the content")  # fmt: skip
        expect(not entry.problem, f"{entry.key!r} has the problem {entry.problem!r}", "it can be read")


def _handles(place: Place, backend: DataBackend) -> dict[str, str]:
    """Return key -> the argument with which open() finds it."""
    if isinstance(backend, SampleBackend):
        pairs = [pair for chunk in backend.samples() for pair in zip(chunk.keys, chunk.positions, strict=True)]
        return dict(pairs)
    return {key: key for key in place.files}


def _content(backend: DataBackend, handle: str) -> bytes:
    with failing(f"open({handle!r})", "it returns a binary stream"), backend.open(handle) as stream:
        return stream.read()


def _same(place: Place, key: str, found: bytes) -> None:
    expected = place.files[key]
    expect(
        found == expected,
        f"{key!r} was read as {len(found)} bytes that differ from the {len(expected)} that were put there",
        "read the content whole and as it is",
    )


def _in_order(backend: DataBackend) -> bool:
    return isinstance(backend, SampleBackend) and backend.in_order


def _reads(place: Place) -> None:
    backend = place.open()
    if _in_order(backend):
        raise NotApplicable("its images are read in their order, by sequential()")
    for key, handle in _handles(place, backend).items():
        _same(place, key, _content(backend, handle))
        with backend.open(handle) as stream:
            part = stream.read(10)
        expect(part == place.files[key][:10], f"the first 10 bytes of {key!r} are {part!r}", "return a readable stream")
        _same(place, key, _content(backend, handle))
        if not isinstance(backend, SampleBackend):
            listed = next((entry for entry in backend.list() if entry.key == key), None)
            expect(listed is not None, f"list() lacks {key!r}", "keys are POSIX paths relative to the root")
            with failing(f"entry({key!r})", "it says what list() says"):
                alone = backend.entry(key)
            expect(alone == listed, f"entry({key!r}) is {alone}, list() says {listed}", "say the same in both")
            expect(backend.exists(key), f"exists({key!r}) is not true", "it is there")


def _reads_in_threads(place: Place) -> None:
    backend = place.open()
    if _in_order(backend):
        raise NotApplicable("its images are read in their order, by sequential()")
    jobs = [*_handles(place, backend).items()] * 4
    with ThreadPoolExecutor(4) as pool:
        contents = pool.map(lambda job: _content(backend, job[1]), jobs)
        for (key, _), found in zip(jobs, contents, strict=True):
            _same(place, key, found)


def _missing(place: Place) -> None:
    backend = place.open()
    calls: dict[str, Callable[[str], Any]] = {"open": lambda key: backend.open(key).read(), "entry": backend.entry}
    if isinstance(backend, SampleBackend):  # opened by places of its own making
        del calls["open"]
    for name, call in calls.items():
        try:
            call(MISSING)
        except FileNotFoundError as error:
            expect(
                MISSING in str(error),
                f"{name}() of a missing key says {error}",
                "name the key in the FileNotFoundError",
            )
        except Exception as error:
            raise ConformanceError(
                f"{name}({MISSING!r}) raised {said(error)}; raise FileNotFoundError(key) for what is "
                "not there, so that the image is quarantined and the run goes on"
            ) from error
        else:
            raise ConformanceError(f"{name}({MISSING!r}) returned something; raise FileNotFoundError(key)")
    with failing(f"exists({MISSING!r})", "answer False"):
        there = backend.exists(MISSING)
    expect(there is False, f"exists({MISSING!r}) is {there!r}", "answer False")


def _writes(place: Place) -> None:
    backend, key = place.open(), "new/folder/größe.bin"
    try:
        backend.write(key, b"first")
    except UserError as error:
        expect(error.remedy, f"write() refuses without a remedy: {error}", "say where caches can be kept instead")
        return
    except Exception as error:
        raise ConformanceError(
            f"write() raised {said(error)}; where nothing can be written raise a UserError"
        ) from error
    with failing("entry() of what was written", "it is there now"):
        first = backend.entry(key)
    expect(_content(backend, key) == b"first", f"what was written to {key!r} is not read back", "write it as it is")
    time.sleep(0.02)  # clocks of file systems tick
    with failing("write() of what is there", "it replaces it"):
        backend.write(key, b"other")
    second = backend.entry(key)
    expect(_content(backend, key) == b"other", "written again, the old content is read", "replace it")
    expect(
        second.version != first.version,
        f"the version is {second.version!r} before and after a change to as many other bytes",
        "it must change with the content: a modification time, an ETag, a hash",
    )
    with failing("upload()", "it writes a file of this machine"), tempfile.NamedTemporaryFile() as file:
        file.write(b"third")
        file.flush()
        backend.upload(key, Path(file.name))
    expect(_content(backend, key) == b"third", "what was uploaded is not read back", "write the file whole")
    try:
        backend.delete(key)
    except UserError:
        return
    expect(not backend.exists(key), f"{key!r} is there after delete()", "remove it, or refuse with a UserError")
    with failing("delete() of what is gone", "it may be gone already"):
        backend.delete(key)


def _gone(place: Place) -> None:
    """Check the example's place after its folder was removed."""
    gone = {key: value for key, value in place.settings.items() if isinstance(value, str | Path)}
    root = str(place._keep.name)
    moved = {key: str(value).replace(root, f"{root}-gone") for key, value in gone.items() if root in str(value)}
    if not moved:
        raise NotApplicable("example() names no path below the folder that it was given")
    from ..errors import BadValue

    try:
        backend = place.subject.cls(place.subject.cls.Config(**{**place.settings, **moved}))
        backend.check()
        found = list(backend.list())
    except (BadValue, UserError, OutOfReach):
        return
    except Exception as error:
        raise ConformanceError(
            f"of a place that is not there it says {said(error)}; raise BadValue in check(), with "
            "the key of the entry, its value and a remedy"
        ) from error
    raise ConformanceError(
        f"a place that is not there is listed as {len(found)} files; raise BadValue in check(), or UserError in list()"
    )


# -- samples ----------------------------------------------------------------------------------------------------------


def _chunks(backend: SampleBackend) -> list[SampleChunk]:
    with failing("samples()", "it yields SampleChunks"):
        chunks = list(backend.samples())
    for chunk in chunks:
        expect(isinstance(chunk, SampleChunk), f"samples() yields {type(chunk).__name__}", "yield SampleChunks")
    return chunks


def _samples(place: Place) -> None:
    backend = place.open()
    with failing("identity()", "it returns a text"):
        identity = backend.identity()
    chunks = _chunks(backend)
    expect(isinstance(identity, str) and identity == place.open().identity(), "identity() is not the same twice",
           "it changes only when the samples may have")  # fmt: skip
    keys: list[str] = []
    for chunk in chunks:
        columns = ("positions", "sizes", "versions", "captions", "widths", "heights", "problems")
        lengths = {name: len(getattr(chunk, name)) for name in columns}
        expect(set(lengths.values()) == {len(chunk)}, f"a chunk of {len(chunk)} keys has {lengths}", "fill all columns")
        keys += chunk.keys
        for row, key in enumerate(chunk.keys):
            caption = place.files[key.replace(".png", ".txt")].decode().strip()
            found = [text.strip() for text in chunk.captions[row]]
            expect(found == [caption], f"{key!r} has the captions {found}, not {[caption]}", "give each sample its own")
            size = (chunk.widths[row], chunk.heights[row])
            expect(size in ((0, 0), SIZES[key]), f"{key!r} is said to be {size}, and is {SIZES[key]}", "0 is not known")
    expect(sorted(keys) == sorted(SIZES), f"samples() names {sorted(keys)}, not {sorted(SIZES)}", "each sample once")


def _vanished(place: Place) -> None:
    """Check a read of the last sample, as it was listed, after the place was made again without it."""
    backend = place.open()
    if backend.in_order:
        raise NotApplicable("its images are read in their order, by sequential()")
    handle = list(_handles(place, backend).values())[-1]
    kept = sorted(SIZES)[:2]
    files = {key: data for key, data in place.files.items() if Path(key).with_suffix(".png").as_posix() in kept}
    with tempfile.TemporaryDirectory(prefix="distill-check-") as folder:
        settings = place.subject.own_example(Path(folder), files)
        smaller = place.subject.cls(place.subject.cls.Config(**settings))
        try:  # a place may be a number that another image has now: what is returned says nothing
            smaller.open(handle).close()
        except FileNotFoundError:
            return
        except Exception as error:
            raise ConformanceError(
                f"open({handle!r}) of a sample that is not there any more raised {said(error)}; "
                "raise FileNotFoundError, so that the image is quarantined and the run goes on"
            ) from error


def _resumes(place: Place) -> None:
    backend = place.open()
    chunks = _chunks(backend)
    marked = [index for index, chunk in enumerate(chunks) if chunk.resume]
    if not marked:
        raise NotApplicable("its chunks carry no `resume`: a listing that is broken off begins anew")
    for index in marked:
        with failing("samples_after()", "it goes on behind the chunk that carried `resume`"):
            rest = [key for chunk in place.open().samples_after(chunks[index].resume) for key in chunk.keys]
        expected = [key for chunk in chunks[index + 1 :] for key in chunk.keys]
        expect(
            rest == expected, f"behind chunk {index} it goes on with {rest}, not {expected}", "neither twice nor never"
        )


def _passes(place: Place) -> None:
    backend = place.open()
    if not backend.in_order:
        raise NotApplicable("its images are read by open()")
    names = {int(handle): key for key, handle in _handles(place, backend).items()}
    with failing("sequential()", "it yields SequentialChunks"):
        chunks = list(backend.sequential())
    seen = [(p, image) for chunk in chunks for p, image in zip(chunk.positions, chunk.images, strict=True)]
    positions = [p for p, _ in seen]
    expect(
        positions == sorted(names),
        f"sequential() gives the positions {positions}, samples() {sorted(names)}",
        "all, growing",
    )
    for number, image in seen:
        with image() as stream:
            _same(place, names[number], stream.read())
    for index, chunk in enumerate(chunks):
        rest = [p for later in backend.sequential(chunk.resume) for p in later.positions]
        expected = [p for later in chunks[index + 1 :] for p in later.positions]
        expect(
            rest == expected,
            f"behind chunk {index} it goes on with {rest}, not {expected}",
            "neither twice nor never",
        )
