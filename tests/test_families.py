"""What every family but SDXL (which has tests of its own) owes to plain diffusers, on random tiny models.

Encoders, the network, images and students on disk are compared with the family's own text-to-image pipeline. A model
that is added to ``tiny_families.MODELS`` is here by itself.
"""

from __future__ import annotations

import json
import re
import types
from types import SimpleNamespace

import pytest
import torch
from distill.core.diffusion.sampler import Sampler
from distill.core.diffusion.schedule import is_flow
from distill.core.engine.lora_layers import without_weights
from distill.core.errors import UserError
from distill.core.plugin_api.family import ExportInfo, LoraSettings, MicroConditioning
from distill.core.plugin_api.precision import BASE, Precisions, text_encoder
from distill.core.registry.registry import Registry
from distill.model_families.calls.images import sample_latents
from pydantic import ValidationError
from support.config_files import distill, said
from support.in_float64 import ROUNDING, draw_as_in_float32, in_float64
from support.original_sdxl import write_single_file
from support.tiny_families import EDGE, MODELS, NEWER, SCALE_FACTOR
from support.tiny_parts import SHORT, SIZES, on_white

PROMPTS = ["a red fox", "two blue boats on a lake in the evening sun"]
SEEDS = [3, 8]
SIZE = {"width": EDGE, "height": EDGE}
MICRO = MicroConditioning([SIZES["original_size"]] * 2, [SIZES["crops_coords_top_left"]] * 2, [(EDGE, EDGE)] * 2)
STEPS = 3


TINY = {**MODELS, **NEWER}


@pytest.fixture(scope="module", params=TINY)
def model(request, tmp_path_factory):
    """A model, its family and its plain pipeline."""
    tiny = TINY[request.param]
    folder = tiny.write(tmp_path_factory.mktemp("families") / "model")
    return SimpleNamespace(
        name=request.param, tiny=tiny, folder=folder, family=tiny.make(folder), pipeline=plain(folder, tiny)
    )


def plain(folder, tiny, **arguments):
    import diffusers

    index = json.loads((folder / "model_index.json").read_text())
    absent = {part: None for part in ("text_encoder_3", "tokenizer_3") if index.get(part) == [None, None]}
    pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(folder, **absent, **arguments)
    pipeline.set_progress_bar_config(disable=True)
    if pipeline.vae_scale_factor > SCALE_FACTOR:  # some have 8 whatever their autoencoder
        pipeline.vae_scale_factor = SCALE_FACTOR
    pipeline.alone = tiny.alone
    return pipeline


def denoiser(pipeline):
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


def images(pipeline, *, prompts=PROMPTS, **arguments):
    """A plain call with a generator for each image."""
    settings = {"num_inference_steps": STEPS, "output_type": "pt", **SIZE, **arguments}
    own = {key: value for key, value in settings.items() if key in ("latents", "negative_prompt")}
    made = []
    for group in groups(len(prompts), alone=pipeline.alone):
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS[: len(prompts)]][group]
        some = {key: value[group] for key, value in own.items()}
        texts = list(prompts)[group]  # a copy: some write into it
        made.append(pipeline(prompt=texts, generator=generators, **{**settings, **some}).images)
    return on_white(torch.cat(made)) if settings["output_type"] == "pt" else torch.cat(made)


def groups(count, *, alone):
    """The samples of each call of a pipeline."""
    return [slice(one, one + 1) for one in range(count)] if alone else [slice(0, count)]


def load_lora(pipeline, folder, *, weight=1.0):
    """A LoRA by plain diffusers, or by plain peft where the pipeline loads none."""
    if hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(folder, adapter_name="plain")
        pipeline.set_adapters(["plain"], [weight])
        return
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    file = load_file(folder / "pytorch_lora_weights.safetensors")
    layers = {name.removeprefix("transformer."): value for name, value in file.items()}
    targets = sorted({name.partition(".lora_")[0] for name in layers})
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4 * weight, target_modules=targets), pipeline.transformer)
    set_peft_model_state_dict(pipeline.transformer, layers)


