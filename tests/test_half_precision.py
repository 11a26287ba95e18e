"""Runs in bf16 and fp16: what starts in fp32, what computes in it, and how much of a value half precision loses."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from distill.core.diffusion import append_dims
from distill.core.diffusion.distribution_matching import distribution_matching_gradient
from distill.core.engine.networks import Networks
from distill.core.errors import DistillError
from distill.core.plugin_api.context import Context, Runtime
from distill.core.plugin_api.family import LoraSettings, MicroConditioning, ModelSettings
from distill.core.plugin_api.method import MethodSetup, Requirements, Role
from distill.core.runs.memory_plan import memory_settings
from distill.core.utils.full_precision import compute_in_fp32, full_precision
from distill.distill_methods.dmd2 import _x0
from distill.distill_methods.meanflow import flow_time_speed, time_of_flow_time
from distill.model_families.sd3 import SD3
from distill.model_families.sdxl import SDXL
from distill.plugins.optimizers import AdamW
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.cases import config_of, found_of
from support.listening import listening
from support.original_sdxl import write_single_file
from support.resuming import resumed_equals_whole
from support.small_run import execute, write_run
from support.sources import SMALL_SDXL
from support.tiny_families import EDGE, MODELS, SCALE_FACTOR, Tiny
from support.tiny_sdxl import write_tiny_sdxl
from support.trial import make_batch
from torch import nn

HALF = {"bf16": "bfloat16", "fp16": "float16"}
LORA = LoraSettings(rank=4, alpha=4.0)
PROMPTS = ["a red fox", "two boats"]
TINY = {"sdxl": Tiny("sdxl", write_tiny_sdxl), **{name: MODELS[name] for name in ("sd3.5-without-t5", "flux-schnell")}}


@pytest.fixture(scope="module", params=TINY)
def model(request, tmp_path_factory):
    tiny = TINY[request.param]
    return SimpleNamespace(tiny=tiny, folder=tiny.write(tmp_path_factory.mktemp("half") / "model"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("half-sdxl") / "model")


def checkpoint(folder):
    """The denoiser's tensors as they are on disk."""
    (file,) = [*folder.glob("unet/*.safetensors"), *folder.glob("transformer/*.safetensors")]
    return load_file(file)


def equals(network, tensors):
    own = {name: value for name, value in network.state_dict().items() if not name.startswith("second_time.")}
    assert own.keys() == tensors.keys()
    assert {value.dtype for value in own.values()} == {torch.float32}
    return all(torch.equal(value.cpu(), tensors[name].float()) for name, value in own.items())


def inputs(family):
    edge = EDGE // SCALE_FACTOR
    x_t = torch.randn(2, family.latent_channels, edge, edge, generator=torch.Generator().manual_seed(0))
    micro = MicroConditioning([(64, 48)] * 2, [(0, 0)] * 2, [(EDGE, EDGE)] * 2)
    return x_t, torch.tensor([312.5, 987.0]), family.condition(family.encode_prompts(PROMPTS), micro)


# -- full training starts from the files ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_students_fake_scores_and_averages_start_as_the_checkpoint_bit_for_bit(model, dtype):
    family = model.tiny.make(model.folder, weight_dtype=dtype)
    roles = [Role("teacher"), Role("student", trains="full", second_time=True), Role("fake", trains="full"),
             Role("target", ema_of="student", ema_decay=0.9), Role("before", copy_of="fake")]  # fmt: skip
    networks, stored = Networks(family, roles, lora=None, seed=0), checkpoint(model.folder)
    for role in ("student", "fake", "target", "before"):
        assert equals(networks.module(role), stored), role
    inner = [value for name, value in networks.base.named_parameters() if not name.startswith(family.ends)]
    assert {value.dtype for value in inner} == {getattr(torch, dtype)}, "the teacher stays in half precision"


def test_a_full_student_beside_a_lora_starts_as_the_checkpoint(model):
    family = model.tiny.make(model.folder, weight_dtype="bfloat16")
    networks = Networks(family, [Role("teacher"), Role("student", trains="lora"), Role("fake", trains="full")],
                        lora=LORA, seed=0)  # fmt: skip
    assert equals(networks.module("fake"), checkpoint(model.folder))


