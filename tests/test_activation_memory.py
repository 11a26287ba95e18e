"""What a sample keeps for the backward pass, from the meta device, against what real networks keep."""

from types import SimpleNamespace

import pytest
import torch
from distill.core.engine.networks import Networks
from distill.core.plugin_api.family import LoraSettings, MicroConditioning, ModelSettings
from distill.core.plugin_api.method import Role
from distill.core.runs.activation_memory import planned_activations
from distill.core.utils.memory import MemorySettings, estimate, savings
from distill.core.utils.simulated_training import KeptBytes
from distill.model_families.flux import Flux
from distill.model_families.sd3 import SD3
from distill.model_families.sdxl import SDXL
from support.tiny_families import write_tiny_flux, write_tiny_sd3
from support.tiny_sdxl import write_tiny_sdxl

EDGE, RANK = {SDXL: 96, SD3: 64, Flux: 96}, 4


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        SDXL: write_tiny_sdxl(root / "sdxl"),
        SD3: write_tiny_sd3(root / "sd3"),
        Flux: write_tiny_flux(root / "flux", guidance=True),
    }


class Kept:
    """Bytes of the storages that a graph keeps, without weights, of which nothing is cast here."""

    def __init__(self, network):
        weights = [*network.parameters(), *network.buffers()]
        self.known = {each.untyped_storage()._cdata for each in weights}
        self.storages, self.total = [], 0

    def __call__(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.storages.append(storage)
            self.total += storage.nbytes()
        return tensor


def really_kept(family, networks, *, half):
    """Bytes that a pass of the student keeps of one sample, and its loss's backward pass with gradients at the end."""
    edge = EDGE[type(family)]
    micro = MicroConditioning([(edge, edge)], [(0, 0)], [(edge, edge)])
    cond = family.condition(family.encode_prompts(["a red thing"]), micro)
    side = edge // family.scale_factor
    sample = torch.randn(1, family.latent_channels, side, side, requires_grad=True)
    with networks.use("student") as network:
        kept = Kept(network)
        with (
            torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=half),
        ):
            output = family.predict(network, sample, torch.tensor([3.0]), cond)
    output.float().sum().backward()
    return kept.total


def configuration(*, half, lora):
    run = {
        "lora_target_modules": (), "model_type": "lora" if lora else "full", "device": "cpu", "lora_rank": RANK,
        "mixed_precision": "bf16" if half else "no",
    }  # fmt: skip
    return SimpleNamespace(run=SimpleNamespace(**run))


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("half", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize("family", [SDXL, SD3, Flux])
def test_a_sample_keeps_what_real_networks_keep(models, family, half, lora):
    dtype = "bfloat16" if half else "float32"
    model = family(family.Config(), ModelSettings(str(models[family]), weight_dtype=dtype))
    given = [model, [Role("student", trains="lora" if lora else "full")]]
    settings = {"lora": LoraSettings(RANK, 4.0) if lora else None, "parameter_dtype": getattr(torch, dtype), "seed": 0}
    asked, size = configuration(half=half, lora=lora), (EDGE[family], EDGE[family])
    planned = planned_activations(asked, model, model.empty_network(), size, wide_norms=False)
    kept = really_kept(model, Networks(*given, **settings), half=half)
    outside = really_kept(model, Networks(*given, **settings, gradient_checkpointing=True), half=half)
    assert planned.whole == pytest.approx(kept, rel=0.1)
    assert planned.recomputed - planned.block == pytest.approx(outside, rel=0.25), "hooks of its own keep the blocks'"
    assert planned.block < planned.whole / 2
    assert all(weight.requires_grad for weight in model.empty_network().parameters()), "it is as it was"


def test_a_network_that_recomputes_nothing_is_trained_and_estimated_so(models, monkeypatch, caplog):
    model = SDXL(SDXL.Config(), ModelSettings(str(models[SDXL])))
    network = model.empty_network()
    monkeypatch.setattr(type(network), "_supports_gradient_checkpointing", False)
    lora, roles = LoraSettings(RANK, 4.0), [Role("student", trains="lora")]
    Networks(model, roles, lora=lora, seed=0, gradient_checkpointing=True)
    assert "gradient_checkpointing: a UNet2DConditionModel recomputes nothing" in caplog.text
    asked = configuration(half=False, lora=True)
    asked.run.lora_rank += 1  # estimates are remembered
    planned = planned_activations(asked, model, network, (EDGE[SDXL], EDGE[SDXL]))
    assert planned.recomputed == planned.whole


def test_what_is_kept_decides_what_a_step_takes():
    kept = KeptBytes(whole=1000, recomputed=100, block=40)
    settings = MemorySettings(10, 1, 64, batch=3, compute_bytes=4, kept=kept)
    assert estimate(settings).activations == 3000
    saved = dict(savings(settings))
    assert saved["gradient_checkpointing=true"] == 2700
    assert saved["activation_offload=true"] == 2880
    assert saved["half the resolution"] == 2250
    assert saved["mixed_precision=bf16"] == 1500 + 20 - 2, (
        "half of the activations and of the base, less a copy of the weight that is trained"
    )


@pytest.mark.parametrize("family", [SDXL, Flux])
def test_a_family_that_does_not_know_the_length_of_prompts_is_estimated_roughly(models, family):
    class Unknown(family):
        prompt_positions = None

    model = Unknown(family.Config(), ModelSettings(str(models[family])))
    asked = configuration(half=True, lora=True)
    assert planned_activations(asked, model, model.empty_network(), (64, 64)) is None
