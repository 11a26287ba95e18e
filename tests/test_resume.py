"""A run that is killed at any moment and resumed gives, byte for byte, the run that was not killed."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from distill.core.errors import Interrupted, UserError
from support.forks import begun, forked
from support.resuming import resumed_equals_whole
from support.small_run import execute, losses, write_run

CHAOS = Path(__file__).parent / "support" / "chaos.py"
TWO = {"train_batch_size": 2, "gradient_accumulation_steps": 1, "device": "cpu", "process_timeout": 20}
FSDP = {**TWO, "parallel": "fsdp", "model_type": "full", "use_ema": True, "learning_rate": 1e-5}
SCORED = {"validation_scores": True, "validation_scores_num_samples": 2}
VARIANTS = {
    "fp32-lora": {"evaluation_num_samples": 2, "evaluation_steps": [1], **SCORED},
    "full-ema": {**FSDP, **SCORED},  # two processes, each of which saves its parts
}

GOLDEN = {
    "fp32-lora": [
        (0.01762586, 0.1239163), (0.0103343, 0.06782857), (0.03349567, 0.1930677), (0.01088046, 0.07345511),
        (0.01222541, 0.07427899), (0.05280875, 0.270585), (0.02429033, 0.1277151), (0.05964391, 0.3198987),
        (0.005397099, 0.02939785), (0.002330788, 0.01106785),
    ],
    "full-ema": [
        (0.01762586, 1.688762), (0.01064493, 0.9854206), (0.03463515, 3.068582), (0.01096048, 1.095576),
        (0.01209868, 1.288384), (0.05036663, 4.662127), (0.02525127, 2.310236), (0.05749093, 4.370102),
        (0.005523358, 0.4853622), (0.002226666, 0.1434704),
    ],
}  # fmt: skip
"""Loss and gradient norm of each step of lcm, written down before core had its wings: a change that changes no numbers
leaves them as they are. Processors round differently in the sixth digit."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Each variant, killed in each of its parts: its folder, and what was counted."""
    root = tmp_path_factory.mktemp("killed")
    configs = {
        name: write_run(root / name, output="whole", report_to="none", **settings)
        for name, settings in VARIANTS.items()
    }
    runs = [f"{config}*2" if VARIANTS[name].get("parallel") else str(config) for name, config in configs.items()]
    kills = ["3" if VARIANTS[name].get("parallel") else "4" for name in configs]
    return {name: (root / name, counts) for name, counts in zip(VARIANTS, chaos(*runs, "--kills", *kills), strict=True)}


@pytest.mark.timeout(1800)  # one fixture for all, which takes a minute unless the machine is very busy
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_resumed_is_byte_for_byte_the_same(killed, variant):
    """Losses, scores of validations and every file of the student, of runs in two folders, one killed in each of its
    parts; and scoring validations changes no loss: those written down are of runs that scored none.
    """
    folder, counts = killed[variant]
    four = {"caches": 1, "saves": 1, "validations": 1, "export": 1, "rounds": 1}
    assert counts == (
        four if "parallel" not in VARIANTS[variant] else {k: n for k, n in four.items() if k != "validations"}
    )
    if variant in GOLDEN:
        found = [figures for _, *figures in losses(folder / "whole")]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(GOLDEN[variant]), rtol=1e-4, atol=0)
    assert len(list((folder / "whole/validation").glob("step-*/scores.json"))) == 3


def test_the_state_of_a_bf16_optimizer_is_resumed_bit_for_bit(tmp_path):
    resumed_equals_whole(
        tmp_path, [3], max_train_steps=6, checkpoint_step_interval=1, checkpoints_total_limit=6, report_to="none",
        optimizer="adamw_bf16", mixed_precision="bf16", validation_step_interval=0,
    )  # fmt: skip


def chaos(*options: str, seconds: float = 1500) -> list[dict[str, int]]:
    """What tests/support/chaos.py counted of each run; it fails where anything differs from the run left alone."""
    done = forked(CHAOS, *options, processes=1, timeout=seconds)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    print(found)
    return [{kind: count for kind, count in counts.items() if kind != "seconds"} for counts in found]


STRATEGIES = {"replicate": TWO, "fsdp": FSDP}
SHORT = {
    "max_train_steps": 6, "checkpoint_step_interval": 2, "validation_step_interval": 3, "report_to": "none",
    "evaluation_num_samples": 2, "evaluation_steps": [1], "use_ema": True, "device": "cpu", "process_timeout": 20,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "options"), [(120, []), (80, ["--bucket", "--seed", "3"])], ids=["folder", "bucket"])
