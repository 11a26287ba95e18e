"""The keys of the run itself (``config.json``), with their defaults, limits and units."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from .types import AttentionKernels, HubOrPath, Integers, LocalPath, Names, Resolutions, Settings, Texts

LORA_RATE, FULL_RATE = 1e-4, 1e-6
"""Learning rates of AdamW where the user gives none."""
ResolutionType = Literal["pixel", "area", "pixel_area"]
SizesTold = Literal["actual", "crop_only", "plain"]
"""Values of ``micro_conditioning``."""


class TeacherLora(Settings):
    """A LoRA of the user's own that is fused into the teacher."""

    path: HubOrPath
    """Hub id, folder or .safetensors file of the LoRA."""
    weight: float = Field(default=1.0, ge=-10, le=10)
    """Factor on the LoRA (no unit)."""
    strict: bool = True
    """Whether all of it must fit the model; `false` applies the layers that fit, and says how many."""


class RoleOptimizer(Settings):
    """Optimizer settings of one network that a method trains, over the method's own for it and the run's."""

    learning_rate: float | None = Field(default=None, gt=0, le=10)
    """Learning rate after warm-up; the run's schedule shapes it."""
    adam_beta1: float | None = Field(default=None, ge=0, lt=1)
    """Decay of the first moment of Adam-like optimizers."""
    adam_beta2: float | None = Field(default=None, ge=0, lt=1)
    """Decay of the second moment of Adam-like optimizers."""
    adam_weight_decay: float | None = Field(default=None, ge=0)
    """Decoupled weight decay per step, as a fraction of the learning rate."""
    max_grad_norm: float | None = Field(default=None, ge=0)
    """Gradient norm above which this network's gradient is scaled down; 0 = off."""


class ModelKeys(Settings):
    """The model that is distilled, and the method."""

    model_type: Literal["lora", "full"] = "lora"
    """What is trained: `lora`, an adapter on the frozen base, or `full`, all weights."""
    model_family: str = "sdxl"
    """A registered family (`distill plugins list`)."""
    pretrained_model_name_or_path: HubOrPath | None = None
    """Hub id, local folder in diffusers layout, or a single .safetensors file; absent: the family's miniature."""
    pretrained_vae_model_name_or_path: HubOrPath | None = None
    """Hub id or folder of another autoencoder; absent: the model's own."""
    pixel_decoder: HubOrPath | None = None
    """Hub id or folder of a (tiny) autoencoder that decodes for methods that look at pixels, as TAESDXL; absent: the
    model's own."""
    model_config_source: LocalPath | None = None
    """Local folder with configs and tokenizers for a single-file model, where there is no hub."""
    revision: str | None = None
    """Revision of the hub model (branch, tag or commit)."""
    teacher_lora: tuple[TeacherLora, ...] = ()
    """LoRAs that are fused into the teacher before distillation: a list of {path, weight, strict}."""
    init_lora: HubOrPath | None = None
    """A student's LoRA (folder, file or hub id) to start from, for staged training."""
    recipe: str | None = None
    """Published settings by name (`distill recipes list`); they lie under everything that is given."""
    distillation_method: str = "lcm"
    """A registered method (`distill plugins list`)."""
    base_model_precision: str = "no_change"
    """Quantizer of the frozen base that a LoRA shares with its teacher (`distill plugins list`); `no_change`: none."""
    teacher_precision: str = "no_change"
    """Quantizer of the teacher that is held beside a fully trained student, as base_model_precision for a LoRA."""
    text_encoder_1_precision: str = "no_change"
    """Quantizer of the first text encoder, as base_model_precision."""
    text_encoder_2_precision: str = "no_change"
    """Quantizer of the second text encoder, as base_model_precision."""
    text_encoder_3_precision: str = "no_change"
    """Quantizer of the third text encoder, as base_model_precision."""
    text_encoder_4_precision: str = "no_change"
    """Quantizer of the fourth text encoder, as base_model_precision."""
    attention_mechanism: Literal["diffusers"] = "diffusers"
    """Attention kernels; `diffusers` is PyTorch's own fused attention."""


