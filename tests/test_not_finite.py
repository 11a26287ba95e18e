"""NaN and infinity: in latents, embeddings, trajectories, LoRAs, weights and losses; named, never trained on."""

import json

import numpy as np
import pytest
import torch
from distill.core.data.cache.encode import LATENTS
from distill.core.data.cache.tensor_cache import TensorCache
from distill.core.data.loader import BatchLoader
from distill.core.engine.health import HealthMonitor
from distill.core.errors import DistillError, UserError
from safetensors.torch import load_file, save_file
from support.data_helpers import FakeFamily, entry, fill, pipeline, prompts, take
from support.listening import listening
from support.small_run import execute, losses, write_run
from support.trajectory_cache import TrajectoryFamily, cache_entry, trajectory_pipeline

SIZES = [(32, 32)] * 5


class Overflowing(FakeFamily):
    """An autoencoder that makes NaN of white images, and text encoders that make infinity of some captions."""

    bad_caption = "nothing"

    def encode_images(self, pixels, generator=None):
        latents = super().encode_images(pixels, generator)
        latents[pixels.flatten(1).min(1).values == 1.0] = float("nan")
        return latents

    def encode_prompts(self, prompts):
        found = super().encode_prompts(prompts)
        found["pooled"][[self.bad_caption in each for each in prompts], 0] = float("inf")
        return found


def white(folder, name):
    from PIL import Image

    Image.new("RGB", (32, 32), "white").save(folder / name)


@pytest.mark.parametrize("flip", [False, True])
def test_an_image_whose_latents_are_not_finite_is_quarantined_by_name(tmp_path, flip):
    folder = fill(tmp_path / "set", SIZES)
    white(folder, "002.png")
    family = Overflowing()
    data, lines = pipeline(entry(folder, random_flip=flip), root=tmp_path, family=family)
    counts = data.prepare().datasets["set"]
    assert (counts.used, list(counts.quarantined)) == (4, ["002.png"])
    assert counts.quarantined["002.png"] == "the autoencoder makes NaN or infinity of it: mend the autoencoder"
    assert any("1 broken and quarantined: 002.png" in line for line in lines)
    seen = [batch for (batch,) in take(data, 8)]
    assert all(batch.latents.isfinite().all() for batch in seen)
    assert "set/002.png" not in {key for batch in seen for key in batch.keys}

    again = Overflowing()
    counts = pipeline(entry(folder, random_flip=flip), root=tmp_path, family=again)[0].prepare().datasets["set"]
    assert (again.num_images, counts.used, list(counts.quarantined)) == (0, 4, ["002.png"]), (
        "known, and not tried again"
    )
    mended = pipeline(entry(folder, random_flip=flip), root=tmp_path, family=FakeFamily(vae="v2"))[0].prepare()
    assert mended.datasets["set"].used == 5, "another autoencoder (or type of it) tries again"


def test_an_autoencoder_that_overflows_on_every_image_is_refused_with_the_remedy(tmp_path):
    folder = fill(tmp_path / "set", SIZES[:2])
    white(folder, "000.png")
    white(folder, "001.png")
    with pytest.raises(UserError, match=r"2 broken \(first: 000.png: the autoencoder makes NaN.*mend the autoencoder"):
        pipeline(entry(folder), root=tmp_path, family=Overflowing())[0].prepare()


def test_a_caption_whose_embeddings_are_not_finite_is_quarantined_with_its_image(tmp_path):
    folder = fill(tmp_path / "set", SIZES)
    (folder / "003.txt").write_text("fine\nmakes nothing of it")
    for _ in range(2):
        family = Overflowing()
        counts = pipeline(entry(folder), root=tmp_path, family=family)[0].prepare().datasets["set"]
        assert (counts.used, list(counts.quarantined)) == (4, ["003.png"])
        why = 'the text encoders make NaN or infinity of its caption "makes nothing of it": mend the text encoder'
        assert counts.quarantined["003.png"] == why
    assert not family.prompts, "known, and not tried again"


def test_prompts_whose_embeddings_are_not_finite_are_quarantined(tmp_path):
    (tmp_path / "p.txt").write_text("one\nnothing\nthree\n")
    settings = prompts("p", prompts_file=tmp_path / "p.txt")
    counts = pipeline(settings, root=tmp_path, family=Overflowing(), images=False)[0].prepare().datasets["p"]
    assert (counts.used, list(counts.quarantined)) == (2, ["2"])


def test_a_teacher_whose_trajectory_is_not_finite_is_refused_with_the_caption(tmp_path):
    class Diverging(TrajectoryFamily):
        def predict(self, network, x_t, time, cond, **more):
            cond["time_ids"][1] = float("nan")  # of the second prompt
            return super().predict(network, x_t, time, cond, **more)

    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    settings = prompts("p", prompts_file=tmp_path / "p.txt")
    data, _ = trajectory_pipeline(settings, entry=cache_entry(guidance_scale=1.0), root=tmp_path, family=Diverging())
    with pytest.raises(UserError, match="'pairs': the teacher makes NaN or infinity of 1 of 3 .*\"two\"(?s:.)*bf16"):
        data.prepare()


def test_caches_that_hold_nan_already_are_found_by_verify_and_when_read(tmp_path):
    keys = np.arange(6, dtype=np.uint64).reshape(3, 2)
    values = torch.ones(3, 2, 4)
    values[1, 0, 2] = float("nan")
    for find in ("verify", "read"):
        cache = TensorCache(tmp_path / find, {"kind": "latents"}, label="latents of 't'")
        cache.write(keys, {LATENTS: values})
        with listening() as lines:
            if find == "verify":
                assert len(cache.load(thorough=True)) == 1
            else:
                cache.load()
                cache.read(cache.locate(keys[[0, 2]]))
                with pytest.raises(DistillError, match="entry 1 holds NaN or infinity"):
                    cache.read(cache.locate(keys[1:2]))
        assert any("NaN or infinity" in line for line in lines)
        cache.load()
        assert len(cache) == 0, "made anew by the next run"


