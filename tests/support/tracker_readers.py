"""What each tracker wrote, read back by its own library or from its own file format."""

from __future__ import annotations

import io
import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

Scalars = dict[str, list[tuple[int, float]]]


@dataclass
class Written:
    """One run: scalars by name as (step, value) in the order written, images and texts by name and step."""

    id: str
    scalars: Scalars = field(default_factory=dict)
    images: dict[tuple[str, int], Image.Image] = field(default_factory=dict)
    texts: dict[tuple[str, int], str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    hparams: dict[str, Any] = field(default_factory=dict)

    def last(self, name: str) -> dict[int, float]:
        """Step -> the value written last."""
        return dict(self.scalars[name])


def read_tensorboard(folder: Path) -> list[Written]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    sizes = {"images": 0, "tensors": 0, "scalars": 0}
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance=sizes).Reload()
    run, tags = Written(""), events.Tags()
    run.scalars = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in tags["scalars"]}
    for name in tags["images"]:
        for event in events.Images(name):
            run.images[name, event.step] = Image.open(io.BytesIO(event.encoded_image_string))
    for name in tags["tensors"]:
        if name.endswith("/text_summary"):
            for event in events.Tensors(name):
                run.texts[name.removesuffix("/text_summary"), event.step] = event.tensor_proto.string_val[0].decode()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    for name, value in HParamsPluginData.FromString(content).session_start_info.hparams.items():
        run.hparams[name] = getattr(value, value.WhichOneof("kind"))
    return [run]


def wandb_records(file: Path) -> list[Any]:
    """Records of a ``.wandb`` file, which wandb's process writes out some time after the run is finished."""
    end = time.monotonic() + 20
    while True:
        found = list(_parsed(file.read_bytes()))
        if found and found[-1].HasField("exit"):
            return found
        assert time.monotonic() < end, f"{file} is not whole: {len(found)} records"
        time.sleep(0.05)


def _parsed(data: bytes) -> Iterator[Any]:
    """A LevelDB log of protocol buffers behind a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    place, block, whole = 7, 32768, b""
    assert data[:4] in (b":W&B", b"")
    while place < len(data):
        if block - place % block < 7:  # the rest of a block that holds no header is padding
            place += block - place % block
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        part = data[place + 7 : place + 7 + length]
        whole = part if kind in (1, 2) else whole + part
        if kind in (1, 4):
            yield Record.FromString(whole)
        place += 7 + length


def read_wandb(folder: Path) -> list[Written]:
    """The offline folders of one id are one run."""
    runs: dict[str, Written] = {}
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        files = file.parent / "files"
        run = Written("")
        for record in wandb_records(file):
            if record.HasField("run"):
                run = runs.setdefault(record.run.run_id, Written(record.run.run_id))
                run.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif record.HasField("history"):
                _wandb_row(run, _nested(record.history.item), files)
            elif record.HasField("summary"):
                found = _nested(record.summary.update)
                run.scalars |= {name: [(-1, value)] for name, value in found.items() if name.startswith("scores/")}
    for run in runs.values():
        run.hparams = run.config.pop("hparams")
    return list(runs.values())


def _nested(items: Any) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for item in items:
        *above, last = item.nested_key or [item.key]
        inside = row
        for key in above:
            inside = inside.setdefault(key, {})
        inside[last] = json.loads(item.value_json)
    return row


def _wandb_row(run: Written, row: dict[str, Any], files: Path) -> None:
    step = row.pop("train/step", None)
    for name, value in row.items():
        if isinstance(value, dict) and value["_type"] == "images/separated":
            for caption, path in zip(value["captions"], value["filenames"], strict=True):
                run.images[f"{name}/{caption}", step] = Image.open(files / path)
        elif isinstance(value, dict):
            run.texts[name, step] = (files / value["path"]).read_text()
        elif not name.startswith("_"):
            run.scalars.setdefault(name, []).append((step, float(value)))


def read_trackio(folder: Path) -> list[Written]:
    import trackio

    assert Path(trackio.utils.TRACKIO_DIR) == folder / "trackio"
    runs = []
    for run in trackio.Api().runs("tests"):
        written = Written(run.id, config=dict(run.config or {}))
        written.hparams = written.config.pop("hparams")
        for row in trackio.SQLiteStorage.get_logs("tests", run.name, run_id=run.id):
            step = row.pop("step")
            for name, value in row.items():
                kind = value.get("_type") if isinstance(value, dict) else None
                if kind == "trackio.image":
                    file = folder / "trackio" / "media" / value["file_path"]
                    written.images[name, step] = Image.open(file)
                elif kind == "trackio.markdown":
                    written.texts[name, step] = value["_value"]
                elif name != "timestamp":
                    written.scalars.setdefault(name, []).append((step, float(value)))
        runs.append(written)
    return runs


def read_mlflow(folder: Path) -> list[Written]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tests")
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    return [_mlflow_run(client, run) for run in found]


def _mlflow_run(client: Any, run: Any) -> Written:
    artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
    written = Written(run.info.run_id, hparams=dict(run.data.params))
    written.config = json.loads((artifacts / "config.json").read_text())
    for name in run.data.metrics:
        history = client.get_metric_history(run.info.run_id, name)
        written.scalars[name] = [(metric.step, metric.value) for metric in history]
    for file in (artifacts / "images").glob("*.png"):
        name, _, step, *_ = file.name.split("+")
        written.images[name.replace("~", "/"), int(step)] = Image.open(file)
    for file in (artifacts / "text").rglob("*.md"):
        name, _, step = file.stem.rpartition("-step-")
        written.texts[name, int(step)] = file.read_text()
    return written


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "trackio": read_trackio, "mlflow": read_mlflow}
