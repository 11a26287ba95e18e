"""The contract of a distillation method: a paper's algorithm that turns a batch into losses.

A method declares the networks it uses (:meth:`Method.roles`) and what it needs of the family (:meth:`Method.requires`),
and yields one :class:`Update` for each network that is to be stepped. The engine owns everything else: zero_grad,
backward, clipping, stepping, EMA, random generators, checkpoints.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from ..diffusion.sampler import Sampler
from .stage import Stage

if TYPE_CHECKING:
    from torch import Tensor

    from ..diffusion.schedule import Schedule
    from .batch import Batch
    from .context import Context

Trains = Literal["full", "lora", "head", "none"]
ModelType = Literal["lora", "full"]
"""The kind of student: an adapter, or a network of its own."""


@dataclass(frozen=True)
class Role:
    """A network as a method uses it.

    Attributes:
        name: ``teacher``, ``student``, ``target``, ``fake_score``, ...
        trains: Which weights the optimizer of this role steps. ``lora`` is an adapter on the shared base, ``full`` a
            copy of the teacher, ``head`` small heads that read features of another role.
        ema_of: The role of whose weights this one is the exponential moving average (then ``trains`` is ``none``).
        ema_decay: Decay of that average, applied once per optimizer step.
        copy_of: The role whose weights this frozen one takes where a :class:`Stage` says so; the teacher before that.
        guidance_embedding: Whether the network takes the guidance scale as an input (``time_cond_proj_dim``).
        second_time: Whether the network takes a second time; its embedding starts at zero, so the role starts as the
            teacher. An average or a copy has what its source has.
        head_inputs: Number of samples whose features the heads of a ``head`` role read together, joined along the
            channels.
        learning_rate: Learning rate of this role; None is the run's. The run's schedule shapes either.
    """

    name: str
    trains: Trains = "none"
    ema_of: str | None = None
    ema_decay: float = 0.95
    copy_of: str | None = None
    guidance_embedding: bool = False
    second_time: bool = False
    head_inputs: int = 1
    learning_rate: float | None = None

    @property
    def source(self) -> str | None:
        """The role that an average or a copy takes its weights from; None for other roles."""
        return self.ema_of or self.copy_of


@dataclass(frozen=True)
class Requirements:
    """The needs of a method; compared with the family's capabilities before weights load."""

    images: bool = True
    """Whether batches carry latents of images; if not, captions are enough."""
    trajectory_points: int = 0
    """Number of points of the teacher's trajectory that batches carry (``Batch.trajectories``) beside its end: 0 for no
    trajectory, 1 for its noise, k for the points where k even steps begin. A cache with a multiple of k serves too.
    """
    guidance_embedding: bool = False
    second_time: bool = False
    features: bool = False
    zero_dropout: bool = False
    """Whether LoRA dropout must be 0 (consistency methods compare two passes of one network)."""
    divides_timesteps: int | None = None
    """A number of grid points that must divide the schedule's number of training timesteps, where time is discrete."""
    forward_ad: bool = False
    """Whether the networks are differentiated in forward mode (:meth:`.context.Context.jvp`, exact)."""
    finite_snr: bool = False
    """Whether x0 must be computable from eps at the last timestep (fails for eps prediction at zero terminal SNR)."""

    @classmethod
    def union(cls, needs: Iterable[Requirements]) -> Requirements:
        """Return the requirements that satisfy all of `needs`; grids are left out, since each is compared by itself."""
        switches = [field.name for field in fields(cls) if field.type == "bool"]
        given = list(needs)
        points = [need.trajectory_points for need in given if need.trajectory_points]
        united = {name: any(getattr(need, name) for need in given) for name in switches}
        return cls(**united, trajectory_points=math.lcm(*points) if points else 0)


@dataclass(frozen=True)
class Update:
    """The loss of one optimizer step of one role.

    Attributes:
        role: The role whose parameters the gradient goes to.
        loss: Scalar, mean over the micro-batch.
        metrics: Scalars to log, as detached tensors (never ``.item()``: that would synchronise the device).
        per_sample: Detached loss of each sample, shape (B,), to name bad samples and fill the histogram by timestep.
        t: Times of the samples in the schedule's units, shape (B,).
    """

    role: str
    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    per_sample: Tensor | None = None
    t: Tensor | None = None


