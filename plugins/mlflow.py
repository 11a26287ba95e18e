"""MLflow: a SQLite file under ``output_dir/mlflow``, or a tracking server."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.tracker import RunInfo, Tracker
from ..core.utils.files import write_text

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDER = "mlflow"
RUN_FILE = "mlflow-run.json"
MOST_AT_ONCE = 1000
"""Number of metrics that a server takes in one request."""
LONGEST_VALUE = 6000
"""Largest number of characters of a parameter's value."""
LONGEST_NAME = 250
"""Largest number of characters of a metric's name."""
LONGEST_FILE = 120
"""Largest number of characters of an image's name; its file adds the step, the time and a number of 32 characters."""


class MLflow(Tracker):
    """One MLflow run: metrics, parameters, images and texts, continued under the same id when the run is resumed.

    Parameters cannot be changed once they are written: a resumed run keeps those it began with, and the configuration
    that it continued with lies in the artifact ``config.json``.
    """

    name: ClassVar[str] = "mlflow"
    packages: ClassVar[Mapping[str, str]] = {"mlflow": "mlflow>=3"}

    class Config(BaseModel):
        """Settings of the MLflow run."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

        tracking_uri: str | None = None
        """Where the run is stored, as `http://host:5000` or `sqlite:////folder/mlflow.db`; absent: MLFLOW_TRACKING_URI,
        else a SQLite file in the output folder.
        """
        experiment: str | None = None
        """Experiment that the run belongs to; absent: tracker_project_name."""
        flush_seconds: float = Field(default=10.0, ge=0)
        """Seconds for which metrics are gathered before they are sent."""

        @field_validator("tracking_uri")
        @classmethod
        def _without_password(cls, uri: str | None) -> str | None:
            if uri and without_password(uri) != uri:
                raise ValueError(
                    "holds a password, which would be kept in config.resolved.json: set MLFLOW_TRACKING_URI, or "
                    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, in the environment"
                )
            return uri

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._client: Any = None
        self._run: str = ""
        self._uri: str = ""
        self._waiting: list[Any] = []
        self._sent = 0.0
        self._last_step = 0

    def start(self, run: RunInfo) -> None:
        """Open the run, or continue it, and write the configuration at once."""
        mlflow = _library()
        self._uri = self.config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or _own_store(run.output_dir)
        self._client = mlflow.MlflowClient(tracking_uri=self._uri)
        known = _known_run(run.output_dir / RUN_FILE, self._uri) if run.resumed_step else None
        self._run = known or self._create(run)
        if known:
            self._client.update_run(known, status="RUNNING")
        self._parameters(run.hparams)
        self._client.log_dict(self._run, dict(run.config), "config.json")
        self._last_step, self._sent = run.resumed_step, time.monotonic()

    def _create(self, run: RunInfo) -> str:
        name = self.config.experiment or run.project
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None:
            number = experiment.experiment_id
        else:
            own = self._uri == _own_store(run.output_dir)
            artifacts = (run.output_dir.absolute() / FOLDER / "artifacts").as_uri() if own else None
            number = self._client.create_experiment(name, artifact_location=artifacts)
        made = self._client.create_run(number, run_name=run.name).info.run_id
        write_text(
            run.output_dir / RUN_FILE, json.dumps({"id": made, "tracking_uri": without_password(self._uri)}) + "\n"
        )
        return made

    def _parameters(self, hparams: Mapping[str, Any]) -> None:
        Param = _library().entities.Param
        there = self._client.get_run(self._run).data.params
        new = [Param(key, str(value)[:LONGEST_VALUE]) for key, value in hparams.items() if key not in there]
        for start in range(0, len(new), 100):  # a server takes so many in one request
            self._client.log_batch(self._run, params=new[start : start + 100])

    def notices(self) -> list[str]:
        """Return how to look at the run."""
        return [f"watch with: mlflow ui --backend-store-uri {self._uri}"] if self._uri.startswith("sqlite") else []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Gather the metrics of the step."""
        Metric = _library().entities.Metric
        self._last_step, now = step, time.time_ns() // 10**6
        self._waiting += [Metric(accepted(name), value, now, step) for name, value in metrics.items()]
        if time.monotonic() - self._sent >= self.config.flush_seconds or len(self._waiting) >= MOST_AT_ONCE:
            self._send()

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        for start in range(0, len(waiting), MOST_AT_ONCE):
            self._client.log_batch(self._run, metrics=waiting[start : start + MOST_AT_ONCE])
        self._sent = time.monotonic()

    def images(self, name: str, images: Mapping[str, Image], step: int) -> None:
        """Write images under ``images/``, by step."""
        self._send()
        for caption, image in images.items():
            key = accepted(f"{name}/{caption}", more="", longest=LONGEST_FILE)
            self._client.log_image(self._run, image.convert("RGB"), key=key, step=step, synchronous=True)

    def text(self, name: str, text: str, step: int) -> None:
        """Write Markdown files under ``text/``, by step."""
        self._client.log_text(
            self._run, text, f"text/{accepted(name, more='', longest=LONGEST_FILE)}-step-{step:06d}.md"
        )

    def finish(self, scores: Mapping[str, float] | None = None) -> None:
        """Send the waiting metrics and the scores, and end the run."""
        self.log(scores or {}, self._last_step)
        self._send()
        self._client.set_terminated(self._run)


def accepted(name: str, *, more: str = ":", longest: int = LONGEST_NAME) -> str:
    """Return the name with an underscore for each character that MLflow refuses; a longer one loses its middle.

    Args:
        name: Name of a metric, image or text.
        more: Characters that it accepts beside letters, digits and ``_-. /``.
        longest: Largest number of characters.
    """
    name = re.sub(rf"[^\w\-. /{more}]", "_", name, flags=re.ASCII)
    if len(name) <= longest:
        return name
    mark = blake2b(name.encode(), digest_size=4).hexdigest()  # two long names may differ in their middle alone
    return f"{name[: longest // 2 - 10]}..{mark}..{name[-(longest // 2 - 10) :]}"


def without_password(uri: str) -> str:
    """Return the address without the name and password before its host."""
    return re.sub(r"://[^/@]*:[^/@]*@", "://", uri)


def _own_store(output_dir: Path) -> str:
    folder = output_dir.absolute() / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"


def _known_run(file: Path, uri: str) -> str | None:
    """Return the id of the run that this folder began in the store of that address."""
    if not file.is_file():
        return None
    known = json.loads(file.read_text(encoding="utf-8"))
    return known["id"] if known["tracking_uri"] == without_password(uri) else None


def _library() -> Any:
    """Import the package of this module's own name, without telemetry, messages about tables and git."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    library = importlib.import_module("mlflow")
    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return library


@hookimpl
def register_trackers() -> Sequence[type[Tracker]]:
    """Return the tracker of this file."""
    return [MLflow]
