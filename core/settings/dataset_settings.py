"""The keys of one entry of the data file (``multidatabackend.json``)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, SerializeAsAny, field_validator

from .run_settings import ResolutionType, SizesTold
from .types import HubOrPath, LocalPath, PathOrUrl, Settings, Texts, is_url

CaptionStrategy = Literal[
    "textfile", "filename", "instanceprompt", "csv", "jsonl", "parquet", "webdataset", "huggingface"
]
OF_THE_SOURCE = ("csv", "jsonl", "parquet", "webdataset", "huggingface")
"""Values of ``caption_strategy`` that all mean the captions that the samples come with."""
OF_A_TABLE = ("csv", "jsonl", "parquet")
"""Values of ``caption_strategy`` and ``metadata_backend`` that can mean the metadata_file beside images."""
DatasetType = Literal["image", "text_embeds", "vae_embeds", "eval", "prompts", "distillation_cache", "checkpoints"]
LONGEST_ID = 200
"""Bytes of a dataset's id: file systems take names of 255, and files are called `ID.quarantine.json` and longer."""
PIXEL_LIMIT = 8
"""Sizes below this many "pixels" are megapixels (the unit trap of ``resolution_type: pixel``)."""


class ColumnSettings(Settings):
    """Columns of a table, where one comes with the samples: keys of datasets and of the backends that read tables."""

    caption_column: Texts = ()
    """Columns of captions, one or several, with dots into what is nested; all of their texts are captions of the
    sample. Absent: `caption`, else `text`."""
    fallback_caption_column: Texts = ()
    """Columns that are used where the caption columns are empty."""
    filename_column: str | None = None
    """Column of the samples' names, which stand for them in the data's order and random draws. Absent: the path of the
    image (beside `metadata_file`: `file_name`, `filename`, `path`, `key`, else `id`)."""
    width_column: str | None = None
    """Column of the upright width in pixels, taken in place of the image's header."""
    height_column: str | None = None
    """Column of the upright height in pixels."""


COLUMN_KEYS = tuple(ColumnSettings.model_fields)


