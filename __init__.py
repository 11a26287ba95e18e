"""distill: turn slow, many-step diffusion models into few-step ones.

What stands here is the API for plugins. It is imported when it is first used, so that `import distill` costs nothing.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from .core.utils.lazy import attributes

if TYPE_CHECKING:
    from .core.diffusion.sampler import Sampler
    from .core.errors import BadValue, ConfigError, DistillError, Finding, OutOfReach, PluginError, UserError
    from .core.plugin_api.backend import DataBackend, Entry, SampleBackend, SampleChunk
    from .core.plugin_api.batch import Batch, Conditioning
    from .core.plugin_api.evaluator import EvaluationSetting, Evaluator, Samples
    from .core.plugin_api.family import (
        Capabilities,
        ExportInfo,
        ExtraLora,
        LoraSettings,
        MicroConditioning,
        ModelFamily,
        ModelSettings,
    )
    from .core.plugin_api.hookspecs import hookimpl
    from .core.plugin_api.method import Method, MethodPart, MethodSetup, ModuleSetup, Requirements, Role, Update
    from .core.plugin_api.optimizer import OptimizerPlugin, OptimizerSettings
    from .core.plugin_api.publisher import Publisher
    from .core.plugin_api.quantizer import Quantizer
    from .core.plugin_api.recommended import Recommended
    from .core.plugin_api.stage import Stage
    from .core.plugin_api.tracker import RunInfo, Tracker
    from .core.plugin_api.version import API_VERSION

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
    "ModuleSetup",
    "OptimizerPlugin",
    "OptimizerSettings",
    "OutOfReach",
    "PluginError",
    "Publisher",
    "Quantizer",
    "Recommended",
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
    "plugin_api.version": "API_VERSION",
    "plugin_api.backend": "DataBackend Entry SampleBackend SampleChunk",
    "plugin_api.batch": "Batch Conditioning",
    "errors": "BadValue ConfigError DistillError Finding OutOfReach PluginError UserError",
    "plugin_api.evaluator": "EvaluationSetting Evaluator Samples",
    "plugin_api.family": "Capabilities ExportInfo ExtraLora LoraSettings MicroConditioning ModelFamily ModelSettings",
    "plugin_api.hookspecs": "hookimpl",
    "plugin_api.method": "Method MethodPart MethodSetup ModuleSetup Requirements Role Sampler Stage Update",
    "plugin_api.recommended": "Recommended",
    "plugin_api.optimizer": "OptimizerPlugin OptimizerSettings",
    "plugin_api.publisher": "Publisher",
    "plugin_api.quantizer": "Quantizer",
    "plugin_api.tracker": "RunInfo Tracker",
}

logging.getLogger(__name__).addHandler(logging.NullHandler())  # a library is silent until somebody listens

__getattr__ = attributes(__name__, {f"core.{module}": names for module, names in _HOMES.items()})
