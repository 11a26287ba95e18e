"""Trackers: what is written can be read back; what fails is switched off and ends nothing."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from distill.core.engine.tracking import Trackers, build_trackers
from distill.core.plugin_api.tracker import RunInfo, Tracker
from distill.core.registry.registry import Registry
from distill.core.utils.packages import missing_packages
from distill.plugins.tensorboard import TensorBoard
from distill.plugins.wandb import WandB, logged_in, run_id
from PIL import Image


def info(folder: Path, **extra: object) -> RunInfo:
    return RunInfo(output_dir=folder, project="tests", name="a-run", config={"seed": 1}, **extra)  # type: ignore[arg-type]


class Recorder(Tracker):
    """Notes every call; fails in one of them."""

    name = "recorder"

    def __init__(self, fails_in: str = "") -> None:
        super().__init__(self.Config())
        self.fails_in, self.calls = fails_in, []

    def _note(self, call: str, *args: object) -> None:
        self.calls.append((call, *args))
        if call == self.fails_in:
            raise ConnectionError("no route")

    def start(self, run):
        self._note("start", run)

    def log(self, metrics, step):
        self._note("log", metrics, step)

    def images(self, name, images, step):
        self._note("images", name, step)

    def text(self, name, text, step):
        self._note("text", name, text, step)

    def notices(self):
        return ["writes into memory"]

    def finish(self, scores=None):
        self._note("finish", scores)


def drive(trackers: Trackers, folder: Path) -> None:
    trackers.start(info(folder))
    trackers.log({"loss": 1.0}, 1)
    trackers.images("validation", {"grid": Image.new("RGB", (4, 4))}, 1)
    trackers.text("config", "seed: 1", 1)
    trackers.log({"loss": 0.5}, 2)
    trackers.finish({"score": 0.1})


@pytest.mark.parametrize("fails_in", ["start", "log", "images", "text", "finish"])
def test_a_failing_tracker_is_switched_off_and_the_others_go_on(tmp_path, said, fails_in):
    bad, good = Recorder(fails_in), Recorder()
    drive(Trackers([("bad", bad), ("good", good)]), tmp_path)
    assert [call[0] for call in good.calls] == ["start", "log", "images", "text", "log", "finish"]
    assert [call[0] for call in bad.calls].count(fails_in) == 1
    assert bad.calls[-1][0] == fails_in
    warnings = [line for line in said if line.startswith("warning")]
    assert len(warnings) == 1
    assert "bad" in warnings[0]
    assert "no route" in warnings[0]
    assert "good: writes into memory" in said


def test_missing_packages_name_the_install_line():
    assert missing_packages({"json": "json"}) is None
    line = missing_packages({"no_such_package_a": "a-thing>=1", "no_such_package_b": "b-thing"})
    assert line == ("no_such_package_a and no_such_package_b are not installed (pip install 'a-thing>=1' 'b-thing')")


def test_a_tracker_without_its_package_is_left_out_with_its_install_line(tmp_path, monkeypatch):
    monkeypatch.setattr(WandB, "packages", {"no_such_package_wandb": "wandb>=0.19"})
    trackers, warnings = build_trackers(Registry.load(installed=False), ["wandb", "tensorboard"], {})
    assert trackers.names == ("tensorboard",)
    assert len(warnings) == 1
    assert "wandb" in warnings[0]
    assert "pip install 'wandb>=0.19'" in warnings[0]
    drive(trackers, tmp_path)
    assert list((tmp_path / "tensorboard").iterdir())


def events(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    return accumulator.Reload()


def board(folder: Path, **extra: object) -> TensorBoard:
    tracker = TensorBoard(TensorBoard.Config())
    tracker.start(info(folder, **extra))
    return tracker


def test_tensorboard_holds_scalars_images_text_and_hparams(tmp_path):
    tracker = board(tmp_path, hparams={"learning_rate": 1e-4, "method": "lcm", "rank": 64, "flip": True})
    for step in (1, 2, 3):
        tracker.log({"train/loss": 1 / step, "train/lr": 1e-4}, step)
    image = Image.linear_gradient("L").resize((40, 24)).convert("RGB")
    tracker.images("validation", {"grid": image}, 3)
    tracker.text("config", "**seed**: 1", 0)
    tracker.finish({"scores/student_4_steps/prompt_agreement_judge": 0.75})

    read = events(tmp_path)
    losses = read.Scalars("train/loss")
    assert [event.step for event in losses] == [1, 2, 3]
    assert [event.value for event in losses] == pytest.approx([1, 1 / 2, 1 / 3])
    stored = read.Images("validation/grid")[0]
    assert stored.step == 3
    assert Image.open(io.BytesIO(stored.encoded_image_string)).tobytes() == image.tobytes()
    text = read.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert text == b"**seed**: 1"
    score = read.Scalars("scores/student_4_steps/prompt_agreement_judge")[0]
    assert (score.step, score.value) == (3, 0.75)

    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["learning_rate"].number_value == pytest.approx(1e-4)
    assert hparams["method"].string_value == "lcm"
    assert hparams["rank"].number_value == 64
    assert hparams["flip"].number_value == 1
    assert read.SummaryMetadata("_hparams_/session_end_info").plugin_data.content


def test_tensorboard_hparams_are_there_before_the_run_ends(tmp_path):
    board(tmp_path, hparams={"seed": 3})
    assert events(tmp_path).SummaryMetadata("_hparams_/session_start_info").plugin_data.content


def test_a_resumed_run_hides_what_was_written_after_its_checkpoint(tmp_path, monkeypatch):
    """Killed at step 5 after a checkpoint at 3: steps 4 and 5 stand once, with the values of the resumed run."""
    import time

    killed = board(tmp_path)
    for step in range(1, 6):
        killed.log({"loss": float(step)}, step)
    killed._writer.flush()
    moment = time.time()
    monkeypatch.setattr(time, "time", lambda: moment + 10)  # event files are named by the second
    resumed = board(tmp_path, resumed_step=3)
    for step in range(4, 7):
        resumed.log({"loss": step + 0.5}, step)
    resumed.finish()
    losses = events(tmp_path).Scalars("loss")
    assert [(event.step, event.value) for event in losses] == [(1, 1), (2, 2), (3, 3), (4, 4.5), (5, 5.5), (6, 6.5)]


def test_no_tracker_s_library_is_imported_with_the_registry():
    import subprocess

    code = (
        "import sys; from distill.core.registry.registry import Registry; Registry.load(installed=False);"
        "names = 'tensorboard', 'wandb', 'trackio', 'mlflow', 'huggingface_hub', 'PIL';"
        "print([name for name in names if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# -- wandb -----------------------------------------------------------------------------------------------------------


def test_wandb_finds_a_login_without_asking(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    assert not logged_in()
    netrc.write_text("machine elsewhere.example login user password x\n")
    assert not logged_in()
    netrc.write_text("machine api.wandb.ai login user password x\n")
    assert logged_in()
    netrc.write_text("nonsense [\n")
    assert not logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert logged_in()


def test_a_resumed_run_keeps_its_wandb_id_and_a_fresh_one_gets_its_own(tmp_path):
    first = run_id(tmp_path, resumed=False)
    assert run_id(tmp_path, resumed=True) == first
    second = run_id(tmp_path, resumed=False)
    assert second != first
    assert run_id(tmp_path, resumed=True) == second


class FakeWandb:
    """As much of wandb's interface as the tracker uses, with its argument names."""

    class errors:
        class CommError(Exception):
            pass

    def __init__(self, *, refuses_online: bool = False) -> None:
        self.refuses_online, self.modes, self.rows, self.summary = refuses_online, [], [], {}
        self.dir = "/runs/offline-run-1/files"
        self.Settings = dict

    def init(self, *, project, name, id, entity, tags, dir, config, mode, resume, settings):
        self.modes.append(mode)
        if mode == "online" and self.refuses_online:
            raise self.errors.CommError("no route")
        return self

    def Image(self, image, caption):
        return image.size, caption

    def Html(self, text, inject):
        return text

    def define_metric(self, name, step_metric=None): ...

    def log(self, row):
        self.rows.append(row)

    def finish(self): ...


@pytest.mark.parametrize(
    ("key", "refuses", "modes"),
    [(None, False, ["offline"]), ("k", False, ["online"]), ("k", True, ["online", "offline"])],
)
def test_wandb_writes_offline_without_a_login(tmp_path, monkeypatch, said, key, refuses, modes):
    fake = FakeWandb(refuses_online=refuses)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("distill.plugins.wandb.logged_in", lambda: key is not None)
    drive(Trackers([("wandb", WandB(WandB.Config()))]), tmp_path)
    assert fake.modes == modes
    assert ("wandb sync /runs/offline-run-1" in " ".join(said)) == (modes[-1] == "offline")
    assert {"loss": 0.5, "train/step": 2} in fake.rows
    assert {"validation": [((4, 4), "grid")], "train/step": 1} in fake.rows
    assert fake.summary == {"score": 0.1}
    assert not [line for line in said if "switched off" in line]
