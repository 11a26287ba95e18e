"""Scores by networks from elsewhere: tiny ones of the same kind, saved and loaded, against formulas worked by hand."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from distill.core.cli import app
from distill.core.config.load import load_configuration
from distill.core.errors import DistillError
from distill.core.evaluation.distances import polynomial_distance
from distill.core.evaluation.evaluate import Scorers
from distill.core.evaluation.evaluators import build_evaluators, evaluation_notices
from distill.core.plugin_api import pretrained
from distill.core.plugin_api.evaluator import EvaluationSetting, Evaluator, Samples
from distill.core.registry.registry import Registry
from distill.plugins.clip_scores import ClipScore, Reward
from distill.plugins.torchscript_scores import InceptionDistance, PerceptualDistance
from distill.plugins.vision_features import VisionFeatures
from support.finished_run import write_finished_run
from support.small_run import execute, write_run
from support.tiny_clip import EDGE, write_tiny_clip
from typer.testing import CliRunner

ANYWHERE = EvaluationSetting(model_path=None)
PROMPTS = ["a red fox", "two boats", "a fox"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("networks") / "Tiny-CLIP")


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> Path:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("networks") / "dinov2-tiny"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Dinov2Config(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
        Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_mean=[0.5] * 3, image_std=[0.25] * 3
    ).save_pretrained(folder)
    return folder


def random_images(count: int, *, seed: int = 0, edge: int = EDGE) -> torch.Tensor:
    """Images that 8 bits hold exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, edge, edge), generator=generator).float() / 255


def make(kind, setting=ANYWHERE, **config) -> Evaluator:
    return kind(kind.Config(**config), setting)


# -- image and prompt ------------------------------------------------------------------------------------------------


def cosines(folder: Path, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """By the network's two halves, in float64, with the processing and the norms written out."""
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder).eval().double()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64)[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64)[:, None, None]
    tokens = CLIPTokenizer.from_pretrained(folder)(prompts, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        seen = model.visual_projection(model.vision_model((images.double() - mean) / std).pooler_output)
        read = model.text_projection(model.text_model(**tokens).pooler_output)
    return (seen * read).sum(1) / (seen.square().sum(1) * read.square().sum(1)).sqrt()


def test_the_clip_score_is_a_hundred_cosines_and_never_below_nothing(clip):
    images, expected = random_images(3), cosines(clip, random_images(3), PROMPTS)
    assert expected.min() < 0 < expected.max(), "both cases are there"
    evaluator = make(ClipScore, model=str(clip), batch_size=2)
    (score,) = evaluator.score(Samples(images, PROMPTS)).items()
    assert score[0] == "clip_score_tiny_clip"
    assert score[1] == pytest.approx(float(100 * expected.clamp(min=0).mean()), abs=1e-4)
    assert evaluator.higher_is_better == {"clip_score_tiny_clip": True}


def test_a_reward_is_the_scaled_cosine_and_is_compared_with_the_teachers(clip):
    ours, theirs = random_images(3), random_images(3, seed=1)
    evaluator = make(Reward, model=str(clip), label="liking")
    found = evaluator.score(Samples(ours, PROMPTS, theirs))
    rewards, reference = (10 * cosines(clip, images, PROMPTS) for images in (ours, theirs))
    assert found["reward_liking"] == pytest.approx(float(rewards.mean()), abs=1e-4)
    chosen = torch.softmax(torch.stack([rewards, reference]), dim=0)[0]
    assert found["chosen_over_teacher_liking"] == pytest.approx(float(chosen.mean()), abs=1e-5)
    assert evaluator.score(Samples(theirs, PROMPTS)) == {
        "reward_liking": pytest.approx(float(reference.mean()), abs=1e-4)
    }
    same = evaluator.score(Samples(ours, PROMPTS, ours))
    assert same["chosen_over_teacher_liking"] == 0.5


def test_long_prompts_are_cut_and_other_sizes_are_scaled(clip):
    evaluator = make(ClipScore, model=str(clip))
    found = evaluator.score(Samples(random_images(1, edge=48), ["fox " * 100]))
    assert math.isfinite(found["clip_score_tiny_clip"])


# -- features ----------------------------------------------------------------------------------------------------------


def test_distances_in_given_features_are_those_of_the_networks_output(dino):
    from transformers import Dinov2Model

    ours, data = random_images(12, edge=28), random_images(15, seed=1, edge=28)
    evaluator = make(VisionFeatures, model=str(dino), batch_size=5)
    found = evaluator.score(Samples(ours, ["a"] * 12, data=data))
    model = Dinov2Model.from_pretrained(dino).eval()
    with torch.no_grad():
        a, b = (model((images - 0.5) / 0.25).pooler_output.double().numpy() for images in (ours, data))
    mean = ((a.mean(0) - b.mean(0)) ** 2).sum()
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    # the trace of the root of a product is the sum of the roots of its eigenvalues
    cross = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0)).sum()
    frechet = mean + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    assert found["frechet_distance_to_data_dinov2_tiny"] == pytest.approx(frechet, rel=1e-3)
    assert set(found) == set(evaluator.higher_is_better)
    same = evaluator.score(Samples(data, ["a"] * 15, data=data))
    assert same["frechet_distance_to_data_dinov2_tiny"] == pytest.approx(0, abs=1e-9)
    assert same["kernel_distance_to_data_dinov2_tiny"] < found["kernel_distance_to_data_dinov2_tiny"]


