r"""Reward feedback: the student's own images, decoded, are made to please a network that scores images.

The student is run as it is used, N calls at t_1 > ... > t_N with fresh noise between them, from pure noise; the
gradient runs through the last k of them and through the decoder:

    x = rollout(z),   z ~ N(0, I)
    L = - r(decode(x), prompt)          or, with a margin m,          L = max(m - r(decode(x), prompt), 0)

r is any network of images in [0, 1] (and prompts) whose output rises with what is wanted: ImageReward, PickScore, an
aesthetic predictor. ImageReward's ReFL is the second form with m = 2 and k = 1, the last call at a random late step of
a sampler of 40, and 1e-3 of it beside the denoising loss of its pretraining; Hyper-SD trains a LoRA of its own on
rewards.

Nothing in the loss holds the student to its teacher: a reward is easily pleased by images that nobody wants. So it is a
term of a recipe, beside a method that does hold it, or a short second training of a student that is there
(``init_lora``).

References:
    Xu et al., ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation (ReFL),
        arXiv 2304.05977.
    Ren et al., Hyper-SD: Trajectory Segmented Consistency Model for Efficient Image Synthesis, arXiv 2404.13686.
    Kirstain et al., Pick-a-Pic (PickScore), arXiv 2305.01569.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ..core.diffusion import Schedule
from ..core.diffusion.multistep import multistep_sampler, one_step_timestep
from ..core.diffusion.sampler import Sampler
from ..core.diffusion.solvers import trailing_timesteps
from ..core.errors import UserError
from ..core.plugin_api import pretrained
from ..core.plugin_api.auxiliary import StoredNetwork, TorchScriptNetwork, check_file
from ..core.plugin_api.batch import Batch
from ..core.plugin_api.context import Context
from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.method import Method, MethodSetup, Requirements, Role, Update
from ..core.settings.types import HubOrPath, LocalPath

PICKSCORE = "yuvalkirstain/PickScore_v1"
SIGNATURES = {"images": "network(images)", "embeddings": "network(images, embeddings)",
              "tokens": "network(images, input_ids, attention_mask)"}  # fmt: skip
"""What `reads` means for a TorchScript network."""


class Reward(Method):
    """Reward feedback: a student's own images please a network that scores them; a term beside other methods."""

    name = "reward"
    imitates_teacher: ClassVar[bool] = False

    class Config(BaseModel):
        """Settings of reward feedback."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

        network: LocalPath | None = None
        """TorchScript file of the reward; absent: `model`."""
        reads: Literal["images", "embeddings", "tokens"] = "images"
        """Arguments of `network`: images (B, 3, H, W) in [0, 1] alone; with the conditioning's embeddings, a dictionary
        of tensors (B, ...); or with the captions' token ids and mask (B, L) by `tokenizer`. It returns (B,)."""
        tokenizer: HubOrPath | None = None
        """Hub id or folder of the tokenizer of a network that reads tokens."""
        model: HubOrPath | None = None
        """Hub id or folder of a CLIP of transformers whose scaled cosine is the reward, with safetensors; absent, and
        without `network`: yuvalkirstain/PickScore_v1."""
        processor: HubOrPath | None = None
        """Hub id or folder of the processor of `model`, if it lies elsewhere; absent: the model's own."""
        label: str | None = Field(None, pattern=r"^[a-z0-9_]+$")
        """Name of the network in metrics; absent: the last part of its path or id."""
        margin: float | None = Field(None, ge=-1e6, le=1e6)
        """Reward above which an image is good enough: max(margin - reward, 0), 2 in ReFL with ImageReward; absent:
        minus the reward."""
        num_inference_steps: int = Field(4, ge=1, le=50)
        """N, the number of student calls per image, in training and in use."""
        one_step_time: int | None = Field(None, ge=1)
        """Timestep (of the model's training timesteps) that a one-step student is called at; None: 399, on a flow 1."""
        gradient_calls: int = Field(1, ge=1, le=50)
        """k, the number of calls, the last ones, that the gradient runs through; each needs the memory of one."""

        @property
        def source(self) -> StoredNetwork:
            """The factory of the network."""
            if self.network is not None:
                return TorchScriptNetwork(self.network)
            return pretrained.ImageTextNetwork(self.model or PICKSCORE, self.processor)

        @property
        def words(self) -> str | None:
            """Hub id or folder of what turns captions into tokens; None for a network that reads none."""
            if self.network is not None:
                return self.tokenizer
            return self.processor or self.model or PICKSCORE

        @property
        def role(self) -> str:
            """Name of the network's role."""
            name = self.network.stem if self.network is not None else self.model or PICKSCORE
            return f"reward_{self.label or pretrained.label_from(name)}"

        @model_validator(mode="after")
        def _consistent(self) -> Reward.Config:
            if self.network is not None and (self.model is not None or self.processor is not None):
                raise ValueError("network and model are both given: one is the reward, leave the other out")
            if self.network is None and (self.reads, self.tokenizer) != ("images", None):
                raise ValueError("reads and tokenizer belong to network, which is missing: leave them out, or name it")
            if (self.reads == "tokens") != (self.tokenizer is not None):
                raise ValueError("a network that reads tokens needs its tokenizer, and no other does: set both or none")
            if self.gradient_calls > self.num_inference_steps:
                raise ValueError(
                    f"gradient_calls = {self.gradient_calls} is above num_inference_steps = {self.num_inference_steps}"
                )
            if self.one_step_time is not None and self.num_inference_steps > 1:
                raise ValueError(
                    f"one_step_time = {self.one_step_time} is for num_inference_steps = 1, which is "
                    f"{self.num_inference_steps}: leave one_step_time out"
                )
            return self

    def __init__(self, config: Any, setup: MethodSetup) -> None:
        super().__init__(config, setup)
        self._tokenizer: Any = None

    @classmethod
    def roles(cls, config: Any, setup: MethodSetup) -> Sequence[Role]:
        """Return the teacher, which is not called in training, the student, and the network of the reward."""
        return [Role("teacher"), Role("student", trains=setup.model_type), Role(config.role, build=config.source)]

    @classmethod
    def requires(cls, config: Any, setup: MethodSetup) -> Requirements:
        """Require pixels, captions alone, and a finite x_0 at all times."""
        return Requirements(images=False, pixels=True, finite_snr=True)

    @classmethod
    def check_sources(cls, config: Any, *, path: str) -> None:
        """Raise UserError unless the network is there, or can be had from the hub."""
        if config.network is not None:
            remedy = f"a TorchScript that is called as {SIGNATURES[config.reads]}, and returns (B,)"
            check_file(config.network, key=f"{path}.network", remedy=remedy)
            return
        wanted = pretrained.PretrainedConfig(model=config.model or PICKSCORE, processor=config.processor)
        problem = pretrained.problem(f"{path}.model", wanted)
        if problem:
            raise UserError(problem, f"or name a TorchScript file of your own ({path}.network)")

    def updates(self, context: Context, batch: Batch, step: int) -> Iterator[Update]:
        """Yield the student's update: its images of the batch's captions, decoded and scored."""
        config = self.config
        rewards = self._rewards(context, batch, self._sampled(context, batch))
        losses = -rewards if config.margin is None else (config.margin - rewards).relu()
        metrics = {config.role: rewards.detach().mean()}
        yield Update("student", losses.mean(), metrics, per_sample=losses.detach())

    def _sampled(self, context: Context, batch: Batch) -> Tensor:
        """Return samples of the student as it is used, scaled latents (B, C, h, w), with the gradient of k calls."""
        config, schedule = self.config, context.schedule
        wide = any(value.dtype == torch.float64 for value in batch.cond.values())
        x = context.rng.randn("reward/start/noise", batch.latent_shape).to(torch.float64 if wide else torch.float32)
        dtype = torch.float64 if schedule.clean_at_zero else torch.int64
        times = [
            torch.full((len(batch),), time, dtype=dtype, device=context.device)
            for time in self._times(schedule, config.num_inference_steps)
        ]
        rolled = context.rollout("student", times, x, batch.cond, name="reward", gradient_calls=config.gradient_calls)
        return rolled.x0

    def _rewards(self, context: Context, batch: Batch, x: Tensor) -> Tensor:
        """Return the rewards (B,) of samples `x` (B, C, h, w), with their gradient, one sample at a time."""
        role, names, prompts = self.config.role, list(batch.cond), self._prompts(context, batch)

        def score(x: Tensor, *prompt: Tensor) -> Tensor:
            images = context.decode(x).clamp(0, 1)
            read = [dict(zip(names, prompt, strict=True))] if self.config.reads == "embeddings" else prompt
            return context.call(role, images, *read).reshape(1)

        return context.by_sample(score, x, *prompts)

    def _prompts(self, context: Context, batch: Batch) -> Sequence[Tensor]:
        """Return what the network reads of the prompts, each (B, ...)."""
        if self.config.reads == "embeddings":
            return list(batch.cond.values())
        if self.config.words is None:
            return []
        if self._tokenizer is None:
            self._tokenizer = pretrained.load_tokenizer(self.config.words)
        return pretrained.tokens_of(self._tokenizer, batch.captions, context.device)

    def _times(self, schedule: Schedule, num_steps: int) -> list[float]:
        """Return the falling times of `num_steps` calls: evenly spaced, or the timestep of a one-step student."""
        if num_steps > 1 or self.config.num_inference_steps > 1:
            return trailing_timesteps(schedule, num_steps).times.tolist()
        return [one_step_timestep(schedule, self.config.one_step_time, key="distillation_config.reward.one_step_time")]

    def sampler(
        self, schedule: Schedule, *, num_inference_steps: int | None = None, guidance_scale: float | None = None
    ) -> Sampler:
        """Return multistep sampling at the times of training, guidance off."""
        steps = num_inference_steps or self.config.num_inference_steps
        return multistep_sampler(schedule, self._times(schedule, steps), guidance_scale or 0.0)

    def notices(self) -> list[str]:
        """Return that the reward is all that this loss looks at."""
        return ["reward: nothing in this loss holds the student to its teacher; another term of a recipe can"]


@hookimpl
def register_methods() -> list[type[Method]]:
    """Return the method of this file."""
    return [Reward]
