"""Students that begin where another distillation ended: a guidance student as start, and as teacher."""

import json

import pytest
import torch
from distill.core.plugin_api.context import Context
from safetensors import safe_open
from support.config_files import distill
from support.small_run import execute, losses, write_run

QUIET = {
    "validation_step_interval": 0, "report_to": "none", "max_train_steps": 2, "checkpoint_step_interval": 0,
    "gradient_accumulation_steps": 1, "export_dtype": "float32",
}  # fmt: skip
LORA = "pytorch_lora_weights.safetensors"


def products(file):
    """Path of each module -> the change of its weight, of a LoRA whose alpha is its rank."""
    with safe_open(file, framework="pt") as opened:
        state = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118 - no mapping
    names = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
    pairs = {name: (state[f"{name}.lora_B.weight"], state[f"{name}.lora_A.weight"]) for name in names}
    return {name: up.flatten(1) @ down.flatten(1) for name, (up, down) in pairs.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A guidance student, in the folder `guidance` beside its model and images."""
    root = tmp_path_factory.mktemp("warm")
    guidance = {"distillation_method": "guidance", "distillation_config": {"guidance": {"w_min": 3.0, "w_max": 3.0}}}
    execute(write_run(root, output="guidance", **guidance, **QUIET))
    return root


def test_a_consistency_student_begins_at_the_guidance_student(root):
    """At a learning rate of nothing it is the guidance student."""
    start = {"init_lora": str(root / "guidance" / "student"), "learning_rate": 1e-12}
    execute(write_run(root, output="warm", **start, **QUIET))
    before, after = (products(root / name / "student" / LORA) for name in ("guidance", "warm"))
    assert before.keys() == after.keys()
    assert any(change.abs().max() > 1e-5 for change in before.values())
    for name, change in before.items():
        torch.testing.assert_close(after[name], change, rtol=1e-4, atol=1e-7)


def test_a_guidance_student_as_teacher_takes_one_pass_and_one_lora_holds_both(root, monkeypatch):
    rows, predict = [], Context.predict

    def counting(self, role, x_t, *args, **settings):
        rows.append((role, len(x_t)))
        return predict(self, role, x_t, *args, **settings)

    monkeypatch.setattr(Context, "predict", counting)
    teacher = {"teacher_lora": [{"path": str(root / "guidance" / "student"), "weight": 1.0}]}
    unguided = {"distillation_config": {"lcm": {"w_min": 1.0, "w_max": 1.0}}}
    execute(write_run(root, output="one-pass", **teacher, **unguided, **QUIET))
    assert rows == [("teacher", 2), ("student", 2), ("student", 2)] * 2, "no pass without the prompt"
    assert all(loss > 0 for _, loss, _ in losses(root / "one-pass"))

    both = root / "both.safetensors"
    parts = [root / name / "student" for name in ("guidance", "one-pass")]
    merged = distill("lora", "merge", root / "model", *parts, "--as-lora", "--output", both)
    assert merged.exit_code == 0, merged.output
    ours, own = products(both), [products(folder / LORA) for folder in parts]
    assert ours.keys() == own[0].keys() == own[1].keys()
    for name, change in ours.items():
        torch.testing.assert_close(change, own[0][name] + own[1][name], rtol=1e-4, atol=1e-7)
    resolved = json.loads((root / "one-pass" / "config.resolved.json").read_text())
    assert resolved["teacher_lora"][0]["weight"] == 1.0
