"""The SDXL family against plain diffusers: encoders, conditioning, the network, images."""

from __future__ import annotations

import types

import pytest
import torch
from distill.core.diffusion.sampler import Sampler
from distill.core.plugin_api.family import MicroConditioning, ModelSettings
from distill.model_families.bases.unet import LORA_TARGETS
from distill.model_families.sdxl import SDXL
from support.in_float64 import ROUNDING, draw_as_in_float32, in_float64
from support.tiny_sdxl import EDGE, SCALE_FACTOR, write_tiny_sdxl

PROMPTS = ["a red fox", "two blue boats on a lake in the evening sun", ""]
LCM = Sampler("LCMScheduler", {"original_inference_steps": 50}, num_inference_steps=3, guidance_scale=0.0)
EULER = Sampler("EulerDiscreteScheduler", {}, num_inference_steps=3, guidance_scale=4.0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "model")


@pytest.fixture(scope="module")
def tiny_empty(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "model", force_zeros=False)


@pytest.fixture(scope="module")
def family(tiny):
    return make(tiny)


@pytest.fixture(scope="module")
def pipeline(tiny):
    return plain(tiny)


def make(folder, config=None, **settings):
    return SDXL(SDXL.Config(**(config or {})), ModelSettings(source=str(folder), **settings))


