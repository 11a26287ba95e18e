"""What the docs say is so: their links lead somewhere, the commands, settings and tests that they name exist."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path
from pkgutil import resolve_name

import pytest
from support.pages import ROOT, blocks, pages, text, without_blocks
from support.quickstart import NOTICES, write_workspace

PAGES = pages()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    return write_workspace(tmp_path_factory.mktemp("docs"))


# -- commands in the text ---------------------------------------------------------------------------------------------


def inline_commands(page: str) -> list[str]:
    return re.findall(r"`(distill [a-z][^`]*)`", without_blocks(page))


def test_commands_in_the_text_are_commands():
    """Names and options of what stands in inline code; the values are not looked at."""
    wrong = []
    for page in PAGES:
        for written in inline_commands(page):
            problem = problem_of_command(written)
            wrong += [f"{page}: `{written}`: {problem}"] if problem else []
    assert not wrong, "\n".join(wrong)


def problem_of_command(written: str) -> str | None:
    from distill.core.cli import COMMANDS, load_command

    name, *rest = shlex.split(written)[1:]
    if name not in COMMANDS:
        return f"there is no command {name}"
    found = load_command(name)
    inside = getattr(found, "commands", {})
    if inside and rest:
        if rest[0] not in inside:
            return f"{name} has no {rest[0]}"
        found = inside[rest[0]]
    options = {option for parameter in found.params for option in parameter.opts}
    unknown = [word for word in rest if word.startswith("--") and word not in options]
    return f"it has no {', '.join(unknown)}" if unknown else None


def test_a_wrong_command_in_the_text_is_found():
    assert problem_of_command("distill cache clear --orphaned") is None
    assert "no command trian" in problem_of_command("distill trian")
    assert "has no cleer" in problem_of_command("distill cache cleer")
    assert "has no --orphan" in problem_of_command("distill cache clear --orphan")


def test_tests_that_hold_a_block_exist():
    held = [block for page in PAGES for block in blocks(page) if "held by" in block.comments]
    assert held
    for block in held:
        file, _, name = block.comments["held by"].partition("::")
        assert name in functions_in(ROOT / file), f"{block.where}: {file}::{name} does not exist"


# -- statements -------------------------------------------------------------------------------------------------------


def settings_named(page: str) -> list[str]:
    """Every `key=value` in inline code."""
    return re.findall(r"`((?:[a-z_][\w.-]*)=[\w.,:x-]+)`", without_blocks(page))


def of_family(registry, name: str, setting: str) -> bool:
    """Whether the setting is one of this family's own."""
    part, _, key = setting.partition("=")[0].partition(".")
    return part == "family_config" and key in registry.get("family", name).Config.model_fields


def test_every_setting_that_is_advised_is_accepted(workspace):
    from distill.core.config.load import load_configuration
    from distill.core.registry.registry import Registry

    advised = list(dict.fromkeys(setting for page in PAGES for setting in settings_named(page)))
    assert len(advised) > 20
    plugins = sorted((ROOT / "examples").glob("*/distill_*/[!_t]*.py"))
    registry = Registry.load(plugins, installed=False)
    flags = {"pretrained_model_name_or_path": str(workspace / "model"), "output_dir": str(workspace / "none")}
    for setting in advised:
        own = [name for name in registry.names("family") if of_family(registry, name, setting)]
        load_configuration(
            registry,
            config_file=workspace / "config.json",
            data_file=workspace / "multidatabackend.json",
            flags=flags if "sdxl" in own or not own else {**flags, "model_family": own[0]},
            overrides=[f"data.your-dataset-name.instance_data_dir={workspace / 'images'}", setting],
        )


def promises() -> list[tuple[str, str]]:
    """(promise, what holds it) of the table."""
    table = text("docs/quickstart.md").partition("| promise | held by |")[2]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:] if line.startswith("|")]
    return [(row[0], row[1]) for row in rows]


