"""`distill plugins new`: what it writes installs, passes its own tests, and takes part in a run."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from distill.core.cli.scaffold import Names
from distill.core.registry.registry import KINDS, Registry
from support.config_files import distill, said
from support.forks import ended
from support.small_run import losses, write_run
from support.tiny_undescribed import write_tiny_ovis, write_tiny_prx
from support.tiny_z_image import write_tiny_z_image

SPOKEN = [kind.replace("_", "-") for kind in KINDS]


def name_of(kind: str) -> str:
    return f"made-{kind.replace('_', '-')}"


def new(*arguments: str):
    return distill("plugins", "new", *arguments)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A package of every kind."""
    folder = tmp_path_factory.mktemp("made")
    for kind in SPOKEN:
        result = new(kind, name_of(kind), "--output", str(folder))
        assert result.exit_code == 0, result.output
        assert f'pip install -e "{folder / f"distill-{name_of(kind)}"}[test]"' in result.stdout
    return folder


@pytest.fixture(scope="module")
def site(made, tmp_path_factory) -> Path:
    """All of them installed by pip."""
    target = tmp_path_factory.mktemp("site")
    packages = sorted(str(path) for path in made.iterdir())
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", str(target), *packages], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return target


def python(site: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process in which the packages are installed."""
    root = Path(sys.modules["distill"].__file__).parent.parent
    path = os.pathsep.join([str(site), str(root), os.environ.get("PYTHONPATH", "")])
    return ended(*arguments, environment={**environment, "PYTHONPATH": path})


def test_every_kind_installs_and_is_listed(site):
    done = python(site, "-m", "distill", "plugins", "list", "--json")
    assert done.returncode == 0, done.stderr
    listed = {(row["kind"], row["name"]): row for row in json.loads(done.stdout)}
    for kind in SPOKEN:
        row = listed[kind, name_of(kind)]
        assert row["source"] == f"package distill-{name_of(kind)} 0.1.0"
        assert row["version"] == "0.1.0"
        assert row["usable"]
        assert row["description"]


LONG = "not learns and not exported and not diffusers and not LoRA"
"""Leaves out the checks of the conformance suite that train, and those of families that load a model many times."""


@pytest.mark.parametrize("chosen", [LONG, pytest.param("", marks=pytest.mark.slow)])
def test_the_generated_tests_pass(chosen, made, site, tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\n")  # of none of the packages: all of their tests in one process
    options = ["-v", "-p", "no:cacheprovider", "-c", str(tmp_path / "pytest.ini"), "-k", chosen]
    done = python(site, "-m", "pytest", *options, str(made))
    assert done.returncode == 0, done.stdout[-6000:]
    for kind in KINDS:
        lines = [line for line in done.stdout.splitlines() if f"test_{Names(kind, name_of(kind)).module}.py" in line]
        passed = [line for line in lines if " PASSED" in line]
        assert sum("test_conforms[" in line for line in passed) > 5, f"{kind}: {lines}"
        assert any("test_conforms[" not in line for line in passed), f"{kind}: {lines}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_is_the_packages_module_and_loads(kind, made, tmp_path):
    names = Names(kind, name_of(kind))
    result = new(kind, names.name, "--single-file", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == [f"{names.module}.py"]
    file = tmp_path / f"{names.module}.py"
    assert f"distill plugins show {names.name} --plugin {file}" in result.stdout
    assert file.read_text() == (made / names.package / file.name).read_text()
    registry = Registry()
    registry.add_file(file)
    assert registry.get(kind, names.name).__name__ == names.class_name


def test_what_is_written_is_formatted_and_clean(made):
    for folder in made.iterdir():
        for arguments in (["check", "--select", "E,F,W,I,UP,B,SIM,PT,RET"], ["format", "--check"]):
            ruff = [sys.executable, "-m", "ruff", *arguments, "--isolated", "--line-length", "120"]
            done = subprocess.run(ruff, capture_output=True, text=True, cwd=folder)
            assert done.returncode == 0, done.stdout


def test_a_run_uses_all_of_them_at_once(site, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(site))
    config = write_run(
        tmp_path,
        model_family="made-family",
        distillation_method="made-method",
        distillation_config={"made-method": {"num_steps": 2, "guidance_scale": 3.0}},
        optimizer="made-optimizer",
        report_to="made-tracker",
        evaluators="made-evaluator",
        evaluation_num_samples=2,
        evaluation_steps=[2],
        publish_to="made-publisher",
        publisher_config={"made-publisher": {"folder": "shelf"}},
        validation_step_interval=0,
        max_train_steps=2,
        log_step_interval=1,
    )
    (tmp_path / "shelf").mkdir()
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in sorted((tmp_path / "images").iterdir()):
            archive.write(path, path.name)
    entry = {"id": "zipped", "type": "made-data-backend", "zip_file": "images.zip"}
    (tmp_path / "multidatabackend.json").write_text(json.dumps([entry]))
    result = distill("run", "--config", str(config))
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    with (out / "made-tracker.csv").open(newline="") as file:
        rows = [(int(row["step"]), float(row["value"])) for row in csv.DictReader(file) if row["metric"] == "loss"]
    assert rows == [(step, loss) for step, loss, _ in losses(out)]
    assert len(rows) == 2
    assert all(loss > 0 for _, loss in rows)
    assert "made-evaluator" in (out / "evaluation.json").read_text()
    card = (tmp_path / "shelf" / "out" / "README.md").read_text()
    assert card == (out / "student" / "README.md").read_text()
    assert "clip_skip=1" in card, "the family's own line of plain diffusers"


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "proposal"),
    [
        ("Soft Targets", "soft-targets"),
        ("2steps", "steps"),
        ("soft--targets", "soft-targets"),
        ("-x", "Usage"),
        ("../evil", "evil"),
        ("", "soft-targets"),
        ("none", "soft-targets"),
        ("ü", "soft-targets"),
    ],
)
def test_a_name_that_cannot_be_one_is_refused_with_one_that_can(name, proposal, tmp_path):
    result = new("method", name, "--output", str(tmp_path))
    assert result.exit_code == 2
    assert proposal in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_taken_is_refused_with_who_has_it(tmp_path):
    result = new("optimizer", "adamw-bf16", "--output", str(tmp_path))
    assert result.exit_code == 2
    text = said(result.stderr)
    assert "the optimizer 'adamw-bf16' is there already: plugin 'distill.plugins.optimizers' (built in)" in text
    assert new("method", "adamw", "--output", str(tmp_path)).exit_code == 0, "of another kind it is free"


@pytest.mark.parametrize("single", [[], ["--single-file"]])
def test_what_is_there_is_not_overwritten(single, tmp_path):
    assert new("tracker", "mine", "--output", str(tmp_path), *single).exit_code == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = new("optimizer", "mine", "--output", str(tmp_path), *single)
    assert again.exit_code == 2
    assert "exists already" in again.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_unknown_kind_and_a_file_for_a_folder_are_refused(tmp_path):
    assert "did you mean 'data-backend'" in new("databackend", "x", "--output", str(tmp_path)).stderr
    (tmp_path / "file").touch()
    result = new("tracker", "mine", "--output", str(tmp_path / "file"))
    assert result.exit_code == 2
    assert "is a file" in result.stderr


@pytest.mark.parametrize(
    ("kind", "name", "class_name"),
    [
        ("method", "soft-targets", "SoftTargetsMethod"),
        ("data_backend", "zip", "ZipBackend"),
        ("tracker", "csv-tracker", "CsvTracker"),
        ("tracker", "tracker", "TrackerTracker"),
        ("family", "my_sdxl2", "MySdxl2Family"),
    ],
)
def test_classes_are_called_after_the_name_and_the_kind(kind, name, class_name):
    assert Names(kind, name).class_name == class_name


def test_there_is_a_template_for_every_kind(made):
    for kind in KINDS:
        names = Names(kind, name_of(kind))
        assert 'DISTILL_API = "1"' in (made / names.package / f"{names.module}.py").read_text()
        assert names.name in (made / names.package / "README.md").read_text()


def test_a_family_is_read_from_a_models_configs(tmp_path):
    """Of published size, without weights."""
    model = published(write_tiny_ovis(tmp_path / "model"))
    result = new("family", "made-ovis", "--model", str(model), "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    package = tmp_path / "distill-made-ovis"
    code = (package / "distill_made_ovis.py").read_text()
    assert 'txt_ids=text_ids(cond["prompt_embeds"].shape[1], like=x_t.to(dtype), counted=True)' in code
    assert "timestep=time / 1000," in code


def test_an_encoder_that_is_part_of_a_whole_is_made_small_with_it(tmp_path):
    """T5Gemma's, whose files have the config of the whole."""
    model = write_tiny_prx(tmp_path / "model")
    wide = {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "head_dim": 256}
    wide |= {"num_attention_heads": 8, "num_key_value_heads": 4, "layer_types": ["full_attention"] * 26}
    path = model / "text_encoder" / "config.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, **{half: {**whole[half], **wide} for half in ("encoder", "decoder")}}))
    path = model / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "context_in_dim": 2304}))
    for weights in model.glob("*/*.safetensors"):
        weights.unlink()
    result = new("family", "made-prx", "--model", str(model), "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "prompt_attention_mask" in (tmp_path / "distill-made-prx" / "distill_made_prx.py").read_text()


@pytest.mark.slow
def test_a_family_that_was_read_passes_its_own_tests(tmp_path):
    model = published(write_tiny_ovis(tmp_path / "model"))
    assert new("family", "made-ovis", "--model", str(model), "--output", str(tmp_path)).exit_code == 0
    package = tmp_path / "distill-made-ovis"
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    options = ["-p", "no:cacheprovider", "-c", str(tmp_path / "pytest.ini"), "-v", str(package)]
    done = python(package, "-m", "pytest", *options)
    assert done.returncode == 0, done.stdout[-6000:]
    assert done.stdout.count("test_images_are_those_of_the_pipeline[") == 2


def published(folder: Path) -> Path:
    """The model with the sizes of Ovis-Image's network and of its text encoder, and without weights."""
    transformer = {"attention_head_dim": 128, "num_attention_heads": 24, "num_layers": 6, "num_single_layers": 27}
    transformer |= {"joint_attention_dim": 2048, "axes_dims_rope": [16, 56, 56]}
    text = {"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8}
    text |= {"head_dim": 128, "intermediate_size": 6144}
    for part, sizes in (("transformer", transformer), ("text_encoder", text)):
        path = folder / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **sizes}))
    for weights in folder.glob("*/*.safetensors"):
        weights.unlink()
    return folder


def test_what_cannot_be_read_from_a_model_is_said(tmp_path):
    result = new("tracker", "made-here", "--model", "x", "--output", str(tmp_path))
    assert result.exit_code == 2
    assert "--model is for a family" in said(result.stderr)
    model = write_tiny_z_image(tmp_path / "model")
    result = new("family", "made-z", "--model", str(model), "--output", str(tmp_path))
    assert result.exit_code == 2
    assert "encode_prompt returns no tensor for prompt_embeds" in said(result.stderr)
    assert not (tmp_path / "distill-made-z").exists()
