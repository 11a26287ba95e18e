"""DeepSpeed's zero2 and zero3 take the steps of one process, and their checkpoints are those of one process."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from distill.core.engine.checkpoint import CheckpointStore
from distill.core.engine.processes import Processes
from distill.core.engine.shards import FlatShard, is_sharded
from distill.core.engine.strategy import Strategy
from distill.core.errors import UserError
from distill.core.utils.strategies import ParallelSettings
from distill.plugins.optimizers import AdamW, AdamWBF16, StableAdamW
from distill.plugins.optimizers_adaptive import ScheduleFreeAdamW
from support.forks import forked
from support.small_run import execute, losses, write_run
from support.strategies import CASES
from support.tiny_sdxl import write_tiny_sdxl
from support.torchrun import environment, launched, launcher

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
TESTS = Path(__file__).parent
NUM_STEPS = 20
FULL = [case for case in CASES if "full" in case]
ACCUMULATED = "lcm-full*2"
AMPLIFIED = {"pcm-full": 1e-2, "dmd2-full": 1e-4, "progressive-full": 1e-4}
"""Rounding of fp32 that discriminators, the Huber loss and Adam's first steps magnify in twenty steps: as much between
one process and two of replicate (2.4e-3, 2.6e-5, 1.4e-5)."""


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """Three steps of one process, a checkpoint after the second, and what two processes made of it."""
    from support.zero_steps import STEPS, parts_of, state_of, step

    root = tmp_path_factory.mktemp("zero")
    write_tiny_sdxl(root / "model", layers_per_block=1)
    one = Strategy(Processes("cpu"), ParallelSettings())
    parts = parts_of(root, one)
    steps = [step(parts, one, number) for number in range(STEPS)]
    CheckpointStore(root / "one", limit=None).save(state_of(parts, one))
    steps.append(step(parts, one, STEPS))
    forked("support/zero_steps.py", root, root, cwd=TESTS, timeout=900)
    return root, one, steps, json.loads((root / "found.json").read_text())


@needs_deepspeed
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_steps_and_checkpoints_are_those_of_one_process(trial, name):
    from support.zero_steps import STEPS, load, parts_of, step

    root, one, steps, found = trial
    close = {"rel": 1e-5}
    for (loss, norm), (own_loss, own_norm) in zip(steps, [*found[name]["steps"], found[name]["resumed"]], strict=True):
        assert own_loss == pytest.approx(loss, **close)
        assert own_norm == pytest.approx(norm, **close)

    ours = CheckpointStore(root / name, limit=None).load(root / name / f"checkpoint-{STEPS}")
    theirs = CheckpointStore(root / "one", limit=None).load(root / "one" / f"checkpoint-{STEPS}")
    assert ours.meta == theirs.meta
    for group, tensors in theirs.tensors.items():
        assert {n: (t.shape, t.dtype) for n, t in ours.tensors[group].items()} == {
            n: (t.shape, t.dtype) for n, t in tensors.items()
        }
    parts = parts_of(root, one)
    load(parts, root / name / f"checkpoint-{STEPS}")
    assert step(parts, one, STEPS)[0] == pytest.approx(steps[-1][0], **close)


@needs_deepspeed
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_a_loss_of_one_process_that_is_not_finite_is_withheld_by_all(trial, name):
    found = trial[3][name]
    assert found["before"]["network-student"] == found["after"]["network-student"]
    assert found["bad_norm"] == float("inf")
    assert found["exported"] == pytest.approx(found["after"]["network-student"], rel=1e-12)


@pytest.mark.parametrize(
    ("name", "given", "text"),
    [
        ("zero2", {"model_type": "lora"}, "model_type = lora: it divides networks that are trained whole"),
        ("zero2", {"optimizer": StableAdamW}, "optimizer = stableadamw: its step looks at whole matrices"),
        ("zero2", {"optimizer": ScheduleFreeAdamW}, "sets its weights aside for evaluation"),
        ("zero3", {"optimizer": AdamWBF16}, "optimizer = adamw_bf16: DeepSpeed steps a float32 copy"),
        ("zero3", {"mixed_precision": "fp16"}, "mixed_precision = fp16: DeepSpeed scales and skips by itself"),
        ("zero3", {"quantised": True}, "a quantised teacher"),
    ],
)
def test_what_cannot_be_divided_is_refused(name, given, text):
    from distill.core.engine.zero import Zero

    settings = {"model_type": "full", "optimizer": AdamW, "quantised": False, "mixed_precision": "bf16"}
    with pytest.raises(UserError, match=text) as refused:
        Zero(Processes("cpu"), ParallelSettings(name)).check(**{**settings, **given})
    assert str(refused.value).startswith(f"parallel = {name}")


def test_deepspeed_that_is_not_installed_is_named(monkeypatch):
    from distill.core.engine import zero

    monkeypatch.setattr(zero, "find_spec", lambda name: None)
    strategy = zero.Zero(Processes("cpu"), ParallelSettings("zero2"))
    with pytest.raises(UserError, match=r'not installed[^"]*pip install "distill-engine\[deepspeed\]"'):
        strategy.require_packages()


def test_a_run_with_adapters_is_refused_before_weights_load(tmp_path):
    with pytest.raises(UserError, match="parallel = zero2 with model_type = lora"):
        execute(write_run(tmp_path, parallel="zero2"))


def test_exact_derivatives_in_forward_mode_are_refused_under_zero3(tmp_path):
    config = {"distillation_method": "meanflow", "distillation_config": {"meanflow": {"derivative": "exact"}}}
    full = {"model_type": "full", "learning_rate": 1e-5, "validation_step_interval": 0}
    with pytest.raises(UserError, match="parallel = zero3: meanflow differentiates its networks in forward mode"):
        execute(write_run(tmp_path, parallel="zero3", **config, **full))


def test_a_part_of_a_weight_is_a_tensor_of_its_shape_without_values():
    import torch

    shard = FlatShard(torch.zeros(3), torch.Size((2, 3)))
    assert is_sharded(shard)
    assert (shard.shape, shard.detach().part.shape) == ((2, 3), (3,))
    with pytest.raises(NotImplementedError, match="this process holds a part"):
        shard + 1


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_method_takes_the_steps_of_one_process(tmp_path):
    """Twenty steps in fp32; the first four losses agree to 1e-6 in every method."""
    write_tiny_sdxl(tmp_path / "model")
    found = {}
    for strategy, launch in (("replicate", [sys.executable]), ("zero2", launcher()), ("zero3", launcher())):
        out, cases = tmp_path / f"{strategy}.json", FULL if strategy == "replicate" else [*FULL, ACCUMULATED]
        command = [
            "support/strategies.py",
            str(out),
            str(tmp_path / "model"),
            strategy,
            "float32",
            str(NUM_STEPS),
            *cases,
        ]
        subprocess.run([*launch, *command], cwd=TESTS, check=True, capture_output=True, timeout=1800, env=environment())
        found[strategy] = json.loads(out.read_text())
    for name in ("zero2", "zero3"):
        for case, of_two in found[name].items():
            one = found["replicate"][case.partition("*")[0]]
            assert of_two["losses"][:4] == pytest.approx(one["losses"][:4], rel=2e-6), (name, case)
            assert of_two["losses"] == pytest.approx(one["losses"], rel=AMPLIFIED.get(case, 1e-5)), (name, case)
            assert of_two["frozen"]
            assert of_two["held"] == one["held"] // (2 if name == "zero3" else 1)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero3"])
@pytest.mark.parametrize("offload", [False, True])
def test_a_run_ends_in_a_student_and_is_resumed_by_one_process(tmp_path, name, offload):
    short = {
        "model_type": "full", "learning_rate": 1e-5, "max_train_steps": 4, "validation_step_interval": 2,
        "checkpoint_step_interval": 2, "evaluation_num_samples": 2, "device": "cpu",
    }  # fmt: skip
    execute(write_run(tmp_path, output="one", **short))
    config = write_run(
        tmp_path, output="two", gradient_accumulation_steps=1, parallel=name, parallel_offload=offload, **short
    )
    launched("-m", "distill", "run", "--config", config, timeout=900)
    assert (tmp_path / "two" / "student" / "unet" / "diffusion_pytorch_model.safetensors").exists()
    one, two = (losses(tmp_path / output) for output in ("one", "two"))
    for (_, a, norm_a), (_, b, norm_b) in zip(one, two, strict=True):
        assert (a, norm_a) == pytest.approx((b, norm_b), rel=1e-3)
    import shutil

    shutil.rmtree(tmp_path / "two" / "checkpoint-4")
    execute(write_run(tmp_path, output="two", **short))
    for (step, a, _), (again, b, _) in zip(two[2:], losses(tmp_path / "two")[2:], strict=True):
        assert (step, a) == (again, pytest.approx(b, rel=1e-3))
