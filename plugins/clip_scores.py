r"""Agreement with the prompt by networks of images and text: the CLIP score, and rewards trained on people's choices.

    CLIP score = 100 max(cos(image, prompt), 0)                     (mean over the images)
    reward     = exp(logit_scale) cos(image, prompt)                (PickScore: a CLIP trained on choices)

References:
    Hessel et al., CLIPScore, arXiv 2104.08718.
    Kirstain et al., Pick-a-Pic (PickScore), arXiv 2305.01569.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.plugin_api import pretrained
from ..core.plugin_api.evaluator import EvaluationSetting, Evaluator, Samples
from ..core.plugin_api.hookspecs import hookimpl
from ..core.settings.types import HubOrPath
from .evaluators import WITHOUT_TEACHER

if TYPE_CHECKING:
    from torch import Tensor


class PromptAgreement(Evaluator):
    """The cosine of image and prompt in the space of one network; abstract base of the scores."""

    packages: ClassVar[Mapping[str, str]] = pretrained.PACKAGES
    by_default: ClassVar[bool] = False

    def __init__(self, config: Any, setting: EvaluationSetting) -> None:
        super().__init__(config, setting)
        self.label = pretrained.label_of(config)
        self._loaded: tuple[Any, Any] | None = None

    @classmethod
    def usable(cls, setting: EvaluationSetting, config: Any = None) -> str | None:
        """Return None if the network is available here or on the hub, otherwise the reason."""
        return pretrained.problem(f"evaluator_config.{cls.name}.model", config or cls.Config())

    def _network(self) -> tuple[Any, Any]:
        if self._loaded is None:
            self._loaded = pretrained.load(self.config, self.setting.device)
        return self._loaded

    def cosines(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosine of each image and its prompt, shape (N,), float64."""
        import torch

        from ..core.drawing.grid import to_images

        (model, processor), size, found = self._network(), self.config.batch_size, []
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            words = processor.tokenizer(list(prompts[part]), padding=True, truncation=True, return_tensors="pt")
            seen = pretrained.pixels(processor, to_images(images[part]), self.setting.device)
            with torch.no_grad():
                output = model(pixel_values=seen, **words.to(self.setting.device))
            # transformers gives both embeddings normed
            found.append((output.image_embeds.double() * output.text_embeds.double()).sum(-1).cpu())
        return torch.cat(found)


class ClipScore(PromptAgreement):
    """How well images match their prompts, by a CLIP: 100 times the cosine, not below 0, on average."""

    name: ClassVar[str] = "clip_score"

    class Config(pretrained.PretrainedConfig):
        """Which CLIP to use; scores of different ones do not compare."""

        model: HubOrPath | None = "openai/clip-vit-large-patch14"
        """Hub id or local folder of a CLIP of transformers, with safetensors."""

    def __init__(self, config: Any, setting: EvaluationSetting) -> None:
        super().__init__(config, setting)
        self.higher_is_better = {f"clip_score_{self.label}": True}

    def score(self, samples: Samples) -> dict[str, float]:
        """Return the mean over the images."""
        cosines = self.cosines(samples.images, samples.prompts)
        return {f"clip_score_{self.label}": float(100 * cosines.clamp(min=0).mean())}


class Reward(PromptAgreement):
    """Predicted human preference for images, by a CLIP that was trained on people's choices (PickScore).

    Beside the reward: the probability that the student's image is chosen over the full teacher's of the same noise.
    """

    name: ClassVar[str] = "reward"

    class Config(pretrained.PretrainedConfig):
        """Which network to use: a CLIP whose scaled cosine is a reward."""

        model: HubOrPath | None = "yuvalkirstain/PickScore_v1"
        """Hub id or local folder of a CLIP of transformers that was trained on choices, with safetensors."""

    def __init__(self, config: Any, setting: EvaluationSetting) -> None:
        super().__init__(config, setting)
        self.higher_is_better = {f"reward_{self.label}": True, f"chosen_over_teacher_{self.label}": True}
        self._reference: tuple[Tensor, Tensor] | None = None

    def score(self, samples: Samples) -> dict[str, float]:
        """Return the mean reward, and the mean probability of being chosen over the teacher's image."""
        rewards = self._rewards(samples.images, samples.prompts)
        scores = {f"reward_{self.label}": float(rewards.mean())}
        if samples.reference is None:
            return scores
        if self._reference is None or self._reference[0] is not samples.reference:
            self._reference = samples.reference, self._rewards(samples.reference, samples.prompts)
        chosen = (rewards - self._reference[1]).sigmoid()  # softmax of the two rewards
        return {**scores, f"chosen_over_teacher_{self.label}": float(chosen.mean())}

    def unscored(self, samples: Samples) -> dict[str, str]:
        """Return the comparison with the teacher where there is nothing to compare with."""
        missing = samples.reference is None
        return {f"chosen_over_teacher_{self.label}": WITHOUT_TEACHER} if missing else {}

    def _rewards(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        cosines = self.cosines(images, prompts)
        return self._network()[0].logit_scale.double().exp().cpu() * cosines


@hookimpl
def register_evaluators() -> Sequence[type[Evaluator]]:
    """Return the evaluators of this file."""
    return [ClipScore, Reward]
