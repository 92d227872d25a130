"""Scans to a training set: one array of slices and a manifest that says where each came from."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sbldm_fast.files import whole_folder, write_json

from .synthetic import mni152, synthetic_brain
from .volumes import SIZE, Unusable, axial_slices, load_nifti

SPLITS = {"train": 0.70, "val": 0.15, "test": 0.15}
_PICTURES = (".png", ".jpg", ".jpeg")
_MODALITY = re.compile(r"(?<![a-z0-9])(flair|t1ce|t1gd|t1c|t1w?|t2w?|pd)(?![a-z0-9])", re.IGNORECASE)
_SUBJECT = re.compile(r"(sub-[A-Za-z0-9]+|patient[_-]?\d+|subject[_-]?\d+|BraTS[A-Za-z0-9-]*_[A-Za-z]*_?\d+)", re.IGNORECASE)
_NAMES = {"T1W": "T1", "T2W": "T2", "T1GD": "T1CE", "T1C": "T1CE"}


@dataclass
class Scan:
    """The slices of one file or one synthetic brain, `[N, 128, 128]`, and what the manifest says of them."""

    source: str
    subject: str
    modality: str
    slices: np.ndarray
    positions: Sequence[float | None]
    covariates: dict[str, float | str] = field(default_factory=dict)


def prepare(
    sources: Sequence[str], out: str | Path, *, split: str = "subject", seed: int = 42, volume: int | None = None, every: int = 1,
    strict: bool = False, progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Write `slices.npy` (`[N, 128, 128]` float16 in [-1, 1]) and `manifest.json` to the folder `out`; return the manifest.

    Args:
        sources: NIfTI files, folders of NIfTI or PNG/JPG files, `mni152`, `synthetic` or `synthetic:COUNT`.
        split: `"subject"` keeps all slices of a subject in one of train/val/test (70/15/15); `"slice"` is the leaking split of
            paper 001.
        seed: of the split and of the synthetic population.
        volume: which volume of 4-D files.
        every: keep every n-th slice.
        strict: raise at the first unusable file instead of naming and skipping it.

    Raises:
        ValueError: a source that does not exist, has nothing to read, or (`strict`) has a broken file.
    """
    if split not in ("subject", "slice"):
        raise ValueError(f"split: got {split!r}, allowed are subject, slice")
    if every < 1:
        raise ValueError(f"every: got {every}, allowed is 1 or more")
    jobs = [job for source in sources for job in _expand(source)]
    scans: list[Scan] = []
    skipped: list[dict[str, str]] = []
    for job in tqdm(jobs, desc="prepare", unit="scan", disable=not progress):
        try:
            scans.append(_read(job, seed, volume))
        except Unusable as reason:
            if strict:
                raise ValueError(f"{job.name}: {reason}") from None
            skipped.append({"source": job.name, "reason": str(reason)})
    rows: list[dict[str, Any]] = []
    kept: list[np.ndarray] = []
    for scan in scans:
        for image, position in list(zip(scan.slices, scan.positions, strict=True))[::every]:
            stored = image.astype(np.float16)
            kept.append(stored)
            rows.append({
                "source": scan.source, "subject": scan.subject, "modality": scan.modality,
                "position_mm": None if position is None else round(float(position), 3),
                "covariates": scan.covariates, "sha256": hashlib.sha256(stored.tobytes()).hexdigest(),
            })  # fmt: skip
    if not rows:
        reasons = "; ".join(f"{s['source']}: {s['reason']}" for s in skipped[:3])
        raise ValueError(f"no usable slice in {', '.join(sources)}" + (f" ({reasons})" if reasons else ""))
    units = [row["subject"] for row in rows] if split == "subject" else [str(i) for i in range(len(rows))]
    where = assign_splits(units, seed)
    for row, unit in zip(rows, units, strict=True):
        row["split"] = where[unit]
    manifest: dict[str, Any] = {
        "format": 1,
        "convention": "row 0 anterior, column 0 patient's left, square pixels, intensity -1 to 1 per volume",
        "split": {"by": split, "seed": seed, "slices": dict(Counter(row["split"] for row in rows))},
        "subjects": len({row["subject"] for row in rows}),
        "skipped": skipped,
        "slices": rows,
    }
    with whole_folder(out) as folder:
        np.save(folder / "slices.npy", np.stack(kept))
        write_json(folder / "manifest.json", manifest)
    return manifest


