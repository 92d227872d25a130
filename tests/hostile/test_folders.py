"""What the library wrote once and somebody changed since: training data, checkpoints, exported graphs, tables, rows; and their CSV files."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sbldm_fast import FastSampler, SolverTable
from sbldm_fast.data import Slices
from sbldm_fast.data.covariates import Covariates
from sbldm_fast.diffusion import DDIMScheduler
from sbldm_fast.files import recover
from sbldm_fast.training import Optimisation
from sbldm_fast.training.loop import train

from .conftest import NIGHTLY, Oracle
from .test_pipelines import JSON, Runs

onnxruntime = pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
pytest.importorskip("matplotlib", reason="the bench extra is not installed")
import matplotlib.pyplot  # noqa: F401  # before the fork, once for all
from sbldm_fast.benchmarks.report import write_report
from sbldm_fast.benchmarks.rows import distribute, read_rows
from sbldm_fast.benchmarks.verdicts import compare
from sbldm_fast.export import ORTSampler, check, export

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "amd-epyc-2-cores" / "sampling.jsonl"
ABSENT = object()
VALUES: dict[str, Any] = {"null": None, "minus-1": -1, "text": "ZZ", "nested": [[8, 8]], "10^18": 10**18, "NaN": float("nan"), "absent": ABSENT,
                          "mapping": {"a": 1}, "10^400": 10**400, "0": 0, "true": True, "1e308": 1e308, "path": "../../mine.txt"}  # fmt: skip


def lies(paths: str) -> Iterator[Any]:
    """A place in a JSON file and what stands there instead; by night every value, else three of them in turn."""
    names = list(VALUES)
    for i, path in enumerate(paths.split()):
        for name in names if NIGHTLY else [names[(3 * i + j) % len(names)] for j in range(3)]:
            yield pytest.param(path, VALUES[name], id=f"{path.replace('/', '.')}-{name}")


def replaced(content: Any, path: str, value: Any) -> Any:
    *way, last = (int(p) if p.isdecimal() else p for p in path.split("/"))
    inner = content
    for step in way:
        inner = inner[step]
    if value is ABSENT:
        del inner[last]
    else:
        inner[last] = value
    return content


def change(file: Path, path: str, value: Any) -> None:
    file.write_text(json.dumps(replaced(json.loads(file.read_text()), path, value)))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A prepared folder of six slices."""
    array = np.random.default_rng(0).uniform(-1, 1, (6, 128, 128)).astype(np.float16)
    rows = [{"source": f"s/{i}", "subject": f"s/{i}", "modality": "T1", "position_mm": 1.0, "tilt_deg": 0.0, "covariates": {}, "split": split,
             "sha256": hashlib.sha256(array[i].tobytes()).hexdigest()} for i, split in enumerate(["train"] * 4 + ["val", "test"])]  # fmt: skip
    (tmp_path / "d").mkdir()
    np.save(tmp_path / "d" / "slices.npy", array)
    (tmp_path / "d" / "manifest.json").write_text(
        json.dumps({"format": 2, "split": {"by": "subject"}, "subjects": 6, "skipped": [], "slices": rows})
    )
    return tmp_path / "d"


def looked_at(folder: Path) -> None:
    for split in ("train", "val", "test"):
        slices = Slices(folder, split)
        assert slices[torch.arange(len(slices))].isfinite().all()


@pytest.mark.parametrize(
    ("path", "value"), lies("format slices slices/0 slices/0/split slices/0/subject slices/0/sha256 slices/0/source split")
)
def test_prepared(holds: Oracle, data: Path, path: str, value: Any) -> None:
    change(data / "manifest.json", path, value)
    holds(partial(looked_at, data))


def npy(header: bytes, body: bytes = b"\0" * 196608) -> bytes:
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + body


def archive() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, np.zeros((6, 128, 128), np.float16))
    return buffer.getvalue()


def objects() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Runs()] * 6, dtype=object), allow_pickle=True)
    return buffer.getvalue()


