"""Plugins that break one promise each: what stands in ``good_plugin.py``, changed in one place."""

# ruff: noqa: E501 - a fault and its words stand beside each other

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

GOOD = Path(__file__).with_name("good_plugin.py")


@dataclass(frozen=True)
class Broken:
    """A plugin with a fault.

    Attributes:
        changes: (what stands there, what stands there instead), one after the other.
        check: Text of the names of the checks that are run.
        says: Words of the reason that must be given.
        passes: Text of the names of checks that must pass.
    """

    changes: Sequence[tuple[str, str]]
    check: str
    says: Sequence[str]
    passes: str = ""

    def write(self, folder: Path) -> Path:
        """The plugin as a file."""
        text = GOOD.read_text(encoding="utf-8")
        for old, new in self.changes:
            assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the good plugin"
            text = text.replace(old, new)
        path = folder / "broken.py"
        path.write_text(text, encoding="utf-8")
        return path


STEP = '        student = context.predict("student", noise, first, batch.cond)\n'
LOSS = "        losses = (student.x0 - x).square().flatten(1).mean(1)\n"
RAW = """        alpha, sigma = context.schedule.coefficients(first, noise)
        losses = ((noise - sigma * student.output) / alpha.clamp(min=0.05) - x).square().flatten(1).mean(1)
"""
TEACHER = """        for parameter in context._runtime.networks.module("teacher").parameters():
            parameter.data.mul_(0.999)
"""
FORGETFUL = """        self.count = getattr(self, "count", 0) + 1
        losses = losses * self.count
"""
DRAW = 'context.rng.randn("noise", batch.latent_shape).to(batch.latents.dtype)'
NAN = """            if value != value:
                raise ValueError("nan is no number")
"""
HOOK = "@distill.hookimpl\ndef register_methods():"

