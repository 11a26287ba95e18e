"""No secret of a configuration, an address or the environment is printed, logged, tracked or written."""

from __future__ import annotations

import json

import pytest
from distill.core.config.load import load_configuration
from distill.core.registry.registry import Registry
from distill.core.utils import redaction
from support.config_files import Pair, distill, said
from support.small_run import write_run
from support.tiny_sdxl import write_tiny_sdxl

PASSWORD, SIGNATURE, TOKEN = "hunter2-of-the-test", "5f4dcc3b5aa765d61d83", "hf_abcdefghijklmnopqrstuv"
SECRETS = (PASSWORD, SIGNATURE, TOKEN)


@pytest.fixture(autouse=True)
def _forget():
    yield
    redaction._known.clear()
    redaction._written.clear()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"http://user:{PASSWORD}@host:9000/a", "http://***@host:9000/a"),
        (f"http://user:p@{PASSWORD}@host/a", "http://***@host/a"),
        (f"https://{TOKEN}@host/repo.git", "https://***@host/repo.git"),
        (f"postgresql+psycopg2://me:{PASSWORD}@db/x?sslmode=on", "postgresql+psycopg2://***@db/x?sslmode=on"),
        (f"https://b/x.csv?X-Amz-Date=1&X-Amz-Signature={SIGNATURE}&v=2", "https://b/x.csv?X-Amz-Date=1&X-Amz-Signature=***&v=2"),
        (f"https://b/x?sv=1&sig={SIGNATURE}", "https://b/x?sv=1&sig=***"),
        (f"https://b/x?token={SIGNATURE}#access_token={SIGNATURE}", "https://b/x?token=***#access_token=***"),
        (f"https://b/x?AWSAccessKeyId=AKIA12&Signature={SIGNATURE}", "https://b/x?AWSAccessKeyId=***&Signature=***"),
        (f"https://b/x?X-Goog-Credential=me%40x&api_key={SIGNATURE}", "https://b/x?X-Goog-Credential=***&api_key=***"),
        (f"GET with Authorization: Bearer {SIGNATURE}", "GET with Authorization: Bearer ***"),
        (f"401 for the token {TOKEN}.", "401 for the token ***."),
        ("s3://bucket/a@b/c?d", "s3://bucket/a@b/c?d"),
        ("a cat, 50% off? key=1 of http://host:80/x?seed=3&keys=4", "a cat, 50% off? key=1 of http://host:80/x?seed=3&keys=4"),
        ("mail me@host and see file:///data/x", "mail me@host and see file:///data/x"),
    ],
)  # fmt: skip
def test_texts_are_redacted(text, shown):
    assert redaction.redacted(text) == shown


@pytest.mark.parametrize(
    "key", ["hub_token", "apiKey", "aws_secret_access_key", "db_password", "signing_key", "headers", "COOKIE", "pwd"]
)
def test_keys_that_hold_secrets_are_known_by_name(key):
    assert redaction.is_secret(f"tracker_config.mine.{key}")


@pytest.mark.parametrize(
    "key", ["tokenizer", "max_tokens", "keyword", "monkey", "secretion_rate", "caption_column"][:4]
)
def test_keys_that_only_look_alike_are_shown(key):
    assert not redaction.is_secret(key)


def bucket(**keys):
    return [{"id": "pets", "type": "s3", "aws_bucket_name": "pets", **keys}]


def test_folders_in_the_environment_are_no_secrets(monkeypatch, tmp_path):
    """PWD is the shell's folder, not a password; a file of credentials is named in messages."""
    file = tmp_path / "credentials.json"
    file.write_text("{}")
    monkeypatch.setenv("PWD", "/a/folder/of/mine")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    monkeypatch.setenv("STORE_PASSWORD", "open sesame")
    text = f"/a/folder/of/mine/out, {file}"
    assert redaction.redacted(text) == text
    assert redaction.redacted("it is open sesame") == "it is ***"


