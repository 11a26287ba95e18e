"""The Dockerfile, as far as it can be held to without Docker: it is never built here."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.pages import ROOT, text

SHELL = {"pip", "mkdir", "chmod"}
"""Programs that the base image has: Debian's, and the one of Python."""


def instructions() -> list[tuple[str, str]]:
    """(instruction, its arguments), comments left out and lines joined."""
    content = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in content.splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines()) if name]


def of(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


def readme_commands() -> list[str]:
    block = re.search(r"<!-- run commands -->\n(?:<!--[^\n]*-->\n)*```bash\n(.*?)^```", text("README.md"), re.M | re.S)
    assert block
    return block[1].splitlines()


def test_it_installs_and_runs_what_the_readme_says():
    _, install, run = readme_commands()
    given = dict(each.split("=", 1) for each in of("ARG"))
    installs = [line for line in of("RUN") if line.startswith("pip ")]
    assert [line.replace("${INSTALL}", given["INSTALL"].strip('"')) for line in installs] == [install]
    (entry,), (arguments,) = of("ENTRYPOINT"), of("CMD")
    assert shlex.join([*json.loads(entry), *json.loads(arguments)]) == run


def test_the_base_image_is_pinned_to_a_python_that_is_supported():
    (image,) = of("FROM")
    version = re.fullmatch(r"python:(\d+)\.(\d+)-slim-[a-z]+", image)
    assert version, f"{image} names its version and its system"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f">={version[1]}.{version[2]}" == project["requires-python"]


def test_its_programs_are_those_of_the_image_and_its_order_is_right():
    names = [name for name, _ in instructions()]
    assert names.index("COPY") < names.index("RUN") < names.index("USER") < names.index("ENTRYPOINT")
    for line in of("RUN"):
        assert {shlex.split(each)[0] for each in line.split("&&")} <= SHELL, line
    assert of("COPY") == [". ."]
    made = {folder for line in of("RUN") for folder in shlex.split(line) if folder.startswith("/data/")}
    variables = dict(each.split("=") for each in shlex.split(" ".join(of("ENV"))))
    assert variables["HF_HOME"] in made, "any user may write there"
    assert "chmod -R a+rwX /data" in " ".join(of("RUN"))
    assert variables["HOME"] == "/data"
    assert of("WORKDIR")[-1] == "/data", "the README's command writes to output/ in the working directory"
    assert "/data/output" in made


def ignored() -> list[str]:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"(\*\*/)?[\w.*-]+", line) for line in lines), "plain names, which the test below reads"
    return lines


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> Path:
    """What Docker would copy into the image."""
    at_root = {line for line in ignored() if "/" not in line}
    anywhere = shutil.ignore_patterns(*(line.removeprefix("**/") for line in ignored() if "/" in line))

    def leave_out(folder: str, names: list[str]) -> set[str]:
        return anywhere(folder, names) | (at_root & {*names} if Path(folder) == ROOT else set())

    return shutil.copytree(ROOT, tmp_path_factory.mktemp("context") / "distill", ignore=leave_out)


def test_what_is_copied_holds_all_that_the_command_needs_and_no_more(context):
    """The README's command, up to where it would train."""
    project = tomllib.loads((context / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name in ("constraints.txt", project["readme"], *project["license-files"]):
        assert (context / name).is_file()
    assert not {"tests", ".git", "output"} & {path.name for path in context.iterdir()}
    environment = {**os.environ, "PYTHONPATH": str(context.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    arguments = json.loads(of("CMD")[0])
    command = [sys.executable, "-P", "-m", "distill", *arguments, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=context.parent)
    assert done.returncode == 0, done.stderr
    assert f"{context}/model_families/assets" in done.stdout, "the miniature of the copy"
