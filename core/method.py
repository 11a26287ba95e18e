"""The contract of a distillation method: a paper's algorithm that turns a batch into losses.

A method declares the networks it uses (:meth:`Method.roles`) and what it needs of the family (:meth:`Method.requires`),
and yields one :class:`Update` for each network that is to be stepped. The engine owns everything else: zero_grad,
backward, clipping, stepping, EMA, random generators, checkpoints.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor

    from .batch import Batch
    from .context import Context
    from .diffusion.schedule import Schedule

Trains = Literal["full", "lora", "none"]


@dataclass(frozen=True)
class Role:
    """A network as a method sees it.

    Attributes:
        name: ``teacher``, ``student``, ``target``, ``fake_score``, ...
        trains: Which weights the optimizer of this role steps. ``lora`` is an adapter on the shared base.
        init: The role whose weights it starts from.
        ema_of: The role this one is the exponential moving average of (then ``trains`` is ``none``).
        ema_decay: Decay of that average, applied once per optimizer step.
        guidance_embedding: Whether the network takes the guidance scale as an input (``time_cond_proj_dim``).
    """

    name: str
    trains: Trains = "none"
    init: str = "teacher"
    ema_of: str | None = None
    ema_decay: float = 0.95
    guidance_embedding: bool = False


@dataclass(frozen=True)
class Requirements:
    """What a method needs; compared with the family's capabilities before weights load."""

    pictures: bool = True
    guidance_embedding: bool = False
    second_time: bool = False
    features: bool = False
    zero_dropout: bool = False
    """Whether LoRA dropout must be 0 (consistency methods compare two passes of one network)."""
    divides_timesteps: int | None = None
    """A number of grid points that must divide the schedule's number of training timesteps, where it is discrete."""
    finite_snr: bool = False
    """Whether x0 must be computable from eps at the last timestep (fails for eps prediction at zero terminal SNR)."""


@dataclass(frozen=True)
class Update:
    """One optimizer step's worth of loss for one role.

    Attributes:
        role: The role whose parameters the gradient goes to.
        loss: Scalar, mean over the micro-batch.
        metrics: Scalars to log, as detached tensors (never ``.item()``: that would stop the device).
        per_sample: Detached loss of each sample, shape (B,): names bad samples, fills the histogram by timestep.
        t: Times of the samples in the schedule's units, shape (B,).
    """

    role: str
    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    per_sample: Tensor | None = None
    t: Tensor | None = None


@dataclass(frozen=True)
class Sampler:
    """How the student is to be run: validation, evaluation and export all use this same object.

    Attributes:
        scheduler: Name of a diffusers scheduler class.
        config: Keyword arguments of the scheduler that differ from the model's own scheduler config.
        num_inference_steps: The default number of steps.
        guidance_scale: The pipeline's ``guidance_scale``; 0 means off.
        call: Extra keyword arguments of the pipeline call for a number of steps, as ``{"sigmas": [...]}``.
    """

    scheduler: str
    config: Mapping[str, Any]
    num_inference_steps: int
    guidance_scale: float
    call: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodSetup:
    """What a method may know of the run when it declares its roles: not the family, only its schedule."""

    model_type: Literal["lora", "full"]
    prediction_type: str = "epsilon"
    use_ema: bool = False


class Method(ABC):
    """A distillation algorithm. One file; reads top to bottom as its paper."""

    name: ClassVar[str]

    class Config(BaseModel):
        """Settings of the method; every field has a description."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    def __init__(self, config: Any, setup: MethodSetup) -> None:
        self.config = config
        self.setup = setup

    @classmethod
    @abstractmethod
    def roles(cls, config: Any, setup: MethodSetup) -> Sequence[Role]:
        """The networks of the method; ``teacher`` and ``student`` are always among them."""

    @classmethod
    @abstractmethod
    def requires(cls, config: Any, setup: MethodSetup) -> Requirements:
        """What the method needs of family, data and settings."""

    @abstractmethod
    def updates(self, context: Context, batch: Batch, step: int) -> Iterator[Update]:
        """The updates of optimizer step `step` (counted from 0) for one micro-batch, in order."""

    @abstractmethod
    def sampler(
        self, schedule: Schedule, *, num_inference_steps: int | None = None, guidance_scale: float | None = None
    ) -> Sampler:
        """The sampler that the student is trained for, at its default or the given steps and guidance.

        A guidance outside of what the student was trained for is replaced by the method's default, with a notice.
        """

    def result_role(self) -> str:
        """The role that is validated and exported."""
        return "student"

    def notices(self) -> list[str]:
        """Lines said once at the start of a run (conventions, consequences of settings)."""
        return []

    def state_dict(self) -> dict[str, Tensor]:
        """State beyond the networks that decides the future; saved in checkpoints."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned."""
        if state:
            raise ValueError(f"{self.name} keeps no state, but the checkpoint has {sorted(state)}")