class DataKeys(Settings):
    """Defaults for datasets, which override them."""

    data_backend_config: LocalPath | None = None
    """Data file; absent: `multidatabackend.json` beside the config, in output_dir or in the working directory."""
    resolution: float = Field(default=1024, gt=0)
    """Size of training images, in the unit of resolution_type (pixels or megapixels)."""
    resolution_type: ResolutionType = "pixel_area"
    """`pixel`: shorter edge; `area`: megapixels; `pixel_area`: the edge in pixels whose square is the area."""
    minimum_image_size: float | None = Field(default=None, ge=0)
    """Smaller images are left out, in the unit of resolution_type; below 8 under `pixel` it is megapixels."""
    maximum_image_size: float | None = Field(default=None, gt=0)
    """Larger images are scaled down before cropping, unit as minimum_image_size."""
    target_downsample_size: float | None = Field(default=None, gt=0)
    """Size that images above the maximum are scaled to before cropping; absent: maximum_image_size."""
    aspect_bucket_rounding: int = Field(default=2, ge=1, le=9)
    """Decimals of the aspect ratio by which buckets are told apart (1-9)."""
    aspect_bucket_alignment: int = Field(default=64, ge=1, le=1024)
    """Edges of buckets are multiples of this many pixels (never below the family's own need)."""
    caption_dropout_probability: float = Field(default=0.0, ge=0, le=1)
    """Share of samples that are trained with the unconditional prompt (0-1)."""
    random_flip: bool = False
    """Whether images are mirrored left to right at random."""
    micro_conditioning: SizesTold = "actual"
    """Sizes that a network with micro-conditioning (SDXL's) is told of an image: `actual`, its own size and crop;
    `plain`, those that an image is generated with: the bucket's size as original and target size, crop at (0, 0);
    `crop_only`, the same with the image's own crop."""
    vae_batch_size: int = Field(default=4, ge=1, le=65_536)
    """Images per autoencoder call while the latent cache is built."""
    dataloader_prefetch: int = Field(default=2, ge=1, le=1024)
    """Optimizer steps' worth of batches that are read ahead."""
    num_workers: int = Field(default=2, ge=0, le=1024)
    """Threads that read and decode images."""