ARRAYS: dict[str, bytes | Callable[[Path], object]] = {
    "empty": b"", "npz": archive(), "objects": objects(), "pickle": pickle.dumps(Runs()), "zip-bomb": b"PK\3\4" + bytes(99), "text": b"1,2,3\n",
    "header-code": npy(b"{'descr': __import__('os').system('touch RAN'), 'fortran_order': False, 'shape': (6, 128, 128)}\n"),
    "header-deep": npy(b"(" * 9000 + b"\n"), "header-lists": npy(b"[" * 60000), "header-empty": npy(b""), "header-nul": npy(b"\0" * 64),
    **{f"shape-{n}": npy(f"{{'descr': '<f2', 'fortran_order': False, 'shape': ({n}, 128, 128)}}\n".encode()) for n in (-1, -6, 0, 7, 2**62, 10**400, "1.5", "'a'")},
    **{f"descr-{n}": npy(f"{{'descr': {n}, 'fortran_order': False, 'shape': (6, 128, 128)}}\n".encode())
       for n in ("'O'", "'|V0'", "'<f8'", "[('a','O')]", "'<U9999999'", "5", "'f2,O'")},
    "version-9": b"\x93NUMPY\x09\0" + bytes(1000), "version-3-4GB": b"\x93NUMPY\3\0\xff\xff\xff\xff" + bytes(1000),
    "cut": lambda p: p.write_bytes(p.read_bytes()[:-1]), "longer": lambda p: p.write_bytes(p.read_bytes() + b"x"), "nan": lambda p: np.save(p, np.full((6, 128, 128), np.nan, np.float16)),
    "gz": lambda p: p.write_bytes(gzip.compress(p.read_bytes())), "fifo": lambda p: (p.unlink(), os.mkfifo(p)), "missing": Path.unlink,
    "zero": lambda p: (p.unlink(), p.symlink_to("/dev/zero")), "folder": lambda p: (p.unlink(), p.mkdir()),
}  # fmt: skip


@pytest.mark.parametrize("case", ARRAYS)
def test_array(holds: Oracle, data: Path, case: str) -> None:
    content, path = ARRAYS[case], data / "slices.npy"
    content(path) if callable(content) else path.write_bytes(content)

    def in_the_folder() -> None:
        os.chdir(data)
        looked_at(data)

    holds(in_the_folder, "" if case == "longer" else "refuse")


