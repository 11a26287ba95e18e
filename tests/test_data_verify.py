"""Caches against what the datasets need: damaged, missing and orphaned entries, and what removing them leaves."""

from support.data_helpers import FakeFamily, entry, fill, pipeline, take
from test_data_pipeline import MIXED, by_position


def found(data):
    return {
        (each.name, len(each.cache)): (each.needed, each.missing, each.num_orphaned, len(each.damaged))
        for each in data.cache_states()
    }


def test_cache_entries_are_counted_as_needed_missing_or_orphaned(tmp_path):
    folder, other = fill(tmp_path / "set", MIXED), fill(tmp_path / "other", [(32, 32)] * 3, start=20)
    settings = {"cache_dir_vae": None, "write_batch_size": 4}
    one, two = entry(folder, **settings), entry(other, **settings)
    pipeline(one, two, root=tmp_path)[0].prepare()
    both = pipeline(one, two, root=tmp_path)[0]
    assert found(both) == {
        ("latents of 'set'", 10): (10, 0, 0, 0), ("latents of 'other'", 3): (3, 0, 0, 0),
        ("captions of 'set', 'other'", 13): (13, 0, 0, 0),
    }  # fmt: skip
    (folder / "000.png").unlink()
    pipeline(one, root=tmp_path, family=FakeFamily(vae="v2"))[0].prepare()  # another autoencoder, for nine images
    shard = max((tmp_path / "cache" / "vae" / "other").rglob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    alone, said = pipeline(one, root=tmp_path)
    wanted = {
        ("latents of 'set'", 10): (9, 0, 1, 0), ("captions of 'set'", 13): (9, 0, 4, 0),
        ("latents of 'set', not needed", 9): (0, 0, 9, 0), ("latents of 'other', not needed", 0): (0, 0, 0, 1),
    }  # fmt: skip
    assert found(alone) == wanted
    assert any("its checksum is wrong" in line for line in said)
    lines = [statistics_of.line() for statistics_of in alone.cache_states()]
    assert any("9 needed, 0 missing, 1 orphaned" in line for line in lines), lines

    before = by_position([take(alone, 9)])
    assert sum(statistics_of.remove_orphaned() for statistics_of in alone.cache_states()) > 0
    family = FakeFamily()
    after, _ = pipeline(one, root=tmp_path, family=family)
    kept = {name: counts for name, counts in found(after).items() if counts != (0, 0, 0, 0)}
    assert kept == {("latents of 'set'", 9): (9, 0, 0, 0), ("captions of 'set'", 9): (9, 0, 0, 0)}
    assert by_position([take(after, 9)]) == before
    assert not family.batches
    assert not family.prompts


def test_a_changed_setting_makes_new_entries_missing_and_old_ones_orphaned(tmp_path):
    folder = fill(tmp_path / "set", MIXED)
    pipeline(entry(folder), root=tmp_path)[0].prepare()
    for settings, latents, captions in (
        ({"resolution": 48}, (10, 10, 10), (10, 0, 0)),
        ({"crop": True}, (10, 5, 5), (10, 0, 0)),
        ({"random_flip": True}, (20, 10, 0), (10, 0, 0)),
        ({"caption_filter_list": ("image",)}, (10, 0, 0), (10, 10, 10)),
        ({"caption_strategy": "instanceprompt", "instance_prompt": "one"}, (10, 0, 0), (1, 1, 10)),
        ({"prepend_instance_prompt": True, "instance_prompt": "a"}, (10, 0, 0), (10, 10, 10)),
    ):
        data, _ = pipeline(entry(folder, **settings), root=tmp_path)
        assert [each[:3] for each in found(data).values()] == [latents, captions], settings
