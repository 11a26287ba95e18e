"""The evaluators that ship: distance to the teacher's image, distances to the data, agreement with the prompt.

Every score names its feature space. Without downloaded weights there is no Inception network here, hence no "FID".
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.plugin_api.evaluator import EvaluationSetting, Evaluator, Samples
from ..core.plugin_api.hookspecs import hookimpl

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from .miniature_classifier import MiniatureClassifier
    from .scene_judge import SceneJudge

BATCH = 128
CLASSIFIER_FOLDER = "judge"
QUESTIONS = ("things", "nothing_else", "colours", "relation", "place", "time")
"""What the judge of scenes answers, each by itself; the second: is nothing there that the caption does not name?"""
SCENE_SCORES = (*(f"{question}_right_judge" for question in QUESTIONS), "image_quality_judge")
"""Scores that it alone gives."""
FEWEST_DATA = 2
"""Number of images on either side that a distance between distributions needs."""
WITHOUT_TEACHER = "it compares with the full teacher's images, of which there are none"


def too_few_data(setting: EvaluationSetting) -> str | None:
    """Return why no distance to real images can be measured; None where it can, or where that is not known yet."""
    if setting.num_data is not None and setting.num_data < FEWEST_DATA:
        return f"it measures distances to real images, and the data has {setting.num_data or 'none'}"
    return None


def num_compared(samples: Samples) -> int:
    """Return how many images there are on the side, generated or real, that has fewer."""
    return 0 if samples.data is None else min(len(samples.data), len(samples.images))


def fewer_than(wanted: int, count: int) -> str:
    """Return why a distance that needs `wanted` images on either side is not measured with `count`."""
    return f"it needs {wanted:,} images on either side, and there are {count:,}"


class ImageDistance(Evaluator):
    """How far each image is from the full teacher's, made from the same noise: root mean square, pixels in [0, 1]."""

    name: ClassVar[str] = "picture_distance"
    higher_is_better: ClassVar[Mapping[str, bool]] = {"distance_to_teacher_pixels": False}

    def score(self, samples: Samples) -> dict[str, float]:
        """Return the mean over the images; nothing for the full teacher itself."""
        from ..core.evaluation.distances import root_mean_square

        if samples.reference is None:
            return {}
        return {"distance_to_teacher_pixels": float(root_mean_square(samples.images, samples.reference).mean())}

    def unscored(self, samples: Samples) -> dict[str, str]:
        """Return the score where there is nothing to compare with."""
        return {} if samples.reference is not None else dict.fromkeys(self.higher_is_better, WITHOUT_TEACHER)