class TrainingKeys(Settings):
    """Optimisation."""

    learning_rate: float = Field(default=1e-4, gt=0, le=10)
    """Learning rate after warm-up; absent: 1e-4 for LoRA, 1e-6 for full training, or what the optimizer wants."""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "sine", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant_with_warmup"
    """Course of the learning rate, counted in optimizer steps."""
    lr_warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up."""
    lr_num_cycles: int = Field(default=1, ge=1)
    """Cycles of `sine` and `cosine_with_restarts`."""
    lr_power: float = Field(default=1.0, gt=0)
    """Exponent of `polynomial`."""
    lr_end: float = Field(default=0.0, ge=0)
    """Learning rate that decaying schedules end at."""
    max_train_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps to train for."""
    num_train_epochs: int | None = Field(default=None, ge=1)
    """Passes over the data to train for; with max_train_steps, whichever ends first."""
    train_batch_size: int = Field(default=1, ge=1, le=65_536)
    """Samples per micro-batch and process."""
    gradient_accumulation_steps: int = Field(default=1, ge=1, le=65_536)
    """Micro-batches per optimizer step."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more time."""
    activation_offload: bool = False
    """Keep what the backward pass needs in (pinned) memory of the host: less memory of the device, more time."""
    merge_for_inference: Literal["auto", "off"] = "auto"
    """Run passes of a LoRA on copies of the weights with the LoRA added: auto, in fp32 where memory has room. Never in
    half precision, whose rounding would lose the LoRA."""
    compile: Literal["auto", "off", "regions", "whole"] = "auto"
    """Compile the denoisers: `regions`, block by block; `whole`, as one; `auto`, by regions on CUDA in runs of 1,000
    steps or more. The first step of each shape takes longer."""
    activation_memory_budget: float = Field(default=1.0, ge=0, le=1)
    """Share of the activations of what is compiled that the backward pass may keep; it recomputes the others."""
    fp8_training: bool = False
    """Compute the matrix products in the blocks of networks that are trained whole in fp8, forward and backward
    (torchao; cards of compute capability 8.9 or later). Rounds by 5% a layer: for runs where time is what lacks."""
    tf32: bool = False
    """Let products in fp32 round to TensorFloat-32 on CUDA: faster, with 10 bits instead of 23."""
    attention_kernels: AttentionKernels = ()
    """PyTorch's attention kernels in order of preference, of flash3 (FlashAttention 3 in the place of flash, on Hopper
    cards where its package is installed), flash, cudnn, efficient and math; empty: PyTorch's own."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "bf16"
    """Type of the forward pass; first and last layers, targets and losses stay fp32. `fp16` is slow on a CPU."""
    lora_type: Literal["standard"] = "standard"
    """Kind of adapter."""
    lora_rank: int = Field(default=64, ge=1, le=16_384)
    """Rank of the adapter."""
    lora_alpha: float = Field(default=64, gt=0)
    """Scale of the adapter is lora_alpha / lora_rank; absent: lora_rank."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout inside the adapter (0-1); consistency methods need 0."""
    lora_target_modules: Names = ()
    """Module names (suffixes) to adapt; empty: the family's list."""
    optimizer: str = "adamw"
    """A registered optimizer (`distill plugins list`)."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment of Adam-like optimizers."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment of Adam-like optimizers."""
    adam_weight_decay: float = Field(default=1e-2, ge=0)
    """Decoupled weight decay per step, as a fraction of learning_rate."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Added to the denominator of Adam-like optimizers."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Global gradient norm above which the gradient is scaled down; 0 = off."""
    role_optimizers: dict[str, RoleOptimizer] = Field(default_factory=dict)
    """Settings of single networks, as {"discriminator": {"learning_rate": 1e-5, "adam_beta1": 0}}: learning_rate,
    adam_beta1, adam_beta2, adam_weight_decay, max_grad_norm; absent: the method's own for that network, then the
    run's (`distill plugins show METHOD` lists networks and their settings)."""
    max_bad_steps: int = Field(default=10, ge=1)
    """Consecutive optimizer steps with a loss that is not finite after which the run stops."""
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    """Share of a run's updates (0-1) that may be left out because loss or gradient was not finite; with more of them
    the run fails at its end in place of writing a student."""
    use_ema: bool = False
    """Keep an average of the trained weights; it is what is validated and exported."""
    ema_decay: float = Field(default=0.995, ge=0, lt=1)
    """Decay of that average per optimizer step."""
    export_online_weights: bool = False
    """Where an average is exported, also write the weights that the optimizer stepped, as `student-online/`."""
    export_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the exported student's weights. `auto`: of a LoRA the type that the passes of training computed in
    (`mixed_precision`), which rounds away nothing that they saw; of a full student, and with `no`, the type that was
    trained. Checkpoints keep the trained weights whole."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """Fixes data order, noise, timesteps, guidance and dropout, each by a generator of its own."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, ..."""
    parallel: Literal["auto", "replicate", "fsdp", "zero2", "zero3"] = "auto"
    """How several processes share the networks: `replicate`, all weights on each; `fsdp`, weights sharded over them;
    `zero2` and `zero3`, DeepSpeed's, for full training; `auto`: what `accelerate launch` was told, else `replicate`."""
    parallel_shard_size: int = Field(default=0, ge=0, le=65_536)
    """Processes that share one copy of the weights under `fsdp`; 0 = all of them."""
    parallel_offload: bool = False
    """Keep in host memory what `fsdp`, `zero2` or `zero3` shard: less memory of the device, more time."""
    process_timeout: float = Field(default=1800, ge=0)
    """Seconds without a sign of life of one of several processes, or at one step, before the others end; 0 = never."""


