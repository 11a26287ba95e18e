"""What is Chroma's own: a mask over the padding of T5's states, and modulations that count the blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from distill.core.errors import UserError
from support.tiny_chroma import CHROMA
from support.tiny_sdxl import EDGE, SCALE_FACTOR


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return CHROMA.write(tmp_path_factory.mktemp("chroma") / "model")


def inputs(family):
    edge = EDGE // SCALE_FACTOR
    x_t = torch.randn(1, family.latent_channels, edge, edge, generator=torch.Generator().manual_seed(0))
    return x_t, torch.tensor([500.0]), family.encode_prompts(["a fox"])


def with_other_padding(cond):
    """The same conditioning with other states in the places of the padding, but for its first."""
    hidden = cond["prompt_attention_mask"] == 0
    assert hidden.sum() > 3
    return {**cond, "prompt_embeds": cond["prompt_embeds"] + hidden[..., None]}


@torch.no_grad()
def test_padding_is_hidden_only_where_it_is_asked_for(folder):
    outputs = {}
    for hidden in (False, True):
        family = CHROMA.make(folder, {"mask_padding": hidden})
        network, (x_t, time, cond) = family.load_network(), inputs(family)
        outputs[hidden] = family.predict(network, x_t, time, cond)
        other = family.predict(network, x_t, time, with_other_padding(cond))
        assert bool(outputs[hidden].isfinite().all())
        assert torch.equal(outputs[hidden], other) is hidden
    assert (outputs[True] - outputs[False]).abs().max() > 1e-3


def test_the_caches_of_both_masks_are_told_apart(folder):
    hidden = CHROMA.make(folder, {"mask_padding": True})
    assert hidden.fingerprint("text") != CHROMA.make(folder).fingerprint("text")


@pytest.mark.parametrize("hidden", [False, True])
def test_recomputed_blocks_see_the_mask_too(folder, hidden):
    """diffusers recomputes the blocks of one stream without it."""
    family = CHROMA.make(folder, {"mask_padding": hidden})
    network, (x_t, time, cond) = family.load_network(), inputs(family)
    found = []
    for recomputed in (False, True):
        network.train()
        if recomputed:
            network.enable_gradient_checkpointing()
        x = x_t.clone().requires_grad_()
        output = family.predict(network, x, time, cond)
        output.square().sum().backward()
        found.append((output.detach(), x.grad))
    torch.testing.assert_close(found[0], found[1])
    assert found[1][1].isfinite().all()


def test_a_student_with_fewer_blocks_is_refused(folder):
    with pytest.raises(UserError, match=r"family_config.chroma.student_num_layers = 1, but a student has all blocks"):
        CHROMA.make(folder, {"student_num_layers": 1}).check_source()


def test_a_chroma_named_as_flux_is_refused_with_its_own_family(folder):
    flux = replace(CHROMA, family="flux", settings={}).make(folder)
    with pytest.raises(UserError, match=r"a ChromaPipeline, not a FLUX\.1(?s:.)*set model_family to chroma$"):
        flux.check_source()