@dataclass(frozen=True)
class MethodSetup:
    """The facts of the run that a method may use when it declares its roles: not the family, only its schedule."""

    model_type: ModelType
    prediction_type: str = "epsilon"
    use_ema: bool = False


class MethodPart(BaseModel):
    """Another registered method with its settings, inside the settings of a method that combines others.

    A method only puts fields of this type, of a class derived from it, or lists of them in its ``Config``: the engine
    finds the method by its name, checks its settings as it checks any method's, and binds both.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    method: str
    """Name of a registered method."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Its settings, as they would stand under distillation_config."""
    _found: type[Method] | None = PrivateAttr(None)
    _settings: Any = PrivateAttr(None)

    def bind(self, found: type[Method], settings: BaseModel) -> None:
        """Take the method's class and its validated settings, defaults filled in."""
        self._found, self._settings = found, settings
        self.config = settings.model_dump(mode="json")

    @property
    def found(self) -> type[Method]:
        """The method's class."""
        assert self._found is not None, f"nobody has looked up the method {self.method!r}"
        return self._found

    @property
    def settings(self) -> Any:
        """The method's validated ``Config``."""
        assert self._found is not None, f"nobody has looked up the method {self.method!r}"
        return self._settings


def method_parts(config: Any) -> Iterator[tuple[str, MethodPart]]:
    """Yield the methods inside a method's settings with their dotted paths, as ``terms.0``; not those nested deeper."""
    for key in type(config).model_fields:
        value = getattr(config, key)
        inside = [(key, value)]
        if isinstance(value, list | tuple):
            inside = [(f"{key}.{index}", item) for index, item in enumerate(value)]
        yield from ((path, part) for path, part in inside if isinstance(part, MethodPart))


class Method(ABC):
    """A distillation algorithm: one file that reads top to bottom as its paper."""

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[Mapping[str, str]] = {}
    """Import name -> name to pip install, for packages that only this method needs."""

    class Config(BaseModel):
        """Settings of the method; every field has a description."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    def __init__(self, config: Any, setup: MethodSetup) -> None:
        self.config = config
        self.setup = setup

    @classmethod
    def example(cls) -> Mapping[str, Any]:
        """Return settings for the conformance suite (:mod:`.testing`), where the defaults would take long."""
        return {}

    @classmethod
    @abstractmethod
    def roles(cls, config: Any, setup: MethodSetup) -> Sequence[Role]:
        """Return the networks of the method; ``teacher`` and ``student`` are always among them."""

    @classmethod
    @abstractmethod
    def requires(cls, config: Any, setup: MethodSetup) -> Requirements:
        """Return what the method needs of family, data and settings."""

    @abstractmethod
    def updates(self, context: Context, batch: Batch, step: int) -> Iterator[Update]:
        """Yield the updates of optimizer step `step` (counted from 0) for one micro-batch, in order."""

    @abstractmethod
    def sampler(
        self, schedule: Schedule, *, num_inference_steps: int | None = None, guidance_scale: float | None = None
    ) -> Sampler:
        """Return the sampler that the student is trained for, at its default or the given steps and guidance.

        A guidance scale outside the range that the student was trained for is replaced by the method's default, with a
        notice.
        """

    @classmethod
    def stages(cls, config: Any, *, total_steps: int) -> Sequence[Stage]:
        """Return the stages of a run of `total_steps` optimizer steps; their lengths sum to it."""
        return [Stage("all", total_steps)]

    def result_role(self) -> str:
        """Return the role that is validated and exported."""
        return "student"

    def notices(self) -> list[str]:
        """Return lines to print once at the start of a run (conventions, consequences of settings)."""
        return []

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state beyond the networks that decides future steps; saved in checkpoints."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned."""
        if state:
            raise ValueError(f"{self.name} keeps no state, but the checkpoint has {sorted(state)}")
