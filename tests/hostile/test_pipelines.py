"""A pipeline folder from anywhere: it samples, or one sentence says what is wrong with it; no code runs, no memory is taken on its word."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sbldm_fast import Pipeline, UNetConfig, VAEConfig
from sbldm_fast.models.config import SchedulerConfig
from sbldm_fast.models.weights import WEIGHTS

from .conftest import NIGHTLY, Oracle

FILES = {"unet": ("unet/config.json", UNetConfig()), "vae": ("vae/config.json", VAEConfig()),
         "scheduler": ("scheduler/scheduler_config.json", SchedulerConfig())}  # fmt: skip
WRONG: dict[str, Any] = {"minus-1": -1, "0": 0, "10^18": 10**18, "true": True, "text": "ZZ", "nested": [[8, 8]], "NaN": float("nan"),
                         "Infinity": float("inf"), "10^400": 10**400}  # fmt: skip
MORE: dict[str, Any] = {"null": None, "mapping": {"a": 1}, "1.5": 1.5, "false": False, "empty": [], "list-of-0": [0], "list-of-null": [None, None], "list-of-10^18": [10**18] * 2,
                        "1e308": 1e308, "10^9": 10**9, "10^12": 10**12, "huge-list": [8] * 10**5, "long-text": "Z" * 10**5}  # fmt: skip


def sampled(folder: Path) -> None:
    images = Pipeline.from_pretrained(folder / "p").sample(1, steps=2, mode="eager")
    assert images.numel() > 0
    assert images.isfinite().all()


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path: Path, tiny_pipeline: Path) -> Path:
    shutil.copytree(tiny_pipeline, tmp_path / "p")
    return tmp_path


def lies() -> Iterator[Any]:
    """A file, a key of it, a value, and what must hold: a value of another kind is refused."""
    for file, (_, config) in FILES.items():
        for key, sound in asdict(config).items():
            kinds = {bool: bool, float: (int, float), tuple: list}.get(type(sound), type(sound))
            for name, value in (WRONG | (MORE if NIGHTLY or isinstance(sound, tuple) else {})).items():
                other = not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool) or name in ("NaN", "Infinity")
                yield pytest.param(file, key, value, "refuse" if other and sound is not None else "", id=f"{file}-{key}-{name}")


@pytest.mark.parametrize(("file", "key", "value", "must"), lies())
def test_config(holds: Oracle, folder: Path, file: str, key: str, value: Any, must: str) -> None:
    changed(folder / "p" / FILES[file][0], lambda content: content.update({key: value}))
    holds(partial(sampled, folder), must)


JSON: dict[str, bytes | Callable[[Path], object]] = {
    "empty": b"", "list": b"[]", "text": b'"a"', "number": b"1", "null": b"null", "object": b"{}", "cut": b'{"sample_size": ', "nul": b'{"a\0": 1}',
    "utf-16": '{"a": 1}'.encode("utf-16"), "no-utf-8": b'{"a": "\xff"}', "deep-lists": b'{"_a": ' + b"[" * 10**5, "deep-objects": b'{"a":' * 10**5,
    "5000-digits": b'{"sample_size": ' + b"9" * 5000 + b"}", "exponent": b'{"sample_size": 1e999}', "surrogate": b'{"\\ud800": 1}',
    "dunder": b'{"__class__": 1, "__init__": {}, "_a": 1}', "unknown": b'{"os.system": "touch RAN"}', "spaces": b" " * 10**7, "control": b'{"\\u001b[2J": 1}',
    "missing": Path.unlink, "folder": lambda p: (p.unlink(), p.mkdir()), "fifo": lambda p: (p.unlink(), os.mkfifo(p)),
    "zero": lambda p: (p.unlink(), p.symlink_to("/dev/zero")), "loop": lambda p: (p.unlink(), p.symlink_to(p.name)),
}  # fmt: skip


@pytest.mark.parametrize("file", [*FILES, "index"] if NIGHTLY else ["unet", "scheduler"])
@pytest.mark.parametrize("case", JSON)
def test_json(holds: Oracle, folder: Path, case: str, file: str) -> None:
    path, content = folder / "p" / (FILES[file][0] if file in FILES else "model_index.json"), JSON[case]
    content(path) if callable(content) else path.write_bytes(content)
    # of the index no more is read than that it is there; a scheduler has a default for every key and passes over those of others
    holds(partial(sampled, folder), "" if file in ("index", "scheduler") or case == "dunder" else "refuse")


class Runs:
    """What runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch RAN",)