def test_of_a_clip_the_projected_image_is_the_feature(clip):
    """Which lies in the space of the prompts: its cosine with one is that of the CLIP score."""
    from transformers import CLIPModel, CLIPTokenizer

    evaluator, images = make(VisionFeatures, model=str(clip)), random_images(2)
    with torch.no_grad():
        found = evaluator.features(images).double()
        model = CLIPModel.from_pretrained(clip).eval()
        tokens = CLIPTokenizer.from_pretrained(clip)(PROMPTS[:2], padding=True, return_tensors="pt")
        read = model.text_projection(model.text_model(**tokens).pooler_output).double()
    assert found.shape == (2, 24)
    cosine = torch.nn.functional.cosine_similarity(found, read)
    torch.testing.assert_close(cosine, cosines(clip, images, PROMPTS[:2]), rtol=0, atol=1e-5)


# -- the networks of FID and LPIPS -------------------------------------------------------------------------------------


class Inception(torch.nn.Module):
    """Called as the published file is: images of 8 bits, and 2048 features."""

    def __init__(self, num_features: int = 2048):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(12, num_features, generator=generator))

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert img.dtype == torch.uint8
        x = torch.nn.functional.adaptive_avg_pool2d((img.float() - 128) / 128, 2).flatten(1)
        return torch.relu(x @ self.weight) if return_features else x


class Vgg(torch.nn.Module):
    def forward(self, img: torch.Tensor, resize_images: bool = True, return_lpips: bool = False) -> torch.Tensor:
        assert not resize_images
        assert img.max() > 1
        return img.flatten(1) / 255.0 if return_lpips else img


def script(module: torch.nn.Module, path: Path) -> Path:
    torch.jit.script(module).save(path)
    return path