def steps(folder: Path, until: int = 2) -> None:
    torch.manual_seed(0)

    def loss_of(model: nn.Module, index: Tensor, step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return model(torch.ones(len(index), 2)).square().mean(), {}

    train(
        nn.Linear(2, 1),
        loss_of,
        8,
        Optimisation(until, 4, 1e-3, ema_decay=0.9, amp="off", save_every=1),
        folder,
        name="line",
        progress=False,
    )


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a training of two steps."""
    folder = tmp_path_factory.mktemp("run") / "r"
    steps(folder)
    return folder


LAST = "checkpoint-line-00000002"
NAMES = [f"{LAST}/{n}.safetensors" for n in ("model", "ema", "optimizer")]
RUN: dict[str, Callable[[Path], object]] = {
    **{f"state-{name}": partial(lambda c, r: c(r / LAST / "state.json") if callable(c) else (r / LAST / "state.json").write_bytes(c), content)
       for name, content in JSON.items() if name not in ("spaces", "zero", "fifo")},
    **{f"{n.split('/')[1].split('.')[0]}-{how}": partial(lambda n, w, r: (r / n).write_bytes(w((r / n).read_bytes())), n, write)
       for n in NAMES for how, write in {"empty": lambda b: b"", "cut": lambda b: b[:-1], "pickle": lambda b: pickle.dumps(Runs())}.items()},
    **{f"moments-{new}": partial(lambda new, r: (r / NAMES[2]).write_bytes((r / NAMES[2]).read_bytes().replace(b'"0.step"', new)), new.encode())
       for new in ('"9.step"', '"-.step"', '"x.step"', '"0.stop"', '"0-step"')},
    "log-garbage": lambda r: (r / "log.jsonl").write_bytes(b"\xff\x00garbage\n"), "log-list": lambda r: (r / "log.jsonl").write_bytes(b"[]\n"),
    "log-empty-row": lambda r: (r / "log.jsonl").write_bytes(b"{}\n"), "log-deep": lambda r: (r / "log.jsonl").write_bytes(b"[" * 10**5 + b"\n"),
    "log-folder": lambda r: ((r / "log.jsonl").unlink(), (r / "log.jsonl").mkdir()), "name": lambda r: (r / LAST).rename(r / "checkpoint-line-zz"),
    "a-file": lambda r: (r / "checkpoint-line-99999999").write_text(""), "an-empty-folder": lambda r: (r / "checkpoint-line-99999999").mkdir(),
    "a-link": lambda r: (r / "checkpoint-line-99999999").symlink_to("nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("case", RUN)
def test_checkpoint(holds: Oracle, finished: Path, tmp_path: Path, case: str) -> None:
    shutil.copytree(finished, tmp_path / "out")
    RUN[case](tmp_path / "out")
    holds(partial(steps, tmp_path / "out"))


@pytest.mark.parametrize(("path", "value"), lies("step seconds loss since best settings settings/lr settings/items scaler"))
def test_state(holds: Oracle, finished: Path, tmp_path: Path, path: str, value: Any) -> None:
    shutil.copytree(finished, tmp_path / "out")
    change(tmp_path / "out" / LAST / "state.json", path, value)
    holds(partial(steps, tmp_path / "out"))


@pytest.mark.parametrize("name", [".film.mkv.part", ".notes.old", ".letter.txt.old", ".x.part"])
def test_hidden_files_of_others(holds: Oracle, tmp_path: Path, name: str) -> None:
    """What merely looks like ours is not cleared away."""
    (tmp_path / name).write_text("of the user")
    holds(partial(recover, tmp_path), "work")


class Line(nn.Module):
    """A model of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.layer(x) + t.to(x.dtype).reshape(-1, 1, 1, 1) * 1e-3
        return out


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "e"
    torch.manual_seed(0)
    export(Line(), folder, shape=(3, 4, 4), scheduler=DDIMScheduler(clip_sample=False), steps=2)
    return folder


def run(folder: Path) -> None:
    failures = check(folder, build=False)["failures"]
    for mode in ("step", "sampler"):
        ORTSampler(folder, mode=mode)(1)
    if failures:
        raise ValueError(failures[0])


GRAPH = [
    "",
    *(
        f"/{k}"
        for k in (
            "sha256",
            "dtype",
            "inputs",
            "inputs/x",
            "inputs/x/dtype",
            "inputs/x/shape",
            "inputs/x/shape/0",
            "outputs",
            "parity",
            "parity/allowed",
        )
    ),
]
TABLE = "timesteps timesteps/0 rows rows/0 rows/0/0 rows/0/2 input_scale input_scale/0 alpha alpha/0 sigma init_noise_sigma clip_range format".split()
MANIFEST = " ".join(["format target opset dtype model latent_shape latent_shape/0 cond decodes graphs example example/sha256 solver",
                     *(f"solver/{k}" for k in TABLE), *(f"graphs/{g}{k}" for g in ("step", "sampler") for k in GRAPH)])  # fmt: skip


@pytest.mark.parametrize(("path", "value"), lies(MANIFEST))
def test_exported(holds: Oracle, exported: Path, tmp_path: Path, path: str, value: Any) -> None:
    shutil.copytree(exported, tmp_path / "e")
    change(tmp_path / "e" / "manifest.json", path, value)
    holds(partial(run, tmp_path / "e"))


def signed(folder: Path, name: str, content: bytes) -> None:
    """A graph and its checksum, both changed."""
    (folder / f"{name}.onnx").write_bytes(content)
    change(folder / "manifest.json", f"graphs/{name}/sha256", hashlib.sha256(content).hexdigest())


def elsewhere(folder: Path) -> None:
    """A graph whose weights are said to lie in a file of the user's."""
    import onnx

    model = onnx.load(folder / "step.onnx")
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "../../../../../../../etc/passwd"), ("length", "36")):
        tensor.external_data.add(key=key, value=value)
    signed(folder, "step", model.SerializeToString())


GRAPHS: dict[str, Callable[[Path], object]] = {
    "swapped": lambda f: ((f / "step.onnx").rename(f / "x"), (f / "sampler.onnx").rename(f / "step.onnx"), (f / "x").rename(f / "sampler.onnx")),
    "swapped-signed": lambda f: signed(f, "step", (f / "sampler.onnx").read_bytes()), "external": elsewhere, "missing": lambda f: (f / "step.onnx").unlink(),
    **{f"signed-{name}": partial(lambda b, f: signed(f, "step", b), content)
       for name, content in {"empty": b"", "pickle": pickle.dumps(Runs()), "zeros": bytes(2000), "text": b"ZZ" * 500, "ones": b"\xff" * 2000}.items()},
    **{f"signed-flip-{i}": partial(lambda i, f: signed(f, "step", bytes(b ^ (1 << i % 8) * (k == 31 * i % 2000) for k, b in enumerate((f / "step.onnx").read_bytes()))), i)
       for i in range(300 if NIGHTLY else 8)},
    "example-pickle": lambda f: ((f / "example.npz").write_bytes(pickle.dumps(Runs())),
                                 change(f / "manifest.json", "example/sha256", hashlib.sha256((f / "example.npz").read_bytes()).hexdigest())),
    "fifo": lambda f: ((f / "step.onnx").unlink(), os.mkfifo(f / "step.onnx")), "zero": lambda f: ((f / "step.onnx").unlink(), (f / "step.onnx").symlink_to("/dev/zero")),
}  # fmt: skip


