"""Progressive distillation in the engine: a step against its formulas written out, and what happens between stages."""

import json
from itertools import pairwise

import pytest
import torch
from distill.core.errors import UserError
from distill.core.plugin_api.method import MethodSetup
from distill.core.utils.seeds import RngStreams
from distill.distill_methods.progressive import Progressive
from pydantic import ValidationError
from support.resuming import resumed_equals_whole
from support.sdxl_methods import call, loss_and_gradients, make_parts, table
from support.sdxl_setup import make_batch, split
from support.small_run import execute, write_run
from support.tiny_sdxl import write_tiny_sdxl

STEPS = (8, 4, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("model") / "tiny", seed=0, layers_per_block=1)


def make(folder, model_type="lora", **more):
    return make_parts(Progressive, folder, model_type=model_type, **{"student_steps": STEPS, **more})


# -- one step ---------------------------------------------------------------------------------------------------------


def papers_loss(parts, batch, *, step, stage, told):
    """Algorithm 2 of arXiv 2202.00512, in eps of SDXL's table, with nothing of the method's or the diffusion core's."""
    config, bar, n = parts.method.config, table(), len(batch)
    rng = RngStreams(0, step, batch.positions)
    num_steps = config.student_steps[stage]
    count = [config.teacher_steps or 2 * config.student_steps[0], *config.student_steps][stage] // num_steps
    i = rng.integers("index", num_steps)
    omega = rng.uniform("w", config.w_min, config.w_max)
    w = omega - 1 if told else None
    points = [torch.round(1000 - (count * i + k) * 1000 / (count * num_steps)).long() - 1 for k in range(count + 1)]

    def level(t):
        known = bar[t.clamp(min=0)].where(t >= 0, torch.ones(()).double()).reshape(n, 1, 1, 1)
        return known.sqrt(), (1 - known).sqrt()

    def teacher(x, t):
        if stage > 0:
            return call(parts.networks, "stage_teacher", x, t, batch.cond, w=w)
        with_prompt, without = (call(parts.networks, "teacher", x, t, batch.cond, prompt=p) for p in (True, False))
        return without + omega.reshape(n, 1, 1, 1) * (with_prompt - without)

    (a_t, s_t), (a_s, s_s) = level(points[0]), level(points[-1])
    x = x_t = a_t * batch.latents + s_t * rng.randn("noise", batch.latents.shape[1:]).double()
    with torch.no_grad():
        for before, after in pairwise(points):
            (a, s), (a_next, s_next), eps = level(before), level(after), teacher(x, before)
            x = a_next * (x - s * eps) / a + s_next * eps
        target = (x - s_s / s_t * x_t) / (a_s - s_s / s_t * a_t)
    eps = call(parts.networks, "student", x_t, points[0], batch.cond, w=w)
    output = (x_t - s_t * eps) / a_t
    assert (points[-1][i == num_steps - 1] == -1).all(), "the last step ends at the data"
    if config.loss_weight == "end_of_step":
        return ((a_s * output + s_s * eps - x) ** 2).mean()
    weight = ((a_t / s_t) ** 2).clamp(min=1)
    return (weight * (output - target) ** 2).mean()


LIGHTNING = {"teacher_steps": 16, "loss_weight": "end_of_step"}


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize(
    ("model_type", "told", "more"),
    [
        ("lora", False, {}), ("full", False, {}), ("full", True, {}),
        ("lora", False, LIGHTNING), ("lora", False, {"teacher_steps": 12}),
    ],
)  # fmt: skip
def test_one_step_equals_the_papers_algorithm(folder, model_type, told, more, stage):
    top = 7.0 if told or model_type == "lora" else 3.0  # a LoRA is not told, and sees a range all the same
    parts = make(folder, model_type, w_min=3.0, w_max=top, student_steps=(4, 2), **more)
    step = 1 + 3 * stage
    batch = make_batch(parts.family)
    (update,) = parts.method.updates(parts.context.at(step, batch.positions), batch, step)
    loss, gradients = loss_and_gradients(parts, update.loss)
    expected = papers_loss(parts, batch, step=step, stage=stage, told=told)
    exact, wanted = loss_and_gradients(parts, expected)
    assert loss == pytest.approx(exact, rel=1e-9)
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_a_teacher_without_guidance_is_called_once(folder):
    """w = 1 (scale) gives the same step at half the calls."""
    batch_losses = []
    for low, high in ((1.0, 1.0), (1.0, 1.0 + 1e-12)):
        parts = make(folder, w_min=low, w_max=high)
        calls = []
        parts.networks.base.register_forward_hook(lambda module, args, output, seen=calls: seen.append(len(args[0])))
        batch = make_batch(parts.family)
        (update,) = parts.method.updates(parts.context.at(0, batch.positions), batch, 0)
        batch_losses.append((update.loss.item(), sum(calls)))
    assert batch_losses[0][0] == pytest.approx(batch_losses[1][0], rel=1e-6)
    assert [calls for _, calls in batch_losses] == [3 * 4, 5 * 4]


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_four_micro_batches_of_one_equal_one_batch_of_four(folder, model_type):
    weights = []
    for count in (1, 4):
        parts = make(folder, model_type)
        for step in range(4):  # across a stage's beginning
            parts.loop.step(step, split(make_batch(parts.family, seed=step), count))
        weights.append([p.clone() for p in parts.networks.parameters("student")])
    for one, four in zip(*weights, strict=True):
        torch.testing.assert_close(one, four, rtol=1e-6, atol=1e-9)


