"""One optimizer step for one role: clipping by the true norm, and withholding on the device of bad updates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..plugin_api.optimizer import UpdatePolicy
from ..utils.tensor_tree import optimizer_to_tensors, tensors_to_optimizer


class RoleOptimizer:
    """The optimizer of one role.

    Args:
        optimizer: A torch optimizer over `parameters`.
        parameters: The parameters that it steps.
        learning_rate: Learning rate before the schedule.
        schedule: Factor of the learning rate by optimizer step (counted from 0).
        max_grad_norm: The global norm is clipped to this; 0 switches clipping off.
        scaler: For fp16, else None.
        update_policy: How this optimizer is saved, restored and set aside for evaluation.
    """

    copies_state: ClassVar[bool] = False
    """Whether what :meth:`state_tensors` returns are copies, which later steps do not change."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        *,
        learning_rate: float,
        schedule: Callable[[int], float],
        max_grad_norm: float,
        scaler: torch.amp.GradScaler | None = None,
        update_policy: UpdatePolicy | None = None,
    ) -> None:
        self.optimizer, self.parameters, self.scaler = optimizer, list(parameters), scaler
        self._learning_rate, self._schedule, self._max_grad_norm = learning_rate, schedule, max_grad_norm
        self._fused = bool(optimizer.defaults.get("fused"))
        self._update_policy = update_policy or UpdatePolicy()
        self._fresh: list[dict[str, Any]] | None = None

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of optimizer step `step`."""
        return self._learning_rate * self._schedule(step)

    def reset(self) -> None:
        """Start afresh, without moments and counters."""
        self.optimizer.state.clear()
        for group, fresh in zip(self.optimizer.param_groups, self._at_the_start(), strict=True):
            for key in _settings(group).keys() - fresh.keys():
                del group[key]
            group.update(copy.deepcopy(fresh))

    def _at_the_start(self) -> list[dict[str, Any]]:
        """Return the settings of the parameter groups before anything was stepped or loaded."""
        if self._fresh is None:
            self._fresh = [copy.deepcopy(_settings(group)) for group in self.optimizer.param_groups]
        return self._fresh

    @torch.no_grad()
    def finalize(self) -> None:
        """Make the weights to evaluate the weights for good: later steps start from them."""
        with self.evaluating():
            finalized = [parameter.detach().clone() for parameter in self.parameters]
        for parameter, value in zip(self.parameters, finalized, strict=True):
            parameter.copy_(value)

    def evaluating(self) -> AbstractContextManager[None]:
        """Hold, inside the block, the weights to validate, score and export."""
        return self._update_policy.evaluating(self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that decides the next steps."""
        return self._update_policy.state(self.optimizer)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, bit for bit."""
        self._at_the_start()
        self._update_policy.load(self.optimizer, state)

    def state_tensors(self) -> tuple[dict[str, Tensor], Any]:
        """Return the state that decides the next steps, as flat tensors and JSON values."""
        return optimizer_to_tensors(self.state_dict())

    def load_tensors(self, tensors: Mapping[str, Tensor], meta: Any) -> None:
        """Restore what :meth:`state_tensors` returned, bit for bit."""
        self.load_state_dict(tensors_to_optimizer(tensors, meta))

    def empty_parts(self, shapes: Mapping[str, tuple[torch.Size, torch.dtype]]) -> dict[str, Tensor]:
        """Return empty tensors for those of a saved state that are sharded here; none where nothing is.

        Args:
            shapes: Whole shape and type of each tensor of that state by name.
        """
        return {}

    def gradients_to_average(self) -> list[Tensor]:
        """Return the gradients that are still this process's own, and must be averaged before :meth:`step`."""
        return [p.grad for p in self.parameters if p.grad is not None]

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Accumulate the gradient of `loss` in this role's own parameters and nowhere else.

        Args:
            loss: Of one micro-batch.
            last: Whether it is the last one of the step.
        """
        scaled = self.scaler.scale(loss) if self.scaler else loss
        torch.autograd.backward(scaled, inputs=self.parameters)

    def step(self, step: int, *, healthy: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Clip and step.

        Args:
            step: The optimizer step, for the learning rate.
            healthy: Boolean scalar, False where the loss already was not finite.

        Returns:
            The gradient's norm before clipping, and whether the update was taken; both scalars on the device.
        """
        self._set_learning_rate(step)
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = self._norm(gradients)
        taken = torch.isfinite(norm) if healthy is None else torch.isfinite(norm) & healthy
        if self._max_grad_norm > 0:
            factor = (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, factor)
        self._step_if(taken)
        if self.scaler:
            self.scaler.update()
        self._end()
        return norm, taken

    def _set_learning_rate(self, step: int) -> None:
        self._at_the_start()
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.learning_rate(step))
            else:
                group["lr"] = self.learning_rate(step)

    def _norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return the norm of the whole gradient."""
        return total_norm(gradients)

    def _end(self) -> None:
        """Forget the gradients of the step."""
        self.optimizer.zero_grad(set_to_none=True)

    def _step_if(self, taken: Tensor) -> None:
        if taken.device.type == "cpu":  # nothing to wait for
            if taken:
                self.optimizer.step()
        elif self._fused:  # the kernel itself reads the flag
            self.optimizer.found_inf = (~taken).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        else:
            with restored_unless(taken, self.parameters, self.optimizer):
                self.optimizer.step()


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of a parameter group, counters included; the learning rate is set anew at each step."""
    return {key: value for key, value in group.items() if key not in ("params", "lr")}


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the global 2-norm in at least fp32: bf16 has eight bits, too few for a clipping factor."""
    if not gradients:
        return torch.zeros(())
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients), 2.0, dtype=dtype)))


@contextmanager
def restored_unless(taken: Tensor, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> Any:
    """Undo, on the device, the block's changes to parameters and optimizer state unless `taken` is true.

    For optimizers without a fused kernel that reads the flag. Costs one copy of both inside the block.
    """
    before = {id(p): p.detach().clone() for p in parameters}
    states = {id(t): t.clone() for t in _state_tensors(optimizer)}
    yield
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.where(taken, parameter, before[id(parameter)]))
        for tensor in _state_tensors(optimizer):
            # a state made by this very step starts as zeros
            old = states.get(id(tensor), torch.zeros_like(tensor))
            tensor.copy_(torch.where(taken.to(tensor.device), tensor, old))


def _state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return moments and counters on the device.

    Counters on the host (optimi has one) are left out: undoing them would wait for the device at each step, and one
    more or less of bias correction does not matter.
    """
    found = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return [tensor for tensor in found if tensor.device.type != "cpu"]
