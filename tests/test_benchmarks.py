"""Benchmarks import what is there; that they run is a slow test of `test_docs_blocks.py`."""

from __future__ import annotations

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

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
