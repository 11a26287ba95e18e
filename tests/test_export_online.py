"""The weights that the optimizer stepped, beside the average that is exported."""

import pytest
import torch
from safetensors.torch import load_file
from support.small_run import execute, write_run

SHORT = {"max_train_steps": 3, "validation_step_interval": 0, "export_online_weights": True}


def weights(folder):
    (file,) = [*folder.glob("unet/*.safetensors"), *folder.glob("pytorch_lora*.safetensors")]
    return load_file(file)


def sizes(tensors):
    """The sum of each tensor's absolute values, whatever the names."""
    return sorted(float(value.double().abs().sum()) for name, value in tensors.items() if not name.endswith("alpha"))


def saved(output, group):
    return load_file(output / "checkpoint-3" / f"{group}.safetensors")


@pytest.mark.parametrize("settings", [{"model_type": "full"}, {"use_ema": True}])
def test_online_weights_lie_beside_the_average(tmp_path, settings):
    result, _ = execute(write_run(tmp_path, **SHORT, **settings))
    online, exported = weights(result.output_dir / "student-online"), weights(result.student)
    assert online.keys() == exported.keys()
    assert not all(torch.equal(online[name], exported[name]) for name in online)
    assert sizes(online) == sizes(saved(result.output_dir, "network-student"))


def test_without_an_average_a_notice_is_printed(tmp_path, capsys):
    result, _ = execute(write_run(tmp_path, **SHORT))
    assert not (result.output_dir / "student-online").exists()
    assert "export_online_weights has no effect: the student is no average" in capsys.readouterr().err
