"""The type of exported students: the passes' own by default, rounded once from the trained weights, and said."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
from distill.core.errors import DistillError
from distill.core.runs.builders import export_dtype
from distill.core.runs.export import rounding
from safetensors import safe_open
from safetensors.torch import load_file
from support.small_run import execute, write_run
from support.tiny_sdxl import write_tiny_sdxl

WEIGHTS = "pytorch_lora_weights.safetensors"
QUIET = {"validation_step_interval": 0, "report_to": "none", "max_train_steps": 2, "publish_to": "kohya"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def half(model, tmp_path_factory):
    """A LoRA run under bf16 with a scale of 1.5: its folder, and what was said."""
    root = tmp_path_factory.mktemp("half")
    settings = {"mixed_precision": "bf16", "lora_alpha": 6, **QUIET}
    _, lines = execute(write_run(root, model=model, **settings))
    return SimpleNamespace(root=root, out=root / "out", lines=lines, settings=settings)


def test_auto_is_the_type_of_the_passes_of_a_lora_and_a_full_student_keeps_its_own():
    for precision, expected in {"no": None, "bf16": "bfloat16", "fp16": "float16"}.items():
        lora, full = (SimpleNamespace(model_type=kind, mixed_precision=precision) for kind in ("lora", "full"))
        for settings in (lora, full):
            settings.export_dtype = "float32"
            assert export_dtype(settings) == "float32"
            settings.export_dtype = "auto"
        assert export_dtype(lora) == expected
        assert export_dtype(full) is None


def test_what_is_rounded_away_is_a_relative_norm():
    weights = [torch.tensor([3.0, 1 + 2**-9]), torch.tensor([4.0])]
    assert rounding(weights, "bfloat16") == pytest.approx(2**-9 / 26**0.5, rel=1e-3)
    assert rounding(weights, "float32") == 0
    assert not rounding([torch.tensor([1e6])], "float16") < 1


def test_a_resumed_run_exports_its_masters_rounded_once_and_the_card_says_how_much(half, model, tmp_path):
    """Beside the same training, interrupted and exported in float32."""
    for steps in (1, 2):
        more = {**half.settings, "max_train_steps": steps, "export_dtype": "float32"}
        execute(write_run(tmp_path, model=model, output="wide", **more))
    ours, wide = (load_file(folder / "student" / WEIGHTS) for folder in (half.out, tmp_path / "wide"))
    assert {value.dtype for value in ours.values()} == {torch.bfloat16}
    assert all(torch.equal(value, wide[name].bfloat16()) for name, value in ours.items())
    with safe_open(half.out / "student" / WEIGHTS, framework="pt") as opened:
        about = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert about["unet.lora_alpha"] == about["unet.r"] == 4
    card = (half.out / "student" / "README.md").read_text()
    found = re.search(r"Its weights are rounded to bfloat16: the norm of the difference is (\S+) of theirs\.", card)
    assert found is not None
    assert float(found[1]) == pytest.approx(rounding(wide.values(), "bfloat16"), rel=0.05)
    (said,) = [line for line in half.lines if line.startswith("student written to")]
    assert said.endswith(f"in bfloat16, which rounds away {found[1]} of its norm")
    assert "rounded to" not in (tmp_path / "wide" / "student" / "README.md").read_text()


def test_kohyas_file_has_the_students_type_and_alpha_stays_exact(half):
    state = load_file(half.out / "out-kohya.safetensors")
    assert {value.dtype for name, value in state.items() if not name.endswith(".alpha")} == {torch.bfloat16}
    assert {float(value) for name, value in state.items() if name.endswith(".alpha")} == {4.0}
    student = load_file(half.out / "student" / WEIGHTS)
    path = "mid_block.attentions.0.proj_in"
    own = state["lora_unet_middle_block_1_proj_in.lora_up.weight"]
    assert torch.equal(own, student[f"unet.{path}.lora_B.weight"])


def test_a_full_student_is_exported_in_the_type_asked_for_and_checkpoints_stay_fp32(model, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    full = {**QUIET, "publish_to": [], "model_type": "full", "mixed_precision": "bf16", "max_train_steps": 1,
            "export_dtype": "bfloat16"}  # fmt: skip
    execute(write_run(tmp_path, model=model, **full))
    student = load_file(next((tmp_path / "out" / "student" / "unet").glob("*.safetensors")))
    assert {value.dtype for value in student.values()} == {torch.bfloat16}
    saved = {}
    for file in (tmp_path / "out" / "checkpoint-1").glob("*.safetensors"):
        saved |= load_file(file)
    for name in ("conv_in.weight", "mid_block.attentions.0.proj_in.weight"):
        (master,) = [value for key, value in saved.items() if key.endswith(name) and "exp_avg" not in key]
        assert master.dtype == torch.float32
        assert torch.equal(student[name], master.bfloat16())
    loaded = StableDiffusionXLPipeline.from_pretrained(tmp_path / "out" / "student", torch_dtype=torch.bfloat16)
    assert torch.equal(loaded.unet.conv_in.weight, student["conv_in.weight"])


def test_a_type_that_cannot_hold_the_weights_is_refused_or_auto_keeps_them(half, model, tmp_path, monkeypatch):
    from distill.core.runs import export

    monkeypatch.setattr(export, "rounding", lambda weights, dtype: float("inf"))
    settings = {**half.settings, "publish_to": [], "max_train_steps": 1}
    _, lines = execute(write_run(tmp_path, model=model, output="auto", **settings))
    assert any("has weights that bfloat16 cannot hold: it is exported in the type that was trained" in x for x in lines)
    state = load_file(tmp_path / "auto" / "student" / WEIGHTS)
    assert {value.dtype for value in state.values()} == {torch.float32}
    with pytest.raises(DistillError, match="export_dtype = 'float16': (?s:.)*set export_dtype=float32"):
        execute(write_run(tmp_path, model=model, output="asked", export_dtype="float16", **settings))