# -- between stages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_ema", [False, True])
@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_the_student_becomes_the_teacher_and_its_optimizer_begins_anew(folder, model_type, use_ema):
    parts = make(folder, model_type, use_ema=use_ema)
    networks, optimizer = parts.networks, parts.loop.optimizers["student"]
    own = {id(p) for role in ("student", "stage_teacher") for p in networks.named_parameters(role).values()}
    base = {n: p.clone() for n, p in networks.base.state_dict(keep_vars=True).items() if id(p) not in own}
    rates = []
    for step in range(6):
        student = [p.clone() for p in networks.parameters("student")]
        average = [p.clone() for p in networks.average.averages] if networks.average else student
        before = [p.clone() for p in networks.named_parameters("stage_teacher").values()]
        rates.append(parts.loop.step(step, [make_batch(parts.family, seed=step)]).metrics["lr"])
        now = list(networks.named_parameters("stage_teacher").values())
        begins = step in (2, 4)
        for teacher, expected in zip(now, average if begins else before, strict=True):
            assert torch.equal(teacher, expected), f"step {step}"
        counts = {int(state["step"]) for state in optimizer.optimizer.state.values()}
        assert counts == {step % 2 + 1}, "moments and counters of the stage alone"
        assert all(not torch.equal(p, q) for p, q in zip(networks.parameters("student"), student, strict=True))
    assert rates == pytest.approx([1e-3, 5e-4] * 3), "the learning rate begins anew with each stage"
    after = networks.base.state_dict(keep_vars=True)
    assert base
    assert all(torch.equal(after[name], value) for name, value in base.items()), "the base is bitwise what it was"
    assert all(p.grad is None for p in networks.named_parameters("stage_teacher").values())


def test_the_first_step_of_a_later_stage_is_that_of_a_fresh_optimizer(folder):
    """Adam's first step has the size of the learning rate whatever the gradient: no moment of the stage before."""
    parts = make(folder)
    parts.loop.optimizers["student"].optimizer.param_groups[0]["weight_decay"] = 0.0
    for step in range(3):
        before = [p.detach().clone() for p in parts.networks.parameters("student")]
        parts.loop.step(step, [make_batch(parts.family, seed=step)])
    moved = torch.cat(
        [(p.detach() - q).abs().flatten() for p, q in zip(parts.networks.parameters("student"), before, strict=True)]
    )
    assert moved.max() <= 1e-3 * (1 + 1e-9)
    assert moved.median().item() == pytest.approx(1e-3, rel=0.02)


def test_a_lora_run_holds_one_base(folder):
    parts = make(folder)
    networks = parts.networks
    assert networks.module("teacher") is networks.module("student") is networks.module("stage_teacher")
    adapter = sum(p.numel() for p in networks.named_parameters("student").values())
    bare = sum(p.numel() for p in parts.family.load_network().parameters())
    assert sum(p.numel() for p in networks.base.parameters()) == bare + 2 * adapter
    assert not any(p.requires_grad for p in networks.named_parameters("stage_teacher").values())


def test_one_stage_needs_no_second_teacher(folder):
    assert set(make(folder, student_steps=(4,)).networks.roles) == {"teacher", "student"}


SMALL = {
    "distillation_method": "progressive",
    "distillation_config": {"progressive": {"student_steps": [4, 2], "w_min": 3.0, "w_max": 3.0}},
    "max_train_steps": 6, "validation_step_interval": 0, "checkpoint_step_interval": 1, "checkpoints_total_limit": 10,
    "lr_scheduler": "linear",
}  # fmt: skip