def assign_splits(units: Sequence[str], seed: int) -> dict[str, str]:
    """Train, val or test for each distinct unit: 70/15/15, and at least one each where there are three units."""
    distinct = sorted(set(units))
    order = [distinct[i] for i in np.random.default_rng(seed).permutation(len(distinct))]
    held_out = max(1, round(SPLITS["val"] * len(order))) if len(order) >= 3 else 0
    names = ["val"] * held_out + ["test"] * held_out
    names += ["train"] * (len(order) - len(names))
    return dict(zip(order, names, strict=True))


@dataclass(frozen=True)
class _Job:
    name: str  # what the manifest and the messages call it
    kind: str  # nifti, picture, mni152, synthetic
    path: Path = Path()
    index: int = 0


def _expand(source: str) -> Iterator[_Job]:
    if source == "mni152":
        yield _Job("mni152", "mni152")
        return
    if source.split(":")[0] == "synthetic":
        count = source.partition(":")[2] or "20"
        if not count.isdecimal() or int(count) < 1:
            raise ValueError(f"{source}: allowed is synthetic or synthetic:COUNT with COUNT of 1 or more")
        yield from (_Job(f"synthetic/{i:05d}", "synthetic", index=i) for i in range(int(count)))
        return
    path = Path(source)
    if not path.exists():
        raise ValueError(f"{source} does not exist; allowed are a NIfTI file, a folder, mni152 and synthetic[:COUNT]")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    root = path.parent if path.is_file() else path
    found = False
    for file in files:
        name = f"{path.name}/{file.relative_to(root)}" if path.is_dir() else file.name
        if file.name.lower().endswith((".nii", ".nii.gz")):
            found = True
            yield _Job(name, "nifti", file)
        elif file.suffix.lower() in _PICTURES:
            found = True
            yield _Job(name, "picture", file)
    if not found:
        raise ValueError(f"{source} holds no .nii, .nii.gz, .png or .jpg file")


def _read(job: _Job, seed: int, volume: int | None) -> Scan:
    if job.kind == "synthetic":
        brain, modality, covariates = synthetic_brain(job.index, seed)
        slices, positions = axial_slices(brain)
        return Scan("synthetic", job.name, modality, slices, list(positions), covariates)
    if job.kind == "mni152":
        slices, positions = axial_slices(mni152())
        return Scan("mni152", "mni152", "T1", slices, list(positions))
    found = _MODALITY.search(job.name.replace("_", " "))
    name = found.group(1).upper() if found else "unknown"
    name = _NAMES.get(name, name)
    if job.kind == "nifti":
        slices, positions = axial_slices(load_nifti(job.path, volume))
        if not len(slices):
            raise Unusable("no slice has 10 % of its pixels above the background")
        return Scan(job.name, _subject(job), name, slices, list(positions))
    return Scan(job.name, _subject(job), name, _picture(job.path)[None], [None])


def _subject(job: _Job) -> str:
    """The subject that a file's name tells, else its folder below the source, else its name without modality and slice number."""
    top, _, rest = job.name.rpartition("/")
    found = _SUBJECT.search(rest) or _SUBJECT.search(top)
    if found:
        return f"{job.name.split('/')[0]}/{found.group(1)}" if top else found.group(1)
    if "/" in top:
        return top
    stem = re.sub(r"\.(nii(\.gz)?|png|jpe?g)$", "", rest, flags=re.IGNORECASE)
    stem = _MODALITY.sub("", stem.replace("_", " "))
    if job.kind == "picture":
        stem = re.sub(r"(slice|z)?[ -]*\d+[ -]*$", "", stem, flags=re.IGNORECASE)
    # a folder of bare numbers says nothing of subjects: it is taken for one
    return "/".join(part for part in (top, stem.strip(" -").replace(" ", "_")) if part) or job.name


def _picture(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            grey = image.convert("F") if image.mode.startswith(("I", "F")) else image.convert("L").convert("F")
    except (OSError, ValueError, SyntaxError) as error:
        raise Unusable(f"not a readable picture ({error})") from None
    side = max(grey.size)
    values = np.asarray(grey)
    low, high = float(values.min()), float(values.max())
    if low == high:
        raise Unusable("every pixel has the same value")
    square = Image.new("F", (side, side), low)
    square.paste(grey, ((side - grey.width) // 2, (side - grey.height) // 2))
    array = np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.float32)
    scaled: np.ndarray = (2 * (array - low) / (high - low) - 1).clip(-1, 1)
    return scaled
