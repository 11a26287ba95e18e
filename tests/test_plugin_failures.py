"""A plugin that fails is named, wherever it fails; ``DISTILL_TRACE`` says what is called."""

from __future__ import annotations

from pathlib import Path

import pytest
from distill.core.engine.tracking import build_trackers
from distill.core.registry.attribution import short
from distill.core.registry.registry import Registry
from support.config_files import Pair, distill, said
from support.installed import install, tracker
from support.small_run import write_run
from support.tiny_sdxl import write_tiny_sdxl

YIELD = 'Write `yield Update("student", loss)`'
METHOD = '''
import distill
from distill.distill_methods.lcm import LCM


class Failing(LCM):
    """Fails."""

    name = "failing"
    packages = {}

    def SIGNATURE:
        raise ZeroDivisionError("of the test")


@distill.hookimpl
def register_methods():
    return [Failing]
'''


def method(folder: Path, signature: str, **changes: str) -> Path:
    text = METHOD.replace("SIGNATURE", signature).replace("packages = {}", changes.get("packages", "packages = {}"))
    file = folder / "failing_method.py"
    file.write_text(text)
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("failures") / "model", layers_per_block=1)


def quick(root: Path, model: Path, **settings) -> Path:
    """A run of two steps."""
    off = {"validation_step_interval": 0, "checkpoint_step_interval": 0, "max_train_steps": 2, "log_step_interval": 1}
    return write_run(root, model=model, **{**off, "report_to": "none", "distillation_config": {}, **settings})


def test_a_method_that_fails_in_a_run_is_named_with_its_line(tmp_path, model):
    file = method(tmp_path, "updates(self, context, batch, step)")
    result = distill("run", "--config", quick(tmp_path, model), "--method", "failing", f"--plugin={file}")
    assert result.exit_code == 1
    line = file.read_text().splitlines().index('        raise ZeroDivisionError("of the test")') + 1
    assert (
        f"error: plugin 'failing_method' ({file}) failed in Failing.updates (failing_method.py, line {line}): "
        "ZeroDivisionError: of the test"
    ) in result.stderr
    trace = result.stderr.partition("Traceback")[2]
    assert trace, "what it called is for its author"
    assert "training.py" not in trace, "and what it was called from is not"


def test_a_component_of_a_package_is_named(monkeypatch, tmp_path, model):
    package = {
        "failing_package/__init__.py": "",
        "failing_package/method.py": METHOD.replace("SIGNATURE", "sampler(self, schedule, **settings)"),
    }
    install(monkeypatch, tmp_path / "site", "distill-failing", package, failing="failing_package.method")
    result = distill("run", "--config", quick(tmp_path, model), "--method", "failing")
    assert result.exit_code == 1
    label = "plugin 'failing_package.method' (package distill-failing 1.2)"
    assert f"{label} failed in Failing.sampler (method.py, line" in result.stderr


def test_of_two_plugins_in_a_package_the_one_that_failed_is_named(monkeypatch, tmp_path, model):
    package = {
        "twin_package/__init__.py": "",
        "twin_package/method.py": METHOD.replace("SIGNATURE", "notices(self)").replace(
            "raise", "from . import help\n        help.me()\n        raise"
        ),
        "twin_package/help.py": "def me():\n    {}['nothing']\n",
        "twin_package/other.py": tracker("quiet"),
    }
    points = {"failing": "twin_package.method", "quiet": "twin_package.other"}
    install(monkeypatch, tmp_path / "site", "distill-twins", package, **points)
    result = distill("run", "--config", quick(tmp_path, model), "--method", "failing")
    assert result.exit_code == 1
    assert (
        "plugin 'twin_package.method' (package distill-twins 1.2) failed in me (help.py, line 2): KeyError"
        in result.stderr
    )


