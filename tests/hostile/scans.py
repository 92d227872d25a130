"""What a scanner, a converter or somebody with a hex editor may have written: NIfTI, DICOM and pictures as bytes."""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from PIL import Image, PngImagePlugin
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from .conftest import INF, NAN, NIGHTLY, SECRET

pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE  # what is written here is wrong on purpose
WRITABLE = "98765432"  # a number that becomes SECRET once it is bytes: pydicom writes no text where numbers stand
SHAPE, ZOOMS = (48, 56, 6), (4.0, 4.0, 8.0)
FLIPS = 400 if NIGHTLY else 4


def head(person: int = 0) -> np.ndarray:
    """A round head, `[x, y, z]`."""
    x, y = np.meshgrid(*((np.arange(n) - n / 2) * 4.0 for n in SHAPE[:2]), indexing="ij")
    disc = (x**2 + y**2 < 75**2) * (200.0 + y) + np.random.default_rng(person).normal(0, 2, SHAPE[:2])
    return np.repeat(disc[..., None], SHAPE[2], axis=2).clip(0)


def nifti(array: np.ndarray | None = None, extension: bytes = SECRET.encode(), **fields: Any) -> bytes:
    """A NIfTI file with text in every field that takes some; `fields` go to the header as they are."""
    affine = np.diag([*ZOOMS, 1.0])
    image = nib.Nifti1Image((head() if array is None else array).astype(np.float32), affine)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", extension))
    header = np.frombuffer(bytearray(image.to_bytes()), nib.nifti1.header_dtype, 1).copy()
    for name in ("descrip", "aux_file", "db_name", "intent_name"):
        header[name] = SECRET
    with np.errstate(all="ignore"):
        for name, value in fields.items():
            header[name] = value
    return header.tobytes() + image.to_bytes()[348:]