def generate(family, network, **arguments):
    settings = {"sampler": None, "seeds": SEEDS, "num_inference_steps": STEPS, **SIZE, **arguments}
    return family.generate(network, family.encode_prompts(PROMPTS), **settings)


def conditioned(family, dtype=torch.float64):
    return {key: value.to(dtype) for key, value in family.condition(family.encode_prompts(PROMPTS), MICRO).items()}


def inputs(family, dtype=torch.float64):
    edge = EDGE // SCALE_FACTOR
    x_t = torch.randn(2, family.latent_channels, edge, edge, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x_t, torch.tensor([312.5, 987.0], dtype=dtype), conditioned(family, dtype)


def random_(module, *, seed=0, std=0.05):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def with_adapter(family, name="student", *, seed=0, std=0.05, network=None):
    """The teacher's base with an adapter that does something, on everything that the family adapts."""
    from peft import LoraConfig

    network = family.load_network() if network is None else network
    targets = list(family.lora_targets)
    config = LoraConfig(
        r=4, lora_alpha=12.0, target_modules=targets, exclude_modules=without_weights(network, targets) or None
    )
    network.add_adapter(config, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in network.named_parameters():
        if f".{name}." in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) * std
    return network


# -- what it is -------------------------------------------------------------------------------------------------------


def test_a_family_reads_its_properties_from_the_model_files(model):
    family, config = model.family, json.loads((model.folder / "scheduler" / "scheduler_config.json").read_text())
    family.check_source()
    flow = is_flow(config)
    assert family.prediction_type == ("flow" if flow else config["prediction_type"])
    assert family.schedule.zero_terminal_snr == (flow or config["rescale_betas_zero_snr"])
    assert family.scale_factor == SCALE_FACTOR


def test_a_cast_brings_no_warning_about_no_modules(model, caplog):
    model.family.load_network().to(torch.float64)
    assert "kept in float32: []" not in caplog.text


def test_other_architectures_are_refused_by_name(model, tmp_path):
    import shutil

    folder = shutil.copytree(model.folder, tmp_path / "copy")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "KandinskyPipeline"}))
    with pytest.raises(UserError, match=r"is a KandinskyPipeline, not a(?s:.)*model_family"):
        model.tiny.make(folder).check_source()
    (folder / "model_index.json").write_text(json.dumps({**index, "vae": [None, None]}))
    with pytest.raises(UserError, match="lacks vae"):
        model.tiny.make(folder).check_source()


def test_the_empty_network_has_the_shapes_of_the_real_one(model):
    empty, real = model.family.empty_network(), model.family.load_network()
    shapes = {key: value.shape for key, value in real.state_dict().items()}
    assert {key: value.shape for key, value in empty.state_dict().items()} == shapes
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert not any(parameter.requires_grad for parameter in real.parameters())


def test_a_miniature_is_a_model_of_its_family(model):
    folder = type(model.family).miniature
    if folder is None:
        pytest.skip("this family ships none")
    model.tiny.make(folder).check_source()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 16e6
    assert {"README.md", "recipe.json", "prompts.txt"} <= {path.name for path in files}
    assert (folder / "judge").is_dir()


def test_without_a_miniature_a_run_asks_for_a_model(model):
    if model.family.miniature is not None:
        pytest.skip("this family ships one")
    result = distill("run", "--method", "lcm", "--family", model.tiny.family)
    assert result.exit_code == 2
    assert "ships no trained miniature" in said(result.stderr)
    assert "--model PATH_OR_ID" in said(result.stderr)


def test_a_single_file_is_the_same_model_where_such_files_are_read(model, tmp_path):
    if model.family.architecture.single_file is None:
        (tmp_path / "one.safetensors").write_bytes(b"")
        with pytest.raises(UserError, match=r"is a single file(?s:.)*folder in diffusers layout"):
            model.tiny.make(tmp_path / "one.safetensors").check_source()
        return
    file = write_single_file(model.folder, tmp_path / "one.safetensors")
    family = model.tiny.make(file, config_source=str(model.folder))
    family.check_source()
    ours, expected = family.load_network().state_dict(), model.family.load_network().state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in ours.items())
    embeds = model.family.encode_prompts(PROMPTS)["prompt_embeds"]
    torch.testing.assert_close(family.encode_prompts(PROMPTS)["prompt_embeds"], embeds)


