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
        reference: The full teacher's images from the same noise and prompts, or None for the teacher itself.
        data: Real images of the data set, shape (M, 3, H, W), or None where there are none.
    """

    images: Tensor
    prompts: Sequence[str]
    reference: Tensor | None = None
    data: Tensor | None = None


@dataclass(frozen=True)
class EvaluationSetting:
    """What an evaluator may look at when it says whether it can be used."""

    model_path: Path | None
    """Local folder of the teacher, or None when it is not a folder."""
    device: str = "cpu"
    num_data: int | None = None
    """Real images that there are to compare with; None where that is not known yet."""


class Evaluator(ABC):
    """Turns samples into named scores."""

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[Mapping[str, str]] = {}
    by_default: ClassVar[bool] = True
    """Whether it is used where a run names no evaluators. One that wants weights from elsewhere is used when it is
    named (``evaluators``) or has settings (``evaluator_config``)."""
    higher_is_better: Mapping[str, bool] = {}
    """For each score it returns: whether more is better (for tables)."""

    class Config(BaseModel):
        """The evaluator's own settings, under ``evaluator_config.<name>``."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    def __init__(self, config: Any, setting: EvaluationSetting) -> None:
        self.config = config
        self.setting = setting

    @classmethod
    def usable(cls, setting: EvaluationSetting, config: Any = None) -> str | None:
        """None when it can be used here, else the reason why not and what to do about it.

        It is asked at the start of a run as well, before hours of training: what it needs it looks for now.

        Args:
            setting: What there is.
            config: Its own settings; None for the defaults.
        """
        return None

    @abstractmethod
    def score(self, samples: Samples) -> dict[str, float]:
        """Scores by name."""
