"""What the README of a new plugin says of its use, by kind."""

from __future__ import annotations

_MINIATURE = "Without `--model` and `--data` it is tried on the miniature that ships with distill.\n"

USAGE = {
    "method": f"""
```bash
distill run --method $name --family sdxl --output-dir output/$name
```

{_MINIATURE}""",
    "family": f"""
```bash
distill run --method lcm --family $name --set family_config.$name.clip_skip=1 --output-dir output/$name
```

{_MINIATURE}""",
    "data_backend": """
An entry of the data file (`--data data.json`):

```json
[{"id": "my-pictures", "type": "$name", "zip_file": "pictures.zip", "resolution": 1.0, "resolution_type": "area"}]
```

Captions stand in `.txt` files beside the pictures, inside the archive. Caches are kept in the output folder.
""",
    "tracker": """
```bash
distill run --method lcm --family sdxl --set report_to=$name --output-dir output/$name
```

Several trackers at once: `report_to=tensorboard,$name`. Its settings: `tracker_config.$name`.
""",
    "optimizer": """
```bash
distill run --method lcm --family sdxl --set optimizer=$name --output-dir output/$name
```

Its settings: `optimizer_config.$name`; `learning_rate` and the `adam_*` keys are the run's.
""",
    "quantizer": """
```bash
distill run --method lcm --family sdxl --set base_model_precision=$name --output-dir output/$name
```

Its settings: `quantizer_config.$name`.
""",
    "evaluator": """
Every evaluator that is installed takes part in the scores at the end of a run, and in those of

```bash
distill evaluate output/my-run
```

`evaluators=$name` asks for this one alone.
""",
    "publisher": """
```bash
distill run --method lcm --family sdxl --set publish_to=$name --set publisher_config.$name.folder=students
```

The folder `students` must be there when the run starts.
""",
}
"""Kind -> Markdown with the placeholders of the templates."""
