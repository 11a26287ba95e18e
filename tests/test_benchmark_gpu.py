"""The GPU benchmark at small size on the CPU: its rows, its arithmetic, what it keeps and what it says."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import distill
import pytest
import torch

BENCHMARKS = Path(distill.__file__).parent / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("STEP_PROBE", "")  # put back after the test
    return import_module("gpu")


@pytest.fixture
def flops(gpu):
    return import_module("gpu_flops")


def test_rows_are_in_the_order_of_their_importance_and_no_two_are_one(gpu):
    names = [row.name for row in gpu.rows()]
    assert names[:3] == [
        "SDXL, lcm lora, 1024 px x 1, bf16",
        "SDXL, lcm lora, 1024 px x 1, bf16, compile regions",
        "SDXL, dmd2 lora, 1024 px x 1, bf16",
    ]
    assert len(set(names)) == len(names) == 47
    first = [names.index(f"{model}, lcm lora, 1024 px x 1, bf16") for model in ("SDXL", "SD3.5-medium", "FLUX.1")]
    assert first == sorted(first)
    assert first[-1] < 10
    whole = next(row for row in gpu.rows() if row.compiled == "whole").settings(compiles=True)
    assert "gradient_checkpointing=false" in whole, "the blocks' recomputation cannot lie inside one region"


def test_flops_of_a_layer_are_two_for_each_multiplication(flops):
    """Of (5, 6) @ (6, 7): 2 x 5 x 6 x 7 forward; as many backward to the weight, and as many again to the input."""
    layer, x = torch.nn.Linear(6, 7, bias=False, device="meta"), torch.zeros(5, 6, device="meta", requires_grad=True)
    assert flops._counted(lambda: layer(x)) == (420, 0)
    assert flops._counted(lambda: layer(x), [layer.weight]) == (420, 420)
    assert flops._counted(lambda: layer(x), [layer.weight, x]) == (420, 840)


def test_flops_of_a_step_are_those_of_the_passes_that_the_method_makes(flops):
    """As ``test_step_counts.py`` counts them; of five steps of dmd2 each simulates with 2.5 calls on average."""
    one = flops.PassFlops(teacher=1.0, student=10.0, backward=100.0, features=1e3, features_backward=1e4)
    assert flops.step_flops("lcm", one, guided_by_input=False) == 2 * 1 + 10 + 10 + 100
    assert flops.step_flops("lcm", one, guided_by_input=True) == 1 + 10 + 10 + 100
    fake = 10 + 100 + 2 * (1e3 + 1e4)
    turn = 100 + 10 + 2 * 1 + 1e3 + 1e4
    assert flops.step_flops("dmd2", one, guided_by_input=False) == pytest.approx(25 + fake + turn / 5)


def test_published_models_have_their_counts_and_their_relations(flops):
    """SDXL at 1024 px has 6.0 TFLOPs a pass without attention by published counts, 6.76 with it."""
    known = json.loads(flops.COUNTED.read_text())
    for name in ("SDXL", "SD3.5-medium", "FLUX.1"):
        lora, full = (flops.PassFlops(**known[f"{name}, {kind}, 1024 px"]) for kind in ("lora", "full"))
        assert full.teacher == full.student == lora.teacher < lora.student < 1.15 * lora.teacher
        assert 1.9 * full.student < full.backward < 2.05 * full.student
        assert lora.student < lora.backward < full.backward
        assert 0.3 < lora.features / lora.student < 0.6
    assert known["SDXL, lora, 1024 px"]["teacher"] == pytest.approx(6.76e12, rel=1e-3)


def test_the_peak_of_a_card_is_that_of_the_longest_name_that_fits(flops):
    assert flops.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert flops.peak_flops("NVIDIA H100 80GB HBM3") == 989.5e12
    assert flops.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert flops.peak_flops("NVIDIA L40S") == 362e12
    assert flops.peak_flops("CPU") is None


def test_two_rows_run_small_are_kept_and_only_what_is_new_is_measured(gpu, tmp_path, monkeypatch, capsys):
    def call(names, *more):
        gpu.main([
            "--small", "--device", "cpu", "--steps", "6", "--rows", names, "--workspace", str(tmp_path), *more
        ])  # fmt: skip
        return json.loads((tmp_path / "gpu.json").read_text())

    first = call("FLUX.1; dmd2 lora; 1024 px x 1; bf16", "--minutes", "30")
    name = "FLUX.1, dmd2 lora, 1024 px x 1, bf16"
    row = first["rows"][name]
    assert row["samples_per_second"] > 0
    assert row["flops_per_second"] == pytest.approx(row["flops_per_sample"] * row["samples_per_second"])
    assert row["seconds_to_first_step"] > 0 < row["seconds_of_first_step"]
    assert first["machine"]["torch"] == torch.__version__
    line = next(line for line in (tmp_path / "gpu.md").read_text().splitlines() if f"| {name} |" in line)
    assert line.count("|") == len(gpu.HEADS) + 1

    monkeypatch.setattr(gpu.time, "time", lambda: pytest.fail("it was measured again"))
    again = call("FLUX.1; dmd2 lora; 1024 px x 1; bf16", "--minutes", "0")
    assert again["rows"][name] == row
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("STEP_PROBE", "")
    call("SD3.5-medium; lcm lora; 1024 px x 1; fp8", "--minutes", "30")  # one row: it is a whole name
    found = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert len(found) == 2
    assert all("samples_per_second" in each for each in found.values()), found

    monkeypatch.setattr(gpu, "commit", lambda: "another")
    with pytest.raises(SystemExit, match="name another folder"):
        call("FLUX.1", "--minutes", "30")


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_row_runs_small(gpu, tmp_path):
    """Rows that need what this version lacks say so. The C++ compiler does not optimise, which is quicker."""
    plainly = {"aot_inductor.debug_compile": True, "cpp.simdlen": 1, "compile_threads": 1}
    with import_module("torch._inductor.config").patch(plainly):
        gpu.main(["--small", "--device", "cpu", "--steps", "6", "--minutes", "110", "--workspace", str(tmp_path)])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert not found["not_reached"]
    failed = {name: row["failed"] for name, row in found["rows"].items() if "failed" in row}
    assert gpu.has_compile() or set(failed.values()) <= {"this version has no key `compile`"}, failed
    assert not gpu.has_compile() or not failed, failed