def test_a_full_student_starts_as_a_single_file_and_as_shards(sdxl, tmp_path):
    expected = checkpoint(sdxl)
    single = write_single_file(sdxl, tmp_path / "one.safetensors")
    sharded = shutil.copytree(sdxl, tmp_path / "sharded")
    names, (file,) = sorted(expected), (sharded / "unet").glob("*.safetensors")
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    shards = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for shard, half in zip(shards, halves, strict=True):
        save_file({name: expected[name] for name in half}, file.with_name(shard), metadata={"format": "pt"})
    file.unlink()
    index = {"metadata": {}, "weight_map": {name: shard for shard, half in zip(shards, halves, strict=True)
                                            for name in half}}  # fmt: skip
    file.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    for source, settings in ((single, {"config_source": str(sdxl)}), (sharded, {})):
        family = SDXL(SDXL.Config(), ModelSettings(str(source), weight_dtype="bfloat16", **settings))
        teacher = family.load_network()
        assert equals(family.student_network(teacher, guidance_embedding=False), expected)
        assert torch.equal(teacher.conv_in.weight, expected["conv_in.weight"]), "the ends are fp32 as well"


def test_teacher_loras_are_fused_into_a_full_student_in_fp32(sdxl, tmp_path):
    g = torch.Generator().manual_seed(0)
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = {
        f"{path}.lora_A.weight": torch.randn(4, 32, generator=g),
        f"{path}.lora_B.weight": torch.randn(32, 4, generator=g),
    }
    save_file(lora, tmp_path / "style.safetensors")
    fused = {"teacher_lora": ((str(tmp_path / "style.safetensors"), 0.7),)}
    students = {}
    for dtype in ("float32", "bfloat16"):
        family = SDXL(SDXL.Config(), ModelSettings(str(sdxl), weight_dtype=dtype, **fused))
        students[dtype] = family.student_network(family.load_network(), guidance_embedding=False)
    assert equals(students["bfloat16"], students["float32"].state_dict())
    assert not equals(students["bfloat16"], checkpoint(sdxl))


def test_smaller_students_and_told_ones_start_from_the_files_too(model):
    key = "student_layers_per_block" if model.tiny.family == "sdxl" else "student_num_layers"
    family = model.tiny.make(model.folder, {key: 1}, weight_dtype="bfloat16")
    wide, stored = model.tiny.make(model.folder, {key: 1}), checkpoint(model.folder)
    made = [
        each.student_network(each.load_network(), guidance_embedding=False, smaller=True) for each in (family, wide)
    ]
    assert equals(made[0], made[1].state_dict())
    if family.capabilities.guidance_embedding:
        told = family.student_network(family.load_network(), guidance_embedding=True).state_dict()
        assert all(torch.equal(told[name], value) for name, value in stored.items())
        added = {name: value for name, value in told.items() if name not in stored and "linear_1" in name}
        for name, value in added.items():  # of Flux: the time's own first layer
            assert torch.equal(value, stored[name.replace("guidance_embedder", "timestep_embedder")])


@pytest.mark.parametrize("precision", ["no", *HALF])
def test_a_full_student_that_never_moved_is_exported_as_the_checkpoint(tmp_path, precision):
    settings = {"model_type": "full", "mixed_precision": precision, "max_train_steps": 1, "lr_warmup_steps": 1,
                "distillation_config": {"lcm": {"w_min": 3, "w_max": 3}}, "validation_step_interval": 0}  # fmt: skip
    execute(write_run(tmp_path, **settings))  # the warm-up's first rate is 0
    assert json.loads((tmp_path / "out" / "metrics.jsonl").read_text())["lr"] == 0
    (file,) = (tmp_path / "out" / "student" / "unet").glob("*.safetensors")
    exported, stored = load_file(file), checkpoint(tmp_path / "model")
    assert all(torch.equal(exported[name], value) for name, value in stored.items())
    family = SDXL(SDXL.Config(), ModelSettings(str(tmp_path / "model"), weight_dtype=HALF.get(precision, "float32")))
    student = family.load_student(tmp_path / "out" / "student")
    assert torch.equal(student.conv_out.weight, stored["conv_out.weight"]), "its ends are fp32 in any run"
    asked = {"sampler": None, "width": EDGE, "height": EDGE, "num_inference_steps": 1}
    assert family.generate(student, family.encode_prompts(PROMPTS[:1]), seeds=[1], **asked).isfinite().all()


