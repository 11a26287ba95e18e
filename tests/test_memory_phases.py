"""Memory phase by phase: what is estimated is what the real optimizer, encoders and passes take; and the verdict."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from distill.core.config.load import load_configuration
from distill.core.engine.optimize import RoleOptimizer
from distill.core.plugin_api.family import ModelSettings
from distill.core.plugin_api.optimizer import OptimizerSettings
from distill.core.registry.registry import Registry
from distill.core.runs.memory_verdict import CARDS, Verdict
from distill.core.runs.optimizer_memory import state_bytes
from distill.core.runs.planned_memory import planned_memory
from distill.core.utils.memory import OVERHEAD_BYTES, MemorySettings, cast_bytes, estimate, peak, phases
from distill.core.utils.packages import missing
from distill.core.utils.simulated_memory import peak_bytes
from distill.core.utils.tensor_tree import optimizer_to_tensors
from distill.distill_methods.dmd2 import DMD2
from distill.model_families.sdxl import SDXL
from safetensors.torch import save_file
from support.quickstart import command
from support.sdxl_methods import make_parts
from support.sdxl_setup import make_batch
from support.small_run import write_run
from torch.utils._python_dispatch import TorchDispatchMode

REGISTRY = Registry.load(installed=False)
SETTINGS = OptimizerSettings(1e-4, 0.9, 0.999, 1e-8, 0.01)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return folder


def planned(root, *, output="planned", **settings):
    config = write_run(root, output=output, validation_step_interval=0, **settings)
    configuration = load_configuration(REGISTRY, config_file=config, flags={})
    return configuration, planned_memory(configuration, REGISTRY)


# -- the optimizer's state --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REGISTRY.names("optimizer"))
def test_the_bytes_of_state_are_those_of_the_real_optimizer(name):
    """Of another weight than the one that is measured, and as a checkpoint stores them."""
    kind = REGISTRY.get("optimizer", name)
    if missing(kind.packages):
        pytest.skip(f"{name} is not installed")
    plugin = kind(kind.Config())
    weight = torch.nn.Parameter(torch.ones(64, 640, dtype=getattr(torch, kind.parameter_dtype)))
    with torch.compiler.set_stance("force_eager"):
        optimizer = plugin.build([weight], SETTINGS)
        for _ in range(3):
            optimizer.zero_grad()
            weight.float().square().mean().backward()
            optimizer.step()
    tensors, _ = optimizer_to_tensors(plugin.state(optimizer))
    stored = sum(value.numel() * value.element_size() for value in tensors.values()) / weight.numel()
    assert state_bytes(plugin) == pytest.approx(stored, rel=0.07)
    known = {"adamw": 8, "adamw_bf16": 8, "lion": 4, "optimi-lion": 4, "prodigy": 16}
    assert state_bytes(plugin) == pytest.approx(known.get(name, stored), rel=0.07)
    if kind.state_bytes is not None and name != "soap":  # its preconditioners depend on the weight's shape
        assert kind.state_bytes == pytest.approx(stored, abs=0.1)


def test_a_run_counts_the_state_that_was_measured(root):
    for name, expected in {"adamw_bf16": 8, "lion": 4}.items():
        _, settings = planned(root, optimizer=name)
        assert settings.optimizer_bytes == pytest.approx(expected, rel=1e-3)


# -- phases -----------------------------------------------------------------------------------------------------------


def test_encoding_and_decoding_take_what_the_real_autoencoder_makes(root):
    family = SDXL(SDXL.Config(encoded_pixels_at_once=2 * 32 * 24), ModelSettings(str(root / "model")))
    pixels, latents = torch.rand(2, 3, 24, 32), torch.randn(2, 4, 12, 16)
    vae = family._autoencoder()
    made = peak_bytes(lambda: family.encode_images(pixels))
    assert family.encoding_bytes((32, 24), images=2) == pytest.approx(made, rel=0.02)
    made = peak_bytes(lambda: family.decode_latents(latents))
    assert family.generating_bytes((32, 24), images=2) == pytest.approx(made, rel=0.02)
    assert family.autoencoder_bytes() == sum(weight.numel() * 4 for weight in vae.parameters())
    encoders = family._text_encoders().encoders.values()
    assert family.text_bytes() == sum(weight.numel() * 4 for one in encoders for weight in one.parameters())
    one = SDXL(SDXL.Config(encoded_pixels_at_once=1), ModelSettings(str(root / "model")))
    assert one.encoding_bytes((32, 24), images=2) == one.encoding_bytes((32, 24), images=1)
    half = SDXL(SDXL.Config(vae_dtype="bfloat16"), ModelSettings(str(root / "model")))
    assert half.encoding_bytes((32, 24), images=1) == pytest.approx(one.encoding_bytes((32, 24), images=1) / 2)


def test_the_total_is_the_phase_that_takes_most(root):
    settings = MemorySettings(1000, 100, 1, staged=True, gradient_checkpointing=True, encoding_bytes=5 * 10**9)
    parts = estimate(settings)
    assert parts.total == 4000 + 4 * 100 + 4 * 100 + 8 * 100 + parts.activations + OVERHEAD_BYTES
    assert parts.checkpoint_copy == 1200
    assert phases(settings) == {"encode": 5 * 10**9 + OVERHEAD_BYTES, "train": parts.total}
    assert peak(settings) == 5 * 10**9 + OVERHEAD_BYTES
    later = phases(replace(settings, validating_bytes=70, exporting_bytes=900))
    held = 4000 + 4 * 100 + 8 * 100 + OVERHEAD_BYTES
    assert (later["validate"], later["export"]) == (held + 70, held + 900)


def test_gradients_are_those_of_one_role_at_a_time(root, monkeypatch):
    """A role is stepped, and its gradients are dropped, before those of the next are made."""
    matching = {"num_inference_steps": 1, "fake_updates_per_student_update": 1, "gan_weight": 0.1}
    _, settings = planned(root, model_type="full", distillation_method="dmd2", distillation_config={"dmd2": matching})
    parts = make_parts(DMD2, root / "model", model_type="full", dtype=torch.float32, **matching)
    own = [weight for role in parts.networks.trained_roles() for weight in parts.networks.parameters(role)]
    step, held = RoleOptimizer.step, []

    def watched(self, *args, **settings):
        held.append(sum(weight.grad.nbytes for weight in own if weight.grad is not None))
        return step(self, *args, **settings)

    monkeypatch.setattr(RoleOptimizer, "step", watched)
    parts.loop.step(0, [make_batch(parts.family, size=1, dtype=torch.float32)])
    assert len(held) == 3
    assert estimate(settings).gradients == pytest.approx(max(held), rel=0.02)
    assert estimate(settings).gradients < 0.5 * estimate(settings).trained


def test_what_lies_behind_features_has_neither_gradients_nor_state(root):
    """Of a full discriminator's encoder; a pass for its features stops where they are."""
    stages = {
        "teacher_steps": 8,
        "student_steps": [4, 2],
        "adversarial_weight": [0, 1],
        "discriminator_encoder": "full",
    }
    _, settings = planned(root, distillation_method="progressive", distillation_config={"progressive": stages})
    family = SDXL(SDXL.Config(), ModelSettings(str(root / "model")))
    network = family.student_network(family.load_network(), guidance_embedding=False)
    batch = make_batch(family, size=1, dtype=torch.float32)
    sum(level.sum() for level in family.features(network, batch.latents, torch.tensor([5]), batch.cond)).backward()
    idle = sum(weight.numel() for weight in network.parameters() if weight.grad is None)
    assert settings.idle_parameters == idle > 0
    assert estimate(settings).optimizer == pytest.approx(8 * (settings.trained_parameters - idle), rel=1e-3)


