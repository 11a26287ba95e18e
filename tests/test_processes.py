"""Several processes for real (gloo on the CPU): the same gradients as one, and unsupported set-ups refused."""

import re
import subprocess
import sys

import pytest
import torch
from distill.core.config.load import load_configuration
from distill.core.engine.launch import check_launch
from distill.core.engine.parallel import parallel_settings
from distill.core.engine.processes import buckets_of
from distill.core.errors import UserError
from distill.core.registry.registry import Registry
from distill.core.runs.agreement import require_same_configuration, require_same_start
from distill.core.utils.strategies import ParallelSettings
from support.config_files import Pair
from support.forks import ended, forked

WORKER = """
import threading
import torch
from distill.core.engine import heartbeats
from distill.core.engine.processes import Processes
heartbeats.EVERY_SECONDS = 1e-4  # a sign of life is under way at any time, that of the end as well
processes = Processes("cpu", timeout_seconds=0)
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
from distill.core.engine import buckets, processes as engine
engine.BUCKET_BYTES = 40
torch.manual_seed(0)
network, unused = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3))), torch.nn.Parameter(torch.ones(2))
parameters = [unused, *network.parameters()]
averaging = buckets.AveragingOptimizer(
    torch.optim.SGD(parameters), parameters, learning_rate=1.0, schedule=lambda step: 1.0,
    max_grad_norm=0,
)
data = torch.randn(2, 2, 3, 4)  # by process and micro-batch
for number, last in ((0, False), (1, True)):
    averaging.backward(network(data[processes.rank, number]).square().sum(), last=last)
    assert [bucket.parameters[0] is unused for bucket in averaging._waiting] == ([True] if last else [])
assert averaging.gradients_to_average() == [] and unused.grad is None
found = [p.grad for p in network.parameters()]
expected = torch.autograd.grad(network(data.flatten(0, 2)).square().sum() / 2, list(network.parameters()))
for one, other in zip(found, expected):
    torch.testing.assert_close(one, other)
assert sum(thread.name == "heartbeats" for thread in threading.enumerate()) == 2
processes.close()
assert not any(thread.name == "heartbeats" for thread in threading.enumerate())
print("ok", processes.rank, flush=True)
"""


def test_two_processes_average(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    done = forked(script, timeout=300)
    assert done.stdout.count("ok") == 2, "the processes write at once, so lines may mix"


def test_buckets_keep_every_tensor_and_one_type():
    tensors = [torch.zeros(1 << 23), torch.zeros(1 << 23, dtype=torch.float64), torch.zeros(1 << 24), torch.zeros(3)]
    buckets = buckets_of(tensors)
    assert sorted(id(t) for b in buckets for t in b) == sorted(id(t) for t in tensors)
    assert all(len({t.dtype for t in b}) == 1 for b in buckets)


@pytest.mark.parametrize(
    ("given", "world", "words"),
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "True"}, 1, "--use_megatron_lm"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, 2, "--use_parallelism_config"),
        ({"WORLD_SIZE": "4"}, 1, "started 4 processes"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, 1, "several processes starts one alone"),
    ],
)
def test_what_a_launcher_asks_for_and_does_not_get_is_refused(given, world, words):
    with pytest.raises(UserError, match=re.escape(words)) as error:
        check_launch(given, world_size=world)
    assert "torchrun --standalone" in error.value.remedy


def test_usual_launches_are_accepted():
    check_launch({}, world_size=1)
    check_launch({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, world_size=2)
    check_launch({"ACCELERATE_USE_CPU": "True", "ACCELERATE_USE_FSDP": "false"}, world_size=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cpu", "--num_processes", "2"], "several processes starts one alone"),
        (
            ["--use_deepspeed", "--zero_stage", "1", "--num_processes", "1"],
            "--use_deepspeed --zero_stage 1: stages 2 and 3 are there",
        ),
    ],
)
def test_accelerate_launch_for_real_is_refused(options, words, tmp_path):
    launcher = ("-m", "accelerate.commands.launch", *options)
    done = ended(*launcher, "-m", "distill", "run", "--output-dir", tmp_path / "out", timeout=300)
    assert words in " ".join(done.stderr.split()), done.stderr[-2000:]
    assert done.returncode != 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "environment", "expected"),
    [
        ("auto", {}, ParallelSettings("replicate")),
        ("fsdp", {}, ParallelSettings("fsdp", 2, offload=True)),
        ("auto", {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "false"}, ParallelSettings("fsdp")),
        (
            "fsdp",
            {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"},
            ParallelSettings("fsdp", 0, offload=True),
        ),
        (
            "auto",
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            ParallelSettings("zero3"),
        ),
    ],
)
def test_the_strategy_is_the_launchers_or_the_runs(name, environment, expected):
    own = {} if environment else {"shard_size": expected.shard_size, "offload": expected.offload}
    found = parallel_settings(name, **{"shard_size": 0, "offload": False, **own}, environment=environment)
    assert found == expected


@pytest.mark.parametrize(
    ("given", "environment", "words"),
    [
        (
            {"name": "replicate"},
            {"ACCELERATE_USE_FSDP": "true"},
            "parallel = replicate, and the processes",
        ),
        ({"name": "auto", "shard_size": 2}, {}, "parallel_shard_size = 2 belongs to fsdp, not to replicate"),
        ({"name": "auto", "offload": True}, {}, "parallel_offload: nothing is sharded under replicate"),
    ],
)
def test_strategies_that_contradict_each_other_are_refused(given, environment, words):
    with pytest.raises(UserError, match=re.escape(words)):
        parallel_settings(**{"shard_size": 0, "offload": False, **given}, environment=environment)


ALONE = """
import os, signal, sys, time
from distill.core.engine import launch
launch.POLL_SECONDS = 0.05
if os.fork():
    time.sleep(0.3)
    os._exit(0)  # the launcher is gone
signal.signal(signal.SIGTERM, lambda *_: (print("asked to stop", flush=True), os._exit(7)))
launch.watch_launcher(world_size=2)
time.sleep(20)
print("still here", flush=True)
"""


def test_a_process_whose_launcher_is_gone_is_asked_to_stop():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "asked to stop", done


class Two:
    """Two processes, of which the second has other values."""

    world_size, main = 2, True

    def __init__(self, other):
        self.other = other

    def gather(self, own):
        return [own, self.other(own)]


def test_processes_that_differ_are_named_with_what_differs(tmp_path):
    config = Pair(tmp_path)
    config.write()
    loaded = load_configuration(
        Registry.load(installed=False), config_file=config.config_file, data_file=config.data_file
    )
    require_same_configuration(Two(dict), loaded)
    with pytest.raises(UserError) as error:
        require_same_configuration(Two(lambda own: {**own, "seed": 7, "train_batch_size": 3}), loaded)
    assert "seed is 42 in process 0 and 7 in process 1" in error.value.message
    assert "train_batch_size is 1 in process 0 and 3 in process 1" in error.value.message


def test_weights_that_differ_are_found_by_their_role():
    class Networks:
        def trained_roles(self):
            return ["student"]

        def named_parameters(self, role):
            return {"a": torch.ones(3), "b": torch.zeros(2)}

    require_same_start(Two(dict), Networks(), step=0, data="x")
    with pytest.raises(UserError, match="the weights of student is .* in process 0 and 'other' in process 1"):
        require_same_start(Two(lambda own: {**own, "the weights of student": "other"}), Networks(), step=0, data="x")
    with pytest.raises(UserError, match="the first step is 0 in process 0 and 4 in process 1"):
        require_same_start(Two(lambda own: {**own, "the first step": 4}), Networks(), step=0, data="x")
