"""What is said where memory is short: before weights load, while they load, and when images are encoded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from distill.core.errors import DistillError
from distill.core.plugin_api.family import ModelSettings
from distill.core.runs import memory_plan
from distill.core.utils import memory
from distill.model_families.calls import encoders as _encoders
from distill.model_families.sdxl import SDXL
from support.listening import listening
from support.quickstart import command
from support.small_run import execute, write_run
from support.tiny_sdxl import write_tiny_sdxl

QUIET = {"validation_step_interval": 0, "report_to": "none", "max_train_steps": 1}


def test_too_little_free_memory_is_warned_of_before_weights_load(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_plan, "free_memory_bytes", lambda device: 1000)
    config = write_run(tmp_path, **QUIET)
    _, lines = execute(config)
    (warning,) = [line for line in lines if line.startswith("warning: this run is estimated at 6")]
    assert "MB of memory, and 0 MB are free on cpu: it will not fit. What would save how much:" in warning
    assert "\n  half the resolution: about " in warning
    assert lines.index(warning) < next(n for n, line in enumerate(lines) if line.startswith("data ready"))


def test_enough_free_memory_is_no_word_and_doctor_says_how_much(tmp_path):
    config = write_run(tmp_path, **QUIET)
    assert not [line for line in execute(config)[1] if "free on cpu" in line]
    examined = command("doctor", "--config", str(config))
    (line,) = [line for line in examined.out.splitlines() if line.strip().startswith("free") and "on cpu" in line]
    assert "too little" not in line


@pytest.mark.parametrize("part", ["load_network", "on_device", "_text_encoders", "_autoencoder"])
def test_out_of_memory_while_something_loads_says_what_would_save_how_much(tmp_path, monkeypatch, part):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(SDXL, part, fail)
    with listening() as lines, pytest.raises(torch.OutOfMemoryError):
        execute(write_run(tmp_path, train_batch_size=4, **QUIET))
    (hint,) = [line for line in lines if line.startswith("out of memory; this run was estimated at ")]
    assert "\n  train_batch_size=2 (and gradient_accumulation_steps twice as many): about " in hint


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = write_tiny_sdxl(tmp_path_factory.mktemp("model") / "model")
    return SDXL(SDXL.Config(), ModelSettings(str(folder), weight_dtype="float32", device="cpu"))


def counted(family, monkeypatch, *, most: int = 1000):
    """The numbers of images in each call of the autoencoder, which has room for `most` of them."""
    calls, real = [], _encoders.encode_pixels

    def encode(vae, pixels, generator):
        calls.append(len(pixels))
        if len(pixels) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(vae, pixels, generator)

    monkeypatch.setattr(_encoders, "encode_pixels", encode)
    return calls


def test_images_are_encoded_by_what_fits(family, monkeypatch, said):
    pixels = torch.rand(7, 3, 32, 32) * 2 - 1
    draws = [[torch.Generator().manual_seed(number) for number in range(7)] for _ in range(3)]
    whole = family.encode_images(pixels, draws[0])
    calls = counted(family, monkeypatch, most=2)
    torch.testing.assert_close(family.encode_images(pixels, draws[1]), whole)
    assert calls == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert said == [
        f"the autoencoder has no room for so many images: from here on {count} at a time" for count in (3, 1)
    ]
    calls.clear()
    monkeypatch.setattr(family.config, "encoded_pixels_at_once", 2 * 32 * 32)
    torch.testing.assert_close(family.encode_images(pixels, draws[2]), whole)
    assert calls == [2, 2, 2, 1]


def test_one_image_that_does_not_fit_names_the_remedy(family, monkeypatch):
    counted(family, monkeypatch, most=0)
    with pytest.raises(DistillError, match=r"no room for one image of 32x24\n.*family_config\.sdxl\.vae_tiling=true"):
        family.encode_images(torch.zeros(2, 3, 24, 32))


def test_other_errors_of_the_autoencoder_stay_what_they_are(family, monkeypatch):
    vae = SimpleNamespace(device="cpu", dtype=torch.float32, encode=lambda pixels: 1 / 0)
    monkeypatch.setattr(family, "_vae", vae)
    with pytest.raises(ZeroDivisionError):
        family.encode_images(torch.zeros(1, 3, 8, 8))
    assert not memory.is_out_of_memory(ValueError("out of memory"))