@pytest.mark.parametrize(
    "variant", [{"use_ema": True}, {"model_type": "full", "learning_rate": 1e-4}], ids=["lora-ema", "full"]
)
def test_a_run_resumed_before_at_or_after_a_stage_boundary_is_bit_for_bit_the_same(tmp_path, variant):
    """Three steps per stage: checkpoints of steps 2, 3 (the second stage has not begun) and 4."""
    whole = resumed_equals_whole(tmp_path, (2, 3, 4), **SMALL, **variant)
    scheduler = json.loads((whole / "student" / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["timestep_spacing"]) == ("DDIMScheduler", "trailing")
    assert scheduler["set_alpha_to_one"]
    assert not scheduler["clip_sample"]


# -- settings ---------------------------------------------------------------------------------------------------------


def test_lengths_of_stages_follow_their_shares():
    def lengths(total, **more):
        return [stage.num_steps for stage in Progressive.stages(Progressive.Config(**more), total_steps=total)]

    assert lengths(1000) == [250] * 4
    assert lengths(1000, stage_shares=(1, 1, 2, 4)) == [125, 125, 250, 500]
    for total in range(4, 60):
        assert sum(lengths(total)) == total
        assert min(lengths(total)) >= 1


def test_later_stages_copy_the_student_to_the_teacher_and_reset_its_optimizer():
    first, *rest = Progressive.stages(Progressive.Config(), total_steps=8)
    assert not first.copy
    assert not first.reset
    for stage in rest:
        assert (stage.copy, stage.reset) == ({"stage_teacher": "student"}, ("student",))
        assert stage.restart_learning_rate


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"student_steps": [32, 12]}, r"student_steps = \[32, 12\]: 12 does not divide 32"),
        ({"student_steps": [8, 4, 4]}, "4 does not divide 4"),
        ({"student_steps": [4, 8]}, "8 does not divide 4"),
        ({"teacher_steps": 100}, r"teacher_steps and student_steps = \[100, 32, .*\]: 32 does not divide 100"),
        ({"teacher_steps": 32}, "32 does not divide 32"),
        ({"regression_weight": [1, 0]}, "regression_weight has 2 numbers for the 4 stages"),
        ({"regression_weight": [1, 1, 1, 0]}, "both 0 in the stage of 4 steps"),
        ({"adversarial_weight": [-1]}, "greater than or equal to 0"),
        ({"student_steps": []}, "at least 1"),
        ({"student_steps": [0]}, "greater than or equal to 1"),
        ({"stage_shares": [1, 2]}, "2 numbers for the 4 stages"),
        ({"stage_shares": [1, 2, 0, 1]}, "greater than 0"),
        ({"w_min": 7.0}, "w_min = 7.0 is above w_max = 6.0"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        Progressive.Config(**settings)


def test_fewer_steps_than_stages_are_refused():
    with pytest.raises(UserError, match="max_train_steps = 3 .* 4 .* without a step"):
        Progressive.stages(Progressive.Config(), total_steps=3)
    with pytest.raises(UserError, match="without a step"):
        Progressive.stages(Progressive.Config(stage_shares=(1, 1, 1, 100)), total_steps=10)


def test_a_teacher_of_more_steps_than_timesteps_is_refused(folder):
    method = Progressive(Progressive.Config(student_steps=(600,)), MethodSetup("lora"))
    schedule = make(folder).context.schedule
    with pytest.raises(UserError, match="1200 steps do not fit a model of 1000 timesteps"):
        method.sampler(schedule)


def test_eps_at_zero_terminal_snr_and_short_runs_are_refused_before_weights_load(tmp_path):
    """Through the whole run: exit code 2, with the reason."""
    model = write_tiny_sdxl(tmp_path / "zero", zero_snr=True)
    for more, words in [
        ({"model": model}, "zero terminal SNR"),
        ({"max_train_steps": 1}, "without a step"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            execute(write_run(tmp_path, output="refused", **{**SMALL, **more}))
        assert caught.value.exit_code == 2


def test_the_samplers_guidance_lies_in_the_range_and_is_off_where_built_in():
    def guidance(model_type, asked, **config):
        method = Progressive(Progressive.Config(**config), MethodSetup(model_type))
        return method.sampler(schedule, guidance_scale=asked).guidance_scale

    from distill.core.testing.paths import TABLE as schedule

    assert [guidance("lora", asked) for asked in (None, 0.0)] == [0, 0]
    assert guidance("full", None) == 0, "one scale is built in"
    told = {"w_min": 2.0, "w_max": 8.0}
    assert [guidance("full", asked, **told) for asked in (None, 0.0, 1.0, 3.0, 9.0)] == [5, 5, 5, 3, 5]
    paper = {"w_min": 1.0, "w_max": 7.0, "guidance_convention": "paper"}
    assert guidance("full", None, **paper) == 5
