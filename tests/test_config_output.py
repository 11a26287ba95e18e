"""What may happen to an output folder that is not empty, and what a resumed run may change."""

from __future__ import annotations

import json
import shutil

import pytest
from distill.core.config.load import load_configuration
from distill.core.errors import ConfigError, UserError
from distill.core.registry.registry import Registry
from distill.core.runs.output_folder import check_output_dir
from distill.core.runs.run_files import RunFiles
from support.config_files import PLUGIN, Pair


@pytest.fixture
def load(tmp_path):
    registry = Registry.load(installed=False)
    registry.add_file(PLUGIN)

    def loaded(run=None, dataset=None):
        pair = Pair(tmp_path, run or {})
        pair.data[0].update(dataset or {})
        pair.write()
        return load_configuration(registry, config_file=pair.config_file, data_file=pair.data_file)

    return loaded


def earlier(tmp_path, configuration, *folders):
    """An output folder in which a run wrote its configuration and these folders."""
    out = tmp_path / "out"
    with RunFiles(out).writing("config.resolved.json", *folders):
        (out / "config.resolved.json").write_text(json.dumps(configuration.resolved()))
        for folder in folders:
            (out / folder).mkdir()
    return out


def test_a_new_or_empty_folder_starts_a_run(load, tmp_path):
    assert check_output_dir(load()).action == "start"
    (tmp_path / "out").mkdir()
    assert check_output_dir(load()).action == "start"


def test_a_folder_with_the_data_file_alone_starts_a_run(load, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "multidatabackend.json").write_text("[]")
    assert check_output_dir(load()).action == "start"


def test_latest_with_nothing_there_starts_and_says_so(load):
    state = check_output_dir(load({"resume_from_checkpoint": "latest"}))
    assert state.action == "start"
    assert "starts afresh" in state.notices[0]


def test_a_checkpoint_that_is_not_there_is_refused(load):
    with pytest.raises(UserError, match="checkpoint-7"):
        check_output_dir(load({"resume_from_checkpoint": "checkpoint-7"}))


@pytest.mark.parametrize(("folders", "kind"), [(("checkpoint-5",), "an unfinished"), (("student",), "a finished")])
def test_an_earlier_run_is_refused_unless_resumed_or_overwritten(folders, kind, load, tmp_path):
    out = earlier(tmp_path, load(), *folders)
    with pytest.raises(UserError, match=f"holds {kind} run") as error:
        check_output_dir(load())
    assert "resume_from_checkpoint=latest" in error.value.remedy
    assert "--overwrite" in error.value.remedy
    over = check_output_dir(load({"overwrite": True, "resume_from_checkpoint": "latest"}))
    assert (over.action, over.clear) == ("start", True)
    assert out.exists()


def test_an_earlier_run_is_resumed(load, tmp_path):
    earlier(tmp_path, load(), "checkpoint-5")
    assert check_output_dir(load({"resume_from_checkpoint": "latest"})).action == "resume"


def test_a_run_that_left_nothing_is_started_afresh(load, tmp_path):
    earlier(tmp_path, load(), "validation")
    state = check_output_dir(load({"seed": 5}))
    assert (state.action, state.clear) == ("start", True)


@pytest.mark.parametrize("sign", ["student", "model_index.json", "checkpoint-3"])
def test_a_folder_with_foreign_files_is_refused(sign, load, tmp_path):
    (tmp_path / "out" / sign).mkdir(parents=True)
    with pytest.raises(UserError, match=f"{sign}.*not a run of this tool"):
        check_output_dir(load({"resume_from_checkpoint": "latest"}))