def test_reading_the_student_holds_no_third_copy_of_the_base(sdxl, monkeypatch):
    """Tensors are read one by one: the one before is in the student, not in a second state."""
    family = SDXL(SDXL.Config(), ModelSettings(str(sdxl), weight_dtype="bfloat16"))
    teacher, read = family.load_network(), []
    get = family._source.wide_weights

    def counted(names=None):
        for name, value in get(names):
            read.append(value.data_ptr())
            yield name, value

    monkeypatch.setattr(family._source, "wide_weights", counted)
    student = family.student_network(teacher, guidance_embedding=False)
    own = {value.data_ptr() for value in student.state_dict().values()}
    one_dimensional = sum(value.ndim < 4 for value in student.state_dict().values())
    assert len(own & set(read)) >= one_dimensional, "what was read is the student's own memory, but for channels last"


# -- the first and the last layers ------------------------------------------------------------------------------------


class Ends(nn.Module):
    """A convolution, one in the middle, one at the end."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["fp32", "half"])
def test_ends_compute_in_fp32_inside_autocast_and_gradients_reach_their_weights(half, weights):
    torch.manual_seed(0)
    plain, x = Ends(), torch.randn(2, 4, 8, 8)
    ends = copy.deepcopy(plain)
    if weights == "half":
        ends.to(half), plain.to(half).float()
    compute_in_fp32(ends, first="first", last=["last"])
    ends = copy.deepcopy(ends)  # of a copy, its own weights
    seen = {}
    ends.middle.register_forward_hook(lambda module, args, output: seen.update(given=args[0], made=output))
    with torch.autocast("cpu", half):
        y = ends(x)
    assert (seen["given"].dtype, seen["made"].dtype, y.dtype) == (half, half, torch.float32)
    assert torch.equal(seen["given"], plain.first(x).to(half)), "computed in fp32, then as the middle takes it"
    assert torch.equal(y, plain.last(seen["made"].float()))
    y.sum().backward()
    assert all(weight.grad is not None and weight.grad.dtype == weight.dtype for weight in ends.parameters())
    assert torch.equal(ends.double()(x.double()), plain.double()(x.double())), "nothing changes outside autocast"


def test_an_adapter_on_an_end_computes_in_fp32_and_its_copy_with_its_own_weights():
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    network, x = Ends(), torch.randn(1, 4, 8, 8)
    compute_in_fp32(network, first="first", last=["last"])
    network(x)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["last"], init_lora_weights=False), network, "student")
    seen = {}
    network.last.base_layer.register_forward_hook(lambda module, args, output: seen.update(given=args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        y = network(x)
        other = copy.deepcopy(network)
        other.last.lora_B["student"].weight.data.zero_()
        changed = other(x)
    assert seen["given"].dtype == torch.float32
    assert torch.equal(y, network.last(seen["given"].detach())), "the whole of it, the adapter too"
    assert not torch.equal(changed, y)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_teacher_student_and_features_have_fp32_ends_with_and_without_checkpointing(model, checkpointing):
    family = model.tiny.make(model.folder, weight_dtype="bfloat16")
    targets = (*family.lora_targets, *(["conv_out", "conv_in"] if model.tiny.family == "sdxl" else ["proj_out"]))
    lora = LoraSettings(rank=4, alpha=4.0, target_modules=targets)
    roles = [Role("teacher"), Role("student", trains="lora"), Role("fake", trains="full")]
    networks = Networks(family, roles, lora=lora, seed=0, gradient_checkpointing=checkpointing)
    context = Context(Runtime(family, networks, seed=0, device=torch.device("cpu"), autocast_dtype=torch.bfloat16))
    x_t, time, cond = inputs(family)
    for role in networks.roles:
        seen, module = {}, networks.module(role)
        handles = [module.get_submodule(end).register_forward_hook(
            lambda module, args, output, end=end, seen=seen: seen.update({end: (args[0].dtype, output.dtype)})
        ) for end in family.ends]  # fmt: skip
        prediction = context.predict(role, x_t, time / 1000 if family.schedule.clean_at_zero else time.long(), cond)
        assert prediction.output.dtype == prediction.x0.dtype == torch.float32
        assert seen[family.ends[0]] == (torch.float32, torch.bfloat16)
        assert {output for _, output in list(seen.values())[1:]} == {torch.float32}
        for handle in handles:
            handle.remove()
        if role != "teacher":
            prediction.x0.square().mean().backward()
            assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in networks.parameters(role))
        assert all(feature.isfinite().all() for feature in context.features(role, x_t, time.long() / 1000
                   if family.schedule.clean_at_zero else time.long(), cond))  # fmt: skip


def test_the_ends_of_a_quantised_base_stay_fp32_and_the_layers_of_the_same_name_inside_are_packed(model):
    from distill.core.plugin_api.precision import BASE, Precisions
    from distill.plugins._packed import PackedLinear
    from distill.plugins.quantize_torchao import Int8Torchao

    precision = Precisions({BASE: Int8Torchao(Int8Torchao.Config())})
    family = model.tiny.make(model.folder, weight_dtype="bfloat16", precision=precision)
    network, (x_t, time, cond) = family.load_network(), inputs(family)
    packed = [name for name, module in network.named_modules() if isinstance(module, PackedLinear)]
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    assert packed == [name for name in linear if not name.startswith(family.ends)]
    stored = checkpoint(model.folder)
    assert all(torch.equal(weight, stored[name]) for name, weight in network.named_parameters()
               if name.startswith(family.ends))  # fmt: skip
    student = family.student_network(network, guidance_embedding=False)
    assert equals(student, stored), "a full student beside a quantised base"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert family.predict(network, x_t, time, cond).isfinite().all()


def test_images_come_from_the_plain_pipeline_in_half_precision_too(model):
    family = model.tiny.make(model.folder, weight_dtype="bfloat16")
    wide = model.tiny.make(model.folder)
    asked = {"sampler": None, "seeds": [3, 8], "width": EDGE, "height": EDGE, "num_inference_steps": 2}
    made = [each.generate(each.load_network(), each.encode_prompts(PROMPTS), **asked) for each in (family, wide)]
    assert made[0].shape == (2, 3, EDGE, EDGE)
    assert (made[0] - made[1]).abs().mean() < 0.05


def miniature(cls, dtype, roles):
    settings = ModelSettings(str(SMALL_SDXL if cls is SDXL else cls.miniature), weight_dtype=dtype, resolution=(32, 32))
    family = cls(cls.Config(), settings)
    autocast = None if dtype == "float32" else getattr(torch, dtype)
    networks = Networks(family, roles, lora=LORA, seed=0)
    return (
        family,
        networks,
        Context(Runtime(family, networks, seed=0, device=torch.device("cpu"), autocast_dtype=autocast)),
    )


def noised(family, context, t):
    """Encoded captions, and noise around soft shapes at time t."""
    g, edge = torch.Generator().manual_seed(1), 32 // family.scale_factor
    x_0 = nn.functional.interpolate(torch.randn(4, family.latent_channels, 4, 4, generator=g), size=edge)
    eps = torch.randn(x_0.shape, generator=g)
    micro = MicroConditioning([(32, 32)] * 4, [(0, 0)] * 4, [(32, 32)] * 4)
    cond = family.condition(family.encode_prompts([f"a red circle {n}" for n in range(4)]), micro)
    return x_0, context.schedule.add_noise(x_0, eps, t), cond


def rms(value):
    return value.double().square().mean().sqrt().item()


@pytest.fixture(scope="module")
def precise():
    """The miniature in fp32, its conditioning, and inputs at the noisiest time."""
    family, networks, context = miniature(SDXL, "float32", [Role("teacher")])
    t = torch.full((4,), 999)
    _, x_t, cond = noised(family, context, t)
    return SimpleNamespace(t=t, x_t=x_t, cond=cond, x0=context.predict("teacher", x_t, t, cond).x0, networks=networks)


@pytest.mark.parametrize("dtype", HALF.values())
def test_fp32_ends_take_two_fifths_off_the_error_of_x0_at_the_noisy_end(precise, dtype):
    errors = []
    for ends in (SDXL.ends, ()):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SDXL, "ends", ends)
            if not ends:  # as it was: the input rounded as well
                patch.setattr("distill.model_families.bases.unet.input_type", lambda weights, device: weights)
            _, _, context = miniature(SDXL, dtype, [Role("teacher")])
            with torch.no_grad():
                errors.append(rms(context.predict("teacher", precise.x_t, precise.t, precise.cond).x0 - precise.x0))
    assert errors[0] <= 0.6 * errors[1], errors


# -- derivatives ------------------------------------------------------------------------------------------------------


def test_a_network_in_full_precision_is_that_of_its_widened_weights(sdxl):
    family = SDXL(SDXL.Config(), ModelSettings(str(sdxl), weight_dtype="bfloat16"))
    network, (x_t, time, cond) = family.load_network(), inputs(family)
    before = {name: value.clone() for name, value in network.named_parameters()}
    widened = copy.deepcopy(network).float()
    with torch.no_grad():
        cond = {name: value.float() for name, value in cond.items()}
        expected = family.predict(widened, x_t, time, cond)
        with torch.autocast("cpu", torch.bfloat16), full_precision(network, torch.device("cpu")):
            found = family.predict(network, x_t, time, cond)
        with pytest.raises(RuntimeError), full_precision(network, torch.device("cpu")):
            family.predict(network, x_t[:, :1], time, cond)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    after = dict(network.named_parameters())
    assert all(after[name].dtype == value.dtype and torch.equal(after[name], value) for name, value in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.down_blocks.modules())


@pytest.mark.parametrize("dtype", HALF.values())
def test_derivatives_are_taken_in_fp32_whatever_the_run(dtype):
    """bf16's error of a difference at h = 0.005 was 103% of the derivative, of which its weights have 2%."""
    roles = [Role("teacher"), Role("student", trains="lora", second_time=True)]
    found = {}
    for each in ("float32", dtype):
        family, _, context = miniature(SDXL, each, roles)
        schedule, tau = context.schedule, torch.full((4,), 0.9, dtype=torch.float64)
        t, r = (time_of_flow_time(schedule, at) for at in (tau, tau - 0.3))
        x_0, x_t, cond = noised(family, context, t)
        found.setdefault("cond", cond), found.setdefault("direction", x_t - x_0)

        def u(x, t, context=context, r=r):
            return context.predict("student", x, t, found["cond"], r=r).as_type("flow")

        speed = flow_time_speed(schedule, t)
        tangents = (append_dims(speed, x_t) * found["direction"] / 100, speed)
        for precision in ("float32", "mixed"):
            found[each, precision] = context.jvp(u, (x_t, t), tangents, step=0.005, precision=precision)
    exact = found["float32", "float32"]
    assert torch.equal(exact, found["float32", "mixed"]), "one and the same in an fp32 run"
    errors = {precision: rms(found[dtype, precision] - exact) / rms(exact) for precision in ("float32", "mixed")}
    assert errors["float32"] < 0.05, errors
    assert errors["mixed"] > 5 * errors["float32"], errors


