"""A process that hangs, is killed or fails is named by the others, which end with it; one that works long is not."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from support.forks import forked
from support.small_run import write_run
from support.torchrun import environment, launcher

DRIVER = Path(__file__).parent / "support" / "lost_process.py"
SILENT = "process 1 (pid {pid} on {host}) hangs: it has given no sign of life for 3 s (process_timeout)"
LOST = {
    "stopped": f"DistillError: {SILENT}",
    "killed": "DistillError: process 1 (pid {pid} on {host}) is gone without a word: it was killed, by somebody or by "
    "the system because memory ran out",
    "another library": "DistillError: process 1 (pid {pid} on {host}) is gone without a word: it was killed, by "
    "somebody or by the system because memory ran out",
    "failed": "DistillError: process 1 failed: MemoryError: no room for 3 GB",
    "stuck": "DistillError: process 1 (pid {pid} on {host}) hangs: the others have waited for it in a step for 3 s "
    "(process_timeout)",
    "unwakeable": f"stuck: {SILENT}",
    "absent": "the 2 processes have not met at 127.0.0.1:{port} within 3 s (process_timeout): one of them did not "
    "start, or has ended",
}


@pytest.mark.skipif(os.name != "posix", reason="needs SIGSTOP")
def test_a_process_that_is_lost_is_named_and_the_other_ends():
    done = forked(DRIVER, *LOST, processes=1, timeout=200)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["how"] for each in found] == list(LOST)
    for each in found:
        expected = LOST[each["how"]].format(pid=each["pid"], port=each["port"], host=socket.gethostname())
        lines = [expected] if each["how"] == "absent" else ["trained", expected]
        assert (each["code"], each["lines"]) == (1, lines), done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs SIGSTOP")
def test_a_run_of_two_whose_second_process_is_stopped_says_so_and_can_be_resumed(tmp_path):
    """Started as torchrun starts them: the launcher's own limit of 30 seconds ends the one that is stopped."""
    config = write_run(
        tmp_path, max_train_steps=100_000, validation_step_interval=0, checkpoint_step_interval=5, log_step_interval=1,
        train_batch_size=2, gradient_accumulation_steps=1, device="cpu", process_timeout=5,
    )  # fmt: skip
    process = subprocess.Popen(
        [*launcher(), "-m", "distill", "run", "--config", str(config)],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    out, deadline = tmp_path / "out", time.monotonic() + 200
    while not list(out.glob("checkpoint-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    import psutil

    members = [each for each in psutil.Process(process.pid).children() if "distill" in each.cmdline()]
    second = next(each for each in members if each.environ()["RANK"] == "1")
    second.send_signal(signal.SIGSTOP)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1, err
    hangs = f"process 1 (pid {second.pid} on {socket.gethostname()}) hangs: it has given no sign of life for 5 s"
    assert hangs in err
    assert "To go on: distill run" in err
    log = (out / "run.log").read_text()
    assert hangs in log
    newest = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert f"saved: {newest}" in log