@pytest.mark.parametrize(
    ("body", "words", "remedy"),
    [
        ("yield context.rng.randn('x', (1,))", "yielded Tensor, not an Update", YIELD),
        ("return distill.Update('student', None)", "returned Update, not an iterator of updates", YIELD),
        (
            "yield distill.Update('teacher', torch.zeros(()))",
            "yielded an update of 'teacher'; the roles that its roles() train are 'student'",
            YIELD,
        ),
        ("yield distill.Update('student', 0.5)", "yielded a loss of 'student' that is float, not a tensor", YIELD),
        (
            "yield distill.Update('student', torch.zeros(()))",
            "yielded a loss of 'student' without a gradient.",
            'Is it detached, or was `context.predict("student", ...)` called under `torch.no_grad()`?',
        ),
    ],
)
def test_a_yielded_value_that_is_no_update_is_reported_with_the_methods_name(body, words, remedy, tmp_path, model):
    file = method(tmp_path, "updates(self, context, batch, step)")
    file.write_text("import torch\n" + file.read_text().replace('raise ZeroDivisionError("of the test")', body))
    result = distill("run", "--config", quick(tmp_path, model), "--method", "failing", f"--plugin={file}")
    assert result.exit_code == 1
    text = said(result.stderr)
    assert f"error: plugin 'failing_method' ({file}): Failing.updates {words}" in text
    assert remedy in text
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("signature", "body", "words"),
    [
        (
            "sampler(self, schedule, **settings)",
            "from diffusers import DDIMScheduler; return DDIMScheduler()",
            "Failing.sampler returned DDIMScheduler, not a distill.Sampler. Return `distill.Sampler(",
        ),
        (
            "roles(config, setup)",
            'return ["teacher", "student"]',
            "Failing.roles returned 'teacher', not a distill.Role. Return `[distill.Role(\"teacher\"), "
            'distill.Role("student", trains=setup.model_type)]`',
        ),
    ],
)
def test_a_sampler_or_roles_of_another_type_are_reported_with_what_to_return(signature, body, words, tmp_path, model):
    file = method(tmp_path, signature)
    text = file.read_text().replace('raise ZeroDivisionError("of the test")', body)
    file.write_text(text.replace("    def roles", "    @staticmethod\n    def roles"))
    result = distill("run", "--config", quick(tmp_path, model), "--method", "failing", f"--plugin={file}")
    assert result.exit_code == 1
    assert f"error: plugin 'failing_method' ({file}): {words}" in said(result.stderr)
    assert "Traceback" not in result.stderr


def test_a_failing_tracker_is_switched_off_and_a_failing_hook_is_named(tmp_path, model):
    bad, watcher = tmp_path / "bad_tracker.py", tmp_path / "watcher.py"
    bad.write_text(tracker("bad").replace("def log(self, metrics, step): ...", "def log(self, metrics, step): 1 / 0"))
    watcher.write_text("import distill\n\n\n@distill.hookimpl\ndef on_step_end(step):\n    return 1 / (2 - step)\n")
    config = quick(tmp_path, model, report_to="bad")
    result = distill("run", "--config", config, f"--plugin={bad}", f"--plugin={watcher}")
    warning = "warning: tracker bad failed in log() and is switched off, the run goes on: ZeroDivisionError"
    assert result.stderr.count(warning) == 1
    assert result.exit_code == 1, "it went on to the second step"
    assert f"plugin 'watcher' ({watcher}) failed in on_step_end: ZeroDivisionError: division by zero" in result.stderr


@pytest.mark.parametrize(
    ("member", "where"), [("__init__(self, config)", "when it was made"), ("notices(self)", "in notices()")]
)
def test_a_tracker_may_fail_anywhere(member, where, tmp_path, said):
    file = tmp_path / "bad_tracker.py"
    file.write_text(
        tracker("bad").replace("def start(self, run): ...", f"def start(self, run): ...\n    def {member}: 1 / 0")
    )
    registry = Registry()
    registry.add_file(file)
    built, warnings = build_trackers(registry, ["bad"], {})
    built.start(None)
    lines = [*warnings, *said]
    assert built.names == ()
    assert [line for line in lines if f"tracker bad failed {where} and is switched off" in line] == lines != []


