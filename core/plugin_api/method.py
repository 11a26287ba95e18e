"""The contract of a distillation method: a paper's algorithm that turns a batch into losses.

A method declares the networks it uses (:meth:`Method.roles`) and what it needs of the family (:meth:`Method.requires`),
and yields one :class:`Update` for each network that is to be stepped. The engine owns everything else: zero_grad,
backward, clipping, stepping, EMA, random generators, checkpoints.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from ..diffusion.sampler import Sampler
from ..errors import UserError
from .family_parts import FIRST_HALF, Blocks
from .recommended import Recommended
from .stage import Stage

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..diffusion.adversarial import HeadKind, HeadLevels
    from ..diffusion.importance import SeenLosses
    from ..diffusion.schedule import Schedule
    from .batch import Batch
    from .context import Context
    from .family import ModelFamily

Trains = Literal["full", "lora", "head", "module", "none"]
ModelType = Literal["lora", "full"]
"""The kind of student: an adapter, or a network of its own."""


@dataclass(frozen=True)
class ModuleSetup:
    """The facts that a role's factory may need; nothing is computed before it is asked for.

    Attributes:
        device: Device that the module will be on.
        dtype: Type of the weights that are trained.
        seed: Seed of this module's initial weights; the global generator is seeded with it while the factory runs.
    """

    _family: ModelFamily
    _network: nn.Module
    device: torch.device = field(kw_only=True)
    dtype: torch.dtype = field(kw_only=True)
    seed: int = field(kw_only=True)

    def feature_channels(self, *, blocks: Blocks = FIRST_HALF) -> list[int]:
        """Return C_k of each level that ``context.features(..., blocks=blocks)`` returns."""
        return self._family.feature_channels(self._network, blocks=blocks)

    @property
    def prompt_dimensions(self) -> Mapping[str, int]:
        """Name of an embedding of the conditioning -> its last dimension D, as of ``prompt_embeds`` (B, L, D)."""
        return self._family.prompt_dimensions(self._network)

    @property
    def latent_channels(self) -> int:
        """Number of channels C of the latents."""
        return self._family.latent_channels


ModuleFactory = Callable[[ModuleSetup], "nn.Module"]


@dataclass(frozen=True)
class Role:
    """A network as a method uses it.

    Attributes:
        name: ``teacher``, ``student``, ``target``, ``fake_score``, ...
        trains: Which weights the optimizer of this role steps. ``lora`` is an adapter on the shared base, ``full`` a
            copy of the teacher, ``head`` small heads that read features of another role, ``module`` what `build` makes.
        build: Makes the role's own module: one that is trained (``trains="module"``), or a frozen auxiliary network
            (``none``), which is in no checkpoint. Methods use it by :meth:`.context.Context.call`. Terms of a recipe
            share a role where their factories are equal.
        ema_of: The role of whose weights this one is the exponential moving average (then ``trains`` is ``none``).
        ema_decay: Decay of that average, applied once per optimizer step.
        copy_of: The role whose weights this frozen one takes where a :class:`Stage` says so; the teacher before that.
        guidance_embedding: Whether the network takes the guidance scale as an input (``time_cond_proj_dim``).
        second_time: Whether the network takes a second time; its embedding starts at zero, so the role starts as the
            teacher. An average or a copy has what its source has.
        heads: Kind of the heads of a role that trains them; see :mod:`..diffusion.adversarial`.
        head_levels: Features that these heads read: ``all``, or the ``middle`` of the network, its last level.
        head_inputs: Number of samples whose features the heads of a ``head`` role read together, joined along the
            channels.
        features_only: Whether features of the network are all that is read of it. What lies behind them gets no
            gradients and no state of the optimizer, which estimates of memory count on.
        learning_rate: Learning rate of this role; None is the run's. The run's schedule shapes either.
        betas: Decay of the first and the second moment of Adam-like optimizers; None is the run's.
        weight_decay: Decoupled weight decay per step, as a fraction of the learning rate; None is the run's.
        max_grad_norm: Norm that this role's gradient is clipped to, 0 for no clipping; None is the run's.
    """

    name: str
    trains: Trains = "none"
    ema_of: str | None = None
    ema_decay: float = 0.95
    copy_of: str | None = None
    guidance_embedding: bool = False
    second_time: bool = False
    heads: HeadKind = "places"
    head_levels: HeadLevels = "all"
    head_inputs: int = 1
    features_only: bool = False
    learning_rate: float | None = None
    betas: tuple[float, float] | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    build: ModuleFactory | None = None

    @property
    def auxiliary(self) -> bool:
        """True for a frozen network that the factory makes again, and makes alike, in every run."""
        return self.build is not None and self.trains == "none"

    @property
    def source(self) -> str | None:
        """The role that an average or a copy takes its weights from; None for other roles."""
        return self.ema_of or self.copy_of


def is_whole_network(roles: Mapping[str, Role], name: str) -> bool:
    """Return True if the weights of the role `name` are all weights of a denoiser: it trains them, or copies a role
    that does.
    """
    role = roles[name]
    return role.trains == "full" or (role.source is not None and is_whole_network(roles, role.source))


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
    pixels: bool = False
    """Whether the method decodes latents with a gradient (:meth:`.context.Context.decode`)."""
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
        seen: The losses that later draws of times go by (:class:`.grid_draws.DrawsGrid`).
    """

    role: str
    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    per_sample: Tensor | None = None
    t: Tensor | None = None
    seen: Sequence[SeenLosses] = ()


