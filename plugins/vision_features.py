"""Distances to the data in the features of any vision network of transformers: DINOv2, the vision part of a CLIP, ...

They are named after the network. Only those of the Inception network are called FID and KID (`fid`).

References:
    Stein et al., Exposing flaws of generative model evaluation metrics (DINOv2 for Inception), arXiv 2306.04675.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.plugin_api import pretrained
from ..core.plugin_api.evaluator import EvaluationSetting, Evaluator
from ..core.plugin_api.hookspecs import hookimpl
from ..core.settings.types import HubOrPath
from .evaluators import FeatureDistance, too_few_data

if TYPE_CHECKING:
    from torch import Tensor

TWO_TOWERS = "clip"
"""``model_type`` of networks of images and text, whose image features go through a projection."""


class VisionFeatures(FeatureDistance):
    """Fréchet and kernel distance to the data, and diversity, in the features of a pretrained vision network."""

    name: ClassVar[str] = "features"
    packages: ClassVar[Mapping[str, str]] = pretrained.PACKAGES
    by_default: ClassVar[bool] = False

    class Config(pretrained.PretrainedConfig):
        """Which network to use; distances in different ones do not compare."""

        model: HubOrPath | None = "facebook/dinov2-base"
        """Hub id or local folder of a vision network of transformers (or of a CLIP), with safetensors."""

    def __init__(self, config: Any, setting: EvaluationSetting) -> None:
        super().__init__(config, setting)
        self.space = pretrained.label_of(config)
        self.higher_is_better = {
            f"kernel_distance_to_data_{self.space}": False,
            f"frechet_distance_to_data_{self.space}": False,
            f"diversity_{self.space}": True,
        }
        self._loaded: tuple[Any, Any] | None = None

    @classmethod
    def usable(cls, setting: EvaluationSetting, config: Any = None) -> str | None:
        """Return None if the network (here or on the hub) and images to compare with exist, otherwise the reason."""
        return pretrained.problem(f"evaluator_config.{cls.name}.model", config or cls.Config()) or too_few_data(setting)

    @property
    def at_once(self) -> int:
        """``batch_size``."""
        return self.config.batch_size

    def features(self, images: Tensor) -> Tensor:
        """Return the network's pooled output (B, F): a CLIP's projected one; without any, the mean state."""
        from ..core.drawing.grid import to_images

        if self._loaded is None:
            self._loaded = pretrained.load(self.config, self.setting.device, images_only=True)
        model, processor = self._loaded
        seen = pretrained.pixels(processor, to_images(images), self.setting.device)
        if model.config.model_type == TWO_TOWERS:
            return model.visual_projection(model.vision_model(pixel_values=seen).pooler_output)
        output = model(pixel_values=seen)
        if output.get("pooler_output") is not None:
            return output.pooler_output.flatten(1)
        states = output.last_hidden_state
        return states.mean(dim=1) if states.ndim == 3 else states.flatten(2).mean(dim=2)


@hookimpl
def register_evaluators() -> Sequence[type[Evaluator]]:
    """Return the evaluator of this file."""
    return [VisionFeatures]
