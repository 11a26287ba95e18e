"""Starting from an earlier student's LoRA: the same images at another scale, and clear refusals."""

from shutil import copyfile

import pytest
import torch
from distill.core.diffusion.sampler import Sampler
from distill.core.engine.networks import Networks
from distill.core.errors import UserError
from distill.core.plugin_api.family import ExportInfo, LoraSettings
from distill.core.plugin_api.method import Role
from support.sdxl_setup import make_batch, make_setup
from support.second_time import inputs, lora_student, make
from support.tiny_sdxl import write_tiny_sdxl


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    root = tmp_path_factory.mktemp("init")
    model = write_tiny_sdxl(root / "model")
    family, method, networks, context = make_setup(model, dtype=torch.float32)
    info = ExportInfo(method.sampler(family.schedule), "lora", LoraSettings(4, 8.0))
    (root / "student").mkdir()
    with networks.use("student") as network:
        family.export(network, root / "student", info)
    batch = make_batch(family, dtype=torch.float32)
    t = torch.tensor([999, 499, 19, 0])
    with torch.no_grad():
        output = context.predict("student", batch.latents, t, batch.cond).output
    return model, root / "student", batch, t, output


@pytest.mark.parametrize("alpha", [8.0, 2.0])
def test_start_is_the_earlier_student_whatever_the_scale(student, alpha):
    model, folder, batch, t, expected = student
    family, method, _, context = make_setup(model, dtype=torch.float32)
    networks = Networks(family, method.roles(method.config, method.setup), lora=LoraSettings(4, alpha), seed=0)
    networks.start_from("student", str(folder))
    with torch.no_grad(), networks.use("student") as network:
        output = family.predict(network, batch.latents, t, batch.cond)
        with networks.use("teacher") as base:
            teacher = family.predict(base, batch.latents, t, batch.cond)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        plain = context.predict("teacher", batch.latents, t, batch.cond).output
    assert torch.equal(teacher, plain)
    assert all(p.requires_grad for p in networks.parameters("student"))
    assert len(networks.parameters("student")) == len(networks.named_parameters("student")) > 0


def test_the_average_begins_at_the_earlier_student_too(student):
    model, folder, *_ = student
    family, method, _, _ = make_setup(model, dtype=torch.float32)
    roles = method.roles(method.config, method.setup)
    networks = Networks(family, roles, lora=LoraSettings(4, 8.0), seed=0, ema_decay=0.9)
    networks.start_from("student", str(folder))
    assert networks.average is not None
    for average, weight in zip(networks.average.averages, networks.parameters("student"), strict=True):
        assert torch.equal(average, weight)


def test_another_rank_or_other_modules_are_refused(student):
    model, folder, *_ = student
    family, method, _, _ = make_setup(model, dtype=torch.float32)
    roles = method.roles(method.config, method.setup)
    with pytest.raises(UserError, match="lora_rank = 2.*(?s:.)*set lora_rank to 4"):
        Networks(family, roles, lora=LoraSettings(2, 2.0), seed=0).start_from("student", str(folder))
    with pytest.raises(UserError, match="lora_target_modules"):
        Networks(family, roles, lora=LoraSettings(4, 8.0, target_modules=("to_q",)), seed=0).start_from(
            "student", str(folder)
        )


# -- with a second time -----------------------------------------------------------------------------------------------


def flow_map_roles(**student):
    return [Role("teacher"), Role("student", trains="lora", **student), Role("before", copy_of="student")]


@pytest.fixture(scope="module")
def flow_map(tmp_path_factory):
    """A family, the folder of a student with a second time, and what the student says."""
    root = tmp_path_factory.mktemp("flow_map")
    family = make(write_tiny_sdxl(root / "model"))
    network = lora_student(family)
    lora = LoraSettings(4, 8.0)
    family.export(network, root / "student", ExportInfo(Sampler("FlowMapScheduler", {}, 4, 0.0), "lora", lora))
    x_t, t, r, cond = inputs(family)
    with torch.no_grad():
        expected = family.predict(network, x_t, t, cond, second_time=r)
    return family, root / "student", (x_t, t, r, cond), expected


def test_the_second_time_of_a_student_comes_along(flow_map):
    family, folder, (x_t, t, r, cond), expected = flow_map
    networks = Networks(family, flow_map_roles(second_time=True), lora=LoraSettings(4, 8.0), seed=0)
    networks.start_from("student", str(folder))
    for role in ("student", "before"):
        with torch.no_grad(), networks.use(role) as network:
            torch.testing.assert_close(family.predict(network, x_t, t, cond, second_time=r), expected)
    assert all(weight.requires_grad for weight in networks.parameters("student"))
    assert not any(".init." in name for name, _ in networks.base.named_parameters())


def test_a_second_time_that_the_run_does_not_take_is_refused(flow_map, tmp_path):
    family, folder, *_ = flow_map
    networks = Networks(family, flow_map_roles(), lora=LoraSettings(4, 8.0), seed=0)
    with pytest.raises(UserError, match=r"second time lies beside it, which the student(?s:.)*folder of its own"):
        networks.start_from("student", str(folder))
    copyfile(folder / "pytorch_lora_weights.safetensors", tmp_path / "alone.safetensors")
    alone = Networks(family, flow_map_roles(), lora=LoraSettings(4, 8.0), seed=0)
    alone.start_from("student", str(tmp_path / "alone.safetensors"))


def test_a_start_without_a_second_time_leaves_it_at_zero(flow_map, tmp_path):
    family, folder, (x_t, t, r, cond), _ = flow_map
    copyfile(folder / "pytorch_lora_weights.safetensors", tmp_path / "alone.safetensors")
    networks = Networks(family, flow_map_roles(second_time=True), lora=LoraSettings(4, 8.0), seed=0)
    networks.start_from("student", str(tmp_path))
    with torch.no_grad(), networks.use("student") as network:
        without = family.predict(network, x_t, t, cond)
        assert torch.equal(family.predict(network, x_t, t, cond, second_time=r), without)
