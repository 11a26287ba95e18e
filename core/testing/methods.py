"""Checks of a method on the closed-form teacher, for every prediction type."""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from ..engine.networks import Networks
from ..engine.returned import roles_of, sampler_of
from ..errors import PluginError, UserError
from ..plugin_api.family import LoraSettings
from ..plugin_api.method import MethodSetup, Requirements, method_parts
from ..registry.registry import Registry
from .checks import ConformanceError, NotApplicable, Subject, expect, failing
from .paths import PATHS, train
from .sampling import distance_to_answer, quantile_noise, sample
from .smooth import QuickContext, SmoothFamily, smooth_batch
from .suite import Named
from .trial import Trial, base_weights, make_trial, own_weights, same

KINDS = ("eps", "v-zero-snr", "x0", "flow-shift")
"""Names of :data:`.paths.PATHS`: eps, v, x0 and flow prediction."""
MODEL_TYPES = ("full", "lora")
LORA = LoraSettings(rank=4, alpha=4.0)
STEPS, HALF, SIZE = 4, 2, 4
"""Optimizer steps of a trial, the step at which it is stopped and resumed, and samples per step."""
MEAN = 0.2
"""The prompt, in the units of the data, whose standard deviation is 0.5."""
LESSONS = ((300, 0.02), (900, 0.02))
"""Steps and learning rate of a training; the second is used where the first was too short."""
ENOUGH, RIGHT = 0.5, 0.15
"""Share of the untrained student's error that may be left, and an error that is always accepted (in units of q)."""
REMEDY = (
    "does it see x0, eps or v through Prediction, rather than the network's raw output? If its teacher takes few, "
    "large steps by default, let Method.example() name finer settings"
)
GUIDANCE = (0.4, 30.0)
"""Guidance scales that a student's mean may correspond to."""


@dataclass
class Bench:
    """A method on the closed-form teacher of one prediction type; results that checks share are computed once.

    Attributes:
        subject: The method.
        path: A name of :data:`KINDS`.
    """

    subject: Subject
    path: str

    @cached_property
    def family(self) -> SmoothFamily:
        """The teacher."""
        kind, schedule = PATHS[self.path]
        return SmoothFamily(schedule, kind)

    @cached_property
    def config(self) -> Any:
        """Settings, with the methods that they name bound."""
        config = self.subject.config()
        _bind(config)
        return config

    @cached_property
    def setup(self) -> MethodSetup:
        """The first type of student that the method does not refuse. Raises NotApplicable."""
        refused = {}
        for model_type in MODEL_TYPES:
            setup = MethodSetup(model_type, self.family.prediction_type)
            try:
                self.subject.cls.requires(self.config, setup)
                roles_of(self.subject.cls, self.config, setup)
            except UserError as error:
                refused[model_type] = error.message
            except PluginError as error:
                raise ConformanceError(str(error)) from error
            else:
                return setup
        raise NotApplicable("; ".join(f"it refuses model_type {kind}: {why}" for kind, why in refused.items()))

    @cached_property
    def needs(self) -> Requirements:
        """The method's requirements. Raises NotApplicable where the closed-form teacher cannot meet them."""
        needs = self.subject.cls.requires(self.config, self.setup)
        if needs.second_time and self.setup.model_type == "lora":
            raise NotApplicable("an adapter with a second time is more than the closed-form network has")
        return needs

    def batch(self, needs: Requirements, step: int, *, size: int = SIZE) -> Any:
        """Return data of the prompt."""
        return smooth_batch(
            self.family.schedule, step, size, mean=MEAN, images=needs.images, points=needs.trajectory_points
        )

    def trial(self, *, seed: int = 0, **settings: Any) -> Trial:
        """Return a trial of the method; `seed` is that of the global generators, which it must not use."""
        assert self.needs is not None
        torch.manual_seed(seed)
        random.seed(seed)
        return make_trial(
            self.family, self.subject.cls, self.config, self.setup.model_type, batch_of=self.batch, total_steps=STEPS,
            lora=LORA, **settings,
        )  # fmt: skip

    @cached_property
    def watched(self) -> tuple[Trial, dict, Path, Any]:
        """A trial of four steps with every update watched, its weights at the start, and its checkpoint on the way."""
        with _quiet(), failing("training", "it must run on any family and any kind of prediction"):
            trial = self.trial(watching=True)
            start = own_weights(trial.networks)
            trial.run(0, HALF)
            keep = tempfile.TemporaryDirectory(prefix="distill-check-")
            trainer = trial.trainer(Path(keep.name))
            trainer.step = HALF
            trainer.save()
            trial.run(HALF, STEPS)
        return trial, start, Path(keep.name), keep


