"""Weights & Biases: online where there is an account, else offline files that ``wandb sync`` sends later."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.tracker import RunInfo, Tracker
from ..core.utils.files import write_text
from ..core.utils.redaction import redacted

if TYPE_CHECKING:
    from PIL.Image import Image


class WandB(Tracker):
    """One wandb run, continued under the same id when the run is resumed.

    wandb has one axis for a run and refuses to go back on it, while images and metrics of one step come at different
    moments; so each call carries the step as ``train/step``, which is the axis of all charts.
    """

    name: ClassVar[str] = "wandb"
    packages: ClassVar[Mapping[str, str]] = {"wandb": "wandb>=0.19"}

    class Config(BaseModel):
        """Settings of the wandb run."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

        mode: Literal["online", "offline"] | None = None
        """Where it writes; absent: WANDB_MODE, else online where there is a login, else offline."""
        entity: str | None = None
        """User or team that the run belongs to."""
        tags: tuple[str, ...] = ()
        """Tags of the run."""
        login_timeout_seconds: float = Field(default=30.0, gt=0)
        """Seconds to wait for the server at the start, after which the run is written offline."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._run: Any = None
        self._notices: list[str] = []

    def start(self, run: RunInfo) -> None:
        """Open the run; a server that cannot be reached or refuses the login leads to offline files."""
        wandb = _library()
        mode = self.config.mode or os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
        try:
            self._run = self._open(run, mode)
        except wandb.errors.CommError as error:  # no route, or the login was refused
            self._notices.append(f"could not log in ({error})")
            mode = "offline"
            self._run = self._open(run, mode)
        if mode == "offline":
            self._notices.append(f"writes offline; send it later with: wandb sync {Path(self._run.dir).parent}")
        self._run.define_metric("train/step")
        self._run.define_metric("*", step_metric="train/step")

    def _open(self, run: RunInfo, mode: str) -> Any:
        wandb = _library()
        argv = " ".join(sys.argv)  # wandb keeps it, with whatever secret stands in a --set
        settings = wandb.Settings(
            init_timeout=self.config.login_timeout_seconds, silent=True, console="off",
            x_disable_meta=redacted(argv) != argv,
        )  # fmt: skip
        return wandb.init(
            project=run.project,
            name=run.name,
            id=run_id(run.output_dir, resumed=run.resumed_step > 0),
            entity=self.config.entity,
            tags=list(self.config.tags),
            dir=str(run.output_dir),
            config={**run.config, "hparams": dict(run.hparams)},
            mode=mode,
            # an offline run knows nothing of the server's and warns when asked to continue it
            resume="allow" if mode == "online" else None,
            settings=settings,
        )

    def notices(self) -> list[str]:
        """Return a notice if it writes offline, with the reason."""
        return self._notices

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write all metrics of the step in one row."""
        self._run.log({**metrics, "train/step": step})

    def images(self, name: str, images: Mapping[str, Image], step: int) -> None:
        """Write a gallery."""
        wandb = _library()
        gallery = [wandb.Image(image, caption=caption) for caption, image in images.items()]
        self._run.log({name: gallery, "train/step": step})

    def text(self, name: str, text: str, step: int) -> None:
        """Write a panel of preformatted text (wandb draws no markdown in charts)."""
        import html

        panel = _library().Html(f"<pre>{html.escape(text)}</pre>", inject=False)
        self._run.log({name: panel, "train/step": step})

    def finish(self, scores: Mapping[str, float] | None = None) -> None:
        """Put the scores into the summary and close."""
        self._run.summary.update(dict(scores or {}))
        self._run.finish()


def _library() -> Any:
    """Import the package of this module's own name, with reports of its own failures off by default."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when it is imported
    return importlib.import_module("wandb")


def logged_in() -> bool:
    """Return True if wandb would find credentials, without asking the user."""
    import netrc

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = re.sub(r"^\w+://|[:/].*$", "", os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        file = Path(path).expanduser() if path else None
        if file and file.is_file():
            try:
                return netrc.netrc(str(file)).authenticators(host) is not None
            except netrc.NetrcParseError:
                return False
    return False


def run_id(output_dir: Path, *, resumed: bool) -> str:
    """Return the wandb id of the run in this folder, kept in ``wandb-run.json`` so that a resumed run continues it.

    A run that starts afresh in the folder of another gets an id of its own.
    """
    import secrets

    file = output_dir / "wandb-run.json"
    if resumed and file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))["id"]
    chosen = secrets.token_hex(4)
    write_text(file, json.dumps({"id": chosen}) + "\n")
    return chosen


@hookimpl
def register_trackers() -> Sequence[type[Tracker]]:
    """Return the tracker of this file."""
    return [WandB]
