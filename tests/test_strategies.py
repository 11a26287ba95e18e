"""Processes that share the networks take the steps of one process: every method, every kind of student."""

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distill.core.engine.fsdp import FullyShard
from distill.core.errors import UserError
from distill.core.registry.registry import Registry
from distill.core.utils.strategies import ParallelSettings
from distill.distill_methods.lcm import LCM
from safetensors.torch import load_file
from support import strategies
from support.forks import forked
from support.small_run import execute, losses, write_run
from support.tiny_sdxl import write_tiny_sdxl
from support.torchrun import launched
from support.trial import make_trial

SHORT = ("lcm-full-average", "dmd2-mixed", "pcm-lora*2")
ALL = tuple(strategies.CASES)
ACCUMULATED = ("lcm-lora*2", "lcm-full*2", "dmd2-lora*2", "dmd2-full*2")
AMPLIFIED = ("pcm-full",)
"""Cases in which the Huber loss amplifies the rounding of gradient norms, to 2e-10 over twenty steps."""
WEIGHTS = "student/unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("model") / "tiny", seed=0)


def shared(folder, out: Path, strategy: str, *cases: str, processes: int, steps: int, start=forked) -> dict:
    script = [strategies.__file__, out, folder, strategy, "float64", steps, *cases]
    start(*script, processes=processes, timeout=3000)
    return json.loads(out.read_text())


def alone(folder, *cases: str, steps: int) -> dict:
    from distill.core.engine.processes import Processes
    from distill.core.engine.strategy import Strategy

    strategy = Strategy(Processes("cpu"), ParallelSettings())
    return {case: strategies.run(case, Path(folder), strategy, torch.float64, steps=steps) for case in cases}


def require_equal(found: dict, expected: dict, *, tolerance: float, shards: int) -> None:
    for case, values in found.items():
        whole = expected[case.partition("*")[0]]
        for kind, factor in (("losses", 1), ("norms", 10 if case in AMPLIFIED else 1)):
            assert values[kind] == pytest.approx(whole[kind], rel=factor * tolerance), (case, kind)
        for group, (_, magnitude) in values["weights"].items():
            assert magnitude == pytest.approx(whole["weights"][group][1], rel=tolerance), (case, group)
        assert values["frozen"], f"{case}: frozen weights have changed"
        assert values["held"] <= values["of"] / shards * 1.2, f"{case}: each process holds more than its part"


# -- equal steps ------------------------------------------------------------------------------------------------------


def test_two_processes_that_hold_half_of_the_weights_each_train_as_one(tmp_path):
    folder = write_tiny_sdxl(tmp_path / "tiny", seed=0, layers_per_block=1)
    expected = alone(folder, *(case.partition("*")[0] for case in SHORT), steps=3)
    found = shared(folder, tmp_path / "two.json", "fsdp", *SHORT, processes=2, steps=3)
    require_equal(found, expected, tolerance=1e-10, shards=2)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("processes", [2, 4])
def test_every_method_and_kind_of_student_over_twenty_steps(folder, tmp_path, processes):
    expected = alone(folder, *ALL, steps=20)
    for strategy, shards in (("replicate", 1), ("fsdp", processes)):
        accumulated = ACCUMULATED if processes == 2 else ()
        found = shared(
            folder, tmp_path / f"{strategy}.json", strategy, *ALL, *accumulated, processes=processes, steps=20,
            start=launched,
        )  # fmt: skip
        require_equal(found, expected, tolerance=1e-10, shards=shards)


WORDS = {"lora": "LoRA", "full": "full", "mixed": "LoRA, full fake score"}


def test_the_table_of_the_docs_says_equal_of_what_is_compared_and_of_nothing_else():
    text = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
    rows = re.findall(r"^\| (\w+) \| ([^|]+) \| equal \| equal \|", text, re.MULTILINE)
    cases = [case.split("-") for case in ALL if case.count("-") == 1]
    assert rows == [(method, WORDS[kind]) for method, kind in cases]


# -- whole runs -------------------------------------------------------------------------------------------------------


def started(config: Path) -> str:
    return forked("-m", "distill", "run", "--config", config).stderr


