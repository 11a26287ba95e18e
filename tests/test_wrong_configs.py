# ruff: noqa: E501 - a table of one mistake a line
"""Wrong configurations through the real command line: exit code 2, and a message that says how to mend them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from support.config_files import Pair, distill, said

CONFIG, DATA, COMMAND_LINE = "config.json", "multidatabackend.json", "command line"


@dataclass(frozen=True)
class Wrong:
    """One mistake: how it is made, and what the message must say."""

    name: str
    spoil: Callable[[Pair], object]
    file: str
    key: str
    value: str
    remedy: str


def run(**values):
    return lambda pair: pair.config.update(values)


def lcm(**values):
    return lambda pair: pair.config["distillation_config"]["lcm"].update(values)


def pets(**values):
    return lambda pair: pair.data[0].update(values)


def entry(**values):
    return lambda pair: pair.data.append(values)


def alone(text=None, *, name="p.txt", needs_images=False, **values):
    """One dataset of captions alone, read from a file with this text, and a method that needs no images."""

    def spoil(pair):
        if text is not None:
            content = text.encode() if isinstance(text, str) else text
            (pair.folder / name).write_bytes(content)
        pair.data = [{"id": "alone", "dataset_type": "prompts", "prompts_file": name, **values}]
        pair.data = [{key: value for key, value in pair.data[0].items() if value is not None}]
        pair.config |= {"distillation_method": "needy", "distillation_config": {"needs_images": needs_images}}

    return spoil


def table(text=None, *, type="csv", **values):
    """One dataset that is a table, with this text."""

    def spoil(pair):
        if text is not None:
            (pair.folder / "pets.csv").write_text(text)
        pair.data = [{"id": "pets", "type": type, "csv_file": "pets.csv", **values}]
        pair.data = [{key: value for key, value in pair.data[0].items() if value is not None}]

    return spoil


def without(*keys):
    return lambda pair: [pair.config.pop(key) for key in keys]


def flags(*arguments):
    return lambda pair: pair.arguments.extend(arguments)


def override(text):
    return flags("--set", text)


def both(*changes):
    return lambda pair: [change(pair) for change in changes]


def files(**texts):
    """Text of a file that replaces config or data when the pair has been written."""
    return lambda pair: pair.__dict__.setdefault("raw", {}).update(texts)


# fmt: off
WRONG = [
    # typos at each level
    Wrong("typo run", run(lerning_rate=1e-4), CONFIG, "lerning_rate", "0.0001", "did you mean 'learning_rate'"),
    Wrong("typo alias", run(validation_step=5), CONFIG, "validation_step", "5", "did you mean 'validation_"),
    Wrong("key prefix", run(learning=1e-4), CONFIG, "learning = ", "0.0001", "did you mean 'learning_rate'"),
    Wrong("typo method key", lcm(w_mim=1), CONFIG, "distillation_config.lcm.w_mim", "1", "did you mean 'w_min'"),
    Wrong(
        "typo method name",
        run(distillation_config={"lmc": {"w_min": 1}}),
        CONFIG,
        "distillation_config.lmc",
        "{'w_min': 1}",
        "did you mean 'lcm'",
    ),
    Wrong(
        "typo flat method key",
        run(distillation_config={"w_maxi": 3}),
        CONFIG,
        "distillation_config.lcm.w_maxi",
        "3",
        "did you mean 'w_max'",
    ),
    Wrong("typo dataset", pets(caption_stratgy="textfile"), DATA, "data.pets.caption_stratgy", "'textfile'", "'caption_strategy'"),
    Wrong("typo backend key", pets(instance_data_dirs="x"), DATA, "data.pets.instance_data_dirs", "'x'", "'instance_data_dir'"),
    Wrong(
        "typo family key",
        run(model_family="plain-family", family_config={"dept": 3}),
        CONFIG,
        "family_config.plain-family.dept",
        "3",
        "did you mean 'depth'",
    ),
    Wrong(
        "typo tracker key",
        run(report_to="far-tracker", tracker_config={"far-tracker": {"rom": "a"}}),
        CONFIG,
        "tracker_config.far-tracker.rom",
        "'a'",
        "did you mean 'room'",
    ),
    Wrong(
        "typo optimizer key",
        run(optimizer_config={"betas": 3}),
        CONFIG,
        "optimizer_config.adamw.betas",
        "3",
        "",
    ),
    Wrong("typo teacher lora", run(teacher_lora=[{"path": "a/b", "wieght": 1}]), CONFIG, "teacher_lora.0.wieght", "1", "did you mean 'weight'"),
    Wrong("method key in run", run(w_min=3), CONFIG, "w_min", "3", "belongs in distillation_config.lcm.w_min"),
    Wrong("dataset key in run", run(repeats=3), CONFIG, "repeats", "3", "belongs in the data file"),
    Wrong("run key in method", lcm(seed=3), CONFIG, "distillation_config.lcm.seed", "3", "belongs in the run's own keys"),
    # names
    Wrong("method", run(distillation_method="lcn"), CONFIG, "distillation_method", "'lcn'", "did you mean 'lcm'"),
    Wrong("family", run(model_family="sdxll"), CONFIG, "model_family", "'sdxll'", "did you mean 'sdxl'"),
    Wrong("optimizer", run(optimizer="adamw_bf61"), CONFIG, "optimizer", "'adamw_bf61'", "did you mean 'adamw_bf16'"),
    Wrong("tracker", run(report_to="tensorbord"), CONFIG, "report_to", "'tensorbord'", "did you mean 'tensorboard'"),
    Wrong("second tracker", run(report_to="tensorboard,wnadb"), CONFIG, "report_to", "'wnadb'", "did you mean 'wandb'"),
    Wrong("backend", pets(type="lokal"), DATA, "data.pets.type", "'lokal'", "did you mean 'local'"),
    Wrong("evaluator", run(evaluators="images"), CONFIG, "evaluators", "'images'", "registered:"),
    Wrong("publisher", run(publish_to="hubb"), CONFIG, "publish_to", "'hubb'", "did you mean 'hub'"),
    Wrong("flag method", flags("--method", "pcmm"), COMMAND_LINE, "distillation_method", "'pcmm'", "registered:"),
    # types
    Wrong("text for number", run(learning_rate="fast"), CONFIG, "learning_rate", "'fast'", "Learning rate after warm-up"),
    Wrong("truth value for number", run(train_batch_size=True), CONFIG, "train_batch_size", "True", "Samples per micro-batch"),
    Wrong("fraction for whole", run(max_train_steps=10.5), CONFIG, "max_train_steps", "10.5", "Optimizer steps to train for"),
    Wrong("number for truth value", run(gradient_checkpointing=3), CONFIG, "gradient_checkpointing", "3", "must be true or false"),
    Wrong("list for text", run(model_family=["sdxl"]), CONFIG, "model_family", "['sdxl']", "must be a text"),
    Wrong("object for list", run(teacher_lora={"a": 1}), CONFIG, "teacher_lora", "{'a': 1}", "must be a list"),
    Wrong("text for part", run(distillation_config="lcm"), CONFIG, "distillation_config", "'lcm'", "{...}"),
    Wrong("choice", run(mixed_precision="fp8"), CONFIG, "mixed_precision", "'fp8'", "one of 'no', 'fp16', 'bf16'"),
    Wrong("near choice", run(lr_scheduler="cosin"), CONFIG, "lr_scheduler", "'cosin'", "did you mean 'cosine'"),
    Wrong("dataset choice", pets(crop_aspect="round"), DATA, "data.pets.crop_aspect", "'round'", "'square', 'preserve'"),
    Wrong("infinite", run(learning_rate="inf"), CONFIG, "learning_rate", "'inf'", "not a finite number"),
    Wrong("resolution text", run(validation_resolution="1024*1024"), CONFIG, "validation_resolution", "'1024*1024'", "WIDTHxHEIGHT"),
    Wrong("steps list", run(evaluation_steps="1,two"), CONFIG, "evaluation_steps", "'1,two'", "whole number"),
    # limits and units
    Wrong("negative rate", run(learning_rate=-1e-4), CONFIG, "learning_rate", "-0.0001", "must be a number above 0"),
    Wrong("rate in wrong unit", run(learning_rate=1e4), CONFIG, "learning_rate", "10000.0", "at most 10"),
    Wrong("no steps", run(max_train_steps=0), CONFIG, "max_train_steps", "0", "at least 1"),
    Wrong("dropout of 1", run(lora_dropout=1), CONFIG, "lora_dropout", "1", "below 1"),
    Wrong("megapixels as area", pets(resolution=1024, resolution_type="area"), DATA, "data.pets.resolution", "1024", "pixel_area"),
    Wrong("pixels as megapixels", pets(resolution=1.0, resolution_type="pixel"), DATA, "data.pets.resolution", "1.0", "resolution_type to area"),
    Wrong("run in megapixels", run(resolution=1.0), CONFIG, "resolution", "1.0", "resolution_type to area"),
    Wrong("method limit", lcm(num_ddim_timesteps=0), CONFIG, "distillation_config.lcm.num_ddim_timesteps", "0", "at least 1"),
    Wrong("probability", pets(probability=-1), DATA, "data.pets.probability", "-1", "at least 0"),
    # missing files
    Wrong("no images", pets(instance_data_dir="nowhere"), DATA, "data.pets.instance_data_dir", "nowhere", "--set data.pets.instance_data_dir=DIR"),
    Wrong("no model", run(pretrained_model_name_or_path="./missing"), CONFIG, "pretrained_model_name_or_path", "missing", "give a hub id"),
    Wrong("no single file", run(pretrained_model_name_or_path="x.safetensors"), CONFIG, "pretrained_model_name_or_path", "x.safetensors", "that is there"),
    Wrong("no vae", run(pretrained_vae_model_name_or_path="/none/vae"), CONFIG, "pretrained_vae_model_name_or_path", "/none/vae", "give a hub id"),
    Wrong("no teacher lora", run(teacher_lora=[{"path": "./a.safetensors"}]), CONFIG, "teacher_lora.0", "a.safetensors", "that is there"),
    Wrong("no prompts", run(validation_prompt_library="p.json"), CONFIG, "validation_prompt_library", "p.json", "one prompt per line"),
    Wrong("no plugin", run(plugins=["gone.py"]), CONFIG, "plugins", "gone.py", "path of a Python file"),
    Wrong("no data file", flags("--data", "gone.json"), "gone.json", "--data", "gone.json", "distill config init"),
    Wrong("no config file", flags("--config", "gone.yaml"), "gone.yaml", "--config", "gone.yaml", "distill config init"),
    Wrong("no filter list", pets(caption_filter_list="f.txt"), DATA, "data.pets.caption_filter_list", "f.txt", "file that is there"),
    Wrong("no environment", run(tracker_run_name="{env:DISTILL_NOT_SET}"), CONFIG, "tracker_run_name", "{env:DISTILL_NOT_SET}", "export DISTILL_NOT_SET"),
    Wrong("suffix", flags("--data", "/dev/null"), "/dev/null", "--data", "/dev/null", ""),
    # files that cannot be read
    Wrong("broken json", files(config='{"seed": }'), CONFIG, "line 1, column 10", '{"seed": }', "commas"),
    Wrong("repeated key", files(config='{"seed": 1, "seed": 2}'), CONFIG, "seed", "seed", "keep one of the two"),
    Wrong("list as config", files(config="[]"), CONFIG, "--config", "[]", "--data"),
    Wrong("object as data", files(data='{"id": "a"}'), DATA, "data", "{'id': 'a'}", '[{"id": "..."'),
    Wrong("text in data", files(data='["pets"]'), DATA, "data[0]", "'pets'", '{"id": "...", ...}'),
    # contradictions
    Wrong("no length", without("max_train_steps"), CONFIG, "max_train_steps", "None", "--set max_train_steps=1000"),
    Wrong("guidance range", lcm(w_min=12, w_max=3), CONFIG, "distillation_config.lcm.w_min", "12", "raise w_max"),
    Wrong("sizes", pets(minimum_image_size=900, maximum_image_size=500), DATA, "data.pets.minimum_image_size", "900", "raise maximum_image_size"),
    Wrong("run sizes", run(minimum_image_size=900, maximum_image_size=500), CONFIG, "minimum_image_size", "900", "raise maximum_image_size"),
    Wrong("downsample", pets(maximum_image_size=500, target_downsample_size=900), DATA, "data.pets.target_downsample_size", "900", "leave it out"),
    Wrong("aspects", pets(minimum_aspect_ratio=2, maximum_aspect_ratio=1), DATA, "data.pets.minimum_aspect_ratio", "2.0", "raise the other"),
    Wrong("curriculum", pets(start_step=5, end_step=5), DATA, "data.pets.end_step", "5", "raise end_step"),
    Wrong("twice", entry(id="pets", instance_data_dir="images"), DATA, "data.pets.id", "'pets'", "an id of its own"),
    *[
        Wrong(f"id {id!r}", entry(id=id, instance_data_dir="images"), DATA, f"data.{id}.id", id, "not `.` or `..`")
        for id in ("..", ".", "a/b", "../up", "/abs", "a\\b")
    ],
    Wrong("no id", entry(instance_data_dir="images"), DATA, "data.[1].id", "None", "Unique name"),
    Wrong("no dataset left", pets(disabled=True), DATA, "data", "['pets']", "set disabled to false"),
    Wrong("no folder", lambda pair: pair.data[0].pop("instance_data_dir"), DATA, "data.pets.instance_data_dir", "None", "The folder with the images"),
    Wrong("no probability", pets(probability=0), DATA, "data.pets.probability", "0", "above 0"),
    Wrong("caption without prompt", pets(caption_strategy="instanceprompt"), DATA, "data.pets.instance_prompt", "None", "a photo of"),
    Wrong("text cache id", pets(text_embeds="texts"), DATA, "data.pets.text_embeds", "'texts'", "text_embeds entries: none"),
    Wrong("alias and name", run(validation_steps=5, validation_step_interval=7), CONFIG, "validation_steps", "5", "keep validation_step_interval alone"),
    Wrong("switch and key", run(base_offload=True, parallel="replicate"), CONFIG, "base_offload", "True", "keep one of both"),
    Wrong("switch of another kind", run(base_offload="often"), CONFIG, "base_offload", "'often'", "set true, or leave it out"),
    Wrong("rounding and alignment", run(aspect_bucket_rounding=64, aspect_bucket_alignment=8), CONFIG, "aspect_bucket_rounding", "64", "keep aspect_bucket_alignment"),
    Wrong("no such device", run(device="gpu"), CONFIG, "device", "'gpu'", "cuda:0"),
    Wrong("adam without adam", run(optimizer="momentumless", adam_beta1=0.5), CONFIG, "adam_beta1", "0.5", "leave adam_beta1 out"),
    Wrong("optimizer's package", run(optimizer="unbuyable"), CONFIG, "optimizer", "'unbuyable'", "pip install 'no-such-package-anywhere>=1'"),
    Wrong("lora start for full", run(model_type="full", init_lora="a/b", learning_rate=1e-6), CONFIG, "init_lora", "'a/b'", "model_type to lora"),
    Wrong("estimated rate", run(optimizer="prodigy", learning_rate=1e-4), CONFIG, "learning_rate", "0.0001", "set learning_rate to 1"),
    Wrong("two averages", run(optimizer="schedulefree-adamw", use_ema=True), CONFIG, "use_ema", "True", "use_ema to false"),
    # quantisation
    Wrong("quantizer", run(base_model_precision="int8-quanta"), CONFIG, "base_model_precision", "'int8-quanta'", "did you mean 'int8-quanto'"),
    Wrong("quantizer's package", run(base_model_precision="unaffordable", model_family="sdxl"), CONFIG, "base_model_precision", "'unaffordable'", "pip install 'no-such-package-anywhere>=1'"),
    Wrong("quantizer and machine", run(text_encoder_1_precision="not-here", model_family="sdxl"), CONFIG, "text_encoder_1_precision", "no quantum computer; int8-torchao works", "no_change"),
    Wrong("quantised full", run(base_model_precision="int8-torchao", model_family="sdxl", model_type="full", learning_rate=1e-6), CONFIG, "base_model_precision", "only goes with a LoRA", "model_type to lora"),
    Wrong("quantised text of a full model", run(text_encoder_2_precision="nf4-bnb", model_family="sdxl", model_type="full", learning_rate=1e-6), CONFIG, "text_encoder_2_precision", "exported whole", "model_type to lora"),
    Wrong("encoder that is not there", run(text_encoder_3_precision="nf4-bnb", model_family="sdxl"), CONFIG, "text_encoder_3_precision", "quantises 2 text encoders", "no_change"),
    Wrong("family without quantisation", run(base_model_precision="int8-torchao", model_family="plain-family"), CONFIG, "base_model_precision", "does not quantise its base", "no_change"),
    Wrong("forward mode", run(base_model_precision="nf4-bnb", model_family="sdxl", distillation_method="meanflow", distillation_config={"derivative": "exact"}), CONFIG, "base_model_precision", "differentiates the network in forward mode", "int8-torchao"),
    Wrong("group size", run(base_model_precision="int4-torchao", model_family="sdxl", quantizer_config={"int4-torchao": {"group_size": 7}}), CONFIG, "quantizer_config.int4-torchao.group_size", "7", "64"),
    # not in this version
    Wrong("deepspeed", run(deepspeed_config="ds.json"), CONFIG, "deepspeed_config", "'ds.json'", "accelerate"),
    # captions alone
    Wrong("no prompts file", alone(), DATA, "data.alone.prompts_file", "p.txt", "give a file that is there"),
    Wrong("folder as prompts", alone(name="images"), DATA, "data.alone.prompts_file", "images", "into a .txt file"),
    Wrong("empty prompts", alone("\n \n"), DATA, "data.alone.prompts_file", "p.txt", "one prompt per line"),
    Wrong("kind of prompts", alone("x", name="p.tsv"), DATA, "data.alone.prompts_file", "p.tsv", "one prompt per line"),
    Wrong("encoding of prompts", alone(b"a\n\xff"), DATA, "data.alone.prompts_file", "line 2 is not UTF-8", "as UTF-8"),
    Wrong("prompts in objects", alone('[{"caption": "a"}]', name="p.json"), DATA, "data.alone.prompts_file", "entry 1 is", ".jsonl"),
    Wrong("one text as prompts", alone('"a"', name="p.json"), DATA, "data.alone.prompts_file", 'it is "a"', "write a list"),
    Wrong("broken prompts", alone('["a",\n}', name="p.json"), DATA, "data.alone.prompts_file", "line 2, column 1", "write a list"),
    Wrong("broken lines", alone('{"text": "a"}\n{"text": }', name="p.jsonl"), DATA, "data.alone.prompts_file", "line 2, column 10", "one object per line"),
    Wrong("number as prompt", alone('{"text": "a"}\n{"text": 1}', name="p.jsonl"), DATA, "data.alone.prompts_file", "line 2: 'text' is 1", "one object per line"),
    Wrong("near column", alone("captoin,n\na,1\n", name="p.csv"), DATA, "data.alone.caption_column", "p.csv has no column 'caption' or 'text'; it has 'captoin', 'n'", "did you mean 'captoin'"),
    Wrong("column", alone("caption,n\na,1\n", name="p.csv", caption_column="prompt"), DATA, "data.alone.caption_column", "'prompt'", "name one of them"),
    Wrong("commas in prompts", alone("caption\na\nb, c\n", name="p.csv"), DATA, "data.alone.prompts_file", "Row #3", "in double quotes"),
    Wrong("not a table", alone("a", name="p.parquet"), DATA, "data.alone.prompts_file", "Parquet", "write the table again"),
    Wrong("column of lines", alone("a", caption_column="a"), DATA, "data.alone.caption_column", "'a'", "leave caption_column out"),
    Wrong("no place of prompts", alone(prompts_file=None), DATA, "data.alone.instance_data_dir", "None", "The folder with the images"),
    Wrong("two places of prompts", alone("a", instance_data_dir="images"), DATA, "data.alone.prompts_file", "p.txt", "one of the values"),
    Wrong("folder without prompts", alone(prompts_file=None, instance_data_dir="images"), DATA, "data.alone.instance_data_dir", "holds no .txt file", "as prompts_file"),
    Wrong("no folder of prompts", alone(prompts_file=None, instance_data_dir="gone"), DATA, "data.alone.instance_data_dir", "gone", ".txt files"),
    Wrong("aspect of prompts", alone("a", crop_aspect="closest"), DATA, "data.alone.crop_aspect", "'closest'", "other resolutions"),
    Wrong("strategy of prompts", alone("a", caption_strategy="filename"), DATA, "data.alone.caption_strategy", "'filename'", "prepend_instance_prompt"),
    Wrong("prompts of images", pets(instance_data_dir=None, prompts_file="p.txt"), DATA, "data.pets.prompts_file", "p.txt", '"dataset_type": "prompts"'),
    Wrong("column of images", pets(caption_column="text"), DATA, "data.pets.caption_column", "['text']", '"dataset_type": "prompts"'),
    Wrong("fallback of lines", alone("a", fallback_caption_column="a"), DATA, "data.alone.fallback_caption_column", "['a']", "leave fallback_caption_column out"),
    Wrong("second column", alone("caption,n\na,1\n", name="p.csv", caption_column=["caption", "tag"]), DATA, "data.alone.caption_column", "no column 'tag'", "name one of them"),
    Wrong("nested column", alone('{"meta": {"caption": "a"}}', name="p.jsonl"), DATA, "data.alone.caption_column", "it has 'meta', 'meta.caption'", "name one of them"),
    Wrong("half a letter", alone('{"text": "\\ud800"}', name="p.jsonl"), DATA, "data.alone.prompts_file", "line 1 has half of a surrogate pair", "as UTF-8"),
    Wrong("captions of no table", pets(caption_strategy="jsonl"), DATA, "data.pets.caption_strategy", "'jsonl'", '"metadata_file": "metadata.jsonl"'),
    Wrong("captions of no samples", pets(caption_strategy="webdataset"), DATA, "data.pets.caption_strategy", "'webdataset'", "caption_strategy to textfile"),
    Wrong("sizes of no table", pets(metadata_backend="parquet"), DATA, "data.pets.metadata_backend", "'parquet'", '"metadata_file": "metadata.parquet"'),
    Wrong("table of prompts", alone("a", metadata_file="m.csv"), DATA, "data.alone.metadata_file", "m.csv", "leave it out"),
    Wrong("no table", table(None), DATA, "data.pets.csv_file", "pets.csv", "give files that are there"),
    Wrong("no key of a table", table(None, csv_file=None), DATA, "data.pets.csv_file", "None", "a folder of them"),
    Wrong("empty table", table(""), DATA, "data.pets.csv_file", "pets.csv", "first line with the columns' names"),
    Wrong("no column of images", table("pitcure,caption\n"), DATA, "data.pets.image_column", "it has 'pitcure', 'caption'", "name one of them"),
    Wrong("wrong column of images", table("image,caption\n", image_column="imag"), DATA, "data.pets.image_column", "'imag'", "did you mean 'image'"),
    Wrong("no column of captions", table("image,prompt\n"), DATA, "data.pets.caption_column", "it has 'image', 'prompt'", "name one of them"),
    Wrong("wrong name column", table("image,caption\n", filename_column="name"), DATA, "data.pets.filename_column", "'name'", "name one of them"),
    Wrong("width alone", table("image,caption,w\n", width_column="w"), DATA, "data.pets.height_column", "None", "both or neither"),
    Wrong("key twice", table("image,caption\n", csv_url_column="caption", image_column="image"), DATA, "data.pets.image_column", "'caption'", "keep one of them"),
    Wrong("range of tables", table("", csv_file="pets-{9..1}.csv"), DATA, "data.pets.csv_file", "{9..1}", "{000..012}"),
    Wrong("folder without tables", table(None, csv_file="images"), DATA, "data.pets.csv_file", "holds no .csv or .tsv file", "a folder of"),
    Wrong("shards of text", table("a cat", type="webdataset", csv_file=None, shards="pets.csv"), DATA, "data.pets.shards", "no tar archive", "side by side"),
    Wrong("kind of metadata", pets(metadata_file="m.tsv", caption_strategy="csv"), DATA, "data.pets.metadata_file", ".tsv", "one of these formats"),
    Wrong("no metadata", pets(metadata_file="m.csv", caption_strategy="csv"), DATA, "data.pets.metadata_file", "does not exist", "that is there"),
    Wrong("URL as folder", pets(instance_data_dir="s3://bucket/pets"), DATA, "data.pets.instance_data_dir", "s3://bucket/pets", "type csv"),
    Wrong("images needed", alone("a", needs_images=True), DATA, "data.alone.dataset_type", "the method 'needy' needs images", "or choose a method that needs none"),
    Wrong("images needed of all", both(alone("a", needs_images=True), entry(id="pets", instance_data_dir="images")), DATA, "data.alone.dataset_type", "'prompts'", "leave the entry out"),
    # what a method needs and a family cannot do
    Wrong("dropout", run(lora_dropout=0.1), CONFIG, "lora_dropout", "0.1", "set lora_dropout to 0"),
    Wrong(
        "guidance embedding",
        run(model_family="plain-family", model_type="full"),
        CONFIG,
        "model_family",
        "'plain-family'",
        "choose another family or method, or model_type lora",
    ),
    Wrong(
        "second time",
        run(model_family="plain-family", distillation_method="needy", distillation_config={"needs_second_time": True}),
        CONFIG,
        "model_family",
        "'plain-family'",
        "choose another family or method",
    ),
    Wrong(
        "features",
        run(model_family="plain-family", distillation_method="needy", distillation_config={"needs_features": "true"}),
        CONFIG,
        "model_family",
        "'plain-family'",
        "choose another family or method",
    ),
    Wrong(
        "full training",
        run(model_family="lora-only", distillation_method="needy", distillation_config={}, model_type="full"),
        CONFIG,
        "model_type",
        "'full'",
        "set model_type to lora",
    ),
    Wrong(
        "no miniature",
        both(run(model_family="plain-family"), without("pretrained_model_name_or_path")),
        CONFIG,
        "pretrained_model_name_or_path",
        "None",
        "--model PATH_OR_ID",
    ),
    # the command line
    Wrong("override without value", override("learning_rate"), COMMAND_LINE, "--set", "'learning_rate'", "--set learning_rate=2e-4"),
    Wrong("override typo", override("learning_rat=1"), COMMAND_LINE, "learning_rat", "1", "did you mean 'learning_rate'"),
    Wrong("override of method", override("distillation_config.lcm.wmax=3"), COMMAND_LINE, "distillation_config.lcm.wmax", "3", "'w_max'"),
    Wrong("override of dataset id", override("data.pet.crop=true"), COMMAND_LINE, "data.pet.crop", "True", "did you mean 'pets'"),
    Wrong("override of dataset key", override("data.pets.crp=true"), COMMAND_LINE, "data.pets.crp", "True", "did you mean 'crop'"),
    Wrong("override of dataset value", override("data.pets.crop=maybe"), COMMAND_LINE, "data.pets.crop", "'maybe'", "must be true or false"),
]
# fmt: on


@pytest.mark.parametrize("wrong", WRONG, ids=[wrong.name for wrong in WRONG])
def test_wrong_configuration_is_refused_with_its_remedy(wrong, tmp_path):
    pair = Pair(tmp_path)
    wrong.spoil(pair)
    pair.write()
    raw = pair.__dict__.get("raw", {})
    if "config" in raw:
        pair.config_file.write_text(raw["config"])
    if "data" in raw:
        pair.data_file.write_text(raw["data"])
    result = distill("config", "check", *pair.options())
    text = said(result.stderr)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)
    lines = text.split(" remedy: ")
    assert len(lines) > 1, text
    # one finding holds all of it: file, key and value before its remedy
    head = wrong.key if wrong.key.endswith(" = ") else f"{wrong.key} = "
    place = next((index for index, line in enumerate(lines) if f"{wrong.file}: {head}" in line), None)
    assert place is not None, text
    assert wrong.value in lines[place], text
    assert wrong.remedy in lines[place] + " " + lines[place + 1], text


def test_the_table_is_long_enough():
    assert len(WRONG) >= 40
    assert len({wrong.name for wrong in WRONG}) == len(WRONG)


def test_the_pair_that_the_table_spoils_is_usable(tmp_path):
    pair = Pair(tmp_path)
    pair.write()
    result = distill("config", "check", *pair.options())
    assert result.exit_code == 0, result.output
    assert "the configuration is usable" in result.stderr


def test_three_mistakes_in_one_pair_are_said_in_one_go(tmp_path):
    pair = Pair(tmp_path, {"lerning_rate": 1e-4, "distillation_config": {"lcm": {"w_min": "low"}}})
    pair.data[0]["crop_style"] = "centrr"
    pair.write()
    result = distill("run", *pair.options())
    text = said(result.stderr)
    assert result.exit_code == 2
    assert "the configuration has 3 problems" in text
    assert f"{pair.config_file}: lerning_rate" in text
    assert f"{pair.config_file}: distillation_config.lcm.w_min = 'low'" in text
    assert f"{pair.data_file}: data.pets.crop_style = 'centrr'" in text
    assert text.count("remedy: ") == 3
    assert "Traceback" not in result.output


@pytest.mark.parametrize("suffix", ["yaml", "toml"])
def test_other_formats_say_where_they_are_broken(suffix, tmp_path):
    file = tmp_path / f"config.{suffix}"
    file.write_text("seed: [1\nmodel" if suffix == "yaml" else "seed = \n")
    result = distill("config", "check", "--config", file)
    assert result.exit_code == 2
    assert str(file) in said(result.stderr)
    assert "is not " + suffix.upper() in said(result.stderr)


def test_a_plugin_that_fails_to_import_is_named_with_its_line(tmp_path):
    file = tmp_path / "broken_plugin.py"
    file.write_text("import distill\n\nraise RuntimeError('no luck')\n")
    result = distill("config", "check", "--plugin", file)
    assert result.exit_code == 2
    assert str(file) in result.stderr
    assert "(line 3): RuntimeError: no luck" in said(result.stderr)
    assert "Traceback" not in result.output


def test_secrets_are_not_shown_in_findings(tmp_path):
    pair = Pair(tmp_path, {"report_to": "far-tracker", "tracker_config": {"far-tracker": {"api_key": ["s3cr3t"]}}})
    pair.write()
    result = distill("config", "check", *pair.options())
    assert result.exit_code == 2
    assert "tracker_config.far-tracker.api_key" in said(result.stderr)
    assert "s3cr3t" not in result.output


def test_every_command_refuses_an_unknown_option(tmp_path):
    for command in ("run", "config check", "doctor", "plugins list"):
        result = distill(*command.split(), "--no-such-option")
        assert result.exit_code == 2, command
        assert "--no-such-option" in result.output
        assert "Traceback" not in result.output


def test_json_of_the_wrong_type_inside_the_data_is_one_finding(tmp_path):
    pair = Pair(tmp_path)
    pair.data = json.loads('[{"id": "pets", "instance_data_dir": {"path": "images"}}]')
    pair.write()
    result = distill("config", "check", *pair.options())
    assert result.exit_code == 2
    assert said(result.stderr).count("remedy:") == 1
