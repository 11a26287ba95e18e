"""An LCM student trained by the engine reaches the fixed point of its discretisation, whatever its network predicts.

Data N(m, q^2): the guided teacher is Gaussian too, with mean g m, so every DDIM step is known, and the fixed point at
grid index i is the product of the DDIM maps i, i - 1, ..., 0 (reference: consistency models, arXiv 2303.01469).
"""

import pytest
import torch
from distill.core.diffusion import DDPMSchedule, FlowSchedule, Prediction
from distill.core.engine.health import HealthMonitor
from distill.core.engine.loop import Loop
from distill.core.engine.networks import Networks
from distill.core.engine.optimize import RoleOptimizer
from distill.core.plugin_api.context import Context, Runtime
from distill.core.plugin_api.method import MethodSetup, Update
from distill.core.testing.gaussian import GaussianFamily, affine_of, gaussian_batch
from distill.core.utils.seeds import RngStreams
from distill.distill_methods.lcm import LCM, consistency_function, distance

N, SCALE, MEAN = 8, 2.0, 0.6
SDXL = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class TeacherTarget(LCM):
    """The classic mistake: the target comes from the teacher."""

    def updates(self, context, batch, step):
        grid = context.schedule.grid(N)
        i = context.rng.integers("index", N)
        t, t_prev = grid.times[i], grid.previous[i]
        x_t = context.schedule.add_noise(batch.latents, context.rng.randn("noise", (1,)).double(), t)
        scale = torch.full((len(batch),), SCALE, dtype=torch.float64)
        with torch.no_grad():
            x_prev = context.predict_guided(x_t, t, batch.cond, scale).ddim_step(t_prev)
            target = self._f(context.predict_guided(x_prev, t_prev, batch.cond, scale))
        output = self._f(context.predict("student", x_t, t, batch.cond))
        yield Update("student", distance(output, target, loss_type="l2", huber_c=1e-3).mean())


def make(schedule, kind):
    grid = schedule.grid(N)
    return GaussianFamily(schedule, kind, torch.cat([grid.previous[:1], grid.times]))


def train(method_class, schedule, kind, *, steps=400, lr=5e-2):
    family = make(schedule, kind)
    config = LCM.Config(num_ddim_timesteps=N, w_min=SCALE, w_max=SCALE)
    setup = MethodSetup("full")
    method = method_class(config, setup)
    networks = Networks(family, method.roles(config, setup), lora=None, seed=0, parameter_dtype=torch.float64)
    teacher_before = {k: v.clone() for k, v in networks.base.state_dict().items()}
    context = Context(Runtime(family, networks, seed=0, device=torch.device("cpu")))
    parameters = networks.parameters("student")
    adam = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99))
    decay = lambda s: 0.5 * (1 + torch.cos(torch.tensor(torch.pi * s / steps)).item())  # noqa: E731
    optimizer = RoleOptimizer(adam, parameters, learning_rate=lr, schedule=decay, max_grad_norm=0)
    loop = Loop(method, context, networks, {"student": optimizer}, health=HealthMonitor(1))
    for step in range(steps):
        loop.step(step, [gaussian_batch(step, 128, mean=MEAN)])
    for key, value in networks.base.state_dict().items():
        assert torch.equal(value, teacher_before[key]), "the teacher has changed"
    return method, family, networks


def fixed_point(schedule, x, index):
    """The product of the guided teacher's DDIM maps from grid index `index` down to t' = 0; x of shape (B, 1)."""
    grid = schedule.grid(N)
    for j in range(index, -1, -1):
        t = grid.times[j].expand(len(x))
        a, b = affine_of("sample", schedule, t[:1])
        x = Prediction(a * x + b * SCALE * MEAN, x, t, schedule, "sample").ddim_step(grid.previous[j].expand(len(x)))
    return x


def sampling_error(method, family, networks, schedule, num_steps):
    """RMS difference of few-step samples (LCM's multistep sampling, same noise) to those of the fixed point."""
    rng = RngStreams(1, 0, tuple(range(512)))
    grid = schedule.grid(N)
    indices = [N - 1 - j * N // num_steps for j in range(num_steps)]
    noise = rng.randn("start", (1,)).double()
    ours = exact = schedule.sigma(grid.times[-1:]) * noise
    cond = {"mean": torch.full_like(noise, MEAN)}
    for j, index in enumerate(indices):
        t = grid.times[index].expand(len(noise))
        with torch.no_grad(), networks.use(method.result_role()) as network:
            raw = family.predict(network, ours, schedule.network_time(t), cond)
        ours = consistency_function(
            Prediction(raw, ours, t, schedule, family.prediction_type), timestep_scaling_factor=10.0
        )
        exact = fixed_point(schedule, exact, index)
        if j + 1 < num_steps:
            fresh = rng.randn(f"again{j}", (1,)).double()
            following = grid.times[indices[j + 1]].expand(len(noise))
            ours, exact = (schedule.add_noise(x, fresh, following) for x in (ours, exact))
    return (ours - exact).square().mean().sqrt().item()


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [
        ("epsilon", DDPMSchedule.from_config(SDXL)),
        ("v_prediction", DDPMSchedule.from_config(SDXL)),
        ("v_prediction", DDPMSchedule.from_config({**SDXL, "rescale_betas_zero_snr": True})),
        ("sample", DDPMSchedule.from_config(SDXL)),
        ("flow", FlowSchedule(shift=1.0)),
        ("flow", FlowSchedule(shift=3.0)),
    ],
    ids=["eps", "v", "v-zero-snr", "x0", "flow", "flow-shift"],
)
def test_converges_to_the_fixed_point(kind, schedule):
    right, wrong = (train(method, schedule, kind) for method in (LCM, TeacherTarget))
    for num_steps in (1, 2, 4, 8):
        error = sampling_error(*right, schedule, num_steps)
        wrong_error = sampling_error(*wrong, schedule, num_steps)
        print(f"{kind} steps={num_steps}: right {error:.2e} wrong {wrong_error:.2e}")
        assert error <= 0.1 * wrong_error, (num_steps, error, wrong_error)


@pytest.mark.parametrize("schedule", [DDPMSchedule.from_config(SDXL), FlowSchedule(shift=3.0)], ids=["ddpm", "flow"])
def test_the_parametrisation_leaves_the_loss_unchanged(schedule):
    losses = []
    for kind in ("epsilon", "v_prediction", "sample", "flow"):
        family = make(schedule, kind)
        config = LCM.Config(num_ddim_timesteps=N, w_min=1.0, w_max=5.0)
        method = LCM(config, MethodSetup("full"))
        networks = Networks(
            family, method.roles(config, method.setup), lora=None, seed=0, parameter_dtype=torch.float64
        )
        context = Context(Runtime(family, networks, seed=3, device=torch.device("cpu")), positions=range(256))
        if schedule.zero_terminal_snr and kind == "epsilon":
            continue  # x0 = (x - sigma eps) / 0 at the noisiest time; refused by the method's requirements
        (update,) = method.updates(context, gaussian_batch(0, 256, mean=MEAN), 0)
        losses.append(update.loss.item())
    assert max(losses) - min(losses) <= 1e-9 * max(losses)
