"""A pipeline folder from anywhere: it samples, or one sentence says what is wrong with it; no code runs, no memory is
taken on its word."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sbldm_fast import Pipeline, UNet2D, UNetConfig, VAEConfig
from sbldm_fast.diffusion import SchedulerConfig
from sbldm_fast.models.covariates import Covariate
from sbldm_fast.models.weights import WEIGHTS

from .conftest import ABSENT, NIGHTLY, NO_FILES, VALUES, Lie, Oracle, Runs, change, lay, replaced

FILES = {
    "unet": ("unet/config.json", UNetConfig()),
    "vae": ("vae/config.json", VAEConfig()),
    "scheduler": ("scheduler/scheduler_config.json", SchedulerConfig()),
}
ABSENT_ALREADY = {"covariates", "conditioning", "concat_channels"}  # of a model without conditions


@pytest.fixture
def folder(tmp_path: Path, tiny_pipeline: Path) -> Path:
    shutil.copytree(tiny_pipeline, tmp_path / "p")
    return tmp_path / "p"


def sampled(folder: Path) -> None:
    os.chdir(folder.parent)  # where a planted command would leave its mark
    images = Pipeline.from_pretrained(folder).sample(1, steps=2, mode="eager")
    assert images.numel() > 0
    assert images.isfinite().all()


def config_lies() -> Iterator[Any]:
    """A file, a key of it, a value, and what must hold: a value of another kind is refused."""
    for file, (_, config) in FILES.items():
        for i, (key, sound) in enumerate(asdict(config).items()):
            kinds = {bool: bool, float: (int, float), tuple: list}.get(type(sound), type(sound))
            everything = list(VALUES.items())
            turn = (
                everything if NIGHTLY or isinstance(sound, tuple) else [everything[(4 * i + j) % 9] for j in range(4)]
            )
            for name, value in turn:
                if value is ABSENT and key in ABSENT_ALREADY:
                    continue
                other = (
                    not isinstance(value, kinds)
                    or (isinstance(value, bool) and kinds is not bool)
                    or name in ("NaN", "Infinity")
                )
                must = "refuse" if other and sound is not None and value is not ABSENT else ""
                yield pytest.param(file, key, value, must, id=f"{file}-{key}-{name}")


@pytest.mark.parametrize(("file", "key", "value", "must"), list(config_lies()))
def test_config(holds: Oracle, folder: Path, file: str, key: str, value: Any, must: str) -> None:
    change(folder / FILES[file][0], key, value)
    holds(partial(sampled, folder), must)


@pytest.fixture(scope="session")
def asked_pipeline(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Path) -> Path:
    """The tiny pipeline with a number and a category to ask for."""
    path = tmp_path_factory.mktemp("asked") / "pipeline"
    shutil.copytree(tiny_pipeline, path)
    config = UNetConfig.from_dict(json.loads((path / "unet" / "config.json").read_text()))
    covariates = (Covariate("age", low=20.0, high=80.0, unit="years"), Covariate("modality", ("T1", "T2")))
    torch.manual_seed(0)
    UNet2D(replace(config, covariates=covariates)).save_pretrained(path / "unet")
    return path


def asked(folder: Path) -> None:
    """Every covariate's first value is asked for by name, and what is wrong with another is said."""
    os.chdir(folder.parent)
    pipeline = Pipeline.from_pretrained(folder)
    covariates = pipeline.unet.config.covariates
    cond = {c.name: c.values[0] if c.values else c.low for c in covariates}
    images = pipeline.sample(1, cond=cond, guidance_scale=2.0, steps=2, mode="eager")
    assert images.isfinite().all()
    for c in covariates:
        try:
            pipeline.sample(1, cond={c.name: "ZZ"}, steps=2, mode="eager")
        except ValueError as error:
            print(error)


PLACES = ("0", "0/name", "0/low", "0/high", "0/unit", "0/definition", "1", "1/name", "1/values", "1/values/0")
COVARIATE_LIES = [
    pytest.param(f"covariates/{place}", value, id=f"{place.replace('/', '.')}-{name}")
    for i, place in enumerate(PLACES)
    for j, (name, value) in enumerate(VALUES.items())
    if NIGHTLY or (i + j) % 3 == 0
]


@pytest.mark.parametrize(("place", "value"), COVARIATE_LIES)
def test_covariates(holds: Oracle, asked_pipeline: Path, tmp_path: Path, place: str, value: Any) -> None:
    shutil.copytree(asked_pipeline, tmp_path / "p")
    change(tmp_path / "p" / "unet" / "config.json", place, value)
    holds(partial(asked, tmp_path / "p"))


MANY = {
    "257-values": ("covariates/1/values", [f"v{i}" for i in range(257)], "refuse"),
    "256-long-values": ("covariates/1/values", [f"{i:0200d}" for i in range(256)], "refuse"),  # of other weights
    "escapes": ("covariates/1/values", ["T1", "\x1b[2J"], "refuse"),
    "10^4-covariates": ("covariates", [{"name": f"a{i}"} for i in range(10**4)], "refuse"),
    "keys": ("covariates/0/name", "keys", "work"),
    "n": ("covariates/0/name", "n", "work"),
    "rows": ("covariates/0/name", "rows", "work"),
    "maps": ("covariates/0/name", "maps", "refuse"),
    "twice": ("covariates/0/name", "modality", "refuse"),
    "tiny-range": ("covariates/0/high", 20.000001, "refuse"),
    "wide-range": ("covariates/0/high", 1e29, "work"),
    "too-wide": ("covariates/0/high", 1e31, "refuse"),
    "subnormal": ("covariates/0", {"name": "age", "low": 0.0, "high": 1e-320}, "refuse"),
    "one-less": ("covariates", [{"name": "modality", "values": ["T1", "T2"]}], "refuse"),
    "other-order": ("covariates", [{"name": "modality", "values": ["T1", "T2"]}, {"name": "age"}], "refuse"),
    "none": ("covariates", [], "refuse"),
    "another-way": ("conditioning", ["context", "concat"], "refuse"),
    "maps-beside": ("concat_channels", 2, "refuse"),
}