def functions_in(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


def test_each_promise_of_the_quickstart_is_held_by_a_test_that_exists():
    rows = promises()
    assert len(rows) == 15
    for promise, held in rows:
        named = re.findall(r"`(tests/test_\w+\.py)::(test_\w+)`", held)
        assert named, f"nothing holds: {promise}"
        for file, name in named:
            assert name in functions_in(ROOT / file), f"{file}::{name} does not exist"
        for later in re.findall(r"planned: ([\w ]+)", held):
            assert later in {"quantizers", "other families"}


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        found = (ROOT / page).parent / file if file else ROOT / page
        assert found.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(found), f"{page}: {target}"


MADE_UP = {"tests/test_x.py", "tests/test_distill_soft_targets.py"}
"""Files of the reader's, which pages name."""
FOLDERS = "core|distill_methods|model_families|data_backends|plugins|benchmarks|examples|tests|docs"


def paths_named(page: str) -> set[str]:
    """Files and folders of the repository that a page names; the targets of links are looked at by themselves."""
    written = re.sub(r"\[[^\]]*\]\([^)]*\)", "", text(page))
    return {path.rstrip(".,") for path in re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./{{}}*,-]+", written)}


def modules_named(page: str) -> set[str]:
    return set(re.findall(r"(?<!getLogger\(\")\bdistill(?:\.\w+)+", text(page)))


@pytest.mark.parametrize("page", PAGES)
def test_files_and_modules_that_a_page_names_exist(page):
    missing = [path for path in sorted(paths_named(page) - MADE_UP) if not (ROOT / path).exists()]
    assert not missing, f"{page} names files that do not exist: {missing}"
    for name in sorted(modules_named(page)):
        resolve_name(name)


def test_paths_and_modules_are_found_in_a_page():
    assert {"core/diffusion/schedule.py", "core/engine/networks.py", "core/data"} <= paths_named("docs/design.md")
    assert "distill.core.diffusion.prediction.Prediction" in modules_named("docs/api.md")


def test_each_module_that_the_page_of_methods_lists_can_be_imported():
    listed = text("docs/methods.md").partition("lies in `distill.core.diffusion`")[2].partition("\n\n")[0]
    named = re.findall(r"`([a-z_]+)`", listed.partition("A method with")[0])
    assert {"consistency", "multistep", "weights"} <= set(named)
    for name in named:
        resolve_name(f"distill.core.diffusion.{name}")


def test_the_recipe_of_the_miniature_is_what_its_page_says():
    recipe = json.loads((ROOT / "model_families/assets/sdxl_scenes/recipe.json").read_text())
    settings = text(MINIATURE).partition("## Its settings")[2].partition("## The result")[0]
    for said in (
        f"`resolution` {recipe['resolution']}",
        f"`aspect_bucket_alignment` {recipe['aspect_bucket_alignment']}",
        f"{recipe['max_train_steps']:,} steps of {recipe['train_batch_size']} samples",
        f"rank {recipe['lora_rank']}",
        f"`ema_decay` {recipe['ema_decay']}",
        f"1e-3, after {recipe['lr_warmup_steps']} steps",
        f"every {recipe['validation_step_interval']} steps, by",
        f"the student at {recipe['validation_num_inference_steps']} steps; a checkpoint",
        f"{recipe['evaluation_num_samples']} images each",
        f"the teacher at {' and '.join(recipe['evaluation_teacher_steps'].split(','))} steps",
    ):
        assert said in settings, said
    assert (recipe["learning_rate"], recipe["lr_end"]) == (1e-3, 5e-5)
    assert sum(1 for _ in (ROOT / "model_families/assets/scenes").glob("*.png")) == 1200


# -- figures ----------------------------------------------------------------------------------------------------------


def miniature_figures() -> dict[tuple[str, int], list[list[float]]]:
    """Who and steps -> scenes right, distance, quality: the mean, and of students the lowest and the highest."""
    who = r"teacher|student|teacher, DPM\+\+ 2M(?:, guidance \d)?"
    rows = re.findall(rf"^\| \W*({who})\W* \| (\d+) \| (.+) \| (.+) \| (.+) \|$", text(MINIATURE), re.M)
    return {(who, int(steps)): [[float(number) for number in re.findall(r"[\d.]+", cell)] for cell in cells]
            for who, steps, *cells in rows}  # fmt: skip


MINIATURE = "docs/miniature.md"


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_figures_on_the_first_screen_are_those_of_the_miniatures_page(page):
    figures = miniature_figures()
    rows = re.findall(r"^\| (\d+) \| (.+) \| (.+) \| (.+) \| (.+) \|$", text(page), re.M)
    assert [row[0] for row in rows] == ["1", "2", "4", "8", "50"]
    for steps, *cells in rows:
        teacher, student = figures["teacher", int(steps)], figures.get(("student", int(steps)))
        means = [each[column][0] for column in (0, 1) for each in (teacher, student) if each]
        assert [float(cell.strip("*")) for cell in cells if cell != "–"] == means
    ((solver, distance),) = re.findall(r"\(DPM\+\+ 2M: ([\d.]+), ([\d.]+)\)", text(page))
    assert [[float(solver)], [float(distance)]] == figures["teacher, DPM++ 2M", 4][:2]


def test_the_reading_of_the_miniatures_figures_follows_from_its_table():
    figures, page = miniature_figures(), " ".join(text(MINIATURE).split())
    (full, *_), *_ = figures["teacher", 50]
    ((lower, (low,), (low_away,)),) = [
        (name, *found[:2]) for (name, steps), found in figures.items() if "guidance" in name and steps == 4
    ]
    solver = {steps: [values[0] for values in figures["teacher, DPM++ 2M", steps]] for steps in (2, 4)}
    teacher = {steps: [values[0] for values in figures["teacher", steps]] for steps in (1, 8)}
    student = {steps: [values[0] for values in figures["student", steps]] for steps in (1, 2, 4, 8)}
    (_, worst, _), *_ = figures["student", 4]
    for said in (
        f"{student[4][0]:.1%} of the student's scenes are right, and {solver[4][0]:.1%} of those by DPM++ 2M",
        f"{100 * (student[4][0] - solver[4][0]):.1f} points more, {100 * (worst - solver[4][0]):.1f} for the worst",
        f"keeps {student[4][0] / full:.0%} of what the full teacher gets right, the solver {solver[4][0] / full:.0%}",
        f"is {student[4][1] / solver[4][1]:.2f} of the solver's",
        f"The student keeps {student[2][0] / full:.0%}, the solver {solver[2][0] / full:.0%}",
        f"the student's distance is {student[2][1] / solver[2][1]:.2f} of the solver's",
        f"The student keeps {student[1][0] / full:.0%}, the teacher {teacher[1][0] / full:.0%}",
        f"the student's distance is {student[1][1] / teacher[1][1]:.2f} of the teacher's",
        f"The student keeps {student[8][0] / full:.0%}, the teacher {teacher[8][0] / full:.0%}",
        f"With {lower.rpartition(', ')[2]} {low:.1%} of the solver's scenes are right at 4 steps",
        f"{low_away / student[4][1]:.1f} times as far from the data as the student's",
    ):
        assert said in page


def figures_of_methods() -> dict[tuple[str, int], list[list[float]]]:
    """Row and steps -> scenes right, distance, quality: the mean, and of students the lowest and the highest."""
    section = text("docs/methods.md").partition("\n## On the miniature")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| (\d+) \| \d+ \| ([^|]+) \| ([^|]+) \| ([^|]+) \|.*\|$", section, re.M)
    return {(who, int(steps)): [[float(number) for number in re.findall(r"[\d.]+", cell)] for cell in cells]
            for who, steps, *cells in rows}  # fmt: skip


def test_what_beats_the_fast_solver_follows_from_the_table_of_methods():
    figures = figures_of_methods()
    (least,), (far,), _ = figures["teacher, DPM++ 2M", 4]
    section = text("docs/methods.md").partition("### Which beat the fast solver")[2].partition("\n### ")[0]
    rows = re.findall(r"^\| (\S+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", section, re.M)
    students = {who for who, steps in figures if steps == 4 and not who.startswith("teacher")}
    assert {row[0] for row in rows} == students
    for who, *given in rows:
        (mean, worst, _), (distance, _, _), _ = figures[who, 4]
        more = (mean - least, worst - least)
        assert [*map(float, given)] == pytest.approx([mean, *(round(100 * each, 1) for each in more), distance]), who
    readme = " ".join(text("README.md").split())
    said = re.findall(r"(?:of|calls of) `(\S+)` (\d+)%", readme)
    assert len(said) == 5
    assert [(who, f"{figures[who, 4][0][0]:.0%}") for who, _ in said] == [(who, f"{share}%") for who, share in said]
    lower = figures["teacher, DPM++ 2M, guidance 3", 4][0][0]
    assert f"Of its scenes {least:.0%} are right, with the guidance that suits it best {lower:.0%}" in readme
    beaten = [who for who in students if figures[who, 4][0][1] - least >= 0.05 and figures[who, 4][1][2] < far]
    assert len(beaten) >= 4


def test_the_notices_shown_are_those_of_config_check():
    shown = re.findall(r"^    notice: (.+)$", text("docs/quickstart.md"), re.MULTILINE)
    assert shown == list(NOTICES)


def test_no_page_is_left_with_a_place_for_figures():
    left = [page for page in PAGES if "@@" in text(page) or "<!-- figures" in text(page) or "FIGURES" in text(page)]
    assert not left, left
