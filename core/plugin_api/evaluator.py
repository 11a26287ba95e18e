"""The contract of an evaluator: scores of generated images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """Images of one sampler at one number of steps.

    Attributes:
        images: Shape (N, 3, H, W), float32 in [0, 1].
        prompts: N prompts.
        reference: The full teacher's images from the same noise and prompts, shape as `images`; None for the teacher
            itself, and at validation, which makes none.
        data: Real images of the data set, shape (M, 3, H, W), or None where there are none.
    """

    images: Tensor
    prompts: Sequence[str]
    reference: Tensor | None = None
    data: Tensor | None = None


@dataclass(frozen=True)
class EvaluationSetting:
    """The facts by which an evaluator decides whether it can be used."""

    model_path: Path | None
    """Local folder of the teacher; None where it is not a folder."""
    device: str = "cpu"
    num_data: int | None = None
    """Number of real images to compare with; None where not yet known."""


class Evaluator(ABC):
    """Turns samples into named scores."""

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[Mapping[str, str]] = {}
    by_default: ClassVar[bool] = True
    """Whether it is used where a run names no evaluators. One that downloads weights is used only when it is named
    (``evaluators``) or has settings (``evaluator_config``).
    """
    higher_is_better: Mapping[str, bool] = {}
    """Score -> whether more is better, for each score that it returns; used in tables."""

    class Config(BaseModel):
        """The evaluator's own settings, under ``evaluator_config.<name>``."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    def __init__(self, config: Any, setting: EvaluationSetting) -> None:
        self.config = config
        self.setting = setting

    @classmethod
    def usable(cls, setting: EvaluationSetting, config: Any = None) -> str | None:
        """Return None if the evaluator can be used here, otherwise the reason why not and how to mend it.

        Called at the start of a run as well, before hours of training, so it must check for all that it needs.

        Args:
            setting: The model and data of the run.
            config: Its own settings; None for the defaults.
        """
        return None

    @abstractmethod
    def score(self, samples: Samples) -> dict[str, float]:
        """Return scores by name, the most telling first."""

    def unscored(self, samples: Samples) -> dict[str, str]:
        """Return the scores that :meth:`score` has left out for these samples, each with the reason."""
        return {}
