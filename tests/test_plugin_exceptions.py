"""Whatever a plugin raises, wherever: the command never ends well without a student, and the plugin is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from distill.core.testing.checks import Check, failing
from distill.core.testing.report import outcome_of
from support.config_files import distill, said
from support.small_run import write_run
from support.tiny_sdxl import write_tiny_sdxl

RAISED = {
    "exit-0": "raise SystemExit(0)",
    "exit-none": "import sys; sys.exit()",
    "generator": "raise GeneratorExit",
    "stop": "raise StopIteration('enough')",
    "recursion": "f = lambda: f(); f()",
    "memory": "raise MemoryError",
    "own": "raise type('Own', (BaseException,), {})('mine')",
    "unprintable": "raise type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})()",
    "unprintable-exit": "raise type('Mute', (SystemExit,), {'__str__': lambda self: 1 / 0})(0)",
    "typer": "import typer; raise typer.Exit(0)",
    "well": "import distill; raise type('Well', (distill.DistillError,), {'exit_code': 0})('all is well')",
}
"""Kind of exception -> the line that raises it."""
OBSERVERS = ("on_run_start", "on_step_end", "on_log", "on_checkpoint_saved", "on_run_end")
REGISTERING = ("register_methods", "register_trackers", "register_evaluators", "register_publishers")

HOOK = "import distill\n\n\n@distill.hookimpl\ndef {hook}():\n    {line}\n"
COMPONENT = """
import distill
from distill.distill_methods.lcm import LCM
from distill.model_families.sdxl import SDXL


class Bad{base}({base}):
    \"\"\"Fails.\"\"\"

    name = "bad"
    packages = {{}}
    miniature = None

    def {signature}:
        {line}


@distill.hookimpl
def register_{kind}():
    return [Bad{base}]
"""
COMPONENTS = {
    "updates": ("LCM", "methods", "updates(self, context, batch, step)"),
    "sampler": ("LCM", "methods", "sampler(self, schedule, **settings)"),
    "roles": ("LCM", "methods", "roles(self, config=None, setup=None)"),
    "export": ("SDXL", "families", "export(self, network, folder, info)"),
    "predict": ("SDXL", "families", "predict(self, network, x_t, time, cond, **settings)"),
}
"""Where a component fails -> its class, the hook's kind, the method that raises."""
OFF = {"report_to": "none", "validation_step_interval": 0, "checkpoint_step_interval": 1, "max_train_steps": 1}