def _bind(config: Any) -> None:
    """Look up the methods that the settings name, as the loader does."""
    parts = [part for _, part in method_parts(config)]
    registry = Registry.load(installed=False) if parts else Registry()
    for part in parts:
        found = registry.get("method", part.method)
        settings = found.Config(**part.config)
        _bind(settings)
        part.bind(found, settings)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings by diffusers about times that it did not choose itself."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def checks(subject: Subject) -> list[Named]:
    """Return checks of the method by itself, then on each prediction type."""
    benches = {path: Bench(subject, path) for path in KINDS}
    found: list[Named] = [("roles and stages fit together", partial(_roles, benches["eps"]))]
    for path, bench in benches.items():
        kind = path.partition("-")[0]
        found += [(f"{name} [{kind}]", partial(check, bench)) for name, check in ON_EVERY_KIND.items()]
    return found


def _roles(bench: Bench) -> None:
    """Check that teacher and student are there, that sources come before their copies, that stages sum to the run."""
    found, config, setup = bench.subject.cls, bench.config, bench.setup
    roles, needs = roles_of(found, config, setup), bench.needs
    names = [role.name for role in roles]
    expect(
        {"teacher", "student"} <= set(names), f"roles() gives {names}", "declare Role('teacher') and Role('student')"
    )
    expect(len(set(names)) == len(names), f"roles() gives a name twice: {names}", "name each role once")
    for role in roles:
        where = f"the role {role.name!r}"
        expect(
            role.source is None or role.source in names[: names.index(role.name)],
            f"{where} is made of {role.source!r}, which does not stand before it", "declare the source first",
        )  # fmt: skip
        expect(
            role.trains == "none" or (role.source is None and role.name != "teacher"),
            f"{where} is trained ({role.trains})", "the teacher, averages and copies stay as they are: trains='none'",
        )  # fmt: skip
    for need, asked in (("guidance_embedding", needs.guidance_embedding), ("second_time", needs.second_time)):
        given = any(getattr(role, need) for role in roles)
        expect(given == asked, f"requires() says {need}={asked}, a role says {given}", "say the same in both")
    again = {role.name: role.build for role in roles_of(found, config, setup)}
    new = [role.name for role in roles if role.auxiliary and role.build != again[role.name]]
    expect(not new, f"the factories of {new} differ from one call of roles() to the next, and terms of a recipe share "
           "networks of equal ones", "give a function of the module, or a frozen dataclass with __call__")  # fmt: skip
    heads = any(role.trains == "head" for role in roles)
    expect(needs.features or not heads, "a role is a head, and requires() asks for no features", "set features=True")
    stages = found.stages(config, total_steps=101)
    length = sum(stage.num_steps for stage in stages)
    expect(length == 101, f"stages() of 101 steps have {length}", "their lengths must sum to total_steps")
    strange = {role for stage in stages for role in [*stage.copy, *stage.copy.values(), *stage.reset]} - set(names)
    expect(not strange, f"stages() name roles that are not there: {sorted(strange)}", "name roles that roles() gives")


# -- on every kind of prediction --------------------------------------------------------------------------------------


def _gradients(bench: Bench) -> None:
    trial, start, _, _ = bench.watched
    trained = set(trial.networks.trained_roles())
    stepped = {taken.role for taken in trial.loop.taken}
    expect(stepped == trained, f"roles {sorted(trained)} are trained, {sorted(stepped)} had updates in {STEPS} steps",
           "yield an Update for each (or let example() make it come sooner)")  # fmt: skip
    for taken in trial.loop.taken:
        gradients = [gradient for gradient in taken.gradients if gradient is not None]
        finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
        expect(finite, f"the gradient of {taken.role!r} is not finite", "look for a division by alpha or sigma of 0")
        moves = sum(float(gradient.square().sum()) for gradient in gradients)
        expect(moves > 0, f"the loss of {taken.role!r} has no gradient", "was the prediction made under no_grad?")
    expect(bench.needs.pixels or not bench.family.decoded, "it decodes, and requires() does not say so",
           "set pixels=True: what decodes is then kept in memory, and counted")  # fmt: skip
    now = own_weights(trial.networks)
    still = [role for role in sorted(trained) if same(start[role], now[role])]
    expect(not still, f"{still} did not move in {STEPS} steps", "yield an Update of each trained role")