class DatasetSettings(ColumnSettings):
    """One dataset or cache, with the run's defaults applied."""

    id: str = Field(min_length=1)
    """Unique name; names caches, reports and state on disk: without `/` and `\\`, not `.` or `..`, and of at most 200
    bytes."""
    type: str = "local"
    """A registered data backend (`distill plugins list`)."""
    dataset_type: DatasetType = "image"
    """What the entry holds: `image` or `prompts` (captions alone) to train on, `text_embeds` or `vae_embeds` for a
    cache, `distillation_cache` for the teacher's trajectories of the captions, `checkpoints` for a copy of the run's
    checkpoints."""
    disabled: bool = False
    """Leave the entry out."""
    default: bool = False
    """For a text_embeds or distillation_cache entry: the cache of all datasets that name none."""
    crop: bool = False
    """Crop to crop_aspect; off keeps the aspect ratio and sorts into buckets."""
    crop_aspect: Literal["square", "preserve", "closest", "random"] = "square"
    """Aspect ratio that crops have."""
    crop_style: Literal["random", "center", "corner"] = "random"
    """Where crops are taken."""
    resolution: float = Field(default=1024, gt=0)
    """Size of training images, in the unit of resolution_type; absent: the run's."""
    resolution_type: ResolutionType = "pixel_area"
    """`pixel`: shorter edge; `area`: megapixels; `pixel_area`: the edge in pixels whose square is the area."""
    minimum_image_size: float | None = Field(default=None, ge=0)
    """Smaller images are left out, in the unit of resolution_type; below 8 under `pixel` it is megapixels."""
    maximum_image_size: float | None = Field(default=None, gt=0)
    """Larger images are scaled down before cropping, unit as minimum_image_size."""
    target_downsample_size: float | None = Field(default=None, gt=0)
    """Size that images above the maximum are scaled to before cropping, unit as minimum_image_size."""
    aspect_bucket_alignment: int = Field(default=64, ge=1, le=1024)
    """Edges of buckets are multiples of this many pixels; absent: the run's."""
    aspect_bucket_rounding: int = Field(default=2, ge=1, le=9)
    """Decimals of the aspect ratio by which buckets are told apart; absent: the run's."""
    minimum_aspect_ratio: float | None = Field(default=None, gt=0)
    """Images with a smaller width / height are left out."""
    maximum_aspect_ratio: float | None = Field(default=None, gt=0)
    """Images with a larger width / height are left out."""
    max_upscale_threshold: float | None = Field(default=None, ge=0)
    """Images that would be scaled up by more than this share (0.2 = 20%) are left out."""
    max_num_samples: int | None = Field(default=None, ge=1)
    """At most so many images, chosen by the seed."""
    random_flip: bool = False
    """Mirror images left to right at random; absent: the run's."""
    micro_conditioning: SizesTold = "actual"
    """Sizes that the network is told: `actual`, the image's own size and crop, `crop_only`, its crop beside the
    bucket's size, or `plain`, the bucket's size uncropped; absent: the run's."""
    caption_dropout_probability: float = Field(default=0.0, ge=0, le=1)
    """Share of samples trained with the unconditional prompt (0-1); absent: the run's."""
    instance_data_dir: PathOrUrl | None = None
    """Folder with the images, for backends that read one; for `prompts`, the folder whose .txt files are read."""
    prompts_file: LocalPath | None = None
    """For `prompts`: a .txt file with one per line, a .json list or object, or a .jsonl, .csv or .parquet table."""
    metadata_file: HubOrPath | None = None
    """A .csv, .jsonl or .parquet table of captions and sizes of images in a folder or bucket: its path, its URL, or
    its name there. caption_strategy and metadata_backend say what is taken from it."""
    cache_dir_vae: LocalPath | None = None
    """Folder of the latent cache; absent: under output_dir."""
    cache_dir: LocalPath | None = None
    """Folder of a text_embeds, vae_embeds or distillation_cache entry's cache; absent: under output_dir."""
    text_embeds: str | None = None
    """Id of the text_embeds entry whose cache this dataset uses; absent: the default one."""
    distillation_cache: str | None = None
    """Id of the distillation_cache entry whose trajectories this dataset's captions have; absent: the default one."""
    num_pairs_per_prompt: int = Field(default=1, ge=1, le=10_000)
    """For a distillation_cache: trajectories of each caption and size, from as many noises."""
    num_inference_steps: int | None = Field(default=None, ge=1, le=1000)
    """For a distillation_cache: the teacher's steps; absent: 50, or the next multiple of trajectory_points."""
    guidance_scale: float | None = Field(default=None, ge=0, le=100)
    """For a distillation_cache: the teacher's guidance scale, 0 and 1 for none; absent: the family's usual one."""
    solver: Literal["ddim", "dpm++"] = "ddim"
    """For a distillation_cache: how the teacher steps: `ddim` (Euler on a flow) or `dpm++` (DPM-Solver++ 2M, as exact
    in half the steps)."""
    trajectory_points: int | None = Field(default=None, ge=1, le=1000)
    """For a distillation_cache: points of each trajectory that are kept beside its end, the noise included; they divide
    num_inference_steps. Absent: as many as the method needs."""
    noise_seed: int = Field(default=0, ge=0)
    """For a distillation_cache: seed of the noise that trajectories start from."""
    pair_batch_size: int = Field(default=4, ge=1)
    """For a distillation_cache: trajectories of a megapixel that are made at once; of smaller images up to 64."""
    vae_batch_size: int = Field(default=4, ge=1, le=65_536)
    """Images per autoencoder call while the latent cache is built; absent: the run's."""
    write_batch_size: int = Field(default=128, ge=1)
    """Entries per file of a cache."""
    caption_strategy: CaptionStrategy = "textfile"
    """Where captions are: a .txt beside the image (for sources that come with captions: theirs), its file name,
    instance_prompt for all, or (csv, jsonl, parquet) metadata_file."""
    instance_prompt: str | None = None
    """The one caption of `instanceprompt`, and what prepend_instance_prompt puts in front."""
    prepend_instance_prompt: bool = False
    """Put instance_prompt in front of every caption."""
    only_instance_prompt: bool = False
    """Use instance_prompt alone, whatever captions there are."""
    disable_multiline_split: bool = False
    """Take a caption file's lines as one caption rather than as several."""
    caption_filter_list: tuple[str, ...] | LocalPath = ()
    """Texts that are removed from captions: a list, or a file with one per line."""
    caption_shuffle: bool = False
    """Shuffle the comma-separated parts of captions."""
    metadata_backend: Literal["discovery", "csv", "jsonl", "parquet", "huggingface"] = "discovery"
    """Where images' sizes are: `discovery` reads the files' headers, `csv`, `jsonl` and `parquet` take them from
    metadata_file; sources that come with sizes need neither."""
    train_batch_size: int | None = Field(default=None, ge=1, le=65_536)
    """Samples of this dataset per micro-batch and process; absent: the run's."""
    repeats: int = Field(default=0, ge=0)
    """Extra passes over the dataset per epoch; 0 = one pass."""
    probability: float = Field(default=1.0, ge=0)
    """Weight of the dataset against others."""
    start_step: int = Field(default=0, ge=0)
    """Optimizer step from which the dataset is used."""
    end_step: int | None = Field(default=None, ge=1)
    """Optimizer step up to which the dataset is used."""
    backend: SerializeAsAny[BaseModel] | None = Field(default=None, exclude=True)
    """The backend's own validated keys."""

    @field_validator("id")
    @classmethod
    def _names_a_file(cls, value: str) -> str:
        if value in (".", "..") or not value.isprintable() or any(letter in value for letter in "/\\"):
            raise ValueError("is no name of a file, and files are named by it")
        if len(value.encode("utf-8", "surrogatepass")) > LONGEST_ID:
            raise ValueError(f"has more than {LONGEST_ID} bytes, which is too long for the files that are named by it")
        return value

    @property
    def needs_captions(self) -> bool:
        """True if samples must come with captions."""
        return not self.only_instance_prompt and self.caption_strategy in ("textfile", *OF_THE_SOURCE)

    @property
    def metadata_is_here(self) -> bool:
        """True if metadata_file can be read without the network."""
        if self.metadata_file is None or is_url(self.metadata_file):
            return False
        beside = self.instance_data_dir is not None and not is_url(self.instance_data_dir)
        return beside or Path(self.metadata_file).is_absolute()

    @property
    def captions_in_table(self) -> bool:
        """True if captions of image files stand in metadata_file."""
        return self.metadata_file is not None and self.caption_strategy in OF_A_TABLE

    @property
    def sizes_in_table(self) -> bool:
        """True if sizes of image files stand in metadata_file."""
        named = self.width_column is not None or self.height_column is not None
        return self.metadata_file is not None and (self.metadata_backend in OF_A_TABLE or named)

    @property
    def has_images(self) -> bool:
        """True if samples are images with captions rather than captions alone."""
        return self.dataset_type == "image"

    def edge_and_area(self, size: float) -> tuple[float | None, float | None]:
        """Return a size of this entry as (shorter edge in pixels, area in megapixels); one of the two is None."""
        if self.resolution_type == "area" or (self.resolution_type == "pixel" and size < PIXEL_LIMIT):
            return None, size
        if self.resolution_type == "pixel":
            return size, None
        return None, size * size / 1e6

    @property
    def square_edge(self) -> float:
        """The edge in pixels of a square image at this entry's resolution."""
        edge, area = self.edge_and_area(self.resolution)
        return edge if edge is not None else (area or 0.0) ** 0.5 * 1000
