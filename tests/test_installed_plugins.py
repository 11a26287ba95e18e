"""Plugins of installed packages: which load, which API they were built for, how to go on without one."""

from __future__ import annotations

import json
import re
import sys

import distill as package
import pytest
from distill.core.errors import UserError
from distill.core.registry.registry import Registry
from distill.core.utils.packages import is_installed
from support.config_files import distill, said
from support.installed import install, tracker


@pytest.fixture(autouse=True)
def afresh(monkeypatch):
    """No limit is set, and the modules of one test are not those of the next."""
    monkeypatch.delenv("DISTILL_PLUGINS", raising=False)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0].endswith(("_plugin", "_plugins", "_package")):
            del sys.modules[name]


@pytest.fixture
def two(monkeypatch, tmp_path):
    """Two packages, the second with two plugins."""
    install(monkeypatch, tmp_path, "distill-one", {"one_plugin.py": tracker("one-tracker")}, one="one_plugin")
    files = {
        "two_plugins/__init__.py": "",
        "two_plugins/a.py": tracker("two-a"),
        "two_plugins/b.py": tracker("two-b"),
    }
    install(monkeypatch, tmp_path, "Distill.Two", files, version="3.0", two_a="two_plugins.a", two_b="two_plugins.b")
    return tmp_path


def test_installed_packages_are_loaded_and_named(two):
    found = Registry.load()
    origin = found.provenance("tracker", "one-tracker")
    assert (origin.source, origin.version, origin.plugin) == ("package distill-one 1.2", "1.2", "one_plugin")
    assert found.provenance("tracker", "two-b").source == "package Distill.Two 3.0"
    assert not Registry.load(installed=False).known("tracker", "one-tracker")


# -- DISTILL_PLUGINS --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "loaded"),
    [
        ("", set()),
        (" , ", set()),
        ("distill-one", {"one-tracker"}),
        ("one", {"one-tracker"}),
        ("distill_two", {"two-a", "two-b"}),
        ("two-b, Distill-One", {"two-b", "one-tracker"}),
    ],
)
def test_distill_plugins_limits_what_loads(two, monkeypatch, selection, loaded):
    monkeypatch.setenv("DISTILL_PLUGINS", selection)
    assert {"one-tracker", "two-a", "two-b"} & set(Registry.load().names("tracker")) == loaded


def test_an_unknown_name_in_distill_plugins_is_said(two, monkeypatch):
    monkeypatch.setenv("DISTILL_PLUGINS", "distill-two,distil-one")
    result = distill("plugins", "list")
    assert result.exit_code == 2
    text = said(result.stderr)
    assert "DISTILL_PLUGINS names 'distil-one'" in text
    assert "did you mean 'distill-one'? installed plugins: distill-one, Distill.Two" in text


def way_out(message: str) -> str:
    return re.search(r"DISTILL_PLUGINS=(\S*) \(", message)[1]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("import no_such_module\n", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise SystemExit(0)\n", "cannot be imported: SystemExit: 0"),
        ("def broken(:\n", "cannot be imported: SyntaxError"),
        ("import distill\n", "implements no hook"),
        (tracker("tensorboard"), "two plugins claim the tracker 'tensorboard'"),
        (tracker("x") + "\n\n@distill.hookimpl\ndef register_methods():\n    return 1 / 0\n", "division by zero"),
    ],
)
def test_a_package_that_cannot_be_used_says_why_and_how_to_go_on_without_it(two, monkeypatch, text, why):
    install(monkeypatch, two, "distill-broken", {"broken_plugin.py": text}, version="9", broken="broken_plugin")
    with pytest.raises(UserError) as error:
        Registry.load()
    assert "plugin 'broken_plugin' (package distill-broken 9)" in str(error.value)
    assert why in str(error.value)
    monkeypatch.setenv("DISTILL_PLUGINS", way_out(str(error.value)))
    names = Registry.load().names("tracker")
    assert {"one-tracker", "two-a", "two-b"} <= set(names), "all others still load"


