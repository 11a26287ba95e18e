"""Memory of each of several processes: the arithmetic, what FSDP really leaves on a process, and what doctor says."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from distill.core.config.load import load_configuration
from distill.core.engine import zero
from distill.core.engine.fsdp import FullyShard
from distill.core.plugin_api.family import ModelSettings
from distill.core.registry.registry import Registry
from distill.core.runs import memory_plan
from distill.core.runs.planned_memory import planned_memory, units
from distill.core.utils.memory import OVERHEAD_BYTES, MemorySettings, estimate
from distill.core.utils.process_memory import ZERO_BUCKET, ZERO_LIVE, division_problem, process_memory
from distill.core.utils.strategies import STRATEGIES, Division, ParallelSettings
from distill.model_families.sd3 import SD3
from distill.model_families.sdxl import SDXL
from support.quickstart import command
from support.sdxl_setup import make_batch
from support.small_run import write_run
from support.tiny_sdxl import write_tiny_sdxl

BILLION = 10**9
FULL = MemorySettings(
    base_parameters=2 * BILLION, trained_parameters=4 * BILLION + 1000, latent_pixels=1, base_bytes=2, compute_bytes=2,
    averaged_parameters=2 * BILLION, full_roles=2, full_parameters=4 * BILLION, averaged_full_parameters=2 * BILLION,
    largest_unit=50_000_000, outside_units=10_000_000,
)  # fmt: skip
"""Two roles of whole networks of 2 billion weights, an average of one of them, and heads of 1000 weights."""
LORA = MemorySettings(
    base_parameters=2 * BILLION, trained_parameters=100_000_000, latent_pixels=1, base_bytes=2, compute_bytes=2,
    averaged_parameters=100_000_000, largest_unit=50_000_000, outside_units=10_000_000,
)  # fmt: skip
REGISTRY = Registry.load(installed=False)


def shared(settings: MemorySettings, division: Division) -> dict[str, int]:
    parts = process_memory(settings, division).parts
    return {name: parts[name] for name in ("weights", "trained", "gradients", "optimizer", "averages", "gathered")}


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("replicate", (4e9, 16e9 + 4000, 16e9 + 4000, 32e9 + 8000, 8e9, 0)),
        ("fsdp", (0.5e9, 2e9 + 4000, 2e9 + 4000, 4e9 + 8000, 1e9, 10e6 * (2 + 2 * 4) + 2 * 4 * 2 * 50e6)),
        ("zero2", (4e9, 16e9 + 4000, 2e9 + 4000, 6e9 + 8000, 8e9, 4 * ZERO_BUCKET)),
        ("zero3", (0.5e9, 2e9 + 4000, 2e9 + 4000, 6e9 + 8000, 1e9, 4 * (2 * ZERO_BUCKET + ZERO_LIVE))),
    ],
)
def test_eight_processes_divide_whole_networks_and_hold_heads_each(strategy, expected):
    found = shared(FULL, Division(ParallelSettings(strategy), 8))
    assert tuple(found.values()) == pytest.approx(expected, rel=0, abs=2)
    whole = estimate(FULL)
    rest = process_memory(FULL, Division(ParallelSettings(strategy), 8)).total - sum(found.values())
    casts = 2 * (FULL.full_parameters if strategy in ("replicate", "zero2") else 0) + 2 * 1000
    assert rest == whole.activations + OVERHEAD_BYTES + casts, "the same on each, but casts of weights that are whole"


@pytest.mark.parametrize(("strategy", "gradients"), [("replicate", 8e9), ("fsdp", 1e9), ("zero2", 1e9), ("zero3", 2e9)])
def test_gradients_are_of_one_role_at_a_time_but_for_the_buffers_of_zero3(strategy, gradients):
    one, division = replace(FULL, largest_role=FULL.full_parameters // 2), Division(ParallelSettings(strategy), 8)
    assert process_memory(one, division).parts["gradients"] == gradients
    adapters = replace(LORA, largest_role=60_000_000)
    assert process_memory(adapters, Division(ParallelSettings("fsdp"), 8)).parts["gradients"] == 4 * 60_000_000
    for settings in (one, adapters):
        assert process_memory(settings, Division(ParallelSettings("replicate"), 8)).total == estimate(settings).total


def test_replicate_is_what_one_process_takes():
    assert process_memory(FULL, Division(ParallelSettings("replicate"), 8)).total == estimate(FULL).total
    assert process_memory(LORA, Division(ParallelSettings("replicate"), 8)).total == estimate(LORA).total


def test_each_process_copies_its_own_parts_for_a_checkpoint_under_fsdp_and_else_the_first_one_all():
    staged = replace(FULL, staged=True)
    whole = estimate(staged).checkpoint_copy
    copies = {
        name: process_memory(staged, Division(ParallelSettings(name), 8)).parts["checkpoint_copy"]
        for name in STRATEGIES
    }
    heads = 12 * 1000  # which each process has
    assert copies == {"replicate": whole, "fsdp": (whole - heads) // 8 + heads, "zero2": whole, "zero3": whole}


def test_of_a_lora_fsdp_divides_the_base_alone():
    found = shared(LORA, Division(ParallelSettings("fsdp"), 8))
    assert found == {
        "weights": 500_000_000,
        "trained": 400_000_000,
        "gradients": 400_000_000,
        "optimizer": 800_000_000,
        "averages": 400_000_000,
        "gathered": 2 * (10_000_000 + 2 * 50_000_000),
    }


def test_two_copies_among_eight_processes_divide_by_four():
    assert shared(FULL, Division(ParallelSettings("fsdp", 4), 8)) == shared(FULL, Division(ParallelSettings("fsdp"), 4))


@pytest.mark.parametrize(
    ("strategy", "host", "left"),
    [
        ("fsdp", 0.5e9 + 2e9 + 2e9 + 4e9 + 1e9, {"weights": 0, "trained": 4000, "averages": 0}),
        ("zero2", 2e9 + 6e9, {"weights": 4e9, "trained": 16e9 + 4000, "averages": 8e9}),
        ("zero3", 0.5e9 + 2e9 + 2e9 + 6e9 + 1e9, {"weights": 0, "trained": 4000, "averages": 0}),
    ],
)
def test_what_is_divided_can_lie_on_the_host(strategy, host, left):
    memory = process_memory(FULL, Division(ParallelSettings(strategy, offload=True), 8))
    assert memory.host == host
    assert {name: memory.parts[name] for name in left} == left
    assert memory.parts["gathered"] == process_memory(FULL, Division(ParallelSettings(strategy), 8)).parts["gathered"]


@pytest.mark.parametrize(
    ("settings", "division", "words"),
    [
        (LORA, Division(ParallelSettings("zero2"), 8), "this run trains adapters: use replicate or fsdp"),
        (LORA, Division(ParallelSettings("zero3"), 8), "this run trains adapters: use replicate or fsdp"),
        (FULL, Division(ParallelSettings("replicate", offload=True), 8), "nothing that could be offloaded"),
        (FULL, Division(ParallelSettings("fsdp", 3), 8), "8 processes are not a multiple of the 3 that share one copy"),
        (FULL, Division(ParallelSettings("zero3", 4), 8), "divides among all processes"),
    ],
)
def test_what_cannot_be_is_said_with_the_reason(settings, division, words):
    assert words in (division_problem(settings, division) or "")
    assert all(division_problem(FULL, Division(ParallelSettings(strategy), 8)) is None for strategy in STRATEGIES)


def test_a_run_is_warned_of_what_its_own_processes_need(monkeypatch):
    """It was warned of what one process would need, and told of a quantised base, which fsdp refuses."""
    monkeypatch.setattr(memory_plan, "free_memory_bytes", lambda device: 20e9)
    warn = partial(memory_plan.memory_warning, FULL, "cuda:0", quantizers=False)
    assert warn(division=Division(ParallelSettings("fsdp"), 8)) is None
    needed = process_memory(FULL, Division(ParallelSettings("fsdp"), 2)).total
    said = warn(division=Division(ParallelSettings("fsdp"), 2)) or ""
    assert said.startswith(f"this run is estimated at {needed / 1e9:.1f} GB of memory on each process, and 20.0 GB are")
    alone = warn(division=Division(ParallelSettings("replicate"), 1)) or ""
    assert alone.startswith(f"this run is estimated at {estimate(FULL).total / 1e9:.1f} GB of memory, and 20.0 GB are")


# -- what FSDP leaves on a process ------------------------------------------------------------------------------------


@pytest.fixture
def four_processes():
    """The first of four processes that answer nothing, so that it divides and holds its own part."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    torch.distributed.destroy_process_group()


