"""Memory, open files and threads of a long run of a tiny model, step by step.

    python benchmarks/long_run.py FOLDER [--steps 10000] [--out docs/images/long-run.png]

The run saves every 100 steps, validates every 500, logs every 10 and averages its student, as a real one would; the
model is random and tiny, so that 10,000 steps take an hour on one core. Prints a table, and writes `long-run.csv` and,
with --out, a plot. What grows with the steps is seen from the slopes over the second half.
"""

from __future__ import annotations

import argparse
import csv
import gc
import sys
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
COLUMNS = ("step", "rss_megabytes", "open_files", "threads", "python_objects")
PLUGIN = """
import long_run_probe
import distill


@distill.hookimpl
def on_step_end(state, step):
    long_run_probe.note(step)
"""


class Probe:
    """Notes what the process holds, every so many steps.

    Args:
        file: CSV file that is written.
        every: Steps between two notes.
    """

    def __init__(self, file: Path, *, every: int) -> None:
        self.process, self.every, self.rows = psutil.Process(), every, list[tuple[int, ...]]()
        self.stream = file.open("w", newline="")
        self.writer = csv.writer(self.stream)
        self.writer.writerow(COLUMNS)

    def note(self, step: int) -> None:
        """Note what the process holds after `step`."""
        if step % self.every:
            return
        gc.collect()
        held = self.process.memory_info().rss // 2**20, self.process.num_fds(), self.process.num_threads()
        self.rows.append((step, *held, len(gc.get_objects())))
        self.writer.writerow(self.rows[-1])
        self.stream.flush()


def slope(rows: list[tuple[int, ...]], column: int) -> float:
    """Return the growth of a column per 1000 steps over the second half of the rows, by least squares."""
    late = rows[len(rows) // 2 :]
    mean_step, mean = (sum(row[i] for row in late) / len(late) for i in (0, column))
    spread = sum((row[0] - mean_step) ** 2 for row in late)
    return 1000 * sum((row[0] - mean_step) * (row[column] - mean) for row in late) / max(spread, 1e-9)


def plot(rows: list[tuple[int, ...]], file: Path) -> None:
    """Write a plot of memory, open files and threads over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 1, sharex=True, figsize=(6, 5))
    for axis, column, label in zip(axes, (1, 2, 3), ("RSS (MB)", "open files", "threads"), strict=True):
        axis.plot([row[0] for row in rows], [row[column] for row in rows], linewidth=1)
        axis.set_ylabel(label)
        axis.set_ylim(0, 1.2 * max(row[column] for row in rows))
    axes[-1].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(file, dpi=80)


def main() -> None:
    """Run, then print what is held at some steps and how it grows."""
    from support.small_run import execute, write_run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    given.folder.mkdir(parents=True)
    probe = Probe(given.folder / "long-run.csv", every=max(given.steps // 200, 1))
    sys.modules["long_run_probe"] = probe  # type: ignore[assignment]  # the plugin's `import` finds it
    (given.folder / "probe.py").write_text(PLUGIN)
    settings = {
        "max_train_steps": given.steps, "checkpoint_step_interval": 100, "validation_step_interval": 500,
        "log_step_interval": 10, "use_ema": True, "gradient_accumulation_steps": 1, "train_batch_size": 1,
    }  # fmt: skip
    execute(write_run(given.folder, **settings), plugins=[given.folder / "probe.py"])
    print(" | ".join(COLUMNS))
    for row in probe.rows[:: max(len(probe.rows) // 10, 1)]:
        print(" | ".join(map(str, row)))
    for column, name in enumerate(COLUMNS[1:], 1):
        print(f"{name}: {slope(probe.rows, column):+.3f} per 1000 steps over the second half")
    if given.out:
        plot(probe.rows, given.out)


if __name__ == "__main__":
    main()
