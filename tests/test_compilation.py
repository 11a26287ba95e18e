"""Compiled denoisers: one graph for each kind of region, call and shape, equal losses, and what is refused."""

import importlib.util
import json
import logging
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch._functorch.config
from distill.core.engine import compilation
from distill.core.engine.compilation import Compilation, CompileSettings
from distill.core.engine.kernels import kernels
from distill.core.engine.networks import Networks
from distill.core.errors import UserError
from distill.core.evaluation.sampling import sampling
from distill.core.plugin_api.context import Context, Runtime
from distill.core.plugin_api.family import LoraSettings, ModelSettings
from distill.core.plugin_api.method import MethodSetup
from distill.core.utils import eagerly
from distill.distill_methods.lcm import LCM
from distill.model_families.flux import Flux
from support.sdxl_setup import make_batch, make_setup
from support.tiny_families import write_tiny_flux
from support.tiny_sdxl import write_tiny_sdxl

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def uncompiled(monkeypatch):
    """Whatever a test compiles is forgotten after it."""
    monkeypatch.setattr(eagerly, "_compiled", "off")
    logging.getLogger("torch.__trace").setLevel(logging.WARNING)  # it writes out every graph where somebody listens
    limit = torch._dynamo.config.recompile_limit
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_flux(tmp_path_factory.mktemp("flux") / "model", guidance=False)


def make_run(model, mode, *, checkpointing=False):
    """An lcm run of a tiny FLUX whose regions PyTorch traces, without making kernels."""
    family = Flux(Flux.Config(), ModelSettings(str(model)))
    method = LCM(LCM.Config(), MethodSetup("lora", prediction_type="flow"))
    networks = Networks(
        family, method.roles(method.config, method.setup), lora=LoraSettings(4, 4.0), seed=0,
        gradient_checkpointing=checkpointing, merging=True,
    )  # fmt: skip
    made = Compilation(CompileSettings(mode, gradient_checkpointing=checkpointing), CPU, backend="eager")
    made.apply(networks, family, num_steps=1)
    return method, networks, Context(Runtime(family, networks, 0, CPU)), made


def losses(run, edges, *, after=lambda: None):
    """The losses of steps with latents of these edges, each followed by a step of the optimizer."""
    method, networks, context, _ = run
    optimizer = torch.optim.SGD(networks.parameters("student"), 0.1)
    found = []
    for step, edge in enumerate(edges):
        batch = make_batch(context._runtime.family, size=2, dtype=torch.float32, seed=step)
        batch = replace(batch, latents=batch.latents[..., :edge])
        (update,) = method.updates(context.at(step, batch.positions), batch, step)
        update.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        networks.update_averages("student")
        found.append(update.loss.item())
        after()
    return found


def test_regions_are_compiled_once_for_each_kind_of_call_and_shape_and_give_the_same_losses(model, uncompiled, caplog):
    edges, counts = [8, 8, 4], []
    expected = losses(make_run(model, "off"), edges)
    run = make_run(model, "regions", checkpointing=True)
    made, begun = run[-1], run[-1].num_graphs
    found = losses(run, edges, after=lambda: counts.append(made.num_graphs - begun))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    # two kinds of blocks, each called as teacher, student, and target on merged weights; the first block of the second
    # kind reads tensors laid out otherwise, the student's first one some without a gradient. Nothing is compiled
    # again for further blocks or steps, nor for merged weights that were made again.
    assert counts == [10, 10, 20]
    with caplog.at_level(logging.INFO):
        made.report(4)
        made.report(5)
    assert [line.split(",")[0] for line in caplog.messages] == ["step 4: 20 graphs compiled"]


def test_regions_of_a_unet_lie_inside_its_recomputation(tmp_path, uncompiled):
    """Its transformers recompute block by block, and PyTorch cannot trace a recomputation that switches adapters."""
    source, found = write_tiny_sdxl(tmp_path / "sdxl"), []
    one = SimpleNamespace(shard_units=lambda network: ["down_blocks.1.attentions.0"])
    for mode in ("off", "regions"):
        family, _, networks, context = make_setup(source, checkpointing=True, dtype=torch.float32)
        made = Compilation(CompileSettings(mode, gradient_checkpointing=True), CPU, backend="eager")
        made.apply(networks, one, num_steps=1)
        begun = made.num_graphs
        batch = make_batch(family, size=1, dtype=torch.float32)
        output = context.predict("student", batch.latents, torch.tensor([500]), batch.cond).output
        output.square().mean().backward()
        found.append([output, *(weight.grad for weight in networks.parameters("student"))])
    assert made.num_graphs > begun
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_validation_and_stopped_passes_run_as_they_are_written(model, uncompiled):
    run = make_run(model, "whole")
    _, networks, context, made = run
    begun = made.num_graphs
    batch = make_batch(context._runtime.family, size=2, dtype=torch.float32)
    t = torch.full((2,), 0.5, dtype=torch.float64)
    features = context.features("teacher", batch.latents, t, batch.cond)
    time, family = context.schedule.network_time(t), context._runtime.family
    with sampling(networks, "student") as network:
        family.predict(network, batch.latents, time, batch.cond)
    assert len(features) > 0
    assert made.num_graphs == begun
    found = context.predict("student", batch.latents, t, batch.cond).output
    assert made.num_graphs == begun + 1
    with sampling(networks, "student") as network:
        torch.testing.assert_close(found, family.predict(network, batch.latents, time, batch.cond))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "whole", "gradient_checkpointing": True}, "compile=regions"),
        ({"mode": "regions", "lockstep": True}, "parallel=replicate"),
    ],
)
def test_what_cannot_be_compiled_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Compilation(CompileSettings(**settings), CPU)