def header(entries: bytes | dict[str, Any], length: int | None = None, body: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def disguised(folder: Path) -> None:
    torch.save({"a": Runs()}, folder / "a.bin")
    (folder / "a.bin").rename(folder / WEIGHTS)


def instead(folder: Path, name: str) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"a": Runs()}, folder / name)


def entry(change: dict[str, Any]) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        whole = (folder / WEIGHTS).read_bytes()
        n = struct.unpack("<Q", whole[:8])[0]
        entries = json.loads(whole[8 : 8 + n])
        first = min((k for k in entries if k != "__metadata__"), key=lambda k: int(entries[k]["data_offsets"][0]))
        entries[first] |= change
        (folder / WEIGHTS).write_bytes(header(entries, body=whole[8 + n :]))

    return write


def cast(kind: torch.dtype) -> Callable[[Path], object]:
    return lambda folder: save_file({k: v.to(kind) for k, v in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)


def flipped(seed: int) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        whole = bytearray((folder / WEIGHTS).read_bytes())
        whole[seed * 37 % 4000] ^= 1 << seed % 8
        (folder / WEIGHTS).write_bytes(whole)

    return write


Writer = tuple[bytes | Callable[[Path], object], str]
WEIGHT_LIES: dict[str, Writer] = {
    "missing": (lambda f: (f / WEIGHTS).unlink(), "refuse"), "empty": (b"", "refuse"), "zeros": (bytes(4096), "refuse"), "json": (b"{}", "refuse"),
    "pickle": (pickle.dumps(Runs()), "refuse"), "torch-save": (disguised, "refuse"),
    **{f"beside-{n}": (partial(instead, name=n), "refuse") for n in ("diffusion_pytorch_model.bin", "model.pt", "pytorch_model.pkl")},
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "refuse"), "zip": (b"PK\3\4" + bytes(100), "refuse"),
    "fifo": (lambda f: ((f / WEIGHTS).unlink(), os.mkfifo(f / WEIGHTS)), "refuse"),
    "zero": (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).symlink_to("/dev/zero")), "refuse"),
    **{f"header-{n}": (header({}, n), "refuse") for n in (3, 2**20, 2**31, 2**63 - 1, 2**63, 2**64 - 1)},
    "header-spaces": (header(b"{" + b" " * 10**7 + b"}"), "refuse"), "header-deep": (header(b'{"a":' * 10**5), "refuse"), "header-list": (header(b"[]"), "refuse"),
    **{f"offsets-{a}-{b}": (entry({"data_offsets": [a, b]}), "refuse") for a, b in ((0, 10**6), (4, 0), (0, 2**62), (-4, 0), (8, 300))},
    **{f"shape-{'x'.join(map(str, v))}": (entry({"shape": v}), "refuse") for v in ([], [0], [-1], [2**62, 4], [1] * 100)},
    **{f"dtype-{v}": (entry({"dtype": v}), "refuse") for v in ("F64", "F16", "I32", "BOOL", "F4", "object", "", 5)},
    **{f"all-{str(k)[6:]}": (cast(k), "refuse") for k in (torch.int64, torch.uint8, torch.bool, torch.complex64)},
    **{f"all-{str(k)[6:]}": (cast(k), "") for k in (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn)},
    "nan": (lambda f: save_file({k: v * torch.nan for k, v in load_file(f / WEIGHTS).items()}, f / WEIGHTS), "refuse"),
    "one-more": (lambda f: save_file(load_file(f / WEIGHTS) | {"\x1b[2Jevil": torch.ones(1)}, f / WEIGHTS), "refuse"),
    "one-less": (lambda f: save_file(dict(list(load_file(f / WEIGHTS).items())[1:]), f / WEIGHTS), "refuse"),
    "cut": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]), "refuse"),
    **{f"flip-{seed}": (flipped(seed), "") for seed in range(500 if NIGHTLY else 6)},
}  # fmt: skip


@pytest.mark.parametrize("case", WEIGHT_LIES)
def test_weights(holds: Oracle, folder: Path, case: str) -> None:
    content, must = WEIGHT_LIES[case]
    content(folder / "p" / "unet") if callable(content) else (folder / "p" / "unet" / WEIGHTS).write_bytes(content)

    def in_the_folder() -> None:
        os.chdir(folder)  # where a planted command would leave its mark
        sampled(folder)

    holds(in_the_folder, must)
