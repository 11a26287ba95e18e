"""The state of a run as an observing plugin sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from ..settings.configuration import Configuration
    from .context import Context
    from .family import ModelFamily
    from .method import Method


@dataclass
class RunState:
    """The parts of a run, for observation hooks."""

    config: Configuration
    output_dir: Path
    method: Method
    family: ModelFamily
    context: Context
    networks: dict[str, nn.Module] = field(default_factory=dict)
    step: int = 0
    main: bool = True
    """Whether this process is the one that writes files; hooks run in all."""
    extra: dict[str, Any] = field(default_factory=dict)
    """A place where plugins can keep values, each under its own name."""
