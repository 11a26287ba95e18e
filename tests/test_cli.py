"""The command line: help without heavy imports, exit codes, streams, every command of the configuration."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from distill.core.cli import COMMANDS, WAIT_VARIABLES, main, wait_without_spinning
from distill.core.data.pipeline import DataPipeline
from distill.core.errors import Interrupted, PluginError, UserError
from distill.core.runs.run import Run
from support.config_files import PLUGIN, Pair, distill, said
from support.small_run import write_run

HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "pydantic", "PIL")


def test_help_names_every_command():
    result = distill("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.stdout


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom distill.core.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit as end:\n"
        f"    print('loaded', [name for name in {HEAVY!r} if name in sys.modules], end.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "loaded [] 0" in done.stdout


def test_importing_the_package_imports_nothing():
    names = (*HEAVY, "pluggy", "typer")
    code = f"import sys, distill, distill.core.config\nprint([name for name in {names!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_python_dash_m_is_the_same_program():
    done = subprocess.run([sys.executable, "-m", "distill", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0.1.0"


@pytest.mark.parametrize("command", ["run", "config check", "config show", "config schema", "config init", "doctor"])
def test_every_command_has_help(command):
    result = distill(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


def test_a_misspelt_command_is_a_mistake_of_the_user():
    result = distill("rnu")
    assert result.exit_code == 2
    assert "Did you mean 'run'" in said(result.output)


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("m", "r"), 2), (PluginError("m"), 1), (Interrupted("m"), 130), (KeyboardInterrupt(), 130)],
)
def test_errors_end_with_their_exit_code_and_without_a_traceback(error, code, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("distill.core.runs.run.run", fail)
    pair = Pair(tmp_path)
    pair.write()
    result = distill("run", *pair.options())
    assert result.exit_code == code
    assert "error: " in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_what_nobody_foresaw_keeps_its_traceback(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise ZeroDivisionError("deep inside")

    monkeypatch.setattr("distill.core.runs.run.run", fail)
    pair = Pair(tmp_path)
    pair.write()
    result = distill("run", *pair.options())
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_main_ends_in_an_exit_code(capsys):
    with pytest.raises(SystemExit) as end:
        main(["config", "check", "--config", "nowhere.json"])
    assert end.value.code == 2
    assert "nowhere.json" in capsys.readouterr().err


def test_run_hands_over_the_configuration_of_flags_files_and_overrides(tmp_path, monkeypatch):
    seen = {}

    def distil(configuration, registry):
        seen.update(configuration=configuration, registry=registry)
        return SimpleNamespace(rank=1)

    monkeypatch.setattr("distill.core.runs.run.run", distil)
    pair = Pair(tmp_path, {"learning_rate": 1e-3, "seed": 1})
    pair.write()
    model = tmp_path / "other model"
    model.mkdir()
    more = ["--model", str(model), "--output-dir", str(tmp_path / "o"), "--overwrite", "--method", "needy"]
    result = distill("run", *pair.options(), *more, "--set", "seed=7", "--set", "data.pets.repeats=3")
    assert result.exit_code == 0, result.output
    run = seen["configuration"].run
    assert (run.learning_rate, run.seed, run.overwrite) == (1e-3, 7, True)
    assert run.pretrained_model_name_or_path == str(model)
    assert run.output_dir == tmp_path / "o"
    assert run.distillation_method == "needy"
    assert seen["configuration"].datasets[0].repeats == 3
    assert seen["configuration"].plugin_files == (PLUGIN,)


def test_a_dry_run_prints_the_plan_and_neither_loads_nor_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.core.runs.run.run", lambda *a, **k: pytest.fail("a dry run ran"))
    checked = []
    family = SimpleNamespace(
        check_source=lambda: checked.append(True), empty_network=lambda: None, prediction_type="epsilon",
        guided_by_input=False, usual_guidance=5.0,
    )  # fmt: skip
    monkeypatch.setattr("distill.core.runs.builders.build_family", lambda *arguments, **options: family)
    pair = Pair(tmp_path)
    pair.write()
    result = distill("run", *pair.options(), "--dry-run")
    assert result.exit_code == 0, result.output
    assert checked == [True]
    assert "10 steps" in result.stdout
    assert "LoRA of rank 64, method lcm" in result.stdout
    assert not (tmp_path / "out").exists()


def test_a_dry_run_refuses_an_occupied_output_folder(tmp_path):
    pair = Pair(tmp_path)
    pair.write()
    (tmp_path / "out" / "student").mkdir(parents=True)
    result = distill("run", *pair.options(), "--dry-run")
    assert result.exit_code == 2
    assert "--overwrite" in result.stderr


def test_config_show_prints_json_that_reproduces_itself(tmp_path):
    pair = Pair(tmp_path, {"validation_steps": 5})
    pair.write()
    first = distill("config", "show", *pair.options())
    assert first.exit_code == 0, first.output
    assert "validation_steps is read as" in first.stderr
    resolved = tmp_path / "again.json"
    resolved.write_text(first.stdout)
    second = distill("config", "show", "--config", resolved)
    assert second.stdout == first.stdout
    assert json.loads(first.stdout)["validation_step_interval"] == 5


def test_config_schema_knows_every_key_and_plugin():
    schema = json.loads(distill("config", "schema", "--plugin", PLUGIN).stdout)
    keys = schema["properties"]
    assert keys["learning_rate"]["exclusiveMinimum"] == 0
    assert keys["distillation_config"]["properties"]["needy"]["properties"]["grid"]["maximum"] == 1000
    assert "instance_data_dir" in keys["data"]["items"]["properties"]
    assert schema["additionalProperties"] is False
    named = json.dumps(schema)
    for reference in {part.split('"')[0] for part in named.split('"$ref": "#/$defs/')[1:]}:
        assert reference in schema["$defs"]


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_config_init_writes_a_pair_that_is_usable_once_the_paths_are_there(model_type, tmp_path):
    result = distill("config", "init", tmp_path / "start", "--model-type", model_type)
    assert result.exit_code == 0, result.output
    text = (tmp_path / "start" / "config.yaml").read_text()
    keys = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    comments = [line for line in text.splitlines() if line.lstrip().startswith("#")]
    assert len(comments) >= len(keys) - 2  # every key has its meaning above it
    assert yaml.safe_load(text)["model_type"] == model_type
    (tmp_path / "images").mkdir()
    checked = distill("config", "check", "--config", tmp_path / "start" / "config.yaml")
    assert checked.exit_code == 0, checked.output
    again = distill("config", "init", tmp_path / "start")
    assert again.exit_code == 2
    assert "exists already" in again.stderr


def test_plugins_list_and_show_say_what_is_there_and_from_where():
    listed = distill("plugins", "list", "--plugin", PLUGIN)
    assert listed.exit_code == 0
    rows = [line for line in listed.stdout.splitlines() if "needy" in line]
    assert len(rows) == 1
    assert str(PLUGIN) in rows[0]
    shown = distill("plugins", "show", "needy", "--plugin", PLUGIN).stdout
    assert "A method that needs whatever its settings say." in shown
    assert "strength: a number at least 0 and at most 1; default 0.5" in shown
    unknown = distill("plugins", "show", "neddy", "--plugin", PLUGIN)
    assert unknown.exit_code == 2
    assert "did you mean 'needy'" in unknown.stderr


def test_doctor_says_what_is_there_and_what_is_missing():
    result = distill("doctor", "--plugin", PLUGIN)
    assert result.exit_code == 0, result.output
    assert "torch" in result.stdout
    assert "missing; the tracker far-tracker needs it" in result.stdout
    assert "Hugging Face" in result.stdout
    assert "--config FILE adds" in result.stdout
    recipe = distill("doctor", "--recipe", "lcm-lora-sdxl")
    assert recipe.exit_code == 2, "a recipe alone is a configuration, which lacks its data"
    assert "name the data file" in recipe.stderr


@pytest.mark.parametrize("given", [["doctor"], ["config", "check"]])
def test_doctor_and_check_load_no_compiler_and_end_at_once(given, tmp_path):
    """They took 6.1 s of CPU at SDXL's size: 1.4 of them to end, 0.6 for a compiler that bitsandbytes asks for."""
    config = write_run(tmp_path, report_to="none")
    code = (
        "import atexit, gc, os, sys\n"
        "def at_end():\n"
        "    loaded = [name in sys.modules for name in ('diffusers.models', 'torch._inductor.compile_fx')]\n"
        "    print(loaded, gc.get_freeze_count() > 100_000, os.environ.get('TORCHDYNAMO_DISABLE'), gc.isenabled())\n"
        "atexit.register(at_end)\n"
        "from distill.core.cli import main\nmain()"
    )
    clean = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    command = [sys.executable, "-c", code, *given, "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[True, False] True None True"


def test_cycles_are_collected_from_where_a_run_begins_with_its_data(tmp_path, monkeypatch):
    """Before, modules are imported: looking for cycles took a quarter of the time to the first step."""
    seen = []
    monkeypatch.setattr(Run, "_check_model", lambda run: seen.append(gc.isenabled()))

    def prepare(pipeline):
        seen.append(gc.isenabled())
        raise UserError("far enough", "go no further")

    monkeypatch.setattr(DataPipeline, "prepare", prepare)
    result = distill("run", "--config", write_run(tmp_path, report_to="none"))
    assert "far enough" in result.stderr
    assert (result.exit_code, seen, gc.isenabled()) == (2, [False, True], True)
    assert distill("run", "--config", tmp_path / "absent.json").exit_code == 2
    assert gc.isenabled()


def test_adapter_parameters_are_counted_as_peft_makes_them():
    import peft
    import torch
    from distill.core.runs.planned_memory import adapter_parameters

    network = torch.nn.ModuleDict(
        {"to_q": torch.nn.Linear(6, 4), "conv1": torch.nn.Conv2d(3, 5, 3), "other": torch.nn.Linear(2, 2)}
    )
    counted = adapter_parameters(network, 2, ("to_q", "conv1"))
    config = peft.LoraConfig(r=2, target_modules=["to_q", "conv1"])
    adapted = peft.inject_adapter_in_model(config, network)
    assert counted == sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({}, {"GOMP_SPINCOUNT": "30000"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "9"}, {"GOMP_SPINCOUNT": "9"}),
        ({"KMP_BLOCKTIME": "0"}, {"KMP_BLOCKTIME": "0"}),
    ],
)
def test_threads_wait_asleep_unless_the_environment_says_otherwise(given, seen, monkeypatch):
    for name in WAIT_VARIABLES:
        monkeypatch.setenv(name, "put back after the test")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    wait_without_spinning()
    assert {name: os.environ[name] for name in WAIT_VARIABLES if name in os.environ} == seen


@pytest.mark.parametrize("program", [["-m", "distill"], ["-c", "from distill.core.cli import main; main()"]])
def test_threads_of_each_way_to_start_it_wait_asleep(program, tmp_path):
    """What a process that the command starts inherits is what its own PyTorch found, which loads after `main` begins:
    `test_help_imports_nothing_heavy`.
    """
    plugin = tmp_path / "looks.py"
    plugin.write_text(
        "import subprocess, sys\nimport distill\n\n"
        "subprocess.run([sys.executable, '-c', 'import json, os; print(json.dumps(dict(os.environ)))'])\n"
        "sys.exit()\n"
    )
    clean = {name: value for name, value in os.environ.items() if name not in WAIT_VARIABLES}
    command = [sys.executable, *program, "plugins", "list", "--plugin", str(plugin)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean)
    found = json.loads(done.stdout)
    assert {name: value for name, value in found.items() if name in WAIT_VARIABLES} == {"GOMP_SPINCOUNT": "30000"}