class OutputKeys(Settings):
    """Images, scores, checkpoints, trackers, publishing."""

    output_dir: LocalPath = Path("output")
    """Folder of the run; absent: `output/<family>-<method>` in the working directory."""
    overwrite: bool = False
    """Replace what output_dir holds of another or a finished run."""
    validation_step_interval: int = Field(default=250, ge=0)
    """Optimizer steps between validations; 0 = off."""
    validation_num_inference_steps: int | None = Field(default=None, ge=1, le=1000)
    """Steps of the student in validation; absent: the method's."""
    validation_guidance: float | None = Field(default=None, ge=0, le=100)
    """Guidance scale of the student in validation (0 and 1 both mean none); absent: the method's."""
    validation_resolution: Resolutions = ()
    """`WIDTHxHEIGHT` in pixels, comma separated: every prompt at every resolution; absent: the first dataset's."""
    validation_prompt: Texts = ()
    """A prompt, or a list of prompts."""
    validation_negative_prompt: str = ""
    """What images should not show; has an effect with guidance only."""
    validation_prompt_library: LocalPath | None = None
    """Further prompts: JSON object or list of texts, or a text file with one prompt per line."""
    validation_seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Seed of the first validation image; absent: seed."""
    num_validation_images: int = Field(default=1, ge=1)
    """Images per prompt and resolution, with consecutive seeds."""
    validation_scores: bool = False
    """Score the student at each validation with the run's evaluators, on the same prompts and noise each time; the
    miniatures' recipes switch it on."""
    validation_scores_num_samples: int = Field(default=64, ge=1)
    """Images per score at each validation, of the student alone."""
    evaluation_steps: Integers = (1, 2, 4, 8)
    """Steps at which the student is scored at the end."""
    evaluation_teacher_steps: Integers = (4, 50)
    """Steps at which the teacher is scored; the largest is the full teacher."""
    evaluation_teacher_guidance: float | None = Field(default=None, ge=0, le=100)
    """Guidance scale of the teacher's images, at every number of steps; absent: the family's usual one."""
    evaluation_num_samples: int = Field(default=64, ge=0)
    """Images per score at the end of the run; 0 = no scores."""
    evaluators: Names = ()
    """Registered evaluators to score with; empty: those that need no weights from elsewhere, and those with settings in
    evaluator_config."""
    checkpoint_step_interval: int = Field(default=500, ge=0)
    """Optimizer steps between checkpoints; 0 = only when interrupted and at the end."""
    checkpoint_async: bool = True
    """Write checkpoints while training goes on, from a copy of the state in memory; false: training waits for each."""
    checkpoints_total_limit: int | None = Field(default=5, ge=1)
    """How many checkpoints are kept, the newest."""
    resume_from_checkpoint: str | None = None
    """`latest`, or a checkpoint's folder name or path; `latest` with nothing there starts afresh."""
    report_to: Names = ("tensorboard",)
    """Registered trackers, comma separated; `none` leaves only metrics.jsonl."""
    tracker_project_name: str = "distill"
    """Project in trackers that have one."""
    tracker_run_name: str | None = None
    """Name of the run in trackers; absent: output_dir's name."""
    log_step_interval: int = Field(default=10, ge=1)
    """Optimizer steps between reading metrics from the device."""
    profile_steps: int = Field(default=0, ge=0, le=1000)
    """Optimizer steps, after a warm-up, of which a trace and a table of times are written to `profile/`; 0 = off."""
    push_to_hub: bool = False
    """Publish the student on the Hugging Face hub at the end."""
    hub_model_id: str | None = None
    """Repository to publish to, as `name/sdxl-lcm`."""
    publish_to: Names = ()
    """Further registered publishers that take the student at the end."""
    plugins: tuple[LocalPath, ...] = ()
    """Plugin files to load, as with --plugin."""


DEFAULT_OUTPUT = Path("output")


class RunSettings(ModelKeys, DataKeys, TrainingKeys, OutputKeys):
    """Every key of the run; the parts of method, family, optimizer and plugins are checked by their owners."""

    @property
    def frozen_base_precision(self) -> str:
        """The quantizer of the frozen base, which is a LoRA's own base or a full student's teacher; ``no_change``."""
        return self.teacher_precision if self.model_type == "full" else self.base_model_precision

    @model_validator(mode="before")
    @classmethod
    def _defaults_by_others(cls, values: dict[str, object]) -> dict[str, object]:
        """Fill in defaults that depend on other keys: learning rate, alpha, output folder."""
        full = values.get("model_type") == "full"
        values = {"learning_rate": FULL_RATE if full else LORA_RATE, **values}
        values.setdefault("lora_alpha", values.get("lora_rank", 64))
        family, method = values.get("model_family", "sdxl"), values.get("distillation_method", "lcm")
        values.setdefault("output_dir", DEFAULT_OUTPUT.absolute() / f"{family}-{method}")
        return values
