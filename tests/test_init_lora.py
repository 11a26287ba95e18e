"""Starting from an earlier student's LoRA: the same pictures at another scale, and clear refusals."""

import pytest
import torch
from distill.core.errors import UserError
from distill.core.family import ExportInfo, LoraSettings
from distill.core.networks import Networks
from support.sdxl_setup import make_batch, make_setup
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