BROKEN = {
    # -- methods
    "it trains the teacher": Broken([(STEP, TEACHER + STEP)], "teacher is untouched [eps]",
                                    ["training changed the teacher's weights", "step nothing by yourself"]),
    "its teacher is a trained role": Broken(
        [('distill.Role("teacher")', 'distill.Role("teacher", trains="full")')], "roles and stages",
        ["'teacher' is trained (full)", "trains='none'"]),
    "its draws have no seed": Broken([(DRAW, "torch.randn(batch.latents.shape, dtype=batch.latents.dtype)")],
                                     "random draws come from the seed [v]",
                                     ["the same seed gave the losses", "draw from context.rng, never from torch.randn"]),
    "it forgets its state": Broken([(LOSS, LOSS + FORGETFUL)], "a resumed run is the same run [x0]",
                                   ["resumed from a checkpoint the losses are", "state_dict"]),
    "it ignores the kind of prediction": Broken(
        [(LOSS, RAW)], "the student learns [flow]", ["must fall to 50%", "rather than the network's raw output"],
        passes="the student learns [eps]"),
    "it learns nothing": Broken([(LOSS, "        losses = (student.x0 - student.x0.detach()).square().flatten(1).mean(1)\n")],
                                "gradients are finite and every trained role moves [flow]", ["has no gradient"]),
    "its loss is a sum": Broken([("losses.mean(), per", "losses.sum(), per")], "1x4 micro-batches equal 4x1 [eps]",
                                ["four micro-batches of one gave the loss", "must be a mean over samples"]),
    "its scheduler does not exist": Broken([('"DDIMScheduler"', '"DDDIMScheduler"')], "sampler can be run [eps]",
                                           ["'DDDIMScheduler', which diffusers", "name one of its scheduler classes"]),
    "a signature lacks an argument": Broken([("context, batch, step):", "context, batch):")], "signatures",
                                            ["updates(self, context, batch): it lacks 'step'", "as distill.Method does"]),
    "it is abstract": Broken([("    def sampler(self, schedule,", "    def a_sampler(self, schedule,")], "nothing abstract",
                             ["does not define sampler"]),
    # -- settings
    "Config takes unknown keys": Broken(
        [('        """Settings of the one-step method."""', '        """Settings."""\n\n        model_config = {"extra": "allow"}')],
        "Config refuses unknown keys", ["accepts unknown keys (extra='allow')", "misspelt ones are ignored"]),
    "a field has no description": Broken([('        """Steps of the teacher\'s path."""\n', "")],
                                         "every field of Config is described",
                                         ["without a description: teacher_steps", "write a docstring with the unit"]),
    "a number has no limits": Broken([("int = Field(8, ge=1, le=1000)", "int = 8")], "numbers of Config are limited",
                                     ["without a lower limit: teacher_steps", "ge=0"]),
    "the defaults are refused": Broken([("Field(8, ge=1, le=1000)", "Field(0, ge=1, le=1000, validate_default=True)")],
                                       "Config accepts its defaults", ["refuses its own defaults", "teacher_steps"]),
    "there is no docstring": Broken([('    """The student says in one call where the teacher\'s path ends."""\n', "")],
                                    "it has a docstring", ["class OneStep has no docstring of its own"]),
    "the name has spaces": Broken([('"one-step"', '"one step"')], "the name can be",
                                  ["the name 'one step' cannot be written in configurations"]),
    # -- hooks and imports
    "a hook is not marked": Broken([(HOOK, "def register_methods():")], "the registry takes it",
                                   ["register_methods is not decorated", "@distill.hookimpl"]),
    "a hook is misspelt": Broken([("def register_methods()", "def register_method()")], "the registry takes it",
                                 ["there is no hook 'register_method'", "did you mean 'register_methods'"]),
    "a package is imported at once": Broken(
        [('    name = "lines"\n', '    name = "lines"\n    packages = {"mailbox": "mailbox>=1"}\n'),
         ("import torch\n", "import mailbox\n\nimport torch\n")],
        "tracker lines: its packages are imported late", ["importing the plugin imports mailbox", "inside of the functions"]),
    # -- trackers
    "the tracker raises on nan": Broken([("            self.seen.append(name)\n", NAN)], "tracker lines: it takes nan",
                                        ["log({'loss': nan}, 1) raised ValueError: nan is no number"]),
    "the tracker writes elsewhere": Broken([('run.output_dir / "losses.txt"', 'Path("losses.txt")')],
                                           "writes below the output folder",
                                           ["it wrote outside of output_dir", "losses.txt", "below run.output_dir alone"]),
    "instances share what the class holds": Broken(
        [("    def __init__(self, config):\n        super().__init__(config)\n        self.seen = []\n", "    seen = []\n")],
        "tracker lines: ", ["attributes of the class Lines were changed by its use: seen", "in __init__"]),
    # -- backends
    "a missing key is a KeyError": Broken(
        [('        return (self.config.shelf / key).open("rb")',
          '        return {e.key: (self.config.shelf / e.key).open("rb") for e in self.list()}[key]')],
        "what is not there", ["raised KeyError: 'nowhere/no-such-image.png'", "raise FileNotFoundError(key)"]),
    "the listing is never the same": Broken([("keys = sorted(path", "keys = list(path"),
                                             ("        for key in keys:\n", "        random.shuffle(keys)\n        for key in keys:\n")],
                                            "a listing is complete", ["listed again, it is another listing", "sorted order"]),
    "what is read is cut": Broken([('(self.config.shelf / key).open("rb")',
                                    '__import__("io").BytesIO((self.config.shelf / key).read_bytes()[:100])')],
                                  "it reads what is there", ["was read as 100 bytes that differ from the"]),
    "the version never changes": Broken([("str(status.st_mtime_ns)", '"1"'), ("status.st_size, ", "status.st_size * 0 + len(key), ")],
                                        "a listing is complete", ["the size of 'a/002.png' is 9", "bytes of the content"]),
    "a place that is gone is empty": Broken([("if not self.config.shelf.is_dir():", "if False:")], "a place that is not there",
                                            ["a place that is not there is listed as 0 files", "raise BadValue in check()"]),
    # -- the rest
    "the optimizer does nothing": Broken([("lr=settings.learning_rate", "lr=0.0")], "a step moves the weights",
                                         ["step() left the weights as they were"]),
    "the optimizer climbs": Broken([("lr=settings.learning_rate)", "lr=settings.learning_rate, maximize=True)")],
                                   "the loss of a quadratic", ["must fall to 80%", "step against the gradient"]),
    "a score is not declared": Broken([('{"brightness": float', '{"light": float')], "finite and declared",
                                      ["the score 'light' is not in higher_is_better, which has ['brightness']"]),
    "a score is nan": Broken([("float(samples.images.mean())", 'float("nan")')], "finite and declared",
                             ["the score 'brightness' is nan", "leave out what cannot be measured"]),
    "a score is drawn": Broken([("float(samples.images.mean())", "float(samples.images.mean()) + random.random()")],
                               "same scores", ["the same images got", "draw from a generator with a fixed seed"]),
    "the publisher asks the network": Broken(
        [("        return []\n", '        __import__("socket").create_connection(("192.0.2.1", 80), timeout=1)\n        return []\n')],
        "problems()", ["problems() raised", "no network during this check"]),
}  # fmt: skip
"""Fault -> the plugin that has it."""

BROKEN_FAMILY = '''
import distill
import torch
from distill.model_families.sdxl import SDXL
from support.tiny_sdxl import write_tiny_sdxl


class Tiny(SDXL):
    """A random tiny SDXL."""

    name = "sdxl-tiny"
    miniature = None

    @classmethod
    def example(cls, folder):
        return write_tiny_sdxl(folder, layers_per_block=1)

    {fault}


@distill.hookimpl
def register_families():
    return [Tiny]
'''


