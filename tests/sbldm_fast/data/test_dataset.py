"""Prepared folders as training reads them, and the synthetic population."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from sbldm_fast.data import Slices, prepare
from sbldm_fast.data.synthetic import CONTRASTS, synthetic_brain
from sbldm_fast.data.volumes import SIZE, axial_slices


def test_synthetic_population_is_what_it_says() -> None:
    a, modality, covariates = synthetic_brain(3)
    again, *_ = synthetic_brain(3)
    np.testing.assert_array_equal(a.array, again.array)
    assert modality in CONTRASTS
    assert 20 <= float(covariates["age"]) <= 85
    assert covariates["sex"] in ("F", "M")
    assert not np.array_equal(a.array, synthetic_brain(4)[0].array)
    ages, volumes = np.array(
        [[c["age"], c["ventricle_volume"]] for c in (synthetic_brain(i)[2] for i in range(32))], dtype=float
    ).T
    assert 0.2 < np.corrcoef(ages, volumes)[0, 1] < 0.7, "age tells something of ventricles, and not all"
    assert 5 < volumes.min() < volumes.max() < 45
    assert volumes.std() > 6
    slices, positions = axial_slices(a)
    assert 50 < len(slices) < 90
    assert np.all(np.diff(positions) == 2)


def test_mni152_goes_through(tmp_path: Path) -> None:
    manifest = prepare(["mni152"], tmp_path / "out", every=8, progress=False)
    assert {row["source"] for row in manifest["slices"]} == {"mni152"}
    assert len(manifest["slices"]) > 10


def test_damaged_prepared_folder_is_named(tmp_path: Path) -> None:
    prepare(["synthetic:1"], tmp_path / "out", every=20, progress=False)
    with pytest.raises(ValueError, match="the val split is empty"):
        Slices(tmp_path / "out", "val")
    with pytest.raises(ValueError, match="split: got 'dev'"):
        Slices(tmp_path / "out", "dev")
    np.save(tmp_path / "out" / "slices.npy", np.zeros((1, SIZE, SIZE), np.float16))
    with pytest.raises(ValueError, match="the manifest lists"):
        Slices(tmp_path / "out")
    (tmp_path / "out" / "slices.npy").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"slices.npy is not readable"):
        Slices(tmp_path / "out")
    with pytest.raises(ValueError, match=r"manifest.json does not exist"):
        Slices(tmp_path)
    manifest = tmp_path / "out" / "manifest.json"
    np.save(tmp_path / "out" / "slices.npy", np.zeros((1, SIZE, SIZE), np.float16))
    for content, message in (
        ({"format": 1, "slices": [{}]}, "has format 1, allowed is 2; run prepare again"),
        ({"format": 2, "slices": []}, "lists no slices"),
        ({"format": 2, "slices": [{"split": "train"}]}, "lists no slices"),
        (
            {"format": 2, "slices": [{"split": "train", "subject": "a", "sha256": "b"}]},
            r"slice 0 is not the one .* \(its checksum differs\)",
        ),
        ([], "holds a JSON list"),
    ):
        manifest.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            Slices(tmp_path / "out")


def test_a_hostile_array_is_named(tmp_path: Path) -> None:
    out, path = tmp_path / "out", tmp_path / "out" / "slices.npy"
    manifest = prepare(["synthetic:1"], out, every=20, progress=False)
    whole = path.read_bytes()

    def header(text: str) -> bytes:
        return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()

    def npz() -> bytes:
        np.savez(tmp_path / "a.npz", np.zeros(3))
        return (tmp_path / "a.npz").read_bytes()

    for content in (
        npz(),
        header("(" * 5000),
        header("{'descr': '<f2', 'fortran_order': False, 'shape': (-1, 128, 128)}"),
        whole[:-9],
        whole[:40],
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"slices.npy is not readable as a .npy file \(\w+\); run prepare again"):
            Slices(out)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"slices.npy does not exist, or is no file"):
        Slices(out)
    path.unlink()
    array = np.full((len(manifest["slices"]), SIZE, SIZE), np.nan, np.float16)
    np.save(path, array)
    for row in manifest["slices"]:
        row["sha256"] = hashlib.sha256(array[0].tobytes()).hexdigest()
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"slice 0 holds values that are not in -1 to 1"):
        Slices(out)
    (out / "manifest.json").write_text('{"format": 2, "slices": 5}')
    with pytest.raises(ValueError, match=r"manifest.json lists no slices"):
        Slices(out)