def _own_role(bench: Bench) -> None:
    trial = bench.watched[0]
    for taken in trial.loop.taken:
        followers = {name for name, role in trial.networks.roles.items() if role.ema_of == taken.role}
        others = sorted(taken.moved - {taken.role, *followers})
        expect(not others, f"an update of {taken.role!r} moved the weights of {others}",
               "only the engine steps, and only the role that the Update names")  # fmt: skip


def _teacher(bench: Bench) -> None:
    trial = bench.watched[0]
    now = base_weights(trial.networks)
    changed = [name for name, tensor in trial.pristine.items() if not torch.equal(now[name], tensor)]
    own = list(trial.networks.named_parameters("teacher"))
    expect(not changed, f"training changed the teacher's weights ({', '.join(changed)})",
           "the teacher is frozen: step nothing by yourself, and yield updates of other roles alone")  # fmt: skip
    expect(not own, "the teacher has weights of its own to train", "declare Role('teacher') as it is: frozen")


def _accumulation(bench: Bench) -> None:
    whole, parts = bench.watched[0], bench.trial()
    with _quiet(), failing("training in micro-batches", "updates() must be the same function of each micro-batch"):
        parts.run(0, STEPS, parts=SIZE)
    remedy = "the loss must be a mean over samples, and draws must come from context.rng"
    pairs = list(zip(parts.loop.taken, whole.loop.taken, strict=True))
    for ours, theirs in pairs:
        near = abs(ours.loss - theirs.loss) <= 1e-6 * max(abs(theirs.loss), 1e-9)
        expect(near, f"four micro-batches of one gave the loss {ours.loss:.6g}, one of four {theirs.loss:.6g}", remedy)
    ours, theirs = own_weights(parts.networks), own_weights(whole.networks)
    close = [
        role
        for role in ours
        for p, q in zip(ours[role], theirs[role], strict=True)
        if not torch.allclose(p, q, rtol=1e-5, atol=1e-7)
    ]
    expect(not close, f"four micro-batches of one train {sorted(set(close))} otherwise than one of four", remedy)


def _rng(bench: Bench) -> None:
    first, again = bench.watched[0], bench.trial(seed=1)
    with _quiet(), failing("training a second time", "it must not depend on what ran before"):
        again.run(0, STEPS)
    ours, theirs = ([(taken.role, taken.loss) for taken in trial.loop.taken] for trial in (again, first))
    expect(ours == theirs, f"the same seed gave the losses {_short(theirs)} and then {_short(ours)}",
           "draw from context.rng, never from torch.randn, random or numpy")  # fmt: skip


def _resume(bench: Bench) -> None:
    trial, _, folder, _ = bench.watched
    fresh = bench.trial()
    with _quiet(), failing("resuming from a checkpoint", "load_state_dict must take what state_dict returned"):
        trainer = fresh.trainer(folder)
        latest = trainer.store.latest()
        assert latest is not None
        trainer.resume(latest)
        fresh.run(HALF, STEPS)
    later = trial.loop.taken[-len(fresh.loop.taken) :]
    ours, theirs = ([(taken.role, taken.loss) for taken in each] for each in (fresh.loop.taken, later))
    expect(ours == theirs, f"resumed from a checkpoint the losses are {_short(ours)}, without a stop {_short(theirs)}",
           "return whatever decides the future from state_dict, and restore it in load_state_dict")  # fmt: skip
    state, other = fresh.method.state_dict(), trial.method.state_dict()
    equal = state.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in state.items())
    expect(equal, "after resuming, state_dict() is not what it is without a stop", "restore it in load_state_dict")