@pytest.mark.parametrize("case", GRAPHS)
def test_graph(holds: Oracle, exported: Path, tmp_path: Path, case: str) -> None:
    shutil.copytree(exported, tmp_path / "e")
    GRAPHS[case](tmp_path / "e")
    holds(partial(run, tmp_path / "e"), "" if "flip" in case else "refuse")


@pytest.mark.parametrize(("path", "value"), lies(" ".join(TABLE)))
def test_table(holds: Oracle, tmp_path: Path, path: str, value: Any) -> None:
    file = tmp_path / "t.json"
    SolverTable.from_scheduler(DDIMScheduler(clip_sample=False), 2).save(file)
    change(file, path, value)
    held = path in ("alpha/0", "clip_range", "rows/0/0") or (
        path in ("timesteps/0", "rows/0/2", "input_scale/0", "init_noise_sigma") and value in (0, 1, 1e308, 10**18)
    )
    holds(lambda: FastSampler(Line(), SolverTable.load(file), shape=(3, 4, 4))(1), "" if held or value == [[8, 8]] else "refuse")


@pytest.mark.parametrize(
    ("path", "value"),
    lies(
        "target run env env/gpu env/cpu env/cores env/threads env/packages provider preset batch steps dtype median_s raw_s raw_s/0 n error"
    ),
)
def test_rows(holds: Oracle, tmp_path: Path, path: str, value: Any) -> None:
    lines = RESULTS.read_text().splitlines()[:3]
    row = json.loads(lines[1])
    row.setdefault("error", 0.0)
    (tmp_path / "bad.jsonl").write_text("\n".join([lines[0], json.dumps(replaced(row, path, value)), lines[2]]) + "\n")

    def read() -> None:
        compare(read_rows(RESULTS)[0], read_rows(tmp_path / "bad.jsonl")[0])
        distribute(tmp_path / "bad.jsonl", tmp_path / "out")
        write_report([tmp_path / "bad.jsonl"], tmp_path / "out" / "report.html")

    holds(read)


CSV: dict[str, bytes | Callable[[Path], object]] = {
    "formula": b'id,age\n=cmd|\'/C calc\'!A0,"=HYPERLINK(""http://x"")"\n', "nul": b"id,age\n\0,\0\n", "empty": b"", "one-line": b"id,age\n",
    "columns-10^6": b"id" + b",a" * 10**6 + b"\n1" + b",1" * 10**6 + b"\n", "twice": b"id,age\nsub-01,1\nsub-01,2\n", "column-twice": b"id,age,age\nsub-01,1,2\n",
    "ragged": b"id,age\nsub-01\n", "field-200k": b"id,age\nsub-01," + b"9" * 200_000 + b"\n", "digits-5000": b"id,age\n" + b"9" * 5000 + b",1\n",
    "quote": b'id,age\n"sub-01,1\n', "utf-16": "id,age\nsub-01,1\n".encode("utf-16"), "latin-1": b"id,age\nsub-01,\xe9\n", "dunder": b"id,__class__\nsub-01,1\n",
    "rows-10^5": b"id,age\n" + b"".join(b"s-%d,1\n" % i for i in range(10**5)), "infinite": b"id,age\nsub-01,1e999\n", "bare-cr": b"id,age\rsub-01,1\r",
    "escape": b"id,age\n\x1b[2Jsub-01,1,2\n", "other-digits": "id,age\n٣,1\n".encode(), "squares": "id,age\n²,1\n".encode(), "folder": Path.mkdir,
    "zero": lambda p: p.symlink_to("/dev/zero"), "zip": b"PK\3\4" + bytes(100), "missing": lambda p: None,
}  # fmt: skip


@pytest.mark.parametrize("case", CSV)
def test_csv(holds: Oracle, tmp_path: Path, case: str) -> None:
    content, path = CSV[case], tmp_path / "c.csv"
    content(path) if callable(content) else path.write_bytes(content)
    holds(lambda: Covariates(path).of(["scans/sub-01", "scans/1"]))