# -- encoders ---------------------------------------------------------------------------------------------------------


def test_prompts_and_the_empty_prompt_are_encoded_as_the_pipeline_does(model):
    family = model.tiny.make(model.folder)
    ours = family.encode_prompts(PROMPTS)
    assert set(ours) == set(family.embed_keys)
    expected = encoded(model, PROMPTS)
    for key in family.embed_keys:
        if model.tiny.alone:  # in a batch here, whose products are summed in another order
            torch.testing.assert_close(ours[key], expected[key], rtol=0, atol=1e-5)
        else:
            assert torch.equal(ours[key], expected[key]), key
        assert ours[key].device.type == "cpu"
        assert not ours[key].requires_grad
    assert (ours["prompt_embeds"][0] - ours["prompt_embeds"][1]).abs().max() > 0.05
    family.release_encoders()
    cond = family.condition(ours, MICRO)
    uncond = family.uncond({key: value.double() for key, value in cond.items()})
    empty = encoded(model, [""])
    for key in family.embed_keys:
        torch.testing.assert_close(uncond[key], empty[key].double().expand_as(uncond[key]), rtol=0, atol=1e-6)
    assert family._text is None, "the empty prompt is encoded once, and the encoders are let go"


@torch.no_grad()
def encoded(model, prompts, pipeline=None):
    """The pipeline's own encoding, by the names of its arguments."""
    import inspect

    pipeline = model.pipeline if pipeline is None else pipeline
    if model.tiny.encoded is not None:
        return model.tiny.encoded(pipeline, prompts)
    asked = inspect.signature(pipeline.encode_prompt).parameters
    further = {key: prompts for key in ("prompt_2", "prompt_3") if key in asked}
    further |= {"do_classifier_free_guidance": False} if "do_classifier_free_guidance" in asked else {}
    further |= SHORT if "max_sequence_length" in asked else {}
    found = pipeline.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, **further)
    if "pooled_prompt_embeds" not in asked:
        return {"prompt_embeds": found[0]}
    pooled = found[2] if "negative_prompt_embeds" in asked else found[1]
    return {"prompt_embeds": found[0], "pooled_prompt_embeds": pooled}


