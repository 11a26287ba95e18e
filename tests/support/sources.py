"""One set of real images, put into every kind of place: a folder, tables, tar shards."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SCENES = Path(__file__).resolve().parents[2] / "model_families" / "assets" / "emoji_scenes"
SMALL_SDXL = Path(__file__).resolve().parents[1] / "assets" / "sdxl_miniature"
"""A trained SDXL of 32 px: a third of the work of the one that ships."""
FORMATS = {"jpg": {"quality": 90}, "png": {}, "webp": {"quality": 80}}
SHAPES = ((128, 128), (128, 96), (64, 128))


def write_folder(folder: Path, count: int = 24) -> Path:
    """Images of three aspects and three formats in two folders, with one or two captions each in a .txt."""
    for number, scene in enumerate(sorted(SCENES.glob("*.png"))[:count]):
        suffix, options = list(FORMATS.items())[number % 3]
        width, height = SHAPES[number // 3 % 3]
        name = f"{'a/b' if number % 2 else 'c d'}/{number:03d}.{suffix}"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(scene) as image:
            image.convert("RGB").resize((128, 128)).crop((0, 0, width, height)).save(path, **options)
        lines = [f"a scene, number {number}"] + [f"another word for {number}"] * (number % 4 == 0)
        path.with_suffix(".txt").write_text("\n".join(lines) + "\n")
    return folder


def rows(folder: Path) -> list[tuple[str, bytes, str]]:
    """(name, bytes, text of the caption file) of each image, not in the order of the names."""
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix[1:] in FORMATS]
    found = [
        (path.relative_to(folder).as_posix(), path.read_bytes(), path.with_suffix(".txt").read_text()) for path in paths
    ]
    return found[1::2] + found[::2]


def write_parquet(folder: Path, file: Path, *, struct: bool = True) -> Path:
    """Images inside, as structs of bytes and path, or as bytes beside a column of names."""
    found = rows(folder)
    if struct:
        columns = {"image": [{"bytes": data, "path": name} for name, data, _ in found]}
    else:
        columns = {"image": [data for _, data, _ in found], "name": [name for name, _, _ in found]}
    columns["caption"] = [text.splitlines() for _, _, text in found]
    pq.write_table(pa.table(columns), file, row_group_size=5)
    return file


def write_csv(folder: Path, file: Path) -> Path:
    """Paths relative to the folder."""
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["n", "image", "caption"])
        writer.writerows([number, name, text] for number, (name, _, text) in enumerate(rows(folder)))
    return file


def write_jsonl(folder: Path, file: Path) -> Path:
    """Paths relative to the folder, captions as a list."""
    lines = [json.dumps({"file_name": name, "text": text.splitlines()}) for name, _, text in rows(folder)]
    file.write_text("\n".join(lines) + "\n")
    return file


def write_shards(folder: Path, target: Path, *, as_json: bool = False, num_shards: int = 3) -> Path:
    """Tar shards of images with a .txt, or a .json, each."""
    target.mkdir(parents=True, exist_ok=True)
    found = rows(folder)
    for shard in range(num_shards):
        with tarfile.open(target / f"shard-{shard:03d}.tar", "w") as archive:
            for name, data, text in found[shard::num_shards]:
                beside = str(Path(name).with_suffix(".json" if as_json else ".txt"))
                add(archive, name, data)
                add(archive, beside, json.dumps({"meta": {"caption": text}}).encode() if as_json else text.encode())
    return target


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """One member."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))
