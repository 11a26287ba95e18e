"""A summary for people of what the data pipeline found and made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..dataset import Counts
from ..samples.file_checks import printable

FEW_SAMPLES = 10_000
NAMED = 5
"""Broken files that are named in the report; all of them stand in quarantine.txt."""


@dataclass
class DataReport:
    """The result of :meth:`DataPipeline.prepare`.

    Attributes:
        datasets: Counts by dataset id.
        captions_encoded: Captions that went through the text encoders now.
        images_encoded: Images that went through the autoencoder now.
        trajectories_made: Trajectories that the teacher made now.
        damaged_shards: Cache files that failed their check and were made anew.
        seconds: How long all of it took.
        images: Whether latents were asked for.
    """

    datasets: dict[str, Counts] = field(default_factory=dict)
    captions_encoded: int = 0
    images_encoded: int = 0
    trajectories_made: int = 0
    damaged_shards: int = 0
    seconds: float = 0.0
    images: bool = True

    @property
    def num_samples(self) -> int:
        """The number of images or prompts in use over all datasets."""
        return sum(counts.used for counts in self.datasets.values())

    @property
    def quarantined(self) -> dict[str, str]:
        """The broken files of all datasets: dataset id and key -> reason."""
        return {
            f"{name}/{key}": reason
            for name, counts in self.datasets.items()
            for key, reason in counts.quarantined.items()
        }

    def lines(self) -> list[str]:
        """Return the lines to print."""
        lines = [line for name, counts in self.datasets.items() for line in describe(name, counts)]
        latents = f" and {self.images_encoded:,} images" if self.images else ""
        made = f"{self.captions_encoded:,} captions{latents} encoded"
        made += f", {self.trajectories_made:,} trajectories made" if self.trajectories_made else ""
        nothing = not self.captions_encoded + self.images_encoded + self.trajectories_made
        cached = "everything was cached" if nothing else made
        lines.append(f"data ready in {self.seconds:.1f} s: {cached}")
        if self.num_samples < FEW_SAMPLES:
            noun = "images" if self.images else "prompts"
            lines.append(
                f"{self.num_samples:,} {noun} are fewer than the {FEW_SAMPLES:,} diverse ones that a general "
                "student wants: expect one that is good at what they show and loses variety elsewhere; watch the "
                "validation images rather than the loss, and stop when they no longer improve"
            )
        return lines


def named_with_reasons(broken: Mapping[str, str]) -> list[str]:
    """Return a line for each broken file, whatever its name, sorted."""
    return [f"{printable(key)}: {printable(why)}" for key, why in sorted(broken.items())]


def describe(name: str, counts: Counts) -> list[str]:
    """Return lines on one dataset: what is used, in which buckets, what was left out and what is broken."""
    buckets = sorted(counts.buckets.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{width}x{height}: {number:,}" for (width, height), number in buckets[:6])
    more = f" and {len(buckets) - 6} more" if len(buckets) > 6 else ""
    size = f"{len(buckets)} bucket{'s' if len(buckets) != 1 else ''}"
    lines = [
        f"dataset {name!r}: {counts.used:,} of {counts.found:,} {counts.noun}s in {size} ({shown}{more}), "
        f"{counts.captions:,} different captions"
    ]
    lines += [f"dataset {name!r}: {counts.cut}"] if counts.cut else []
    lines += [f"dataset {name!r}: {number:,} left out: {reason}" for reason, number in counts.left_out.items()]
    if counts.quarantined:
        items = list(counts.quarantined.items())
        listed = "; ".join(named_with_reasons(dict(items[:NAMED])))
        rest = f"; and {len(items) - NAMED} more, in quarantine.txt" if len(items) > NAMED else ""
        lines.append(f"dataset {name!r}: {len(items):,} broken and quarantined: {listed}{rest}")
    return lines