class FeatureDistance(Evaluator):
    """Distances between generated images and the data in one feature space.

    The Fréchet distance needs more images than features; below that only the kernel distance is given. Where prompts
    come more than once, the diversity of their images is measured in the same space.
    """

    space: str
    """Name of the feature space; part of the scores' names."""

    def __init__(self, config: Any, setting: EvaluationSetting) -> None:
        super().__init__(config, setting)
        self._data: Tensor | None = None
        self._data_features: Tensor | None = None

    @property
    def at_once(self) -> int:
        """Number of images in one pass of the network."""
        return BATCH

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Return features (B, F) of images (B, 3, H, W) in [0, 1]."""

    def _all_features(self, images: Tensor) -> Tensor:
        import torch

        with torch.no_grad():
            return torch.cat([self.features(part).double().cpu() for part in images.split(self.at_once)])

    def both_features(self, samples: Samples) -> tuple[Tensor, Tensor] | None:
        """Return features of the images (N, F) and of the data (M, F), float64; None if there are too few."""
        if samples.data is None or num_compared(samples) < FEWEST_DATA:
            return None
        if self._data is not samples.data or self._data_features is None:
            self._data, self._data_features = samples.data, self._all_features(samples.data)
        return self._all_features(samples.images), self._data_features

    def score(self, samples: Samples) -> dict[str, float]:
        """Return Fréchet and kernel distance to the data; nothing where there is no data."""
        from ..core.evaluation.distances import frechet_distance, kernel_distance, relative_spread

        both = self.both_features(samples)
        if both is None:
            return {}
        features, real = both
        scores = {f"kernel_distance_to_data_{self.space}": kernel_distance(features, real)}
        if min(len(features), len(real)) > features.shape[1]:
            scores[f"frechet_distance_to_data_{self.space}"] = frechet_distance(features, real)
        spread = relative_spread(features, samples.prompts, real)
        return scores if spread is None else {**scores, f"diversity_{self.space}": spread}

    def unscored(self, samples: Samples) -> dict[str, str]:
        """Return distances that want more images, and diversity where no prompt comes twice."""
        distance, count = "{}_distance_to_data_" + self.space, num_compared(samples)
        if count < FEWEST_DATA:
            names = distance.format("kernel"), distance.format("frechet"), f"diversity_{self.space}"
            return dict.fromkeys(names, fewer_than(FEWEST_DATA, count))
        assert self._data_features is not None
        size, reasons = self._data_features.shape[1], {}
        if count <= size:
            reasons[distance.format("frechet")] = f"it needs more than {size:,} images, the number of features"
        if len(set(samples.prompts)) == len(samples.prompts):
            reasons[f"diversity_{self.space}"] = "no prompt comes twice"
        return reasons


class RandomConvolutions(FeatureDistance):
    """Distances in the space of a fixed random convolution network, which needs no weights from anywhere.

    Three levels of random filters of unit gain with a rectifier between them, on images scaled to 64 pixels; of each
    level the mean and the spread of every channel over the image: 3 x 2 x 8 = 48 features of texture and colour.
    """

    name: ClassVar[str] = "random_convolutions"
    space: ClassVar[str] = "random_convolutions"
    higher_is_better: ClassVar[Mapping[str, bool]] = {
        "kernel_distance_to_data_random_convolutions": False,
        "frechet_distance_to_data_random_convolutions": False,
        "diversity_random_convolutions": True,
    }

    EDGE, CHANNELS, LEVELS, SEED = 64, 8, 3, 20231010

    @classmethod
    def usable(cls, setting: EvaluationSetting, config: Any = None) -> str | None:
        """Return None if there are images to measure the distance to, otherwise the reason."""
        return too_few_data(setting)

    def features(self, images: Tensor) -> Tensor:
        """Return mean and spread of every channel of every level, (B, 48)."""
        import torch
        from torch.nn import functional

        edge = (self.EDGE, self.EDGE)
        x = functional.interpolate(images.float(), edge, mode="bilinear", antialias=True, align_corners=False) * 2 - 1
        generator = torch.Generator().manual_seed(self.SEED)
        found = []
        for _ in range(self.LEVELS):
            fan_in = x.shape[1] * 9
            weight = torch.randn(self.CHANNELS, x.shape[1], 3, 3, generator=generator) * (2 / fan_in) ** 0.5
            x = functional.conv2d(x, weight.to(x.device), stride=2, padding=1)
            found += [x.mean(dim=(2, 3)), x.std(dim=(2, 3))]
            x = functional.leaky_relu(x, 0.2)
        return torch.cat(found, dim=1)


class MiniatureClassifierEvaluator(FeatureDistance):
    """Agreement with the prompt, and distances to the data, by the small judge that lies beside a model.

    It is there for models whose folder has ``judge/``: the miniatures that ship with the package. The judge of scenes
    also answers what a prompt asks for question by question, and rates the quality of each image, which a network that
    only looks for things would not see.
    """

    name: ClassVar[str] = "judge"
    space: ClassVar[str] = "judge"
    higher_is_better: Mapping[str, bool] = {
        "prompt_agreement_judge": True,
        **dict.fromkeys(SCENE_SCORES, True),
        "kernel_distance_to_data_judge": False,
        "frechet_distance_to_data_judge": False,
        "diversity_judge": True,
    }

    def __init__(self, config: Any, setting: EvaluationSetting) -> None:
        from .scene_judge import SceneJudge

        super().__init__(config, setting)
        assert setting.model_path is not None
        self._judge = load_judge(setting.model_path / CLASSIFIER_FOLDER)
        self._scene_judge = self._judge if isinstance(self._judge, SceneJudge) else None
        if self._scene_judge is None:
            given = self.higher_is_better.items()
            self.higher_is_better = {name: up for name, up in given if name not in SCENE_SCORES}

    @classmethod
    def usable(cls, setting: EvaluationSetting, config: Any = None) -> str | None:
        """Return None for a local model with a judge in ``judge/``, otherwise the reason."""
        if setting.model_path is None or not (own := setting.model_path / CLASSIFIER_FOLDER).is_dir():
            return f"the model has no folder {CLASSIFIER_FOLDER}/"
        if not (folder := judge_folder(own)).is_dir():
            return f"{own / 'config.json'} names the judge in {folder.resolve()}, which is not there"
        return None

    def features(self, images: Tensor) -> Tensor:
        """Return the judge's penultimate features, (B, F)."""
        return self._judge.features(images)

    def score(self, samples: Samples) -> dict[str, float]:
        """Return the share of images that show all that their prompt says, what else the judge says, the distances."""
        size = len(samples.images)
        parts = [slice(start, start + BATCH) for start in range(0, size, BATCH)]
        right = sum(int(self._judge.agreement(samples.images[part], samples.prompts[part]).sum()) for part in parts)
        scores = {"prompt_agreement_judge": right / size}
        if self._scene_judge is not None:
            scores |= self._answers(self._scene_judge, samples, parts)
        return {**scores, **super().score(samples)}

    @staticmethod
    def _answers(judge: SceneJudge, samples: Samples, parts: Sequence[slice]) -> dict[str, float]:
        import torch

        each = [judge.answers(samples.images[part], samples.prompts[part]) for part in parts]
        scores = {}
        for question in QUESTIONS:
            answers = torch.cat([part[question] for part in each])
            if bool((asked := answers >= 0).any()):
                scores[f"{question}_right_judge"] = float((answers[asked] == 1).float().mean())
        rated = torch.cat([judge.rate(samples.images[part]).cpu() for part in parts])
        return {**scores, "image_quality_judge": float(rated.mean())}


def judge_folder(folder: Path) -> Path:
    """Return the folder itself, or another that its configuration names, as ``{"same_as": "../../other/judge"}``."""
    from .miniature_classifier import CONFIG_NAME

    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    return folder / config["same_as"] if "same_as" in config else folder


def load_judge(folder: Path) -> MiniatureClassifier | SceneJudge:
    """Return the judge of a folder: of scenes where its configuration has words for them, else of single things."""
    from .miniature_classifier import CONFIG_NAME, MiniatureClassifier
    from .scene_judge import SceneJudge

    folder = judge_folder(folder)
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    return (SceneJudge if "words" in config else MiniatureClassifier).from_pretrained(folder)


@hookimpl
def register_evaluators() -> Sequence[type[Evaluator]]:
    """Return the evaluators of this file."""
    return [ImageDistance, RandomConvolutions, MiniatureClassifierEvaluator]