def test_images_are_encoded_and_decoded_with_scale_and_shift_once(model):
    family, vae = model.family, model.pipeline.vae
    pixels = torch.rand(2, 3, EDGE, EDGE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mode, sample, decoded = model.tiny.autoencoded(vae, pixels)
    latents = family.encode_images(pixels)
    torch.testing.assert_close(latents, mode)
    torch.testing.assert_close(family.decode_latents(latents), (decoded / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)
    one = family.encode_images(pixels[:1], [torch.Generator().manual_seed(5)])
    torch.testing.assert_close(one, sample[:1], rtol=1e-4, atol=1e-5)


# -- the network ------------------------------------------------------------------------------------------------------


def trace(pipeline, noise, prompts, **arguments):
    """(latents, network time, output) of every call of the network in the pipeline's own loop, as the pipeline has
    them."""
    calls, network = [], denoiser(pipeline)
    forward = network.forward

    def spy(self, *args, **kwargs):
        output = forward(*args, **kwargs)
        calls.append((args, kwargs, output[0]))
        return output

    network.forward = types.MethodType(spy, network)
    images(pipeline, prompts=prompts, latents=noise, output_type="latent", **arguments)
    network.forward = forward
    return calls


@pytest.mark.parametrize("guided", [False, True])
def test_predict_equals_the_pipelines_denoising_loop(model, guided):
    """In float64, within its rounding: what is guided and what is not, at every step."""
    family, pipeline = model.family, plain(model.folder, model.tiny).to(torch.float64)
    network, arguments = family.load_network().double(), model.tiny.guided if guided else model.tiny.unguided
    noise, _, cond = inputs(family)
    cond |= {key: value.double() for key, value in encoded(model, PROMPTS, pipeline).items()}
    empty = {key: value.double().expand_as(cond[key]) for key, value in encoded(model, [""], pipeline).items()}
    uncond, told = {**cond, **empty}, model.tiny.told(arguments)
    for rows in ([0], [1]) if model.tiny.alone else ([0, 1],):
        prompts, count = [PROMPTS[row] for row in rows], len(rows)
        calls = trace(pipeline, family.to_network(noise[rows]), prompts, **arguments, **model.tiny.sized)
        assert calls
        times = pipeline.scheduler.timesteps if model.tiny.times is None else model.tiny.times(pipeline)
        for number, (args, kwargs, expected) in enumerate(calls):
            x_t, expected = model.tiny.read(args, kwargs), model.tiny.written(expected)
            time = times[number * len(times) // len(calls)]
            parts = model.tiny.parts(number, cond, uncond, guided=guided)
            x_t, expected = (family.from_network(each, size=(EDGE, EDGE)) for each in (x_t, expected))
            for x, part, output in zip(x_t.split(count), parts, expected.split(count), strict=True):
                given = {key: value[rows] for key, value in part.items()}
                with torch.no_grad():
                    guidance = None if told is None else torch.full((count,), told, dtype=torch.float64)
                    ours = family.predict(network, x, time.expand(len(x_t))[:count], given, guidance=guidance)
                assert ours.dtype == torch.float64
                torch.testing.assert_close(ours, output, rtol=0, atol=1e-11 * float(output.abs().max()))


def test_a_quantised_base_and_quantised_text_encoders_say_about_the_same(model):
    """And a LoRA on such a base gets a gradient."""
    able, kind = model.family.capabilities, Registry.load(installed=False).get("quantizer", "int8-quanto")
    assert able.quantised_base
    parts = [BASE, *(text_encoder(number) for number in range(1, able.quantised_text_encoders + 1))]
    family = model.tiny.make(model.folder, precision=Precisions({part: kind(kind.Config()) for part in parts}))
    network, (x_t, time, cond) = family.load_network(), inputs(model.family, torch.float32)
    before, after = family.settings.precision.stored(BASE)
    assert after < 0.8 * before
    with torch.no_grad():
        expected = model.family.predict(model.family.load_network(), x_t, time, cond)
        quantised = family.predict(network, x_t, time, cond)
    assert 0 < (quantised - expected).norm() < 0.1 * expected.norm()
    ours, theirs = family.encode_prompts(PROMPTS), model.family.encode_prompts(PROMPTS)
    assert all((ours[key].float() - theirs[key].float()).norm() < 0.2 * theirs[key].float().norm() for key in theirs)
    adapted = with_adapter(family, network=network)
    family.predict(adapted, x_t, time, cond).square().mean().backward()
    gradients = [weight.grad for name, weight in adapted.named_parameters() if "lora_A" in name]
    reached = [gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients]
    assert sum(reached) > 0.8 * len(reached), "all but the text's layers of a last block"


def test_samples_of_a_batch_do_not_affect_each_other(model):
    family = model.family
    network, (x_t, time, cond) = family.load_network().double(), inputs(family)
    with torch.no_grad():
        both = family.predict(network, x_t, time, cond)
        one = family.predict(network, x_t[1:], time[1:], {key: value[1:] for key, value in cond.items()})
    torch.testing.assert_close(both[1:], one, rtol=0, atol=1e-11)
    assert both.shape == x_t.shape


def test_every_lora_target_names_modules_of_the_network(model):
    names = [name for name, _ in model.family.load_network().named_modules()]
    for target in model.family.lora_targets:
        assert any(name == target or name.endswith(f".{target}") for name in names), target


def test_a_full_student_starts_as_its_teacher(model):
    family = model.family
    teacher, (x_t, time, cond) = family.load_network(), inputs(family, torch.float32)
    with torch.no_grad():
        expected = family.predict(teacher, x_t, time, cond)
    twice = family.capabilities.second_time
    student = family.student_network(teacher, guidance_embedding=False, second_time=twice)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in student.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(tensor.is_meta for tensor in [*student.parameters(), *student.buffers()])
    with torch.no_grad():
        second = time / 2 if twice else None
        assert torch.equal(family.predict(student, x_t, time, cond, second_time=second), expected)
        next(student.parameters()).add_(1)
        assert torch.equal(family.predict(teacher, x_t, time, cond), expected), "a copy, not a view"


def test_a_guidance_embedding_starts_as_the_teacher_whatever_the_scale(model):
    family = model.family
    teacher, (x_t, time, cond) = family.load_network(), inputs(family, torch.float32)
    w = torch.tensor([0.5, 9.0])
    if not family.capabilities.guidance_embedding:
        with pytest.raises(ValueError, match="guidance"):
            family.student_network(teacher, guidance_embedding=True)
        return
    student = family.student_network(teacher, guidance_embedding=True)
    own = family.takes_guidance(teacher)
    with torch.no_grad():
        expected = family.predict(teacher, x_t, time, cond, guidance=w if own else None)
        assert torch.equal(family.predict(student, x_t, time, cond, guidance=w), expected)
    if not own:
        with pytest.raises(ValueError, match="no guidance embedding"):
            family.predict(teacher, x_t, time, cond, guidance=w)


def test_features_are_activations_of_the_first_half_with_gradients(model):
    family = model.family
    network, (x_t, time, cond) = with_adapter(family).double(), inputs(family)
    x = x_t.clone().requires_grad_()
    found = family.features(network, x, time, cond)
    assert [feature.shape[1] for feature in found] == family.feature_channels(network)
    edges = [feature.shape[2] for feature in found]
    assert edges == sorted(edges, reverse=True)
    assert all(feature.ndim == 4 and len(feature) == 2 for feature in found)
    sum(feature.square().sum() for feature in found).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    reached = [key for key, p in network.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    untouched = [key for key, p in network.named_parameters() if "lora_B" in key and key not in reached]
    assert reached
    assert untouched, "the second half is not computed"
    assert not any(module._forward_hooks for module in network.modules())
    with torch.no_grad():
        family.predict(network, x_t, time, cond)


def test_features_of_any_block_are_its_outputs_in_the_networks_order(model):
    family = model.family
    network, (x_t, time, cond) = with_adapter(family).double(), inputs(family)
    names, outputs = family.block_names(network), {}

    def keep(name):
        def hook(module, args, output):
            outputs.setdefault(name, []).append(output)  # several where samples are computed one by one

        return hook

    hooks = [network.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        expected = family.predict(network, x_t, time, cond)
    for hook in hooks:
        hook.remove()
    assert list(outputs) == names, "every block, in the order in which they are computed"
    with torch.no_grad():
        found = family.features(network, x_t, time, cond, blocks="all")
        first = family.features(network, x_t, time, cond)
        chosen = family.features(network, x_t, time, cond, blocks=[names[-1], names[0]])
    assert [level.shape[1] for level in found] == family.feature_channels(network, blocks="all")
    assert [level.shape[1] for level in chosen] == family.feature_channels(network, blocks=[names[-1], names[0]])
    for level, output in zip(found, outputs.values(), strict=True):
        positions = level.shape[2] * level.shape[3]  # of the image, beside those of the text in one stream
        states = torch.cat([model.tiny.states(each, cond, positions) for each in output])
        theirs = states if states.ndim == 4 else states.transpose(1, 2).unflatten(2, level.shape[2:])
        assert torch.equal(level, theirs)
    assert torch.equal(chosen[0], found[0])
    assert torch.equal(chosen[1], found[-1])
    assert all(any(torch.equal(level, each) for each in found) for level in first)
    x = x_t.clone().requires_grad_()
    family.features(network, x, time, cond, blocks=names[-1:])[0].square().sum().backward()
    reached = {key for key, p in network.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert x.grad is not None
    assert any(key.startswith(names[-1]) for key in reached), "the second half too"
    with torch.no_grad():
        assert torch.equal(family.predict(network, x_t, time, cond), expected), "nothing stays behind"


def test_a_block_that_is_not_there_is_refused_with_those_that_are(model):
    family = model.family
    network, (x_t, time, cond) = family.load_network(), inputs(family, torch.float32)
    for wrong in ("middle", ["middle"], []):
        with pytest.raises(UserError, match="first_half") as error:
            family.features(network, x_t, time, cond, blocks=wrong)
        assert family.block_names(network)[0] in str(error.value)
    with pytest.raises(UserError, match="'middle' is no block of this network"):
        family.feature_channels(network, blocks=["middle"])


def test_the_dimensions_of_prompts_are_known_from_the_network(model):
    network, cond = model.family.load_network(), conditioned(model.family)
    known = model.family.prompt_dimensions(network)
    assert known == {name: cond[name].shape[-1] for name in model.family.embed_keys if not name.endswith("mask")}


def test_checkpointed_features_have_the_same_gradients(model):
    family, gradients = model.family, []
    for checkpointing in (False, True):
        network, (x_t, time, cond) = with_adapter(family).double().train(), inputs(family)
        if checkpointing:
            network.enable_gradient_checkpointing()
        x = x_t.clone().requires_grad_()
        sum(feature.square().sum() for feature in family.features(network, x, time, cond)).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


# -- the second time --------------------------------------------------------------------------------------------------


def test_a_second_time_starts_without_effect_and_has_exact_derivatives(model):
    from torch.autograd import forward_ad

    if not model.family.capabilities.second_time:
        pytest.skip("this family takes no second time")
    family = model.family
    network, (x_t, time, cond) = with_adapter(family).double(), inputs(family)
    with torch.no_grad():
        before = family.predict(network, x_t, time, cond)
        module = family.add_second_time(network).double()
        assert torch.equal(family.predict(network, x_t, time, cond, second_time=time / 2), before)
        random_(module, std=0.3)
        after = family.predict(network, x_t, time, cond, second_time=time / 2)
        assert (after - before).abs().max() > 1e-4

    def at(x, t):
        return family.predict(network, x, t, cond, second_time=t / 2)

    def derivatives(v, s, h):
        """(exact, by differences) along v in x and s in t."""
        with torch.no_grad(), family.forward_ad(), forward_ad.dual_level():
            exact = forward_ad.unpack_dual(at(forward_ad.make_dual(x_t, v), forward_ad.make_dual(time, s))).tangent
        with torch.no_grad():
            return exact, (at(x_t + h * v, time + h * s) - at(x_t - h * v, time - h * s)) / (2 * h)

    def against_the_transpose(v, s):
        """(u J (v, s) forwards, the same backwards): differences across kinks are no derivatives."""
        u = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(2)).double()
        x, t = x_t.clone().requires_grad_(), time.clone().requires_grad_()
        (at(x, t) * u).sum().backward()
        with torch.no_grad(), family.forward_ad(), forward_ad.dual_level():
            exact = forward_ad.unpack_dual(at(forward_ad.make_dual(x_t, v), forward_ad.make_dual(time, s))).tangent
        return (exact * u).sum(), (x.grad * v).sum() + (t.grad * s).sum()

    v = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1)).double()
    if model.tiny.kinks:
        for along in ((v, torch.zeros_like(time)), (torch.zeros_like(v), torch.ones_like(time))):
            torch.testing.assert_close(*against_the_transpose(*along), rtol=1e-4, atol=0)
        return
    # some networks turn positions in float32, and all make sinusoids of their own time so
    exact, difference = derivatives(v, torch.zeros_like(time), 1e-3)
    torch.testing.assert_close(exact, difference, rtol=0, atol=5e-4 * float(exact.abs().max()))
    exact, difference = derivatives(torch.zeros_like(v), torch.ones_like(time), 0.05)
    torch.testing.assert_close(exact, difference, rtol=0, atol=2e-2 * float(exact.abs().max()))


# -- images ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def float64_noise(monkeypatch):
    draw_as_in_float32(monkeypatch)


@pytest.mark.usefixtures("float64_noise")
@pytest.mark.parametrize("guided", [False, True])
def test_generate_equals_a_plain_call(model, guided):
    """In float64, text encoders and autoencoder included."""
    arguments = model.tiny.guided if guided else model.tiny.unguided
    scale = model.tiny.scale(arguments)
    family, pipeline = in_float64(model.tiny.make(model.folder)), plain(model.folder, model.tiny).to(torch.float64)
    network = family.load_network()
    ours = generate(family, network, guidance_scale=scale)
    assert (ours.shape, ours.dtype) == ((2, 3, EDGE, EDGE), torch.float32)
    torch.testing.assert_close(ours.double(), images(pipeline, **arguments), rtol=0, atol=ROUNDING)
    other = generate(family, network, guidance_scale=2 * scale + 1)
    assert (other - ours).abs().max() > 1e-4, "guidance does something"


# -- students on disk -------------------------------------------------------------------------------------------------


def sampler_for(family):
    """What a method would name, with explicit times on a flow as methods do."""
    if family.prediction_type == "flow":
        config = {"shift": 1.0, "use_dynamic_shifting": False}
        return Sampler("FlowMatchEulerDiscreteScheduler", config, 2, 0.0, {"sigmas": [1.0, 0.6]})
    return Sampler("DDIMScheduler", {"timestep_spacing": "trailing"}, 2, 0.0)


def exported(family, folder, kind, sampler, *, second_time=False, dtype=torch.float32):
    """(the engine's images, the network) of a student that was exported to `folder`."""
    if kind == "lora":
        network = with_adapter(family).to(dtype)
    else:
        network = family.student_network(family.load_network(), guidance_embedding=False)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        network = network.to(dtype)  # after which they are numbers of float32, as which diffusers reads them
    if second_time:
        random_(family.add_second_time(network), std=0.3)
    ours = generate(family, network, sampler=sampler, num_inference_steps=None)
    lora = LoraSettings(4, 12.0) if kind == "lora" else None
    family.export(network, folder, ExportInfo(sampler, kind, lora, metadata={"step": "7"}))
    return ours


@pytest.mark.usefixtures("float64_noise")
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_exported_student_makes_the_engines_images_in_the_plain_pipeline(model, tmp_path, kind):
    """In float64; and a third time by the family, from the files."""
    import diffusers

    family, sampler = in_float64(model.tiny.make(model.folder)), sampler_for(model.family)
    ours = exported(family, tmp_path, kind, sampler, dtype=torch.float64)
    pipeline = plain(model.folder if kind == "lora" else tmp_path, model.tiny).to(torch.float64)
    if kind == "lora":
        without = images(pipeline, **model.tiny.unguided)
        load_lora(pipeline, tmp_path)
        pipeline.scheduler = getattr(diffusers, sampler.scheduler).from_pretrained(tmp_path, subfolder="scheduler")
        assert (without - ours).abs().max() > 1e-3
        trained = {key.partition(".lora_")[0] for key, _ in denoiser(pipeline).named_parameters() if "lora_" in key}
        expected = {key.partition(".lora_")[0] for key, _ in with_adapter(family).named_parameters() if "lora_" in key}
        assert trained == expected, "every layer was read"
    call = {**model.tiny.unguided, **family.snippet_call(ExportInfo(sampler, kind)), **sampler.call}
    call |= {"num_inference_steps": 2}
    torch.testing.assert_close(images(pipeline, **call), ours.double(), rtol=0, atol=ROUNDING)
    loaded = model.tiny.make(model.folder).load_student(tmp_path)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    reloaded = generate(family, loaded.double(), sampler=sampler, num_inference_steps=None)
    torch.testing.assert_close(reloaded, ours, rtol=0, atol=ROUNDING)


@pytest.mark.slow
def test_a_smaller_student_makes_the_engines_images_in_the_plain_pipeline(model, tmp_path):
    lists = getattr(type(model.family), "block_lists", None)
    fewer = {"student_mid_block": False} if lists is None else {f"student_{key}": 1 for key in lists}
    if not getattr(type(model.family), "smaller_students", True):
        with pytest.raises(ValidationError, match="student_"):
            model.tiny.make(model.folder, fewer)
        return
    family, sampler = model.tiny.make(model.folder, fewer), sampler_for(model.family)
    teacher = family.load_network()
    student = family.student_network(teacher, guidance_embedding=False, smaller=True)
    assert count(student) < 0.9 * count(teacher)
    ours = generate(family, student, sampler=sampler, num_inference_steps=None)
    family.export(student, tmp_path, ExportInfo(sampler, "full"))
    call = {**model.tiny.unguided, **family.snippet_call(ExportInfo(sampler, "full")), **sampler.call}
    found = images(plain(tmp_path, model.tiny), **call, num_inference_steps=2)
    torch.testing.assert_close(found, ours, rtol=0, atol=2e-5)


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_student_with_a_second_time_runs_in_the_plain_pipeline(model, tmp_path, kind):
    from runpy import run_path

    if not model.family.capabilities.second_time:
        pytest.skip("this family takes no second time")
    family, sampler = model.tiny.make(model.folder), Sampler("FlowMapScheduler", {}, 2, 0.0)
    ours = exported(family, tmp_path, kind, sampler, second_time=True)
    if kind == "lora":
        pipeline = plain(model.folder, model.tiny)
        load_lora(pipeline, tmp_path)
    else:
        pipeline = plain(tmp_path, model.tiny, scheduler=None)
    run_path(str(tmp_path / "flow_map.py"))["attach"](pipeline, tmp_path)
    expected = images(pipeline, num_inference_steps=2, **model.tiny.unguided)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_usage_snippet_runs(model, tmp_path, monkeypatch, kind):
    family, sampler = model.tiny.make(model.folder), sampler_for(model.family)
    exported(family, tmp_path / "student", kind, sampler)
    monkeypatch.chdir(tmp_path)
    snippet = family.usage_snippet(ExportInfo(sampler, kind))
    small, calls = re.subn(r"pipe\((prompt|prompt=prompt), ", rf"pipe(\1, width={EDGE}, height={EDGE}, ", snippet)
    assert calls == 1
    exec(compile(small, "snippet", "exec"), {})
    assert (tmp_path / "fox.png").is_file()


def test_a_teacher_lora_is_part_of_the_teacher(model, tmp_path):
    sampler = sampler_for(model.family)
    exported(model.family, tmp_path / "style", "lora", sampler)
    family = model.tiny.make(model.folder, teacher_lora=((str(tmp_path / "style"), 0.7),))
    family.check_source()
    network = family.load_network()
    assert not any("lora" in key for key, _ in network.named_parameters())
    pipeline = plain(model.folder, model.tiny)
    load_lora(pipeline, tmp_path / "style", weight=0.7)
    ours = generate(family, network, guidance_scale=model.tiny.scale(model.tiny.unguided))
    torch.testing.assert_close(ours, images(pipeline, **model.tiny.unguided), rtol=0, atol=5e-5)
    assert family.fingerprint("denoiser") != model.family.fingerprint("denoiser")
    assert family.fingerprint("vae") == model.family.fingerprint("vae")


def test_a_lora_of_another_size_is_refused(model, tmp_path):
    from safetensors.torch import load_file, save_file

    exported(model.family, tmp_path / "good", "lora", sampler_for(model.family))
    state = load_file(tmp_path / "good" / "pytorch_lora_weights.safetensors")
    wrong = {key: torch.zeros(4, 99) if "lora_A" in key else torch.zeros(99, 4) for key in state}
    save_file(wrong, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match="does not fit this model"):
        model.tiny.make(model.folder, teacher_lora=((str(tmp_path / "bad.safetensors"), 1.0),)).load_network()
    save_file({"elsewhere.x.lora_A.weight": torch.zeros(1)}, tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="holds nothing for a"):
        model.tiny.make(model.folder, teacher_lora=((str(tmp_path / "none.safetensors"), 1.0),)).load_network()


def test_masks_of_whole_numbers_reach_the_pipeline_as_they_are_and_states_in_its_type():
    given = {}

    def pipeline(**arguments):
        given.update(arguments)
        return (arguments["latents"],)

    embeds = {"states": torch.ones(1, 2, dtype=torch.float64), "mask": torch.ones(1, 2, dtype=torch.int64)}
    embeds |= {"list": [torch.ones(2, dtype=torch.float64)]}
    noise, generators = torch.zeros(1, 4, 2, 2, dtype=torch.bfloat16), [torch.Generator()]
    sample_latents(pipeline, embeds, noise=noise, generators=generators, size=(4, 4), call={})
    kinds = {"states": given["states"].dtype, "mask": given["mask"].dtype, "list": given["list"][0].dtype}
    whole, real = torch.int64, torch.bfloat16
    assert kinds == {"states": real, "mask": whole, "list": real}