def plain(folder, **arguments):
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, **arguments)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(pipeline, prompts, seeds, **arguments):
    """A plain pipeline call with a generator for each image."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    settings = {"width": EDGE, "height": EDGE, "output_type": "pt", **arguments}
    return pipeline(prompts, generator=generators, **settings).images


def micro(*rows):
    originals, crops, targets = zip(*rows, strict=True)
    return MicroConditioning(originals, crops, targets)


MICRO = micro(((1333, 999), (7, 0), (1024, 768)), ((640, 480), (0, 100), (640, 320)), ((32, 32), (0, 0), (32, 32)))


def test_tiny_model_is_an_sdxl_of_its_own_scale(family):
    family.check_source()
    assert family.prediction_type == "epsilon"
    assert (family.latent_channels, family.scale_factor) == (4, SCALE_FACTOR)
    assert family.schedule.num_train_timesteps == 1000
    assert not family.schedule.zero_terminal_snr


def test_schedule_is_the_schedulers_own_table(family, pipeline):
    t = torch.arange(1000)
    torch.testing.assert_close(
        family.schedule.alpha(t) ** 2, pipeline.scheduler.alphas_cumprod.double(), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample", "flow"])
def test_prediction_type_and_schedule_come_from_the_scheduler_config(tmp_path, prediction_type):
    family = make(write_tiny_sdxl(tmp_path, prediction_type=prediction_type, zero_snr=prediction_type != "flow"))
    family.check_source()
    assert family.prediction_type == prediction_type
    assert family.schedule.zero_terminal_snr
    assert family.schedule.clean_at_zero == (prediction_type == "flow")


def test_the_user_may_set_what_the_scheduler_config_lacks(tiny):
    family = make(tiny, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
    assert family.prediction_type == "v_prediction"
    assert family.schedule.zero_terminal_snr
    assert family.scheduler(LCM).config.prediction_type == "v_prediction"
    assert family.scheduler(LCM).config.rescale_betas_zero_snr


def test_prompts_are_encoded_as_the_pipeline_does(family, pipeline):
    ours = family.encode_prompts(PROMPTS)
    embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert torch.equal(ours["prompt_embeds"], embeds)
    assert torch.equal(ours["pooled_prompt_embeds"], pooled)
    assert not ours["prompt_embeds"].requires_grad
    assert (ours["prompt_embeds"][0] - ours["prompt_embeds"][1]).abs().max() > 0.1


def test_time_ids_are_each_samples_own_in_float32(family):
    cond = family.condition(family.encode_prompts(PROMPTS), MICRO)
    assert cond["time_ids"].dtype == torch.float32
    assert cond["time_ids"].tolist() == [
        [1333, 999, 7, 0, 1024, 768],
        [640, 480, 0, 100, 640, 320],
        [32, 32, 0, 0, 32, 32],
    ]


def test_unconditional_is_zeros_with_the_samples_own_time_ids(family):
    cond = family.condition(family.encode_prompts(PROMPTS), MICRO)
    uncond = family.uncond(cond)
    assert not uncond["prompt_embeds"].any()
    assert not uncond["pooled_prompt_embeds"].any()
    assert torch.equal(uncond["time_ids"], cond["time_ids"])
    assert cond["prompt_embeds"].any()


def test_unconditional_is_the_encoded_empty_prompt_where_the_pipeline_forces_no_zeros(tiny_empty):
    family, pipeline = make(tiny_empty), plain(tiny_empty)
    cond = family.condition(family.encode_prompts(PROMPTS), MICRO)
    uncond = family.uncond(cond)
    _, negative, _, negative_pooled = pipeline.encode_prompt(PROMPTS)
    torch.testing.assert_close(uncond["prompt_embeds"], negative)
    torch.testing.assert_close(uncond["pooled_prompt_embeds"], negative_pooled)
    assert torch.equal(uncond["time_ids"], cond["time_ids"])
    family.release_encoders()
    again = family.uncond({key: value.double() for key, value in cond.items()})
    assert again["prompt_embeds"].dtype == torch.float64
    assert family._text is None, "the empty prompt is encoded once"


def test_latents_round_trip_through_the_autoencoder_with_the_scaling_once(family, pipeline):
    pixels = torch.rand(3, 3, EDGE, EDGE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.encode_images(pixels)
    with torch.no_grad():
        mode = pipeline.vae.encode(pixels).latent_dist.mode()
        decoded = pipeline.vae.decode(mode).sample
    torch.testing.assert_close(latents, mode * 0.13025)
    torch.testing.assert_close(family.decode_latents(latents), (decoded / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_sampled_latents_depend_on_their_own_generator_only(family):
    pixels = torch.rand(3, 3, EDGE, EDGE, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def sample(rows, seeds):
        return family.encode_images(pixels[rows], [torch.Generator().manual_seed(seed) for seed in seeds])

    synchronized = sample([0, 1, 2], [5, 6, 7])
    torch.testing.assert_close(synchronized[1:2], sample([1], [6]), rtol=1e-4, atol=1e-5)
    assert (synchronized - family.encode_images(pixels)).abs().max() > 1e-3


def test_float16_autoencoder_is_refused_unless_it_is_a_fixed_one(tiny):
    from distill.core.errors import UserError

    with pytest.raises(UserError, match="overflows in float16"):
        make(tiny, {"vae_dtype": "float16"}).check_source()
    half = make(tiny, weight_dtype="float16")
    assert half._vae_dtype() == torch.float32
    half._vae_config["force_upcast"] = False
    assert half._vae_dtype() == torch.float16


def trace(pipeline, prompts, *, steps, guidance, dtype=torch.float32):
    """Inputs and outputs of the UNet in the pipeline's own denoising loop."""
    calls, forward = [], pipeline.unet.forward

    def spy(self, *args, **kwargs):
        output = forward(*args, **kwargs)
        calls.append((args, kwargs, output[0]))
        return output

    pipeline.unet.forward = types.MethodType(spy, pipeline.unet)
    noise = torch.randn(len(prompts), 4, EDGE // SCALE_FACTOR, EDGE // SCALE_FACTOR, dtype=dtype)
    images(
        pipeline,
        prompts,
        [0] * len(prompts),
        latents=noise,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
    )
    pipeline.unet.forward = forward
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_predict_equals_the_pipelines_denoising_loop(tiny, dtype):
    """Both halves of the guided call, at every step, with the time ids of the call."""
    family, pipeline = make(tiny), plain(tiny).to(dtype)
    network = family.load_network().to(dtype)
    embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS)
    text = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    square = [(EDGE, EDGE), (0, 0), (EDGE, EDGE)]
    cond = family.condition(text, micro(*[square] * 3))
    uncond = family.uncond(cond)
    calls = trace(pipeline, PROMPTS, steps=3, guidance=3.0, dtype=dtype)
    assert len(calls) == 3
    for (x_t, t), _, expected in calls:
        time = t.expand(3)
        for half, part in ((0, uncond), (1, cond)):
            with torch.no_grad():
                ours = family.predict(network, x_t.chunk(2)[half], time, part)
            assert ours.dtype == dtype
            bounds = {"rtol": 1e-4, "atol": 1e-5}
            if dtype == torch.float64:
                bounds = {"rtol": 0, "atol": 1e-11 * float(expected.abs().max())}
            torch.testing.assert_close(ours, expected.chunk(2)[half], **bounds)


