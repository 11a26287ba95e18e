"""Progressive distillation with the adversarial stages of SDXL-Lightning: pairs first, then ends of steps alone."""

import json

import pytest
import torch
from distill.core.errors import UserError
from distill.core.plugin_api.method import MethodSetup
from distill.core.utils.seeds import RngStreams
from distill.distill_methods.progressive import Progressive
from support.resuming import resumed_equals_whole
from support.sdxl_methods import call, make_parts, table
from support.sdxl_setup import make_batch, split
from support.tiny_sdxl import write_tiny_sdxl
from torch.nn.functional import softplus

SETTINGS = {
    "student_steps": (4, 2, 1), "teacher_steps": 16, "loss_weight": "end_of_step", "w_min": 3.0, "w_max": 3.0,
    "regression_weight": (1, 0, 0.5), "adversarial_weight": (0, 2.0, 1.0),
}  # fmt: skip
"""In five parts of four steps: 16 to 4 by regression, 4 to 2 in pairs and relaxed, 2 to 1 likewise."""
JUDGES = ("discriminator_encoder", "pair_heads", "relaxed_heads")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("model") / "tiny", seed=0, layers_per_block=1)


def make(folder, model_type="lora", **more):
    return make_parts(Progressive, folder, model_type=model_type, total_steps=12, **{**SETTINGS, **more})


def taken_at(parts, step):
    batch = make_batch(parts.family)
    return list(parts.method.updates(parts.context.at(step, batch.positions), batch, step))


# -- what is where ----------------------------------------------------------------------------------------------------


def test_adversarial_stages_have_two_parts_and_only_new_numbers_of_steps_begin_anew():
    found = Progressive.stages(Progressive.Config(**SETTINGS), total_steps=12)
    assert [(stage.name, stage.num_steps, bool(stage.copy)) for stage in found] == [
        ("16 to 4 steps", 4, False),
        ("4 to 2 steps", 2, True), ("4 to 2 steps, relaxed", 2, False),
        ("2 to 1 steps", 2, True), ("2 to 1 steps, relaxed", 2, False),
    ]  # fmt: skip
    assert [stage.reset for stage in found if stage.reset] == [("student", *JUDGES)] * 2
    for share, parts in ((0, ["4 to 2 steps"]), (1, ["4 to 2 steps, relaxed"]), (0.25, None)):
        config = Progressive.Config(**{**SETTINGS, "relaxed_share": share})
        later = Progressive.stages(config, total_steps=24)[1:]
        assert parts is None or [stage.name for stage in later if "4" in stage.name] == parts
        assert sum(stage.num_steps for stage in later if "relaxed" in stage.name) == 16 * share
        copying = [stage for stage in later if stage.copy]
        assert len(copying) == 2, "the student becomes the teacher once per number of steps"
    with pytest.raises(UserError, match="max_train_steps = 3 .* 5 .* without a step"):
        Progressive.stages(Progressive.Config(**SETTINGS), total_steps=3)


def test_sdxl_lightnings_stages():
    config = Progressive.Config(student_steps="32,8,4,2,1", teacher_steps=128, adversarial_weight="0,1,1,1,1")
    assert config.all_steps == (128, 32, 8, 4, 2, 1)
    assert len(config.phases) == 9
    assert config.scales == (6, 6)


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_the_discriminator_begins_as_the_teacher_and_its_heads_read_one_end_or_a_pair(folder, model_type):
    parts = make_parts(Progressive, folder, model_type=model_type, total_steps=12, shaken=False, **SETTINGS)
    batch = make_batch(parts.family)
    t = torch.full((len(batch),), 500)
    ours, theirs = (
        parts.context.at(0, batch.positions).features(role, batch.latents, t, batch.cond)
        for role in ("discriminator_encoder", "teacher")
    )
    for level, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(level, expected, rtol=1e-6, atol=1e-6)
    widths = [level.shape[1] for level in theirs]
    read = {
        role: [next(head.parameters()).shape[1] for head in parts.networks.module(role).levels]
        for role in ("pair_heads", "relaxed_heads")
    }
    assert read == {"pair_heads": [2 * widths[-1]], "relaxed_heads": [widths[-1]]}, "of the middle block, as the paper"
    if model_type == "lora":
        assert parts.networks.module("discriminator_encoder") is parts.networks.base