@pytest.mark.parametrize(
    ("run", "dataset"),
    [
        ({"max_train_steps": 99}, {}),
        ({"learning_rate": 3e-5, "lr_scheduler": "cosine", "lr_warmup_steps": 3}, {}),
        ({"validation_step_interval": 3, "validation_prompt": "a cat", "num_validation_images": 2}, {}),
        ({"checkpoint_step_interval": 7, "checkpoints_total_limit": 2, "log_step_interval": 1}, {}),
        ({"report_to": "far-tracker", "tracker_config": {"far-tracker": {"room": "b"}}, "tracker_run_name": "x"}, {}),
        ({"gradient_checkpointing": False, "push_to_hub": True, "hub_model_id": "me/x"}, {}),
        ({"train_batch_size": 8, "gradient_accumulation_steps": 2}, {}),  # what a step holds is compared later
        ({}, {"cache_dir_vae": "elsewhere", "vae_batch_size": 9, "write_batch_size": 7}),
    ],
)
def test_a_resume_may_change_what_does_not_decide_the_past(run, dataset, load, tmp_path):
    earlier(tmp_path, load(), "checkpoint-5")
    assert check_output_dir(load({"resume_from_checkpoint": "latest", **run}, dataset)).action == "resume"


@pytest.mark.parametrize(
    ("run", "dataset", "keys"),
    [
        ({"lora_rank": 8}, {}, {"lora_rank", "lora_alpha"}),
        ({"seed": 8}, {}, {"seed"}),
        ({"pretrained_model_name_or_path": "other/model"}, {}, {"pretrained_model_name_or_path"}),
        ({"distillation_config": {"lcm": {"w_max": 20}}}, {}, {"distillation_config.lcm.w_max"}),
        ({"mixed_precision": "no"}, {}, {"mixed_precision"}),
        ({}, {"repeats": 3}, {"data.pets.repeats"}),
        ({}, {"crop": True, "crop_style": "corner"}, {"data.pets.crop", "data.pets.crop_style"}),
        ({}, {"caption_strategy": "filename"}, {"data.pets.caption_strategy"}),
    ],
)
def test_a_resume_may_not_change_what_decides_it_and_names_the_keys(run, dataset, keys, load, tmp_path):
    earlier(tmp_path, load(), "checkpoint-5")
    with pytest.raises(ConfigError) as error:
        check_output_dir(load({"resume_from_checkpoint": "latest", **run}, dataset))
    assert {finding.key for finding in error.value.findings} == keys
    for finding in error.value.findings:
        assert "it was" in finding.problem
        assert "--output-dir" in finding.remedy


def test_a_key_that_an_earlier_version_lacked_had_its_default(load, tmp_path):
    earlier(tmp_path, load(), "checkpoint-5")
    file = load().run.output_dir / "config.resolved.json"
    resolved = json.loads(file.read_text())
    del resolved["seed"], resolved["distillation_config"]["lcm"]["huber_c"], resolved["data"][0]["micro_conditioning"]
    file.write_text(json.dumps(resolved))
    assert check_output_dir(load({"resume_from_checkpoint": "latest"})).action == "resume"
    with pytest.raises(ConfigError) as error:
        check_output_dir(load({"resume_from_checkpoint": "latest", "seed": 8}))
    assert [finding.key for finding in error.value.findings] == ["seed"]


def test_another_method_and_dataset_are_named(load, tmp_path):
    earlier(tmp_path, load(), "checkpoint-5")
    changed = {"distillation_method": "needy", "distillation_config": {}, "resume_from_checkpoint": "latest"}
    with pytest.raises(ConfigError) as error:
        check_output_dir(load(changed, {"id": "cats"}))
    keys = {finding.key for finding in error.value.findings}
    assert "distillation_method" in keys
    assert any(key.startswith("data.pets") for key in keys)


def test_a_damaged_earlier_configuration_is_named(load, tmp_path):
    out = earlier(tmp_path, load(), "checkpoint-5")
    (out / "config.resolved.json").write_text('{"half')
    with pytest.raises(UserError, match=r"config\.resolved\.json is not JSON"):
        check_output_dir(load({"resume_from_checkpoint": "latest"}))


FOREIGN = {
    "checkpoint-best/weights.safetensors": "checkpoint-best/",
    "checkpoint-notes.md": "checkpoint-notes.md",
    "checkpoint-9/manifest.json": "checkpoint-9/",
    "validation/mine.png": "validation/mine.png",
    "tensorboard/other/events": "tensorboard/",
    "student/README.md": "student/README.md",
    "student/more.txt": "student/more.txt",
    "report.html": "report.html",
}
"""A file that the run did not write, or not as it is now -> what it is called in the refusal."""