def test_fusing_takes_the_base_and_one_layer(root):
    save_file({"unet.conv_in.diff": torch.zeros(16, 4, 3, 3)}, root / "style.safetensors")
    _, without = planned(root, mixed_precision="bf16")
    _, settings = planned(root, mixed_precision="bf16", teacher_lora=[{"path": str(root / "style.safetensors")}])
    family = SDXL(SDXL.Config(), ModelSettings(str(root / "model")))
    sizes = [weight.numel() for weight in family.empty_network().parameters()]
    assert settings.loading_bytes == 2 * sum(sizes) + 3 * 4 * max(sizes)
    assert without.loading_bytes == 0


def test_autocasts_copies_of_whole_weights_are_counted(root):
    """Against the copies that a pass of the real network makes; its first and last modules compute in fp32."""
    _, settings = planned(root, model_type="full", mixed_precision="bf16")
    family = SDXL(SDXL.Config(), ModelSettings(str(root / "model"), weight_dtype="bfloat16"))
    network = family.student_network(family.load_network(), guidance_embedding=False)
    own, copies = {weight.data_ptr() for weight in network.parameters()}, []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in own:
                copies.append(result.numel() * result.element_size())
            return result

    text = {"prompt_embeds": torch.zeros(1, 16, 80), "pooled_prompt_embeds": torch.zeros(1, 48)}
    micro = {"time_ids": torch.zeros(1, 6)}
    with torch.autocast("cpu", dtype=torch.bfloat16), Copies():
        family.predict(network, torch.zeros(1, 4, 16, 16), torch.tensor([5]), {**text, **micro})
    assert settings.full_roles == 1
    assert cast_bytes(settings) == pytest.approx(sum(copies), rel=0.05)
    assert cast_bytes(replace(settings, compute_bytes=4)) == 0


