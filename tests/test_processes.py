"""Several processes for real (gloo on the CPU): the same gradients as one, and unsupported set-ups refused."""

import os
import subprocess
import sys

import pytest
import torch
from distill.core.engine.processes import Processes, _buckets
from distill.core.errors import UserError

WORKER = """
import torch
from distill.core.engine.processes import Processes
processes = Processes("cpu")
assert processes.world_size == 2, processes.world_size
tensors = [torch.full((3,), float(processes.rank)), torch.full((2, 2), 10.0 * processes.rank, dtype=torch.float64)]
processes.average(tensors)
assert torch.equal(tensors[0], torch.full((3,), 0.5)), tensors
assert torch.equal(tensors[1], torch.full((2, 2), 5.0, dtype=torch.float64)), tensors
assert processes.any(processes.rank == 1) and not processes.any(False)
from distill.core.errors import DistillError, UserError
for error, kind in ((UserError("no such folder", "make it"), UserError), (OSError("disk full"), DistillError)):
    try:
        with processes.synchronized():
            if processes.rank == 1:
                raise error
    except (DistillError, OSError) as found:
        assert "no such folder\\n  make it" in str(found) or "disk full" in str(found), found
        assert isinstance(found, kind if processes.rank == 0 else type(error)), type(found)
    else:
        raise AssertionError("only one process ended")
with processes.synchronized():
    pass
assert processes.gather({"rank": processes.rank}) == [{"rank": 0}, {"rank": 1}]
from distill.core.engine.health import HealthMonitor
monitor = HealthMonitor(1, gather=processes.gather)
monitor.record("student", 0, torch.tensor(False), torch.tensor([True, False]), [f"bad-{processes.rank}", "good"])
try:
    monitor.check()
except DistillError as found:
    assert "bad-0, bad-1" in str(found) and "good" not in str(found), found
print("ok", processes.rank, flush=True)
processes.close()
"""


def test_two_processes_average(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ok") == 2, "the processes write at once, so lines may mix"


def test_buckets_keep_every_tensor_and_one_type():
    tensors = [torch.zeros(1 << 23), torch.zeros(1 << 23, dtype=torch.float64), torch.zeros(1 << 24), torch.zeros(3)]
    buckets = _buckets(tensors)
    assert sorted(id(t) for b in buckets for t in b) == sorted(id(t) for t in tensors)
    assert all(len({t.dtype for t in b}) == 1 for b in buckets)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_impossible_combinations_are_refused_with_the_reason(kind, monkeypatch):
    class State:
        device, process_index, num_processes, is_main_process = torch.device("cpu"), 0, 1, True

        class distributed_type:
            name = kind

    monkeypatch.setattr("accelerate.PartialState", lambda **_: State)
    with pytest.raises(UserError, match=f"(?s){kind}.*torchrun"):
        Processes("cpu")