@pytest.fixture
def left_by_a_run(load, tmp_path):
    out = earlier(tmp_path, load())
    with RunFiles(out).writing("student", "validation/step-000001", "checkpoint-5", "data"):
        for file in ("student/README.md", "validation/step-000001/grid.png", "checkpoint-5/a", "data/cats/report.md"):
            (out / file).parent.mkdir(parents=True)
            (out / file).write_text("ours")
    for file in (".checkpoint-5.partial/a", "cache/x", "notes/x", "data/photos/1.png"):
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_text("x")
    return out


def test_overwriting_removes_what_the_run_wrote_and_nothing_else(load, left_by_a_run):
    state = check_output_dir(load({"overwrite": True}))
    assert (state.action, state.clear) == ("start", True)
    RunFiles(left_by_a_run).remove()
    left = sorted(path.relative_to(left_by_a_run).as_posix() for path in left_by_a_run.rglob("*") if path.is_file())
    assert left == ["cache/x", "data/photos/1.png", "notes/x"]


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("file", FOREIGN)
def test_what_a_run_did_not_write_is_named_and_refused(file, overwrite, load, left_by_a_run):
    if not overwrite:  # a fresh start where no checkpoint and no student are
        for name in ("checkpoint-5", "student"):
            shutil.rmtree(left_by_a_run / name)
        if file.startswith("student/"):
            return
    (left_by_a_run / file).parent.mkdir(parents=True, exist_ok=True)
    (left_by_a_run / file).write_text("somebody else's")
    before = sorted(left_by_a_run.rglob("*"))
    with pytest.raises(UserError) as error:
        check_output_dir(load({"overwrite": overwrite}))
    if overwrite or not file.startswith("checkpoint-9"):  # which makes it an unfinished run
        assert FOREIGN[file] in error.value.message
        assert "--output-dir" in error.value.remedy
    assert sorted(left_by_a_run.rglob("*")) == before


def test_a_link_of_somebody_else_is_not_followed(load, left_by_a_run, tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "precious").write_text("x")
    (left_by_a_run / "checkpoint-7").symlink_to(tmp_path / "far")
    with pytest.raises(UserError, match="checkpoint-7"):
        check_output_dir(load({"overwrite": True}))
    assert (tmp_path / "far" / "precious").exists()


def test_what_a_killed_run_was_writing_is_its_own(load, left_by_a_run):
    files = RunFiles(left_by_a_run)
    files.claim("checkpoint-6", "tensorboard")
    for file in ("checkpoint-6/half", "tensorboard/events", "student/.x"):
        (left_by_a_run / file).parent.mkdir(exist_ok=True)
        (left_by_a_run / file).write_text("x")
    (left_by_a_run / "student/.x").unlink()
    with (left_by_a_run / "written.jsonl").open("a") as stream:
        stream.write('{"claim": "tor')  # the line that was being written
    RunFiles(left_by_a_run).claim("evaluation.json")
    (left_by_a_run / "evaluation.json").write_text("{}")
    assert check_output_dir(load({"overwrite": True})).clear
    RunFiles(left_by_a_run).remove()
    assert sorted(path.name for path in left_by_a_run.iterdir()) == ["cache", "data", "notes"]


def test_a_resume_does_not_replace_a_student_of_somebody_else(load, left_by_a_run):
    assert check_output_dir(load({"resume_from_checkpoint": "latest"})).action == "resume"
    (left_by_a_run / "student" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match=r"did not write student/mine\.txt"):
        check_output_dir(load({"resume_from_checkpoint": "latest"}))


def test_a_finished_run_without_checkpoints_is_not_begun_afresh_in_silence(load, tmp_path):
    earlier(tmp_path, load(), "student")
    with pytest.raises(UserError, match="a finished run without its checkpoints"):
        check_output_dir(load({"resume_from_checkpoint": "latest"}))


def test_a_linked_output_folder_is_the_folder_that_it_points_to(load, left_by_a_run, tmp_path):
    left_by_a_run.rename(tmp_path / "elsewhere")
    left_by_a_run.symlink_to(tmp_path / "elsewhere")
    assert check_output_dir(load({"overwrite": True})).clear
    RunFiles(left_by_a_run).remove()
    assert left_by_a_run.is_symlink()
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["cache", "data", "notes"]