# -- losses -----------------------------------------------------------------------------------------------------------


def note(monitor, step, good, *, finite=None, samples=2):
    flag = torch.tensor(good)
    bad = torch.tensor([not good, *[False] * (samples - 1)])
    monitor.record(
        "student", step, flag, bad, [f"s{n}" for n in range(samples)],
        finite_loss=None if finite is None else torch.tensor(finite),
    )  # fmt: skip


def test_the_end_says_how_many_updates_were_not_taken_and_fails_above_the_share():
    for bad, share, fails in ((1, 0.01, False), (2, 0.01, True), (2, 0.02, False), (0, 0.0, False)):
        monitor = HealthMonitor(10, max_bad_share=share)
        with listening() as lines:
            for step in range(100):
                note(monitor, step, step % 40 != 5 or step // 40 >= bad)
                monitor.check()
            if fails:
                with pytest.raises(
                    DistillError, match=r"2 of the 100 updates of the student \(2.0%\).*s0(?s:.)*share=1"
                ):
                    monitor.finish()
            else:
                monitor.finish()
        said = [line for line in lines if f"{bad} of the 100 updates" in line]
        assert len(said) == (1 if bad and not fails else 0)
        assert sum("is not taken. Samples involved: s0." in line for line in lines) == bool(bad), "said at once, once"


def test_a_first_loss_without_a_finite_sample_ends_the_run_at_once():
    monitor = HealthMonitor(10)
    keys, bad = list("abcd"), torch.ones(4, dtype=torch.bool)
    monitor.record("student", 0, torch.tensor(False), bad, keys)
    with pytest.raises(DistillError, match="first loss .step 0. is not finite for any sample(?s:.)*teacher_lora"):
        monitor.check()
    later = HealthMonitor(10)
    note(later, 0, True)
    later.record("student", 1, torch.tensor(False), bad, keys)
    later.check()


def test_the_search_for_fp16s_loss_scale_is_no_bad_update():
    monitor = HealthMonitor(10, max_bad_share=0.0, scaled=True)
    for step in range(20):
        note(monitor, step, step > 4, finite=True)
        monitor.check()
    monitor.finish()
    note(monitor, 20, False, finite=False)
    with pytest.raises(DistillError, match="1 of the 21 updates"):
        monitor.finish()


def test_counts_are_those_of_the_whole_run_after_a_resume():
    first, second = HealthMonitor(10, max_bad_share=0.1), HealthMonitor(10, max_bad_share=0.1)
    for step in range(5):
        note(first, step, step != 4)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.consecutive == {"student": 1}
    for step in range(5, 9):
        note(second, step, True)
    with pytest.raises(DistillError, match="1 of the 9 updates"):
        second.finish()


@pytest.fixture
def spoiled(monkeypatch):
    """Batches whose first sample is NaN in the steps of the set that is returned."""
    steps, inner = set(), BatchLoader.at

    def at(self, step):
        batches = inner(self, step)
        if step in steps:
            batches[0].latents[0] = float("nan")
        return batches

    monkeypatch.setattr(BatchLoader, "at", at)
    return steps


def test_a_run_with_too_many_updates_left_out_writes_no_student_and_goes_on_when_told(tmp_path, spoiled):
    file = write_run(tmp_path, validation_step_interval=0, max_train_steps=6)
    spoiled |= {2, 4}
    with pytest.raises(DistillError, match=r"2 of the 6 updates of the student \(33.3%\) were not taken") as caught:
        execute(file)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "out" / "student").exists()
    assert (tmp_path / "out" / "checkpoint-6" / "manifest.json").exists()
    assert [step for step, loss, _ in losses(tmp_path / "out") if loss == "NaN"] == [3, 5]
    again = json.loads(file.read_text()) | {"max_bad_share": 1.0}
    file.write_text(json.dumps(again))
    result, lines = execute(file)
    assert (result.student / "pytorch_lora_weights.safetensors").exists()
    assert any("2 of the 6 updates of the student (33.3%) were not taken" in line for line in lines)


# -- files ------------------------------------------------------------------------------------------------------------


def spoil(file, *, key=None):
    state = load_file(file)
    key = key or sorted(state)[0]
    state[key].view(-1)[0] = float("nan")
    save_file(state, file, metadata={"format": "pt"})
    return key


def test_weights_that_are_not_finite_are_refused_by_file_and_name(tmp_path):
    file = write_run(tmp_path, validation_step_interval=0, max_train_steps=2)
    result, _ = execute(file)
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes((result.student / "pytorch_lora_weights.safetensors").read_bytes())
    key = spoil(lora)
    for setting in ({"teacher_lora": [{"path": str(lora)}]}, {"init_lora": str(lora)}):
        other = write_run(tmp_path, output="other", validation_step_interval=0, max_train_steps=2, **setting)
        with pytest.raises(UserError, match=rf"lora.safetensors' holds NaN or infinity in 1 of its \d+ .*{key}"):
            execute(other)
        assert not (tmp_path / "other" / "student").exists()
    for part in ("unet", "vae", "text_encoder"):
        (weights,) = (tmp_path / "model" / part).glob("*.safetensors")
        kept = weights.read_bytes()
        key = spoil(weights)
        with pytest.raises(UserError, match=f"holds NaN or infinity in 1 of (?s:.)*{key}(?s:.)*restore the file"):
            execute(write_run(tmp_path, output=f"bad-{part}", validation_step_interval=0, max_train_steps=2))
        weights.write_bytes(kept)