# -- one step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "relaxed"), [(4, False), (6, True), (9, False), (11, True)])
def test_losses_equal_their_formulas(folder, step, relaxed):
    """With the step of eps on SDXL's table written out, and softplus of the heads' logits."""
    parts = make(folder)
    batch, bar = make_batch(parts.family), table()
    before, num_steps, held, weight = (4, 2, 0, 2.0) if step < 8 else (2, 1, 0.5, 1.0)
    count, rng = before // num_steps, RngStreams(0, step, batch.positions)
    i = rng.integers("index", num_steps)
    points = [torch.round(1000 - (count * i + k) * 1000 / before).long() - 1 for k in range(count + 1)]

    def level(t):
        known = bar[t.clamp(min=0)].where(t >= 0, torch.ones(()).double()).reshape(-1, 1, 1, 1)
        return known.sqrt(), (1 - known).sqrt()

    def stepped(role, x, t, u):
        (a, s), (a_u, s_u), eps = level(t), level(u), call(parts.networks, role, x, t, batch.cond)
        return a_u * (x - s * eps) / a + s_u * eps

    a, s = level(points[0])
    x_t = a * batch.latents + s * rng.randn("noise", batch.latents.shape[1:]).double()
    with torch.no_grad():
        x_s = stepped("stage_teacher", stepped("stage_teacher", x_t, points[0], points[1]), points[1], points[2])
        x_hat = stepped("student", x_t, points[0], points[2])
        context = parts.context.at(step, batch.positions)
        ends = points[2].clamp(min=0)
        real, fake, start = (
            context.features("discriminator_encoder", x, t, batch.cond)
            for x, t in ((x_s, ends), (x_hat, ends), (x_t, points[0]))
        )
        heads = "relaxed_heads" if relaxed else "pair_heads"

        def judged(features):
            joined = features if relaxed else [torch.cat(both, 1) for both in zip(features, start, strict=True)]
            return context.logits(heads, joined)

        def mean(logits, sign):
            return torch.stack([softplus(sign * level).mean() for level in logits]).mean()

        adversarial = mean(judged(fake), -1)
        apart = mean(judged(real), -1) + mean(judged(fake), 1)
        regression = (x_hat - x_s).square().mean()

    student, encoder, head = taken_at(parts, step)
    assert [update.role for update in (student, encoder, head)] == ["student", "discriminator_encoder", heads]
    assert student.metrics["adversarial"].item() == pytest.approx(adversarial.item(), rel=1e-5)
    assert student.metrics["regression"].item() == pytest.approx(regression.item(), rel=1e-5)
    assert student.loss.item() == pytest.approx((weight * adversarial + held * regression).item(), rel=1e-5)
    assert encoder.loss.item() == pytest.approx(apart.item(), rel=1e-5)
    assert head.loss.item() == pytest.approx(apart.item(), rel=1e-5)


def gradient(parts, update, role):
    found = torch.autograd.grad(update.loss, parts.networks.parameters(role), allow_unused=True, retain_graph=True)
    return sum(float(part.square().sum()) for part in found if part is not None)


def test_each_update_has_a_gradient_in_its_own_role(folder):
    parts = make(folder)
    student, encoder, head = taken_at(parts, 4)
    assert gradient(parts, student, "student") > 0
    assert gradient(parts, encoder, "discriminator_encoder") > 0
    assert gradient(parts, head, "pair_heads") > 0
    assert gradient(parts, encoder, "student") == gradient(parts, head, "discriminator_encoder") == 0


def test_the_pairs_tell_whose_end_belongs_to_whose_start_and_the_relaxed_heads_do_not(folder):
    """The same ends in another order are the same set: only what sees the starts can tell."""
    parts = make(folder)
    from distill.core.plugin_api.pair_discriminator import PairDiscriminator

    batch, g = make_batch(parts.family), torch.Generator().manual_seed(0)
    x_t, x_s = (torch.randn(batch.latents.shape, generator=g).double() for _ in range(2))
    cond = {name: value[:1].expand_as(value) for name, value in batch.cond.items()}
    losses = {}
    for relaxed in (False, True):
        t, s = torch.full((len(batch),), 999), torch.full((len(batch),), 499)
        judge = PairDiscriminator(parts.context.at(4, batch.positions), cond, x_t, t, s, relaxed=relaxed)
        losses[relaxed] = [judge.generator_loss(ends).mean().item() for ends in (x_s, x_s.roll(1, 0))]
    assert losses[True][0] == pytest.approx(losses[True][1], rel=1e-9)
    assert abs(losses[False][0] - losses[False][1]) > 1e-6


