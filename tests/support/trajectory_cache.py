"""The family of :mod:`.data_helpers` with a teacher: a prediction is a function of its own sample alone."""

from __future__ import annotations

import torch
from distill.core.plugin_api.family import ModelSettings
from distill.core.plugin_api.family_parts import Guided
from distill.core.settings.dataset_settings import DatasetSettings
from distill.core.testing.paths import TABLE
from torch import nn

from .data_helpers import FakeFamily, configuration, pipeline


class TrajectoryFamily(Guided, FakeFamily):
    """Counts loads and predictions; `stop_after` predictions it is interrupted."""

    schedule, prediction_type, default_guidance = TABLE, "epsilon", 5.0
    guided_by_input = False
    settings = ModelSettings("paths")

    def __init__(self, *, denoiser: str = "d1", stop_after: int | None = None, **prints) -> None:
        super().__init__(**prints)
        self.prints["denoiser"] = denoiser
        self.loads = self.calls = self.predicted = 0
        self.stop_after = stop_after

    def load_network(self):
        self.loads += 1
        return nn.Identity()

    def predict(self, network, x_t, time, cond, *, guidance=None, second_time=None):
        if self.stop_after is not None and self.calls >= self.stop_after:
            raise KeyboardInterrupt
        self.calls += 1
        self.predicted += len(x_t)
        condition = cond["pooled"].sum(1) + cond["time_ids"].sum(1) / 1000
        return torch.tanh(x_t + condition[:, None, None, None] * time[:, None, None, None] / 1000)


def cache_entry(id: str = "pairs", **settings) -> DatasetSettings:
    """A distillation cache of ten steps with everything filled in."""
    given = {"num_inference_steps": 10, "guidance_scale": 3.0, "trajectory_points": 1, "default": True, **settings}
    return DatasetSettings(id=id, dataset_type="distillation_cache", **given)


def trajectory_pipeline(*datasets, entry, root, family, **settings):
    """A pipeline whose datasets all use one distillation cache, and the lines that it says."""
    using = [dataset.model_copy(update={"distillation_cache": entry.id}) for dataset in datasets]
    config = configuration(*using, caches=[entry])
    settings = {"images": False, "trajectories": True, **settings}
    return pipeline(*using, root=root, family=family, config=config, **settings)
