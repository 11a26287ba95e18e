"""distill: turn slow, many-step diffusion models into few-step ones.

What stands here is the API for plugins. It is imported when it is first used, so that `import distill` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .core.lazy import attributes

if TYPE_CHECKING:
    from .core.api import API_VERSION
    from .core.backend import DataBackend, Entry, SampleBackend, SampleChunk
    from .core.batch import Batch, Conditioning
    from .core.errors import BadValue, ConfigError, DistillError, Finding, OutOfReach, PluginError, UserError
    from .core.evaluator import EvaluationSetting, Evaluator, Samples
    from .core.family import (
        Capabilities,
        ExportInfo,
        ExtraLora,
        LoraSettings,
        MicroConditioning,
        ModelFamily,
        ModelSettings,
    )
    from .core.hookspecs import hookimpl
    from .core.method import Method, MethodPart, MethodSetup, Requirements, Role, Sampler, Stage, Update
    from .core.optimizer import OptimizerPlugin, OptimizerSettings
    from .core.publisher import Publisher
    from .core.quantizer import Quantizer
    from .core.tracker import RunInfo, Tracker

__version__ = "0.1.0"

__all__ = [
    "API_VERSION",
    "BadValue",
    "Batch",
    "Capabilities",
    "Conditioning",
    "ConfigError",
    "DataBackend",
    "DistillError",
    "Entry",
    "EvaluationSetting",
    "Evaluator",
    "ExportInfo",
    "ExtraLora",
    "Finding",
    "LoraSettings",
    "Method",
    "MethodPart",
    "MethodSetup",
    "MicroConditioning",
    "ModelFamily",
    "ModelSettings",
    "OptimizerPlugin",
    "OptimizerSettings",
    "OutOfReach",
    "PluginError",
    "Publisher",
    "Quantizer",
    "Requirements",
    "Role",
    "RunInfo",
    "SampleBackend",
    "SampleChunk",
    "Sampler",
    "Samples",
    "Stage",
    "Tracker",
    "Update",
    "UserError",
    "__version__",
    "hookimpl",
]

_HOMES = {
    "api": "API_VERSION",
    "backend": "DataBackend Entry SampleBackend SampleChunk",
    "batch": "Batch Conditioning",
    "errors": "BadValue ConfigError DistillError Finding OutOfReach PluginError UserError",
    "evaluator": "EvaluationSetting Evaluator Samples",
    "family": "Capabilities ExportInfo ExtraLora LoraSettings MicroConditioning ModelFamily ModelSettings",
    "hookspecs": "hookimpl",
    "method": "Method MethodPart MethodSetup Requirements Role Sampler Stage Update",
    "optimizer": "OptimizerPlugin OptimizerSettings",
    "publisher": "Publisher",
    "quantizer": "Quantizer",
    "tracker": "RunInfo Tracker",
}

__getattr__ = attributes(__name__, {f"core.{module}": names for module, names in _HOMES.items()})
