"""The step benchmark's floor is what it says it is."""

import ast
from pathlib import Path

import distill

BENCHMARKS = Path(distill.__file__).parent / "benchmarks"


def test_floor_is_short_and_imports_nothing_of_ours() -> None:
    source = (BENCHMARKS / "step_floor.py").read_text()
    assert len(source.splitlines()) <= 40
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).split(".")[0])
    assert imported <= {"collections", "pathlib", "torch", "diffusers", "peft"}
