"""The code of the docs runs.

Every fenced block of every page is covered: `python` is executed, `bash` is run line by line, settings are checked, in
the order of the page, in one folder, on random tiny models. A block that no rule covers fails (`support/pages.py`).
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
import zlib
from pathlib import Path

import pytest
import yaml
from support.pages import ROOT, Block, blocks, files_of, pages, text
from support.quickstart import (
    ONE_BATCH,
    TINY,
    TINY_DATA,
    command,
    no_services,
    sets,
    write_images,
    write_workspace,
)
from support.tiny_families import write_tiny_sd3
from support.tiny_sdxl import EDGE, write_tiny_sdxl

PAGES = pages()
EXECUTED = [page for page in PAGES if blocks(page)]
SUBSTITUTES = {
    "stabilityai/stable-diffusion-xl-base-1.0": "model",
    "name/sdxl-fine-tune": "fine-tune",
    ".float16": ".float32",
    '"cuda"': '"cpu"',
}
"""Real models, and what a machine without a GPU cannot do -> what stands in."""
TINY_ENTRIES = {
    "domain.json": ("data.my-domain.resolution=0.001024", "data.my-domain.minimum_image_size=0"),
    "prompts.json": ("data.prompts.resolution=0.001024",),
    "prompts-and-pairs.json": ("data.prompts.resolution=0.001024", "data.pairs.num_inference_steps=4"),
    "zipped.json": ("data.zipped.resolution=0.001024", "data.zipped.minimum_image_size=0"),
    "shop.json": ("data.shop.resolution=0.001024", "data.shop.minimum_image_size=0"),
    "multidatabackend.json": TINY_DATA,
    "": (),
}
"""Data file of a command -> what makes its entries small."""
PROGRAMS = ("distill", "python", "pip", "pytest", "accelerate", "torchrun", "tensorboard", "ruff", "mkdocs")


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """The quickstart's files, a fine-tune, a style, images of a domain and of edges: what the pages suppose."""
    root = write_workspace(tmp_path_factory.mktemp("docs") / "original")
    write_tiny_sdxl(root / "fine-tune", seed=1, layers_per_block=1)
    write_tiny_sd3(root / "tiny-sd3")
    write_images(root / "domain-images", count=4, seed=1)
    shutil.copyfile(root / "images" / "00.png", root / "edges.png")
    (root / "prompts.txt").write_text("a fox in the snow\na harbour at sunrise\n", encoding="utf-8")
    write_style(root / "model", root / "style.safetensors")
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        for path in sorted((root / "images").iterdir()):
            archive.write(path, path.name)
    return root


@pytest.fixture
def workspace(original, tmp_path) -> Path:
    """A copy that the page may change."""
    return Path(shutil.copytree(original, tmp_path / "workspace"))


def write_style(model: Path, file: Path) -> None:
    """A user's LoRA on the attention, random."""
    import torch
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    StableDiffusionXLPipeline.save_lora_weights(
        file.parent, unet_lora_layers=get_peft_model_state_dict(unet), weight_name=file.name
    )