# -- losses and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", ["lcm", "pcm", "tcd", "dmd2/gan", "dmd2/sid", "progressive", "guidance", "meanflow", "kd"]
)
def test_losses_and_targets_of_every_method_are_at_least_fp32(sdxl, case, monkeypatch):
    family = SDXL(SDXL.Config(), ModelSettings(str(sdxl), weight_dtype="bfloat16"))
    found, config, setup = found_of(case), config_of(case), MethodSetup("lora", prediction_type=family.prediction_type)
    networks = Networks(family, found.roles(config, setup), lora=LORA, seed=0)
    stages, device = found.stages(config, total_steps=4), torch.device("cpu")
    context = Context(Runtime(family, networks, seed=0, device=device, autocast_dtype=torch.bfloat16, stages=stages))
    needs = found.requires(config, setup)
    batch = make_batch(family, 1, images=needs.images, points=needs.trajectory_points)
    narrow = functools.partial(torch.Tensor.to, dtype=torch.float32)
    batch = copy.copy(batch)
    object.__setattr__(batch, "latents", None if batch.latents is None else narrow(batch.latents))
    object.__setattr__(batch, "cond", {name: narrow(value) for name, value in batch.cond.items()})
    distances = []
    import distill.core.diffusion.regression as regression

    monkeypatch.setattr(regression, "distance", lambda *given, **kept: distances.extend(given))
    updates = list(found(config, setup).updates(context.at(1, batch.positions), batch, 1))
    assert updates
    for update in updates:
        assert update.loss.dtype in (torch.float32, torch.float64)
        assert update.per_sample is None or update.per_sample.dtype in (torch.float32, torch.float64)


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 0.12), ("float16", 0.02)])
def test_the_normalised_gradient_of_distribution_matching_survives_half_precision(dtype, most):
    roles, gradients, given = [Role("teacher"), Role("fake", trains="lora")], {}, {}
    for each in ("float32", dtype):
        family, networks, context = miniature(SDXL, each, roles)
        g, t = torch.Generator().manual_seed(3), torch.full((4,), 980)
        with torch.no_grad():
            for name, weight in networks.named_parameters("fake").items():
                if "lora_B" in name:
                    weight.add_(0.02 * torch.randn(weight.shape, generator=g))
            x_0, x_t, cond = given.setdefault("given", noised(family, context, t))
            real, bare = (half.x0 for half in context.predict_cond_uncond("teacher", x_t, t, cond))
            fake = _x0(context.predict("fake", x_t, t, cond))
        real = bare.double() + 8 * (real.double() - bare.double())
        gradients[each] = distribution_matching_gradient(x_0.double(), real, fake, normalise=True)
    error = rms(gradients[dtype] - gradients["float32"]) / rms(gradients["float32"])
    assert error <= most


