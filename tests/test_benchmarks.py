"""Benchmarks import what is there; that they run is a slow test of `test_docs_blocks.py`."""

from __future__ import annotations

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from diffusers import ZImageTransformer2DModel

FILES = sorted((Path(__file__).parent.parent / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_a_benchmark_imports_of_the_engine_is_there(file):
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and str(node.module).startswith("distill")]
    for node in imports:
        module = import_module(str(node.module))
        for alias in node.names:
            there = hasattr(module, alias.name) or find_spec(f"{node.module}.{alias.name}")
            assert there, f"line {node.lineno}: {node.module} has no {alias.name}"


def test_most_benchmarks_use_the_engine():
    assert len(FILES) > 10
    assert sum("from distill" in file.read_text(encoding="utf-8") for file in FILES) > 5


def test_a_deeper_miniature_of_z_image_begins_as_the_one_it_grew_from(monkeypatch):
    monkeypatch.syspath_prepend(str(FILES[0].parent))
    deeper = import_module("miniature_z_image").deeper

    def network(depth: int) -> ZImageTransformer2DModel:
        torch.manual_seed(depth)
        return ZImageTransformer2DModel(
            in_channels=4, dim=16, n_layers=depth, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
            axes_dims=[4, 2, 2], axes_lens=[64, 8, 8],
        )  # fmt: skip

    shallow, deep = network(3), network(5)
    deep.load_state_dict(deeper(shallow.state_dict(), 5))
    inputs = [torch.randn(4, 1, 8, 8)], torch.tensor([0.3]), [torch.randn(6, 8)]
    torch.testing.assert_close(deep(*inputs, return_dict=False)[0], shallow(*inputs, return_dict=False)[0])
    untouched = [name for name, value in deep.state_dict().items() if name.endswith("norm2.weight") and not value.any()]
    assert len(untouched) == 4
