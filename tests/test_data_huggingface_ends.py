# ruff: noqa: F811 - fixtures of another file
"""Builds of a stream that are killed, hubs that refuse, and entries in the data file."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.config_files import Pair, distill, said
from support.data_helpers import pipeline, take
from support.forks import ended
from support.hf_sets import FORMS, parquet, rows_of
from test_data_huggingface import folder, hf, library  # noqa: F401 - fixtures
from test_data_pipeline import MIXED, by_position

KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from types import SimpleNamespace
import datasets
from distill.core.data.index import listing, sequential
from distill.data_backends import _hf_source, huggingface
from support import data_helpers
from support.data_helpers import FakeFamily, pipeline
from test_data_huggingface import hf

root, form, stop, calls = Path(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5])
datasets.config.HF_DATASETS_CACHE = root / "hf"
data_helpers.REGISTRY = SimpleNamespace(get=lambda kind, name: huggingface.HuggingFaceBackend)
huggingface.CHUNK = huggingface.GROUP = 2
listing.KEPT_SECONDS = -1
sequential.RESUME_POINT_EVERY = sequential.LEAP = 1

def kill_after(function, count):
    def counted(*arguments):
        counted.left -= 1
        if counted.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    counted.left = count
    return counted

scan = _hf_source.Source.scan
def noted(self, *arguments):
    for number, row, resume_point in scan(self, *arguments):
        print(stop, number, flush=True)
        yield number, row, resume_point
_hf_source.Source.scan = noted
family = FakeFamily()
if stop == "index":
    huggingface.probe = kill_after(huggingface.probe, calls)
elif stop == "latents":
    family.encode_images = kill_after(family.encode_images, calls)
data, _ = pipeline(hf(root / form, where=root, streaming=True), root=root, family=family)
data.prepare()
print("encoded", family.num_images)
"""


@pytest.mark.parametrize("form", ["parquet", pytest.param("tars", marks=pytest.mark.slow)])
def test_killed_builds_of_a_stream_are_resumed(folder, tmp_path, form):
    FORMS[form](rows_of(folder), tmp_path / form)

    def run(stop: str, calls: int = 0) -> tuple[int, list[str]]:
        result = ended("-c", KILLED, Path(__file__).parent, tmp_path, form, stop, calls, timeout=240)
        assert result.returncode in (0, -signal.SIGKILL), result.stderr
        return result.returncode, result.stdout.splitlines()

    code, lines = run("index", 7)
    assert code == -signal.SIGKILL
    assert lines == [f"index {number}" for number in range(8)]
    code, lines = run("latents", 2)
    assert code == -signal.SIGKILL
    index = [int(line.split()[1]) for line in lines]
    assert index[:4] == [6, 7, 8, 9], "the listing goes on behind its last chunk"
    assert index[4:] == list(range(len(index) - 4)), "then the images are read once"
    code, lines = run("rest")
    assert code == 0
    assert lines[-1] != f"encoded {len(MIXED)}"
    assert lines[0] not in ("rest 0", "rest 1"), "images whose latents are there are not read again"
    resumed, _ = pipeline(hf(tmp_path / form, where=tmp_path, streaming=True), root=tmp_path)
    whole, _ = pipeline(hf(tmp_path / form, where=tmp_path / "whole", streaming=True), root=tmp_path / "whole")
    assert by_position([take(resumed, 15)]) == by_position([take(whole, 15)])
    indexes = [
        next(place.rglob("set.index.arrow")).read_bytes() for place in (tmp_path / "latents", tmp_path / "whole")
    ]
    assert indexes[0] == indexes[1]


HUB = """
import http.server, os, sys, threading

class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        codes = {"gated": (403, "GatedRepo"), "missing": (404, "RepoNotFound"), "unborn": (404, "RevisionNotFound")}
        status, code = codes[self.path.split("/")[3]]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
    do_HEAD = do_POST = do_GET
    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": sys.argv[1], "HF_HUB_OFFLINE": "0"}
if sys.argv[2] == "down":
    server.server_close()
else:
    threading.Thread(target=server.serve_forever, daemon=True).start()
from distill.core.errors import BadValue, DistillError
from distill.data_backends.huggingface import HuggingFaceBackend
for name in sys.argv[2:]:
    try:
        HuggingFaceBackend(HuggingFaceBackend.Config(dataset_name=f"someone/{name}")).identity()
    except BadValue as error:
        print(error.key, error.problem, error.remedy, sep="; ")
    except DistillError as error:
        print(error.exit_code, error)
"""


def ask_hub(tmp_path, *names: str) -> list[str]:
    command = [sys.executable, "-c", HUB, str(tmp_path / "home"), *names]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert not result.returncode, result.stderr
    return result.stdout.splitlines()


def test_refusals_of_the_hub_become_errors_with_a_remedy(tmp_path):
    gated, missing, unborn = ask_hub(tmp_path, "gated", "missing", "unborn")
    assert gated.startswith("dataset_name; is a gated dataset, and this machine has no access to it; ask for access on")
    assert gated.endswith("/datasets/someone/gated, then log in: hf auth login (or HF_TOKEN)")
    assert missing.startswith(
        "dataset_name; is neither on the Hugging Face hub nor a path that is there; check the spell"
    )
    assert unborn == "revision; is no revision of someone/unborn; name a branch, tag or commit"


@pytest.mark.slow
def test_a_hub_that_does_not_answer_ends_the_run_resumable(tmp_path):
    first, second = ask_hub(tmp_path, "down")
    assert first.startswith("1 the dataset someone/down on the Hugging Face hub cannot be reached: Couldn't reach")
    assert "start the run again" in second


# -- the data file ----------------------------------------------------------------------------------------------------


def check(tmp_path, **values):
    """`distill config check` on the pair with a dataset of Parquet files."""
    from support.data_helpers import fill

    pair = Pair(tmp_path)
    place = parquet(rows_of(fill(tmp_path / "set", MIXED)), pair.folder / "pq")
    entry = {"id": "pets", "type": "huggingface", "dataset_name": place.name, "resolution": 64, **values}
    pair.data = [{key: value for key, value in entry.items() if value is not None}]
    pair.write()
    return distill("config", "check", *pair.options())


def test_the_established_trainers_entry_is_read(tmp_path):
    columns = {"caption_column": ["meta.caption", "file"], "width_column": "w", "filter_func": {"min_width": 16}}
    result = check(
        tmp_path, type="hf", huggingface=columns, caption_strategy="huggingface", metadata_backend="huggingface",
        name_column="file", cache_dir="downloads",
    )  # fmt: skip
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"caption_column": "captoin"}, "data.pets.caption_column = 'captoin': the dataset has no column 'captoin'"),
        ({"huggingface": {"caption_column": "captoin"}}, "data.pets.caption_column = 'captoin': the dataset has no"),
        ({"split": "test"}, "data.pets.split = 'test': the dataset has no split 'test'; it has 'train'"),
        ({"filter_func": {"a": {"~": 1}}}, "'a' has the unknown comparison '~'"),
        ({"dataset_name": "./absent"}, "does not exist remedy: give a folder or file that is there, or a hub id"),
        ({"huggingface": {"filter_fun": {}}}, "data.pets.filter_fun = {}: is not a known key remedy: did you mean"),
        ({"type": "local", "dataset_name": None, "instance_data_dir": "pq", "caption_strategy": "huggingface"},
         "takes captions from samples that come with them"),
    ],
)  # fmt: skip
def test_mistakes_are_found_with_the_configuration(tmp_path, values, message):
    result = check(tmp_path, **values)
    assert result.exit_code == 2, result.output
    assert message in said(result.stderr), said(result.stderr)
