"""Families at the sizes of the published models, on the meta device: weights, LoRA targets, a prediction, memory."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distill.core.config.load import load_configuration
from distill.core.plugin_api.family import MicroConditioning, ModelSettings
from distill.core.registry.registry import Registry
from distill.core.runs.activation_memory import is_adapted, latent_size
from distill.core.runs.planned_memory import planned_memory
from distill.core.utils.memory import phases
from support.published_configs import FLOW, PUBLISHED
from support.small_run import write_run

SIZE = (1024, 1024)
DOCS = Path(__file__).parent.parent / "docs" / "families.md"
ATTENTION = {"attn", "attn1", "attention", "self_attn"}


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request, tmp_path_factory):
    """A family on a folder of configs alone."""
    told = PUBLISHED[request.param]
    folder, kind = tmp_path_factory.mktemp("published"), Registry.load(installed=False).get("family", told["family"])
    built = kind.architecture
    parts = {built.denoiser: (built.denoiser_class, told["denoiser"]), "vae": (built.autoencoder, told["vae"])}
    for part, (name, config) in parts.items():
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps({"_class_name": name, **config}))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(told.get("scheduler", FLOW)))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": built.pipeline}))
    settings = ModelSettings(source=str(folder), resolution=SIZE, weight_dtype="bfloat16")
    return SimpleNamespace(
        family=kind(kind.Config(), settings),
        name=request.param,
        billions=told["billions"],
        source=told["source"],
        read=lambda name: json.loads((folder / name).read_text()),
    )


def test_its_family_takes_its_configs(published):
    published.family.architecture.check("the model", published.read)
    assert published.family.taken_channels == published.family.latent_channels


def test_it_has_the_published_number_of_weights_and_targets_in_every_block(published):
    network, family = published.family.empty_network(), published.family
    count = sum(weight.numel() for weight in network.state_dict().values()) / 1e9
    assert count == pytest.approx(published.billions, rel=0.03)
    adapted = [name for name, module in network.named_modules() if is_adapted(name, module, family.lora_targets)]
    blocks = blocks_of(network)
    assert len(blocks) >= 12
    units = {
        unit for unit in family.shard_units(network)
        if any(parameter.ndim > 1 for parameter in network.get_submodule(unit).parameters())
    }  # fmt: skip
    for block in blocks | units:
        assert any(name.startswith(f"{block}.") for name in adapted), block


def blocks_of(network):
    """Names of the modules that have attention of their own."""
    return {name for name, module in network.named_modules() if ATTENTION & dict(module.named_children()).keys()}


def test_it_predicts_without_values(published):
    family, network = published.family, published.family.empty_network()
    cond = family.empty_conditioning(network)
    assert cond is not None
    x_t = torch.empty(1, family.latent_channels, *latent_size(family, SIZE), device="meta")
    with torch.no_grad():
        assert family.predict(network, x_t, torch.zeros(1, device="meta"), cond).shape == x_t.shape
    micro = MicroConditioning([SIZE], [(0, 0)], [SIZE])
    assert family.condition({key: cond[key] for key in family.embed_keys}, micro).keys() == cond.keys()


def test_what_a_run_needs_stands_in_the_docs(published, tmp_path, monkeypatch):
    """What `distill doctor` counts of a LoRA of rank 64 with lcm: one image a step, bf16, recomputed blocks."""
    run = {"lora_rank": 64, "lora_alpha": 64, "mixed_precision": "bf16", "gradient_checkpointing": True}
    run |= {"train_batch_size": 1, "gradient_accumulation_steps": 1, "resolution": SIZE[0], "device": "cpu"}
    family, model = published.family, Path(published.family.settings.source)
    registry = Registry.load(installed=False)
    config = write_run(tmp_path, model=model, model_family=family.name, **run)
    monkeypatch.setattr(family, "text_bytes", lambda: 0)  # its text encoders are not here
    configuration = load_configuration(registry, config_file=config, flags={})
    plan = planned_memory(configuration, registry, family=family)
    assert plan is not None
    assert plan.kept is not None
    assert plan.kept.recomputed < plan.kept.whole / 4
    row = (
        f"| `{family.name}` | {published.name} | {plan.base_parameters / 1e9:.2f} "
        f"| {plan.trained_parameters / 1e6:.0f} | {plan.kept.recomputed / 1e9:.1f} | {plan.kept.whole / 1e9:.0f} "
        f"| {phases(plan)['train'] / 1e9:.1f} | {published.source} |"
    )
    assert row in DOCS.read_text(encoding="utf-8").splitlines(), row