# -- the verdict ------------------------------------------------------------------------------------------------------


def test_the_verdict_names_changes_with_which_the_run_really_takes_that(root):
    configuration, settings = planned(root, model_type="full", train_batch_size=8)
    verdict = Verdict(configuration, REGISTRY, settings)
    expected = peak(settings)
    assert verdict.line(expected) == f"fits: {expected / 1e6:.0f} MB of {expected / 1e6:.0f} MB"
    for room in (expected - 1_000_000, expected - 2_500_000, expected - 6_000_000):
        for choice in verdict.fitting(room):
            assert choice.num_bytes <= room
            labels = [label.partition(" (")[0].partition("=") for label in choice.labels]
            changes = {
                key: value if value not in ("true", "1") else int(value == "1") or True for key, _, value in labels
            }
            _, changed = planned(root, output="changed", **{"model_type": "full", "train_batch_size": 8, **changes})
            assert peak(changed) == pytest.approx(choice.num_bytes, abs=20_000)
            assert f"{', '.join(choice.labels[:1])}" in verdict.line(room)
    assert "model_type=lora" in verdict.line(expected - 6_000_000)
    assert verdict.line(1000).startswith(f"does not fit: {expected / 1e6:.0f} MB of 0 MB; nothing tried here would; ")


def test_doctor_says_phases_verdict_and_cards(root):
    examined = command("doctor", "--config", str(write_run(root, output="doctor")))
    rows = [line.strip() for line in examined.out.splitlines()]
    (total,) = [line for line in rows if line.startswith("total") and "takes most" in line]
    assert total.endswith(": to train takes most")
    for start in (
        "to encode",
        "to train",
        "to validate",
        "to export",
        "verdict",
        *(f"{size} GB card" for size in CARDS),
    ):
        assert [line for line in rows if line.startswith(start)], start
    assert [line for line in rows if line.startswith("8 GB card") and "fits (" in line]
    (copied,) = [line for line in rows if line.startswith("checkpoint_copy")]
    assert copied.endswith("(only where there is room)")
