"""One plugin of several kinds that keeps every promise, for the conformance suite; tests break it, line by line."""

import random
from pathlib import Path

import distill
import torch
from pydantic import Field


class OneStep(distill.Method):
    """The student says in one call where the teacher's path ends."""

    name = "one-step"

    class Config(distill.Method.Config):
        """Settings of the one-step method."""

        teacher_steps: int = Field(8, ge=1, le=1000)
        """Steps of the teacher's path."""

    @classmethod
    def roles(cls, config, setup):
        return [distill.Role("teacher"), distill.Role("student", trains=setup.model_type)]

    @classmethod
    def requires(cls, config, setup):
        return distill.Requirements(finite_snr=True)

    def updates(self, context, batch, step):
        grid = context.grid(self.config.teacher_steps)
        noise = context.rng.randn("noise", batch.latent_shape).to(batch.latents.dtype)
        x, first = noise, grid.times[-1].expand(len(batch))
        with torch.no_grad():
            for t, t_next in zip(grid.times.flip(0), grid.previous.flip(0), strict=True):
                x = context.predict("teacher", x, t.expand(len(batch)), batch.cond).ddim_step(t_next.expand(len(batch)))
        student = context.predict("student", noise, first, batch.cond)
        losses = (student.x0 - x).square().flatten(1).mean(1)
        yield distill.Update("student", losses.mean(), per_sample=losses.detach(), t=first)

    def sampler(self, schedule, *, num_inference_steps=None, guidance_scale=None):
        if schedule.clean_at_zero:
            settings = {"shift": 1.0, "use_dynamic_shifting": False}
            return distill.Sampler("FlowMatchEulerDiscreteScheduler", settings, 1, 0.0, {"sigmas": [1.0]})
        return distill.Sampler("DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False}, 1, 0.0)


class Lines(distill.Tracker):
    """Writes the losses into a text file."""

    name = "lines"

    def __init__(self, config):
        super().__init__(config)
        self.seen = []

    def start(self, run):
        self.file = (run.output_dir / "losses.txt").open("a" if run.resumed_step else "w")

    def log(self, metrics, step):
        for name, value in metrics.items():
            self.seen.append(name)
            self.file.write(f"{step} {name} {value}\n")

    def finish(self, scores=None):
        self.file.close()


class Shelf(distill.DataBackend):
    """The files of a folder."""

    name = "shelf"

    class Config(distill.DataBackend.Config):
        """Where the shelf is."""

        shelf: Path
        """The folder."""

    @classmethod
    def example(cls, folder, files):
        for key, data in files.items():
            (folder / key).parent.mkdir(parents=True, exist_ok=True)
            (folder / key).write_bytes(data)
        return {"shelf": folder}

    def check(self):
        if not self.config.shelf.is_dir():
            raise distill.BadValue("shelf", str(self.config.shelf), "does not exist", "name a folder that does")

    @property
    def location(self):
        return str(self.config.shelf)

    def list(self):
        files = [path for path in self.config.shelf.rglob("*") if path.is_file()]
        keys = sorted(path.relative_to(self.config.shelf).as_posix() for path in files)
        for key in keys:
            status = (self.config.shelf / key).stat()
            yield distill.Entry(key, status.st_size, str(status.st_mtime_ns))

    def open(self, key):
        return (self.config.shelf / key).open("rb")

    def exists(self, key):
        return (self.config.shelf / key).is_file()

    def write(self, key, data):
        (self.config.shelf / key).parent.mkdir(parents=True, exist_ok=True)
        (self.config.shelf / key).write_bytes(data)

    def delete(self, key):
        (self.config.shelf / key).unlink(missing_ok=True)


class Downhill(distill.OptimizerPlugin):
    """Plain gradient descent."""

    name = "downhill"
    honours = frozenset()

    def build(self, parameters, settings):
        return torch.optim.SGD(parameters, lr=settings.learning_rate)


class Brightness(distill.Evaluator):
    """How bright images are."""

    name = "brightness"
    higher_is_better = {"brightness": True}

    def score(self, samples):
        return {"brightness": float(samples.images.mean())}


class Shelved(distill.Publisher):
    """Copies the student to another folder."""

    name = "shelved"

    def problems(self):
        return []

    def publish(self, student):
        raise NotImplementedError


@distill.hookimpl
def register_methods():
    return [OneStep]


@distill.hookimpl
def register_trackers():
    return [Lines]


@distill.hookimpl
def register_data_backends():
    return [Shelf]


@distill.hookimpl
def register_optimizers():
    return [Downhill]


@distill.hookimpl
def register_evaluators():
    return [Brightness]


@distill.hookimpl
def register_publishers():
    return [Shelved]


assert random  # what breaks this file draws from it