@dataclass(frozen=True)
class MethodSetup:
    """The facts of the run that a method may use when it declares its roles: never the family's name.

    Attributes:
        model_type: The kind of student.
        prediction_type: ``epsilon``, ``v_prediction``, ``sample`` or ``flow``, of the loaded model.
        use_ema: Whether another average of the student is kept.
        guided_by_input: Whether the teacher takes the guidance scale as an input (FLUX.1 dev): one call is guided, and
            none is without guidance. False before the model's files are read.
        usual_guidance: Guidance scale that images of the teacher are usually made with.
        has_images: Whether the run's data have images; False where that is not known yet.
    """

    model_type: ModelType
    prediction_type: str = "epsilon"
    use_ema: bool = False
    guided_by_input: bool = False
    usual_guidance: float = 5.0
    has_images: bool = False

    def require_unguided(self, setting: str, remedy: str) -> None:
        """Raise UserError about a setting that calls the teacher without guidance, where each of its calls is guided.

        Args:
            setting: The setting with its value, as ``distillation_config.pcm.cfg_free``.
            remedy: What to do instead.
        """
        if self.guided_by_input:
            raise UserError(
                f"{setting} needs the teacher without guidance, and this model takes its guidance scale as an input: "
                "no call of it is without",
                remedy,
            )


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


def completed(method: type[Method], config: Any, setup: MethodSetup) -> Any:
    """Return a method's settings, and inside them those of other methods, as :meth:`Method.completed` fills them in."""
    config = method.completed(config, setup)
    for _, part in method_parts(config):
        part.bind(part.found, completed(part.found, part.settings, setup))
    return config


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
    recommended: ClassVar[Sequence[Recommended]] = ()
    """What papers and their authors' code train with, from the general to the special; of those that fit a run, a later
    one wins. They stand in for keys that nobody set."""
    guidance_keys: ClassVar[Sequence[str]] = ()
    """Settings that hold a guidance scale of the teacher. Their defaults are for classifier-free guidance; where the
    teacher takes the scale as an input, its usual one stands in for those that nobody set."""
    imitates_teacher: ClassVar[bool] = True
    """Whether training brings the student to the distribution of its teacher; if not, another term of a recipe must."""

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
    def completed(cls, config: Any, setup: MethodSetup) -> Any:
        """Return the settings with the defaults that depend on the teacher filled in; the same settings in most runs.

        Args:
            config: Validated.
            setup: The facts of the run, with the model's files read.
        """
        open_keys = [key for key in cls.guidance_keys if key not in config.model_fields_set]
        if not setup.guided_by_input or not open_keys:
            return config
        offset = 1.0 if getattr(config, "guidance_convention", "scale") == "paper" else 0.0
        return config.model_copy(update=dict.fromkeys(open_keys, setup.usual_guidance - offset))

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

    @classmethod  # noqa: B027 - most methods name nothing
    def check_sources(cls, config: Any, *, path: str) -> None:
        """Raise UserError where something that the settings name, as the file of a network, cannot be had here.

        Called before a run loads weights, and by ``config check``, but not where a finished run is only looked at.

        Args:
            config: Validated settings.
            path: Dotted path of the settings, for the message.
        """

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