def _predict(arguments: str, sign: str = "") -> str:
    given = arguments if arguments.count("for key") or arguments.endswith("cond") else f"{arguments}, cond"
    return (
        "def predict(self, network, x_t, time, cond, *, guidance=None, second_time=None):\n"
        f"        return {sign}super().predict(network, {given}, guidance=guidance, second_time=second_time)"
    )


FAMILIES = {
    "nothing is wrong": ("", "family", []),
    "decode has the wrong shape": (
        "def decode_latents(self, latents):\n        return super().decode_latents(latents)[:, :, ::2]",
        "images are encoded and decoded",
        ["decode_latents() made (2, 3, 16, 32) of (2, 4, 16, 16), not (2, 3, 32, 32)"],
    ),
    "an exported student cannot be loaded": (
        "def export(self, network, folder, info):\n        super().export(network, folder, info)\n"
        '        (folder / "pytorch_lora_weights.safetensors").write_bytes(b"")',
        "makes the same image [lora]",
        ["load_student() raised", "it must read what export() wrote"],
    ),
    "an exported student is another": (
        "def export(self, network, folder, info):\n        from safetensors.torch import load_file, save_file\n"
        "        super().export(network, folder, info)\n"
        '        file = folder / "pytorch_lora_weights.safetensors"\n'
        "        save_file({key: value * 0 for key, value in load_file(file).items()}, file)",
        "makes the same image",
        ["makes an image 0.", "away from the one before", "away from generate()'s"],
    ),
    "tokens cannot be counted": (
        'def count_tokens(self, prompts):\n        return "a tokenizer"(prompts)',
        "the length of prompts",
        ["count_tokens() raised", "it takes a list of texts and loads no weights"],
    ),
    "the adapter is never off": (
        "def predict(self, network, x_t, time, cond, *, guidance=None, second_time=None):\n"
        "        for module in network.modules():\n"
        '            if hasattr(module, "_disable_adapters"):\n'
        "                module._disable_adapters = False\n"
        "        return super().predict(network, x_t, time, cond, guidance=guidance, second_time=second_time)",
        "LoRA off",
        ["with the adapter off the output is not the base's, bit for bit"],
    ),
    "predict ignores the prompt": (
        _predict("x_t, time, {key: value[:1].expand_as(value) for key, value in cond.items()}"),
        "steps",
        ["steps along predict() without guidance end", "the prompt, the time"],
    ),
    "predict ignores the time": (
        _predict("x_t, torch.full_like(time, 999)"),
        "steps",
        ["call the network as the pipeline"],
    ),
    "the time runs the other way": (_predict("x_t, 999 - time"), "steps", ["call the network as the pipeline"]),
    "the output has the wrong sign": (_predict("x_t, time", sign="-"), "steps", ["call the network as the pipeline"]),
    "prompts are encoded otherwise than by the pipeline": (
        "def condition(self, embeds, micro):\n"
        "        return super().condition({key: 1.1 * value for key, value in embeds.items()}, micro)",
        "steps",
        ["what is put around the prompt in encode_prompts()"],
    ),
    "condition() leaves the sizes out": (
        "def condition(self, embeds, micro):\n"
        "        return super().condition(embeds, type(micro)(*[[(0, 0)] * len(micro.target_size)] * 3))",
        "what it says",
        ["condition() ignores the sizes of images, and capabilities.micro_conditioning is True"],
    ),
    "columns come before rows": (
        "def condition(self, embeds, micro):\n"
        "        turned = [[pair[::-1] for pair in each] for each in (micro.original_size, micro.crop_top_left,\n"
        "                  micro.target_size)]\n"
        "        return super().condition(embeds, type(micro)(*turned))",
        "steps",
        ["rows before columns"],
    ),
    "predict ignores the second time": (
        "def predict(self, network, x_t, time, cond, *, guidance=None, second_time=None):\n"
        "        return super().predict(network, x_t, time, cond, guidance=guidance)",
        "what it says",
        ["predict() ignores its second time, and capabilities.second_time is True"],
    ),
    "the pipeline guides in another way": (
        "def guidance_call(self, network, scale):\n"
        '        return super().guidance_call(network, scale) | {"guidance_rescale": 0.7}',
        "guided steps",
        ["with guidance 3 end", "switch off what it does besides"],
    ),
    "uncond is the prompt itself": (
        "def uncond(self, cond):\n        return cond",
        "unconditional",
        ["uncond() is condition() itself"],
    ),
}
"""Fault -> (the method that has it, the checks that are run, words of the reasons)."""
