"""The judge of scenes: what it reads in captions, and how it answers from what its network sees."""

from __future__ import annotations

import pytest
import torch
from distill.core.plugin_api.evaluator import EvaluationSetting
from distill.plugins.evaluators import QUESTIONS, MiniatureClassifierEvaluator, load_judge
from distill.plugins.scene_judge import Asked, SceneJudge, Seen, Thing, Words

WORDS = Words(
    kinds=("car", "tree", "fish"),
    colours=("red", "blue"),
    relations={"left of": (-1, 0), "above": (0, -1), "to the right of": (1, 0), "below": (0, 1)},
    locations=("by the sea", "in the snow"),
    times=("by day", "at night"),
)
CELLS, SURE = 16, 8.0


@pytest.mark.parametrize(
    ("caption", "asked"),
    [
        ("a red car left of a tree, at night", Asked((Thing(0, 0), Thing(1, None)), (-1, 0), None, 1)),
        (
            "By day, a fish to the right of a blue car and a red tree by the sea",
            Asked((Thing(2, None), Thing(0, 1), Thing(1, 0)), (1, 0), 0, 0),
        ),
        ("a red boat above a tree", Asked((Thing(1, None),), None, None, None)),
        ("carpets", Asked((), None, None, None)),
    ],
)
def test_captions_are_read(caption, asked):
    assert WORDS.read(caption) == asked


class Eyes(SceneJudge):
    """A judge whose network sees a blue car at the top left, a red tree to its right, the sea, and night."""

    def forward(self, images: torch.Tensor) -> Seen:
        """Return the same for every image."""
        count = len(images)
        kinds, colours = torch.full((count, 3, CELLS, CELLS), -SURE), torch.zeros(count, 2, CELLS, CELLS)
        for kind, colour, x, y in ((0, 1, 3, 4), (1, 0, 11, 6)):
            kinds[:, kind, y, x] = SURE
            colours[:, colour, y, x] = SURE
        place, time = torch.tensor([SURE, 0]).repeat(count, 1), torch.tensor([0, SURE]).repeat(count, 1)
        return Seen(kinds, colours, place, time, torch.full((count,), SURE))


@pytest.mark.parametrize(
    ("caption", "wrong", "open_"),
    [
        ("a blue car left of a red tree by the sea, at night", (), ()),
        ("a car left of a tree", (), ("colours", "place", "time")),
        ("a red car left of a tree", ("colours",), ("place", "time")),
        ("a tree left of a car", ("relation",), ("colours", "place", "time")),
        ("a car above a tree in the snow, by day", ("relation", "place", "time"), ("colours",)),
        ("a blue car by the sea", ("nothing_else",), ("relation", "time")),
        ("a car left of a fish", ("things", "nothing_else", "relation"), ("colours", "place", "time")),
        ("a car left of a blue fish", ("things", "nothing_else", "colours", "relation"), ("place", "time")),
        ("a tree to the right of a car and a fish", ("things",), ("colours", "place", "time")),
    ],
)
def test_each_question_is_answered_by_itself(caption, wrong, open_):
    judge, images = Eyes(WORDS), torch.zeros(1, 3, 64, 64)
    answers = {question: int(value) for question, value in judge.answers(images, [caption]).items()}
    assert answers == {q: 0 if q in wrong else -1 if q in open_ else 1 for q in QUESTIONS}
    assert bool(judge.agreement(images, [caption])) is not bool(wrong)


def test_a_judge_comes_back_from_its_folder(tmp_path):
    torch.manual_seed(0)
    judge = SceneJudge(WORDS, channels=(4, 8, 16)).half().float().eval()
    judge.save_pretrained(tmp_path)
    again = load_judge(tmp_path)
    assert isinstance(again, SceneJudge)
    assert again.words == WORDS
    images = torch.rand(2, 3, 32, 32)  # of another size than its own
    for value, expected in zip(again(images), judge(images), strict=True):
        assert torch.equal(value, expected)
    assert again.features(images).shape == (2, 16)
    assert again.rate(images).shape == (2,)


def test_a_folder_may_name_the_judge_of_another(tmp_path):
    own, setting = tmp_path / "model" / "judge", EvaluationSetting(tmp_path / "model")
    assert "has no folder judge/" in MiniatureClassifierEvaluator.usable(setting)
    own.mkdir(parents=True)
    (own / "config.json").write_text('{"same_as": "../../other/judge"}')
    reason = MiniatureClassifierEvaluator.usable(setting)
    assert str(own / "config.json") in reason
    assert f"{tmp_path / 'other' / 'judge'}, which is not there" in reason
    SceneJudge(WORDS, channels=(4, 8, 16)).save_pretrained(tmp_path / "other" / "judge")
    assert MiniatureClassifierEvaluator.usable(setting) is None
    assert load_judge(own).words == WORDS
