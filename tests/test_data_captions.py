"""From files to captions."""

import pytest
from distill.core.data.samples.captions import SHUFFLES, CaptionRules, caption_key, read_text
from distill.core.errors import UserError
from support.data_helpers import entry


def captions(tmp_path, key="deep/a_red_cat.jpg", text=None, **settings):
    return CaptionRules(entry(tmp_path / "set", **settings)).captions(key, text)


def test_caption_strategies_give_their_captions(tmp_path):
    assert captions(tmp_path, text="\ufeffa cat\n\n  a  small cat \n"[1:]) == ["a cat", "a small cat"]
    assert captions(tmp_path, text="a cat\nin a hat", disable_multiline_split=True) == ["a cat in a hat"]
    assert captions(tmp_path, text=" \n") == []
    assert captions(tmp_path, text=None) == []
    assert captions(tmp_path, caption_strategy="filename") == ["a red cat"]
    assert captions(tmp_path, caption_strategy="instanceprompt", instance_prompt="sks") == ["sks"]
    assert captions(tmp_path, text="a cat", instance_prompt="sks", prepend_instance_prompt=True) == ["sks a cat"]
    assert captions(tmp_path, text="a cat", instance_prompt="sks", only_instance_prompt=True) == ["sks"]
    assert captions(tmp_path, text="a cat\na cat") == ["a cat"]


def test_a_missing_instance_prompt_is_refused(tmp_path):
    for settings in (
        {"caption_strategy": "instanceprompt"},
        {"prepend_instance_prompt": True},
        {"only_instance_prompt": True},
    ):
        with pytest.raises(UserError, match="needs an instance_prompt"):
            captions(tmp_path, **settings)


def test_caption_filters_cut_and_substitute(tmp_path):
    assert captions(tmp_path, text="a cat, watermark, 4k", caption_filter_list=("watermark", ", 4k")) == ["a cat,"[:-1]]
    assert captions(tmp_path, text="a photo of cats", caption_filter_list=(r"s/cats?/dog/", "photo of")) == ["a dog"]
    listed = tmp_path / "filters.txt"
    listed.write_text("red \n\n")
    assert captions(tmp_path, text="a red cat", caption_filter_list=listed) == ["a cat"]
    with pytest.raises(UserError, match="no regular expression"):
        captions(tmp_path, caption_filter_list=("s/(/x/",))
    with pytest.raises(UserError, match="cannot be read"):
        captions(tmp_path, caption_filter_list=tmp_path / "absent.txt")


def test_shuffles_are_fixed_orders_of_the_same_parts(tmp_path):
    made = captions(tmp_path, text="a cat, a hat, a mat, a bat", caption_shuffle=True)
    assert made == captions(tmp_path, text="a cat, a hat, a mat, a bat", caption_shuffle=True)
    assert made[0] == "a cat, a hat, a mat, a bat"
    assert 1 < len(made) <= SHUFFLES
    assert {tuple(sorted(each.split(", "))) for each in made} == {("a bat", "a cat", "a hat", "a mat")}
    assert captions(tmp_path, text="one part", caption_shuffle=True) == ["one part"]


def test_the_identity_changes_with_the_caption_rules(tmp_path):
    def identity(**settings):
        return CaptionRules(entry(tmp_path / "set", **settings)).identity()

    assert identity() == identity(resolution=64)
    assert identity() != identity(caption_strategy="filename")
    assert identity(caption_filter_list=("a",)) != identity(caption_filter_list=("b",))


def test_caption_files_of_all_encodings_are_read_or_refused():
    assert caption_key("a/b.c/d.tar.png") == "a/b.c/d.tar.txt"
    assert read_text("caf\u00e9".encode()) == "caf\u00e9"
    assert read_text("\ufeffcaf\u00e9".encode()) == "caf\u00e9"
    assert read_text("caf\u00e9".encode("utf-16")) == "caf\u00e9"
    with pytest.raises(ValueError, match="not UTF-8"):
        read_text("caf\u00e9".encode("latin-1"))