def test_a_backend_whose_package_is_missing_is_refused_with_the_install_line(tmp_path):
    file = tmp_path / "backend.py"
    file.write_text(
        "import distill\nfrom distill.data_backends.local import LocalBackend\n\n\n"
        'class Shelf(LocalBackend):\n    """Fails."""\n\n    name = "shelf"\n'
        '    packages = {"no_such": "no-such>=2"}\n\n\n'
        "@distill.hookimpl\ndef register_data_backends():\n    return [Shelf]\n"
    )
    pair = Pair(tmp_path, {})
    pair.write()
    options = [*pair.options(), f"--plugin={file}", "--set", "data.pets.type=shelf"]
    result = distill("config", "check", *options)
    assert result.exit_code == 2
    text = said(result.stderr)
    assert "type = 'shelf': needs the package no_such, which is not installed" in text
    assert "pip install 'no-such>=2'" in text


def test_a_method_whose_package_is_missing_is_refused_with_the_install_line(tmp_path):
    file = method(tmp_path, "notices(self)", packages='packages = {"no_such": "no-such>=2"}')
    pair = Pair(tmp_path, {"distillation_config": {}})
    pair.write()
    result = distill("config", "check", *pair.options(), f"--plugin={file}", "--set", "distillation_method=failing")
    assert result.exit_code == 2
    text = said(result.stderr)
    assert "distillation_method = 'failing': needs the package no_such, which is not installed" in text
    assert "pip install 'no-such>=2'" in text


# -- the trace --------------------------------------------------------------------------------------------------------

WATCHER = """
import distill


@distill.hookimpl
def on_log(metrics, step):
    return None


@distill.hookimpl
def on_exception(error):
    raise KeyError("again")
"""


def traced(tmp_path: Path) -> Registry:
    file = tmp_path / "watcher.py"
    file.write_text(WATCHER)
    registry = Registry()
    registry.add_file(file)
    return registry


def test_the_trace_says_each_call_with_its_arguments_result_and_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DISTILL_TRACE", "1")
    registry = traced(tmp_path)
    state = object()
    registry.hook.on_log(state=state, metrics={"loss": 0.5}, step=3)
    registry.hook.on_run_end(state=state)
    with pytest.raises(Exception, match="again"):
        registry.hook.on_exception(state=state, error=ValueError("x"))
    lines = capsys.readouterr().err.splitlines()
    label = f"plugin 'watcher' ({tmp_path / 'watcher.py'})"
    assert lines[0] == f"trace: {label} is loaded"
    assert lines[1] == "trace: on_log(state=<object>, metrics={loss: 0.5}, step=3)"
    assert lines[2].startswith(f"trace:   on_log of {label} returned None in ")
    assert lines[2].endswith(" ms")
    assert lines[3] == "trace: on_run_end(state=<object>): no plugin listens"
    assert lines[4] == "trace: on_exception(state=<object>, error=ValueError('x'))"
    assert lines[5].startswith(f"trace:   on_exception of {label} raised KeyError: 'again' in ")
    assert len(lines) == 6


@pytest.mark.parametrize("value", ["", "0", "false", None])
def test_without_the_trace_variable_nothing_is_printed(value, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("DISTILL_TRACE", raising=False) if value is None else monkeypatch.setenv("DISTILL_TRACE", value)
    traced(tmp_path).hook.on_log(state=None, metrics={}, step=1)
    assert capsys.readouterr().err == ""


def test_the_trace_shows_what_was_registered(monkeypatch):
    monkeypatch.setenv("DISTILL_TRACE", "1")
    stderr = distill("plugins", "list", "--kind", "optimizer").stderr
    assert "trace:   register_optimizers of plugin 'distill.plugins.optimizers' (built in) returned [AdamW, " in stderr


def test_traced_values_are_shortened():
    assert short({"a": 1.0, "b": [1, "x"]}) == "{a: 1.0, b: [1, 'x']}"
    assert short(Registry) == "Registry"
    assert short(Path("a/b")) == str(Path("a/b"))
    assert short("x" * 100) == f"'{'x' * 56}..."
    assert len(short(list(range(1000)))) <= 60