def test_fsdp_leaves_on_each_process_what_was_estimated(four_processes, tmp_path):
    """With AdamW after a step, block by block, on a network whose dimensions divide by four."""
    from diffusers import SD3Transformer2DModel
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=64, pooled_projection_dim=32,
        pos_embed_max_size=8,
    )  # fmt: skip
    whole = sum(weight.numel() for weight in network.parameters())
    blocks = [sum(weight.numel() for weight in block.parameters()) for block in network.transformer_blocks]
    family = SD3(SD3.Config(), ModelSettings("nowhere"))
    assert units(family, network) == (max(blocks), whole - sum(blocks))
    for block in network.transformer_blocks:
        fully_shard(block)
    fully_shard(network)
    optimizer = torch.optim.AdamW(network.parameters())
    for weight in network.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()

    def held(tensors) -> int:
        return sum(one.to_local().numel() * one.element_size() for one in tensors if isinstance(one, DTensor))

    settings = MemorySettings(
        base_parameters=whole, trained_parameters=whole, latent_pixels=1, full_roles=1, full_parameters=whole
    )
    parts = process_memory(settings, Division(ParallelSettings("fsdp"), 4)).parts
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert held(network.parameters()) == pytest.approx(parts["trained"], rel=0.01)
    assert held(weight.grad for weight in network.parameters()) == pytest.approx(parts["gradients"], rel=0.01)
    assert held(moments) == pytest.approx(parts["optimizer"], rel=0.01)
    assert parts["trained"] / (4 * whole) < 0.3