def tiny_controlnet(*_: object, **__: object) -> object:
    """A ControlNet for the tiny model, whose autoencoder scales by 2 and not by 8."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    controlnet = ControlNetModel.from_unet(UNet2DConditionModel.from_pretrained("model", subfolder="unet"))
    for block in controlnet.controlnet_cond_embedding.blocks:
        block.stride = (1, 1)
    controlnet.controlnet_cond_embedding.conv_in.stride = (2, 2)
    return controlnet


def arguments(line: str, more: str) -> list[str]:
    """A line of the shell as it is run here: the tiny model, and a size that takes seconds."""
    given = shlex.split(line, comments=True)[1:]
    takes_more = given[0] == "run" or "--config" in given or given[:2] == ["plugins", "check"]
    more_of_it = shlex.split(more) if takes_more else []
    whole = [*given, *more_of_it]
    tiny = []
    if "--config" in whole:
        data = whole[whole.index("--data") + 1] if "--data" in whole else ""
        tiny = ["--model", "model", *sets((*TINY, ONE_BATCH, *TINY_ENTRIES[data]))]
        tiny += [] if "--output-dir" in whole else sets((f"output_dir=output/run-{zlib.crc32(line.encode())}",))
    if {"progressive", "segments.json"} & {*given}:
        tiny += sets(("max_train_steps=4",))  # a step for each stage
    if given[0] == "evaluate":
        tiny += ["--steps", "1,2", "--teacher-steps", "2", "--num-samples", "2"]
    return [*given, *tiny, *more_of_it]


def run_distill(line: str, block: Block) -> None:
    said = command(*arguments(line, block.comments.get("run with", "")))
    assert said.code == 0, f"{block.where}: {line}\n{said.out}\n{said.err}"


def run_with_variable(line: str, block: Block) -> None:
    """`NAME=VALUE distill ...`."""
    variable, _, rest = line.partition(" ")
    name, _, value = variable.partition("=")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, value)
        run_distill(rest, block)


def run_script(line: str, block: Block) -> None:
    """`python FILE ARGUMENTS`, a file that the page has written."""
    file, *given = shlex.split(line)[1:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [file, *given])
        runpy.run_path(file, run_name="__main__")


def check_benchmark(line: str, block: Block) -> None:
    """It is there and takes these options; `slow` runs it."""
    file, *given = shlex.split(line)[1:]
    code = (ROOT / file).read_text(encoding="utf-8")
    for option in (each for each in given if each.startswith("--")):
        assert f'"{option}"' in code, f"{block.where}: {file} has no {option}"
    assert "slow" in block.comments, f"{block.where}: say how it is run in a short time, <!-- slow: ARGUMENTS -->"


def run_tests(line: str, block: Block) -> None:
    """`pytest FILE`, tests that the page has written; else a command for the checkout."""
    file = shlex.split(line)[1]
    if not Path(file).exists():
        check_of_ci(line, block)
        return
    given = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, file]
    done = subprocess.run([sys.executable, *given], capture_output=True, text=True)
    assert done.returncode == 0, f"{block.where}: {done.stdout}"
    Path("tested.txt").write_text(done.stdout)


def check_pip(line: str, block: Block) -> None:
    """What is installed is there: folders, files of constraints, extras. Continuous integration installs it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for word in shlex.split(line)[2:]:
        place, _, extras = word.partition("[")
        for extra in filter(None, extras.rstrip("]").split(",")):
            assert extra in project["optional-dependencies"], f"{block.where}: there is no extra {extra!r}"
        known = word in ("-e", "-c") or place == project["name"] or (ROOT / place).exists()
        assert known, f"{block.where}: {word!r} is not there"


def check_of_ci(line: str, block: Block) -> None:
    """The README's block of test commands is what continuous integration runs, in a new virtual environment."""
    marked = re.search(r"<!-- test commands -->\n```bash\n(.*?)^```", text("README.md"), re.MULTILINE | re.DOTALL)
    assert marked
    new_environment = "python3 -m venv .venv && . .venv/bin/activate"
    assert line in (*marked[1].splitlines(), new_environment), f"{block.where}: nothing runs {line!r}"


RULES = {
    "distill ": run_distill,
    "python -m distill ": lambda line, block: run_distill(line.removeprefix("python -m "), block),
    "python benchmarks/": check_benchmark,
    "python ": run_script,
    "DISTILL_": run_with_variable,
    "pip install ": check_pip,
    "pytest ": run_tests,
    "": check_of_ci,
}
"""How a line of the shell begins -> what is done with it; the first that fits."""


def run_shell(block: Block) -> None:
    for line in filter(None, (line.strip() for line in block.content.splitlines())):
        if not line.startswith("#"):
            next(rule for start, rule in RULES.items() if line.startswith(start))(line, block)


