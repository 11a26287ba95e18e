"""Fuzzing of whatever people hand over: exit code 0 or 2, no traceback, below five seconds, nothing written elsewhere.

300 inputs in every run of the suite, the same ones each time; 20,000 with ``-m slow``.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import time
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from distill.core.engine.checkpoint import CheckpointState, CheckpointStore
from distill.core.errors import UserError
from distill.core.settings.dataset_settings import DatasetSettings
from distill.core.settings.run_settings import RunSettings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from support.config_files import distill

SECONDS = 5
FAST = {"configuration": 110, "data": 60, "table": 40, "caption": 30, "lora": 30, "manifest": 30}
SLOW_FACTOR = 20_000 / 300
SLOW = [pytest.mark.slow, pytest.mark.timeout(7200)]

NASTY = [
    "", " ", "\0", "a\0b", "\ud800", "\x1b[2J", "\u202e", "é" * 130, "a" * 256, "a/" * 3000, "../../x", "./x", "{env:}",
    "{env:NOPE}", "{env:PATH}", "http://[::1", "http://x:y/z.csv", "s3://", "gs://b", "file:///etc/hosts", "/dev/null",
    "/proc/self/mem", "1e999", "-1e308", "nan", "0x10", "1_0", "999999999999999999999999", "null", "none", "no", "true",
    "latest", "checkpoint-1", "lcm", "sdxl", "full", "pixel", "area", "images", "prompts", "text_embeds", "csv",
    "table.csv", "captions.txt", "webdataset", "parquet", "jsonl", "azure", "a,b", "1024x", "8x8,9", "<<", "&a", "*a",
    "%s%n", "${x}", "$(touch pwned)", "{", "[", "'", '"', "\\", "\r\n", "\ufeff", "2024-05-01",
    "!!python/name:os.system",
]  # fmt: skip
NUMBERS = [0, -1, 1, 2, 8, 9, 64, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**99, 10**400, 0.5, 1e-300, 1e300, -0.0]


def values() -> st.SearchStrategy:
    """Any value that JSON or Python's JSON has, with those that are known to be trouble in front."""
    leaves = st.one_of(
        st.sampled_from(NASTY), st.sampled_from(NUMBERS), st.none(), st.booleans(), st.text(max_size=20), st.integers(),
        st.floats(),
    )  # fmt: skip
    keys = st.sampled_from(["id", "path", "weight", "lcm", "sdxl", "w_min", "local", "data", "x", "\0", "k" * 300])
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=8
    )


RUN_KEYS = [*RunSettings.model_fields, "data", "distillation_config", "family_config", "optimizer_config",
            "tracker_config", "publisher_config", "evaluator_config", "quantizer_config", "--seed", "no"]  # fmt: skip
DATA_KEYS = [*DatasetSettings.model_fields, "csv_file", "jsonl_file", "parquet_file", "shards", "aws_bucket_name",
             "aws_endpoint_url", "parquet", "huggingface", "unknown"]  # fmt: skip


@st.composite
def configurations(draw) -> dict:
    return draw(st.dictionaries(st.sampled_from(RUN_KEYS), values(), max_size=4))


@st.composite
def data_files(draw):
    entry = {"id": "a", "instance_data_dir": "images"}
    entries = st.lists(
        st.dictionaries(st.sampled_from(DATA_KEYS), values(), max_size=3).map(lambda own: entry | own), max_size=3
    )
    return draw(entries | values())


@st.composite
def spoilt(draw, content: bytes) -> bytes:
    """Bytes with a few pieces replaced, repeated or cut off."""
    data = bytearray(content)
    for _ in range(draw(st.integers(0, 3))):
        start, length = draw(st.integers(0, len(data))), draw(st.integers(0, 8))
        data[start : start + length] = draw(st.binary(max_size=6) | st.sampled_from(NASTY).map(_bytes))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 9)) == 0 else data)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