@pytest.mark.parametrize("case", MANY)
def test_what_is_listed(holds: Oracle, asked_pipeline: Path, tmp_path: Path, case: str) -> None:
    place, value, must = MANY[case]
    shutil.copytree(asked_pipeline, tmp_path / "p")
    config = tmp_path / "p" / "unet" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(replaced(content, place, value)))
    holds(partial(asked, tmp_path / "p"), must)


JSON: dict[str, Lie] = NO_FILES | {
    "empty": b"",
    "list": b"[]",
    "null": b"null",
    "object": b"{}",
    "cut": b'{"sample_size": ',
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "no-utf-8": b'{"a": "\xff"}',
    "deep-lists": b'{"_a": ' + b"[" * 10**5,
    "deep-objects": b'{"a":' * 10**5,
    "spaces": b" " * 10**7,
    "5000-digits": b'{"sample_size": ' + b"9" * 5000 + b"}",
    "surrogate": b'{"\\ud800": 1}',
    "control": b'{"\\u001b[2J": 1}',
    "dunder": b'{"__class__": 1, "__init__": {}, "_a": 1}',
    "unknown": b'{"os.system": "touch RAN"}',
}


@pytest.mark.parametrize("file", FILES if NIGHTLY else ["unet"])
@pytest.mark.parametrize("case", JSON)
def test_json(holds: Oracle, folder: Path, case: str, file: str) -> None:
    lay(folder / FILES[file][0], JSON[case])
    # a scheduler has a default for every key and passes over those of others
    holds(partial(sampled, folder), "refuse" if file != "scheduler" and case != "dunder" else "")


def header(entries: bytes | dict[str, Any], length: int | None = None, body: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def first(**values: Any) -> Lie:
    """The entry of the first tensor says something else."""

    def write(path: Path) -> None:
        whole = path.read_bytes()
        n = struct.unpack("<Q", whole[:8])[0]
        entries = json.loads(whole[8 : 8 + n])
        min((e for k, e in entries.items() if k != "__metadata__"), key=lambda e: int(e["data_offsets"][0])).update(
            values
        )
        path.write_bytes(header(entries, body=whole[8 + n :]))

    return write


def tensors(to: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Lie:
    return lambda path: save_file(to(load_file(path)), path)


def cast(kind: torch.dtype) -> Lie:
    return tensors(lambda state: {k: v.to(kind) for k, v in state.items()})


WEIGHT_LIES: dict[str, tuple[Lie, str]] = {
    **{
        name: (lie, "refuse")
        for name, lie in (
            NO_FILES
            | {
                "empty": b"",
                "zeros": bytes(4096),
                "json": b"{}",
                "pickle": pickle.dumps(Runs()),
                "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(100),
                "torch-save": lambda p: torch.save({"a": Runs()}, str(p)),
                "beside": lambda p: (p.unlink(), torch.save(Runs(), p.with_suffix(".bin"))),
                "cut": lambda p: p.write_bytes(p.read_bytes()[:-1]),
                "nan": tensors(lambda s: {k: v * torch.nan for k, v in s.items()}),
                "one-less": tensors(lambda s: dict(list(s.items())[1:])),
                "one-more": tensors(lambda s: s | {"\x1b[2Jevil": torch.ones(1)}),
                "header-spaces": header(b"{" + b" " * 10**7 + b"}"),
                "header-deep": header(b'{"a":' * 10**5),
                "header-list": header(b"[]"),
            }
        ).items()
    },
    **{f"header-{n}": (header({}, n), "refuse") for n in (3, 2**20, 2**63 - 1, 2**63, 2**64 - 1)},
    **{
        f"offsets-{a}-{b}": (first(data_offsets=[a, b]), "refuse")
        for a, b in ((0, 10**6), (4, 0), (0, 2**62), (-4, 0), (8, 300))
    },
    **{f"shape-{'x'.join(map(str, v))}": (first(shape=v), "refuse") for v in ([], [0], [-1], [2**62, 4], [1] * 100)},
    **{f"dtype-{v}": (first(dtype=v), "refuse") for v in ("F64", "F16", "I32", "BOOL", "F4", "object", 5)},
    **{f"all-{str(k)[6:]}": (cast(k), "refuse") for k in (torch.int64, torch.uint8, torch.bool, torch.complex64)},
    **{f"all-{str(k)[6:]}": (cast(k), "") for k in (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn)},
    **{
        f"flip-{i}": (
            lambda p, i=i: p.write_bytes(
                bytes(b ^ (k == 37 * i % 4000) << i % 8 for k, b in enumerate(p.read_bytes()))
            ),
            "",
        )
        for i in range(500 if NIGHTLY else 6)
    },
}


@pytest.mark.parametrize("case", WEIGHT_LIES)
def test_weights(holds: Oracle, folder: Path, case: str) -> None:
    lie, must = WEIGHT_LIES[case]
    lay(folder / "unet" / WEIGHTS, lie)
    holds(partial(sampled, folder), must)
