"""`distill generate`: an image from a finished run's student."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from .options import BasePrecisionOption, overrides

logger = logging.getLogger(__name__)


def generate(
    output_dir: Annotated[Path, typer.Argument(help="The output folder of a finished run.")],
    prompt: Annotated[str, typer.Option(help="Prompt of the image.")],
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Number of steps; the student's own by default.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="PNG file to write; by default a new file in OUTPUT_DIR/generated/.")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH[:WEIGHT]", help="LoRA to add to the student; can be given several times."),
    ] = None,
    base_model_precision: BasePrecisionOption = None,
) -> None:
    """Make an image with the student of a finished run."""
    from ..drawing.grid import to_images
    from ..engine.returned import sampler_of
    from ..evaluation.prompts import cut_prompts, encoded
    from ..evaluation.sampling import SamplingPlan, make_images, sampling
    from ..evaluation.validation import slug
    from ..runs.builders import build_family, build_method
    from ..runs.finished import ExportedNetworks, open_run, parse_loras
    from ..runs.output_folder import STUDENT_FOLDER
    from ..runs.run_lock import note_while_running
    from ..settings.configuration import default_resolution
    from ..utils.files import save_image

    loras = parse_loras(lora or [])
    note_while_running(output_dir)
    configuration, registry = open_run(output_dir, overrides=overrides(base_model_precision=base_model_precision))
    family = build_family(configuration, registry)
    run, method = configuration.run, build_method(configuration, registry, family)
    sampler = sampler_of(
        method,
        family.schedule,
        num_inference_steps=steps or run.validation_num_inference_steps,
        guidance_scale=run.validation_guidance,
    )
    role = method.result_role()
    recipe = SamplingPlan("student", role, sampler, sampler.num_inference_steps, sampler.guidance_scale)
    width, height = default_resolution(configuration)
    networks = ExportedNetworks(family, output_dir / STUDENT_FOLDER, extra_loras=loras)
    for line in cut_prompts(family, [prompt]):
        logger.warning(line)
    embeds = encoded(family, [prompt])
    with sampling(networks, role) as network:
        batches = list(make_images(family, network, recipe, embeds, [0], [seed], width=width, height=height))
    file = out or output_dir / "generated" / f"{slug(prompt)}-{recipe.steps}steps-seed{seed}.png"
    save_image(to_images(batches[0])[0], file)
    logger.info(f"wrote {file} ({width}x{height}, {recipe.label.splitlines()[1]}, seed {seed})")
