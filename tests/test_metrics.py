"""Metrics reach the file exactly, without stopping the device on the way; averages and progress."""

import contextlib
import io
import json
import math
import random
import struct
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distill.core.engine import metrics as metrics_module
from distill.core.engine.ema import EMA
from distill.core.engine.metrics import MetricBuffer, MetricsFile, read_metrics
from distill.core.utils import memory
from distill.core.utils import progress as progress_module
from distill.core.utils.progress import Pace, Progress, TerminalProgress, duration, lines, make_progress, working


class HostSync(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the operations that would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        moves = name == "aten::_to_copy" and (kwargs or {}).get("device") is not None
        self.count += moves or name in ("aten::_local_scalar_dense", "aten::item", "aten::nonzero")
        return func(*args, **(kwargs or {}))


def test_adding_never_waits_for_the_device() -> None:
    buffer = MetricBuffer()
    loss, norm = torch.tensor(0.5), torch.tensor(2.0, dtype=torch.float64)
    with HostSync() as watch:
        for step in range(1, 11):
            buffer.add(step, {"loss": loss * step, "grad_norm": norm, "lr": 1e-4})
        assert watch.count == 0
    rows = buffer.flush()
    assert rows == [(step, {"loss": 0.5 * step, "grad_norm": 2.0, "lr": 1e-4}) for step in range(1, 11)]
    assert buffer.flush() == []


def test_meta_tensors_prove_that_adding_reads_no_value() -> None:
    MetricBuffer().add(1, {"loss": torch.empty((), device="meta")})


def test_values_are_those_at_the_time_of_adding() -> None:
    buffer, total = MetricBuffer(), torch.zeros(())
    for step in (1, 2, 3):
        buffer.add(step, {"total": total.add_(1)})
    assert [row["total"] for _, row in buffer.flush()] == [1, 2, 3]


def test_a_step_is_one_row_in_the_order_of_adding() -> None:
    buffer = MetricBuffer()
    buffer.add(4, {"loss": torch.tensor(1.0), "lr": 0.1})
    buffer.add(4, {"extra": torch.tensor([3], dtype=torch.int64), "grad_norm": torch.tensor(2.0).bfloat16()})
    ((step, row),) = buffer.flush()
    assert step == 4
    assert list(row.items()) == [("loss", 1.0), ("lr", 0.1), ("extra", 3.0), ("grad_norm", 2.0)]


def test_wrong_metrics_are_refused() -> None:
    buffer = MetricBuffer()
    buffer.add(2, {"loss": 1.0})
    with pytest.raises(ValueError, match="already has a metric 'loss'"):
        buffer.add(2, {"loss": 1.0})
    with pytest.raises(ValueError, match="come after"):
        buffer.add(1, {"loss": 1.0})
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        buffer.add(3, {"loss": torch.zeros(2)})


def test_floats_round_trip_to_the_bit(tmp_path: Path) -> None:
    rng = random.Random(0)
    values = [struct.unpack("d", rng.randbytes(8))[0] for _ in range(2000)] + [
        0.1,
        -0.0,
        5e-324,
        math.inf,
        -math.inf,
        math.nan,
    ]
    values += torch.randn(200).tolist()
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append([(step, {"loss": value}) for step, value in enumerate(values)])
    for (step, row), value in zip(read_metrics(file.path), values, strict=True):
        if math.isnan(value):
            assert math.isnan(row["loss"]), step
        else:
            assert struct.pack("d", row["loss"]) == struct.pack("d", value), step
    for line in file.path.read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_resuming_drops_later_rows_and_a_torn_line(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append((step, {"loss": step / 7}) for step in range(1, 8))
    file.sync()
    whole = file.path.read_bytes()
    file.close()
    for torn in range(1, 20):
        file.path.write_bytes(whole[:-torn])
        file.truncate_after(5)
        file.append([(6, {"loss": 6 / 7}), (7, {"loss": 1.0})])
        file.close()
        assert file.path.read_bytes() == whole
    file.path.write_bytes(whole[:-3])
    file.truncate_after(100)
    assert [step for step, _ in read_metrics(file.path)] == [1, 2, 3, 4, 5, 6]
    file.truncate_after(0)
    assert file.path.read_bytes() == b""
    MetricsFile(tmp_path / "absent.jsonl").truncate_after(3)


# -- averages ---------------------------------------------------------------------------------------------------------


def test_average_is_the_weighted_sum_of_all_weights() -> None:
    weights = [torch.randn(3, dtype=torch.float64) for _ in range(6)]
    ema = EMA.copy_of([weights[0]], decay=0.9)
    for weight in weights[1:]:
        ema.update([weight])
    expected = 0.9**5 * weights[0] + sum(0.1 * 0.9 ** (5 - n) * weight for n, weight in enumerate(weights) if n)
    torch.testing.assert_close(ema.averages[0], expected, rtol=1e-12, atol=0)


def test_average_of_bfloat16_weights_moves_in_float32() -> None:
    ema = EMA.copy_of([torch.zeros(4).bfloat16()], decay=0.9999)
    for _ in range(100):
        ema.update([torch.ones(4).bfloat16()])
    torch.testing.assert_close(ema.averages[0], torch.full((4,), 1 - 0.9999**100))
    with pytest.raises(ValueError, match="float32"):
        EMA([torch.zeros(1).bfloat16()], decay=0.9)


def test_average_moves_the_given_tensors_in_place_and_resumes_exactly() -> None:
    target, weight = torch.zeros(5), torch.nn.Parameter(torch.randn(5))
    ema = EMA([target], decay=0.95, warmup=True)
    for _ in range(3):
        ema.update([weight])
    other = EMA([torch.zeros(5)], decay=0.95, warmup=True)
    other.load_state_dict({name: tensor.clone() for name, tensor in ema.state_dict().items()})
    for average in (ema, other):
        average.update([weight])
    assert torch.equal(target, other.averages[0])
    assert weight.grad is None
    assert not target.requires_grad


def test_weights_are_their_own_again_after_the_average_was_applied() -> None:
    weight = torch.nn.Parameter(torch.randn(5))
    before = weight.detach().clone()
    ema = EMA([torch.zeros(5)], decay=0.5)
    with contextlib.suppress(RuntimeError), ema.applied_to([weight]):
        assert torch.equal(weight, torch.zeros(5))
        raise RuntimeError("a failure inside")
    assert torch.equal(weight, before)


# -- progress ---------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_show_pace_and_time_left_without_the_first_step() -> None:
    clock, out = Clock(), io.StringIO()
    with Progress(1000, samples_per_step=4, stream=out, clock=clock) as progress:
        clock.now += 60  # the first step compiles
        progress.advance(1)
        for step in range(2, 11):
            clock.now += 2
            progress.advance(step)
        with progress.pace.pause():
            clock.now += 500  # validation
        progress.log(10, {"loss": 0.123456, "lr": 1e-4})
        progress.log(10, {"loss": 0.2})
    lines = out.getvalue().splitlines()
    assert lines[0] == "at 2 s per step the remaining 990 steps take about 33 min, validation not counted"
    assert lines[1] == "step 10/1000, loss 0.1235, lr 0.0001, 2 samples/s, 33 min left"
    assert len(lines) == 3


def test_pace_between_marks() -> None:
    clock = Clock()
    pace = Pace(start_step=50, clock=clock)
    clock.now += 10
    assert pace.mark(60) == 1.0
    clock.now += 1
    assert pace.mark(60) is None
    clock.now += 4
    assert pace.mark(62) == 2.0


def test_samples_per_second_are_those_since_the_last_line_without_pauses() -> None:
    clock, out = Clock(), io.StringIO()
    with Progress(1000, samples_per_step=4, stream=out, clock=clock) as progress:
        progress.advance(1)
        for step, seconds in ((11, 1), (21, 4), (31, 2)):
            with progress.pace.pause():
                clock.now += 300  # validation
            clock.now += 10 * seconds
            with progress.pace.pause():
                clock.now += 100  # the checkpoint before which metrics are written
                progress.log(step, {"loss": 1.0})
    rates = [line.split(", ")[2] for line in out.getvalue().splitlines() if "samples/s" in line]
    assert rates == ["4 samples/s", "1 samples/s", "2 samples/s"]


def test_throughput_leaves_out_the_pause_that_it_is_read_in(monkeypatch) -> None:
    clock = Clock()
    monkeypatch.setattr(metrics_module.time, "perf_counter", clock)
    throughput = metrics_module.Throughput()
    for seconds, expected in ((2, 4.0), (8, 1.0)):
        clock.now += seconds
        throughput.count(8)
        with throughput.paused():
            clock.now += 500
            assert throughput.read(clock.now)["samples_per_second"] == expected
            clock.now += 500


def test_long_work_says_what_it_is_and_how_long_it_took(monkeypatch, said) -> None:
    monkeypatch.setattr(progress_module, "SAID_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(progress_module, "SAID_AGAIN_SECONDS", 0.05)
    with working("loading the teacher"):
        deadline = time.monotonic() + 20
        while len(said) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert said[:2] == ["loading the teacher ...", "loading the teacher, for 0 s so far"]
    assert said[-1] == "loading the teacher: done in 0 s"
    monkeypatch.setattr(progress_module, "SAID_AFTER_SECONDS", 60.0)
    with working("something short"):
        pass
    assert not any("short" in line for line in said)


def test_free_memory_is_that_of_the_control_group(tmp_path, monkeypatch) -> None:
    for name, text in (("max", "4000000"), ("current", "3000000"), ("stat", "anon 1\ninactive_file 500000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    group = (str(tmp_path / "memory.max"), str(tmp_path / "memory.current"), "inactive_file")
    monkeypatch.setattr(memory, "CONTROL_GROUPS", (group,))
    assert memory.free_memory_bytes() == 1_500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory_bytes() > 10**8


def test_terminals_get_a_bar_and_files_get_lines() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    assert type(make_progress(10, samples_per_step=1, stream=io.StringIO())) is Progress
    progress = make_progress(10, samples_per_step=1, stream=terminal)
    assert isinstance(progress, TerminalProgress)
    with progress:
        for step in range(1, 11):
            progress.advance(step)
        progress.log(10, {"loss": 0.25})
        progress.show("saved [checkpoint-10]")
    assert "saved [checkpoint-10]" in terminal.getvalue()
    assert "10/10" in terminal.getvalue()


def test_long_work_says_how_far_it_is_every_ten_seconds(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock)
    with lines("latents of 'cats'", 1200) as advance:
        for _ in range(6):
            clock.now += 4
            advance(10)
    assert said == [
        "latents of 'cats': 30 of 1,200, about 468 s left",
        "latents of 'cats': 60 of 1,200, about 456 s left",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(45, "45 s"), (720, "12 min"), (12000, "3 h 20 min"), (187200, "2 d 4 h"), (5399.9, "1 h 30 min")],
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# -- memory -----------------------------------------------------------------------------------------------------------


def test_peak_memory_sees_an_allocation_that_is_gone() -> None:
    before = memory.peak_memory_bytes()
    size = before + 50_000_000  # more than was ever held, so the peak must rise
    block = torch.ones(size // 4)
    del block
    assert memory.peak_memory_bytes() >= size


SDXL = memory.MemorySettings(
    base_parameters=2_567_000_000,
    trained_parameters=197_000_000,
    latent_pixels=128 * 128,
    base_bytes=2,
    compute_bytes=2,
)


def test_estimate_of_sdxl_agrees_with_what_autograd_saves() -> None:
    """9.1 GB of activations were counted on SDXL's UNet, bf16, LoRA rank 64, one image of 1024 px; 0.95 recomputed."""
    estimate = memory.estimate(SDXL)
    assert estimate.activations == pytest.approx(9.12e9, rel=0.03)
    recomputed = memory.estimate(replace(SDXL, gradient_checkpointing=True))
    assert recomputed.activations == pytest.approx(0.95e9, rel=0.06)
    assert estimate.weights == 2 * SDXL.base_parameters
    assert estimate.optimizer == 8 * SDXL.trained_parameters
    assert estimate.total == sum(estimate.parts().values())


def test_savings_say_what_they_save_and_only_what_can_be_done() -> None:
    helps = dict(memory.savings(SDXL))
    assert next(iter(helps)) == "gradient_checkpointing=true"
    assert not any(label.startswith(("train_batch_size", "mixed_precision", "base_model_precision")) for label in helps)
    done = memory.MemorySettings(**{**vars(SDXL), "gradient_checkpointing": True, "batch": 4})
    labels = [label for label, _ in memory.savings(done, quantizers=True)]
    assert not any(label.startswith("gradient_checkpointing") for label in labels)
    assert any(label.startswith("train_batch_size=2") for label in labels)
    assert any(label.startswith("base_model_precision") for label in labels)
    hint = memory.out_of_memory_hint(done)
    assert "train_batch_size=2" in hint
    assert "base_model_precision" not in hint


def test_out_of_memory_is_recognised() -> None:
    assert memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert memory.is_out_of_memory(caught.value)
    assert not memory.is_out_of_memory(RuntimeError("shape mismatch"))
