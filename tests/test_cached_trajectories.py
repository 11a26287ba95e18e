"""Consistency methods on trajectories that the teacher makes once: the same pairs, and no call of the teacher."""

import pytest
import torch
from distill.core.data.cache.teacher_trajectory import follow
from distill.core.diffusion import Prediction
from distill.core.diffusion.solvers import trailing_timesteps
from distill.core.errors import UserError
from distill.core.plugin_api.batch import Batch, Trajectories
from distill.core.plugin_api.context import Context
from distill.core.plugin_api.method import MethodSetup
from distill.core.plugin_api.solver_pairs import cached_pair
from distill.core.testing.gaussian import raw_output
from distill.core.testing.paths import PATHS
from distill.distill_methods.lcm import LCM
from distill.distill_methods.pcm import PCM
from distill.distill_methods.tcd import TCD
from support.sdxl_setup import make_batch
from support.small_run import execute, losses, write_run
from support.tiny_sdxl import write_tiny_sdxl
from support.trial import make_trial

METHODS = {"lcm": (LCM, {}), "tcd": (TCD, {}), "pcm": (PCM, {"adversarial_weight": 0.0, "num_phases": 2})}
NUM_STEPS = 4
GUIDANCE = 3.0


@pytest.mark.parametrize("path", PATHS)
def test_neighbours_on_a_trajectory_are_one_step_of_the_teacher_at_the_methods_times(path):
    kind, schedule = PATHS[path]
    num_steps, count = 20, 16

    def teacher(x, t):
        return Prediction(raw_output(kind, schedule, x, t, torch.full_like(x, 0.6)), x, t, schedule, kind)

    noise = torch.randn(count, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    timesteps, grid = trailing_timesteps(schedule, num_steps), schedule.grid(num_steps)
    made = follow(teacher, noise, timesteps, solver="ddim", keep=range(num_steps))
    trajectories = Trajectories(made.points, timesteps.times, made.data, {})
    halves = Trajectories(made.points[:, ::2], timesteps.times[::2], made.data, {})
    for i in range(num_steps):
        index = torch.full((count,), i)
        x_t, x_prev = cached_pair(trajectories, index, grid=grid, schedule=schedule)
        expected = teacher(x_t, grid.times[index]).ddim_step(grid.previous[index])
        torch.testing.assert_close(x_prev, expected, rtol=1e-9, atol=1e-9)
        # every second point of a cache with twice as many is the same
        again = cached_pair(trajectories, index[:1] // 2, grid=schedule.grid(num_steps // 2), schedule=schedule)
        wanted = cached_pair(halves, index[:1] // 2, grid=schedule.grid(num_steps // 2), schedule=schedule)
        assert all(torch.equal(ours[:1], theirs[:1]) for ours, theirs in zip(again, wanted, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("model") / "tiny", seed=0)


def watched(monkeypatch):
    """Roles, points and outputs of the calls of networks to come."""
    calls, predict = [], Context.predict

    def watching(self, role, x_t, t, cond, **settings):
        prediction = predict(self, role, x_t, t, cond, **settings)
        calls.append((role, x_t, t))
        return prediction

    monkeypatch.setattr(Context, "predict", watching)
    return calls


@pytest.mark.parametrize("model_type", ["lora", "full"])
@pytest.mark.parametrize("name", METHODS)
def test_the_loss_is_that_of_the_same_points_from_the_teacher_which_is_not_called(
    folder, monkeypatch, name, model_type
):
    """The points that a plain step takes are put onto trajectories: the cached step finds its loss, bit for bit."""
    found, settings = METHODS[name]
    common = {"num_ddim_timesteps": NUM_STEPS, **settings}
    plain = make_trial(folder, found, found.Config(w_min=GUIDANCE, w_max=GUIDANCE, **common), model_type)
    batch, calls = make_batch(plain.family), watched(monkeypatch)
    (update,) = plain.method.updates(plain.context.at(7, batch.positions), batch, 7)
    (_, both, _), (target, x_prev, _), (_, x_t, t) = calls
    assert torch.equal(both.chunk(2)[0], x_t), "the teacher's two halves and the student see one point"

    index = (t + 1) // (1000 // NUM_STEPS) - 1
    assert (index == 0).any(), "the step that ends at the data is among them"
    made = Trajectories(
        torch.zeros(len(batch), NUM_STEPS, *x_t.shape[1:], dtype=x_t.dtype),
        trailing_timesteps(plain.family.schedule, NUM_STEPS).times, torch.zeros_like(x_t), batch.cond,
    )  # fmt: skip
    for row, i in enumerate(index.tolist()):
        made.points[row, NUM_STEPS - 1 - i] = x_t[row]
        if i > 0:
            made.points[row, NUM_STEPS - i] = x_prev[row]
        else:  # the clean end of the line through both
            times = torch.tensor([t[row].item(), 0])
            alpha, sigma = plain.family.schedule.alpha(times), plain.family.schedule.sigma(times)
            ratio = sigma[1] / sigma[0]
            made.data[row] = (x_prev[row] - ratio * x_t[row]) / (alpha[1] - ratio * alpha[0])

    cached = make_trial(folder, found, found.Config(cached_trajectories=True, **common), model_type)
    prompts = Batch(None, {}, batch.keys, batch.positions, latent_shape=batch.latent_shape, trajectories=made)
    calls.clear()
    (ours,) = cached.method.updates(cached.context.at(7, batch.positions), prompts, 7)
    assert [role for role, _, _ in calls] == [target, "student"]
    torch.testing.assert_close(ours.per_sample, update.per_sample, rtol=1e-9, atol=1e-12)


def test_what_it_needs_is_trajectories_instead_of_images_and_a_guidance_input():
    for found, settings in METHODS.values():
        config = found.Config(cached_trajectories=True, **settings)
        needs = found.requires(config, MethodSetup("full"))
        assert (needs.images, needs.trajectory_points) == (False, config.num_ddim_timesteps)
        assert not needs.guidance_embedding
        assert not any(role.guidance_embedding for role in found.roles(config, MethodSetup("full")))


def test_trajectories_that_do_not_visit_the_grid_or_have_prompts_throughout_are_refused():
    method = LCM(LCM.Config(num_ddim_timesteps=30, cached_trajectories=True), MethodSetup("lora"))
    remedy = r"ends at timestep 989, and trajectories of 30 points begin at 999.*divisor of 1000"
    with pytest.raises(UserError, match=f"(?s){remedy}"):
        method.sampler(PATHS["eps"][1])
    method.sampler(PATHS["flow-shift"][1])
    for settings in ({"cfg_free": True}, {"empty_prompt_share": 0.1}):
        with pytest.raises(ValueError, match="cached_trajectories are those of prompts at one guidance scale"):
            PCM.Config(cached_trajectories=True, **settings)


def test_a_run_makes_its_trajectories_and_encodes_no_image(tmp_path):
    lcm = {"num_ddim_timesteps": 2, "num_inference_steps": 1, "cached_trajectories": True}
    config = write_run(
        tmp_path, distillation_config={"lcm": lcm}, max_train_steps=4, validation_step_interval=0,
        checkpoint_step_interval=0, report_to="none",
        more_data=[{"id": "pairs", "dataset_type": "distillation_cache", "num_inference_steps": 2}],
    )  # fmt: skip
    _, lines = execute(config)
    said = "\n".join(lines)
    assert "13 captions encoded, 13 trajectories made" in said
    assert "lcm: learns at points of the teacher's own trajectories" in said
    assert "w_min and w_max have no effect" in said
    assert all(loss > 0 for _, loss, _ in losses(tmp_path / "out"))