def _short(losses: list[tuple[str, float]]) -> str:
    return ", ".join(f"{loss:.6g}" for _, loss in losses[:3]) + (", ..." if len(losses) > 3 else "")


def _sampler(bench: Bench) -> None:
    method, schedule = bench.subject.cls(bench.config, bench.setup), bench.family.schedule
    with _quiet(), failing("sampling", "sampler() names a scheduler of diffusers and its settings"):
        samplers = [sampler_of(method, schedule)]
        with suppress(UserError):  # a method may be for some numbers of steps alone
            samplers += [sampler_of(method, schedule, num_inference_steps=3)]
        networks = Networks(
            bench.family, bench.subject.cls.roles(bench.config, bench.setup), lora=LORA, seed=0,
            parameter_dtype=torch.float64,
        )  # fmt: skip
        for sampler in samplers:
            made = _samples(bench, networks, method, sampler)
            expect(made.isfinite().all(), f"{sampler.num_inference_steps} steps of {sampler.scheduler} are not finite",
                   "look at the first time and at the scheduler's settings")  # fmt: skip


def _samples(bench: Bench, networks: Networks, method: Any, sampler: Any) -> torch.Tensor:
    from ..plugin_api.context import Runtime

    assert bench.needs is not None
    context = QuickContext(Runtime(bench.family, networks, seed=0, device=torch.device("cpu")))
    return sample(context, method.result_role(), sampler, quantile_noise(512), mean=MEAN)


def _learns(bench: Bench) -> None:
    """Check that few steps of the student give the data's distribution, at a guidance scale that it may have."""
    found = bench.subject.cls
    if not found.imitates_teacher:
        raise NotApplicable("it does not bring the student to its teacher (imitates_teacher = False)")
    method = found(bench.config, bench.setup)
    with failing("sampling", "sampler() names a scheduler of diffusers and its settings"):
        sampler = sampler_of(method, bench.family.schedule)
    batch = partial(bench.batch, bench.needs, size=64)
    verdict = ""
    for number, (num_steps, lr) in enumerate(LESSONS):
        with _quiet(), failing("training", "it must run on any family and any kind of prediction"):
            if not number:
                roles = found.roles(bench.config, bench.setup)
                networks = Networks(bench.family, roles, lora=LORA, seed=0, parameter_dtype=torch.float64)
                before = distance_to_answer(_samples(bench, networks, method, sampler), mean=MEAN)
            method, networks, _ = train(
                found, bench.config, bench.family, batch, num_steps=num_steps, lr=lr, setup=bench.setup, lora=LORA,
                context_class=QuickContext,
            )  # fmt: skip
            after = distance_to_answer(_samples(bench, networks, method, sampler), mean=MEAN)
        verdict = _verdict(before, after, num_steps)
        if not verdict:
            return
    expect(False, verdict, REMEDY)


def _verdict(before: tuple[float, float], after: tuple[float, float], num_steps: int) -> str:
    """Return the fault of a student, or an empty text."""
    (start, first), (error, guidance) = before, after
    fell = f"from {start:.2f} to {error:.2f} standard deviations in {num_steps} steps"
    if not error <= max(ENOUGH * start, RIGHT):
        return f"the student's error against the exact answer went {fell}, and must fall to {ENOUGH:.0%} of it"
    if not GUIDANCE[0] <= guidance <= GUIDANCE[1]:
        return (
            f"the student's samples have the mean {guidance * MEAN:.2f} for the prompt {MEAN}; the teacher's, guided "
            f"or not, lies between {GUIDANCE[0] * MEAN:.2f} and {GUIDANCE[1] * MEAN:.0f}"
        )
    if error > ENOUGH * start and abs(guidance - first) < 0.5:
        return f"the student learnt nothing: its error went {fell}, and its guidance stayed at {guidance:.1f}"
    return ""


ON_EVERY_KIND = {
    "gradients are finite and every trained role moves": _gradients,
    "an update moves its own role alone": _own_role,
    "the teacher is untouched": _teacher,
    "1x4 micro-batches equal 4x1": _accumulation,
    "random draws come from the seed": _rng,
    "a resumed run is the same run": _resume,
    "its sampler can be run": _sampler,
    "the student learns": _learns,
}