def test_without_a_compiler_regions_are_refused_and_auto_is_off(monkeypatch):
    monkeypatch.setattr(compilation, "compiler_problem", lambda device: "there is no C++ compiler")
    with pytest.raises(UserError, match="compile = regions: there is no C\\+\\+ compiler"):
        CompileSettings("regions").check(CPU)
    assert CompileSettings("auto").chosen(CUDA, num_steps=10_000) == "off"


@pytest.mark.parametrize(
    ("settings", "device", "steps", "chosen"),
    [
        ({}, CUDA, 1000, "regions"),
        ({}, CUDA, 999, "off"),
        ({}, CPU, 10_000, "off"),
        ({"dropout": 0.1}, CUDA, 10_000, "off"),
        ({"quantised": True}, CUDA, 10_000, "off"),
        ({"lockstep": True}, CUDA, 10_000, "off"),
    ],
)
def test_auto_compiles_long_runs_on_cuda(monkeypatch, settings, device, steps, chosen):
    monkeypatch.setattr(compilation, "compiler_problem", lambda device: None)
    assert CompileSettings("auto", **settings).chosen(device, num_steps=steps) == chosen


@pytest.mark.parametrize("quantised", [False, True])
def test_what_is_compiled_for_packed_weights_is_not_stored(quantised):
    """A second run of SD3.5 on an fp8 base read sizes such as 93841471036533 from PyTorch's store, or crashed."""
    kept = {"enable_autograd_cache": True, "activation_memory_budget": 1.0}
    dynamo = torch._dynamo.config
    with torch._functorch.config.patch(kept), dynamo.patch(recompile_limit=8, suppress_errors=False):
        Compilation(CompileSettings("regions", quantised=quantised), CPU)._configure()
        assert torch._functorch.config.enable_autograd_cache is not quantised


def test_no_compiler_is_looked_for_where_nothing_would_be_compiled(monkeypatch):
    """Looking for one imports it, a quarter of a second of every run's start."""
    monkeypatch.setattr(compilation, "compiler_problem", lambda device: pytest.fail("it was looked for"))
    assert CompileSettings("auto").chosen(CPU, num_steps=10**6) == "off"
    assert CompileSettings("auto").chosen(CUDA, num_steps=10) == "off"


# -- kernels ----------------------------------------------------------------------------------------------------------


def test_fp32_is_not_rounded_to_tf32_unless_asked_and_pytorchs_flags_come_back(caplog):
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    assert before == (False, True)  # PyTorch rounds convolutions
    for asked, said in ((False, "in full"), (True, "rounded to TF32")):
        caplog.clear()
        with caplog.at_level(logging.INFO), kernels(CUDA, tf32=asked, attention=()):
            assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (asked, asked)
        assert caplog.messages == [f"kernels: fp32 {said}; attention: PyTorch's order"]
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_attention_runs_on_the_kernels_that_are_named():
    q = torch.randn(1, 1, 4, 8)
    with kernels(CPU, tf32=False, attention=("math",)), torch.profiler.profile() as profile:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_attention_math" in names
    assert not any("flash" in name for name in names)


@pytest.mark.parametrize(
    ("card", "package", "refused"), [(9, True, None), (8, True, "no Hopper"), (9, False, "not inst")]
)
def test_flash_attention_3_takes_the_place_of_flash_where_it_is_there(monkeypatch, card, package, refused):
    calls = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (card, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package or None)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", calls.append)
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", lambda: calls.append("restored"))
    block = kernels(CUDA, tf32=False, attention=("flash3", "flash", "math"))
    if refused:
        with pytest.raises(UserError, match=f"attention_kernels = flash3: .*{refused}"), block:
            pass
        assert calls == []
        return
    with block:
        assert calls == ["FA3"]
        assert torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True) == [
            torch.nn.attention.SDPBackend.FLASH_ATTENTION, torch.nn.attention.SDPBackend.MATH,
        ]  # fmt: skip
    assert calls == ["FA3", "restored"]


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_another(tmp_path):
    """With kernels made by the compiler of this machine, over whole runs."""
    found = []
    for mode in ("off", "regions"):
        words = ["run", "--method", "lcm", "--family", "sdxl", "--output-dir", str(tmp_path / mode)]
        settings = {"max_train_steps": 4, "compile": mode, "mixed_precision": "no", "validation_step_interval": 0,
                    "evaluation_num_samples": 0, "report_to": "none", "log_step_interval": 1}  # fmt: skip
        words += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        subprocess.run([sys.executable, "-m", "distill", *words], check=True, timeout=3600)
        lines = (tmp_path / mode / "metrics.jsonl").read_text().splitlines()
        found.append([json.loads(line)["loss"] for line in lines])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