@st.composite
def files(draw, contents) -> tuple[bytes, str]:
    """(bytes, suffix) of a configuration file, written well from nasty values, or spoilt."""
    content, suffix = draw(contents), draw(st.sampled_from([".json", ".yaml", ".toml"]))
    try:
        if suffix == ".toml":
            named = content if isinstance(content, dict) else {"data": content}
            text = "".join(f"{json.dumps(key)} = {json.dumps(value)}\n" for key, value in named.items())
        else:
            text = yaml.safe_dump(content) if suffix == ".yaml" else json.dumps(content)
    except (ValueError, TypeError, RecursionError, yaml.YAMLError):  # YAML has no huge numbers
        suffix, text = ".json", json.dumps(content, default=str)
    data = _bytes(text)
    return (draw(spoilt(data)) if draw(st.booleans()) else data), suffix


# -- the place ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with images and captions; what lies around it must stay as it is."""
    root = tmp_path_factory.mktemp("fuzz")
    work = root / "around" / "work"
    (work / "images").mkdir(parents=True)
    (work / "model").mkdir()
    for i in range(2):
        Image.new("RGB", (64, 64), (i, 90, 200)).save(work / f"images/{i}.png")
        (work / f"images/{i}.txt").write_text("a square\n")
    before = Path.cwd()
    os.chdir(work)
    assert distill("data", "report", "--output-dir", root / "first").exit_code == 0, "imports are no input's fault"
    yield work
    os.chdir(before)


def listing(work: Path, *, own: tuple[str, ...] = ()) -> dict[str, int]:
    """Files around and in the working folder with their sizes, without those that an example wrote itself."""
    top = work.parent.parent
    found = [path for path in top.rglob("*") if not any(part in own for part in path.relative_to(top).parts)]
    return {str(path): path.lstat().st_size for path in found if not path.is_dir()}


def check(work: Path, *arguments: object, own: tuple[str, ...]) -> None:
    before, start = listing(work, own=own), time.process_time()
    result = distill(*map(str, arguments))
    seconds = time.process_time() - start  # the machine may be busy; what hangs meets the test's own limit
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"a traceback: {result.stderr[-500:]}") from result.exception
    assert result.exit_code in (0, 2), result.output[-1000:]
    assert "Traceback" not in result.stderr
    assert seconds < SECONDS, f"{seconds:.1f} s"
    assert listing(work, own=own) == before


