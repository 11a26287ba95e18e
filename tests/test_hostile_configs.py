"""Crafted configurations: refused at once, by name, with exit code 2; nothing of them is run."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from distill.core.errors import SHOWN_FINDINGS
from PIL import Image
from support.config_files import Pair, distill, said

SECONDS = 2.0
DEEP, DIGITS = 5000, "9" * 5000


def bomb(levels: int = 9, *, merge: bool = False) -> str:
    """Aliases of aliases, which stand for nine to the power of `levels` values."""
    lines = ["a0: &a0 {x: 1}" if merge else "a0: &a0 [x]"]
    for level in range(1, levels + 1):
        several = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} " + (f"{{<<: [{several}]}}" if merge else f"[{several}]"))
    return "\n".join(lines)


FILES = {
    "nested lists.json": ('{"seed": ' + "[" * DEEP + "]" * DEEP + "}", "nests more than 64 objects and lists"),
    "nested objects.json": ('{"a":' * DEEP + "1" + "}" * DEEP, "nests more than 64 objects and lists"),
    "nested a little.json": ('{"a":' * 100 + "1" + "}" * 100, "nests more than 64 objects and lists"),
    "nested flow.yaml": ("seed: " + "[" * 100_000, "line 1, column 70"),
    "nested blocks.yaml": ("".join(f"{' ' * i}a:\n" for i in range(300)), "nests more than 64 objects and lists"),
    "nested.toml": ("seed = " + "[" * DEEP + "]" * DEEP, "nests more than 64 objects and lists"),
    "dotted.toml": (".".join(["a"] * 100_000) + " = 1", "nests more than 64 objects and lists"),
    "digits.json": (f'{{"seed": {DIGITS}}}', "is a number of 5,000 digits, and no key takes more than 100"),
    "negative digits.json": (f'{{"lora_alpha": -{DIGITS}}}', "is a number of 5,001 digits"),
    "digits.yaml": (f"seed: {DIGITS}", "line 1, column 7"),
    "hex digits.yaml": (f"seed: 0x{'f' * 5000}", "is a number of 5,002 digits"),
    "digits.toml": (f"seed = {DIGITS}", "is a number of 5,000 digits, and no key takes more than 100"),
    "date.toml": ("tracker_run_name = 2024-05-01", "is a date, and no key takes one"),
    "python tag.yaml": ("seed: !!python/object/apply:os.system ['touch pwned']", "leave out the tag"),
    "own tag.yaml": ("seed: !include other.yaml", "could not determine a constructor for the tag '!include'"),
    "binary.yaml": ("output_dir: !!binary aGVsbG8=", "could not determine a constructor"),
    "wrong tag.yaml": ("seed: !!int x", "cannot be read as 'int'"),
    "bomb.yaml": (bomb(), "stands for more than 1,000,000 values, aliases written out"),
    "merge bomb.yaml": (bomb(merge=True), "stands for more than 1,000,000 values, aliases written out"),
    "recursion.yaml": ("seed: &a [*a]", "the alias *a stands inside what it names"),
    "deep aliases.yaml": ("a: &a " + "[" * 40 + "]" * 40 + "\nb: " + "[" * 40 + "*a" + "]" * 40, "nests more than 64"),
    "key of a list.yaml": ("{[1]: 2}", "a key must be a text"),
    "twice.yaml": ("seed: 1\nseed: 2", "stands twice in one object"),
    "wrong merge.yaml": ("<<: 3", "expected a mapping or list of mappings for merging"),
    "nul.json": ('{"output_dir": "a\\u0000b"}', "output_dir = 'a\\x00b': holds a NUL character"),
    "surrogate.json": ('{"output_dir": "\\ud800"}', "holds half of a character"),
    "surrogate key.json": ('{"\\ud800": 1}', "holds half of a character"),
    "escape.json": ('{"\\u001b[2J": 1}', "\\x1b[2J = 1: is not a known key"),
    "infinite.json": ('{"learning_rate": Infinity}', "is not a finite number"),
    "large.json": ('{"learning_rate": 1e999}', "is not a finite number"),
    "seed.json": ('{"seed": 18446744073709551616}', "at least 0 and below 9223372036854775808"),
    "long name.json": (json.dumps({"output_dir": "a" * 256}), "cannot be used as a path: file name too long"),
    "long plugin.json": (json.dumps({"plugins": ["a" * 256]}), "cannot be used as a path: file name too long"),
    "long data file.json": (json.dumps({"data_backend_config": "a/" * 4000}), "file name too long"),
    "device.json": ('{"output_dir": "/dev/null"}', "is a pipe or a device, not a file or folder"),
    "nobody.json": ('{"model_config_source": "~nobody-there/x"}', "is not a folder"),
    "truth.json": ('{"teacher_lora": [{"path": "x/y", "weight": true}]}', "teacher_lora.0.weight = True: is a truth"),
    "resolution.json": ('{"resolution": 1e300}', "would be 1e+300 pixels"),
    "rank.json": ('{"lora_rank": 1e30}', "at least 1 and at most 16384"),
    "validation.json": ('{"validation_resolution": 1000000000}', "has an edge above 16,384 pixels"),
    "samples.json": ('{"train_batch_size": 65536, "gradient_accumulation_steps": 65536}', "1,048,576 samples a step"),
    "empty.json": ("", "is not JSON: Expecting value"),
    "empty.yaml": ("", "is not an object of keys"),
    "list.yaml": ("- a", "is not an object of keys"),
}  # fmt: skip
"""Name of a configuration file -> its text, and what is said."""


@pytest.fixture(scope="module", autouse=True)
def _imported():
    """What the first command imports is no matter of the files."""
    assert distill("config", "check").exit_code == 0


def refused(*arguments: object) -> str:
    start = time.process_time()
    result = distill("config", "check", *arguments)
    seconds = time.process_time() - start
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2
    assert seconds < SECONDS
    return said(result.stderr)


@pytest.mark.parametrize("name", FILES)
def test_a_crafted_configuration_is_refused_at_once(name, tmp_path, monkeypatch):
    text, words = FILES[name]
    monkeypatch.chdir(tmp_path)
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    assert words in refused("--config", file, "--set", "max_train_steps=1")
    assert [path.name for path in tmp_path.iterdir()] == [name], "nothing of it is run"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"seed": 1}'.encode("utf-16"), "is not UTF-8 text"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b'{"seed": 1}\x00', "is not JSON: Extra data"),
        (b" " * (16 * 2**20 + 1), "has more than 16 MiB"),
    ],
)
def test_bytes_that_are_no_configuration(content, words, tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    assert words in refused("--config", file)


def test_a_byte_order_mark_is_none_of_the_content(tmp_path):
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"seed": 1}')
    assert distill("config", "check", "--config", tmp_path / "config.json").exit_code == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed=" + "[" * DEEP, "seed = "),
        (f"seed={DIGITS}", "is a number of 5,000 digits"),
        (".".join(["a"] * DEEP) + "=1", "names 5,000 keys inside each other"),
        ("output_dir=\udcff", "bytes that are not UTF-8"),
        ("lora_rank=1e30", "at least 1 and at most 16384"),
        ("learning_rate=1e308", "above 0 and at most 10"),
        (f"output_dir={'é' * 128}", "file name too long"),
    ],
)
def test_crafted_overrides(text, words):
    assert words in refused("--set", text)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"id": "a" * 255}, "has more than 200 bytes, which is too long for the files that are named by it"),
        ({"id": "é" * 101}, "has more than 200 bytes"),
        ({"id": "a\0b"}, "holds a NUL character"),
        ({"resolution": 1e300}, "would be 1e+300 pixels"),
        ({"maximum_image_size": 1e300}, "would be 1e+300 pixels"),
        ({"aspect_bucket_rounding": 64, "aspect_bucket_alignment": "x"}, "data.pets.aspect_bucket_alignment = 'x'"),
        ({"type": "csv", "csv_file": "http://[::1"}, "is not a URL: Invalid IPv6 URL"),
        ({"type": "csv", "csv_file": "http://host:port/x.csv"}, "is not a URL: Port could not be cast"),
        ({"type": "webdataset", "shards": "/proc/self/mem"}, "cannot be read: Input/output error"),
        ({"type": "huggingface", "dataset_name": "/"}, "is the root of all folders"),
        ({"cache_dir_vae": "a" * 300}, "cannot be used as a path: file name too long"),
    ],
)
def test_crafted_datasets(entry, words, tmp_path):
    pair = Pair(tmp_path, data=[{"id": "pets", "instance_data_dir": "images", **entry}])
    if "type" in entry:
        del pair.data[0]["instance_data_dir"]
    pair.write()
    assert words in refused(*pair.options())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in this system's folders")
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop"])
def test_what_is_no_file_is_not_read(kind, tmp_path):
    make = {
        "pipe": os.mkfifo,
        "device": lambda path: path.symlink_to("/dev/zero"),
        "folder": Path.mkdir,
        "loop": lambda path: path.symlink_to(path),
    }[kind]
    for name in ("x.json", "x.py", "x.txt", "x.csv"):
        make(tmp_path / name)
    words = {"folder": "is a folder", "loop": "too many levels of symbolic links"}.get(kind, "is a pipe or a device")
    assert words in refused("--config", tmp_path / "x.json")
    assert words in refused("--data", tmp_path / "x.json")
    assert words in refused("--plugin", tmp_path / "x.py")
    pair = Pair(tmp_path, {"validation_prompt_library": "x.txt"})
    pair.data = [
        {"id": "a", "dataset_type": "prompts", "prompts_file": "x.csv"},
        {"id": "b", "instance_data_dir": "images", "caption_filter_list": "x.txt"},
        {"id": "c", "type": "csv", "csv_file": "x.csv"},
    ]
    pair.write()
    told = refused(*pair.options())
    for key in ("validation_prompt_library", "prompts_file", "caption_filter_list"):
        assert key in told


def test_twenty_thousand_unknown_keys_take_less_than_a_second(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({f"unknown_key_{number}": number for number in range(20_000)}))
    refused("--config", file)  # imports, and the schema
    start = time.process_time()
    told = refused("--config", file)
    assert time.process_time() - start < 1
    assert "the configuration has 20000 problems" in told
    assert f"unknown_key_{SHOWN_FINDINGS - 1} = " in told
    assert f"unknown_key_{SHOWN_FINDINGS} = " not in told
    assert told.endswith("... and 19,900 more")


def test_merge_keys_and_dates_are_ordinary_yaml(tmp_path):
    file, data = tmp_path / "config.yaml", tmp_path / "data.yaml"
    (tmp_path / "images").mkdir()
    file.write_text("tracker_run_name: 2024-05-01\nvalidation_prompt: [=, 12.5.2024]\nmax_train_steps: 5\n")
    data.write_text(
        "- &pets {id: pets, instance_data_dir: images, repeats: 2, crop: no}\n"
        "- {<<: *pets, id: again, repeats: 3}\n"
        "- <<: [{id: last, repeats: 7}, *pets]\n  crop: yes\n"
    )
    result = distill("config", "show", "--config", file, "--data", data)
    assert result.exit_code == 0, result.stderr
    shown = json.loads(result.stdout)
    assert (shown["tracker_run_name"], shown["validation_prompt"]) == ("2024-05-01", ["=", "12.5.2024"])
    assert [(entry["id"], entry["repeats"], entry["crop"]) for entry in shown["data"]] == [
        ("pets", 2, False), ("again", 3, False), ("last", 7, True),
    ]  # fmt: skip


def test_an_address_that_is_none_is_set_aside_and_not_tried_again(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "images/0.png")
    table = "image,caption\nimages/0.png,one\nhttp://host:port/1.png,two\nhttp://" + "a" * 70 + ".x/2.png,three\n"
    (tmp_path / "table.csv").write_text(table)
    (tmp_path / "data.json").write_text(json.dumps([{"id": "a", "type": "csv", "csv_file": "table.csv"}]))
    start = time.monotonic()
    result = distill("data", "report", "--data", tmp_path / "data.json", "--output-dir", tmp_path / "out")
    assert time.monotonic() - start < 60, "twelve attempts took 108 s"
    assert result.exit_code == 0, result.stderr
    report = (tmp_path / "out/data/a/report.md").read_text()
    assert "1 of 3 images used" in report
    assert "host:port" in report