def test_a_sharded_run_validates_saves_exports_and_goes_on_as_one_process(tmp_path):
    """And the run of one process goes on sharded: the losses are those of the run that never changed."""
    short = {
        "max_train_steps": 4, "validation_step_interval": 2, "checkpoint_step_interval": 2, "device": "cpu",
        "model_type": "full", "use_ema": True, "learning_rate": 1e-4, "evaluation_num_samples": 4,
        "evaluation_steps": [1],
    }  # fmt: skip
    one = {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    two = {"train_batch_size": 2, "gradient_accumulation_steps": 1, "parallel": "fsdp"}
    execute(write_run(tmp_path, output="one", **short, **one))
    said = started(write_run(tmp_path, output="two", **short, **two))
    assert "2 processes over gloo: fsdp, weights sharded over 2" in said
    assert said.count("student written") == 1, "only the first process writes"
    whole, sharded = load_file(tmp_path / "one" / WEIGHTS), load_file(tmp_path / "two" / WEIGHTS)
    for name, weight in whole.items():
        torch.testing.assert_close(sharded[name], weight, rtol=0, atol=1e-4, msg=name)  # AdamW's first steps
    assert (tmp_path / "two/evaluation.json").exists()
    grids = [json.loads((tmp_path / name / "evaluation.json").read_text())["rows"] for name in ("one", "two")]
    for mine, theirs in zip(*grids, strict=True):
        for key, value in mine["scores"].items():
            assert theirs["scores"][key] == pytest.approx(value, rel=0.02, abs=1e-3), key
    manifest = json.loads((tmp_path / "two/checkpoint-2/manifest.json").read_text())
    assert {"network-student", "network-target", "average", "optimizer-student"} >= set(manifest["sharded"])

    before = {name: losses(tmp_path / name) for name in ("one", "two")}
    for name in ("one", "two"):
        shutil.rmtree(tmp_path / name / "checkpoint-4")
        shutil.rmtree(tmp_path / name / "student")
    execute(write_run(tmp_path, output="two", **short, **one))
    started(write_run(tmp_path, output="one", **short, **two))
    for name in ("one", "two"):
        for (_, loss, norm), (_, again, norm_again) in zip(before[name], losses(tmp_path / name), strict=True):
            assert again == pytest.approx(loss, rel=1e-5)
            assert norm_again == pytest.approx(norm, rel=1e-5)
    for name, weights in (("one", whole), ("two", sharded)):
        for key, weight in load_file(tmp_path / name / WEIGHTS).items():
            torch.testing.assert_close(weight, weights[key], rtol=0, atol=1e-6, msg=key)


def test_of_adapters_under_fsdp_the_first_process_alone_writes(folder, tmp_path):
    """Nothing that is saved is sharded: each process has it, and the others begin no save."""
    parts = make_trial(folder, LCM, LCM.Config(), "lora", total_steps=1)
    trainer = parts.trainer(tmp_path)
    for main in (False, True):
        processes = SimpleNamespace(main=main, synchronized=nullcontext)
        trainer.strategy = FullyShard(processes, ParallelSettings("fsdp"))
        trainer.step += 1
        trainer.save()
    assert [path.name for path in trainer.store.all()] == ["checkpoint-2"]


# -- what cannot be ---------------------------------------------------------------------------------------------------


class Four:
    """Four processes, without any."""

    world_size, rank, main = 4, 0, True


@pytest.mark.parametrize(
    ("shard_size", "given", "words"),
    [
        (3, {}, "parallel_shard_size = 3: 4 processes are no multiple of it"),
        (0, {"quantised": True}, "parallel = fsdp with a quantised base"),
        (0, {"optimizer": "muon"}, "optimizer = muon with parallel = fsdp and model_type = full"),
    ],
)
def test_what_cannot_be_sharded_is_refused_before_weights_load(shard_size, given, words):
    optimizer = Registry.load(installed=False).get("optimizer", given.pop("optimizer", "adamw"))
    strategy = FullyShard(Four(), ParallelSettings("fsdp", shard_size))
    with pytest.raises(UserError, match=words):
        strategy.check(
            **{"model_type": "full", "optimizer": optimizer, "quantised": False, "mixed_precision": "bf16", **given}
        )
