"""Denoisers of published sizes on the meta device: their weights, what a LoRA adapts, and what a step takes."""

from types import SimpleNamespace

import pytest
from distill.core.plugin_api.family import ModelSettings
from distill.core.registry.registry import Registry
from distill.core.runs.activation_memory import is_adapted, planned_activations
from distill.model_families._empty import empty_denoiser
from support.published_configs import PUBLISHED

RUN = {"lora_target_modules": (), "model_type": "lora", "device": "cpu", "lora_rank": 64, "mixed_precision": "bf16"}
EDGE = 1024


@pytest.mark.parametrize("variant", PUBLISHED)
def test_a_published_size_is_built_adapted_and_estimated(variant):
    name, config, vae, size = PUBLISHED[variant]
    kind = Registry.load(installed=False).get("family", name)
    family = kind(kind.Config(), ModelSettings("published", resolution=(EDGE, EDGE)))
    family._vae_config = vae
    network = empty_denoiser(kind.architecture, config)
    assert sum(weight.numel() for weight in network.parameters()) == pytest.approx(size, rel=0.03)
    adapted = [key for key, module in network.named_modules() if is_adapted(key, module, family.lora_targets)]
    for block in family.block_names(network):
        assert any(key.startswith(f"{block}.") for key in adapted), block
    kept = planned_activations(SimpleNamespace(run=SimpleNamespace(**RUN)), family, network, (EDGE, EDGE))
    assert 1e8 < kept.recomputed < kept.whole
    assert kept.block < kept.whole / 2
