"""A plugin file for tests: one of everything, none of which needs weights. Loaded with --plugin."""

import distill
from pydantic import Field


class PlainFamily(distill.ModelFamily):
    """A family that can do nothing beyond the ordinary."""

    name = "plain-family"
    aliases = ("plainfam",)
    capabilities = distill.Capabilities()
    lora_targets = ("to_q",)

    class Config(distill.ModelFamily.Config):
        """Settings of the plain family."""

        depth: int = Field(default=2, ge=1)
        """Number of layers."""


PlainFamily.__abstractmethods__ = frozenset()  # its behaviour is never called


class LoraOnlyFamily(PlainFamily):
    """A family that trains adapters only."""

    name = "lora-only"
    aliases = ()
    capabilities = distill.Capabilities(full=False)


class NeedyMethod(distill.Method):
    """A method that needs whatever its settings say."""

    name = "needy"

    class Config(distill.Method.Config):
        """Settings of the needy method."""

        needs_images: bool = True
        """Whether it needs images."""
        needs_guidance_embedding: bool = False
        """Whether it needs a guidance input."""
        needs_second_time: bool = False
        """Whether it needs a second time."""
        needs_features: bool = False
        """Whether it needs features."""
        grid: int = Field(default=50, ge=1, le=1000)
        """Grid points."""
        strength: float = Field(default=0.5, ge=0, le=1)
        """Share of something (0-1)."""

    @classmethod
    def roles(cls, config, setup):
        return [distill.Role("teacher"), distill.Role("student", trains=setup.model_type)]

    @classmethod
    def requires(cls, config, setup):
        return distill.Requirements(
            images=config.needs_images,
            guidance_embedding=config.needs_guidance_embedding,
            second_time=config.needs_second_time,
            features=config.needs_features,
            divides_timesteps=config.grid,
            zero_dropout=True,
        )

    def updates(self, context, batch, step):
        yield from ()

    def sampler(self, schedule, *, num_inference_steps=None, guidance_scale=None):
        return distill.Sampler("DDIMScheduler", {}, num_inference_steps or 4, guidance_scale or 0.0)


class Momentumless(distill.OptimizerPlugin):
    """An optimizer without any of Adam's settings."""

    name = "momentumless"
    honours = frozenset()

    def build(self, parameters, settings):
        raise NotImplementedError


class Unbuyable(Momentumless):
    """An optimizer whose package nobody has."""

    name = "unbuyable"
    packages = {"no_such_package_anywhere": "no-such-package-anywhere>=1"}


class Unaffordable(distill.Quantizer):
    """A quantizer whose package nobody has."""

    name = "unaffordable"
    packages = {"no_such_package_anywhere": "no-such-package-anywhere>=1"}

    def quantize(self, network, *, device, keep=()):
        raise NotImplementedError


class NotHere(Unaffordable):
    """A quantizer that no machine is good enough for."""

    name = "not-here"
    packages = {}

    @classmethod
    def usable(cls, device):
        return f"{device} is no quantum computer; int8-torchao works everywhere"


class FarTracker(distill.Tracker):
    """A tracker whose package is missing, with a secret among its settings."""

    name = "far-tracker"
    packages = {"no_such_package_anywhere": "no-such-package-anywhere>=1"}

    class Config(distill.Tracker.Config):
        """Settings of the far tracker."""

        room: str = "main"
        """Name of the room."""
        api_key: str | None = None
        """Key of the account."""

    def start(self, run):
        raise NotImplementedError

    def log(self, metrics, step):
        raise NotImplementedError


@distill.hookimpl
def register_families():
    return [PlainFamily, LoraOnlyFamily]


@distill.hookimpl
def register_methods():
    return [NeedyMethod]


@distill.hookimpl
def register_optimizers():
    return [Momentumless, Unbuyable]


@distill.hookimpl
def register_quantizers():
    return [Unaffordable, NotHere]


@distill.hookimpl
def register_trackers():
    return [FarTracker]