# -- fp16 and its scalers ---------------------------------------------------------------------------------------------


@pytest.fixture
def high_scale(monkeypatch):
    """A scale that the first updates must bring down, so that its state decides which updates are taken."""
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**23))


def test_runs_in_fp16_with_several_scalers_resume_bit_for_bit(tmp_path, high_scale):
    settings = {
        "distillation_method": "dmd2", "mixed_precision": "fp16", "max_train_steps": 4, "checkpoint_step_interval": 1,
        "checkpoints_total_limit": 9, "gradient_accumulation_steps": 1, "validation_step_interval": 0,
        "distillation_config": {"dmd2": {"fake_updates_per_student_update": 1, "gan_weight": 0.1}},
    }  # fmt: skip
    write_tiny_sdxl(tmp_path / "model")
    whole = resumed_equals_whole(tmp_path, [2], **settings)
    first, last = (json.loads((whole / f"checkpoint-{n}" / "state.json").read_text()) for n in (1, 4))
    scales = [{role: state["scale"] for role, state in each["scalers"].items()} for each in (first, last)]
    assert scales[0] == {"student": 2.0**22, "fake_score": 2.0**22, "discriminator": 2.0**23}
    assert scales[1] == {"student": 2.0**22, "fake_score": 2.0**21, "discriminator": 2.0**23}, "each role has its own"
    assert last["bad_steps"]["bad"] == {}, "the search is no fault"
    resumed = json.loads((tmp_path / "cut-2" / "checkpoint-4" / "state.json").read_text())
    assert (resumed["scalers"], resumed["bad_steps"]) == (last["scalers"], last["bad_steps"])


