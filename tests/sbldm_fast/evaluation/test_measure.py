"""The measurer: what it is trained on is exact, and what it reads is in millimetres."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sbldm_fast import AutoencoderKL, preset
from sbldm_fast.data import Slices, prepare
from sbldm_fast.data.frame import FRAME, Frame
from sbldm_fast.data.synthetic import synthetic_brain, synthetic_brain_with_ventricles
from sbldm_fast.evaluation.measure import (
    HALF,
    Measurer,
    correlation,
    distort,
    make_brains,
    measure_ceiling,
    train_measurer,
    volumes,
)


def test_labels_lie_where_the_ventricles_are() -> None:
    """The map, cut and resized as the image is, sums up to the volume that the generator tells."""
    made = make_brains(3, 5)
    found = volumes(made.ventricles.sum((1, 2, 3)) * FRAME.spacing**2, made.brain, 3, 2.0)
    torch.testing.assert_close(found, made.volume, rtol=0.02, atol=0.0)
    inside = (made.ventricles > 0.9)[:, 0]
    t2 = inside & (made.modality == 1)[:, None, None]
    assert made.slices[:, 0][t2].mean() > 0.5 if t2.any() else True
    others = inside & (made.modality != 1)[:, None, None]
    assert made.slices[:, 0][others].mean() < -0.2, "fluid is dark but in T2"


def test_a_brain_with_its_map_is_the_brain_that_it_was(tmp_path: Path) -> None:
    plain, withmap = synthetic_brain(3, 1), synthetic_brain_with_ventricles(3, 1)
    assert (plain[0].array == withmap[0].array).all()
    assert plain[1:] == withmap[1:3]
    assert withmap[3].shape == plain[0].array.shape
    assert float(withmap[3].sum()) * 8 / 1000 == pytest.approx(plain[2]["ventricle_volume"], abs=0.01)
    prepare(["synthetic:3"], tmp_path / "d", seed=5, progress=False, split="slice")
    made = make_brains(3, 5)
    stored = torch.from_numpy(Slices(tmp_path / "d").array.numpy())
    assert torch.equal(stored, made.slices[:, 0].half())


class Known(Measurer):
    """Says a quarter of ventricle everywhere, a height of half of `HALF`, and the last modality."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.full((len(x), 1, 64, 64), -1.0986123)  # of a quarter
        return logits, torch.full((len(x),), 0.5), torch.tensor([0.0, 1.0, 2.0]).expand(len(x), 3)


def test_what_is_read_is_in_millimetres() -> None:
    read = Known().read(torch.zeros(70, 1, 128, 128))
    torch.testing.assert_close(read.area, torch.full((70,), 0.25 * 220.0**2))
    torch.testing.assert_close(read.position, torch.full((70,), HALF / 2))
    assert read.modality.tolist() == [2] * 70
    area = torch.tensor([100.0, 200.0, 50.0])
    torch.testing.assert_close(volumes(area, torch.tensor([0, 0, 2]), 3, 4.0), torch.tensor([1.2, 0.0, 0.2]))
    assert correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 7.0])) == pytest.approx(0.9933993)


def test_training_lowers_the_error_and_repeats_itself() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(preset("demo").vae).eval()
    models = [train_measurer(vae, brains=1, steps=steps, progress=False) for steps in (1, 12, 12)]
    made = make_brains(1, 1_000_000)
    share = torch.nn.functional.avg_pool2d(made.ventricles, 2)
    with torch.no_grad():
        errors = [float((m(made.slices)[0].sigmoid() - share).abs().mean()) for m in models]
    assert errors[1] < 0.9 * errors[0]
    assert errors[1] == errors[2]
    found = measure_ceiling(models[1], None, brains=2)
    assert (found["brains"], found["slices"] > 30) == (2, True)


def test_distorted_images_stay_images() -> None:
    x = make_brains(1, 2).slices
    y = distort(x, torch.Generator().manual_seed(0))
    assert (y.shape, float(y.min()) >= -1, float(y.max()) <= 1) == (x.shape, True, True)
    assert 0.01 < float((y - x).abs().mean()) < 0.2


def test_brains_of_another_frame_have_the_same_ventricles() -> None:
    """In mm the slices of document 003 show what those of 128 x 128 pixels do."""
    frame = Frame(224, 160, 1.0)
    plain, tall = make_brains(1, 5), make_brains(1, 5, frame=frame)
    assert tall.slices.shape == (len(plain.slices), 1, 224, 160)
    torch.testing.assert_close(tall.position, plain.position)
    area = [made.ventricles.sum() * of.spacing**2 for made, of in ((plain, FRAME), (tall, frame))]
    torch.testing.assert_close(area[1], area[0], rtol=0.01, atol=0)
    logits, *_ = Measurer(4, frame)(tall.slices[:2])
    assert logits.shape == (2, 1, 112, 80)