def fuzz(name: str, **strategies):
    """A test of so many inputs that all together make 300, and a slow one of as many that they make 20,000."""

    def decorate(body):
        def made(examples: int):
            quiet = settings(
                max_examples=examples, derandomize=True, deadline=None, database=None, print_blob=False,
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            return quiet(given(**strategies)(body))

        slow = pytest.param(made(round(FAST[name] * SLOW_FACTOR)), id="slow", marks=SLOW)

        @pytest.mark.parametrize("run", [pytest.param(made(FAST[name]), id=str(FAST[name])), slow])
        def test(run, place):
            run(place=place)

        return test

    return decorate


# -- what is handed over --------------------------------------------------------------------------------------------


@fuzz("configuration", file=files(configurations()), override=st.tuples(st.sampled_from(RUN_KEYS), values()))
def test_configuration(place, file, override):
    content, suffix = file
    path = place / f"config{suffix}"
    path.write_bytes(content)
    text = f"{override[0]}={json.dumps(override[1])}"
    check(place, "config", "check", "--config", path, "--set", text, own=(path.name,))


@fuzz("data", file=files(data_files()))
def test_data_file(place, file):
    content, suffix = file
    path = place / f"data{suffix}"
    path.write_bytes(content)
    check(place, "config", "check", "--data", path, own=(path.name,))


ROWS = {"image": ["images/0.png", "images/1.png"], "caption": ["one", "two"], "width": [64, 64], "height": [64, 64]}


def _table(kind: str) -> bytes:
    table = pa.table(ROWS)
    if kind == "csv":
        return b"image,caption,width,height\nimages/0.png,one,64,64\nimages/1.png,two,64,64\n"
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode()
    stream = io.BytesIO()
    pq.write_table(table, stream)
    return stream.getvalue()


@fuzz("table", kind=st.sampled_from(["csv", "jsonl", "parquet"]), data=st.data())
def test_table(place, kind, data):
    path = place / f"table.{kind}"
    path.write_bytes(data.draw(spoilt(_table(kind)) | st.binary(max_size=60)))
    entry = {"id": "a", "type": kind, f"{kind}_file": path.name, "image_column": "image"}
    beside = {"id": "a", "instance_data_dir": ".", "metadata_file": path.name, "caption_strategy": kind}
    alone = {"id": "a", "dataset_type": "prompts", "prompts_file": path.name}
    _report(place, data.draw(st.sampled_from([entry, beside, alone])), path.name)


@fuzz("caption", content=spoilt(b"a cat, on a mat\nand a dog\n") | st.binary(max_size=60), data=st.data())
def test_caption(place, content, data):
    (place / "captions").mkdir(exist_ok=True)
    shutil.copy(place / "images" / "0.png", place / "captions")
    (place / "captions" / "0.txt").write_bytes(content)
    (place / "captions.txt").write_bytes(content)
    beside = {
        "id": "a",
        "instance_data_dir": "captions",
        "caption_shuffle": True,
        "caption_filter_list": "captions.txt",
    }
    alone = {"id": "a", "dataset_type": "prompts", "prompts_file": "captions.txt"}
    _report(place, data.draw(st.sampled_from([beside, alone])), "captions", "captions.txt")


def _report(place: Path, entry: dict, *own: str) -> None:
    (place / "data.json").write_text(json.dumps([entry]))
    method = ["--method", "dmd2"] if entry.get("dataset_type") == "prompts" else []
    shutil.rmtree(place / "out", ignore_errors=True)
    check(
        place, "data", "report", "--data", place / "data.json", "--output-dir", place / "out", *method,
        own=(*own, "data.json", "out"),
    )  # fmt: skip


def _lora(header: dict[str, object]) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(64)


GOOD_LORA = save({"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": torch.zeros(2, 8)}, {"format": "pt"})
TENSOR = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "X"]) | values(), "shape": st.just([4, 4]) | values(),
     "data_offsets": st.just([0, 64]) | values()}
)  # fmt: skip
LORA_KEYS = st.sampled_from([
    "unet.down_blocks.0.attentions.0.proj_in.lora_A.weight", "lora_unet_down_blocks_0_attentions_0_proj_in.alpha",
    "lora_unet_x.hada_w1_a", "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "__metadata__", "", "a",
])  # fmt: skip


@fuzz(
    "lora",
    content=spoilt(GOOD_LORA) | st.dictionaries(LORA_KEYS, TENSOR | values(), max_size=4).map(_lora),
    key=st.sampled_from(["teacher_lora", "init_lora"]),
)
def test_lora_header(place, content, key):
    path = place / "lora.safetensors"
    path.write_bytes(content)
    value = str(path) if key == "init_lora" else json.dumps([{"path": str(path)}])
    check(place, "config", "check", "--set", f"{key}={value}", own=(path.name,))


def _checkpoint(folder: Path) -> bytes:
    store = CheckpointStore(folder, limit=None)
    saved = store.save(CheckpointState(3, {"network-student": {"a": torch.ones(3)}}, {"identity": {}}))
    return (saved / "manifest.json").read_bytes()


MANIFEST_KEYS = st.sampled_from(["format", "step", "groups", "files", "x"])


@fuzz("manifest", changes=st.dictionaries(MANIFEST_KEYS, values(), max_size=3), data=st.data())
def test_checkpoint_manifest(place, changes, data):
    folder = place / "run"
    good = _checkpoint(folder)
    content = json.loads(good) | changes
    text = data.draw(st.just(_bytes(json.dumps(content))) | spoilt(good))
    (folder / "checkpoint-3" / "manifest.json").write_bytes(text)
    before, start = listing(place, own=("run",)), time.process_time()
    store = CheckpointStore(folder, limit=None)
    assert store.latest() in (None, folder / "checkpoint-3")
    with suppress(UserError):
        assert store.load(folder / "checkpoint-3").step >= 0
    assert time.process_time() - start < SECONDS
    assert listing(place, own=("run",)) == before
    shutil.rmtree(folder)
