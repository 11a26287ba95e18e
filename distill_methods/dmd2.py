r"""Improved distribution matching distillation: match the distribution of the student's samples to the teacher's.

A second network, the fake score, learns to denoise the student's samples. Where it and the teacher disagree, the
student's distribution differs from the teacher's, and the difference is the direction to move each sample in. No image
is needed, and no trajectory of the teacher is followed.

One training step, with the student's times t_1 > ... > t_N (999, 749, 499, 249 for N = 4):

    backward simulation: n ~ U{1 .. N}, the same for all samples and processes; x from pure noise by n calls of the
    student at t_1 .. t_n, renoised between them; the gradient runs through the last call alone

    student, every `fake_updates_per_student_update`-th step (5):
        t ~ U[0.02 T, 0.98 T],   x_t = alpha_t x + sigma_t eps
        grad = (D_fake(x_t) - D_real(x_t)) / mean |x - D_real(x_t)|       D_real guided by g = 8, D_fake not guided
        L    = 1/2 mean (x - sg(x - grad))^2  +  gan_weight softplus(-l(x_t'))

    fake score, every step:    t ~ U[0, T),   L = mean |network(x_t) - target|^2 in the network's own parametrisation
                                              + discriminator_weight (the heads' loss)
    heads, every step:         L = discriminator_weight (softplus(-l(real_t)) + softplus(l(x_t)))

with logits l of heads on the middle of the fake-score network; images (real) are needed for these alone.
"5:1" counts optimizer steps of the run: each is one of the fake score, and the last of five is one of the student too,
on the same samples, made before it.

Three variations:

    divergence   grad times h(r) / mean h, r = exp(l) the density ratio at x_t (f-distill, arXiv 2502.15681)
    guidance     decoupled: (D_fake - D_c)(t) - (g - 1)(D_c - D_u)(t'), t ~ U[0.02 T, 0.98 T] as before and t' between
                 0.02 T and the time of the student's last call (arXiv 2511.22677, Decoupled-Hybrid)
    loss sid     (D_real - D_fake)((D_real - x) - a (D_real - D_fake)) with gradients through both (arXiv 2404.04057)

The means of h are running means over earlier steps (the papers' code takes the batch's), so that neither micro-batches
nor processes matter; the bound of r is a choice made here.

References:
    Yin et al., Improved Distribution Matching Distillation for Fast Image Synthesis, arXiv 2405.14867.
    Yin et al., One-step Diffusion with Distribution Matching Distillation, arXiv 2311.18828.
    Xu et al., One-step Diffusion Models with f-Divergence Distribution Matching, arXiv 2502.15681.
    Liu et al., Decoupled DMD: CFG Augmentation as the Spear, Distribution Matching as the Shield, arXiv 2511.22677.
    Zhou et al., Score identity Distillation, arXiv 2404.04057.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..core.diffusion import Prediction, Schedule, append_dims
from ..core.diffusion.adversarial import HeadKind, HeadLevels, discriminator_loss, generator_loss, level_mean
from ..core.diffusion.distribution_matching import (
    Divergence,
    DivergenceWeights,
    augmentation_gradient,
    denoising_target,
    distribution_matching_gradient,
    distribution_matching_loss,
    sid_loss,
    time_at,
)
from ..core.diffusion.multistep import multistep_sampler, one_step_timestep
from ..core.diffusion.regression import distance
from ..core.diffusion.sampler import Sampler
from ..core.diffusion.solvers import trailing_timesteps
from ..core.diffusion.weights import Weight, ever_positive, weight_at
from ..core.plugin_api.batch import Batch
from ..core.plugin_api.context import Context
from ..core.plugin_api.discriminator import DiscriminatorSettings
from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.method import Method, MethodSetup, ModelType, Requirements, Role, Update
from ..core.plugin_api.recommended import read_recommended

CLIP = 10.0
"""Norm that the authors' code clips the gradients of fake score and heads at."""