def test_the_way_out_of_the_only_package_is_the_empty_list(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, "distill-broken", {"broken_plugin.py": "1 / 0\n"}, broken="broken_plugin")
    with pytest.raises(UserError, match="no installed plugin loads") as error:
        Registry.load()
    assert way_out(str(error.value)) == ""


def test_of_a_package_with_two_plugins_the_other_stays(two, monkeypatch):
    (two / "two_plugins" / "a.py").write_text("1 / 0\n")
    with pytest.raises(UserError) as error:
        Registry.load()
    assert way_out(str(error.value)) == "distill-one,two-b"


def test_the_list_shows_what_loads_and_says_what_does_not(two, monkeypatch):
    install(monkeypatch, two, "distill-broken", {"broken_plugin.py": "1 / 0\n"}, broken="broken_plugin")
    result = distill("plugins", "list", "--kind", "tracker")
    assert result.exit_code == 2
    rows = [line.split() for line in result.stdout.splitlines() if "two-a" in line]
    assert rows[0][:6] == ["tracker", "two-a", "3.0", "package", "Distill.Two", "yes"]
    assert "package distill-broken 1.2) cannot be imported: ZeroDivisionError" in said(result.stderr)
    assert "DISTILL_PLUGINS=distill-one,Distill.Two" in result.stderr


# -- the version of the API -------------------------------------------------------------------------------------------


def stating(statement: str) -> str:
    """A module that leaves a mark when it runs, and states a version."""
    return f"{statement}\nimport pathlib\npathlib.Path(__file__).with_suffix('.ran').touch()\n{tracker('stated')}"


MAJOR, MINOR = (int(part) for part in package.API_VERSION.split("."))
OTHERS = [
    (f'"{MAJOR + 1}"', "upgrade distill"),
    (f'"{MAJOR + 1}.0"', "upgrade distill"),
    (f'"{MAJOR}.{MINOR + 1}"', "upgrade distill"),
    (f'"{MAJOR - 1}.9"', "use a newer release of the plugin"),
]


@pytest.mark.parametrize("version", [f'"{MAJOR}"', f'"{MAJOR}.0"', f'"{package.API_VERSION}"'])
def test_a_plugin_for_this_api_loads(version, tmp_path):
    file = tmp_path / "stated_plugin.py"
    file.write_text(stating(f"DISTILL_API: str = {version}"))
    registry = Registry()
    registry.add_file(file)
    assert registry.names("tracker") == ["stated"]


@pytest.mark.parametrize(("version", "remedy"), OTHERS)
def test_a_file_for_another_api_is_refused_before_it_runs(version, remedy, tmp_path):
    file = tmp_path / "stated_plugin.py"
    file.write_text(stating(f"DISTILL_API = {version}"))
    result = distill("plugins", "list", "--plugin", str(file))
    assert result.exit_code == 2
    text = said(result.stderr)
    assert f"{file} was built for version {version.strip(chr(34))} of the plugin API" in text
    assert f"this distill has version {package.API_VERSION}" in text
    assert remedy in text
    assert not file.with_suffix(".ran").exists()


@pytest.mark.parametrize("place", ["stated_package/__init__.py", "stated_package/deep/plugin.py"])
def test_a_package_states_it_in_the_module_or_around_it(place, monkeypatch, tmp_path):
    plain = {"stated_package/__init__.py": "", "stated_package/deep/__init__.py": ""}
    files = {**plain, "stated_package/deep/plugin.py": tracker("stated")}
    files[place] = stating(f'DISTILL_API = "{MAJOR + 1}"')
    install(monkeypatch, tmp_path, "distill-stated", files, stated="stated_package.deep.plugin")
    with pytest.raises(UserError, match=r"package distill-stated 1\.2\) was built for version") as error:
        Registry.load()
    assert way_out(str(error.value)) == ""
    assert not list(tmp_path.rglob("*.ran"))


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("DISTILL_API = 1", "DISTILL_API = 1 cannot be read"),
        ("DISTILL_API = str(1)", r"DISTILL_API = str\(1\) cannot be read"),
        ('DISTILL_API = "one"', "'one' is no version of the plugin API"),
    ],
)
def test_a_version_that_is_none_is_refused_with_how_to_write_it(statement, why, tmp_path):
    file = tmp_path / "stated_plugin.py"
    file.write_text(stating(statement))
    with pytest.raises(UserError, match=f'{why}.*\n.*DISTILL_API = "{MAJOR}"'):
        Registry().add_file(file)


