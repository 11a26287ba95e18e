"""The rules of the house that a test can hold."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from distill.core.config import docs
from distill.core.config.findings import expectation
from distill.core.registry.registry import KINDS, Registry
from distill.core.settings.dataset_settings import DatasetSettings
from distill.core.settings.run_settings import RunSettings

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("distill_methods", "model_families", "data_backends", "plugins")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_FAMILY_LINES = 150
LONGER_FAMILIES = {
    "chroma.py": "modulations come from a small network; the pipeline's mask is added to scores, not applied",
    "flux.py": "two models, guided by an input and by two calls; a shift by the resolution; the time's type",
    "flux2.py": "as flux, and a shift by the number of steps, latents normed by running statistics, distilled models",
    "generic.py": "it reads a description of any pipeline",
    "qwen_image.py": "an autoencoder of videos, guidance that keeps lengths",
    "qwen_image_2.py": "called for one sample at a time, a text that does not know the time, an opaque channel",
    "sd3.py": "three text encoders, of which one may be missing",
}
"""Families in `model_families` that are longer, and what makes them so."""


def sources(*folders: str) -> list[Path]:
    """Python files of the package, or of some of its folders."""
    chosen = folders or ("core", *FOLDERS)
    found = [path for folder in chosen for path in sorted((ROOT / folder).rglob("*.py"))]
    return found if folders else [ROOT / "__init__.py", ROOT / "__main__.py", *found]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path, *, root: Path = ROOT) -> Iterator[str]:
    """Modules that a file imports, from the root of the package: `core.plugin_api.method`, `torch`."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("distill.") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])]).removeprefix("distill.")
            yield base
            yield from (f"{base}.{alias.name}".strip(".") for alias in node.names)


@pytest.fixture(scope="module")
def registry():
    return Registry.load(installed=False)


def test_the_import_reader_resolves_relative_imports(tmp_path):
    path = tmp_path / "core" / "cli" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "from ...plugins import judge\nfrom ..plugin_api.method import Update\nimport distill.core.plugin_api.batch\n"
    )
    assert {"plugins.judge", "core.plugin_api.method.Update", "core.plugin_api.batch"} <= set(
        imported(path, root=tmp_path)
    )


def test_a_family_is_short_or_says_why_it_is_not():
    longer = {
        path.name for path in (ROOT / "model_families").glob("*.py")
        if len(path.read_text(encoding="utf-8").splitlines()) > MAX_FAMILY_LINES
    }  # fmt: skip
    assert longer == LONGER_FAMILIES.keys()


def test_core_imports_none_of_the_four_folders():
    wrong = [
        f"{relative(path)} imports {name}"
        for path in [ROOT / "__init__.py", ROOT / "__main__.py", *sources("core")]
        for name in imported(path)
        if name.split(".")[0] in FOLDERS
    ]
    assert not wrong, wrong


WING = re.compile(r"^    (\w+) {2,}\S", re.MULTILINE)
LOOSE_FILES = 4


def wings() -> list[str]:
    """The wings of ``core`` from the ground up, as the map in ``core/__init__.py`` lists them."""
    return WING.findall(ast.get_docstring(ast.parse((ROOT / "core/__init__.py").read_text(encoding="utf-8"))) or "")