def test_200_kills_with_full_disks_and_outages_change_no_byte(tmp_path, kills, options):
    config = write_run(tmp_path, output="whole", **SHORT)
    (counts,) = chaos(str(config), "--kills", str(kills), "--full-disks", "0.1", *options, seconds=7200)
    assert sum(counts[kind] for kind in ("caches", "saves", "validations", "export", "anywhere")) == kills


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_30_kills_of_one_of_two_processes_change_no_byte(tmp_path, strategy):
    config = write_run(tmp_path, output="whole", **{**SHORT, **STRATEGIES[strategy]})
    (counts,) = chaos(f"{config}*2", "--kills", "30", seconds=7200)
    assert sum(counts[kind] for kind in ("caches", "saves", "validations", "export", "anywhere")) == 30


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run of 10 steps (``whole``), and one of 5 that was continued to as many (``parts``), which scored
    its validations.
    """
    root = tmp_path_factory.mktemp("runs")
    execute(write_run(root, output="whole", seed=1))
    execute(write_run(root, output="parts", seed=1, max_train_steps=5, **SCORED))
    _, lines = execute(write_run(root, output="parts", seed=1, **SCORED))
    assert any("resumed" in line for line in lines)
    return root


def test_resume_after_the_end_of_a_shorter_run_continues_it(runs):
    """Bit for bit, although one run scored its validations and the other did not."""
    assert [step for step, *_ in losses(runs / "parts")] == list(range(1, 11))
    assert losses(runs / "parts") == losses(runs / "whole")
    scored = sorted(file.parent.name for file in (runs / "parts/validation").glob("step-*/scores.json"))
    assert scored == ["step-000004", "step-000005", "step-000008", "step-000010"]


def test_same_seed_same_run_and_another_seed_another(runs):
    short = {"max_train_steps": 3, "validation_step_interval": 0}
    for output, seed in [("same", 1), ("other", 2)]:
        execute(write_run(runs, output=output, seed=seed, **short))
    assert losses(runs / "same") == losses(runs / "whole")[:3]
    assert losses(runs / "other") != losses(runs / "whole")[:3]


def test_accumulating_equals_one_batch_over_a_whole_run(runs):
    short = {"max_train_steps": 4, "validation_step_interval": 0, "seed": 1}
    for output, size, parts in [("one", 4, 1), ("four", 1, 4)]:
        execute(write_run(runs, output=output, train_batch_size=size, gradient_accumulation_steps=parts, **short))
    for (_, a, norm_a), (_, b, norm_b) in zip(losses(runs / "one"), losses(runs / "four"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
        assert norm_a == pytest.approx(norm_b, rel=1e-3)


def test_a_run_with_other_images_or_another_model_is_not_resumed(runs, tmp_path):
    from support.tiny_sdxl import write_tiny_sdxl

    more = [runs / "images" / "more.png", runs / "images" / "more.txt"]
    shutil.copy(runs / "images" / "00.png", more[0])
    more[1].write_text("one more")
    with pytest.raises(UserError, match="checkpoint-10 cannot be resumed: its samples are not those"):
        execute(write_run(runs, output="whole", seed=1, max_train_steps=12))
    for file in more:
        file.unlink()
    other = write_tiny_sdxl(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="model"):
        execute(write_run(runs, output="whole", seed=1, model=other, max_train_steps=12))


def test_signals_finish_the_step_save_and_end_with_130(tmp_path):
    settings = {"max_train_steps": 100000, "validation_step_interval": 0, "checkpoint_step_interval": 0}
    for number in (signal.SIGINT, signal.SIGTERM):
        config = write_run(tmp_path / number.name, **settings)
        metrics = tmp_path / number.name / "out" / "metrics.jsonl"
        with begun("-m", "distill", "run", "--config", config) as running:
            deadline = time.monotonic() + 200
            while not (metrics.exists() and metrics.stat().st_size):
                assert time.monotonic() < deadline, running.err.read_text()
                time.sleep(0.05)
            os.kill(running.pids[0], number)
            done = running.wait()
        err = done.stderr
        assert done.returncode == 130, err
        (checkpoint,) = (tmp_path / number.name / "out").glob("checkpoint-*")
        assert json.loads((checkpoint / "manifest.json").read_text())
        assert "resume_from_checkpoint=latest" in err
        assert "Traceback" not in err


def test_interrupted_is_130():
    assert Interrupted.exit_code == 130
