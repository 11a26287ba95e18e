"""A run's folder written by hand, and a reader of the page that is made of it."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from PIL import Image

VOID = {"meta", "img", "input", "br", "link"}
EVIL = "<script>alert(1)</script> \"'><img src=http://evil.example/x onerror=alert(2)> a fox & its é 狐"


class Page(HTMLParser):
    """The page's elements, images and text; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag, f"</{tag}>"

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        """Attributes of every element of that name."""
        return [attributes for name, attributes in self.tags if name == tag]

    def images(self) -> list[Image.Image]:
        """Every image, decoded."""
        found = []
        for image in self.all("img"):
            head, _, data = image["src"].partition(",")
            assert head == "data:image/jpeg;base64"
            decoded = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
            decoded.load()
            assert (str(decoded.width), str(decoded.height)) == (image["width"], image["height"])
            found.append(decoded)
        return found

    def lines(self, name: str) -> dict[str, list[list[float]]]:
        """Steps and values of each line of a chart, by the run's label."""
        (chart,) = [svg for svg in self.all("svg") if svg["aria-label"] == f"{name} over the steps"]
        return {line["label"]: line["points"] for line in json.loads(chart["data-lines"])}

    def points(self, name: str) -> list[list[float]]:
        """Steps and values of a curve of one line."""
        (points,) = self.lines(name).values()
        return points


def loads_nothing(html: str) -> None:
    """Fail where the page would ask for anything outside itself."""
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                assert value.startswith(("data:image/jpeg;base64,", "#")), (tag, name, value[:80])
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.S)
    assert "url(" not in style
    assert "@import" not in style
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy


def write_folder(folder: Path, *, steps: int = 50, validations: int = 3, size: tuple[int, int] = (300, 200)) -> Path:
    """What a finished run leaves, with a prompt and a name that mean harm."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "distillation_method": "lcm", "model_family": "sdxl", "pretrained_model_name_or_path": "/models/big",
        "model_type": "lora", "lora_rank": 64, "max_train_steps": steps, "validation_prompt": [EVIL],
        "aws_secret_access_key": "s3cr3t",
    }  # fmt: skip
    (folder / "config.resolved.json").write_text(json.dumps(config))
    rows = [
        {"step": step, "loss": 1 / step, "lr": 1e-4, EVIL: step % 7, "samples_per_second": 12.5}
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in range(1, validations + 1):
        image(folder / "validation" / f"step-{number * 10:06d}" / "grid.png", size)
    write_evaluation(folder)
    image(folder / "data" / "foxes" / "contact-sheet.png", size)
    report = {
        "id": EVIL, "noun": "image", "used": 1200, "found": 1300, "different_captions": 438, "buckets": [{}],
        "left_out": {EVIL: 100}, "broken": {}, "without_caption": [],
    }  # fmt: skip
    (folder / "data" / "foxes" / "report.json").write_text(json.dumps(report))
    (folder / "student").mkdir()
    (folder / "student" / "README.md").write_text("# x\n\n```python\nimport torch\nprint('</code>')\n```\n")
    lines = ["run begins", f"warning: {EVIL}", "data ready\nin two lines", "run ends well"]
    stamped = [f"2026-01-02T03:0{minute}:00Z {line}" for minute, line in enumerate(lines)]
    (folder / "run.log").write_text("\n".join(line.replace("\n", "\n    ") for line in stamped) + "\n")
    return folder


SAMPLES = {"num_samples": 64, "num_data": 1000, "seed": 1, "width": 32, "height": 32, "prompts": "abc"}


def write_scores(folder: Path, scores: dict[int, float]) -> None:
    """Scores of validations by step, the teacher's of the same samples, and a student's image at each."""
    for step, score in scores.items():
        made = {
            "step": step, "samples": SAMPLES, "sampling": {"steps": 2, "guidance": 0.0},
            "higher_is_better": {EVIL: True, "a_distance": False}, "scores": {EVIL: score, "a_distance": 1 - score},
            "parts": {EVIL: [score] * 4}, "left_out": {"fid": EVIL},
        }  # fmt: skip
        place = folder / "validation" / f"step-{step:06d}"
        image(place / "grid.png", (300, 200))
        (place / "scores.json").write_text(json.dumps(made))
        for number, prompt in enumerate(("a-red-fish", f"only-in-{folder.name}")):
            image(place / f"{number:02d}-{prompt}-32x32-seed1.png", (32, 32))
            image(folder / f"validation/teacher/{number:02d}-{prompt}-32x32-seed1-50steps-ab.png", (32, 32))
    found = json.loads((folder / "evaluation.json").read_text())
    found["validation_reference"] = {"steps": 50, "samples": SAMPLES, "scores": {EVIL: 0.95}}
    (folder / "evaluation.json").write_text(json.dumps(found))


def write_evaluation(folder: Path) -> None:
    row = {"guidance": 0.0, "scheduler": None, "seconds_single": 0.1}
    evaluation = {
        "num_samples": 16, "num_data": 1000, "width": 32, "height": 32, "device": "cpu",
        "higher_is_better": {EVIL: True, "distance": False}, "left_out": {"clip": EVIL},
        "rows": [
            {**row, "name": "teacher", "role": "teacher", "steps": 50, "scores": {EVIL: 0.123456789},
             "seconds_per_image": 0.5},
            {**row, "name": "student", "role": "student", "steps": 2, "scores": {EVIL: 0.9, "distance": 1e-7},
             "seconds_per_image": 0.02},
        ],
    }  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    image(folder / "evaluation.png", (500, 400))


def image(file: Path, size: tuple[int, int]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.radial_gradient("L").resize(size).convert("RGB").save(file)