# -- list and show ----------------------------------------------------------------------------------------------------

NEEDY = (
    tracker("far").replace('name = "far"', 'name = "far"\n    packages = {"no_such.module": "no-such>=2"}')
    + "\n\n__version__ = '0.7'\n"
)


def test_the_list_as_json_says_everything(tmp_path):
    (tmp_path / "far_plugin.py").write_text(NEEDY)
    (tmp_path / "watcher.py").write_text("import distill\n\n\n@distill.hookimpl\ndef on_run_end(state):\n    ...\n")
    files = [f"--plugin={tmp_path / name}" for name in ("far_plugin.py", "watcher.py")]
    listed = json.loads(distill("plugins", "list", "--json", *files).stdout)
    by_name = {(row["kind"], row["name"]): row for row in listed}
    assert by_name["tracker", "far"] == {
        "kind": "tracker",
        "name": "far",
        "aliases": [],
        "version": "0.7",
        "source": str(tmp_path / "far_plugin.py"),
        "plugin": "far_plugin",
        "usable": False,
        "missing": [{"package": "no_such.module", "install": "no-such>=2"}],
        "description": "Theirs.",
    }
    adamw = by_name["optimizer", "adamw"]
    assert (adamw["source"], adamw["version"], adamw["usable"]) == ("built in", package.__version__, True)
    assert by_name["hooks", "watcher"]["description"] == "watches runs: on_run_end"
    assert {row["kind"] for row in listed} >= {"method", "family", "data-backend", "evaluator", "publisher"}


def test_the_table_gives_the_install_line(tmp_path):
    (tmp_path / "far_plugin.py").write_text(NEEDY)
    result = distill("plugins", "list", "--kind", "tracker", f"--plugin={tmp_path / 'far_plugin.py'}")
    row = next(line for line in result.stdout.splitlines() if " far " in line)
    assert row.split()[:3] == ["tracker", "far", "0.7"]
    assert "no: pip install 'no-such>=2'" in row
    assert {line.split()[0] for line in result.stdout.splitlines()} == {"kind", "tracker"}


@pytest.mark.parametrize("kind", ["data-backend", "data_backend", "Data-Backend"])
def test_a_kind_may_be_written_either_way(kind):
    assert "webdataset" in distill("plugins", "list", "--kind", kind).stdout


def test_an_unknown_kind_is_refused():
    result = distill("plugins", "list", "--kind", "trackers")
    assert result.exit_code == 2
    assert "did you mean 'tracker'" in result.stderr


def test_a_folder_that_happens_to_have_its_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "no_such_tracker").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not is_installed("no_such_tracker")
    (tmp_path / "no_such_tracker" / "__init__.py").touch()
    assert is_installed("no_such_tracker")


def test_show_says_which_packages_are_there(tmp_path):
    (tmp_path / "far_plugin.py").write_text(NEEDY.replace('"no-such>=2"', '"no-such>=2", "json": "json"'))
    shown = distill("plugins", "show", "far", f"--plugin={tmp_path / 'far_plugin.py'}").stdout
    assert "  no_such.module: missing; pip install 'no-such>=2'\n  json: installed" in shown
    assert f"far (tracker), {tmp_path / 'far_plugin.py'} 0.7, far_plugin" in shown