def test_config_show_has_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("PETS_PASSWORD", PASSWORD)
    account = {"aws_access_key_id": "AKIAABCDEFGH", "aws_secret_access_key": PASSWORD}
    pair = Pair(tmp_path, data=bucket(aws_endpoint_url=f"http://me:{PASSWORD}@host:9000", **account))
    pair.data.append({"id": "table", "type": "csv", "csv_file": f"https://b/x.csv?X-Amz-Signature={SIGNATURE}"})
    pair.data.append({"id": "text", "type": "s3", "dataset_type": "text_embeds", "aws_bucket_name": "pets",
                      "aws_endpoint_url": "http://you:{env:PETS_PASSWORD}@host:9000"})  # fmt: skip
    pair.write()
    result = distill("config", "show", *pair.options())
    assert result.exit_code == 0, result.stderr
    assert not [secret for secret in SECRETS if secret in result.output]
    pets, table, text = json.loads(result.stdout)["data"]
    assert pets["aws_endpoint_url"] == "http://***@host:9000"
    assert "aws_secret_access_key" not in pets
    assert table["csv_file"] == ["https://b/x.csv?X-Amz-Signature=***"]
    assert text["aws_endpoint_url"] == "http://you:{env:PETS_PASSWORD}@host:9000", (
        "which holds no secret, and is used again"
    )


def test_a_written_configuration_asks_for_the_secret_that_it_does_not_hold(tmp_path):
    pair = Pair(tmp_path, data=bucket(aws_endpoint_url="http://***@host:9000"))
    pair.write()
    result = distill("config", "check", *pair.options())
    assert result.exit_code == 2
    assert "data.pets.aws_endpoint_url = 'http://***@host:9000': has *** in place of a secret" in said(result.stderr)
    assert "--set 'data.pets.aws_endpoint_url=...{env:NAME}...'" in said(result.stderr)
    again = distill("config", "check", *pair.options(), "--set", "data.pets.aws_endpoint_url=http://host:9000")
    assert again.exit_code == 0
    configuration = load_configuration(
        Registry.load(installed=False), config_file=pair.config_file, data_file=pair.data_file, to_train=False
    )
    assert configuration.datasets, "a student of the run is still made use of"


def test_findings_have_no_secret(tmp_path):
    values = {
        "aws_endpoint_url": f"ftp://me:{PASSWORD}@host",
        "aws_secret_access_key": PASSWORD,
        "aws_sesion_token": SIGNATURE,
    }
    pair = Pair(tmp_path, data=bucket(**values))
    pair.config |= {"report_to": "mlflow", "tracker_config": {"mlflow": {"tracking_uri": f"http://me:{PASSWORD}@h"}}}
    pair.write()
    result = distill("config", "check", *pair.options(), "--set", f"hub_tokn={TOKEN}", "--set", "seed=x")
    assert result.exit_code == 2
    assert "tracking_uri = 'http://***@h'" in said(result.stderr)
    assert not [secret for secret in SECRETS if secret in result.output]


LEAKY = f"""
import os
import distill


@distill.hookimpl
def on_step_end(step):
    distill_password = {PASSWORD!r}
    raise RuntimeError("GET http://me:" + distill_password + "@host/x?sig={SIGNATURE} with " + os.environ["HF_TOKEN"])
"""


def test_no_file_of_a_run_has_a_secret(tmp_path, monkeypatch):
    """A run with a publisher and a proxy that have accounts; then one that fails with all of it in its message."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("PETS_PASSWORD", PASSWORD)
    model = write_tiny_sdxl(tmp_path / "model")
    endpoint = "http://me:{env:PETS_PASSWORD}@127.0.0.1:9"
    publisher = {"s3": {"aws_bucket_name": "pets", "aws_endpoint_url": endpoint, "aws_secret_access_key": PASSWORD,
                        "aws_access_key_id": "{env:PETS_PASSWORD}"}}  # fmt: skip
    config = write_run(
        tmp_path, model=model, report_to="tensorboard,wandb", publish_to="s3", publisher_config=publisher,
        tracker_config={"wandb": {"mode": "offline"}}, max_train_steps=1, checkpoint_step_interval=0,
        distillation_config={}, validation_step_interval=0,
    )  # fmt: skip
    good = distill("run", "--config", config)
    assert good.exit_code == 0, good.output
    leaky = tmp_path / "leaky.py"
    leaky.write_text(LEAKY.replace(repr(PASSWORD), 'os.environ["PETS_PASSWORD"]'))
    bad = distill("run", "--config", config, "--output-dir", tmp_path / "bad", f"--plugin={leaky}")
    assert bad.exit_code == 1
    assert "RuntimeError: GET http://***@host/x?sig=*** with ***" in bad.stderr
    assert distill("report", tmp_path / "out").exit_code == 0
    assert not [secret for secret in SECRETS if secret in good.output + bad.output]
    files = [path for folder in ("out", "bad", "cache") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [(path, secret) for path in files for secret in SECRETS if secret.encode() in path.read_bytes()] == []
