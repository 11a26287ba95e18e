"""Every tracker that ships: what it was given is there when its own library reads its files, also after a resume."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distill.core.engine.tracking import Trackers, build_trackers
from distill.core.plugin_api.tracker import RunInfo
from distill.core.registry.registry import Registry
from distill.core.utils.packages import missing_packages
from distill.plugins.mlflow import MLflow, accepted, without_password
from distill.plugins.trackio import Trackio
from PIL import Image
from support.listening import listening
from support.mlflow_store import empty_store  # noqa: F401 - a fixture
from support.tracker_readers import READERS, Written

IMAGE = Image.linear_gradient("L").resize((40, 24)).convert("RGB")
HPARAMS = {"learning_rate": 1e-4, "method": "lcm", "lora_rank": 64, "flip": True}
CONFIG = {"seed": 1, "data": [{"id": "foxes"}]}
EVERY = tuple(READERS)


def each_tracker(*names: str):
    """Those whose package is here; the development extra has all but Trackio, which bounds Pillow."""
    here = [name for name in names if importlib.util.find_spec(name)]
    assert set(names) - set(here) <= {"trackio"}, "pip install -e '.[dev]'"
    return pytest.mark.parametrize("name", here)


@pytest.fixture(autouse=True)
def no_account(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "TRACKIO_DIR", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # it takes its folder when it is imported


@pytest.fixture
def folder(tmp_path, empty_store) -> Path:  # noqa: F811
    """An output folder with MLflow's tables."""
    (tmp_path / "run" / "mlflow").mkdir(parents=True)
    shutil.copyfile(empty_store, tmp_path / "run" / "mlflow" / "mlflow.db")
    return tmp_path / "run"


def opened(folder: Path, *names: str, warnings: list[str] | None = None, **extra) -> Trackers:
    folder.mkdir(exist_ok=True)
    trackers, found = build_trackers(Registry.load(installed=False), names, {})
    with listening() as lines:
        trackers.start(RunInfo(folder, "tests", "a-run", {**CONFIG}, {**HPARAMS}, **extra))
    found += [line for line in lines if "warning" in line]
    assert warnings is not None or not found
    if warnings is not None:
        warnings += found
    return trackers


def log(trackers: Trackers, steps: range, *, shift: float = 0.0) -> None:
    for step in steps:
        trackers.log({"loss": 1 / step + shift, "lr": 1e-4}, step)


def check_whole(run: Written) -> None:
    assert run.scalars["loss"] == [(step, pytest.approx(1 / step)) for step in (1, 2, 3)]
    assert run.scalars["lr"] == [(step, pytest.approx(1e-4)) for step in (1, 2, 3)]
    (_, score) = run.scalars["scores/student_4_steps/prompt_agreement_judge"][-1]
    assert score == 0.75
    assert set(run.images) == {("validation/grid", 3)}
    assert run.images["validation/grid", 3].convert("RGB").tobytes() == IMAGE.tobytes()
    assert set(run.texts) == {("config", 0)}
    assert "**seed**: <1>" in run.texts["config", 0].replace("&lt;", "<").replace("&gt;", ">")
    assert float(run.hparams["learning_rate"]) == pytest.approx(1e-4)
    assert (run.hparams["method"], int(run.hparams["lora_rank"])) == ("lcm", 64)
    assert run.config.items() >= (CONFIG if run.config else {}).items()


def write_whole(trackers: Trackers) -> None:
    trackers.text("config", "**seed**: <1>", 0)
    log(trackers, range(1, 4))
    trackers.images("validation", {"grid": IMAGE}, 3)
    trackers.finish({"scores/student_4_steps/prompt_agreement_judge": 0.75})


@each_tracker(*EVERY)
def test_scalars_images_text_settings_and_scores_are_read_back(name, tmp_path):
    write_whole(opened(tmp_path / "run", name))
    (run,) = READERS[name](tmp_path / "run")
    check_whole(run)


@each_tracker(*EVERY)
def test_a_resumed_run_goes_on_in_the_same_run(name, folder):
    """Stopped at step 5 after a checkpoint at 3: what is written last for steps 4 and 5 is the resumed run's."""
    interrupted = opened(folder, name)
    log(interrupted, range(1, 6))
    interrupted.finish()
    time.sleep(1.1)  # event files are named by the second
    resumed = opened(folder, name, resumed_step=3)
    log(resumed, range(4, 7), shift=1)
    resumed.finish({"scores/x": 0.5})
    (run,) = READERS[name](folder)
    expected = {step: 1 / step for step in (1, 2, 3)} | {step: 1 / step + 1 for step in (4, 5, 6)}
    assert run.last("loss") == pytest.approx(expected)
    assert run.scalars["scores/x"][-1][1] == 0.5


@each_tracker("wandb", "trackio", "mlflow")
def test_a_run_that_starts_afresh_in_the_same_folder_is_another_one(name, folder):
    for number in range(2):
        trackers = opened(folder, name)
        log(trackers, range(1, 3), shift=number)
        trackers.finish()
    first, second = READERS[name](folder)
    assert first.id != second.id
    assert {run.last("loss")[2] for run in (first, second)} == {0.5, 1.5}


