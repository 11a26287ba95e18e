"""Which changes of a configuration would fit into a memory: tried through the estimate itself, the fewest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING

from ..config.quantisation import BASE, TEACHER
from ..errors import DistillError
from ..utils.memory import MemorySettings, gigabytes, peak
from ..utils.packages import missing
from .activation_memory import run_activations
from .builders import build_family
from .optimizer_memory import state_bytes
from .planned_memory import base_bytes, planned_memory

if TYPE_CHECKING:
    from ..registry.registry import Registry
    from ..settings.configuration import Configuration
    from ..utils.simulated_training import KeptBytes

CARDS = (24, 16, 12, 8)
"""Sizes of graphics cards, in GB."""
SMALL_STATE = 2.5
"""Bytes of state per weight of an optimizer whose moments are of 8 bits, at most."""


@dataclass(frozen=True)
class Change:
    """One change of a configuration.

    Attributes:
        label: The key and its value, as ``--set`` takes it.
        apply: Changes what the memory depends on.
    """

    label: str
    apply: Callable[[MemorySettings], MemorySettings]


@dataclass(frozen=True)
class Choice:
    """Changes of a configuration, and what it takes with them.

    Attributes:
        labels: The changes; none where it stays as it is.
        num_bytes: What the run takes then.
    """

    labels: Sequence[str]
    num_bytes: int


class Verdict:
    """Finds what would make a run fit.

    Args:
        configuration: The run's.
        registry: The run's plugins.
        settings: What its memory depends on.
    """

    def __init__(self, configuration: Configuration, registry: Registry, settings: MemorySettings) -> None:
        self._settings = settings
        self._starts = [(Choice((), 0), settings, list(_changes(configuration, registry, settings)))]
        adapter = _as_adapter(configuration, registry)
        if adapter is not None:
            changed, small = adapter
            label = Choice(("model_type=lora",), 0)
            self._starts.append((label, small, list(_changes(changed, registry, small))))

    def fitting(self, room: float) -> list[Choice]:
        """Return the fewest changes with which the run takes at most `room` bytes: of what is trained as it is, and of
        an adapter in its place; none where nothing does.
        """
        found = [_fewest(settings, changes, room, given.labels) for given, settings, changes in self._starts]
        fits = [one for one in found if one is not None]
        return fits if not fits or fits[0].labels else fits[:1]

    def smallest(self) -> Choice:
        """Return what the run takes with all changes at once that save something."""
        given, settings, changes = self._starts[-1]
        labels = list(given.labels)
        for change in changes:
            if peak(changed := change.apply(settings)) < peak(settings):
                labels = [*(label for label in labels if _key(label) != _key(change.label)), change.label]
                settings = changed
        return Choice(labels, peak(settings))

    def line(self, room: float) -> str:
        """Return the verdict on a memory of `room` bytes that is free."""
        expected = peak(self._settings)
        if expected <= room:
            return f"fits: {gigabytes(expected)} of {gigabytes(room)}"
        return f"does not fit: {gigabytes(expected)} of {gigabytes(room)}; {self._remedy(room)}"

    def card(self, size: int) -> str:
        """Return what a card of `size` GB can do."""
        fits = self.fitting(size * 1e9)
        if fits and not fits[0].labels:
            return f"fits ({gigabytes(fits[0].num_bytes)})"
        return self._remedy(size * 1e9)

    def _remedy(self, room: float) -> str:
        fits = self.fitting(room)
        if fits:
            return "; or ".join(f"{_joined(one.labels)} would ({gigabytes(one.num_bytes)})" for one in fits)
        least = self.smallest()
        return f"nothing tried here would; {_joined(least.labels) or 'as it is'} takes {gigabytes(least.num_bytes)}"


def _key(label: str) -> str:
    return label.partition("=")[0]


def _joined(labels: Sequence[str]) -> str:
    return " with ".join([", ".join(labels[:-1]), labels[-1]]) if len(labels) == 2 else ", ".join(labels)


def _fewest(settings: MemorySettings, changes: Sequence[Change], room: float, given: Sequence[str]) -> Choice | None:
    """Return the fewest changes that fit, the first of the list before later ones."""
    for number in range(len(changes) + 1):
        for chosen in combinations(changes, number):
            changed = settings
            if len({_key(change.label) for change in chosen}) < number:
                continue
            for change in chosen:
                changed = change.apply(changed)
            if (num_bytes := peak(changed)) <= room:
                return Choice((*given, *(change.label for change in chosen)), num_bytes)
    return None


def _as_adapter(configuration: Configuration, registry: Registry) -> tuple[Configuration, MemorySettings] | None:
    """Return the run with an adapter in place of whole networks; None where it has one, or the method takes none."""
    if configuration.run.model_type == "lora":
        return None
    changed = replace(configuration, run=configuration.run.model_copy(update={"model_type": "lora"}))
    try:
        settings = planned_memory(changed, registry)
    except DistillError:
        return None
    return None if settings is None else (changed, settings)


def _changes(configuration: Configuration, registry: Registry, settings: MemorySettings) -> Iterator[Change]:
    """Yield what could be changed, the cheapest in time and quality first."""
    run = configuration.run
    if settings.compute_bytes > 2:
        yield Change("mixed_precision=bf16", partial(_halved, _kept(configuration, registry, mixed_precision="bf16")))
    if not settings.gradient_checkpointing:
        yield Change("gradient_checkpointing=true", lambda one: replace(one, gradient_checkpointing=True))
    if settings.batch > 1:
        steps = run.gradient_accumulation_steps * settings.batch
        label = f"train_batch_size=1 (gradient_accumulation_steps={steps})"
        yield Change(label, lambda one: replace(one, batch=1))
    if settings.optimizer_bytes > SMALL_STATE:
        yield from _optimizers(registry)
    shared = run.model_type == "lora" and settings.quantisable
    if (shared or run.model_type == "full") and run.frozen_base_precision == "no_change":
        yield from _quantizers(configuration, registry, settings, key=BASE if shared else TEACHER)
    if settings.kept is not None and not settings.activation_offload:
        yield Change("activation_offload=true", lambda one: replace(one, activation_offload=True))


def _kept(configuration: Configuration, registry: Registry, **changes: str) -> KeptBytes | None:
    """Return what a sample of the run keeps with these changes of its settings."""
    changed = replace(configuration, run=configuration.run.model_copy(update=changes))
    return run_activations(changed, build_family(changed, registry))


def _halved(kept: KeptBytes | None, settings: MemorySettings) -> MemorySettings:
    return replace(settings, compute_bytes=2, base_bytes=min(settings.base_bytes, 2), kept=kept)


def _optimizers(registry: Registry) -> Iterator[Change]:
    """Yield the first optimizer of 8 bits that is installed, with the learning rates of AdamW."""
    for name in registry.names("optimizer"):
        kind = registry.get("optimizer", name)
        usual, declared = kind.default_learning_rate is None and kind.relative_learning_rate == 1, kind.state_bytes
        if usual and declared is not None and 1.5 < declared <= SMALL_STATE and not missing(kind.packages):
            state = state_bytes(kind(kind.Config()))
            yield Change(f"optimizer={name}", partial(replace, optimizer_bytes=state, trained_bytes=4))
            return


def _quantizers(
    configuration: Configuration, registry: Registry, settings: MemorySettings, *, key: str
) -> Iterator[Change]:
    """Yield the first quantizer of about a byte per weight, and the smallest one, that this machine can use."""
    family = build_family(configuration, registry)
    network, kinds = family.empty_network(), [registry.get("quantizer", name) for name in registry.names("quantizer")]
    usable = [kind for kind in kinds if not missing(kind.packages) and kind.usable(family.settings.device) is None]
    if network is None or not family.capabilities.quantised_base or not usable:
        return
    sizes: dict[str, float] = {}
    for kind in usable:
        changed = replace(configuration, run=configuration.run.model_copy(update={key: kind.name}))
        sizes[kind.name] = base_bytes(changed, registry, network)
    of_a_byte = [kind.name for kind in usable if 0.9 <= kind.bytes_per_weight <= 1.1]
    # the one of a byte that packs most, since it rounds least, and the smallest of all
    for name in dict.fromkeys([*sorted(of_a_byte, key=sizes.__getitem__)[:1], min(sizes, key=sizes.__getitem__)]):
        yield Change(f"{key}={name}", partial(_packed, sizes[name]))


def _packed(bytes_per_weight: float, settings: MemorySettings) -> MemorySettings:
    return replace(settings, base_bytes=min(settings.base_bytes, bytes_per_weight))