def test_each_block_gathers_the_next_one_early_and_a_pass_that_stops_leaves_none(four_processes, tmp_path):
    """Neither gathered nor on its way: it would be used in a later pass, although the weights have changed by then."""
    family = SDXL(SDXL.Config(), ModelSettings(str(write_tiny_sdxl(tmp_path / "tiny"))))
    network = family.load_network().requires_grad_(False)
    placed = SimpleNamespace(base=network, roles={}, take_parts=lambda parts: None, on_change=lambda listener: None)
    processes = SimpleNamespace(world_size=4, device=torch.device("cpu"), require_group=lambda: None)
    strategy = FullyShard(processes, ParallelSettings("fsdp"))
    strategy.place(placed, family)
    blocks = [network.get_submodule(name) for name in family.shard_units(network)]
    groups = [block._get_fsdp_state()._fsdp_param_groups[0] for block in blocks]

    def gathered() -> list[int]:
        return [n for n, group in enumerate(groups) if group.is_unsharded or group._all_gather_result is not None]

    seen: list[tuple[int, list[int]]] = []
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, number=number: seen.append((number, gathered())))
    batch, time = make_batch(family, 1, dtype=torch.float32), torch.tensor([500.0])
    with torch.no_grad():
        family.predict(network, batch.latents, time, batch.cond)
    last = len(blocks) - 1
    assert seen == [(n, [n, n + 1] if n < last else [n]) for n in range(last + 1)]
    assert gathered() == []

    with torch.no_grad(), strategy.partial_pass(network):
        family.features(network, batch.latents, time, batch.cond)
    assert gathered() == []
    with torch.no_grad():  # as it would be without that block
        family.features(network, batch.latents, time, batch.cond)
    assert len(gathered()) == 1


# -- doctor -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    quiet = {"validation_step_interval": 0, "report_to": "none", "max_train_steps": 1, "train_batch_size": 2}
    full = {"distillation_method": "dmd2", "model_type": "full", "gradient_accumulation_steps": 3}
    full |= {"distillation_config": {"dmd2": {"gan_weight": 0.1}}}
    return {"lora": write_run(root, output="lora", **quiet), "full": write_run(root, output="full", **quiet, **full)}


