"""docs/scaling.md and the files of examples/ for several processes: its table, accelerate's files, Slurm's script."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from support.pages import ROOT, text
from support.small_run import execute, losses, write_run

ACCELERATE = ROOT / "examples" / "accelerate"
SLURM = ROOT / "examples" / "slurm" / "train.sbatch"
ZERO = "ACCELERATE_DEEPSPEED_"


def test_the_table_is_what_the_arithmetic_says(tmp_path):
    """Made by `python benchmarks/strategies.py`: rounded to GB, so that a small change of a library changes nothing."""
    spec = importlib.util.spec_from_file_location("strategies", ROOT / "benchmarks" / "strategies.py")
    assert spec
    assert spec.loader
    strategies = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(strategies)
    cards = strategies.cards_table(tmp_path / "cards")
    assert cards in text("docs/low-memory.md")
    assert all(taken <= size for size, _, taken, _ in strategies.small_cards(tmp_path / "again"))
    rows = {model: dict(strategies.planned(tmp_path, model)) for model in strategies.MODELS}
    page = text("docs/scaling.md")
    assert strategies.table(rows) in page
    sizes = [next(iter(runs.values())).base_parameters / 1e9 for runs in rows.values()]
    assert sizes == pytest.approx([2.567, 8.057, 11.901], abs=0.001), "as published"
    blocks = [next(iter(runs.values())).largest_unit / 1e6 for runs in rows.values()]
    told = re.search(r"block of (\d+) million.*?block of (\d+).*?block of (\d+)", page, re.DOTALL)
    assert told
    assert [f"{block:.0f}" for block in blocks] == [*told.groups()]


# -- accelerate -------------------------------------------------------------------------------------------------------

EXPECTED = {
    "replicate": {},
    "fsdp": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false"},
    "fsdp-offload": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
    "zero2": {f"{ZERO}ZERO_STAGE": "2", f"{ZERO}OFFLOAD_OPTIMIZER_DEVICE": "none"},
    "zero2-offload": {f"{ZERO}ZERO_STAGE": "2", f"{ZERO}OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
    "zero3": {f"{ZERO}ZERO_STAGE": "3", f"{ZERO}OFFLOAD_PARAM_DEVICE": "none"},
    "zero3-offload": {f"{ZERO}ZERO_STAGE": "3", f"{ZERO}OFFLOAD_PARAM_DEVICE": "cpu"},
}
"""File -> variables by which its processes know their strategy."""
STRATEGY_VARIABLES = ("ACCELERATE_USE_", "FSDP_", ZERO)


def of_processes(file: Path, monkeypatch) -> dict[str, str]:
    """The variables that `accelerate launch` gives the processes of a file."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    found: list[dict[str, str]] = []
    monkeypatch.setattr(launch, "multi_gpu_launcher", lambda args: found.append(prepare_multi_gpu_env(args)))
    monkeypatch.setattr(launch, "deepspeed_launcher", lambda args: found.append(prepare_deepspeed_cmd_env(args)[1]))
    launch.launch_command(launch.launch_command_parser().parse_args(["--config_file", str(file), "script.py"]))
    (variables,) = found
    return variables


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_each_file_and_tells_its_processes_the_strategy(name, monkeypatch):
    for variable in [each for each in os.environ if each.startswith(STRATEGY_VARIABLES)]:
        monkeypatch.delenv(variable)
    file = ACCELERATE / f"{name}.yaml"
    config = load_config_from_file(str(file))
    kind = {"r": "MULTI_GPU", "f": "FSDP", "z": "DEEPSPEED"}[name[0]]
    assert (config.distributed_type, config.num_processes) == (kind, 8)
    found = {key: value for key, value in of_processes(file, monkeypatch).items() if key.startswith(STRATEGY_VARIABLES)}
    expected = EXPECTED[name] | ({"ACCELERATE_USE_DEEPSPEED": "true"} if name[0] == "z" else {})
    assert {key: found.get(key) for key in expected} == expected
    uses = {key for key in found if key.startswith("ACCELERATE_USE_")}
    assert uses == {key for key in expected if key.startswith("ACCELERATE_USE_")}


def test_each_file_is_on_the_page_and_none_besides():
    assert sorted(path.stem for path in ACCELERATE.iterdir()) == sorted(EXPECTED)
    page = text("docs/scaling.md")
    assert [name for name in EXPECTED if f"examples/accelerate/{name}.yaml" not in page] == []


# -- Slurm ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """The environment of a job on two machines of one GPU each, whose programs are stand-ins."""
    (tmp_path / "bin").mkdir()

    def program(name: str, code: str) -> None:
        file = tmp_path / "bin" / name
        file.write_text(f"#!/bin/bash\n{code}\n")
        file.chmod(0o755)

    program("scontrol", 'test "$*" = "show hostnames localhost,elsewhere" && printf "localhost\\nelsewhere\\n"')
    program("srun", '"$@" & first=$!; "$@" || exit 1; wait $first')
    program("torchrun", 'printf "%s\\n" "$*" >> "$LAUNCHED"')
    job = {"SLURM_JOB_NODELIST": "localhost,elsewhere", "SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "2"}
    job |= {"SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "2", "LAUNCHED": str(tmp_path / "launched")}
    return {**os.environ, **job, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def test_the_script_of_slurm_starts_a_launcher_on_each_machine(cluster):
    from torch.distributed.run import get_args_parser

    assert subprocess.run(["bash", "-n", SLURM]).returncode == 0
    done = subprocess.run(["bash", SLURM, "--config", "my config.json"], env=cluster, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = Path(cluster["LAUNCHED"]).read_text().splitlines()
    assert len(lines) == 2
    assert lines[0] == lines[1]
    args = get_args_parser().parse_args(shlex.split(lines[0]))
    assert (args.nnodes, args.nproc_per_node, args.rdzv_backend) == ("2", "1", "c10d")
    assert args.rdzv_endpoint == f"localhost:{20000 + os.getpid() % 20000}"
    assert args.module
    assert args.training_script == "distill"
    assert args.training_script_args[-2:] == ["--set", "resume_from_checkpoint=latest"]


@pytest.mark.slow
def test_two_machines_train_as_one_process(cluster, tmp_path):
    """Two real launchers with one process each, which meet as on two machines."""
    (tmp_path / "bin" / "torchrun").write_text(f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    short = {"max_train_steps": 3, "validation_step_interval": 0, "device": "cpu", "evaluation_num_samples": 0}
    execute(write_run(tmp_path, output="one", train_batch_size=2, gradient_accumulation_steps=2, **short))
    config = write_run(tmp_path, output="two", train_batch_size=2, gradient_accumulation_steps=1, **short)
    done = subprocess.run(["bash", SLURM, "--config", config], env=cluster, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "2 processes over gloo" in done.stderr
    for (_, a, _), (_, b, _) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