def nifti_files() -> Iterator[tuple[str, str, bytes, str]]:
    """`(id, file name, content, must)`."""
    whole = nifti()
    packed = gzip.compress(whole, mtime=0)
    yield "sound", "a.nii", whole, "work"
    yield "gz-sound", "a.nii.gz", packed, "work"
    for at in (
        range(0, len(whole), 997) if NIGHTLY else (0, 1, 100, 347, 348, 352, 400, len(whole) // 2, len(whole) - 1)
    ):
        yield f"cut-{at}", "a.nii", whole[:at], "refuse"
    for at in range(0, len(packed), 397) if NIGHTLY else (0, 5, 10, len(packed) // 2, len(packed) - 8, len(packed) - 1):
        yield f"gz-cut-{at}", "a.nii.gz", packed[:at], "refuse"
    yield "gz-bad-crc", "a.nii.gz", packed[:-8] + b"\0\0\0\0" + packed[-4:], "refuse"
    yield "gz-bad-length", "a.nii.gz", packed[:-4] + b"\0\0\0\0", "refuse"
    yield "gz-garbage-after", "a.nii.gz", packed + b"garbage", ""
    yield "gz-two-members", "a.nii.gz", packed + packed, ""
    yield "gz-twice", "a.nii.gz", gzip.compress(packed), "refuse"
    yield "gz-is-plain", "a.nii.gz", whole, "refuse"
    yield "no-pair", "a.hdr", whole[:348], "refuse"
    for seed in range(FLIPS):
        random, flipped = np.random.default_rng(seed), bytearray(whole if seed % 2 else packed)
        for at in random.integers(0, 348 if seed % 4 == 1 else len(flipped), 1 + seed % 8):
            flipped[at] ^= 1 << random.integers(8)
        yield f"flips-{seed}", "a.nii" if seed % 2 else "a.nii.gz", bytes(flipped), "" if seed % 2 else "refuse"
    s = math.sqrt(0.5)
    oblique = {"srow_x": [s * 0.3, -s * 0.003, 0, 0], "srow_y": [s * 0.3, s * 0.003, 0, 0], "srow_z": [0, 0, 4, 0]}
    lies: dict[str, dict[str, Any]] = {
        **{f"dim0-{n}": {"dim": [n, *SHAPE, 1, 1, 1, 1]} for n in (-1, 0, 1, 2, 5, 7, 8, 32767)},
        **{f"dim1-{n}": {"dim": [3, n, 56, 6, 1, 1, 1, 1]} for n in (-32768, -1, 0, 1, 32767)},
        "promises-35-TB": {"dim": [3, 32767, 32767, 32767, 1, 1, 1, 1]},
        "promises-4-D": {"dim": [4, 48, 56, 6, 32767, 1, 1, 1]},
        **{f"datatype-{n}": {"datatype": n} for n in (0, 1, 32, 128, 1024, 1536, 1792, 2304, 9999)},
        **{f"offset-{v}": {"vox_offset": v} for v in (NAN, INF, -1, 0, 351.5, 1e9, 3e38)},
        **{f"slope-{v}": {"scl_slope": v} for v in (NAN, INF, 0, -1, 3e38, 1e-45)},
        **{f"inter-{v}": {"scl_inter": v, "scl_slope": 1} for v in (NAN, INF, 3e38)},
        "affine-nan": {"srow_x": [NAN] * 4},
        "affine-inf": {"srow_x": [INF] * 4},
        "affine-zero": {"srow_x": [0] * 4},
        "affine-singular": {"srow_x": [4, 0, 0, 0], "srow_y": [4, 0, 0, 0]},
        "affine-huge": {"srow_x": [3e38, 0, 0, 0]},
        "affine-tiny": {"srow_x": [2e-3, 0, 0, 0], "srow_y": [0, 2e-3, 0, 0], "srow_z": [0, 0, 2e-3, 0]},
        "affine-far": {"srow_z": [0, 0, 8, 3e38]},
        "oblique-thin": oblique,
        "no-codes": {"qform_code": 0, "sform_code": 0},
        "pixdim-nan": {"pixdim": NAN, "sform_code": 0, "qform_code": 1},
        "units": {"xyzt_units": 255},
        "metres": {"xyzt_units": 1},
        "header-size": {"sizeof_hdr": 540},
        "magic": {"magic": b"n+2"},
    }
    either = (
        "dim0-5",
        "dim0-7",
        "slope",
        "inter-3e+38",
        "inter-nan",
        "units",
        "affine-far",
        "offset-0",
        "offset-nan",
        "offset-351.5",
        "offset--1",
        "header-size",
        "dim1-1",
        "datatype-1024",
    )
    for name, fields in lies.items():
        yield name, "a.nii", nifti(**fields), "" if name.startswith(either) else "refuse"
    for name, value in (("nan", NAN), ("inf", INF), ("-inf", -INF)):
        array = head()
        array[20, 20, 2] = value
        yield f"voxel-{name}", "a.nii", nifti(array), "refuse"
    yield "voxels-alike", "a.nii", nifti(0 * head()), "refuse"
    yield "voxels-labels", "a.nii", nifti((head() > 100) * 3.0), "refuse"
    yield "voxels-3e38", "a.nii", nifti(head() * 1e36), ""
    yield "4-D", "a.nii", nifti(np.stack([head()] * 3, axis=3)), "refuse"
    for size in (0, 8, 17, 2**31 - 16, -16):
        at = whole.index(SECRET.encode(), 348) - 8
        yield f"extension-{size}", "a.nii", whole[:at] + struct.pack("<i", size) + whole[at + 4 :], ""
    two = nifti(extension=SECRET.encode() * 4)
    at = two.index(SECRET.encode(), 348) - 8
    second = struct.pack("<ii", 16, 6) + bytes(8) + struct.pack("<ii", 2**31 - 16, 6)
    yield "extension-second", "a.nii", two[:at] + second + two[at + len(second) :], "refuse"


def dicom(k: int, sound: bool = True, person: int = 0, **values: Any) -> FileDataset:
    """Axial slice k with text in everything that takes some; `sound`: the text is allowed where it stands."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, "1.2.840.10008.5.1.4.1.1.4"
    meta.MediaStorageSOPInstanceUID = f"1.2.3.{k}"
    ds = FileDataset("", Dataset(), file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID, ds.SeriesInstanceUID = (
        meta.MediaStorageSOPClassUID,
        f"1.2.{person}.{k}",
        f"1.2.{person}",
    )
    for name in (
        "PatientID",
        "PatientName",
        "SeriesDescription",
        "StudyDescription",
        "InstitutionName",
        "ImageComments",
        "AccessionNumber",
    ):
        setattr(ds, name, SECRET)
    if sound:
        ds.PatientID = f"{SECRET}-{person}"
    else:
        ds.SOPInstanceUID, ds.SeriesInstanceUID, ds.StudyDate, ds.AcquisitionTime = (
            f"{SECRET}.{k}",
            f"1.{SECRET}",
            SECRET,
            SECRET,
        )
        ds.PatientBirthDate = ds.StudyTime = SECRET
        ds.add_new(0x00091010, "LO", SECRET)
    ds.ImageOrientationPatient, ds.PixelSpacing, ds.SliceThickness = [1, 0, 0, 0, 1, 0], [4, 4], 8
    ds.ImagePositionPatient, ds.InstanceNumber, ds.RescaleSlope, ds.RescaleIntercept = [-96, -112, 8 * k], k, 1, 0
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = SHAPE[1], SHAPE[0], 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
    ds.PixelData = np.ascontiguousarray(head(person)[..., k].T[::-1, ::-1]).astype(np.uint16).tobytes()
    for name, value in values.items():
        if value is None:
            delattr(ds, name)
        else:
            setattr(ds, name, value)
    return ds


def stored(ds: FileDataset) -> bytes:
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue().replace(WRITABLE.encode(), SECRET.encode())


# of every slice; what must hold; then what makes no sense of itself, but is no reason to refuse the scan
DICOM_LIES: dict[str, tuple[dict[str, Any], str]] = {
    "sound": ({}, "work"),
    "text-everywhere": ({"sound": False}, "work"),
    "charset": ({"SpecificCharacterSet": SECRET}, ""),
    **{
        f"{tag}-text": ({tag: [WRITABLE] * n}, "refuse")
        for tag, n in (
            ("ImageOrientationPatient", 6),
            ("ImagePositionPatient", 3),
            ("PixelSpacing", 2),
            ("NumberOfFrames", 1),
            ("RescaleSlope", 1),
        )
    },
    **{
        f"{tag}-text": ({tag: WRITABLE}, "")
        for tag in ("SliceThickness", "EchoTime", "AcquisitionNumber", "InstanceNumber", "TriggerTime")
    },
    **{
        f"position-{v}": ({"ImagePositionPatient": [0, 0, str(v)]}, "refuse")
        for v in (1e300, -1e300, "NaN", "Infinity", "1e999")
    },
    "position-short": ({"ImagePositionPatient": [0, 0]}, "refuse"),
    "position-none": ({"ImagePositionPatient": None}, "refuse"),
    **{f"spacing-{v}": ({"PixelSpacing": [str(v)] * 2}, "refuse") for v in (0, -4, 1e-300, 1e300, "NaN")},
    "orientation-zero": ({"ImageOrientationPatient": [0] * 6}, "refuse"),
    "orientation-1e200": ({"ImageOrientationPatient": ["1e200"] * 6}, "refuse"),
    **{f"rows-{n}": ({"Rows": n}, "refuse") for n in (0, 1, 65535)},
    "columns-0": ({"Columns": 0}, "refuse"),
    **{f"bits-{n}": ({"BitsAllocated": n}, "refuse") for n in (0, 1, 12, 32, 64, 65535)},
    "bits-8": ({"BitsAllocated": 8}, "refuse"),
    "bits-stored": ({"BitsStored": 60}, ""),
    "sign-7": ({"PixelRepresentation": 7}, ""),
    "samples-3": ({"SamplesPerPixel": 3}, "refuse"),
    **{f"frames-{n}": ({"NumberOfFrames": n}, "refuse") for n in (10**9,)},
    **{f"frames-{n}": ({"NumberOfFrames": n}, "") for n in (0, -1)},
    "pixels-long": ({"PixelData": b"\1" * 40000}, "refuse"),
    "pixels-short": ({"PixelData": b"\1" * 100}, "refuse"),
    "pixels-none": ({"PixelData": None}, "refuse"),
    "pixels-empty": ({"PixelData": b""}, "refuse"),
    "mosaic": ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]}, "refuse"),
    "palette": ({"PhotometricInterpretation": "PALETTE COLOR"}, "refuse"),
    "monochrome1": ({"PhotometricInterpretation": "MONOCHROME1"}, "work"),
    "photometric-text": ({"PhotometricInterpretation": SECRET}, "refuse"),
    "nobody": ({"PatientID": None}, "work"),
    "patient-long": ({"PatientID": SECRET * 10000}, ""),
    **{f"slope-{v}": ({"RescaleSlope": str(v)}, "refuse") for v in ("NaN", "1e308", 0)},
}


def dicom_bytes() -> Iterator[tuple[str, bytes]]:
    """Files that take the place of slice 2 of a sound series: the others have a gap then, or it is read; nothing
    else."""
    whole = stored(dicom(2, sound=False))
    for at in (
        range(0, len(whole), 61) if NIGHTLY else (0, 100, 131, 132, 140, 300, 600, len(whole) // 2, len(whole) - 1)
    ):
        yield f"cut-{at}", whole[:at]
    for seed in range(2 * FLIPS):
        random, flipped = np.random.default_rng(seed), bytearray(whole)
        for at in random.integers(128, 1200, 1 + seed % 8):
            flipped[at] ^= 1 << random.integers(8)
        yield f"flips-{seed}", bytes(flipped)
    rows = whole.index(struct.pack("<HH", 0x28, 0x10))
    yield "length-beyond-the-end", whole[: rows + 6] + b"\xff\xff" + whole[rows + 8 :]
    pixels = whole.index(struct.pack("<HH", 0x7FE0, 0x10))
    yield "pixels-of-4-GB", whole[: pixels + 8] + struct.pack("<I", 2**32 - 2) + whole[pixels + 12 :]
    yield "pixels-undefined", whole[: pixels + 8] + struct.pack("<I", 2**32 - 1) + whole[pixels + 12 :]
    for name, uid in (
        ("jpeg", "1.2.840.10008.1.2.4.50"),
        ("jpeg2000", "1.2.840.10008.1.2.4.90"),
        ("rle", "1.2.840.10008.1.2.5"),
        ("deflated", "1.2.840.10008.1.2.1.99"),
        ("big-endian", "1.2.840.10008.1.2.2"),
        ("syntax-text", f"{SECRET:22}"),
    ):
        length = len(uid) + len(uid) % 2
        old = struct.pack("<HH", 2, 16) + b"UI" + struct.pack("<H", 20) + b"1.2.840.10008.1.2.1\0"
        yield name, whole.replace(old, old[:6] + struct.pack("<H", length) + uid.encode().ljust(length, b"\0"))
    deep = struct.pack("<HH2sHI", 0x08, 0x1140, b"SQ", 0, 2**32 - 1) + struct.pack("<HHI", 0xFFFE, 0xE000, 2**32 - 1)
    at = whole.index(struct.pack("<HH", 0x10, 0x10))
    for depth in (900, 100_000):
        yield f"sequences-{depth}-deep", whole[:at] + deep * depth + whole[at:]


def png(mode: str = "L", size: tuple[int, int] = (64, 64), kind: str = "PNG", **options: Any) -> bytes:
    image = Image.fromarray(
        (np.hypot(*(np.mgrid[: size[1], : size[0]] - 32)) * 4).clip(0, 255).astype(np.uint8)
    ).convert(mode)
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", SECRET)
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"pnginfo": text} if kind == "PNG" else {}), **options)
    return buffer.getvalue()


def empty_png(width: int, height: int) -> bytes:
    """A PNG of one bit a pixel: black but for its first bytes, a thousandth of what it takes unpacked."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    line = 1 + (width + 7) // 8
    body = packer.compress(b"\0\xaa".ljust(line, b"\0"))
    for _ in range(min(height - 1, 2**27 // line)):
        body += packer.compress(bytes(line))
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body + packer.flush()) + chunk(b"IEND", b"")


def picture_files() -> Iterator[tuple[str, bytes, str]]:
    whole = png()
    for mode in ("L", "1", "P", "RGB", "RGBA", "LA", "I;16"):
        yield f"mode-{mode}", png(mode), "work"
    for at in range(0, len(whole), 17) if NIGHTLY else (0, 7, 8, 20, 33, 50, len(whole) // 2, len(whole) - 13):
        yield f"cut-{at}", whole[:at], "refuse" if at < len(whole) - 60 else ""
    for seed in range(FLIPS):
        random, flipped = np.random.default_rng(seed), bytearray(whole)
        flipped[random.integers(8, len(flipped))] ^= 1 << random.integers(8)
        yield f"flips-{seed}", bytes(flipped), ""
    for name, size in (("2^31", (2**31 - 1, 2**31 - 1)), ("30000^2", (30000, 30000)), ("13000^2", (13000, 13000))):
        yield f"bomb-{name}", empty_png(*size), "refuse"
    yield "bomb-a-line", empty_png(400_000, 1), "refuse"
    yield "one-pixel", png(size=(1, 1)), "refuse"
    for name, value in (("nan", NAN), ("inf", INF)):
        array, buffer = np.asarray(Image.open(io.BytesIO(whole))).astype(np.float32), io.BytesIO()
        array[3, 3] = value
        Image.fromarray(array).save(buffer, "TIFF")
        yield f"tiff-{name}", buffer.getvalue(), "refuse"
    yield (
        "postscript",
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n(RAN) (w) file"
            b" closefile\nshowpage\n%%EOF\n"
        ),
        "refuse",
    )
    yield "svg", b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", "refuse"
    yield "gif", png(kind="GIF"), ""
    yield "exif-garbage", png(exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + SECRET.encode() * 9), ""
    yield "jpeg-cut", png(kind="JPEG")[:-300], "refuse"
