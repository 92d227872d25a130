"""Slices that stages are trained on: of made brains, and of noise with known covariates."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from sbldm_fast.data import prepare


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip(
        "nilearn", reason="nilearn, of the extra data, brings the maps that synthetic brains are made of"
    )
    folder = tmp_path_factory.mktemp("data") / "d"
    prepare(["synthetic:3"], folder, every=6, progress=False)
    return folder


@pytest.fixture(scope="session")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of 20 slices of noise, whose ages, modalities and volumes are known, but for some."""
    folder = tmp_path_factory.mktemp("told") / "d"
    folder.mkdir()
    array = np.random.default_rng(0).uniform(-1, 1, (20, 128, 128)).astype(np.float16)
    rows = []
    for i, split in enumerate(["train"] * 14 + ["val"] * 3 + ["test"] * 3):
        known = {"age": 20.0 + i, "ventricle_volume": 10.0 + 2 * i} if i % 5 else {"age": 20.0 + i}
        rows.append(
            {
                "source": f"s/{i}",
                "subject": f"s/{i}",
                "modality": ("T1", "T2", "unknown", "FLAIR")[i % 3 if split == "train" else 3],
                "covariates": known if i != 3 else {},
                "sha256": hashlib.sha256(array[i].tobytes()).hexdigest(),
                "split": split,
            }
        )
    described = {
        "age": {"unit": "years", "definition": "at the scan", "low": 20.0, "high": 39.0, "slices": 19},
        "modality": {"definition": "the contrast", "values": ["FLAIR", "T1", "T2"], "slices": 16},
        "ventricle_volume": {"unit": "ml", "low": 12.0, "high": 48.0, "slices": 15},
    }
    np.save(folder / "slices.npy", array)
    (folder / "manifest.json").write_text(json.dumps({"format": 2, "covariates": described, "slices": rows}))
    return folder
