"""The same run exports the same student, byte for byte, whatever folder it lies in."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from distill.core.utils.safetensors_header import sort_metadata
from safetensors import safe_open
from safetensors.torch import save_file
from support.config_files import distill
from support.small_run import write_run
from support.tiny_sdxl import write_tiny_sdxl


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def header(file: Path) -> dict[str, object]:
    data = file.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_two_runs_of_one_configuration_export_the_same_files(model_type, tmp_path):
    model = write_tiny_sdxl(tmp_path / "model")
    settings = {"report_to": "none", "max_train_steps": 1, "validation_step_interval": 0, "checkpoint_step_interval": 0}
    config = write_run(
        tmp_path, model=model, model_type=model_type, **settings, publish_to="kohya"[: 5 if model_type == "lora" else 0]
    )
    for name in ("one", "other"):
        result = distill("run", "--config", config, "--output-dir", tmp_path / name)
        assert result.exit_code == 0, result.output
    one, other = (hashes(tmp_path / name / "student") for name in ("one", "other"))
    assert one == other
    assert "README.md" in one
    for file in (tmp_path / "one").rglob("*.safetensors"):
        about = header(file).get("__metadata__", {})
        assert list(about) == sorted(about), file


@pytest.mark.parametrize("text", ["plain", 'żółć \u2028 "quoted" \\ back / \x07 é'])
def test_only_the_order_of_the_metadata_changes(text, tmp_path):
    file, metadata = tmp_path / "a.safetensors", {f"key {number}": f"{text} {number}" for number in range(20)}
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(5, dtype=torch.bfloat16)}
    save_file(tensors, file, metadata=metadata)
    sort_metadata(file)
    first = file.read_bytes()
    assert list(header(file)["__metadata__"]) == sorted(metadata)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == metadata
        assert all(torch.equal(opened.get_tensor(name), tensor) for name, tensor in tensors.items())
    save_file(tensors, file, metadata=metadata)
    sort_metadata(file)
    assert file.read_bytes() == first