# -- a run ------------------------------------------------------------------------------------------------------------


def test_four_micro_batches_of_one_equal_one_batch_of_four_and_the_teacher_stays(folder):
    weights = []
    for count in (1, 4):
        parts = make(folder)
        own = {id(p) for role in parts.networks.roles for p in parts.networks.named_parameters(role).values()}
        base = {n: p.clone() for n, p in parts.networks.base.state_dict(keep_vars=True).items() if id(p) not in own}
        for step in (3, 4, 5, 6):  # the student becomes the teacher at 4, relaxed at 6
            parts.loop.step(step, split(make_batch(parts.family, seed=step), count))
        now = parts.networks.base.state_dict(keep_vars=True)
        assert all(torch.equal(now[name], value) for name, value in base.items())
        weights.append([p.clone() for role in ("student", *JUDGES) for p in parts.networks.parameters(role)])
    for one, four in zip(*weights, strict=True):
        torch.testing.assert_close(one, four, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "variant", [{}, pytest.param({"model_type": "full", "learning_rate": 1e-4}, marks=pytest.mark.slow)],
    ids=["lora", "full"],
)  # fmt: skip
def test_a_run_resumed_at_the_borders_is_bit_for_bit_the_same(tmp_path, variant):
    """Six steps: two by regression, two in pairs, two relaxed; the checkpoint of step 4 lies at the last border."""
    part = {
        "student_steps": [4, 2], "adversarial_weight": [0, 1], "regression_weight": [1, 0],
        "stage_shares": [1, 2], "w_min": 3.0, "w_max": 3.0,
    }  # fmt: skip
    settings = {
        "distillation_method": "progressive", "distillation_config": {"progressive": part}, "max_train_steps": 6,
        "validation_step_interval": 0, "checkpoint_step_interval": 1, "checkpoints_total_limit": 10, **variant,
    }  # fmt: skip
    whole = resumed_equals_whole(tmp_path, (4,), **settings)
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert ["pair_heads/loss" in row for row in rows] == [False, False, True, True, False, False]
    assert ["relaxed_heads/loss" in row for row in rows] == [False] * 4 + [True] * 2


def test_a_student_that_is_told_its_scale_has_no_adversarial_stage():
    config = Progressive.Config(**{**SETTINGS, "w_max": 7.0})
    with pytest.raises(UserError, match="range of guidance .3 to 7.* not told the scale"):
        Progressive.requires(config, MethodSetup("full"))
    assert Progressive.requires(config, MethodSetup("lora")).features
    assert not Progressive.requires(Progressive.Config(), MethodSetup("lora")).features


def test_the_run_says_which_stages_are_adversarial():
    said = Progressive(Progressive.Config(**SETTINGS), MethodSetup("lora")).notices()
    assert said == [
        "progressive: 16 -> 4 -> 2 -> 1 steps, the first teacher at guidance scale 3",
        "progressive: the stages that end at 2, 1 steps are adversarial, relaxed for the last 50% of each",
    ]


def test_each_stage_has_its_rate_and_the_encoder_its_kind():
    config = Progressive.Config(
        student_steps=[4, 2], adversarial_weight=[0.0, 1.0], stage_learning_rates=[1e-5, 1e-6],
        discriminator_encoder="full",
    )  # fmt: skip
    rates = [(stage.num_steps, stage.learning_rate) for stage in Progressive.stages(config, total_steps=8)]
    assert rates == [(4, 1e-5), (2, 1e-6), (2, 1e-6)]
    roles = {role.name: role for role in Progressive.roles(config, MethodSetup("lora"))}
    assert (roles["student"].trains, roles["discriminator_encoder"].trains) == ("lora", "full")
    assert {(role.betas, role.weight_decay) for name, role in roles.items() if "heads" in name} == {((0.0, 0.99), 0.0)}
    with pytest.raises(ValueError, match="stage_learning_rates has 1 numbers for the 2 stages"):
        Progressive.Config(student_steps=[4, 2], stage_learning_rates=[1e-5])
