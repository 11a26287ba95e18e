"""Captions and buckets as the console tells of them: how many differ, and what a run never trains on."""

import numpy as np
from support.config_files import distill, said
from support.data_helpers import entry, fill, pipeline, take
from support.small_run import execute, write_images, write_run

SIZES = [(32, 32)] * 8 + [(64, 32)]


def test_the_report_counts_the_different_captions_of_the_images_in_use(tmp_path):
    folder = fill(tmp_path / "set", [(32, 32)] * 6)
    for name in ("001", "002"):
        (folder / f"{name}.txt").write_text("the same")
    (folder / "003.txt").write_text("the same\nanother")
    for limit, used in ((None, "6 of 6"), (1, "1 of 6")):
        data, lines = pipeline(entry(folder, max_num_samples=limit), root=tmp_path)
        line = data.describe()[0]
        row = int(data._datasets[0].rows[0])
        different = 5 if limit is None else int(np.diff(data._datasets[0].index.caption_offsets)[row])
        assert line.startswith(f"dataset 'set': {used} images in 1 bucket")
        assert line.endswith(f", {different} different captions")
        data.prepare()
        assert line in lines, "the same before and after the captions are encoded"


def test_a_bucket_that_does_not_fill_a_batch_is_told_on_the_console(tmp_path):
    folder = fill(tmp_path / "set", SIZES)
    data, _ = pipeline(entry(folder), root=tmp_path, micro=4)
    lines = data.describe()
    wanted = "dataset 'set': 1 image in 1 bucket (48x24: 1) cannot fill a batch of 4 in one epoch: "
    assert [line.startswith(wanted) and "up to 4 epochs until" in line for line in lines[1:]] == [True]
    assert not pipeline(entry(folder), root=tmp_path, micro=1)[0].describe()[1:]
    assert not pipeline(entry(folder, repeats=3), root=tmp_path, micro=4)[0].describe()[1:]


def test_what_a_run_never_trains_on_is_what_its_batches_show(tmp_path):
    folder = fill(tmp_path / "set", [*SIZES, (32, 64), (32, 64), (48, 32)])
    data, _ = pipeline(entry(folder), root=tmp_path, micro=4)
    data.prepare()
    names = {"64x32": "008.png", "32x64": "009.png", "48x32": "011.png"}
    for num_steps in (3, 5, 7, 11, 12, 13):
        trained = {key for (batch,) in take(data, num_steps) for key in batch.keys}
        told = " ".join(data.never_trained(num_steps))
        for name in names.values():
            assert (f"set/{name}" in trained) == (name not in told), (num_steps, name, told)
    assert data.never_trained(1) == [], "a run that is no pass over the data leaves out most of it anyway"


def test_run_and_report_say_it(tmp_path):
    images = write_images(tmp_path / "images", 4)
    fill(images, [(64, 32)], start=50)
    config = write_run(tmp_path, validation_step_interval=0, max_train_steps=None, num_train_epochs=1)
    _, lines = execute(config)
    (line,) = [line for line in lines if "never be trained on" in line]
    assert "1 image in 1 bucket (64x32: 1) cannot fill a batch of 4 in this run (up to step 1)" in line
    assert "never be trained on: 050.png; lower train_batch_size" in line
    result = distill("data", "report", "--config", config)
    assert "cannot fill a batch of 4 in one epoch" in said(result.output)
    assert "5 different captions" in said(result.output)
