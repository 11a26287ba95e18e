"""Methods that draw a step of a solver's grid for each sample, uniformly or by the loss seen."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..diffusion.importance import GridDraw, LossHistory
from .method import Method, MethodSetup, Update

if TYPE_CHECKING:
    from torch import Tensor

    from .context import Context

BY_LOSS = "loss"


class DrawsGrid(Method, ABC):
    """A method whose ``Config`` has ``timestep_sampling``, by which :meth:`draw_step` draws.

    The engine gives the losses of all micro-batches and processes that :meth:`student_update` carries to the history
    once the optimizer step is complete, so that all draws of a step go by the same one.
    """

    def __init__(self, config: Any, setup: MethodSetup) -> None:
        super().__init__(config, setup)
        self._history: LossHistory | None = None
        self._saved: Mapping[str, Tensor] = {}

    def draw_step(self, context: Context, num_steps: int) -> GridDraw:
        """Return a step of a grid with `num_steps` for each sample of the micro-batch.

        Args:
            context: The micro-batch's; the draw is named ``index``.
            num_steps: N, the same at every call.
        """
        if self.config.timestep_sampling != BY_LOSS:
            return GridDraw(context.rng.integers("index", num_steps))
        if self._history is None:
            self._history = LossHistory(num_steps)
            if self._saved:
                self._history.load_state_dict(self._saved)
            self._history.to(context.device)
        return self._history.draw(context.rng.uniform("index"))

    @staticmethod
    def student_update(
        draw: GridDraw, losses: Tensor, *, t: Tensor, metrics: Mapping[str, Tensor] | None = None
    ) -> Update:
        """Return the student's update from the samples' losses (B,) at times that were drawn.

        Args:
            draw: The draw of the times.
            losses: With the gradient, shape (B,).
            t: The times in the schedule's units, shape (B,).
            metrics: Scalars to log.
        """
        seen = losses.detach()
        return Update("student", draw.mean(losses), metrics or {}, per_sample=seen, t=t, seen=draw.seen(seen))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the losses that draws go by; nothing where they are uniform."""
        return dict(self._saved) if self._history is None else self._history.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned."""
        if self.config.timestep_sampling == BY_LOSS:
            self._history, self._saved = None, dict(state)
        else:
            super().load_state_dict(state)
