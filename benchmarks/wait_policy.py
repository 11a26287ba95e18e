"""What the wait policy of OpenMP's threads costs a run alone, and saves it beside other work.

    python benchmarks/wait_policy.py --steps 350 --busy 0 1

One run of the shipped miniature under each policy, all at once, of which one at a time takes a step, in an order that
is drawn for each round: every round sees the same machine, and 350 ratios of a round's steps have a median that is
known to about one percent, where whole runs one after the other scatter by ten. `spin` is OpenMP's default (a waiting
thread spins 300,000 rounds), `again` is the same once more, which says what the method can tell apart, `short` is what
the command sets, `sleep` spins never. Beside the wall time of a step stands the CPU time of the whole process.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

POLICIES = {
    "spin": {"GOMP_SPINCOUNT": "300000"},
    "again": {"GOMP_SPINCOUNT": "300000"},
    "short": {"GOMP_SPINCOUNT": "30000"},
    "sleep": {"OMP_WAIT_POLICY": "PASSIVE"},
}
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
WARM_UP = 5
PAUSE = 0.01
"""Seconds between two processes' steps, in which the threads of the first stop spinning."""
Times = tuple[float, float]
"""(wall, CPU) seconds of a step."""


def take_steps(folder: Path, steps: int) -> None:
    """Run so many steps, each when a line comes in; write the seconds of each, (wall, CPU), to the standard output."""
    from distill.core.config.load import load_configuration
    from distill.core.plugin_api.hookspecs import hookimpl
    from distill.core.registry.registry import Registry
    from distill.core.runs.run import run

    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    class InTurn:
        begun: Times

        def wait(self, said: str) -> None:
            print(said, file=told, flush=True)
            sys.stdin.readline()
            self.begun = (time.perf_counter(), time.process_time())

        @hookimpl
        def on_run_start(self) -> None:
            self.wait("ready")

        @hookimpl
        def on_step_end(self) -> None:
            self.wait(f"{time.perf_counter() - self.begun[0]} {time.process_time() - self.begun[1]}")

    settings = [
        f"max_train_steps={steps}", "validation_step_interval=0", "evaluation_num_samples=0", "report_to=none",
        "checkpoint_step_interval=0", "train_batch_size=8", "gradient_accumulation_steps=1", "overwrite=true",
    ]  # fmt: skip
    registry = Registry.load()
    registry.add(InTurn(), source="benchmark", name="in turn")
    run(load_configuration(registry, flags={"output_dir": str(folder)}, overrides=settings), registry)


def start(policy: str, folder: Path, steps: int) -> subprocess.Popen[str]:
    """Start a run under a policy; return it when its first step may begin."""
    environment = {name: value for name, value in os.environ.items() if name not in WAIT_VARIABLES}
    command = [sys.executable, __file__, "--steps", str(steps), "--take-steps", str(folder / policy)]
    with (folder / f"{policy}.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment | POLICIES[policy], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            text=True,
        )  # fmt: skip
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise RuntimeError(f"the run ended early: {folder / policy}.log")
    return process


def step(process: subprocess.Popen[str]) -> Times:
    """Let a run take a step."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(file=process.stdin, flush=True)
    wall, cpu = map(float, process.stdout.readline().split())
    time.sleep(PAUSE)
    return wall, cpu


def measure(steps: int) -> dict[str, list[Times]]:
    """Return the seconds of the steps of a run under each policy, in rounds."""
    folder, draws = Path(tempfile.mkdtemp()), random.Random(1)
    runs = {policy: start(policy, folder, steps + WARM_UP + 1) for policy in POLICIES}
    found: dict[str, list[Times]] = {policy: [] for policy in POLICIES}
    try:
        for number in range(steps + WARM_UP):
            for policy in draws.sample([*POLICIES], len(POLICIES)):
                times = step(runs[policy])
                found[policy] += [times] if number >= WARM_UP else []
    finally:
        for process in runs.values():
            process.kill()
    return found


def interval(ratios: list[float], *, rounds: int = 1000) -> tuple[float, float, float]:
    """Return the median, and between which numbers it lies with 95%, by drawing the rounds again."""
    draws = random.Random(0)
    medians = sorted(median(draws.choices(ratios, k=len(ratios))) for _ in range(rounds))
    return median(ratios), medians[rounds // 40], medians[-rounds // 40]


def main() -> None:
    """Print a table: seconds of a step by policy, and their ratio to spinning, alone and beside busy processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1], help="processes that keep a core busy each")
    parser.add_argument("--take-steps", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.take_steps is not None:
        take_steps(asked.take_steps, asked.steps)
        return
    print("busy | policy | s a step | of `spin` (95%) | CPU s a step | of `spin` (95%)")
    for count in asked.busy:
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
        try:
            found = measure(asked.steps)
        finally:
            for process in busy:
                process.kill()
        for policy, rounds in found.items():
            cells = []
            for clock in (0, 1):
                ratios = [one[clock] / other[clock] for one, other in zip(rounds, found["spin"], strict=True)]
                middle, low, high = interval(ratios)
                cells += [f"{median(one[clock] for one in rounds):.4f}", f"{middle:.3f} ({low:.3f} to {high:.3f})"]
            print(f"{count} | {policy} | {' | '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