def memory_of(config, *options: str) -> dict[str, str]:
    """Rows of doctor's section on the memory of several processes."""
    done = command("doctor", "--config", str(config), *options)
    assert done.code == 0, done.err
    section = done.out.partition("\nmemory of ")[2].partition("\n\n")[0].splitlines()[1:]
    return {line.split()[0]: " ".join(line.split()[1:]) for line in section}


def test_the_settings_of_a_run_say_what_is_of_whole_networks(configs):
    lora, full = (planned_memory(load_configuration(REGISTRY, config_file=file), REGISTRY) for file in configs.values())
    assert full.full_roles == 2, "student and fake score"
    assert full.full_parameters == 2 * full.base_parameters
    assert full.trained_parameters > full.full_parameters, "and the heads of the discriminator"
    assert (lora.full_roles, lora.full_parameters) == (0, 0)
    assert 0 < lora.largest_unit < lora.base_parameters
    assert 0 < lora.outside_units < lora.base_parameters


def test_doctor_compares_the_strategies_in_a_table(configs):
    rows = memory_of(configs["full"], "--processes", "4")
    assert rows["step"].startswith("4 x 2 x 3 = 24 samples")
    assert rows["on"] == "each weights trained gradients optimizer averages gathered other total host"
    assert all(len(rows[strategy].split()) == 18 for strategy in STRATEGIES)
    assert rows["cards"].startswith("24 GB: replicate, fsdp, zero2, zero3 fit; 48 GB:")
    assert "on cpu for each of 4 processes: " in rows["free"]
    rows = memory_of(configs["lora"], "--processes", "4")
    assert rows["zero2"] == rows["zero3"] != ""
    assert rows["zero2"].endswith("this run trains adapters: use replicate or fsdp")
    assert rows["cards"].startswith("24 GB: replicate, fsdp fit; ")


def test_keys_of_the_run_count_where_no_option_is_given(configs):
    given = ("--set", "parallel=fsdp", "--set", "parallel_offload=true", "--set", "parallel_shard_size=2")
    options = ("--parallel", "fsdp", "--offload", "--shard-size", "2")
    by_keys, by_options = (memory_of(configs["full"], "--processes", "4", *each) for each in (given, options))
    assert by_keys.pop("free").split()[1:] == by_options.pop("free").split()[1:], (
        "how much that is may change meanwhile"
    )
    assert by_keys == by_options
    rows = memory_of(configs["full"], "--processes", "4", "--set", "optimizer=muon")
    assert rows["fsdp"].startswith("optimizer = muon with parallel = fsdp")


def test_doctor_says_one_strategy_by_purpose(configs):
    rows = memory_of(configs["full"], "--processes", "2", "--parallel", "fsdp", "--offload")
    assert rows["trained"] == "0 MB"
    assert rows["host"].endswith("of each process in the machine's memory")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--processes", "2", "--parallel", "zero2"), "--parallel zero2: it divides networks that are trained whole"),
        (("--parallel", "fsdp"), "add --processes N"),
        (("--processes", "4", "--parallel", "fsdp", "--shard-size", "3"), "not a multiple of the 3"),
    ],
)
def test_doctor_refuses_what_cannot_be(configs, options, words):
    done = command("doctor", "--config", str(configs["lora"]), *options)
    assert done.code == 2
    assert words in done.err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("optimizer=muon",), "optimizer = muon: its step looks at whole matrices"),
        (("optimizer=adamw_bf16",), "optimizer = adamw_bf16: DeepSpeed steps a float32 copy"),
        (("model_type=lora", "distillation_config.dmd2.fake_score=full"), "model_type = lora: it divides networks"),
        (("distillation_method=meanflow", "distillation_config.meanflow.derivative=exact"), "meanflow differentiates"),
    ],
)
def test_doctor_says_what_zero_refuses_where_deepspeed_is_not_installed(configs, monkeypatch, given, words):
    monkeypatch.setattr(zero, "find_spec", lambda name: None)
    options = [part for each in given for part in ("--set", each)]
    done = command("doctor", "--config", str(configs["full"]), "--processes", "2", "--parallel", "zero3", *options)
    assert done.code == 2
    assert "--parallel zero3: parallel = zero3" in done.err
    assert words in done.err
    assert "not installed" not in done.err
