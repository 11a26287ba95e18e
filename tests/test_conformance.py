"""The conformance suite passes on what ships and on a good plugin, and says of each broken one what is wrong."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path

import distill as distill_api
import pytest
from distill.core.errors import UserError
from distill.core.testing import Check, ConformanceError, check_plugin, checks_of
from distill.core.testing.report import outcome_of
from support.broken_plugins import BROKEN, BROKEN_FAMILY, FAMILIES, GOOD
from support.cases import registry
from support.config_files import distill, said
from support.mlflow_store import empty_store, give_each_run_a_copy  # noqa: F401 - a fixture
from support.networks import MeanRed, network_file
from support.recipes import term
from support.s3_server import KEY_ID, REGION, SECRET, s3, s3_server  # noqa: F401 - fixtures
from support.sources import write_csv, write_jsonl, write_parquet, write_shards
from support.tiny_families import MODELS, NEWER
from support.tiny_lumina2 import write_tiny_lumina2
from support.tiny_qwen import write_tiny_qwen_image_2
from support.tiny_sdxl import write_tiny_sdxl

# -- what ships -------------------------------------------------------------------------------------------------------


def placed(write):
    """An example that puts the files into a folder and then into something else."""

    def example(folder, files):
        for key, data in files.items():
            path = folder / "images" / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return write(folder / "images", folder)

    return example


def shards(images, root):
    write_shards(images, root / "shards")
    return {"shards": str(root / "shards" / "shard-{000..002}.tar")}


EXAMPLES = {
    "method recipe": lambda: {"terms": [term("pcm", 1.0, adversarial_weight=0.0)]},
    "method reward": lambda: {"network": network_file(MeanRed)},
    **{f"family {tiny.family}": tiny.write for tiny in NEWER.values()},
    "family qwen-image-2": partial(write_tiny_qwen_image_2, levels=5),
    "family lumina2": partial(write_tiny_lumina2, levels=4),
    "family sdxl": partial(write_tiny_sdxl, layers_per_block=1),
    "family sd1x": MODELS["sd1x"].write,
    "family sd2x": MODELS["sd2x-v"].write,
    "family sd3": MODELS["sd3"].write,
    "family flux": MODELS["flux-dev"].write,
    "data_backend csv": placed(
        lambda images, root: {"csv_file": write_csv(images, root / "t.csv"), "instance_data_dir": images}
    ),
    "data_backend jsonl": placed(
        lambda images, root: {"jsonl_file": write_jsonl(images, root / "t.jsonl"), "instance_data_dir": images}
    ),
    "data_backend parquet": placed(lambda images, root: {"parquet_file": write_parquet(images, root / "t.parquet")}),
    "data_backend huggingface": placed(
        lambda images, root: {"dataset_name": str(write_parquet(images, root / "t.parquet"))}
    ),
    "data_backend webdataset": placed(shards),
}
"""What stands in for an example that needs what only tests have: tiny models, writers of tables."""
QUICK_FAMILIES = ("sdxl", "flux")
"""A UNet and a transformer; the others are run with -m slow."""
QUICK_METHODS = ("lcm", "kd")
"""Whose students learn eps prediction without -m slow; of the others only flow."""
KINDS = ("method", "family", "data_backend", "tracker", "optimizer", "quantizer", "evaluator", "publisher")


def is_slow(kind: str, name: str, check: Check) -> bool:
    if kind == "family":
        return name not in QUICK_FAMILIES
    if not check.name.startswith("the student learns"):
        return False
    quick = ("[eps]", "[flow]") if name in QUICK_METHODS else ("[flow]",)
    return name == "meanflow" or not check.name.endswith(quick)


def built_in():
    for kind in KINDS:
        for name in registry().names(kind):
            for check in checks_of(registry().get(kind, name), example=EXAMPLES.get(f"{kind} {name}")):
                yield pytest.param(check, id=str(check), marks=[pytest.mark.slow] if is_slow(kind, name, check) else [])


@pytest.fixture
def store(request, monkeypatch):
    """MLflow's runs begin with tables, but for those in which their making is watched."""
    check = str(request.node.callspec.params["check"])
    if check.startswith("tracker mlflow") and not check.endswith(("start to finish", "output folder alone")):
        give_each_run_a_copy(request.getfixturevalue("empty_store"), monkeypatch)


@pytest.mark.parametrize("check", built_in())
def test_every_shipped_plugin_conforms(check: Check, store):
    outcome = outcome_of(check)
    assert outcome.result in ("ok", "not applicable"), outcome
    assert bool(outcome.reason) == (outcome.result == "not applicable")


def test_every_kind_has_checks_of_its_own():
    for kind in KINDS:
        name = registry().names(kind)[0]
        names = {check.name for check in checks_of(registry().get(kind, name))}
        assert len(names) > 11, kind
        assert any(str(check).startswith(kind.replace("_", " ")) for check in checks_of(registry().get(kind, name)))