def import_graph(root: Path) -> dict[str, set[str]]:
    """Module of ``core`` -> modules of ``core`` that it imports, for types alone too."""
    paths = {path: path.relative_to(root).with_suffix("").as_posix().replace("/", ".") for path in root.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for path, name in paths.items() if name.startswith("core")}
    return {
        name: {each for each in imported(path, root=root) if each in modules} - {name.rpartition(".")[0]}
        for name, path in modules.items()
    }


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import themselves by way of others, one text for each that was found."""
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def upward(graph: dict[str, set[str]], order: Sequence[str]) -> list[str]:
    """Imports from a wing to one above it."""
    level = {f"core.{name}": number for number, name in enumerate(order)}

    def wing(module: str) -> str:
        return ".".join(module.split(".")[:2])

    return [
        f"{module} imports {target}"
        for module, targets in graph.items()
        for target in sorted(targets)
        if wing(module) in level and level.get(wing(target), -1) > level[wing(module)]
    ]


def test_the_map_of_core_names_every_wing_and_nothing_else():
    found = {path.name.removesuffix(".py") for path in (ROOT / "core").iterdir() if not path.name.startswith("_")}
    assert sorted(wings()) == sorted(found)
    assert len(list((ROOT / "core").glob("*.py"))) <= LOOSE_FILES


def test_every_wing_says_in_its_first_line_what_lives_there():
    silent = [
        relative(path)
        for path in sorted((ROOT / "core").rglob("__init__.py"))
        if len((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0].split()) < 4
    ]
    assert not silent, silent


def test_no_imports_run_in_a_circle_or_up():
    graph = import_graph(ROOT)
    assert not circles(graph)
    assert not upward(graph, wings())


def test_a_circle_and_an_import_up_are_found(tmp_path):
    for name, text in {"utils/a": "from .b import x\n", "utils/b": "from __future__ import annotations\n"}.items():
        path = tmp_path / "core" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert not circles(import_graph(tmp_path))
    (tmp_path / "core/utils/b.py").write_text("if TYPE_CHECKING:\n    from .a import X\n")
    assert circles(import_graph(tmp_path))
    (tmp_path / "core/cli").mkdir()
    (tmp_path / "core/cli/c.py").write_text("")
    (tmp_path / "core/utils/b.py").write_text("def f():\n    from ..cli.c import main\n")
    assert upward(import_graph(tmp_path), ["utils", "cli"]) == ["core.utils.b imports core.cli.c"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_four_folders_import_core_and_themselves_only(folder):
    others = {"core", *FOLDERS} - {"core", folder}
    wrong = [
        f"{relative(path)} imports {name}"
        for path in sources(folder)
        for name in imported(path)
        if name.split(".")[0] in others
    ]
    assert not wrong, wrong


def test_code_inside_the_package_imports_it_relatively():
    wrong = [
        relative(path)
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "distill")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "distill" for alias in node.names))
    ]
    assert not wrong, wrong


def registered_names(registry: Registry) -> set[str]:
    names: set[str] = set()
    for kind in KINDS:
        for name in registry.names(kind):
            names |= {name, *registry.get(kind, name).aliases}
    return names


def compared_texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Texts that the code compares something with: ==, in, match, .startswith."""
    for node in ast.walk(tree):
        parts: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            parts = list(node.args) if node.func.attr in ("startswith", "endswith") else []
        for part in parts:
            for inner in ast.walk(part):
                if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                    yield getattr(node, "lineno", inner.lineno), inner.value


def test_the_reader_of_comparisons_finds_them():
    code = "if a == 'x' or b in ('y', 'z'):\n pass\nmatch c:\n case 'w':\n  pass\nd = {'v': 1}\ne.startswith('u')\n"
    assert {text for _, text in compared_texts(ast.parse(code))} == {"x", "y", "z", "w", "u"}


def test_no_code_branches_on_the_names_of_plugins(registry):
    names = registered_names(registry)
    wrong = [
        f"{relative(path)}:{line} compares with {text!r}"
        for path in sources()
        for line, text in compared_texts(ast.parse(path.read_text(encoding="utf-8")))
        if text in names
    ]
    assert not wrong, wrong


ENGLISH = {"guidance", "recipe", "local"}
"""Names that are words of the engine's own as well: a guidance scale, the recipe of a miniature, a local folder."""
DEFAULTS = {"core/settings/run_settings.py", "core/cli/config.py", "core/config/docs.py"}
"""Where a name stands as what is used, or shown, when nobody says another."""


