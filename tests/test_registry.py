"""The registry: three sources, provenance, clashes, misspelt hooks, attribution of failures."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import distill
import pytest
from distill.core.errors import PluginError, UserError
from distill.core.registry.registry import KINDS, Registry, hook_names
from support.config_files import PLUGIN


def module(name="plugin_of_the_test", **functions):
    plugin = types.ModuleType(name)
    for key, value in functions.items():
        setattr(plugin, key, value)
    return plugin


def file(folder: Path, text: str, name: str = "a_plugin.py") -> Path:
    path = folder / name
    path.write_text("import distill\nfrom distill import hookimpl\n" + text)
    return path


TRACKER = """
class Mine(distill.Tracker):
    '''A tracker.'''

    name = "mine"

    def start(self, run): ...

    def log(self, metrics, step): ...


@hookimpl
def register_trackers():
    return [Mine]
"""


@pytest.fixture(scope="module")
def built_in():
    return Registry.load(installed=False)


def test_everything_built_in_is_registered_through_hooks_with_its_provenance(built_in):
    for kind, name in (("method", "lcm"), ("family", "sdxl"), ("data_backend", "local"), ("tracker", "tensorboard")):
        assert name in built_in.names(kind)
        found = built_in.provenance(kind, name)
        assert (found.kind, found.name, found.source) == (kind, name, "built in")
        assert built_in.get(kind, name).__module__.startswith("distill.")
    for kind in KINDS:
        assert built_in.names(kind) == sorted(built_in.names(kind))


def test_a_file_adds_names_and_aliases_and_says_where_from():
    registry = Registry()
    registry.add_file(PLUGIN)
    assert registry.names("family") == ["lora-only", "plain-family"]
    assert registry.get("family", "plainfam") is registry.get("family", "plain-family")
    assert registry.provenance("family", "plainfam").source == str(PLUGIN)
    assert registry.files == (PLUGIN.resolve(),)


def test_a_file_named_twice_is_loaded_once():
    registry = Registry()
    registry.add_file(PLUGIN)
    registry.add_file(PLUGIN.parent / ".." / PLUGIN.parent.name / PLUGIN.name)
    assert len(registry.files) == 1


def test_two_registries_do_not_share_plugins():
    first, second = Registry(), Registry()
    first.add_file(PLUGIN)
    assert second.names("method") == []
    assert first.get("method", "needy").name == "needy"


def test_unknown_name_says_the_nearest(built_in):
    with pytest.raises(UserError, match=r"no optimizer 'adanw'.*\n.*did you mean 'adamw'.*--plugin FILE"):
        built_in.get("optimizer", "adanw")


def test_two_plugins_that_claim_one_name_are_both_named(tmp_path):
    registry = Registry()
    first, second = file(tmp_path, TRACKER, "first.py"), file(tmp_path, TRACKER, "second.py")
    registry.add_file(first)
    with pytest.raises(UserError) as error:
        registry.add_file(second)
    assert "tracker 'mine'" in str(error.value)
    assert str(first) in str(error.value)
    assert str(second) in str(error.value)


def test_a_plugin_that_is_refused_leaves_nothing_behind(built_in):
    registry, seen = Registry(), []
    good = built_in.get("tracker", "tensorboard")
    offered = [good, distill.Tracker]
    plugin = module(
        register_trackers=distill.hookimpl(lambda: offered),
        on_step_end=distill.hookimpl(lambda step: seen.append(step)),
    )
    with pytest.raises(UserError, match="has no name"):
        registry.add(plugin, source="test", name="half")
    registry.hook.on_step_end(state=None, step=1)
    assert (registry.names("tracker"), registry.loaded, seen) == ([], (), [])
    offered.pop()
    registry.add(plugin, source="test", name="half")
    registry.hook.on_step_end(state=None, step=2)
    assert (registry.names("tracker"), [each.name for each in registry.loaded], seen) == (
        ["tensorboard"],
        ["half"],
        [2],
    )


def test_two_classes_of_one_plugin_cannot_have_one_name(tmp_path):
    twice = TRACKER.replace("[Mine]", "[Mine, type('Other', (Mine,), {})]")
    with pytest.raises(UserError, match=r"two plugins claim the tracker 'mine': class Mine of plugin 'a_plugin'"):
        Registry().add_file(file(tmp_path, twice))


def test_an_alias_clashes_with_a_name(tmp_path):
    registry = Registry()
    registry.add_file(file(tmp_path, TRACKER, "first.py"))
    other = TRACKER.replace('name = "mine"', 'name = "other"\n    aliases = ("mine",)')
    with pytest.raises(UserError, match="tracker 'mine'"):
        registry.add_file(file(tmp_path, other, "second.py"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("@hookimpl\ndef register_metods():\n    return []\n", "did you mean 'register_methods'"),
        ("def register_methods():\n    return []\n", "register_methods is not decorated"),
        ("@hookimpl\ndef on_step_end(state, stepp):\n    pass\n", "stepp"),
        ("x = 1\n", "implements no hook"),
        ("@hookimpl\ndef register_methods():\n    return None\n", "returned NoneType, not a list"),
        ("@hookimpl\ndef register_methods():\n    return [dict]\n", "not a class derived from distill.Method"),
        ("@hookimpl\ndef register_methods():\n    return 1 / 0\n", "division by zero"),
        (TRACKER.replace('name = "mine"', "pass"), "has no name"),
        (TRACKER.replace("def log(self, metrics, step): ...", ""), "does not define log"),
        (
            TRACKER.replace(
                'name = "mine"', 'name = "mine"\n\n    class Config(__import__("pydantic").BaseModel): ...'
            ),
            "refuses unknown keys",
        ),
        ("def broken(:\n", "cannot be imported (line 3): SyntaxError"),
    ],
)
def test_a_plugin_that_cannot_work_is_refused_at_load_and_named(text, said, tmp_path):
    path = file(tmp_path, text)
    with pytest.raises((UserError, PluginError)) as error:
        Registry().add_file(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_a_misspelt_argument_shows_the_hooks_signature(tmp_path):
    with pytest.raises(UserError, match=r"on_step_end\(state"):
        Registry().add_file(file(tmp_path, "@hookimpl\ndef on_step_end(state, stepp):\n    pass\n"))


ARGUMENTS = {
    "on_run_start": {"state": "S"},
    "on_step_end": {"state": "S", "step": 3},
    "on_log": {"state": "S", "metrics": {"loss": 1.0}, "step": 3},
    "on_validation_end": {"state": "S", "folder": Path("v"), "step": 3},
    "on_checkpoint_saved": {"state": "S", "folder": Path("c"), "step": 3},
    "on_exception": {"state": "S", "error": ValueError("x")},
    "on_run_end": {"state": "S"},
}


def test_every_hook_of_observation_is_in_the_table_of_this_test():
    assert set(ARGUMENTS) == {name for name in hook_names() if name.startswith("on_")}


@pytest.mark.parametrize("hook", ARGUMENTS)
def test_observation_hooks_reach_the_plugin_with_their_arguments(hook, tmp_path):
    names = ", ".join(ARGUMENTS[hook])
    copies = ", ".join(f"{name}={name}" for name in ARGUMENTS[hook])
    text = f"seen = []\n\n\n@hookimpl\ndef {hook}({names}):\n    seen.append(dict({copies}))\n"
    registry = Registry()
    for key in [key for key in sys.modules if key.startswith("distill_plugin_seer")]:
        del sys.modules[key]
    registry.add_file(file(tmp_path, text, "seer.py"))
    getattr(registry.hook, hook)(**ARGUMENTS[hook])
    plugin = next(value for key, value in sys.modules.items() if key.startswith("distill_plugin_seer"))
    assert plugin.seen == [ARGUMENTS[hook]]


REGISTRATION = {
    "register_methods": "method",
    "register_families": "family",
    "register_data_backends": "data_backend",
    "register_trackers": "tracker",
    "register_optimizers": "optimizer",
    "register_quantizers": "quantizer",
    "register_evaluators": "evaluator",
    "register_publishers": "publisher",
}


def test_every_hook_of_registration_is_in_the_table_of_this_test():
    hooks = {name for name in hook_names() if name.startswith("register_")}
    assert set(REGISTRATION) == hooks - {"register_recipes"}  # files, tested in test_published


@pytest.mark.parametrize("hook", REGISTRATION)
def test_registration_hooks_add_their_kind(hook, built_in):
    kind = REGISTRATION[hook]
    name = built_in.names(kind)[0]
    renamed = type("Renamed", (built_in.get(kind, name),), {"name": f"renamed-{kind}", "aliases": ()})
    registry = Registry()
    implementation = distill.hookimpl(specname=hook)(lambda: [renamed])
    registry.add(module(anything=implementation), source="test", name="renaming")
    assert registry.get(kind, f"renamed-{kind}") is renamed


def test_a_failing_hook_is_reported_with_the_plugins_name(tmp_path):
    registry = Registry()
    path = file(tmp_path, "@hookimpl\ndef on_step_end(step):\n    raise KeyError('gone')\n")
    registry.add_file(path)
    with pytest.raises(PluginError, match="on_step_end: KeyError: 'gone'") as error:
        registry.hook.on_step_end(state=None, step=1)
    assert str(path) in str(error.value)
    assert isinstance(error.value.__cause__, KeyError)


@pytest.mark.filterwarnings("ignore::pluggy.PluggyTeardownRaisedWarning")
@pytest.mark.parametrize("kind", ["wrapper", "hookwrapper"])
def test_a_failing_wrapper_of_a_hook_is_reported_with_the_plugins_name(kind, tmp_path):
    registry = Registry()
    path = file(tmp_path, f"@hookimpl({kind}=True)\ndef on_step_end(step):\n    yield\n    raise KeyError('gone')\n")
    registry.add_file(path)
    with pytest.raises(PluginError, match="on_step_end: KeyError: 'gone'") as error:
        registry.hook.on_step_end(state=None, step=1)
    assert str(path) in str(error.value)


def test_an_error_for_users_passes_through_a_hook_unchanged(tmp_path):
    registry = Registry()
    registry.add_file(file(tmp_path, "@hookimpl\ndef on_run_start(state):\n    raise distill.UserError('no', 'so')\n"))
    with pytest.raises(UserError, match="no\n  so"):
        registry.hook.on_run_start(state=None)