def run_python(block: Block, names: dict[str, object]) -> None:
    content = block.content
    declared = dict(pair.split(" = ") for pair in block.comments["set"].split("; ")) if "set" in block.comments else {}
    for real, substitute in (SUBSTITUTES | declared).items():
        content = content.replace(real, substitute)
    exec(compile(content, block.where, "exec"), names)
    if "hookimpl" in content:
        loaded(content)


def loaded(content: str) -> None:
    """The code is accepted as a plugin."""
    from distill.core.registry.registry import Registry

    file = Path("plugin_of_a_page.py")
    file.write_text(content, encoding="utf-8")
    Registry.load([file], installed=False)


def check_settings(block: Block) -> None:
    """Settings of a run, or the entries of a data file, are accepted; files and folders in them need not be there."""
    from distill.core.config.load import load_configuration
    from distill.core.errors import ConfigError
    from distill.core.registry.registry import Registry

    read = {"json": json.loads, "yaml": yaml.safe_load, "toml": tomllib.loads}[block.language]
    found = read(block.content)
    if block.file == "pyproject.toml":
        assert_part_of(found, tomllib.loads((ROOT / "examples/distill-research/pyproject.toml").read_text()))
        return
    entries = isinstance(found, list)
    run = json.loads(Path("config.json").read_text()) | ({} if entries else found)
    needs_no_images = entries and not any(each.get("dataset_type", "image") == "image" for each in found)
    run |= {"distillation_method": "kd", "distillation_config": {}} if needs_no_images else {}
    backends = [*(ROOT / "examples").glob("*/distill_*/*_backend.py"), *Path.cwd().glob("*_backend.py")]
    run |= {"plugins": list({path.name: str(path) for path in backends}.values())}  # the page's own come first
    Path("checked.json").write_text(json.dumps(run))
    Path("checked-data.json").write_text(json.dumps(found) if entries else Path("multidatabackend.json").read_text())
    flags = {"pretrained_model_name_or_path": "model", "output_dir": "none"}
    small = () if entries else TINY_DATA
    try:
        with pytest.MonkeyPatch.context() as patch:
            for variable in re.findall(r"\{env:(\w+)\}", block.content):
                patch.setenv(variable, "a-secret")
            load_configuration(
                Registry.load(installed=False), config_file=Path("checked.json"), data_file=Path("checked-data.json"),
                flags=flags, overrides=small,
            )  # fmt: skip
    except ConfigError as error:
        wrong = [str(finding) for finding in error.findings if finding.problem != "does not exist"]
        assert not wrong, f"{block.where}: {wrong}"


def assert_part_of(part: object, whole: object) -> None:
    if isinstance(part, dict):
        assert isinstance(whole, dict)
        for key, value in part.items():
            assert_part_of(value, whole[key])
    else:
        assert part == whole


def run_block(block: Block, names: dict[str, object]) -> None:
    if "held by" in block.comments:
        return
    if block.file and block.file != "pyproject.toml":
        file = Path(block.file)
        before = file.read_text(encoding="utf-8") + "\n" if block.adds else ""
        file.write_text(before + block.content, encoding="utf-8")
    if block.language in ("json", "yaml", "toml"):
        check_settings(block)
    elif block.language == "bash":
        run_shell(block)
    elif block.language == "python" and not block.file:
        run_python(block, names)
    elif block.language in ("", "text"):
        commands = [line for line in block.content.splitlines() if line.split(" ")[0] in PROGRAMS]
        assert not commands, f"{block.where}: commands are in blocks of bash: {commands}"
    elif not block.file:
        pytest.fail(f"{block.where}: nothing covers a block of {block.language}")