def test_fp16_on_a_cpu_is_said_to_be_slow_and_the_memory_plan_counts_half_the_base(tmp_path):
    _, lines = execute(write_run(tmp_path, mixed_precision="fp16", max_train_steps=1, validation_step_interval=0))
    assert any("mixed_precision = fp16 on a CPU" in line for line in lines)
    with safe_open(tmp_path / "out" / "student" / "pytorch_lora_weights.safetensors", framework="pt") as file:
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118 - no mapping


def test_a_base_with_fp32_ends_counts_as_half(monkeypatch):
    monkeypatch.setattr("distill.core.runs.memory_plan.of_phases", lambda *given, **more: {})  # beside training
    monkeypatch.setattr("distill.core.runs.memory_plan.run_activations", lambda *run: None)
    family, networks, _ = miniature(SD3, "bfloat16", [Role("teacher"), Role("student", trains="lora")])
    plugin = AdamW(AdamW.Config())
    run = SimpleNamespace(
        settings=SimpleNamespace(
            use_ema=False, mixed_precision="bf16", gradient_checkpointing=False, checkpoint_async=False,
            pixel_decoder=None, activation_offload=False, model_type="lora",
        ),
        networks=networks, resolution=(32, 32), family=family, optimizer_plugin=plugin,
        config=SimpleNamespace(largest_batch=1),
        method=SimpleNamespace(config=None, setup=None, requires=lambda *_: Requirements()),
    )  # fmt: skip
    assert 2 <= memory_settings(run).base_bytes < 2.2  # type: ignore[arg-type]