def test_float64_predictions_are_computed_in_float64(tiny):
    family = make(tiny)
    network = family.load_network()
    cond = family.condition(family.encode_prompts(PROMPTS), MICRO)
    x_t, time = torch.randn(3, 4, 16, 16, dtype=torch.float64), torch.tensor([10, 500, 999])
    with torch.no_grad():
        single = family.predict(network, x_t, time, cond)
        double = family.predict(network.double(), x_t, time, cond)
        one = family.predict(network, x_t[1:2], time[1:2], {key: value[1:2] for key, value in cond.items()})
    assert double.dtype == torch.float64
    assert 1e-9 < (single - double).abs().max() < 1e-4
    torch.testing.assert_close(double[1:2], one, rtol=0, atol=1e-12)


def test_time_ids_stay_float32_under_a_bfloat16_network(tiny):
    """1333 and 1336 are one number in bfloat16; the network must tell them apart."""
    family = make(tiny, weight_dtype="bfloat16")
    network = family.load_network()
    assert network.dtype == torch.bfloat16
    embeds, x_t = family.encode_prompts(PROMPTS[:1]), torch.randn(1, 4, 16, 16)
    seen = []
    network.add_time_proj.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    for edge in (1333, 1335):
        cond = family.condition(embeds, micro(((edge, edge), (0, 0), (edge, edge))))
        assert family.predict(network, x_t, torch.tensor([500]), cond).dtype == torch.bfloat16
    assert seen[0].tolist() == [1333, 1333, 0, 0, 1333, 1333]
    assert seen[1].tolist() == [1335, 1335, 0, 0, 1335, 1335]


def test_the_network_is_frozen_in_eval_mode_and_needs_no_encoders(tiny):
    family = make(tiny, weight_dtype="bfloat16")
    network = family.load_network()
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    wide = {name.split(".")[0] for name, weight in network.named_parameters() if weight.dtype != torch.bfloat16}
    assert wide == {"conv_in", "conv_norm_out", "conv_out"}
    assert family._text is None
    assert family._vae is None


def test_every_lcm_target_names_modules_of_the_real_architecture(family):
    names = [name for name, _ in family.load_network().named_modules()]
    for target in LORA_TARGETS:
        assert any(name.endswith(f".{target}") for name in names), target


def test_full_student_starts_as_the_teacher_whatever_the_guidance(family):
    teacher = family.load_network()
    student = family.student_network(teacher, guidance_embedding=True)
    assert student.config.time_cond_proj_dim == 256
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in student.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not student.time_embedding.cond_proj.weight.any()
    cond = family.condition(family.encode_prompts(PROMPTS), MICRO)
    x_t, time = torch.randn(3, 4, 16, 16), torch.tensor([10, 500, 999])
    with torch.no_grad():
        expected = family.predict(teacher, x_t, time, cond)
        ours = family.predict(student, x_t, time, cond, guidance=torch.tensor([0.5, 3.0, 11.0]))
    assert torch.equal(ours, expected)
    with torch.no_grad():
        student.conv_in.weight.add_(1)
    assert not torch.equal(student.conv_in.weight, teacher.conv_in.weight), "a copy, not a view"


def test_full_student_of_a_bfloat16_teacher_is_float32(tiny):
    family = make(tiny, weight_dtype="bfloat16")
    student = family.student_network(family.load_network(), guidance_embedding=False)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert student.config.time_cond_proj_dim is None


def test_guidance_and_its_embedding_go_together(family):
    teacher = family.load_network()
    student = family.student_network(teacher, guidance_embedding=True)
    cond = family.condition(family.encode_prompts(PROMPTS[:1]), micro(((8, 8), (0, 0), (8, 8))))
    x_t, time = torch.randn(1, 4, 16, 16), torch.tensor([500])
    with pytest.raises(ValueError, match="no guidance embedding"):
        family.predict(teacher, x_t, time, cond, guidance=torch.tensor([3.0]))
    with pytest.raises(ValueError, match="pass guidance"):
        family.predict(student, x_t, time, cond)