def test_a_bucket_conforms(s3, monkeypatch):  # noqa: F811
    from distill.core.data.tables import locations as located

    s3.bucket("shelf")
    for name, value in (("ENDPOINT_URL", s3.endpoint), ("ACCESS_KEY_ID", KEY_ID), ("SECRET_ACCESS_KEY", SECRET),
                        ("DEFAULT_REGION", REGION)):  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    located._store.cache_clear()

    def fill(images, root):
        s3.fill("shelf", "images", images)
        return {"aws_bucket_name": "shelf", "aws_data_prefix": "images"}

    outcomes = [outcome_of(check) for check in checks_of(registry().get("data_backend", "s3"), example=placed(fill))]
    assert not [outcome for outcome in outcomes if outcome.result == "failed" or "offers no place" in outcome.reason]
    located._store.cache_clear()


# -- somebody's plugin ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_good_plugin_conforms():
    result = distill("plugins", "check", GOOD)
    assert result.exit_code == 0, result.output
    assert re.search(r"good_plugin.py: \d+ ok, 0 failed, \d+ not applicable", result.stdout)
    assert "ok: method one-step: the student learns [flow]" in result.stdout
    reason = "Config has no defaults for shelf"
    assert f"not applicable: data backend shelf: Config accepts its defaults: {reason}" in result.stdout


SQLITE = Path(__file__).parent.parent / "examples" / "distill-studio" / "distill_studio" / "sqlite_backend.py"


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ("raise FileNotFoundError(f", "raise KeyError(f", "not there any more raised KeyError"),
        ("return io.BytesIO(row[0])", "return io.BytesIO(row[0][1:])", "read the content whole"),
        ("        captions=[[row[3]]", "        captions=[[row[9]]", "IndexError"),
        (
            "yield chunk(rows, resume=after, images=images)",
            "yield rows",
            "samples() yields list; yield SampleChunks",
        ),
        ("keys=[str(row[1])", "keys=[row[1].nam", "sqlite_backend.py, line"),
    ],
)
def test_the_fault_of_a_broken_sample_backend_is_reported(right, wrong, words, tmp_path):
    code = SQLITE.read_text(encoding="utf-8")
    assert code.count(right) == 1
    (tmp_path / SQLITE.name).write_text(code.replace(right, wrong), encoding="utf-8")
    outcomes = check_plugin(str(tmp_path / SQLITE.name)).outcomes
    reasons = [outcome.reason for outcome in outcomes if outcome.result == "failed"]
    assert any(words in reason for reason in reasons), reasons


@pytest.mark.parametrize("fault", BROKEN)
def test_the_fault_of_each_broken_plugin_is_reported(fault, tmp_path):
    broken = BROKEN[fault]
    result = distill("plugins", "check", broken.write(tmp_path), "--only", broken.check)
    assert result.exit_code == 1, result.output
    failed = [line for line in result.stdout.splitlines() if line.startswith("failed: ")]
    assert failed
    for words in broken.says:
        assert any(words in line for line in failed), f"nobody says {words!r}:\n{result.stdout}"
    if broken.passes:
        report = check_plugin(str(broken.write(tmp_path)), only=broken.passes)
        assert [outcome.result for outcome in report.outcomes] == ["ok"]


@pytest.mark.parametrize(
    ("right", "wrong", "words", "least"),
    [
        (
            'return [distill.Role("teacher"), distill.Role("student", trains=setup.model_type)]',
            'return ["teacher", "student"]',
            "OneStep.roles returned 'teacher', not a distill.Role. Return `[distill.Role(",
            8,
        ),
        (
            "if schedule.clean_at_zero:",
            "import diffusers; return diffusers.DDIMScheduler()",
            "OneStep.sampler returned DDIMScheduler, not a distill.Sampler. Return `distill.Sampler(",
            2,
        ),
        (
            'yield distill.Update("student", losses.mean(),',
            'yield distill.Update("student", losses.mean().detach(),',
            "OneStep.updates yielded a loss of 'student' without a gradient. Is it detached, or was "
            '`context.predict("student", ...)` called under `torch.no_grad()`?',
            6,
        ),
    ],
)
def test_a_reason_that_many_checks_fail_for_is_printed_once_with_what_to_write(right, wrong, words, least, tmp_path):
    code = GOOD.read_text(encoding="utf-8")
    assert code.count(right) == 1
    if wrong.startswith("import"):
        wrong += "\n        if schedule.clean_at_zero:"
    (tmp_path / "mistaken.py").write_text(code.replace(right, wrong), encoding="utf-8")
    result = distill("plugins", "check", tmp_path / "mistaken.py", "--only", "[eps]")
    assert result.exit_code == 1
    assert result.stdout.count(words) == 1
    (line,) = [line for line in result.stdout.splitlines() if words in line]
    number = int(re.match(r"failed: (\d+) checks, all for this reason: ", line)[1])
    assert number >= least
    assert f"{number} failed" in result.stdout
    assert "  method one-step: " in result.stdout


