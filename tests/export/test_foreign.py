"""What the command line takes for a model."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
from sbldm_fast.export.foreign import load

from sbldm_fast import Pipeline


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    unet = diffusers.UNet2DModel(
        sample_size=(8, 16),
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path / "p")
    return tmp_path / "p"


def test_ours_come_with_their_license() -> None:
    source, known = load("demo")
    assert isinstance(source, Pipeline)
    assert "Apache-2.0" in known["license"]


def test_a_diffusers_pipeline_comes_with_shape_and_scheduler(folder: Path) -> None:
    source, known = load(str(folder))
    assert isinstance(source, diffusers.UNet2DModel)
    assert known["shape"] == (3, 8, 16)
    assert isinstance(known["scheduler"], diffusers.DDIMScheduler)
    assert known["scheduler"].config.clip_sample is False


def test_what_it_does_not_take_is_named(folder: Path, tmp_path: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"unet": ["diffusers", "UNet3DConditionModel"]}))
    with pytest.raises(
        ValueError, match=r"got a pipeline of \['diffusers', 'UNet3DConditionModel'\], allowed are ours"
    ):
        load(str(folder))
    for kind in ("__import__", "UNet2DModel", 3, "os"):
        (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", kind]}))
        with pytest.raises(ValueError, match=r"got the scheduler .* allowed is one of diffusers"):
            load(str(folder))
    with pytest.raises(ValueError, match="is not a pipeline folder"):
        load(str(tmp_path / "nothing"))