@pytest.mark.parametrize("page", EXECUTED)
def test_every_block_of_the_page_runs(page, workspace):
    names: dict[str, object] = {}
    with no_services(workspace) as patch:
        patch.setattr("diffusers.ControlNetModel.from_pretrained", tiny_controlnet)
        for block in blocks(page):
            run_block(block, names)
        for file, content in files_of(page).items():
            if file.endswith(".py") and "hookimpl" in content:
                loaded(content)
    check_results(page, workspace)


def check_results(page: str, workspace: Path) -> None:
    """Something came out, and it is what the page is about."""
    from PIL import Image

    output = workspace / "output"
    if page == "docs/lcm.md":
        names = ("", "-2", "-3", "-two", "-style", "-fine-tune", "-edges", "-full")
        for image in (Image.open(workspace / f"harbour{name}.png") for name in names):
            assert image.size == (EDGE, EDGE)
            assert all(low < high for low, high in image.getextrema()), "neither black nor white"
    if page == "docs/checking-plugins.md":
        tested = (workspace / "tested.txt").read_text()
        assert re.search(r"\d\d passed, 1 skipped", tested), tested
    if page == "CONTRIBUTING.md":
        lines = (output / "fixed-guidance" / "losses.txt").read_text().splitlines()
        assert [int(line.split()[0]) for line in lines] == [1, 2]
        assert all(float(line.split()[1]) > 0 for line in lines)
    if page == "docs/tutorials/your-own-method.md":
        for name in ("leap", "leap-sd3", "leap-full"):
            resolved = json.loads((output / name / "config.resolved.json").read_text())
            assert (resolved["distillation_method"], (output / name / "student").is_dir()) == ("leap", True)
    if page == "docs/tutorials/your-own-tracker.md":
        assert {path.suffix for path in (output / "images" / "images").iterdir()} == {".jpg"}


SLOW = [block for page in PAGES for block in blocks(page) if "slow" in block.comments]


@pytest.mark.slow
@pytest.mark.parametrize("block", SLOW, ids=lambda block: block.where)
def test_benchmarks_of_the_pages_run(block, tmp_path):
    for line in block.content.splitlines():
        given = shlex.split(f"{line} {block.comments['slow']} --output {tmp_path}")[1:]
        done = subprocess.run([sys.executable, *given], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert any(tmp_path.iterdir())


def test_a_block_that_nothing_covers_fails(workspace):
    wrong = [
        Block("page", 1, "ruby", "", False, "puts 1\n"),
        Block("page", 1, "", "", False, "distill run --method lcm\n"),
        Block("page", 1, "bash", "", False, "make all\n"),
        Block("page", 1, "bash", "", False, "distill no-such-command\n"),
        Block("page", 1, "bash", "", False, "pip install -e '.[no-such-extra]'\n"),
        Block("page", 1, "bash", "", False, "python benchmarks/methods.py --no-such-option\n"),
        Block("page", 1, "json", "", False, '{"learning_rat": 1}\n'),
        Block("page", 1, "json", "", False, '[{"id": "x", "type": "locale"}]\n'),
        Block("page", 1, "python", "", False, "assert False\n"),
    ]
    with no_services(workspace):
        for block in wrong:
            with pytest.raises((AssertionError, pytest.fail.Exception)):
                run_block(block, {})


@pytest.mark.parametrize("package", ["distill-research", "distill-studio"])
def test_the_code_of_the_tutorials_is_that_of_the_examples(package):
    """But for blank lines between its parts."""
    written: dict[str, str] = {}
    for page in sorted((ROOT / "docs" / "tutorials").glob("*.md")):
        written |= files_of(page.relative_to(ROOT).as_posix())
    shipped = [path for path in (ROOT / "examples" / package).glob("distill_*/*.py") if path.name != "__init__.py"]
    assert len(shipped) > 1
    for path in shipped:
        assert packed(written[path.name]) == packed(path.read_text(encoding="utf-8")), path


def packed(code: str) -> str:
    return re.sub(r"\n{2,}", "\n", code)
