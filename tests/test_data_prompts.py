"""Captions alone: from files and folders to batches without latents, through runs, caches and scores."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from distill.core.errors import Interrupted, UserError
from distill.core.evaluation.evaluators import build_evaluators
from distill.core.plugin_api.evaluator import EvaluationSetting
from distill.core.registry.registry import Registry
from support.config_files import distill, said
from support.data_helpers import FakeFamily, entry, fill, pipeline, prompts, take
from support.small_run import execute, losses, write_run
from test_data_pipeline import MIXED

PLUGIN = Path(__file__).parent / "support" / "captions_plugin.py"
TEXTS = [f"prompt, number {number}" for number in range(10)]


def write_folder(folder: Path) -> None:
    (folder / "below").mkdir(parents=True)
    (folder / "a.txt").write_text("\n".join(TEXTS[:4]) + "\n\n")
    (folder / "below" / "b.txt").write_text("\r\n".join(TEXTS[4:]))
    (folder / "notes.md").write_text("no prompt")


WRITERS = {
    "p.txt": lambda file: file.write_text("\ufeff" + "\n\n".join(f"  {text} " for text in TEXTS)),
    "list.json": lambda file: file.write_text(json.dumps(TEXTS)),
    "object.json": lambda file: file.write_text(json.dumps({str(n): text for n, text in enumerate(TEXTS)})),
    "p.jsonl": lambda file: file.write_text(
        "\n\n".join(json.dumps({"other": n if n % 2 else [n], "caption": text}) for n, text in enumerate(TEXTS))
    ),
    "p.csv": lambda file: file.write_text("n,text\n" + "".join(f'{n},"{text}"\n' for n, text in enumerate(TEXTS))),
    "p.parquet": lambda file: pq.write_table(
        pa.table({"caption": pa.array(TEXTS).dictionary_encode(), "n": range(10)}), file
    ),
    "folder": write_folder,
}


def lines_file(root: Path, count: int = 10, *, name: str = "p.txt") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("".join(f"prompt number {number}\n" for number in range(count)))
    return root / name


def without_latents(steps_of_each_rank):
    """What :func:`by_position` gives, for batches that have none."""
    joined = []
    for step in zip(*steps_of_each_rank, strict=True):
        found = {}
        for batch in [batch for rank in step for batch in rank]:
            assert batch.latents is None
            for row, position in enumerate(batch.positions):
                cond = {name: value[row].tolist() for name, value in batch.cond.items()}
                found[position] = (batch.keys[row], batch.captions[row], cond)
        joined.append(dict(sorted(found.items())))
    return joined


# -- sources -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_every_source_gives_the_same_prompts(name, tmp_path):
    WRITERS[name](tmp_path / name)
    key = "instance_data_dir" if name == "folder" else "prompts_file"
    family = FakeFamily()
    data, lines = pipeline(prompts("p", **{key: tmp_path / name}), root=tmp_path, family=family, images=False)
    report = data.prepare()
    assert (data.num_samples, data.steps_per_epoch(), report.captions_encoded) == (10, 5, 10)
    assert not family.batches
    assert family.released == 1
    assert "dataset 'p': 10 of 10 prompts in 1 bucket (32x32: 10), 10 different captions" in lines
    assert any(line.endswith("10 captions encoded") for line in lines)
    seen = Counter()
    for (batch,) in take(data, 5):
        assert batch.latents is None
        assert batch.latent_shape == (3, 4, 4)
        assert batch.to("cpu").latent_shape == (3, 4, 4)
        assert batch.cond["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 2
        assert torch.equal(batch.cond["pooled"], FakeFamily().encode_prompts(list(batch.captions))["pooled"])
        seen.update(zip(batch.keys, batch.captions, strict=True))
    assert set(seen.values()) == {1}
    assert {caption for _, caption in seen} == set(TEXTS)
    assert len({key for key, _ in seen}) == 10


def test_keys_name_the_line_or_row_of_a_prompt(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\nthree\n")
    write_folder(tmp_path / "folder")
    file, _ = pipeline(prompts("f", prompts_file=tmp_path / "p.txt"), root=tmp_path, images=False)
    folder, _ = pipeline(prompts("d", instance_data_dir=tmp_path / "folder"), root=tmp_path, images=False)
    whole, _ = pipeline(
        prompts("w", instance_data_dir=tmp_path / "folder", disable_multiline_split=True), root=tmp_path, images=False
    )
    found = {}
    for data, steps in ((file, 1), (folder, 5), (whole, 1)):
        for (batch,) in take(data, steps):
            found |= dict(zip(batch.keys, batch.captions, strict=True))
    assert found["f/1"] == "one"
    assert found["f/3"] == "three"
    assert found["d/a.txt:2"] == TEXTS[1]
    assert found["d/below/b.txt:6"] == TEXTS[9]
    assert found["w/a.txt"] == " ".join(TEXTS[:4])
    assert len(found) == 14


def test_empty_and_broken_prompts_are_left_out_and_counted(tmp_path):
    pq.write_table(pa.table({"caption": ["a cat", None, "  ", "a bad word", "a dog"]}), tmp_path / "p.parquet")
    write_folder(tmp_path / "folder")
    (tmp_path / "folder" / "c.txt").write_bytes(b"\xff\x00\xff")
    (tmp_path / "folder" / "d.txt").write_text("\n")
    table = prompts("table", prompts_file=tmp_path / "p.parquet", caption_filter_list=("a bad word",))
    folder = prompts("folder", instance_data_dir=tmp_path / "folder")
    data, lines = pipeline(table, folder, root=tmp_path, images=False)
    report = data.prepare()
    assert data.num_samples == 12
    assert report.datasets["table"].left_out == {"no caption": 3}
    assert report.datasets["folder"].left_out == {"no caption": 1}
    assert report.quarantined == {"folder/c.txt": "it is not UTF-8 (byte 0)"}
    assert "c.txt: it is not UTF-8" in " ".join(lines)
    assert (tmp_path / "cache" / "prompts" / "folder" / "folder.quarantine.txt").read_text().startswith("c.txt")
    (tmp_path / "p.txt").write_text("a bad word\n")
    empty = prompts("empty", prompts_file=tmp_path / "p.txt", caption_filter_list=("a bad word",))
    with pytest.raises(UserError, match="dataset 'empty' has no prompt to train on: all 1 in .*p.txt.*no caption"):
        pipeline(empty, root=tmp_path, images=False)[0].prepare()


def test_prompts_come_from_several_nested_and_fallback_columns(tmp_path):
    rows = [
        {"a": "one", "m": {"c": ["two", "three"], "t": [{"v": "four"}, {"v": None}]}, "back": "never"},
        {"a": None, "m": {"c": [], "t": []}, "back": "five"},
        {"a": " ", "m": None, "back": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    (tmp_path / "p.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    for file in ("p.parquet", "p.jsonl"):
        columns = {"caption_column": ("a", "m.c", "m.t.v"), "fallback_caption_column": ("back",)}
        entry = prompts("p", prompts_file=tmp_path / file, **columns)
        data, _ = pipeline(entry, root=tmp_path / file.replace(".", "-"), images=False)
        assert data.prepare().datasets["p"].left_out == {"no caption": 1}
        found = {}
        for (batch,) in take(data, 5):
            found |= dict(zip(batch.keys, batch.captions, strict=True))
        second = "p/2" if file == "p.parquet" else "p/3"
        assert found == {"p/1#0": "one", "p/1#1": "two", "p/1#2": "three", "p/1#3": "four", second: "five"}


def test_a_mistake_far_into_a_file_names_its_line(tmp_path):
    far = b"".join(b"prompt %d\n" % number for number in range(20_000))
    (tmp_path / "p.txt").write_bytes(far + b"caf\xe9\n")
    (tmp_path / "p.csv").write_bytes(b"caption\n" + far + b"one, two\n")
    rows = b"".join(b'{"caption": "prompt %d"}\n' % number for number in range(20_000))
    (tmp_path / "p.jsonl").write_bytes(rows + b'{"caption": 3}\n')
    said = {".txt": "line 20001 is not UTF-8", ".csv": "Row #20002: Expected 1", ".jsonl": "line 20001: 'caption' is 3"}
    for suffix, message in said.items():
        data, _ = pipeline(prompts("p", prompts_file=tmp_path / f"p{suffix}"), root=tmp_path, images=False)
        with pytest.raises(UserError, match=rf"data\.p\.prompts_file = '.*p{suffix}': .*{message}"):
            data.prepare()


# -- rules and order ---------------------------------------------------------------------------------------------------


def test_caption_rules_and_limits_work_as_for_images(tmp_path):
    (tmp_path / "p.txt").write_text("".join(f"red, ugly, thing {number}\n" for number in range(12)))
    settings = {
        "caption_filter_list": ("ugly,",), "instance_prompt": "sks", "prepend_instance_prompt": True,
        "caption_shuffle": True, "caption_dropout_probability": 0.4, "max_num_samples": 8, "resolution": 64,
    }  # fmt: skip
    data, _ = pipeline(prompts("p", prompts_file=tmp_path / "p.txt", **settings), root=tmp_path, images=False)
    report = data.prepare()
    assert report.datasets["p"].left_out == {"beyond max_num_samples": 4}
    batches = [batch for (batch,) in take(data, 40)]
    captions = Counter(caption for batch in batches for caption in batch.captions)
    assert all(caption.startswith("sks red, thing ") or ", sks red" in caption for caption in captions)
    assert any(caption.startswith("thing") for caption in captions)
    assert {key.split("#")[0] for batch in batches for key in batch.keys} <= {f"p/{n}" for n in range(1, 13)}
    dropped = torch.cat([batch.cond["pooled"] for batch in batches]).abs().sum(1) == 0
    assert 15 < int(dropped.sum()) < 50
    assert {batch.latent_shape for batch in batches} == {(3, 8, 8)}


def test_prompts_and_images_mix_where_no_images_are_needed(tmp_path):
    images = entry(fill(tmp_path / "set", MIXED), repeats=1)
    alone = prompts("p", prompts_file=lines_file(tmp_path, 6), probability=0.5)
    late = prompts("late", prompts_file=lines_file(tmp_path, 4, name="late.csv.txt"), start_step=23)
    family = FakeFamily()
    data, _ = pipeline(images, alone, late, root=tmp_path, family=family, micro=4, images=False)
    data.prepare()
    steps = take(data, 43)
    early = Counter(key.split("/")[0] for batches in steps[:23] for batch in batches for key in batch.keys)
    assert early == {"set": 80, "p": 12}
    assert "late" in {key.split("/")[0] for batches in steps[23:] for batch in batches for key in batch.keys}
    assert not family.batches
    assert not list(tmp_path.rglob("vae*/**/*.safetensors"))
    assert {len(data.real_images(count, 16, 16)) for count in (10, 30)} == {10}
    assert len(data.captions(100)) == 16  # four prompts stand in both files


def test_an_image_dataset_without_images_has_the_same_samples_without_latents(tmp_path):
    folder = fill(tmp_path / "set", MIXED)
    settings = {"random_flip": True, "caption_dropout_probability": 0.3}
    with_latents, _ = pipeline(entry(folder, **settings), root=tmp_path / "1", micro=2)
    family = FakeFamily(vae="never opened")
    family.encode_images = None
    without, _ = pipeline(entry(folder, **settings), root=tmp_path / "2", family=family, micro=2, images=False)
    for (full,), (bare,) in zip(take(with_latents, 12), take(without, 12), strict=True):
        assert full.latent_shape == bare.latent_shape == tuple(full.latents.shape[1:])
        assert bare.latents is None
        assert (full.keys, full.captions, full.positions) == (bare.keys, bare.captions, bare.positions)
        assert all(torch.equal(full.cond[name], bare.cond[name]) for name in full.cond)
    assert with_latents.fingerprint() == without.fingerprint()
    assert len(without.real_images(100, 8, 8)) == 10


def test_how_the_batch_is_cut_and_where_it_starts_change_nothing(tmp_path):
    file = lines_file(tmp_path, 11)
    cut = []
    for micro, accumulation, world in ((4, 1, 1), (1, 4, 1), (2, 1, 2)):
        ranks = []
        for rank in range(world):
            data, _ = pipeline(
                prompts("p", prompts_file=file, caption_dropout_probability=0.3), root=tmp_path, micro=micro,
                accumulation=accumulation, rank=rank, world=world, images=False,
            )  # fmt: skip
            ranks.append(take(data, 12))
        cut.append(without_latents(ranks))
    assert cut[0] == cut[1] == cut[2]
    again, _ = pipeline(
        prompts("p", prompts_file=file, caption_dropout_probability=0.3), root=tmp_path, micro=4, images=False
    )
    assert without_latents([take(again, 5, start=7)]) == cut[0][7:]


def test_the_fingerprint_depends_on_the_prompts_and_not_on_their_location(tmp_path):
    def fingerprint(file: Path, cache: str, **settings) -> str:
        return pipeline(
            prompts("p", prompts_file=file, **settings), root=tmp_path / cache, images=False
        )[0].fingerprint()  # fmt: skip

    here = fingerprint(lines_file(tmp_path / "here"), "1")
    assert fingerprint(lines_file(tmp_path / "there"), "2") == here
    assert fingerprint(tmp_path / "here" / "p.txt", "1", resolution=64) != here
    changed = tmp_path / "here" / "p.txt"
    changed.write_text(changed.read_text().replace("number 3", "number three"))
    assert fingerprint(changed, "1") != here


def test_only_new_prompts_are_encoded(tmp_path):
    file, family = lines_file(tmp_path), FakeFamily()

    def prepare() -> int:
        return pipeline(prompts("p", prompts_file=file), root=tmp_path, family=family, images=False)[
            0
        ].prepare().captions_encoded  # fmt: skip

    assert [prepare(), prepare()] == [10, 0]
    index = tmp_path / "cache" / "prompts" / "p" / "p.index.arrow"
    written = index.stat().st_mtime_ns
    assert prepare() == 0
    assert index.stat().st_mtime_ns == written, "an index of prompts that have not changed is taken as it is"
    file.write_text("new one\n" + file.read_text() + "prompt number 3\n")
    assert prepare() == 1


def test_a_pipeline_for_images_does_not_take_prompts(tmp_path):
    with pytest.raises(AssertionError):
        pipeline(prompts("p", prompts_file=lines_file(tmp_path)), root=tmp_path)


# -- no real images --------------------------------------------------------------------------------------------------


def test_scores_that_need_real_images_are_left_out_with_the_reason(tmp_path):
    data, _ = pipeline(prompts("p", prompts_file=lines_file(tmp_path)), root=tmp_path, images=False)
    assert data.real_images(8, 16, 24).shape == (0, 3, 24, 16)
    assert len(data.captions(4)) == 4
    registry = Registry.load(installed=False)
    evaluator = registry.get("evaluator", "random_convolutions")
    config = SimpleNamespace(evaluators={evaluator.name: evaluator.Config()})
    known = EvaluationSetting(model_path=None, num_data=0)
    usable, left_out = build_evaluators(registry, config, known)  # type: ignore[arg-type]
    assert "random_convolutions" not in usable
    assert left_out["random_convolutions"] == "it measures distances to real images, and the data has none"
    unknown, _ = build_evaluators(registry, config, EvaluationSetting(model_path=None))  # type: ignore[arg-type]
    assert "random_convolutions" in unknown


# -- whole runs --------------------------------------------------------------------------------------------------------


def write_prompts_run(root: Path, *, output: str = "out", **settings) -> Path:
    """Like ``write_run``, with 13 captions and no image."""
    config = write_run(root, output=output, distillation_method="rehearsal", distillation_config={}, **settings)
    (root / "prompts.jsonl").write_text("".join(json.dumps({"text": f"noise {n}"}) + "\n" for n in range(13)))
    data = [{"id": "alone", "dataset_type": "prompts", "prompts_file": "prompts.jsonl"}]
    (root / "multidatabackend.json").write_text(json.dumps(data))
    return config


@pytest.fixture
def no_latents(monkeypatch):
    from distill.model_families.sdxl import SDXL

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("no image is to be encoded")

    monkeypatch.setattr(SDXL, "encode_images", refuse)


def test_a_run_on_captions_alone_resumes_bit_for_bit_and_is_scored(tmp_path, no_latents, capsys):
    settings = {"evaluation_num_samples": 2, "evaluation_steps": [1], "validation_prompt": None}
    result, lines = execute(write_prompts_run(tmp_path, output="whole", **settings), plugins=[PLUGIN])
    assert result.steps == 10
    assert result.evaluation.left_out["random_convolutions"].endswith("the data has none")
    assert result.evaluation.num_data == 0
    assert "distance_to_teacher_pixels" in result.evaluation.score_names
    assert not [name for name in result.evaluation.score_names if "to_data" in name]
    assert "no real images to compare with" in capsys.readouterr().err
    assert "13 of 13 prompts in 1 bucket (32x32: 13)" in " ".join(lines)
    assert not list((tmp_path / "whole" / "cache").rglob("vae*"))
    short = write_prompts_run(tmp_path, output="parts", max_train_steps=5, **settings)
    execute(short, plugins=[PLUGIN])
    execute(write_prompts_run(tmp_path, output="parts", **settings), plugins=[PLUGIN])
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    figures = np.array([loss for _, loss, _ in losses(tmp_path / "whole")])
    assert 0 < figures[-4:].mean() < 0.9 * figures[:4].mean(), "the student learns what its teacher says"


def test_other_prompts_are_not_resumed_on(tmp_path, no_latents):
    config = write_prompts_run(tmp_path, max_train_steps=4, validation_step_interval=0)
    execute(config, plugins=[PLUGIN])
    with (tmp_path / "prompts.jsonl").open("a") as stream:
        stream.write('{"text": "one more"}\n')
    raised = config.read_text().replace('"max_train_steps": 4', '"max_train_steps": 6')
    config.write_text(raised)
    with pytest.raises((UserError, Interrupted), match="its samples are not those"):
        execute(config, plugins=[PLUGIN])


def test_the_commands_work_on_captions_alone(tmp_path, no_latents, monkeypatch):
    from distill.model_families import sdxl

    config = write_prompts_run(tmp_path)
    options = ["--config", str(config), "--plugin", str(PLUGIN)]
    opened = []
    monkeypatch.setattr(sdxl.SDXL, "_autoencoder", lambda self: opened.append(self), raising=False)
    built = distill("cache", "build", *options)
    assert built.exit_code == 0, built.output
    assert "13 captions encoded" in said(built.output)
    assert "everything was cached" in distill("cache", "build", *options).output
    verified = distill("cache", "verify", *options)
    assert verified.exit_code == 0
    assert verified.output.count("13 entries") == 1
    planned = distill("run", "--dry-run", *options)
    assert planned.exit_code == 0, planned.output
    assert f"alone: captions alone of {tmp_path / 'prompts.jsonl'}, resolution 32" in said(planned.output)
    doctor = distill("doctor", *options)
    assert doctor.exit_code == 0, doctor.output
    cleared = distill("cache", "clear", "--yes", *options)
    assert cleared.exit_code == 0
    left = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    left.discard("written.jsonl")  # the list of what the commands wrote
    assert left == {f"data/alone/report.{suffix}" for suffix in ("json", "md", "png")}  # reports are no caches
    assert not opened


def test_images_are_used_for_scores_by_a_run_that_trains_on_captions_alone(tmp_path, no_latents):
    config = write_run(tmp_path, distillation_method="rehearsal", distillation_config={}, max_train_steps=2,
                       evaluation_num_samples=2, evaluation_steps=[1], validation_step_interval=0)  # fmt: skip
    result, _ = execute(config, plugins=[PLUGIN])
    assert result.evaluation.num_data == 13
    assert "kernel_distance_to_data_random_convolutions" in result.evaluation.score_names
    evaluated = distill("evaluate", str(tmp_path / "out"), "--steps", "1", "--teacher-steps", "2", "--num-samples", "2")
    assert evaluated.exit_code == 0, evaluated.output


def test_a_file_that_the_backend_would_not_read_is_refused(tmp_path):
    from distill.core.config.prompt_entries import check_kind
    from distill.core.config.reading import ConfigReport, Layers
    from distill.core.settings.types import Settings

    settings = prompts("p", prompts_file=lines_file(tmp_path)).model_copy(update={"type": "zip", "backend": Settings()})
    report = ConfigReport(Layers(), [], [], prefix="data.p.")
    check_kind(settings, report)
    (finding,) = report.findings
    assert finding.key == "data.p.prompts_file"
    assert finding.problem == "is not read by the data backend 'zip'"
    assert "type local" in finding.remedy


def test_keys_about_images_have_no_effect_on_prompts_and_a_notice(tmp_path):
    config = write_prompts_run(tmp_path)
    file = tmp_path / "multidatabackend.json"
    (spoilt,) = json.loads(file.read_text())
    spoilt |= {"random_flip": True, "minimum_image_size": 4096, "resolution": 64, "crop": True}
    spoilt["micro_conditioning"] = "plain"
    file.write_text(json.dumps([spoilt]))
    checked = distill("config", "check", "--config", str(config), "--plugin", str(PLUGIN))
    assert checked.exit_code == 0, checked.output
    idle = "crop, minimum_image_size, random_flip, micro_conditioning"
    assert f"data.alone: {idle}: no effect on prompts" in said(checked.output)