def test_guidance_embedding_is_diffusers_own(pipeline):
    from distill.model_families.calls.images import guidance_scale_embedding

    w = torch.tensor([0.0, 0.37, 7.5, 14.0])
    expected = pipeline.get_guidance_scale_embedding(w, embedding_dim=256)
    torch.testing.assert_close(guidance_scale_embedding(w, 256), expected, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def exact(tiny):
    """(the family, its plain pipeline) in float64, text encoders and autoencoder included."""
    return in_float64(make(tiny)), plain(tiny).to(torch.float64)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 4.0])
def test_generate_equals_a_plain_pipeline_call(exact, monkeypatch, guidance):
    draw_as_in_float32(monkeypatch)
    family, pipeline = exact
    network, embeds, seeds = family.load_network(), family.encode_prompts(PROMPTS), [3, 1, 2]
    ours = family.generate(
        network, embeds, sampler=EULER, seeds=seeds, width=EDGE, height=EDGE, guidance_scale=guidance
    )
    expected = images(pipeline, PROMPTS, seeds, num_inference_steps=3, guidance_scale=guidance)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=ROUNDING)


def test_generate_with_the_models_own_scheduler(family, pipeline):
    embeds = family.encode_prompts(PROMPTS[:1])
    ours = family.generate(
        family.load_network(), embeds, sampler=None, seeds=[9], width=EDGE, height=EDGE, num_inference_steps=4
    )
    torch.testing.assert_close(ours, images(pipeline, PROMPTS[:1], [9], num_inference_steps=4), rtol=0, atol=2e-5)


def test_generate_with_lcm_and_its_noise_between_steps(family, pipeline):
    from diffusers import LCMScheduler

    ours = family.generate(
        family.load_network(), family.encode_prompts(PROMPTS), sampler=LCM, seeds=[3, 1, 2], width=EDGE, height=EDGE
    )
    own = pipeline.scheduler
    pipeline.scheduler = LCMScheduler.from_config(own.config, original_inference_steps=50)
    expected = images(pipeline, PROMPTS, [3, 1, 2], num_inference_steps=3, guidance_scale=0.0)
    pipeline.scheduler = own
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)


def test_negative_prompts_count_only_under_guidance(family, pipeline):
    network, embeds, negative = family.load_network(), family.encode_prompts(PROMPTS), family.encode_prompts(["x"] * 3)

    def ours(guidance, negative_embeds):
        return family.generate(
            network,
            embeds,
            sampler=EULER,
            seeds=[0, 1, 2],
            width=EDGE,
            height=EDGE,
            guidance_scale=guidance,
            negative_embeds=negative_embeds,
        )

    expected = images(
        pipeline, PROMPTS, [0, 1, 2], num_inference_steps=3, guidance_scale=4.0, negative_prompt=["x"] * 3
    )
    torch.testing.assert_close(ours(4.0, negative), expected, rtol=0, atol=2e-5)
    assert torch.equal(ours(0.0, negative), ours(0.0, None))


def test_an_image_depends_on_its_own_seed_only(tiny):
    """Also across the micro-batches of the pipeline calls."""
    small = make(tiny, {"latents_at_once": 2 * 16 * 16})
    network, embeds = small.load_network(), small.encode_prompts(PROMPTS)
    synchronized = small.generate(network, embeds, sampler=LCM, seeds=[4, 5, 6], width=EDGE, height=EDGE)
    for n in range(3):
        one = {key: value[n : n + 1] for key, value in embeds.items()}
        alone = small.generate(network, one, sampler=LCM, seeds=[4 + n], width=EDGE, height=EDGE)
        torch.testing.assert_close(synchronized[n : n + 1], alone, rtol=0, atol=2e-5)


def test_images_of_any_aspect_ratio_are_generated(family):
    embeds = family.encode_prompts(PROMPTS[:1])
    shape = family.generate(family.load_network(), embeds, sampler=LCM, seeds=[0], width=40, height=24).shape
    assert shape == (1, 3, 24, 40)


def test_generate_leaves_the_networks_mode_alone(family):
    network = family.load_network()
    network.mid_block.train()
    family.generate(network, family.encode_prompts(["a"]), sampler=LCM, seeds=[0], width=EDGE, height=EDGE)
    assert network.mid_block.training
    assert not network.training


