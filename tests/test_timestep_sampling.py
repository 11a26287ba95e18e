"""Times drawn by the loss seen: the paper's probabilities, an unchanged expectation, and the same draws however a step
is divided and wherever a run is stopped."""

import shutil

import pytest
import torch
from distill.core.diffusion.importance import HISTORY, UNIFORM_SHARE, LossHistory, SeenLosses, sums_by_bin
from distill.core.errors import ConfigError
from distill.distill_methods.recipe import WeightedUpdate, joint
from support.sdxl_setup import make_batch, make_loop, make_setup, split
from support.small_run import execute, losses, write_run
from support.tiny_sdxl import write_tiny_sdxl

GRID = 50


def level(b: int) -> float:
    """Root mean square of the losses of a bin."""
    return 1.0 + b % 7


def filled(num_steps: int) -> LossHistory:
    """A history of ten steps, whose mean squares vary around those of each bin's level."""
    history = LossHistory(num_steps)
    for k in range(HISTORY):
        sums = torch.tensor([3 * level(b) ** 2 * (0.5 + k / (HISTORY - 1)) for b in range(history.num_bins)])
        history.add(sums, torch.full((history.num_bins,), 3.0))
    return history


def papers(num_steps: int) -> list[float]:
    """Probability of each step of the grid, written out."""
    bins = min(20, num_steps)
    of_step = [level(i * bins // num_steps) for i in range(num_steps)]
    return [(1 - UNIFORM_SHARE) * each / sum(of_step) + UNIFORM_SHARE / num_steps for each in of_step]


@pytest.mark.parametrize("num_steps", [1, 7, 20, GRID, 1000])
def test_steps_are_drawn_as_often_as_the_paper_says_and_the_expected_loss_stays(num_steps):
    shares = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    draw = filled(num_steps).draw(shares)
    found = draw.index.bincount(minlength=num_steps) / len(shares)
    expected = torch.tensor(papers(num_steps))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(draw.importance, (1 / (num_steps * expected))[draw.index], rtol=1e-5, atol=0)
    loss_of_step = torch.linspace(0.1, 9.0, num_steps, dtype=torch.float64)
    assert draw.mean(loss_of_step[draw.index]).item() == pytest.approx(loss_of_step.mean().item(), rel=2e-3)


def test_draws_are_uniform_until_every_bin_has_ten_losses_and_the_oldest_are_forgotten():
    history = LossHistory(GRID)
    uniform = history.sizes.double() / GRID
    for _ in range(HISTORY - 1):
        history.add(torch.full((20,), 4.0), torch.ones(20))
    one_bin = torch.zeros(20)
    one_bin[3] = 1.0
    history.add(9.0 * one_bin, one_bin)
    torch.testing.assert_close(history.probabilities(), uniform, rtol=1e-12, atol=0)
    assert history.draw(torch.tensor([0.0, 0.999999999999])).index.tolist() == [0, GRID - 1]
    torch.testing.assert_close(history.draw(torch.rand(9).double()).importance, torch.ones(9), rtol=1e-6, atol=0)

    history.add(torch.full((20,), 4.0), torch.ones(20))
    torch.testing.assert_close(history.recent[3].mean(), torch.tensor((8 * 4 + 9 + 4) / 10.0))
    history.add(torch.full((20,), torch.nan), torch.ones(20))
    assert history.recent.isfinite().all()
    assert history.num_seen.tolist() == [10 if b != 3 else 11 for b in range(20)], "a loss that is NaN is not seen"


def test_the_average_over_processes_of_sums_is_the_step_of_one_process():
    history, g = LossHistory(GRID), torch.Generator().manual_seed(0)
    seen, bins = torch.rand(8, generator=g, dtype=torch.float64), torch.randint(20, (8,), generator=g)
    whole = sums_by_bin([SeenLosses(history, bins, seen)], dtype=torch.float32)
    halves = [
        sums_by_bin([SeenLosses(history, bins[s], seen[s])], dtype=torch.float32) for s in (slice(3), slice(3, 8))
    ]
    history.add(*whole)
    divided = LossHistory(GRID)
    divided.add(*(torch.stack(halves).mean(0)))
    torch.testing.assert_close(divided.recent, history.recent, rtol=1e-6, atol=0)
    assert torch.equal(divided.num_seen, history.num_seen)


def test_no_draw_and_no_loss_waits_for_the_device():
    """Tensors of the meta device have no values: whatever asks for one fails."""
    history, device = filled(GRID), torch.device("meta")
    history.to(device)
    draw = history.draw(torch.rand(8, device=device, dtype=torch.float64))
    losses = torch.rand(8, device=device)
    assert draw.mean(losses).shape == ()
    history.add(*sums_by_bin(draw.seen(losses), dtype=torch.float32))
    assert (history.recent.device, draw.index.dtype, draw.index.shape) == (device, torch.int64, (8,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("model") / "tiny", seed=0)


def steps_of(folder, parts, *, count=3):
    """(history, losses, weights) after some steps that go by losses seen before."""
    family, method, networks, context = make_setup(folder, timestep_sampling="loss")
    method.load_state_dict(filled(GRID).state_dict())
    loop = make_loop(method, networks, context)
    found = [loop.step(step, split(make_batch(family, seed=step), parts)).metrics["loss"] for step in range(count)]
    return method.state_dict(), torch.stack(found), torch.cat([p.flatten() for p in networks.parameters("student")])


def test_one_batch_and_four_micro_batches_draw_and_see_the_same(folder):
    whole, parts = steps_of(folder, 1), steps_of(folder, 4)
    assert torch.equal(whole[0]["num_seen"], parts[0]["num_seen"])
    assert whole[0]["num_seen"].sum() > 20 * HISTORY
    torch.testing.assert_close(whole[0]["recent"], parts[0]["recent"], rtol=1e-6, atol=0)
    torch.testing.assert_close(whole[1], parts[1], rtol=1e-9, atol=0)
    torch.testing.assert_close(whole[2], parts[2], rtol=1e-7, atol=1e-9)


def test_what_is_minimised_weighs_each_loss_by_its_importance(folder):
    family, method, _, context = make_setup(folder, timestep_sampling="loss")
    method.load_state_dict(filled(GRID).state_dict())
    batch = make_batch(family)
    (update,) = method.updates(context.at(7, batch.positions), batch, 7)
    index = (update.t + 1) // 20 - 1
    weights = torch.tensor([1 / (GRID * papers(GRID)[i]) for i in index.tolist()], dtype=torch.float64)
    assert update.loss.item() == pytest.approx((weights * update.per_sample).mean().item(), rel=1e-6)
    (seen,) = joint([WeightedUpdate("lcm", 0.5, update)]).seen
    assert torch.equal(seen.losses, update.per_sample), "a term of a recipe learns from its own losses"


def test_a_run_that_is_stopped_and_resumed_is_the_run_that_was_not(tmp_path):
    """Two steps of the grid and four samples: after about eleven steps all draws go by the losses."""
    short = {"validation_step_interval": 0, "checkpoint_step_interval": 13, "report_to": "none", "max_train_steps": 18}
    lcm = {"num_ddim_timesteps": 2, "num_inference_steps": 1, "loss_type": "l2"}

    def config(output, **more):
        return write_run(tmp_path, output=output, **short, distillation_config={"lcm": {**lcm, **more}})

    by_loss = config("loss", timestep_sampling="loss")
    execute(by_loss)
    whole = losses(tmp_path / "loss")
    shutil.rmtree(tmp_path / "loss" / "checkpoint-18")
    execute(by_loss)
    assert losses(tmp_path / "loss") == whole, "bit for bit"

    execute(config("uniform"))
    assert losses(tmp_path / "uniform")[:5] != whole[:5]
    with pytest.raises(ConfigError, match=r"timestep_sampling = 'uniform': cannot change when a run is resumed"):
        execute(config("loss"))
