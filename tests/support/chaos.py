"""Kills a run again and again at random moments, until it has come to its end, and compares it with one left alone.

    python chaos.py CONFIG [CONFIG*2 ...] --kills 20 [20 ...] [--seed 1] [--full-disks 0.1] [--bucket]

CONFIG names the output folder `whole` beside it; the run that is killed has every other setting and lies in another
folder, `chaos/killed`. Behind it stands how many processes the run has. Rounds follow each other until there were so
many kills: in each, output and caches begin anew, the run is killed (SIGKILL) while it fills caches, saves, validates,
exports or anywhere, and finished in the end. Then losses and every file of the student must be those of the run that
was left alone.

Everything is imported once and each attempt is a fork (or one for each process), so that an attempt takes seconds.
Prints a line of JSON for each CONFIG: how many kills while what, how many attempts ended by themselves because of a
fault, and rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import accelerate  # noqa: F401
import torch

torch.set_num_threads(1)
import diffusers  # noqa: F401
import peft  # noqa: F401
import transformers  # noqa: F401
from diffusers import LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel  # noqa: F401
from distill.core.errors import DistillError
from support.s3_server import S3Server
from support.small_run import execute, losses, write_images

KILLS_OF_A_ROUND = 20
LIMIT = 300.0
"""Seconds within which an attempt must come to its moment or its end."""
SURVIVES = 120.0
"""Seconds within which a process whose fellow was killed must end by itself."""
MOMENTS = ("caches", "saves", "validations", "export", "anywhere")


def files(folder: Path) -> dict[str, str]:
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def newest(folder: Path) -> float:
    times = [0.0]
    with contextlib.suppress(FileNotFoundError):
        for path in folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                times.append(path.stat().st_mtime)
    return max(times)


class Attempt:
    """The processes of one start of the run."""

    def __init__(self, config: Path, log: Path, *, processes: int, file_bytes: int | None = None) -> None:
        self.began, self.log, self.codes = time.time(), log, {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log.write_bytes(b"")
        self.pids = {}
        for rank in range(processes):
            pid = os.fork()
            if pid == 0:
                if processes > 1:
                    os.environ.update(
                        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1",
                        MASTER_PORT=str(port),
                    )  # fmt: skip
                self._work(config, file_bytes)
            self.pids[rank] = pid

    def _work(self, config: Path, file_bytes: int | None) -> NoReturn:
        with self.log.open("ab") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        faulthandler.register(signal.SIGUSR1)
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
        code = 0
        try:
            execute(config)
        except DistillError as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            code = error.exit_code
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 99
        sys.stderr.flush()
        os._exit(code)

    def reap(self) -> bool:
        """Whether all processes have ended."""
        for rank, pid in list(self.pids.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.codes[rank] = os.waitstatus_to_exitcode(status)
                del self.pids[rank]
        return not self.pids

    def kill(self, rng: random.Random) -> None:
        """Kill one process, or now and then all at once; the others must end by themselves."""
        victims = [rng.choice(sorted(self.pids))] if rng.random() < 0.8 else sorted(self.pids)
        for rank in victims:
            os.kill(self.pids[rank], signal.SIGKILL)
        deadline = time.monotonic() + SURVIVES
        while not self.reap():
            if time.monotonic() > deadline:
                self.end(f"a process goes on without its fellow {victims}")
            time.sleep(0.005)

    def end(self, why: str) -> NoReturn:
        for pid in self.pids.values():
            os.kill(pid, signal.SIGUSR1)  # where is it?
            time.sleep(1)
            os.kill(pid, signal.SIGKILL)
        sys.exit(f"{why}; ended with {self.codes}:\n{self.log.read_text(errors='replace')[-6000:]}")


class Chaos:
    """The kills of one configuration."""

    def __init__(self, run: str, kills: int, given: argparse.Namespace) -> None:
        config, _, number = run.partition("*")
        self.config, self.processes = Path(config), int(number or 1)
        self.given, self.kills, self.rng = given, kills, random.Random(given.seed)
        self.root = self.config.parent
        self.whole = self.root / "whole"
        self.output = self.root / "chaos" / "killed"
        self.counts: Counter[str] = Counter()
        self.server = self._serve() if given.bucket else None
        self._next_outage = 0.0

    # -- the two runs -------------------------------------------------------------------------------------------------

    def main(self) -> None:
        began = time.monotonic()
        self._finish(self.config)
        config = self.root / "killed.json"
        config.write_text(json.dumps({**json.loads(self.config.read_text()), "output_dir": str(self.output)}))
        while sum(self.counts[kind] for kind in MOMENTS) < self.kills:
            self._round(config)
        self.counts["seconds"] = round(time.monotonic() - began)
        print(json.dumps(self.counts), flush=True)

    def _round(self, config: Path) -> None:
        """Kill a run that starts with nothing, finish it, and compare it."""
        shutil.rmtree(self.output, ignore_errors=True)
        shutil.rmtree(self.root / "cache", ignore_errors=True)
        if self.server:
            self._clear_bucket()
        done = sum(self.counts[kind] for kind in MOMENTS)
        count = min(KILLS_OF_A_ROUND, self.kills - done)
        middle = ["saves", "validations", "anywhere", "saves"] * count
        early = max(1, count // 6)
        for moment in ["caches"] * early + middle[: max(count - 2 * early, 0)] + ["export"] * early:
            if self._attempt(config, moment):
                break
        self._calm()
        self._finish(config)
        self.counts["rounds"] += 1
        assert losses(self.output) == losses(self.whole), "other losses"
        assert files(self.output / "student") == files(self.whole / "student"), "another student"
        mine, theirs = ({name: each for name, each in files(folder / "validation").items() if "scores" in name}
                        for folder in (self.output, self.whole))  # fmt: skip
        assert mine == theirs, "other scores of validations"
        print(f"equal after {dict(self.counts)}", file=sys.stderr, flush=True)

    def _finish(self, config: Path) -> None:
        attempt = Attempt(config, self.root / "last.log", processes=self.processes)
        deadline = time.monotonic() + 2 * LIMIT
        while not attempt.reap():
            if time.monotonic() > deadline:
                attempt.end("the run does not come to its end")
            time.sleep(0.01)
        if any(attempt.codes.values()):
            attempt.end("an attempt without any fault failed")

    # -- one attempt --------------------------------------------------------------------------------------------------

    def _attempt(self, config: Path, moment: str) -> bool:
        """Start the run and kill it at a moment; returns whether it has come to its end before."""
        full = self.rng.random() < self.given.full_disks
        size = int(10 ** self.rng.uniform(3, 6)) if full else None
        attempt = Attempt(config, self.root / "attempt.log", processes=self.processes, file_bytes=size)
        for _ in self._until(attempt, "nothing" if full else moment):
            if attempt.reap():
                return self._ended(attempt, full)
        attempt.kill(self.rng)
        if 99 in attempt.codes.values():
            attempt.end("an attempt failed with a traceback")
        self.counts["anywhere" if full else moment] += 1
        return False

    def _ended(self, attempt: Attempt, full: bool) -> bool:
        if not any(attempt.codes.values()):
            return True
        if 99 in attempt.codes.values() or not (full or self.server):
            attempt.end("an attempt failed by itself")
        self.counts["full disks" if full else "outages"] += 1
        return False

    def _until(self, attempt: Attempt, moment: str) -> Iterator[None]:
        """Wait for a moment; yields now and then, so that the end of the attempt is seen."""
        began = time.monotonic()
        random_end = began + self.rng.uniform(0.3, 8.0)
        skip = self.rng.randrange(3) if moment == "saves" else 0
        limit = began + (20.0 if moment == "nothing" else LIMIT)
        while time.monotonic() < limit:
            self._outage()
            yield
            if moment == "anywhere":
                if time.monotonic() > random_end:
                    return
            elif moment != "nothing" and self._at(moment, attempt.began):
                if skip == 0:
                    time.sleep(self.rng.uniform(0, 0.02))
                    return
                skip -= 1
                while self._at(moment, attempt.began) and attempt.pids and not attempt.reap():
                    time.sleep(0.001)
            time.sleep(0.001)

    def _at(self, moment: str, began: float) -> bool:
        match moment:
            case "saves":
                return any(self.output.glob(".checkpoint-*.partial"))
            case "export":
                return (self.output / ".student.partial").exists()
            case "caches":
                return max(newest(self.root / "cache"), newest(self.output / "cache")) > began
            case _:
                return newest(self.output / "validation") > began

    # -- the bucket ---------------------------------------------------------------------------------------------------

    def _serve(self) -> S3Server:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
            os.environ.pop(name, None)
        os.environ |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/nonexistent"}
        (self.root / "server").mkdir()
        server = S3Server(self.root / "server")
        images = write_images(self.root / "bucket-images")
        server.fill(server.bucket("data"), "images", images)
        reach = server.keys("data", aws_max_attempts=3, aws_timeout_seconds=5)
        kinds = {"latents": "vae_embeds", "texts": "text_embeds", "checkpoints": "checkpoints"}
        data = [{"id": "noise", **reach, "aws_data_prefix": "images"}] + [
            {"id": id, "dataset_type": kind, **reach, "aws_data_prefix": f"run/{id}"}
            | ({"write_batch_size": 4} if id != "checkpoints" else {})
            for id, kind in kinds.items()
        ]
        (self.root / "multidatabackend.json").write_text(json.dumps(data))
        return server

    def _clear_bucket(self) -> None:
        assert self.server
        self._calm()
        for key in self.server.objects("data", "run/"):
            self.server.client.delete_object(Bucket="data", Key=key)

    def _outage(self) -> None:
        """Kill the server, or bring it back, now and then."""
        if self.server is None or time.monotonic() < self._next_outage:
            return
        if self.server.running:
            if self._next_outage:
                self.server.kill()
            self._next_outage = time.monotonic() + self.rng.uniform(0.1, 1.5)
        else:
            self.server.revive()
            self._next_outage = time.monotonic() + self.rng.uniform(2, 15)

    def _calm(self) -> None:
        if self.server is not None and not self.server.running:
            self.server.revive()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="CONFIG", help="a file, and behind it *2 for two processes")
    parser.add_argument("--kills", type=int, nargs="+", required=True, help="of each CONFIG")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--full-disks", type=float, default=0.0, help="share of attempts that find their disk full")
    parser.add_argument("--bucket", action="store_true", help="images, caches and checkpoints in a bucket with outages")
    given = parser.parse_args()
    gc.collect()
    gc.freeze()  # else each attempt looks through the libraries' objects, and so copies their memory
    for run, kills in zip(given.runs, given.kills, strict=True):
        chaos = Chaos(run, kills, given)
        try:
            chaos.main()
        finally:
            if chaos.server is not None:
                chaos.server.close()


if __name__ == "__main__":
    main()