class DMD2(Method):
    """Distribution matching: 4 steps (or 1) from prompts alone, with a second network that tracks the student."""

    name = "dmd2"
    guidance_keys = ("guidance_scale",)
    recommended = read_recommended(__file__, name)

    class Config(DiscriminatorSettings):
        """Settings of distribution matching distillation."""

        num_inference_steps: int = Field(4, ge=1, le=50)
        """N, the number of student calls per image, in training and in use."""
        one_step_time: int | None = Field(None, ge=1)
        """Timestep (of the model's training timesteps) that a one-step student is called at; None: 399, on a flow 1."""
        guidance_scale: float = Field(8.0, ge=1, le=100)
        """g of the teacher, uncond + g (cond - uncond); 1 is no guidance. The fake score is never guided."""
        guidance: Literal["coupled", "decoupled"] = "coupled"
        """decoupled: guidance is computed at times of its own, below that of the student's last call."""
        fake_updates_per_student_update: int = Field(5, ge=1, le=1000)
        """Number of optimizer steps per step of the student; the fake score takes all of them."""
        min_time: float = Field(0.02, ge=0, lt=1)
        """Lowest noise level at which the denoisers are compared, as a share of the training timesteps."""
        max_time: float = Field(0.98, gt=0, le=1)
        """Highest noise level at which the denoisers are compared, as a share of the training timesteps."""
        normalise: bool = True
        """Whether the gap is divided by the sample's distance to its denoised version, mean |x - D_real|."""
        loss: Literal["dm", "sid"] = "dm"
        """dm: the gap is used as the gradient; sid: a loss differentiated through both denoisers (costs memory)."""
        sid_alpha: float = Field(1.0, ge=0, le=2)
        """a of the loss sid; 1 and 1.2 are the paper's."""
        divergence: Divergence = "reverse_kl"
        """The divergence to minimise; all but reverse_kl weigh samples by the heads' density ratio and need images."""
        max_density_ratio: float = Field(10.0, gt=1, le=1e4)
        """The heads' density ratio is clamped between 1 / max_density_ratio and max_density_ratio."""
        gan_weight: Weight = 0.0
        """Weight of the adversarial term of the student; above 0 it needs images. The paper's is 5e-3."""
        discriminator_weight: Weight = 1e-2
        """Weight of the heads' loss, in their own update and in the fake score's."""
        adapt_features: bool = True
        """Whether the fake score, whose features the heads read, also learns to tell images from samples."""
        heads: HeadKind = "strided"
        head_levels: HeadLevels = "middle"
        fake_score: ModelType | None = None
        """Kind of the fake score: full, all weights of a copy (the paper's, also beside a LoRA), or lora, an adapter;
        null: as the student. A full one holds one more network in memory."""
        fake_score_learning_rate: float | None = Field(None, gt=0, le=1)
        """Learning rate of the fake score; null: the run's."""
        discriminator_learning_rate: float | None = Field(None, gt=0, le=1)
        """Learning rate of the heads; null: the run's."""

        @property
        def discriminates(self) -> bool:
            """True if there are heads, which need images."""
            return ever_positive(self.gan_weight) or self.divergence != "reverse_kl"

        @model_validator(mode="after")
        def _consistent(self) -> DMD2.Config:
            if self.min_time >= self.max_time:
                raise ValueError(f"min_time = {self.min_time} is not below max_time = {self.max_time}: lower min_time")
            for key, plain in (("divergence", "reverse_kl"), ("guidance", "coupled")):
                if self.loss == "sid" and getattr(self, key) != plain:
                    raise ValueError(f"{key} = {getattr(self, key)} is not for loss sid: set {key} to {plain}")
            if self.discriminates and not ever_positive(self.discriminator_weight):
                raise ValueError("discriminator_weight = 0 leaves the heads untrained: set it above 0 (1e-2)")
            if self.one_step_time is not None and self.num_inference_steps > 1:
                raise ValueError(
                    f"one_step_time = {self.one_step_time} is for num_inference_steps = 1, which is "
                    f"{self.num_inference_steps}: leave one_step_time out"
                )
            return self

    def __init__(self, config: Any, setup: MethodSetup) -> None:
        super().__init__(config, setup)
        self._weights = DivergenceWeights(config.divergence, max_ratio=config.max_density_ratio)

    @classmethod
    def example(cls) -> Mapping[str, Any]:
        """Return settings that reach a student quickly."""
        return {"num_inference_steps": 1, "guidance_scale": 2.0, "fake_updates_per_student_update": 2}

    @classmethod
    def roles(cls, config: Any, setup: MethodSetup) -> Sequence[Role]:
        """Return real score, student, fake score and heads: adapters on the base, or copies of it, or one of each."""
        rate = config.fake_score_learning_rate
        roles = [
            Role("teacher"),
            Role("student", trains=setup.model_type),
            Role("fake_score", config.fake_score or setup.model_type, learning_rate=rate, max_grad_norm=CLIP),
        ]
        if config.discriminates:
            roles.append(config.discriminator(max_grad_norm=CLIP))
        return roles

    @classmethod
    def requires(cls, config: Any, setup: MethodSetup) -> Requirements:
        """Require a finite x_0 at all times; images and features where there are heads."""
        if config.guidance == "decoupled":
            setup.require_unguided("distillation_config.dmd2.guidance = 'decoupled'", "set it to coupled")
        return Requirements(images=config.discriminates, features=config.discriminates, finite_snr=True)

    def updates(self, context: Context, batch: Batch, step: int) -> Iterator[Update]:
        """Yield the updates of the student (on its turn), of the fake score and of the heads, on the same samples."""
        turn = (step + 1) % self.config.fake_updates_per_student_update == 0
        sample = self._simulate(context, batch, with_gradient=turn)
        if turn:
            yield self._student(context, batch, sample)
            self._weights.update(context.average)  # of all micro-batches by now
        x = sample.x.detach()
        del sample
        if not self.config.discriminates:
            yield self._fake_score(context, batch, x, features=())
            return
        features = self._features(context, batch, x)
        yield self._fake_score(context, batch, x, features=features)
        yield self._discriminator(context, [level.detach() for level in features])

    # -- the student ------------------------------------------------------------------------------------------------

    def _simulate(self, context: Context, batch: Batch, *, with_gradient: bool) -> _Sample:
        """Return samples of the student as it is used at inference, stopped after a random number of its calls."""
        count = self.config.num_inference_steps
        calls = 1 + context.rng.shared_integer("calls", count)
        x, times = _noise(context, batch, "start"), self._times(context.schedule, count)[:calls]
        dtype = torch.float64 if context.schedule.clean_at_zero else torch.int64
        each = [torch.full((len(batch),), time, dtype=dtype, device=context.device) for time in times]
        with torch.set_grad_enabled(with_gradient):
            last = context.rollout("student", each, x, batch.cond, name="simulation")
            return _Sample(_x0(last).to(x.dtype), calls=calls, share=1 - (calls - 1) / count)

    def _student(self, context: Context, batch: Batch, sample: _Sample) -> Update:
        """Return the student's update, which moves samples to where the teacher's density is above the fake score's."""
        losses, t = (self._sid if self.config.loss == "sid" else self._distribution_matching)(context, batch, sample)
        calls = torch.full((), float(sample.calls), device=losses.device)
        metrics = {"matching": losses.detach().mean(), "simulated_calls": calls}
        weight = weight_at(self.config.gan_weight, context.step)
        if weight > 0:
            adversarial = self._adversarial(context, batch, sample.x)
            metrics["adversarial"] = adversarial.detach().mean()
            losses = losses + weight * adversarial
        return Update("student", losses.mean(), metrics, per_sample=losses.detach(), t=t)

    def _distribution_matching(self, context: Context, batch: Batch, sample: _Sample) -> tuple[Tensor, Tensor]:
        """Return losses (B,) whose gradient is the gap of the denoised samples, and the times of comparison (B,)."""
        config, x = self.config, sample.x.detach()
        decoupled = config.guidance == "decoupled"
        share = context.rng.uniform("matching/time", config.min_time, config.max_time)
        with torch.no_grad():
            x_t, t = _noised(context, batch, x, share, "matching")
            fake = _x0(context.predict("fake_score", x_t, t, batch.cond))
            real = self._real(context, batch, x_t, t, scale=1.0 if decoupled else config.guidance_scale)
            gradient = distribution_matching_gradient(x, real, fake, normalise=config.normalise)
            if config.divergence != "reverse_kl":
                gradient = gradient * append_dims(self._ratio_weights(context, batch, x_t, t, share), gradient)
            if decoupled:
                gradient = gradient + self._augmentation(context, batch, x, highest=sample.share)
        return distribution_matching_loss(sample.x, gradient), t

    def _real(self, context: Context, batch: Batch, x_t: Tensor, t: Tensor, *, scale: float) -> Tensor:
        """Return D_real at `x_t`, guided, shape (B, ...)."""
        if self.setup.guided_by_input:  # the scale is told, and there is no call without guidance to go away from
            return _x0(context.predict_guided(x_t, t, batch.cond, torch.full_like(t, scale, dtype=x_t.dtype)))
        if scale == 1:
            return _x0(context.predict("teacher", x_t, t, batch.cond))
        cond, uncond = (_exact(half) for half in context.predict_cond_uncond("teacher", x_t, t, batch.cond))
        return context.with_guidance(cond, uncond, torch.full_like(t, scale, dtype=torch.float64)).x0

    def _augmentation(self, context: Context, batch: Batch, x: Tensor, *, highest: float) -> Tensor:
        """Return the guidance augmentation (B, ...) at noise below that of the student's last call.

        Above that noise the sample's content is decided already.
        """
        config = self.config
        high = max(config.min_time, min(config.max_time, highest))
        share = context.rng.uniform("augmentation/time", config.min_time, high)
        x_t, t = _noised(context, batch, x, share, "augmentation")
        cond, uncond = (_x0(half) for half in context.predict_cond_uncond("teacher", x_t, t, batch.cond))
        return augmentation_gradient(x, cond, uncond, scale=config.guidance_scale, normalise=config.normalise)

    def _ratio_weights(self, context: Context, batch: Batch, x_t: Tensor, t: Tensor, share: Tensor) -> Tensor:
        """Return h(r) / mean h of the samples, shape (B,), with r from the heads' logits at `x_t`."""
        features = context.features("fake_score", x_t, t, batch.cond)
        return self._weights(level_mean(context.logits("discriminator", features)), share)

    def _sid(self, context: Context, batch: Batch, sample: _Sample) -> tuple[Tensor, Tensor]:
        """Return the loss of score identity distillation (B,), through both denoisers, and its times (B,)."""
        config, x = self.config, sample.x
        share = context.rng.uniform("matching/time", config.min_time, config.max_time)
        x_t, t = _noised(context, batch, x, share, "matching")
        fake = _x0(context.predict("fake_score", x_t, t, batch.cond))
        real = self._real(context, batch, x_t, t, scale=config.guidance_scale)
        return sid_loss(x, real, fake, alpha=config.sid_alpha, normalise=config.normalise), t

    def _adversarial(self, context: Context, batch: Batch, x: Tensor) -> Tensor:
        """Return the generator loss (B,) of the samples `x` (B, ...)."""
        x_t, t = _noised(context, batch, x, context.rng.uniform("adversarial/time"), "adversarial")
        features = context.features("fake_score", x_t, t, batch.cond)
        return generator_loss(context.logits("discriminator", features), kind="softplus")

    # -- what follows the student -----------------------------------------------------------------------------------

    def _fake_score(self, context: Context, batch: Batch, x: Tensor, *, features: Sequence[Tensor]) -> Update:
        """Return the fake score's update: denoise the samples `x`, and tell them from images."""
        eps, t = _noise(context, batch, "fake"), time_at(context.schedule, context.rng.uniform("fake/time"))
        prediction = context.predict("fake_score", context.schedule.add_noise(x, eps, t), t, batch.cond)
        target = denoising_target(prediction.prediction_type, x, eps, t, context.schedule)
        losses = distance(prediction.output.to(target.dtype), target, loss_type="l2", huber_c=0.0)
        metrics = {"fake_score/denoising": losses.detach().mean()}
        if features and self.config.adapt_features:
            apart = self._heads_loss(context, features)[0]
            losses = losses + weight_at(self.config.discriminator_weight, context.step) * apart
        return Update("fake_score", losses.mean(), metrics, per_sample=losses.detach(), t=t)

    def _features(self, context: Context, batch: Batch, x: Tensor) -> list[Tensor]:
        """Return features of noised images, then of noised samples, each (2 B, C_k, h_k, w_k)."""
        assert batch.latents is not None
        rng, images = context.rng, batch.latents
        real, t_real = _noised(context, batch, images, rng.uniform("real/time"), "real")
        fake, t_fake = _noised(context, batch, x, rng.uniform("sample/time"), "sample")
        cond = {name: torch.cat([value, value]) for name, value in batch.cond.items()}
        with torch.set_grad_enabled(self.config.adapt_features):
            return context.features("fake_score", torch.cat([real, fake]), torch.cat([t_real, t_fake]), cond)

    def _heads_loss(self, context: Context, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the heads' loss (B,), and their logits of images and of samples."""
        both = [level.chunk(2) for level in context.logits("discriminator", features)]
        real, fake = [level[0] for level in both], [level[1] for level in both]
        return discriminator_loss(real, fake, kind="softplus"), real, fake

    def _discriminator(self, context: Context, features: Sequence[Tensor]) -> Update:
        """Return the heads' update: tell images from samples by the given features."""
        losses, real, fake = self._heads_loss(context, features)
        penalty, metrics = self.config.r1_term(context, [level.chunk(2)[0] for level in features])
        for name, logits in (("real", real), ("fake", fake)):
            metrics[f"discriminator/{name}"] = level_mean(level.detach().sigmoid() for level in logits).mean()
        losses = weight_at(self.config.discriminator_weight, context.step) * (losses + penalty)
        return Update("discriminator", losses.mean(), metrics, per_sample=losses.detach())

    # -- the run ----------------------------------------------------------------------------------------------------

    def _times(self, schedule: Schedule, num_steps: int) -> list[float]:
        """Return the falling times of `num_steps` calls: evenly spaced, or the timestep of a one-step student."""
        if num_steps > 1 or self.config.num_inference_steps > 1:
            return trailing_timesteps(schedule, num_steps).times.tolist()
        return [one_step_timestep(schedule, self.config.one_step_time, key="distillation_config.dmd2.one_step_time")]

    def sampler(
        self, schedule: Schedule, *, num_inference_steps: int | None = None, guidance_scale: float | None = None
    ) -> Sampler:
        """Return LCM's multistep sampling at the times of training, guidance off: it is built in.

        Another number of steps than that of training is spaced by the same rule; the student was not trained at those
        times.
        """
        steps = num_inference_steps or self.config.num_inference_steps
        return multistep_sampler(schedule, self._times(schedule, steps), guidance_scale or 0.0)

    def notices(self) -> list[str]:
        """Return what counts as a step, and what a one-step student lacks."""
        config, every = self.config, self.config.fake_updates_per_student_update
        lines = [f"dmd2: every step trains the fake score, one in {every} the student too (max_train_steps / {every})"]
        if config.num_inference_steps == 1:
            lines.append("dmd2: the paper warms a student of one step up on the teacher's own samples; init_lora can")
        if self.setup.has_images and not config.discriminates:
            lines.append("dmd2: gan_weight = 0, so that nothing learns from the images; the paper's gan_weight is 5e-3")
        if config.loss == "sid" and config.guidance_scale > 5:
            lines.append(f"dmd2: guidance_scale = {config.guidance_scale:g} is high for loss sid; 1 to 5 is usual")
        return lines

    def state_dict(self) -> dict[str, Tensor]:
        """Return the running means of the divergence's weights."""
        return self._weights.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._weights.load_state_dict(state)


@dataclass(frozen=True)
class _Sample:
    """Samples of the student.

    Attributes:
        x: Samples (B, ...).
        calls: Number of student calls that made them.
        share: Noise level of the last call's input, as a share of the training timesteps; 1 for pure noise.
    """

    x: Tensor
    calls: int
    share: float


def _exact(prediction: Prediction) -> Prediction:
    """Return the prediction in float64: eps is divided by alpha_999 = 0.068, and gaps are small differences."""
    return replace(prediction, x_t=prediction.x_t.double())


def _x0(prediction: Prediction) -> Tensor:
    return _exact(prediction).x0


def _noise(context: Context, batch: Batch, name: str) -> Tensor:
    """Return noise for the latents (B, C, h, w), in at least fp32."""
    shape = batch.latent_shape if batch.latents is None else batch.latents.shape[1:]
    given = [*batch.cond.values()] if batch.latents is None else [batch.latents]
    wide = any(value.dtype == torch.float64 for value in given)
    return context.rng.randn(f"{name}/noise", shape).to(torch.float64 if wide else torch.float32)


def _noised(context: Context, batch: Batch, x: Tensor, share: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return `x` (B, ...) with noise, and the times (B,) of that noise."""
    t = time_at(context.schedule, share)
    return context.schedule.add_noise(x, _noise(context, batch, name), t), t


@hookimpl
def register_methods() -> list[type[Method]]:
    """Return the method of this file."""
    return [DMD2]