def documentation(tree: ast.AST) -> set[int]:
    """Ids of the nodes that are docstrings, of attributes too."""
    bodies = [node.body for node in ast.walk(tree) if isinstance(getattr(node, "body", None), list)]  # type: ignore[attr-defined]
    return {
        id(node.value)
        for body in bodies
        for node in body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def named(tree: ast.AST, names: set[str], classes: set[str]) -> Iterator[tuple[int, str]]:
    """Where code (not its documentation) writes one of `names` as a word of a text, or one of `classes`."""
    words = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, sorted(names)))})(?!\w)") if names else None
    silent = documentation(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in silent:
            yield from ((node.lineno, found) for found in (words.findall(node.value) if words else ()))
        elif isinstance(node, ast.Name | ast.Attribute):
            identifier = node.id if isinstance(node, ast.Name) else node.attr
            if identifier in classes:
                yield node.lineno, identifier


def test_the_reader_of_names_finds_them_in_code_alone():
    code = '''"""About x."""
class A:
    n: int = 1
    """Of x and Y."""
    def f(self):
        """On x."""
        return "an x, no xy" + Y.z("w")
'''
    assert list(named(ast.parse(code), {"x", "w"}, {"Y"})) == [(7, "x"), (7, "w"), (7, "Y")]


def names_and_classes(registry: Registry, kind: str) -> tuple[set[str], set[str]]:
    found = {name: registry.get(kind, name) for name in registry.names(kind)}
    aliases = {alias for each in found.values() for alias in each.aliases}
    return {*found, *aliases} - ENGLISH, {each.__name__ for each in found.values() if each.name not in ENGLISH}


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("core", "method"), ("core", "family"), ("distill_methods", "family"), ("model_families", "method")],
)
def test_engine_methods_and_families_do_not_name_each_other(registry, folder, kind):
    names, classes = names_and_classes(registry, kind)
    wrong = [
        f"{relative(path)}:{line} names {text!r}"
        for path in sources(folder)
        if relative(path) not in DEFAULTS
        for line, text in named(ast.parse(path.read_text(encoding="utf-8")), names, classes)
    ]
    assert not wrong, wrong


def test_a_method_names_no_other_method(registry):
    """What is made of others finds them by the names that its settings say."""
    wrong = []
    for path in sources("distill_methods"):
        others = {name: registry.get("method", name) for name in registry.names("method")}
        others = {name: each for name, each in others.items() if not each.__module__.endswith(f".{path.stem}")}
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = named(tree, set(), {each.__name__ for each in others.values()})
        wrong += [f"{relative(path)}:{line} names {text!r}" for line, text in found]
        wrong += [
            f"{relative(path)} imports {name}"
            for name in imported(path)
            if name.startswith("distill_methods.")
            and name.split(".")[1] in {e.__module__.rpartition(".")[2] for e in others.values()}
        ]
    assert not wrong, wrong


