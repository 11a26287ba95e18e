"""MLflow's tables, made once: a database of its own takes seconds for each run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """The database of a run that has written nothing."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{file}").search_experiments()
    return file


def give_each_run_a_copy(store: Path, patch: pytest.MonkeyPatch) -> None:
    """Let each output folder begin with a copy of `store`."""
    from distill.plugins import mlflow

    real = mlflow._own_store

    def copied(output_dir: Path) -> str:
        uri, file = real(output_dir), output_dir / mlflow.FOLDER / store.name
        if not file.exists():
            shutil.copyfile(store, file)
        return uri

    patch.setattr(mlflow, "_own_store", copied)
