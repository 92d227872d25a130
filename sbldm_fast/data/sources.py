"""What a user names to files, and from a file's name its subject and modality.

Layouts known by name: BraTS 2017 to 2023, RSNA-MICCAI, BIDS, IXI, OASIS, ADNI, UPENN-GBM. A rule that takes two
subjects for one spoils nothing; one that takes one for two lets a person into training and test. So a name is cut where
it may be: after its first number.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sbldm_fast.files import printable

from ..errors import UserError
from .dicom import is_dicom

# longest first: t1ce is not t1
MODALITY = re.compile(r"(?<![a-z0-9])(flair|t1wce|t1ce|t1gd|t1c|t1n|t1w?|t2f|t2w?|pd)(?![a-z0-9])", re.IGNORECASE)
_NAMES = {"T1W": "T1", "T1N": "T1", "T2W": "T2", "T1WCE": "T1CE", "T1GD": "T1CE", "T1C": "T1CE", "T2F": "FLAIR"}
# BraTS-GLI-00005-000 and -001 are two visits of one subject
_SUBJECT = re.compile(
    r"(sub-[a-z0-9]+|patient[_-]?\d+|subject[_-]?\d+|brats1[789]_[a-z0-9]+_[a-z0-9]+_1"
    r"|brats[a-z0-9]*(?:[-_][a-z]+)*[-_]\d+|oas\d_\d+|\d{3}_s_\d{4}|upenn-gbm-\d+)",
    re.IGNORECASE,
)
_VISIT = re.compile(r"(ses|session|study|visit)[-_]?\w*|anat|dicom|mri?", re.IGNORECASE)
_LABELS = re.compile(r"(?<![a-z])(seg|mask|labels?|lesions?)(?![a-z])", re.IGNORECASE)
_EXTENSION = re.compile(r"\.(nii|hdr|img|png|jpe?g|dcm|ima)(\.gz)?$", re.IGNORECASE)
NIFTI = (".nii", ".nii.gz", ".hdr", ".hdr.gz")
PICTURES = (".png", ".jpg", ".jpeg")
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".7z", ".rar")
PREPARED = {"slices.npy", "manifest.json", "contact_sheet.png"}  # what prepare writes


@dataclass(frozen=True)
class Job:
    """What is read at a time: a NIfTI file or pair, a picture, the DICOM files of a folder, or one made brain."""

    name: str  # what the manifest and the messages call it: the source's name, then the path below it
    kind: str  # nifti, labels, picture, dicom, archive, mni152, synthetic
    files: tuple[Path, ...] = ()
    index: int = 0


def expand(source: str) -> Iterator[Job]:
    """The jobs of one source: a file, a folder with all below it (links are followed once), `mni152`,
    `synthetic[:COUNT]`.

    Raises:
        ValueError: a source that does not exist or has nothing to read, or a folder in it that may not be read.
    """
    if source == "mni152":
        yield Job("mni152", "mni152")
        return
    if source.split(":")[0] == "synthetic":
        count = source.partition(":")[2] or "20"
        if not re.fullmatch("0*[1-9][0-9]{0,5}", count):
            raise UserError(f"{source}: allowed is synthetic or synthetic:COUNT with COUNT of 1 to 999999")
        yield from (Job(f"synthetic/{i:05d}", "synthetic", index=i) for i in range(int(count)))
        return
    path = Path(source)
    if not source or not path.exists():
        raise UserError(
            f"{source or repr(source)} does not exist; allowed are a NIfTI or DICOM file, a picture, a folder, mni152"
            " and synthetic[:COUNT]"
        )
    if not (path.is_file() or path.is_dir()):
        raise UserError(f"{source} is a pipe, a socket or a device; allowed are files and folders")
    root = path.parent if path.is_file() else path
    top = "" if path.is_file() else f"{path.resolve().name}/"
    found = False
    for folder, names in [(root, [path.name])] if path.is_file() else _walk(path):
        dicom = []
        for name in sorted(names):
            file, kind = folder / name, _kind(folder / name)
            if kind == "dicom":
                dicom.append(file)
            elif kind:
                found = True
                yield Job(printable(f"{top}{file.relative_to(root)}"), kind, (file,))
        if dicom:
            found = True
            yield Job(printable(f"{top}{dicom[0].relative_to(root)}"), "dicom", tuple(dicom))
    if not found:
        raise UserError(f"{source} holds no NIfTI (.nii, .nii.gz, .hdr), DICOM, .png or .jpg file")


def _kind(file: Path) -> str:
    name = file.name.lower()
    with suppress(OSError):  # a link that leads nowhere is named when it is read
        if not stat.S_ISREG(file.stat().st_mode):
            return ""  # a pipe, a socket or a device would be waited for
    if name.endswith(NIFTI):
        return "labels" if _LABELS.search(name) else "nifti"
    if name.endswith(PICTURES):
        return "picture"
    if name.endswith(ARCHIVES):
        return "archive"
    return "dicom" if is_dicom(file) else ""


def _walk(path: Path) -> Iterator[tuple[Path, list[str]]]:
    """Each folder with the names of its files, in order; not os.walk, which calls itself and so ends at a thousand
    folders."""
    visited, waiting = set(), [path]
    while waiting:
        folder = waiting.pop()
        try:
            entries, found = sorted(folder.iterdir()), folder.stat()
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
        below = [entry for entry in entries if entry.is_dir()]
        names = [entry.name for entry in entries if not entry.is_dir()]
        one = found.st_dev, found.st_ino
        if one in visited or set(names) >= PREPARED:  # a link back up, or what an earlier prepare made
            continue
        visited.add(one)
        yield folder, names
        waiting += reversed(below)


def modality_of(text: str) -> str | None:
    """The contrast that a name or a description tells: T1, T1CE, T2, FLAIR, PD."""
    found = MODALITY.findall(re.sub(r"[_/.]", " ", text))
    name = found[-1].upper() if found else None
    return _NAMES.get(name, name) if name else None


def subject_of(job: Job, pattern: re.Pattern[str] | None = None) -> str:
    """The subject that a file's name tells: `source/subject`.

    In this order: the first group of the regular expression `pattern`; a known layout; the first folder with a number
    that names neither a modality nor a visit, or all of them without one; the file's name without modality, up to its
    first number. A slice number is no subject: pictures whose names are bare numbers are one.

    Raises:
        ValueError: the name does not fit `pattern`.
    """
    if pattern is not None:
        fits = pattern.search(job.name)
        if not fits or not fits.groups() or not fits.group(1):
            raise UserError(
                f"subject: got {pattern.pattern!r}, which finds no group in {job.name}; allowed is one that does in"
                " every name"
            )
        return fits.group(1)
    source, _, rest = job.name.partition("/") if "/" in job.name else ("", "", job.name)
    source = "" if MODALITY.search(source.replace("_", " ")) and job.kind != "dicom" else source
    *folders, file = rest.split("/")
    folders = [f for f in folders if not _VISIT.fullmatch(f) and not MODALITY.search(f.replace("_", " "))]
    stem = _EXTENSION.sub("", file)
    for part in (stem, *reversed(folders)):
        found = _SUBJECT.search(part)
        if found:
            return "/".join(p for p in (source, found.group(1)) if p)
    if folders or job.kind == "dicom":
        numbered = [f for f in folders if re.search(r"\d", f)]
        return "/".join(p for p in (source, *(numbered[:1] or folders)) if p) or "dicom"
    stem = MODALITY.sub("", stem.replace("_", " "))
    if job.kind == "picture":
        stem = re.sub(r"(slice|z)?[ -]*\d+[ -]*$", "", stem, flags=re.IGNORECASE)
    numbered = re.findall(r"^.*?\d+", stem)
    name = (numbered[0] if numbered else stem).strip(" -").replace(" ", "_")
    return "/".join(p for p in (source, name) if p) or job.name


class Subjects:
    """Who is who: scans of one name, of one patient, or that share a slice are one subject.

    Several patients of one name are several subjects, unless there is a scan of that name without an ID: it may be of
    any of them.
    """

    def __init__(self) -> None:
        self._up: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._names: dict[tuple[str, ...], str] = {}

    def add(self, name: str, patient: str, checksums: list[str]) -> tuple[str, ...]:
        """A scan; returns what `names` knows it by. `patient` is an ID that is never written anywhere, or empty."""
        node = ("name", name.lower(), patient)
        self._names.setdefault(node, name)
        for other in [("patient", patient)] * bool(patient) + [("slice", c) for c in checksums]:
            self._join(other, node)
        return node

    def names(self) -> dict[tuple[str, ...], str]:
        """The subject of each scan that was added; two that would share a name are numbered."""
        for node in self._names:
            if (anyone := (*node[:2], "")) in self._names:
                self._join(node, anyone)
        named: dict[tuple[str, ...], str] = {}
        taken: set[str] = set()
        out = {}
        for node, name in self._names.items():
            top = self._top(node)
            if top not in named:
                free = (n for i in range(len(self._names) + 1) if (n := f"{name}-{i}" if i else name) not in taken)
                named[top] = next(free)
                taken.add(named[top])
            out[node] = named[top]
        return out

    def _join(self, one: tuple[str, ...], other: tuple[str, ...]) -> None:
        self._up[self._top(one)] = self._top(other)

    def _top(self, node: tuple[str, ...]) -> tuple[str, ...]:
        while self._up.get(node, node) != node:
            node = self._up[node]
        return node