@pytest.fixture(scope="module")
def run_file(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("raising")
    model = write_tiny_sdxl(root / "model", layers_per_block=1)
    return write_run(root, model=model, **OFF, log_step_interval=1, distillation_config={})


def write(folder: Path, text: str) -> Path:
    file = folder / "raiser.py"
    file.write_text(text)
    return file


def is_named(result, file: Path) -> bool:
    return f"plugin 'raiser' ({file})" in said(result.stderr) or f"plugin file {file}" in said(result.stderr)


@pytest.mark.parametrize("kind", RAISED)
@pytest.mark.parametrize("command", [("config", "check"), ("plugins", "list"), ("run", "--dry-run")])
@pytest.mark.parametrize("where", ["import", *REGISTERING[:1]])
def test_a_plugin_that_cannot_be_loaded_is_the_users_to_mend(where, command, kind, tmp_path, run_file):
    text = RAISED[kind] if where == "import" else HOOK.format(hook=where, line=RAISED[kind])
    file = write(tmp_path, text)
    options = [] if command[0] == "plugins" else ["--config", run_file]
    result = distill(*command, *options, f"--plugin={file}")
    if kind == "well":  # a plugin's own kind of error ends the command with its own code, but never as if it were well
        assert (result.exit_code, "all is well" in result.stderr) in ((1, True), (2, True))
        return
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert is_named(result, file)


@pytest.mark.parametrize("kind", RAISED)
def test_an_observer_that_raises_ends_the_run_with_its_name(kind, tmp_path, run_file):
    hook = OBSERVERS[list(RAISED).index(kind) % len(OBSERVERS)]
    file = write(tmp_path, HOOK.format(hook=hook, line=RAISED[kind]))
    result = distill("run", "--config", run_file, "--output-dir", tmp_path / "out", f"--plugin={file}")
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    if kind != "well":
        assert f"plugin 'raiser' ({file}) failed in {hook}: " in said(result.stderr)
    assert hook == "on_run_end" or not (tmp_path / "out" / "student").exists()


@pytest.mark.parametrize("kind", [kind for kind in RAISED if kind != "well"])
def test_a_component_that_raises_ends_the_run_with_its_name(kind, tmp_path, run_file):
    names = list(COMPONENTS)
    base, hook, signature = COMPONENTS[names[list(RAISED).index(kind) % len(names)]]
    text = COMPONENT.format(base=base, kind=hook, signature=signature, line=RAISED[kind])
    file = write(tmp_path, text)
    chosen = ("--method", "bad") if hook == "methods" else ("--family", "bad")
    result = distill("run", "--config", run_file, "--output-dir", tmp_path / "out", f"--plugin={file}", *chosen)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert f"plugin 'raiser' ({file}) failed in" in said(result.stderr)
    assert f"(raiser.py, line {text.splitlines().index('        ' + RAISED[kind]) + 1})" in said(result.stderr)
    assert not (tmp_path / "out" / "student").exists()


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        ("exit-0", "start(self, run)"),
        ("own", "log(self, metrics, step)"),
        ("unprintable-exit", "finish(self, scores=None)"),
    ],
)
def test_a_tracker_that_raises_anything_is_switched_off(kind, call, tmp_path, run_file):
    name = call.partition("(")[0]
    others = [f"    def {each}: ...\n" for each in ("start(self, run)", "log(self, metrics, step)") if each != call]
    body = f'    name = "bad"\n{"".join(others)}    def {call}:\n        {RAISED[kind]}\n'
    file = write(
        tmp_path,
        f"import distill\n\n\nclass Bad(distill.Tracker):\n{body}\n\n"
        "@distill.hookimpl\ndef register_trackers():\n    return [Bad]\n",
    )
    out = tmp_path / "out"
    result = distill("run", "--config", run_file, "--output-dir", out, f"--plugin={file}", "--set", "report_to=bad")
    assert result.exit_code == 0
    assert f"warning: tracker bad failed in {name}() and is switched off, the run goes on: " in result.stderr
    assert (out / "student").is_dir()


def test_an_interrupt_from_a_plugin_is_told_as_that(tmp_path, run_file):
    file = write(tmp_path, HOOK.format(hook="register_methods", line="raise KeyboardInterrupt"))
    result = distill("config", "check", "--config", run_file, f"--plugin={file}")
    assert result.exit_code == 130
    assert f"error: interrupted: plugin 'raiser' ({file}) was in register_methods (raiser.py, line 6)" in result.stderr


def test_an_error_of_on_exception_does_not_hide_the_first(tmp_path, run_file):
    text = HOOK.format(hook="on_step_end", line="raise ValueError('the first')")
    file = write(tmp_path, text + "\n\n@distill.hookimpl\ndef on_exception():\n    raise SystemExit(0)\n")
    out = tmp_path / "out"
    result = distill("run", "--config", run_file, "--output-dir", out, f"--plugin={file}")
    assert result.exit_code == 1
    assert f"error: plugin 'raiser' ({file}) failed in on_step_end: ValueError: the first" in result.stderr
    assert f"warning: plugin 'raiser' ({file}) failed in on_exception: SystemExit: 0" in result.stderr
    assert re.search(r"run ends: PluginError: .*the first", (out / "run.log").read_text())


def test_the_conformance_suite_tells_what_a_plugin_raises():
    def leave():
        with failing("roles()", "return a list of roles"):
            raise SystemExit(0)

    def escape():
        raise GeneratorExit

    within, outside = (outcome_of(Check("method bad", "roles", function)) for function in (leave, escape))
    assert (within.result, outside.result) == ("failed", "failed")
    assert within.reason.startswith("roles() raised SystemExit: 0 (test_plugin_exceptions.py, line ")
    assert outside.reason.startswith("GeneratorExit (test_plugin_exceptions.py, line ")


def test_a_run_that_is_resolved_again_is_whole_json(tmp_path, run_file):
    """The resolved file is what a failed run is resumed from, so it must be there and whole after each failure."""
    file = write(tmp_path, HOOK.format(hook="on_step_end", line="raise GeneratorExit"))
    distill("run", "--config", run_file, "--output-dir", tmp_path / "out", f"--plugin={file}")
    assert json.loads((tmp_path / "out" / "config.resolved.json").read_text())["max_train_steps"] == 1
