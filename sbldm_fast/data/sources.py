"""What a user names to files, and from a file's name its subject and modality. Layouts: BraTS 2017 to 2023, RSNA-MICCAI, BIDS."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .dicom import is_dicom

# longest first: t1ce is not t1
_MODALITY = re.compile(r"(?<![a-z0-9])(flair|t1wce|t1ce|t1gd|t1c|t1n|t1w?|t2f|t2w?|pd)(?![a-z0-9])", re.IGNORECASE)
_NAMES = {"T1W": "T1", "T1N": "T1", "T2W": "T2", "T1WCE": "T1CE", "T1GD": "T1CE", "T1C": "T1CE", "T2F": "FLAIR"}
# BraTS-GLI-00005-000 and -001 are two visits of one subject
_SUBJECT = re.compile(
    r"(sub-[a-z0-9]+|patient[_-]?\d+|subject[_-]?\d+|brats1[789]_[a-z0-9]+_[a-z0-9]+_1|brats[a-z0-9]*(?:[-_][a-z]+)*[-_]\d+)", re.IGNORECASE
)
_VISIT = re.compile(r"(ses|session|study|visit)[-_]?\w*|anat|dicom|mri?", re.IGNORECASE)
_EXTENSION = re.compile(r"\.(nii|hdr|img|png|jpe?g|dcm|ima)(\.gz)?$", re.IGNORECASE)
NIFTI = (".nii", ".nii.gz", ".hdr", ".hdr.gz")
PICTURES = (".png", ".jpg", ".jpeg")
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".7z", ".rar")


@dataclass(frozen=True)
class Job:
    """What is read at a time: a NIfTI file or pair, a picture, the DICOM files of a folder, or one made brain."""

    name: str  # what the manifest and the messages call it: the source's name, then the path below it
    kind: str  # nifti, picture, dicom, archive, mni152, synthetic
    files: tuple[Path, ...] = ()
    index: int = 0


def expand(source: str) -> Iterator[Job]:
    """The jobs of one source: a file, a folder with all below it (links are followed once), `mni152`, `synthetic[:COUNT]`.

    Raises:
        ValueError: a source that does not exist or has nothing to read.
    """
    if source == "mni152":
        yield Job("mni152", "mni152")
        return
    if source.split(":")[0] == "synthetic":
        count = source.partition(":")[2] or "20"
        if not count.isdecimal() or int(count) < 1:
            raise ValueError(f"{source}: allowed is synthetic or synthetic:COUNT with COUNT of 1 or more")
        yield from (Job(f"synthetic/{i:05d}", "synthetic", index=i) for i in range(int(count)))
        return
    path = Path(source)
    if not path.exists():
        raise ValueError(f"{source} does not exist; allowed are a NIfTI or DICOM file, a picture, a folder, mni152 and synthetic[:COUNT]")
    root = path.parent if path.is_file() else path
    top = "" if path.is_file() else f"{path.resolve().name}/"
    found = False
    for folder, names in [(root, [path.name])] if path.is_file() else _walk(path):
        dicom = []
        for name in sorted(names):
            file, lower = folder / name, name.lower()
            kind = (
                "nifti" if lower.endswith(NIFTI) else "picture" if lower.endswith(PICTURES)
                else "archive" if lower.endswith(ARCHIVES) else "dicom" if is_dicom(file) else ""
            )  # fmt: skip
            if kind == "dicom":
                dicom.append(file)
            elif kind:
                found = True
                yield Job(f"{top}{file.relative_to(root)}", kind, (file,))
        if dicom:
            found = True
            yield Job(f"{top}{dicom[0].relative_to(root)}", "dicom", tuple(dicom))
    if not found:
        raise ValueError(f"{source} holds no NIfTI (.nii, .nii.gz, .hdr), DICOM, .png or .jpg file")


def _walk(path: Path) -> Iterator[tuple[Path, list[str]]]:
    visited = set()
    for folder, below, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link back up
            below.clear()
            continue
        visited.add(real)
        below.sort()
        yield Path(folder), names


def modality_of(text: str) -> str | None:
    """The contrast that a name or a description tells: T1, T1CE, T2, FLAIR, PD."""
    found = _MODALITY.findall(re.sub(r"[_/.]", " ", text))
    name = found[-1].upper() if found else None
    return _NAMES.get(name, name) if name else None


def subject_of(job: Job) -> str:
    """The subject that a file's name tells, else its folder without modality and visit, else its name without them and slice number.

    All that lies in one folder of bare numbers is taken for one subject: too few subjects spoil nothing, too many leak.
    """
    source, _, rest = job.name.partition("/") if "/" in job.name else ("", "", job.name)
    stem = _EXTENSION.sub("", rest.rpartition("/")[2])
    folders = [part for part in rest.split("/")[:-1] if not _VISIT.fullmatch(part) and not _MODALITY.fullmatch(part)]
    for part in (stem, *reversed(folders)):
        found = _SUBJECT.search(part)
        if found:
            return "/".join(p for p in (source, found.group(1)) if p)
    if folders or job.kind == "dicom":
        return "/".join(p for p in (source, *folders) if p) or "dicom"
    stem = _MODALITY.sub("", stem.replace("_", " "))
    if job.kind == "picture":
        stem = re.sub(r"(slice|z)?[ -]*\d+[ -]*$", "", stem, flags=re.IGNORECASE)
    return "/".join(p for p in (source, stem.strip(" -").replace(" ", "_")) if p) or job.name
