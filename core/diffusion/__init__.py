"""The formalism: schedules, predictions, guidance. Pure functions of tensors; no config, no device."""

from .prediction import Prediction, guide, scale_from_paper
from .schedule import DDPMSchedule, FlowSchedule, Grid, Schedule, append_dims, from_scheduler_config

__all__ = [
    "DDPMSchedule",
    "FlowSchedule",
    "Grid",
    "Prediction",
    "Schedule",
    "append_dims",
    "from_scheduler_config",
    "guide",
    "scale_from_paper",
]