def test_fid_and_kid_are_those_of_the_features_by_explicit_sums(tmp_path):
    network = script(Inception(), tmp_path / "inception-2015-12-05.pt")
    ours, data = random_images(5), random_images(4, seed=1)
    few = make(InceptionDistance, network=network, batch_size=2)
    samples = Samples(ours, ["a"] * 5, data=data)
    assert set(few.score(samples)) == {"kid"}, "a FID of so few images says nothing"
    found = make(InceptionDistance, network=network, fewest_pictures=4).score(samples)
    a, b = (Inception()((x * 255).round().byte(), return_features=True).double() for x in (ours, data))

    def kernel(x, y):
        return (float(x @ y) / 2048 + 1) ** 3

    within = [np.mean([kernel(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j]) for s in (a, b)]
    across = np.mean([kernel(x, y) for x in a for y in b])
    assert found["kid"] == pytest.approx(sum(within) - 2 * across, rel=1e-6)
    # of so few images the product of the covariances has the eigenvalues of a small matrix, and else zeros
    x, y = ((s - s.mean(0)) / (len(s) - 1) ** 0.5 for s in (a, b))
    cross = torch.linalg.eigvals(y @ x.T @ x @ y.T).real.clamp(min=0).sqrt().sum()
    frechet = (a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum() - 2 * cross
    assert found["fid"] == pytest.approx(float(frechet), rel=1e-5)


def test_the_polynomial_distance_of_two_sets_that_are_known():
    """One feature: k(x, y) = (xy + 1)^3 with the pairs written out."""
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    assert polynomial_distance(a, b) == pytest.approx(1 + 27 - 2 * (1 + 1 + 8 + 27) / 4)


def test_lpips_is_the_squared_distance_in_the_networks_space(tmp_path):
    network = script(Vgg(), tmp_path / "vgg16.pt")
    ours, theirs = random_images(3), random_images(3, seed=1)
    evaluator = make(PerceptualDistance, network=network, batch_size=2)
    expected = float((ours - theirs).square().flatten(1).sum(1).mean())
    assert evaluator.score(Samples(ours, PROMPTS, theirs)) == {"lpips_to_teacher": pytest.approx(expected, rel=1e-5)}
    assert evaluator.score(Samples(ours, PROMPTS, ours)) == {"lpips_to_teacher": 0}
    assert evaluator.score(Samples(ours, PROMPTS)) == {}


def test_only_the_inception_network_makes_a_fid(tmp_path):
    samples = Samples(random_images(3), PROMPTS, data=random_images(3))
    other = script(Inception(64), tmp_path / "other.pt")
    with pytest.raises(DistillError, match="64 features, not 2048"):
        make(InceptionDistance, network=other).score(samples)
    (tmp_path / "text.pt").write_text("not a network")
    with pytest.raises(DistillError, match="no TorchScript file"):
        make(InceptionDistance, network=tmp_path / "text.pt").score(samples)


# -- what cannot be had ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [
        (ClipScore, {}, "HF_HUB_OFFLINE is set (download it once (hf download openai/clip-vit-large-patch14)"),
        (Reward, {}, "PickScore_v1"),
        (VisionFeatures, {"model": None}, "evaluator_config.features.model"),
        (VisionFeatures, {"model": "./nowhere"}, "./nowhere is not there"),
        (InceptionDistance, {}, "inception-2015-12-05.pt and name the file (evaluator_config.fid.network)"),
        (PerceptualDistance, {"network": "nowhere.pt"}, "'nowhere.pt' is not there (download https://"),
    ],
)
def test_without_its_weights_an_evaluator_says_why_and_what_to_do(kind, config, reason, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = kind.usable(ANYWHERE, kind.Config(**config)) or ""
    assert reason.removesuffix(")") in said.replace(", or name a local folder", "")


def test_a_folder_must_hold_safetensors_and_the_hub_must_answer(clip, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    assert ClipScore.usable(ANYWHERE, ClipScore.Config(model=str(clip))) is None
    bare = Path(shutil.copytree(clip, tmp_path / "bare"))
    (bare / "model.safetensors").unlink()
    assert "no model.safetensors" in (ClipScore.usable(ANYWHERE, ClipScore.Config(model=str(bare))) or "")
    assert "distances to real images" in (
        VisionFeatures.usable(EvaluationSetting(None, num_data=1), VisionFeatures.Config(model=str(clip))) or ""
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    seen = []

    def answer(files):
        def model_info(self, name, *, revision, timeout):
            seen.append((name, timeout))
            if files is None:
                raise ConnectionError("no route")
            return huggingface_hub.ModelInfo(id=name, siblings=[{"rfilename": file} for file in files])

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
        return ClipScore.usable(ANYWHERE, ClipScore.Config(model="labs/clip"))

    assert "ConnectionError: no route (download it once" in (answer(None) or "")
    assert "only safetensors are read" in (answer(["pytorch_model.bin"]) or "")
    assert answer(["model.safetensors", "preprocessor_config.json"]) is None
    assert seen == [("labs/clip", pretrained.SECONDS)] * 3


# -- in a run, and by the command --------------------------------------------------------------------------------------


def test_they_are_used_where_they_are_named_or_have_settings(tmp_path, clip):
    registry = Registry.load(installed=False)
    usual = ["judge", "picture_distance", "random_convolutions"]
    cases = [({}, usual), ({"evaluator_config": {"clip_score": {"model": str(clip)}}}, [*usual, "clip_score"]),
             ({"evaluators": ["lpips"], "evaluator_config": {"clip_score": {}}}, ["lpips"])]  # fmt: skip
    for number, (settings, names) in enumerate(cases):
        file = write_run(tmp_path, output=f"out{number}", **settings)
        configuration = load_configuration(registry, config_file=file)
        assert list(configuration.evaluators) == names
        (tmp_path / "again.json").write_text(json.dumps(configuration.resolved()))
        again = load_configuration(registry, config_file=tmp_path / "again.json")
        assert sorted(again.evaluators) == sorted(names), "the resolved file says the same"


def test_a_run_says_at_its_start_what_it_will_not_score_and_scores_the_rest(tmp_path, clip):
    settings = {
        "evaluation_num_samples": 2,
        "evaluation_steps": [1],
        "max_train_steps": 1,
        "validation_step_interval": 0,
    }
    config = {"clip_score": {"model": str(clip)}, "lpips": {}}
    result, lines = execute(write_run(tmp_path, evaluator_config=config, **settings))
    told = next(line for line in lines if "evaluator lpips cannot be used" in line)
    assert told.startswith("warning: ")
    assert "vgg16.pt" in told
    assert lines.index(told) < next(n for n, line in enumerate(lines) if line.startswith("report on dataset"))
    assert not any("judge cannot" in line for line in lines), "what nobody asked for is no warning"
    found = json.loads((result.output_dir / "evaluation.json").read_text())
    assert all(0 <= row["scores"]["clip_score_tiny_clip"] <= 100 for row in found["rows"])
    assert found["higher_is_better"]["clip_score_tiny_clip"] is True
    assert "lpips" in found["left_out"]
    assert "clip score tiny clip ↑" in (result.student / "README.md").read_text()
    events = b"".join(path.read_bytes() for path in (result.output_dir / "tensorboard").rglob("events*"))
    assert b"clip_score_tiny_clip" in events


def test_the_command_takes_names_and_settings_and_refuses_what_cannot_be_used(tmp_path, clip):
    output = write_finished_run(tmp_path)
    few = ["--steps", "1", "--teacher-steps", "2", "--num-samples", "2"]

    def evaluate(*arguments: str):
        return CliRunner().invoke(app, ["evaluate", str(output), *few, *arguments])

    done = evaluate("--evaluators", "clip_score,picture_distance", "--set", f"evaluator_config.clip_score.model={clip}")
    assert done.exit_code == 0, done.output
    rows = json.loads((output / "evaluation.json").read_text())["rows"]
    (student,) = [row for row in rows if row["name"] == "student"]
    assert set(student["scores"]) == {"clip_score_tiny_clip", "distance_to_teacher_pixels"}
    (output / "evaluation.json").unlink()
    for names, reason in {
        "lpips,clip_score": "lpips: it needs its network",
        "clip_scor": "did you mean 'clip_score'",
    }.items():
        done = evaluate("--evaluators", names)
        assert (done.exit_code, reason in done.output) == (2, True), done.output
    assert not (output / "evaluation.json").exists()


def test_an_evaluator_that_fails_costs_its_own_scores_only(tmp_path, clip, said):
    registry = Registry.load(installed=False)
    file = write_run(tmp_path, evaluator_config={"fid": {"network": str(script(Inception(8), tmp_path / "other.pt"))}})
    configuration = load_configuration(registry, config_file=file)
    assert evaluation_notices(registry, configuration) == []
    usable, _ = build_evaluators(registry, configuration, ANYWHERE)
    scorers = Scorers(usable, {})
    samples = Samples(random_images(3), PROMPTS, random_images(3, seed=1), random_images(3, seed=2))
    for _ in range(2):
        assert set(scorers.score(samples)) == {
            "distance_to_teacher_pixels",
            "kernel_distance_to_data_random_convolutions",
        }
    assert "8 features, not 2048" in scorers.left_out["fid"]
    assert len(said) == 1
    assert "warning: evaluator fid failed" in said[0]
