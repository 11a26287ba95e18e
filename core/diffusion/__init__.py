"""The formalism: schedules, predictions, guidance. Pure functions of tensors; no config, no device."""

from .prediction import Prediction, classifier_free_guidance, scale_from_paper
from .schedule import DDPMSchedule, FlowSchedule, Schedule, SolverGrid, append_dims, from_scheduler_config

__all__ = [
    "DDPMSchedule",
    "FlowSchedule",
    "Prediction",
    "Schedule",
    "SolverGrid",
    "append_dims",
    "classifier_free_guidance",
    "from_scheduler_config",
    "scale_from_paper",
]
