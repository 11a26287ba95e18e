"""The images and captions of a folder in every form that the `datasets` library reads."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Rows = list[tuple[str, bytes, str]]
"""(name, bytes, caption) of each image."""


def rows_of(folder: Path) -> Rows:
    """What lies in a folder of images with .txt files."""
    return [
        (path.relative_to(folder).as_posix(), path.read_bytes(), path.with_suffix(".txt").read_text())
        for path in sorted(folder.rglob("*.png"))
    ]


def halves(rows: Rows) -> list[Rows]:
    return [rows[: len(rows) // 2], rows[len(rows) // 2 :]]


def table_of(rows: Rows) -> pa.Table:
    from PIL import Image

    sizes = [Image.open(io.BytesIO(data)).size for _, data, _ in rows]
    columns: dict[str, list[Any]] = {
        "image": [{"bytes": data, "path": name} for name, data, _ in rows],
        "caption": [text for *_, text in rows],
        "meta": [{"caption": text, "score": int(Path(name).stem)} for name, _, text in rows],
        "file": [name for name, *_ in rows],
        "w": [width for width, _ in sizes],
        "h": [height for _, height in sizes],
    }
    return pa.table(columns)


def parquet(rows: Rows, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number, half in enumerate(halves(rows)):
        pq.write_table(table_of(half), folder / f"train-{number:05d}-of-00002.parquet", row_group_size=2)
    return folder


def image_folder(rows: Rows, folder: Path) -> Path:
    for name, data, _ in rows:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    lines = [json.dumps({"file_name": name, "caption": text}) for name, _, text in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def tars(rows: Rows, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number, half in enumerate(halves(rows)):
        with tarfile.open(folder / f"{number:04d}.tar", "w") as tar:
            for name, data, text in half:
                for member, content in ((name, data), (str(Path(name).with_suffix(".txt")), text.encode())):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def saved(rows: Rows, folder: Path) -> Path:
    from datasets import Dataset

    Dataset(table_of(rows)).save_to_disk(folder, num_shards=2)
    return folder


FORMS = {"parquet": parquet, "image_folder": image_folder, "tars": tars, "saved": saved}