@pytest.mark.parametrize("hook", list(docs.hooks()), ids=lambda hook: hook[0])
def test_every_hook_is_described_documented_and_exercised(hook):
    name, signature, line = hook
    assert len(line.splitlines()) == 1, f"{name} wants a docstring of one line"
    assert f"### `{signature}`\n\n{line}" in (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
    tests = [path for path in (ROOT / "tests").glob("test_*.py") if path.name != Path(__file__).name]
    assert any(re.search(rf"\b{name}\b", path.read_text(encoding="utf-8")) for path in tests), f"no test uses {name}"


def test_generated_pages_are_up_to_date():
    made, folder = docs.pages(), ROOT / "docs"
    assert {f"plugins/{page.name}" for page in (folder / "plugins").iterdir()} == {page for page in made if "/" in page}
    old = [page for page, text in made.items() if (folder / page).read_text(encoding="utf-8") != text]
    assert not old, f"run python -m distill.core.config.docs docs: {old}"


def test_every_kind_of_plugin_has_a_generated_page():
    assert tuple(docs.HOW_CHOSEN) == KINDS


def test_files_are_short_enough():
    long = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    long = {name: lines for name, lines in long.items() if lines > MAX_FILE_LINES}
    assert not long, f"files past {MAX_FILE_LINES} lines ask to be two: {long}"


def test_functions_are_short_enough():
    long = [
        f"{relative(path)}:{node.lineno} {node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not long, f"functions past {MAX_FUNCTION_LINES} lines ask to be two: {long}"


def noun_docstrings(source: str) -> list[str]:
    """Names of functions whose docstring begins with "What" or "Whether" instead of a verb."""
    functions = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return [node.name for node in functions if (ast.get_docstring(node) or "").startswith(("What ", "Whether "))]


def test_the_reader_of_docstrings_finds_those_without_a_verb():
    source = (
        'def good():\n    """Return whether it is."""\n\n\nclass C:\n    def bad(self):\n        """Whether it is."""\n'
    )
    assert noun_docstrings(source) == ["bad"]


@pytest.mark.parametrize("folder", ["core", *FOLDERS])
def test_docstrings_of_functions_begin_with_a_verb(folder):
    wrong = [
        f"{relative(path)}: {name}"
        for path in sources(folder)
        for name in noun_docstrings(path.read_text(encoding="utf-8"))
    ]
    assert not wrong, f'write "Return ...", not "What ..." or "Whether ...": {wrong}'


def test_a_broad_except_passes_the_error_on_or_says_why_not():
    wrong = []
    for path in sources():
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            broad = isinstance(node, ast.ExceptHandler) and (
                node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            )
            if (
                broad
                and "#" not in lines[node.lineno - 1]
                and not any(isinstance(part, ast.Raise) for part in ast.walk(node))
            ):
                wrong.append(f"{relative(path)}:{node.lineno}")
    assert not wrong, wrong


def test_lines_for_people_go_through_logging():
    """Printed by one handler; besides, the trace of hooks and the error that a command ends with go to stderr."""
    prints = re.compile(r"print\(.*sys\.stderr|echo\(.*err=True")
    printing = {relative(path) for path in sources() if prints.search(path.read_text(encoding="utf-8"))}
    assert printing == {"core/utils/console.py", "core/registry/attribution.py", "core/cli/__init__.py"}
    handed = [
        f"{relative(path)}:{node.lineno}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.arg | ast.keyword) and node.arg == "say"
    ]
    assert not handed, f"logging.getLogger(__name__) instead: {handed}"


def configurations(registry: Registry) -> dict[str, type]:
    models: dict[str, type] = {"run": RunSettings, "dataset": DatasetSettings}
    for kind in KINDS:
        models |= {f"{kind} {name}": registry.get(kind, name).Config for name in registry.names(kind)}
    return models


def test_every_key_is_described_and_every_number_limited(registry):
    undescribed, unlimited = [], []
    for owner, model in configurations(registry).items():
        for key, info in model.model_fields.items():
            if key == "backend":
                continue
            if not (info.description or "").strip():
                undescribed.append(f"{owner}: {key}")
            words = expectation(model, key)
            if "number" in words and not re.search(r"at least|above", words):
                unlimited.append(f"{owner}: {key} ({words})")
    assert not undescribed, undescribed
    assert not unlimited, unlimited


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_list_of_packages_equals_the_tree():
    listed = set(project()["tool"]["setuptools"]["packages"])
    folders = {path.parent for path in sources()}
    in_tree = {".".join(["distill", *folder.relative_to(ROOT).parts]) for folder in folders}
    assert listed == in_tree
    for folder in folders:
        assert (folder / "__init__.py").is_file(), f"{relative(folder)} has no __init__.py"


def test_nothing_but_two_files_lies_at_the_root():
    assert sorted(path.name for path in ROOT.glob("*.py")) == ["__init__.py", "__main__.py"]
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_no_path_of_a_machine_is_written_down():
    forbidden = ["/" + "work/", "/" + "farm/"]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    wrong = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".json", ".txt", ".yaml", ".yml", "") and path.is_file():
            text = path.read_text(encoding="utf-8", errors="ignore")
            wrong += [f"{name}: {part}" for part in forbidden if part in text]
    assert not wrong, wrong


def test_the_wheel_holds_the_tree_and_nothing_else(tmp_path):
    """Built without isolation from a copy: an unlisted package or asset would vanish silently."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path / "tree"
    leave_out = shutil.ignore_patterns(
        ".git", "__pycache__", "*.egg-info", "build", "dist", "venv", ".venv", "output", ".*_cache"
    )
    shutil.copytree(ROOT, copy, ignore=leave_out)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    wheel = next(tmp_path.glob("*.whl"))
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {f"distill/{relative(path)}" for path in sources()}
    assets = [path for folder in ("core", *FOLDERS) for path in (ROOT / folder).rglob("assets/**/*") if path.is_file()]
    assets += (ROOT / "recipes").iterdir()
    wanted |= {f"distill/{relative(path)}" for path in assets if not path.name.startswith(".")}
    assert shipped == wanted
    licences = [name.rsplit("/", 1)[-1] for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/licenses/" in name]
    assert {"LICENSE", "NOTICE"} <= set(licences)
