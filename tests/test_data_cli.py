"""`distill cache` on a random tiny SDXL."""

import json

from distill.core.cli import app
from support.small_run import write_run
from typer.testing import CliRunner


def cache(*arguments: str):
    return CliRunner().invoke(app, ["cache", *arguments], catch_exceptions=False)


def test_cache_commands_build_verify_and_clear(tmp_path):
    config = write_run(tmp_path)
    built = cache("build", "--config", str(config))
    assert built.exit_code == 0, built.output
    assert "13 captions and 13 images encoded" in built.output
    assert "everything was cached" in cache("build", "--config", str(config)).output

    verified = cache("verify", "--config", str(config))
    assert verified.exit_code == 0
    assert verified.output.count("13 entries") == 2
    shard = next((tmp_path / "cache" / "vae").rglob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-40] ^= 1
    shard.write_bytes(content)
    damaged = cache("verify", "--config", str(config))
    assert damaged.exit_code == 1
    assert shard.name in damaged.output
    assert "13 images encoded" in cache("build", "--config", str(config)).output

    next(path for path in tmp_path.rglob("*.png") if path.with_suffix(".txt").exists()).unlink()
    assert cache("verify", "--config", str(config)).output.count("1 orphaned") == 2, "an image and its caption"
    assert "freed" in cache("clear", "--orphaned", "--yes", "--config", str(config)).output
    assert "nothing orphaned" in cache("clear", "--orphaned", "--yes", "--config", str(config)).output
    assert "everything was cached" in cache("build", "--config", str(config)).output

    kept = CliRunner().invoke(app, ["cache", "clear", "--config", str(config)], input="n\n")
    assert kept.exit_code == 1
    assert list((tmp_path / "cache").rglob("*.safetensors"))
    cleared = cache("clear", "--config", str(config), "--yes")
    assert cleared.exit_code == 0
    assert not [path for path in tmp_path.glob("**/*.safetensors") if "model" not in path.parts]
    assert "no cache to clear" in cache("clear", "--config", str(config), "--yes").output


def test_no_images_is_the_users_mistake(tmp_path):
    config = write_run(tmp_path)
    (tmp_path / "empty").mkdir()
    data = [{"id": "none", "instance_data_dir": "empty"}]
    (tmp_path / "multidatabackend.json").write_text(json.dumps(data))
    result = cache("build", "--config", str(config))
    assert result.exit_code == 2
    assert "dataset 'none' has no image to train on" in result.output
    assert str(tmp_path / "empty") in result.output