def test_the_samplers_sigmas_reach_the_pipeline_and_hold_for_their_steps_only(family, pipeline):
    sampler = Sampler("EulerDiscreteScheduler", {}, 2, 0.0, call={"sigmas": [9.0, 2.0]})
    network, embeds = family.load_network(), family.encode_prompts(PROMPTS[:1])
    ours = family.generate(network, embeds, sampler=sampler, seeds=[0], width=EDGE, height=EDGE)
    expected = images(pipeline, PROMPTS[:1], [0], sigmas=[9.0, 2.0], guidance_scale=0.0)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="for 2 steps"):
        family.generate(network, embeds, sampler=sampler, seeds=[0], width=EDGE, height=EDGE, num_inference_steps=4)


def test_a_samplers_misspelt_setting_is_an_error(family):
    with pytest.raises(ValueError, match="LCMScheduler takes no original_steps"):
        family.scheduler(Sampler("LCMScheduler", {"original_steps": 50}, 4, 0.0))
    with pytest.raises(ValueError, match="no scheduler 'LCM'"):
        family.scheduler(Sampler("LCM", {}, 4, 0.0))


def test_a_samplers_scheduler_keeps_the_models_noise(family, pipeline):
    scheduler = family.scheduler(LCM)
    torch.testing.assert_close(scheduler.alphas_cumprod, pipeline.scheduler.alphas_cumprod)
    assert scheduler.config.original_inference_steps == 50


def test_guidance_embedding_is_fed_by_the_pipeline_as_scale_minus_one(family):
    """And a guidance of 0, outside of what such a student knows, becomes the method's default with a warning."""
    student = family.student_network(family.load_network(), guidance_embedding=True)
    torch.nn.init.normal_(student.time_embedding.cond_proj.weight, std=0.3)
    seen = []
    student.time_embedding.cond_proj.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    sampler = Sampler("LCMScheduler", {}, 2, 8.0)
    embeds = family.encode_prompts(PROMPTS[:1])
    call = {"sampler": sampler, "seeds": [0], "width": EDGE, "height": EDGE}
    default = family.generate(student, embeds, **call)
    from distill.model_families.calls.images import guidance_scale_embedding

    assert len(seen) == 2, "one call each step: no second pass for guidance"
    torch.testing.assert_close(seen[0], guidance_scale_embedding(torch.tensor([7.0]), 256), rtol=0, atol=1e-5)
    with pytest.warns(UserWarning, match="its default 8 is used"):
        off = family.generate(student, embeds, guidance_scale=0.0, **call)
    assert torch.equal(off, default)
    assert not torch.equal(family.generate(student, embeds, guidance_scale=3.0, **call), default)


def test_flow_model_generates_through_the_plain_pipeline(tmp_path):
    """Two Euler steps written out: x' = x + (sigma' - sigma) v."""
    family = make(write_tiny_sdxl(tmp_path, prediction_type="flow"))
    network, embeds = family.load_network(), family.encode_prompts(PROMPTS[:1])
    sampler = Sampler("FlowMatchEulerDiscreteScheduler", {"shift": 1.0}, 2, 0.0, call={"sigmas": [1.0, 0.4]})
    ours = family.generate(network, embeds, sampler=sampler, seeds=[5], width=EDGE, height=EDGE)
    cond = family.condition(embeds, micro(((EDGE, EDGE), (0, 0), (EDGE, EDGE))))
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        for sigma, after in ((1.0, 0.4), (0.4, 0.0)):
            v = family.predict(network, x, torch.tensor([1000 * sigma]), cond)
            x = x + (after - sigma) * v
    torch.testing.assert_close(ours, family.decode_latents(x), rtol=0, atol=2e-5)


def test_the_empty_network_has_every_weight_and_no_memory(family):
    empty, real = family.empty_network(), family.load_network()
    assert {key: value.shape for key, value in empty.state_dict().items()} == {
        key: value.shape for key, value in real.state_dict().items()
    }
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_the_unets_layout_is_channels_last_unless_asked_otherwise(tiny):
    for asked in (True, False):
        family = make(tiny, {"channels_last": asked})
        networks = [family.load_network()]
        networks.append(family.student_network(networks[0], guidance_embedding=False))
        for network in networks:
            weight = network.down_blocks[0].resnets[0].conv1.weight
            assert weight.is_contiguous(memory_format=torch.channels_last) is asked
            assert weight.is_contiguous() is not asked