def test_the_search_for_the_scale_may_take_its_sixteen_halvings():
    from distill.core.engine.health import HealthMonitor

    def monitor(updates, *, finite):
        made = HealthMonitor(3, scaled=True)
        for step in range(updates):
            flags = torch.tensor(False), torch.zeros(2, dtype=torch.bool)
            made.record("student", step, *flags, ["a", "b"], finite_loss=torch.tensor(finite))
            made.check()
        return made

    with listening():
        resumed = HealthMonitor(3, scaled=True)
        resumed.load_state_dict(json.loads(json.dumps(monitor(18, finite=True).state_dict())))
        resumed.check()
        with pytest.raises(DistillError, match="19 times in a row"):
            monitor(19, finite=True)
        with pytest.raises(DistillError, match="3 times in a row"):
            monitor(3, finite=False)


# -- Flux's time ------------------------------------------------------------------------------------------------------


def test_a_full_flux_student_is_told_the_times_of_its_half_precision_pipeline(tmp_path):
    """FluxPipeline rounds times to its type, divides and multiplies by 1000 in it: to multiples of 4 above 512 in bf16.

    A student with fp32 weights inside autocast is rounded too, by the transformer. Without the same order of roundings
    183 of the 1000 times differ, by up to 4, from those that it is sampled at.
    """
    tiny = MODELS["flux-schnell"]
    family = tiny.make(tiny.write(tmp_path / "model"))
    student, seen = family.load_network(), []
    student.time_text_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0].float()))
    t = torch.arange(1, 1001).float()
    x_t, _, cond = inputs(family)
    x_t, cond = x_t[:1], {name: value[:1] for name, value in cond.items()}

    def told(dtype):
        seen.clear()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32), torch.no_grad():
            for time in (t[892:893], t[749:750], t[498:499]):
                family.predict(student, x_t, time, cond)
        return torch.cat(seen)

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pipeline = t.to(dtype) / 1000 * 1000
        torch.testing.assert_close(told(dtype), pipeline[[892, 749, 498]].float(), rtol=1e-6, atol=0)
    assert told(torch.bfloat16).tolist() == [892.0, 752.0, 500.0]
    otherwise = (t / 1000).to(torch.bfloat16) * 1000
    assert (otherwise != t.to(torch.bfloat16) / 1000 * 1000).sum() == 183
    with full_precision(student, torch.device("cpu")):
        assert told(torch.float32).tolist() == pytest.approx([893, 750, 499])
