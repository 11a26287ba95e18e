"""Checks of a tracker: it takes whatever a run logs, continues after a resume, and writes below the output folder."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from ..plugin_api.tracker import RunInfo, Tracker
from .checks import ConformanceError, Subject, expect, failing
from .suite import Named

NAN = float("nan")
METRICS: dict[str, dict[str, float]] = {
    "an ordinary step": {"loss": 0.5, "lr": 1e-4, "grad_norm": 1},
    "nan": {"loss": NAN},
    "infinity": {"loss": float("inf"), "grad_norm": float("-inf")},
    "names with slashes": {"student/deep/er/loss": 0.1, "fake_score/loss": 0.2},
    "unicode": {"verlust/größe 損失": 0.1},
    "a name of 300 letters": {"x" * 300: 0.1},
    "no metrics": {},
    "a huge number": {"num_samples": 10**15, "tiny": 1e-300},
}
TEXTS = {"ordinary": "# Title\n\n*text*", "unicode": "größer 損失 \U0001f98a", "empty": "", "long": "word " * 20_000}
REMEDY = "a run logs such things; what it cannot show it must leave out"


def checks(subject: Subject) -> list[Named]:
    """Return checks in output folders of their own."""
    found: list[Named] = [("it runs from start to finish", partial(_whole, subject))]
    found += [(f"it takes {what}", partial(_logs, subject, metrics)) for what, metrics in METRICS.items()]
    found += [("it takes any text", partial(_texts, subject)), ("it takes any image", partial(_images, subject))]
    found += [
        ("it can finish at once", partial(_at_once, subject)),
        ("it starts again on the folder of a resumed run", partial(_resumed, subject)),
        ("it writes below the output folder alone", partial(_below, subject)),
    ]
    return found


@contextmanager
def _started(subject: Subject, folder: Path, *, resumed_step: int = 0) -> Iterator[Tracker]:
    subject.need_packages()
    tracker = subject.cls(subject.config())
    config = {"max_train_steps": 10, "nested": {"list": [1, None, "ü"]}}
    hparams = {"learning_rate": 1e-4, "model_type": "lora", "use_ema": True}
    with failing("start()", "it must open a run in output_dir"):
        tracker.start(RunInfo(folder, "conformance", "check", config, hparams, resumed_step))
    notices = tracker.notices()
    expect(
        isinstance(notices, list) and all(isinstance(line, str) for line in notices),
        f"notices() returned {notices!r}",
        "return a list of lines",
    )
    yield tracker


@contextmanager
def _folder() -> Iterator[Path]:
    """Yield an empty output folder; trackers of services write offline inside the block."""
    with tempfile.TemporaryDirectory(prefix="distill-check-") as place:
        folder = Path(place).resolve() / "output"
        folder.mkdir()
        yield folder


def _try(subject: Subject, use: Callable[[Tracker], Any], call: str) -> None:
    with _folder() as folder, _started(subject, folder) as tracker:
        with failing(call, REMEDY):
            use(tracker)
        with failing("finish()", "it must close what start() opened"):
            tracker.finish({"score": 0.5})


def _whole(subject: Subject) -> None:
    with _folder() as folder, _started(subject, folder) as tracker, failing("an ordinary run", REMEDY):
        for step in range(1, 4):
            tracker.log({"loss": 1 / step, "lr": 1e-4}, step)
        tracker.images("validation", {"a red fox": _image()}, 3)
        tracker.text("model card", TEXTS["ordinary"], 3)
        tracker.finish({"distance": 0.25})


def _logs(subject: Subject, metrics: dict[str, float]) -> None:
    _try(subject, lambda tracker: tracker.log(metrics, 1), f"log({_shown(metrics)}, 1)")


def _shown(metrics: dict[str, float]) -> str:
    text = repr(metrics)
    return text if len(text) < 80 else f"{text[:40]}...{text[-20:]}"


def _texts(subject: Subject) -> None:
    for name, text in TEXTS.items():
        _try(subject, lambda tracker, text=text: tracker.text("prompts/ü", text, 1), f"text() of {name} text")


def _images(subject: Subject) -> None:
    odd = {
        "no image": {},
        "a grey one": {"grey": _image().convert("L")},
        "one with transparency": {"clear": _image().convert("RGBA")},
        "one of a pixel": {"dot": _image().resize((1, 1))},
        "a caption with slashes, unicode and 500 letters": {"a/b\\c: größe\n損失 " + "x" * 500: _image()},
    }
    for what, images in odd.items():
        _try(subject, lambda tracker, images=images: tracker.images("validation", images, 1), f"images() of {what}")


def _image() -> Any:
    from PIL import Image

    return Image.new("RGB", (16, 8), (200, 60, 20))


def _at_once(subject: Subject) -> None:
    with _folder() as folder, _started(subject, folder) as tracker, failing("finish() without scores", "close the run"):
        tracker.finish()


def _resumed(subject: Subject) -> None:
    with _folder() as folder:
        for resumed_step in (0, 2):
            with _started(subject, folder, resumed_step=resumed_step) as tracker, failing("a resumed run", REMEDY):
                for step in range(resumed_step + 1, resumed_step + 4):
                    tracker.log({"loss": 1 / step}, step)
                if resumed_step:  # the first was killed
                    tracker.finish({"score": 0.5})


def _below(subject: Subject) -> None:
    """Check the files that this process opens for writing; a library's writes to its own cache are left out."""
    with _folder() as folder:
        elsewhere = folder.parent / "working directory"
        elsewhere.mkdir()
        others = folder / "metrics.jsonl"
        others.write_text("of the run\n")
        watching = failing("an ordinary run", REMEDY)
        with chdir(elsewhere), _writes() as written, _started(subject, folder) as tracker, watching:
            tracker.log({"loss": 0.5}, 1)
            tracker.text("prompts", "a red fox", 1)
            tracker.images("validation", {"a red fox": _image()}, 1)
            tracker.finish({"score": 0.5})
        outside = sorted({path for path in written if not _allowed(Path(path), folder)})
        outside += [str(path) for path in elsewhere.rglob("*") if str(path) not in outside]
        kept = others.is_file() and others.read_text() == "of the run\n"
    expect(
        kept, "it removed or changed a file in the output folder that is not its own", "write files of its own alone"
    )
    if outside:
        raise ConformanceError(
            f"it wrote outside of output_dir: {', '.join(outside[:3])}; write below run.output_dir alone, which "
            "people move, publish and delete"
        )


def _allowed(path: Path, folder: Path) -> bool:
    """Return True for a path in the output folder, a temporary file, a cache of the user, a device or bytecode."""
    home = Path.home()
    own = [folder, Path("/dev"), Path("/proc"), *(home / name for name in (".cache", ".config", ".local"))]
    if any(path.is_relative_to(place) for place in own) or "__pycache__" in path.parts:
        return True
    temporary = Path(tempfile.gettempdir()).resolve()
    if path.is_relative_to(folder.parent) or not path.is_relative_to(temporary):
        return False
    return path.relative_to(temporary).parts[0].startswith("tmp")


_watching: list[set[str]] = []


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        flags = arguments[2] if isinstance(arguments[2], int) else 0
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_APPEND | os.O_CREAT):
            for seen in _watching:
                seen.add(str(Path(os.fsdecode(arguments[0])).resolve()))


@cache
def _listen() -> None:
    """Install the audit hook, once: it stays for good."""
    sys.addaudithook(_hear)


@contextmanager
def _writes() -> Iterator[set[str]]:
    """Yield the paths that this process opens for writing inside the block."""
    _listen()
    seen: set[str] = set()
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.remove(seen)
