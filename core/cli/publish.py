"""`distill publish`: a finished run's student to wherever publishers take it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import SetOption


def publish(
    output_dir: Annotated[Path, typer.Argument(help="The output folder of a finished run.")],
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="NAMES", help="Publishers, as kohya,archive; the run's own by default."),
    ] = None,
    set_: SetOption = None,
) -> None:
    """Publish a finished run's student: hub, bucket, archive, a LoRA for ComfyUI (`distill plugins list`)."""
    from ..errors import DistillError
    from ..runs.finished import open_run
    from ..runs.output_folder import STUDENT_FOLDER
    from ..runs.publishing import publishers_named
    from ..runs.run_lock import refuse_while_running

    refuse_while_running(output_dir)
    configuration, registry = open_run(output_dir, overrides=set_ or ())
    names = [name.strip() for name in (to or "").split(",") if name.strip()]
    publishers = publishers_named(registry, configuration, names)
    publishers.require()
    done, asked = len(publishers.publish(output_dir / STUDENT_FOLDER)), len(publishers.names)
    if done < asked:
        raise DistillError(f"{asked - done} of {asked} publishers failed, see above")
