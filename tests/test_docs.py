"""What the docs say is so: their code is executed, their links lead somewhere, the tests they name exist.

Fenced blocks are executed in the order of their page, in one folder, on random tiny models: `python`, and of `bash` the
lines that begin with `distill`. A block with a file's name after its language (`json domain.json`) is written there.
"""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import zipfile
from pathlib import Path

import pytest
from support.quickstart import (
    FILES,
    NOTICES,
    TINY,
    TINY_DATA,
    command,
    no_services,
    sets,
    write_pictures,
    write_workspace,
)
from support.tiny_sdxl import EDGE, write_tiny_sdxl

ROOT = FILES.parents[1]
METHODS = ("pcm", "tcd", "dmd2", "progressive", "guidance", "meanflow", "kd")
DOCS = (
    "quickstart",
    "lcm",
    "troubleshooting",
    "design",
    "data",
    "families",
    "methods",
    "writing-plugins",
    "trackers",
    "evaluators",
    "publishers",
)
PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{name}.md" for name in (*DOCS, *METHODS)))
READ = ("quickstart", "lcm", "writing-plugins", "trackers", *METHODS)
EXECUTED = ("CONTRIBUTING.md", *(f"docs/{name}.md" for name in READ))
SUBSTITUTES = {
    "stabilityai/stable-diffusion-xl-base-1.0": "model",
    "name/sdxl-fine-tune": "fine-tune",
    ".float16": ".float32",
    '"cuda"': '"cpu"',
}
"""Real models, and what a machine without a GPU cannot do -> what stands in."""
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TINY_ENTRIES = {
    "domain.json": ("data.my-domain.resolution=0.001024", "data.my-domain.minimum_image_size=0"),
    "prompts.json": ("data.prompts.resolution=0.001024",),
    "prompts-and-pairs.json": ("data.prompts.resolution=0.001024", "data.pairs.num_inference_steps=4"),
    "zipped.json": ("data.zipped.resolution=0.001024", "data.zipped.minimum_image_size=0"),
}


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[str, str, str]]:
    """(language, file name or "", content) of every fenced block with a language."""
    return [match.groups(default="") for match in BLOCK.finditer(text(page))]


# -- execution --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """The quickstart's files, a fine-tune, a style, pictures of a domain and of edges: what the pages suppose."""
    root = write_workspace(tmp_path_factory.mktemp("docs"))
    write_tiny_sdxl(root / "fine-tune", seed=1)
    write_pictures(root / "domain-pictures", count=4, seed=1)
    shutil.copyfile(root / "pictures" / "00.png", root / "edges.png")
    (root / "prompts.txt").write_text("a fox in the snow\na harbour at sunrise\n", encoding="utf-8")
    write_style(root / "model", root / "style.safetensors")
    with zipfile.ZipFile(root / "pictures.zip", "w") as archive:
        for path in sorted((root / "pictures").iterdir()):
            archive.write(path, path.name)
    return root


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


def arguments(line: str) -> list[str]:
    """A line of the shell as it is run here: the tiny model, and a size that takes seconds."""
    given = shlex.split(line)[1:]
    needs_data = "--config" in given
    if needs_data:
        given += ["--model", "model", *sets(TINY)]
        data = given[given.index("--data") + 1]
        given += sets(TINY_ENTRIES.get(data, TINY_DATA))
    if {"progressive", "segments.json"} & {*given}:
        given += sets(("max_train_steps=4",))  # a step for each stage
    if given[0] == "evaluate":
        given += ["--steps", "1,2", "--teacher-steps", "2", "--num-samples", "2"]
    return given


def run_shell(content: str) -> None:
    for line in content.splitlines():
        if line.startswith("distill "):
            said = command(*arguments(line))
            assert said.code == 0, f"{line}\n{said.out}\n{said.err}"


def run_python(content: str, names: dict[str, object], page: str) -> None:
    for real, substitute in SUBSTITUTES.items():
        content = content.replace(real, substitute)
    exec(compile(content, page, "exec"), names)


@pytest.mark.parametrize("page", EXECUTED)
def test_every_block_of_the_page_runs(page, workspace):
    names: dict[str, object] = {}
    shutil.rmtree(workspace / "output", ignore_errors=True)
    with no_services(workspace) as patch:
        patch.setattr("diffusers.ControlNetModel.from_pretrained", tiny_controlnet)
        for language, file, content in blocks(page):
            if file:
                (workspace / file).write_text(content, encoding="utf-8")
            elif language == "bash":
                run_shell(content)
            elif language == "python":
                run_python(content, names, page)
            else:
                pytest.fail(f"{page}: a block of {language} without a file name is neither run nor written")
    check_results(page, workspace)


def check_results(page: str, workspace: Path) -> None:
    """Something came out, and it is what the page is about."""
    from PIL import Image

    if page == "docs/lcm.md":
        names = ("", "-2", "-3", "-two", "-style", "-fine-tune", "-edges", "-full")
        for picture in (Image.open(workspace / f"harbour{name}.png") for name in names):
            assert picture.size == (EDGE, EDGE)
            assert all(low < high for low, high in picture.getextrema()), "neither black nor white"
    if page == "CONTRIBUTING.md":
        lines = (workspace / "output" / "fixed-guidance" / "losses.txt").read_text().splitlines()
        assert [int(line.split()[0]) for line in lines] == [1, 2]
        assert all(float(line.split()[1]) > 0 for line in lines)


# -- statements -------------------------------------------------------------------------------------------------------


def settings_named(page: str) -> list[str]:
    """Every `key=value` in inline code."""
    return re.findall(r"`((?:[a-z_][\w.-]*)=[\w.,:x-]+)`", re.sub(BLOCK, "", text(page)))


def of_family(registry, name: str, setting: str) -> bool:
    """Whether the setting is one of this family's own."""
    part, _, key = setting.partition("=")[0].partition(".")
    return part == "family_config" and key in registry.get("family", name).Config.model_fields


def test_every_setting_that_is_advised_is_accepted(workspace):
    from distill.core.config import load_configuration
    from distill.core.plugins import Registry

    advised = list(dict.fromkeys(setting for page in PAGES for setting in settings_named(page)))
    assert len(advised) > 20
    registry = Registry.load(installed=False)
    flags = {"pretrained_model_name_or_path": str(workspace / "model"), "output_dir": str(workspace / "none")}
    for setting in advised:
        own = [name for name in registry.names("family") if of_family(registry, name, setting)]
        load_configuration(
            registry,
            config_file=workspace / "config.json",
            data_file=workspace / "multidatabackend.json",
            flags=flags if "sdxl" in own or not own else {**flags, "model_family": own[0]},
            overrides=[f"data.your-dataset-name.instance_data_dir={workspace / 'pictures'}", setting],
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
    without_code = re.sub(BLOCK, "", text(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        found = (ROOT / page).parent / file if file else ROOT / page
        assert found.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(found), f"{page}: {target}"


def test_the_notices_shown_are_those_of_config_check():
    shown = re.findall(r"^    notice: (.+)$", text("docs/quickstart.md"), re.MULTILINE)
    assert shown == list(NOTICES)


def test_no_page_is_left_with_a_place_for_figures():
    pages = [Path(__file__).parents[1] / "README.md", *(Path(__file__).parents[1] / "docs").glob("*.md")]
    left = [page.name for page in pages if "@@" in page.read_text() or "<!-- figures" in page.read_text()]
    assert not left, left
