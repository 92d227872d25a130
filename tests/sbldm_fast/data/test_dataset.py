"""Prepared folders as training reads them, and the synthetic population."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sbldm_fast.data import Frame, Slices, prepare
from sbldm_fast.data.dataset import read_manifest
from sbldm_fast.data.frame import SIZE
from sbldm_fast.data.synthetic import CONTRASTS, synthetic_brain
from sbldm_fast.data.volumes import axial_slices

from .test_volumes import head, save


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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three heads of twelve slices 5 mm apart, of which each second is kept, one of them twice in its split."""
    folder = tmp_path_factory.mktemp("whole")
    for i, kind in ((0, "T1w"), (1, "T1w"), (2, "T1w"), (2, "T2w")):
        save(head(person=i), folder / "in" / f"sub-{i}_{kind}.nii")
    prepare([str(folder / "in")], folder / "out", frame=Frame(24, 16, 10.0), volumes=True, every=2, progress=False)
    return folder / "out"


def test_volumes_are_told_by_the_manifest(whole: Path) -> None:
    content = read_manifest(whole)
    assert (content["size"], content["spacing"]) == ([24, 16], 10.0)
    assert [row["volume"] for row in content["slices"]] == [n for n in range(4) for _ in range(6)]
    assert {row["distance_mm"] for row in content["slices"]} == {10.0}
    for split in ("train", "val", "test"):
        slices = Slices(whole, split)
        assert (slices.size, slices.spacing) == ((24, 16), 10.0)
        assert [v.tolist() for v in slices.volumes] == [list(range(i, i + 6)) for i in range(0, len(slices), 6)], (
            "a split's own numbers"
        )
        for volume in slices.volumes:
            assert slices[volume].shape == (6, 1, 24, 16)
            assert np.diff([slices.rows[i]["position_mm"] for i in volume]).tolist() == [10.0] * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.pop(3), r"volume 0: got a gap, 20 mm to the next slice, allowed is 10"),
        (lambda rows: rows.insert(2, rows.pop(3)), r"volume 0: got a gap, 20 mm to the next slice, allowed is 10"),
        (lambda rows: rows.__setitem__(slice(0, 6), rows[5::-1]), "volume 0: got slices out of"),
        (lambda rows: rows.insert(0, rows.pop(6)), "volume 1: got one slice, allowed are two or more"),
        (lambda rows: rows[2].update(distance_mm=9.0), "volume 0: distance_mm is allowed to be one number above 0"),
        (lambda rows: [row.update(distance_mm=0) for row in rows], "volume 0: distance_mm is allowed"),
        (lambda rows: rows[2].update(position_mm=None), "volume 0: got slices out of order, or of another distance"),
        (lambda rows: [row.update(volume=[1]) for row in rows[:6]], r"volume \[1\]: distance_mm is allowed"),
        (
            lambda rows: rows.__setitem__(slice(0, 18), rows[0:3] + rows[6:12] + rows[3:6]),
            "volumes: the slices of one are not one after another",
        ),
    ],
)
def test_what_is_no_volume_is_refused(
    whole: Path, change: Callable[[list[dict[str, Any]]], object], message: str
) -> None:
    slices = Slices(whole)
    slices.rows = copy.deepcopy(read_manifest(whole)["slices"])
    change(slices.rows)
    with pytest.raises(ValueError, match=message):
        _ = slices.volumes


def test_runs_of_equally_distant_slices_are_volumes_where_the_manifest_names_none(whole: Path) -> None:
    def row(position: float | None, subject: str = "a", source: str = "s") -> dict[str, Any]:
        return {"subject": subject, "source": source, "modality": "T1", "position_mm": position}

    slices = Slices(whole)
    slices.rows = [
        *(row(z) for z in (0, 4, 6, 8, 14, 16)),  # 2 mm apart: gaps after the first and the fourth
        *(row(z) for z in (1, 3)),  # the next scan begins further down
        *(row(z, "b") for z in (5.0, 7.0009, 9.0)),
        *(row(None, "c", name) for name in "xyz"),  # pictures
        row(3, "d"),
        *(row(z, "d", "t") for z in (5, 7)),
    ]
    assert [v.tolist() for v in slices.volumes] == [[1, 2, 3], [4, 5], [6, 7], [8, 9, 10], [15, 16]]
    assert all(v.dtype == torch.int64 for v in slices.volumes)


def test_an_earlier_manifest_is_one_of_128_pixels_of_220_mm(tmp_path: Path) -> None:
    manifest = prepare(["synthetic:1"], tmp_path / "out", every=20, progress=False)
    assert (manifest.pop("size"), manifest.pop("spacing")) == ([128, 128], 1.71875)
    assert not {"volume", "distance_mm"} & manifest["slices"][0].keys()
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    slices = Slices(tmp_path / "out")
    assert (slices.size, slices.spacing) == ((128, 128), 1.71875)
    assert [len(v) for v in slices.volumes] == [len(slices)]
    for key, value in (("size", [128]), ("size", [True, 128]), ("size", "128"), ("spacing", -1), ("spacing", "1")):
        (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest | {key: value}))
        with pytest.raises(ValueError, match="size and spacing are no pixels and mm; run prepare again"):
            Slices(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest | {"size": [128, 64]}))
    with pytest.raises(ValueError, match="the manifest lists"):
        Slices(tmp_path / "out")
