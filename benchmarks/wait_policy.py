"""What the wait policy of OpenMP's threads costs a run alone, and saves it beside other work.

    python benchmarks/wait_policy.py --steps 60 --repeats 5 --busy 0 1

Runs of the shipped miniature, the policies in turn so that a machine whose speed drifts is fair to both: `spin` is
OpenMP's default (a waiting thread spins 300,000 rounds), `short` is what the command sets, `sleep` spins never.
Beside the wall time of a
step stands the CPU time of the whole process per step, which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

POLICIES = {
    "spin": {"GOMP_SPINCOUNT": "300000"},
    "short": {"GOMP_SPINCOUNT": "30000"},
    "sleep": {"OMP_WAIT_POLICY": "PASSIVE"},
}
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")


def measure(policy: str, folder: Path, steps: int) -> tuple[float, float]:
    """Return (wall seconds of a step, the median over lines of the log; CPU seconds of the process per step)."""
    environment = {name: value for name, value in os.environ.items() if name not in WAIT_VARIABLES}
    settings = [
        f"max_train_steps={steps}", "validation_step_interval=0", "evaluation_num_samples=0", "report_to=none",
        "checkpoint_step_interval=0", "log_step_interval=1", "train_batch_size=8", "gradient_accumulation_steps=1",
    ]  # fmt: skip
    command = [sys.executable, "-m", "distill", "run", "--overwrite", "--output-dir", str(folder)]  # caches stay
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [*command, *(word for setting in settings for word in ("--set", setting))],
        env=environment | POLICIES[policy], check=True, capture_output=True,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    samples = median(row["samples_per_second"] for row in rows[len(rows) // 3 :])
    return 8 / samples, cpu / steps


def main() -> None:
    """Print a table: wall and CPU seconds of a step by policy, alone and beside processes that keep a core busy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1], help="processes that keep a core busy each")
    asked = parser.parse_args()
    print("busy | policy | s a step (min, median, max) | CPU s a step (median)")
    folder = Path(tempfile.mkdtemp()) / "out"
    measure("sleep", folder, 5)  # fills the caches
    for count in asked.busy:
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
        found: dict[str, list[tuple[float, float]]] = {policy: [] for policy in POLICIES}
        try:
            for _ in range(asked.repeats):
                for policy, results in found.items():
                    results.append(measure(policy, folder, asked.steps))
                    print(f"# {count} busy, {policy}: {results[-1][0]:.4f} s a step", file=sys.stderr, flush=True)
        finally:
            for process in busy:
                process.kill()
        for policy, results in found.items():
            wall, cpu = ([result[index] for result in results] for index in (0, 1))
            spread = f"{min(wall):.4f}, {median(wall):.4f}, {max(wall):.4f}"
            print(f"{count} | {policy} | {spread} | {median(cpu):.4f}", flush=True)


if __name__ == "__main__":
    main()
