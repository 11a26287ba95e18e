"""FID, KID and LPIPS by the networks that they are defined with, given as TorchScript files.

The files are those of StyleGAN's published metrics (also used by EDM and clean-fid), which run without any library:

    https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt
    https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/vgg16.pt

Nothing is fetched: a TorchScript file is code, which people download and name themselves.

References:
    Heusel et al., GANs Trained by a Two Time-Scale Update Rule (FID), arXiv 1706.08500.
    Bińkowski et al., Demystifying MMD GANs (KID), arXiv 1801.01401.
    Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (LPIPS), arXiv 1801.03924.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from ..core.errors import DistillError
from ..core.plugin_api.auxiliary import LPIPS_NETWORK, METRICS_ADDRESS, load_torchscript, lpips_features
from ..core.plugin_api.evaluator import EvaluationSetting, Evaluator, Samples
from ..core.plugin_api.hookspecs import hookimpl
from ..core.settings.types import LocalPath
from .evaluators import FEWEST_DATA, WITHOUT_TEACHER, FeatureDistance, fewer_than, num_compared, too_few_data

if TYPE_CHECKING:
    from torch import Tensor

NUM_FEATURES = 2048
"""Number of features of the Inception network's last pooling."""


class NetworkConfig(BaseModel):
    """Which file to use, and how to run it."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    network: LocalPath | None = None
    """The TorchScript file."""
    batch_size: int = Field(default=32, ge=1)
    """Images in one pass of the network."""


def problem(evaluator: str, file: str, config: Any) -> str | None:
    """Return why the file cannot be used, and where to get it; None where it can."""
    key, mend = f"evaluator_config.{evaluator}.network", f"download {METRICS_ADDRESS}/{file} and name the file"
    if config.network is None:
        return f"it needs its network: {mend} ({key})"
    if not config.network.is_file():
        return f"{key} = {str(config.network)!r} is not there ({mend})"
    return None


def as_bytes(images: Tensor) -> Tensor:
    """Return images as 8-bit files hold them, (B, 3, H, W) uint8."""
    return images.clamp(0, 1).mul(255).round().byte()


class InceptionDistance(FeatureDistance):
    """FID and KID: Fréchet and kernel distance to the data in the features of the Inception network of 2015.

    Images are resized to 299 pixels inside the network, as TensorFlow did. The FID has a bias that is large with few
    images: below `fewest_pictures` of either kind only the KID is given, which has none.
    """

    name: ClassVar[str] = "fid"
    by_default: ClassVar[bool] = False
    higher_is_better: ClassVar[Mapping[str, bool]] = {"fid": False, "kid": False}
    file: ClassVar[str] = "inception-2015-12-05.pt"

    class Config(NetworkConfig):
        """The file of the Inception network, and the number of images that a FID needs."""

        fewest_pictures: int = Field(default=NUM_FEATURES, ge=FEWEST_DATA)
        """Number of images, generated and real, that a FID needs. Papers use 5,000 to 50,000; compare equal numbers."""

    def __init__(self, config: Any, setting: EvaluationSetting) -> None:
        super().__init__(config, setting)
        self._network: Any = None

    @classmethod
    def usable(cls, setting: EvaluationSetting, config: Any = None) -> str | None:
        """Return None if the network's file and images to measure the distance to are there, otherwise the reason."""
        return problem(cls.name, cls.file, config or cls.Config()) or too_few_data(setting)

    @property
    def at_once(self) -> int:
        """``batch_size``."""
        return self.config.batch_size

    def features(self, images: Tensor) -> Tensor:
        """Return the last pooling, (B, 2048). Raises DistillError for a network of another kind."""
        if self._network is None:
            self._network = load_torchscript(self.config.network, self.setting.device)
        found = self._network(as_bytes(images).to(self.setting.device), return_features=True).flatten(1)
        if found.shape[1] != NUM_FEATURES:
            reason = f"it has {found.shape[1]} features, not {NUM_FEATURES}"
            raise DistillError(f"{self.config.network} is not the Inception network that FID is defined by: {reason}")
        return found

    def score(self, samples: Samples) -> dict[str, float]:
        """Return the KID, and the FID where there are enough images."""
        from ..core.evaluation.distances import frechet_distance, polynomial_distance

        both = self.both_features(samples)
        if both is None:
            return {}
        scores = {"kid": polynomial_distance(*both)}
        if min(map(len, both)) >= self.config.fewest_pictures:
            scores["fid"] = frechet_distance(*both)
        return scores

    def unscored(self, samples: Samples) -> dict[str, str]:
        """Return the distances that want more images."""
        count, wanted = num_compared(samples), self.config.fewest_pictures
        least = {"fid": wanted, "kid": FEWEST_DATA}
        return {name: fewer_than(number, count) for name, number in least.items() if count < number}


class PerceptualDistance(Evaluator):
    """LPIPS: how different each image looks from the full teacher's, made from the same noise, by a VGG16."""

    name: ClassVar[str] = "lpips"
    by_default: ClassVar[bool] = False
    higher_is_better: ClassVar[Mapping[str, bool]] = {"lpips_to_teacher": False}
    file: ClassVar[str] = LPIPS_NETWORK

    class Config(NetworkConfig):
        """The file of the VGG16."""

        batch_size: int = Field(default=1, ge=1)
        """Images in one pass of the network; one of 1024 x 1024 pixels takes about two gigabytes."""

    def __init__(self, config: Any, setting: EvaluationSetting) -> None:
        super().__init__(config, setting)
        self._network: Any = None

    @classmethod
    def usable(cls, setting: EvaluationSetting, config: Any = None) -> str | None:
        """Return None if the network's file is there, otherwise the reason."""
        return problem(cls.name, cls.file, config or cls.Config())

    def score(self, samples: Samples) -> dict[str, float]:
        """Return the mean over the images; nothing for the full teacher itself."""
        import torch

        if samples.reference is None:
            return {}
        if self._network is None:
            self._network = load_torchscript(self.config.network, self.setting.device)
        size, found = self.config.batch_size, []
        with torch.no_grad():
            for ours, theirs in zip(samples.images.split(size), samples.reference.split(size), strict=True):
                found.append((self._embedded(ours) - self._embedded(theirs)).square().sum(dim=1))
        return {"lpips_to_teacher": float(torch.cat(found).mean())}

    def unscored(self, samples: Samples) -> dict[str, str]:
        """Return the score where there is nothing to compare with."""
        return {} if samples.reference is not None else dict.fromkeys(self.higher_is_better, WITHOUT_TEACHER)

    def _embedded(self, images: Tensor) -> Tensor:
        """Return features (B, F) whose squared distance is the LPIPS."""
        pixels = as_bytes(images).float().to(self.setting.device)
        return lpips_features(self._network, pixels)


@hookimpl
def register_evaluators() -> Sequence[type[Evaluator]]:
    """Return the evaluators of this file."""
    return [InceptionDistance, PerceptualDistance]