@pytest.mark.parametrize("fault", BROKEN)
def test_the_good_plugin_passes_where_the_broken_ones_fail(fault):
    """What fails is the fault, not the check."""
    report = check_plugin(str(GOOD), only=BROKEN[fault].check)
    assert report.outcomes
    assert not report.failed, report.failed


@pytest.mark.parametrize("fault", FAMILIES)
def test_the_fault_of_each_broken_family_is_reported(fault, tmp_path):
    method, only, words = FAMILIES[fault]
    path = tmp_path / "family.py"
    path.write_text(BROKEN_FAMILY.replace("{fault}", method))
    report = check_plugin(str(path), only=only)
    reasons = [str(outcome) for outcome in report.failed]
    assert bool(reasons) == bool(words), reasons
    for each in words:
        assert any(each in reason for reason in reasons), reasons


def test_a_family_without_a_model_and_a_backend_without_a_place_say_so(tmp_path):
    path = tmp_path / "bare.py"
    made = "return write_tiny_sdxl(folder, layers_per_block=1)"
    assert made in BROKEN_FAMILY
    path.write_text(BROKEN_FAMILY.replace("{fault}", "").replace(made, "return None"))
    report = check_plugin(str(path), only="predict gives")
    assert [outcome.result for outcome in report.outcomes] == ["not applicable"]
    assert "define `example(cls, folder)`" in report.outcomes[0].reason


# -- where it comes from ----------------------------------------------------------------------------------------------


def test_a_plugin_that_cannot_be_loaded_is_a_usage_error(tmp_path):
    (tmp_path / "broken.py").write_text("import distill\nimport no_such_package_anywhere\n")
    (tmp_path / "empty").mkdir()
    cases = {
        str(tmp_path / "nowhere.py"): "does not exist",
        str(tmp_path / "broken.py"): "cannot be imported (line 2): ModuleNotFoundError",
        str(tmp_path / "empty"): "has no pyproject.toml",
        "no_such_package_anywhere": "is neither a file, nor a folder, nor an installed package",
        "json": "implements no hook",
    }
    for argument, words in cases.items():
        result = distill("plugins", "check", argument)
        if argument == "json":  # it can be imported, and offers nothing
            assert result.exit_code == 1
            assert words in said(result.stdout)
        else:
            assert result.exit_code == 2, result.output
            assert words in said(result.stderr), result.stderr


def test_a_project_that_is_not_installed_is_found_by_its_entry_points(tmp_path, monkeypatch):
    package = tmp_path / "src" / "shelf_for_distill"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "plugin.py").write_text(GOOD.read_text())
    entry = '[project.entry-points."distill.plugins"]\nshelf = "shelf_for_distill.plugin"\n'
    (tmp_path / "pyproject.toml").write_text(f'[project]\nname = "shelf"\n{entry}')
    monkeypatch.setattr(sys, "path", list(sys.path))
    report = check_plugin(str(tmp_path), only="publisher shelved")
    assert report.count("ok") > 8
    assert not report.failed
    assert not check_plugin("shelf_for_distill.plugin", only="the registry takes it").failed


def test_a_check_is_for_pytest_as_well():
    from support.good_plugin import Downhill

    checks = checks_of(Downhill)
    assert str(checks[0]) == "optimizer downhill: the name can be written in configurations"
    with pytest.raises(TypeError, match=r"derived from none of distill\.Method"):
        checks_of(int)
    wrong = type("Wrong", (Downhill,), {"name": "wrong name", "__doc__": "Wrong."})
    with pytest.raises(ConformanceError, match="cannot be written in configurations"):
        checks_of(wrong)[0].run()
    assert issubclass(ConformanceError, AssertionError)


def test_a_filter_that_matches_no_check_is_refused():
    result = distill("plugins", "check", GOOD, "--only", "no such check")
    assert result.exit_code == 2
    assert "no check has 'no such check' in its name" in said(result.stderr)
    with pytest.raises(UserError):
        check_plugin("not/a/file.py")


def test_the_page_names_every_kind_and_every_example():
    page = (Path(__file__).parents[1] / "docs" / "checking-plugins.md").read_text(encoding="utf-8")
    assert all(f"| {kind.replace('_', ' ')} |" in page for kind in KINDS)
    for base in (distill_api.Method, distill_api.ModelFamily, distill_api.DataBackend):
        assert f"`{base.__name__}.example(" in page
        assert base.example.__doc__
