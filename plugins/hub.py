"""Publishes a student on the Hugging Face hub (``push_to_hub``, ``hub_model_id``)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.publisher import Publisher

if TYPE_CHECKING:
    from ..core.settings.run_settings import RunSettings

_PLACEHOLDER = re.compile(r"^(your|my|some|user|username|name|org|organization|example|placeholder)([-_].*)?$|[<>{}$]")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


class HuggingFaceHub(Publisher):
    """Uploads ``student/`` as a model repository, made if it does not exist."""

    name: ClassVar[str] = "hub"
    packages: ClassVar[Mapping[str, str]] = {"huggingface_hub": "huggingface_hub>=0.30"}

    class Config(BaseModel):
        """The repository to publish to."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

        model_id: str | None = None
        """Repository, as `name/sdxl-lcm`; absent: the run's hub_model_id."""
        private: bool = False
        """Whether a repository that is made new is private."""

    @classmethod
    def from_run(cls, run: RunSettings, config: Any | None) -> Any | None:
        """Return its settings if the run asks for it, by ``push_to_hub`` too, otherwise None.

        The id comes from ``hub_model_id`` unless its own part names one.
        """
        if not run.push_to_hub:
            config = super().from_run(run, config)
        elif config is None:
            config = cls.Config()
        if config is None or config.model_id:
            return config
        return config.model_copy(update={"model_id": run.hub_model_id})

    def problems(self) -> list[str]:
        """Return problems: an id that is missing, malformed or a placeholder; no token; offline mode."""
        from huggingface_hub import get_token

        found = []
        model_id = self.config.model_id
        if not model_id:
            found.append("hub_model_id is missing, so there is nowhere to publish to (set it as name/repository)")
        elif not _REPOSITORY.fullmatch(model_id):
            found.append(f"hub_model_id = {model_id!r} is not of the form name/repository")
        elif _PLACEHOLDER.search(model_id.partition("/")[0].lower()):
            found.append(f"hub_model_id = {model_id!r} is a placeholder (set your own name/repository)")
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
            found.append("HF_HUB_OFFLINE is set, so nothing can be uploaded")
        elif get_token() is None:
            found.append("there is no Hugging Face token (run `hf auth login`, or set HF_TOKEN)")
        return found

    def publish(self, student: Path) -> str:
        """Upload the folder as one commit; return the repository's address."""
        from huggingface_hub import HfApi

        api = HfApi()
        url = api.create_repo(self.config.model_id, private=self.config.private, exist_ok=True, repo_type="model")
        api.upload_folder(repo_id=self.config.model_id, folder_path=str(student), commit_message="Upload the student")
        return str(url)


@hookimpl
def register_publishers() -> Sequence[type[Publisher]]:
    """Return the publisher of this file."""
    return [HuggingFaceHub]