def test_all_trackers_together_write_the_same_values_also_non_finite_ones(folder):
    names = [name for name in EVERY if importlib.util.find_spec(name)]
    trackers = opened(folder, *names)
    assert trackers.names == tuple(names)
    trackers.log({"loss": math.nan, "x0/α (β)": math.inf, "big": 1e300}, 1)
    trackers.log({"loss": 2.0, "x0/α (β)": -math.inf, "big": 0.0}, 10_000)
    assert trackers.names == tuple(names), "figures that are not finite switch no tracker off"
    trackers.images("validation", {"teacher & <student>": IMAGE}, 1)
    trackers.finish({})
    assert trackers.names == ()
    for name in names:
        (run,) = READERS[name](folder)
        assert run.last("loss")[10_000] == 2.0, name
        assert len(run.scalars) >= 3, name
        assert len(run.images) == 1, name


@each_tracker(*EVERY)
def test_a_tracker_that_cannot_write_is_switched_off_and_the_others_go_on(name, tmp_path, monkeypatch):
    """A file lies where its folder should be."""
    folder, other = tmp_path / "run", "wandb" if name == "tensorboard" else "tensorboard"
    folder.mkdir()
    (folder / name).write_text("in the way")
    warnings: list[str] = []
    trackers = opened(folder, name, other, warnings=warnings)
    assert trackers.names == (other,)
    (warning,) = warnings
    assert warning.startswith("warning")
    assert f"tracker {name} failed in start() and is switched off, the run goes on" in warning
    write_whole(trackers)
    (run,) = READERS[other](folder)
    check_whole(run)


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_tracker_whose_package_is_absent_only_warns(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not there, whether it is or not
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()  # Python takes a folder of that name for a package
    monkeypatch.syspath_prepend(str(tmp_path))
    warnings: list[str] = []
    trackers = opened(tmp_path / "run", name, "tensorboard", warnings=warnings)
    assert trackers.names == ("tensorboard",)
    assert len(warnings) == 1
    assert warnings[0].startswith(f"tracker {name} is left out, the run goes on: {name} is not installed (pip ")
    write_whole(trackers)
    check_whole(READERS["tensorboard"](tmp_path / "run")[0])


def test_a_folder_of_a_package_s_name_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "no_such_tracker").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importlib.util.find_spec("no_such_tracker") is not None
    assert "no_such_tracker is not installed" in (missing_packages({"no_such_tracker": "x"}) or "")


def test_names_that_mlflow_refuses_are_mended():
    assert accepted("train/x0 mse: 3") == "train/x0 mse: 3"
    assert accepted("a,b(c)/é") == "a_b_c_/_"
    assert accepted("a:b", more="") == "a_b"


def test_a_password_in_the_address_is_refused_and_never_kept():
    assert without_password("postgresql://me:secret@host:5432/db") == "postgresql://host:5432/db"
    assert without_password("http://host:5000/a") == "http://host:5000/a"
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD"):
        MLflow.Config(tracking_uri="https://me:secret@host")
    assert MLflow.Config(tracking_uri="https://host").tracking_uri == "https://host"


ALONE = """
import socket, sys
from pathlib import Path
from PIL import Image
asked = []
real = socket.getaddrinfo
def refuse(host, *args, **kwargs):
    if host not in ("127.0.0.1", "localhost", None):
        asked.append(host)
        raise OSError("no network here")
    return real(host, *args, **kwargs)
socket.getaddrinfo = refuse
from distill.core.registry.registry import Registry
from distill.core.plugin_api.tracker import RunInfo
from distill.core.engine.tracking import build_trackers
from distill.core.utils.console import console
trackers, warnings = build_trackers(Registry.load(installed=False), sys.argv[2].split(","), {})
assert not warnings
with console():
    trackers.start(RunInfo(Path(sys.argv[1]), "tests", "a-run", {"seed": 1}))
trackers.log({"loss": 1.0}, 1)
trackers.images("validation", {"grid": Image.new("RGB", (8, 8))}, 1)
trackers.finish({"score": 1.0})
import os
print("asked:", asked, "reports:", os.environ["WANDB_ERROR_REPORTING"], os.environ["MLFLOW_DISABLE_TELEMETRY"])
"""


def test_no_tracker_uses_the_network(folder, tmp_path):
    """Neither with a token of the hub, nor with a proxy, nor outside a test, where MLflow's telemetry would be on."""
    names = ",".join(name for name in EVERY if importlib.util.find_spec(name))
    outside = ("PYTEST_CURRENT_TEST", "CI", "HF_HUB_OFFLINE", "MLFLOW_DISABLE_TELEMETRY", "WANDB_ERROR_REPORTING")
    environment = {key: value for key, value in os.environ.items() if key not in outside}
    result = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder), names],
        env={**environment, "HF_TOKEN": "hf_nobody", "NETRC": str(tmp_path / "none")},
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert "asked: [] reports: false true" in result.stdout, result.stdout
    assert "warning: " not in result.stdout + result.stderr


@pytest.mark.slow
def test_trackio_as_its_install_line_brings_it(tmp_path):
    """In an environment of its own on top of this one, since it wants another Pillow; then its tests above."""
    import venv

    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    (packages,) = (tmp_path / "env" / "lib").glob("*/site-packages")
    (packages / "below.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    subprocess.run([python, "-m", "pip", "install", "-q", Trackio.packages["trackio"]], check=True)
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "trackio and not install_line"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert result.stdout.startswith("....."), result.stdout
