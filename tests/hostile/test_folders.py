"""What the library wrote and somebody changed since: training data, checkpoints, exported graphs, tables, rows; and CSV
files."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
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
from sbldm_fast.data.dataset import read_manifest
from sbldm_fast.diffusion import DDIMScheduler
from sbldm_fast.files import recover
from sbldm_fast.training import TrainConfig
from sbldm_fast.training.conditions import find_covariates, values_of
from sbldm_fast.training.run import Context, Stage, train

from .conftest import NIGHTLY, NO_FILES, Lie, Oracle, Runs, change, lay, lies, replaced
from .test_pipelines import JSON

pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
pytest.importorskip("matplotlib", reason="the bench extra is not installed")
from sbldm_fast.benchmarks.report import write_report
from sbldm_fast.benchmarks.rows import distribute, read_rows
from sbldm_fast.benchmarks.table import TABLES, groups
from sbldm_fast.benchmarks.verdicts import compare
from sbldm_fast.export import ORTSampler, check, export

ROWS = Path(__file__).parents[2] / "benchmarks" / "results" / "amd-epyc-2-cores" / "sampling.jsonl"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A prepared folder of six slices."""
    array = np.random.default_rng(0).uniform(-1, 1, (6, 128, 128)).astype(np.float16)
    rows = [
        {
            "source": f"s/{i}",
            "subject": f"s/{i}",
            "split": split,
            "modality": ("T1", "T2")[i % 2],
            "covariates": {"age": 20.0 + i},
            "sha256": hashlib.sha256(array[i].tobytes()).hexdigest(),
        }
        for i, split in enumerate(["train"] * 4 + ["val", "test"])
    ]
    (tmp_path / "d").mkdir()
    np.save(tmp_path / "d" / "slices.npy", array)
    told = {"age": {"unit": "years", "low": 20.0, "high": 25.0}, "modality": {"values": ["T1", "T2"]}}
    (tmp_path / "d" / "manifest.json").write_text(json.dumps({"format": 2, "covariates": told, "slices": rows}))
    return tmp_path / "d"


def looked_at(folder: Path) -> None:
    os.chdir(folder)  # where planted code would leave its mark
    for split in ("train", "val", "test"):
        slices = Slices(folder, split)
        assert slices[torch.arange(len(slices))].isfinite().all()
        covariates = find_covariates(read_manifest(folder), ["age", "modality"])
        assert values_of(slices.rows, covariates).shape == (len(slices), 2)


@pytest.mark.parametrize(
    ("path", "value"),
    lies(
        "format slices slices/0 slices/0/split slices/0/subject slices/0/sha256 slices/0/source slices/0/modality"
        " covariates covariates/age covariates/age/unit covariates/modality covariates/modality/values"
        " slices/0/covariates slices/0/covariates/age slices/1/covariates slices/1/covariates/age slices/1/modality"
        " slices/2/covariates/age slices/2/modality slices/3/covariates/age"
    ),
)
def test_prepared(holds: Oracle, data: Path, path: str, value: Any) -> None:
    change(data / "manifest.json", path, value)
    holds(partial(looked_at, data))


def npy(header: str, version: int = 1) -> bytes:
    return (
        b"\x93NUMPY"
        + bytes([version, 0])
        + len(header).to_bytes(2 * version, "little")
        + header.encode()
        + bytes(196608)
    )


def saved(write: Any, array: Any) -> bytes:
    buffer = io.BytesIO()
    write(buffer, array)
    return buffer.getvalue()


ARRAYS: dict[str, Lie] = NO_FILES | {
    "empty": b"",
    "npz": saved(np.savez, np.zeros((6, 128, 128), np.float16)),
    "objects": saved(np.save, np.array([Runs()] * 6, dtype=object)),
    "pickle": pickle.dumps(Runs()),
    "no-zip": b"PK\3\4" + bytes(99),
    "version-9": npy("", 9),
    "4-GB-header": npy(" ", 2)[:8] + b"\xf0" * 999,
    "header-code": npy(
        "{'descr': __import__('os').system('touch RAN'), 'fortran_order': False, 'shape': (6, 128, 128)}\n"
    ),
    "header-deep": npy("(" * 9000 + "\n"),
    "header-lists": npy("[" * 60000),
    "header-empty": npy(""),
    "header-nul": npy("\0" * 64),
    **{
        f"shape-{name}": npy(f"{{'descr': '<f2', 'fortran_order': False, 'shape': ({n}, 128, 128)}}\n")
        for name, n in {
            "minus-1": -1,
            "0": 0,
            "7": 7,
            "2^62": 2**62,
            "10^400": 10**400,
            "1.5": 1.5,
            "text": "'a'",
        }.items()
    },
    **{
        f"descr-{n}": npy(f"{{'descr': {n}, 'fortran_order': False, 'shape': (6, 128, 128)}}\n")
        for n in ("'O'", "'|V0'", "[('a','O')]", "5")
    },
    "cut": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "nan": saved(np.save, np.full((6, 128, 128), np.nan, np.float16)),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_array(holds: Oracle, data: Path, case: str) -> None:
    lay(data / "slices.npy", ARRAYS[case])
    holds(partial(looked_at, data), "refuse")


def trained(folder: Path) -> None:
    torch.manual_seed(0)

    def loss_of(model: nn.Module, index: Tensor, step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return model(torch.ones(len(index), 2)).square().mean(), {}

    stage = Stage("line", nn.Linear(2, 1), loss_of, 8)
    train(stage, TrainConfig(2, 4, 1e-3, ema_decay=0.9, amp="off"), Context(folder, progress=False))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a training of two steps."""
    folder = tmp_path_factory.mktemp("run") / "r"
    trained(folder)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


LAST = "checkpoint-line-00000002"
CUT: dict[str, Lie] = {
    "empty": b"",
    "cut": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "pickle": pickle.dumps(Runs()),
}
CHECKPOINT: dict[str, tuple[str, Lie]] = {
    **{f"state-{name}": (f"{LAST}/state.json", lie) for name, lie in JSON.items()},
    **{
        f"{n}-{how}": (f"{LAST}/{n}.safetensors", lie)
        for n in ("model", "ema", "optimizer")
        for how, lie in CUT.items()
    },
    **{
        f"moments-{new}": (
            f"{LAST}/optimizer.safetensors",
            lambda p, new=new: p.write_bytes(p.read_bytes().replace(b"0.step", new.encode())),
        )
        for new in ("9.step", "-.step", "x.step", "0.stop", "0-step")
    },
    **{
        f"log-{name}": ("log.jsonl", lie)
        for name, lie in (
            NO_FILES
            | {
                "garbage": b"\xff\0garbage\n",
                "list": b"[]\n",
                "empty-row": b"{}\n",
                "deep": b"[" * 10**5 + b"\n",
            }
        ).items()
    },
    **{
        name: ("checkpoint-line-99999999", lie)
        for name, lie in {"file": b"", "folder": Path.mkdir, "link": lambda p: p.symlink_to("nowhere")}.items()
    },
}


@pytest.mark.parametrize("case", CHECKPOINT)
def test_checkpoint(holds: Oracle, run: Path, case: str) -> None:
    file, lie = CHECKPOINT[case]
    lay(run / file, lie)
    holds(partial(trained, run))


@pytest.mark.parametrize(("path", "value"), lies("step seconds loss since best settings settings/lr scaler"))
def test_state(holds: Oracle, run: Path, path: str, value: Any) -> None:
    change(run / LAST / "state.json", path, value)
    holds(partial(trained, run))


@pytest.mark.parametrize("name", [".film.mkv.part", ".notes.old"])
def test_hidden_files_of_the_user(holds: Oracle, tmp_path: Path, name: str) -> None:
    """What merely looks like ours is not cleared away."""
    (tmp_path / name).write_text("of the user")
    holds(partial(recover, tmp_path, ".+"), "work")


class Layer(nn.Module):
    """A model of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.layer(x) + t.to(x.dtype).reshape(-1, 1, 1, 1) * 1e-3
        return out


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("onnx") / "e"
    export(Layer(), folder, shape=(3, 4, 4), scheduler=DDIMScheduler(clip_sample=False), steps=2)
    return folder


@pytest.fixture
def graphs(exported: Path, tmp_path: Path) -> Path:
    shutil.copytree(exported, tmp_path / "e")
    return tmp_path / "e"


def run_graphs(folder: Path) -> None:
    failures = check(folder, build=False)["failures"]
    for mode in ("step", "sampler"):
        ORTSampler(folder, mode=mode)(1)
    if failures:
        raise ValueError(failures[0])


TABLE = (
    "timesteps timesteps/0 rows rows/0 rows/0/0 rows/0/2 input_scale input_scale/0 alpha sigma init_noise_sigma"
    " clip_range format"
)
GRAPH = "sha256 dtype inputs inputs/x inputs/x/dtype inputs/x/shape inputs/x/shape/0 outputs parity parity/allowed"
MANIFEST = " ".join(
    [
        "format target opset dtype model latent_shape latent_shape/0 cond decodes graphs example example/sha256 solver",
        *(f"solver/{key}" for key in TABLE.split()),
        *(f"graphs/{graph}" for graph in ("step", "sampler")),
        *(f"graphs/{graph}/{key}" for graph in ("step", "sampler") for key in GRAPH.split()),
    ]
)


@pytest.mark.parametrize(("path", "value"), lies(MANIFEST))
def test_exported(holds: Oracle, graphs: Path, path: str, value: Any) -> None:
    change(graphs / "manifest.json", path, value)
    holds(partial(run_graphs, graphs))


def elsewhere(path: Path) -> None:
    """A graph whose weights are said to lie in a file of the user's."""
    import onnx

    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../../../../etc/passwd")
    path.write_bytes(model.SerializeToString())


GRAPH_LIES: dict[str, Lie] = (
    NO_FILES
    | CUT
    | {
        "sampler": lambda p: p.write_bytes(p.with_name("sampler.onnx").read_bytes()),
        "external": elsewhere,
        "zeros": bytes(2000),
        "text": b"ZZ" * 500,
        "ones": b"\xff" * 2000,
        **{
            f"flip-{i}": lambda p, i=i: p.write_bytes(
                bytes(b ^ (k == 31 * i % 2000) << i % 8 for k, b in enumerate(p.read_bytes()))
            )
            for i in range(300 if NIGHTLY else 8)
        },
    }
)


@pytest.mark.parametrize("signed", [False, True], ids=["changed", "signed"])
@pytest.mark.parametrize("case", GRAPH_LIES)
def test_graph(holds: Oracle, graphs: Path, case: str, signed: bool) -> None:
    """A graph that is not the one of the manifest, and one whose checksum was changed too."""
    lay(graphs / "step.onnx", GRAPH_LIES[case])
    if signed and case not in NO_FILES:
        change(
            graphs / "manifest.json",
            "graphs/step/sha256",
            hashlib.sha256((graphs / "step.onnx").read_bytes()).hexdigest(),
        )
    holds(partial(run_graphs, graphs), "" if signed and "flip" in case else "refuse")


@pytest.mark.parametrize(("path", "value"), lies(TABLE))
def test_table(holds: Oracle, tmp_path: Path, path: str, value: Any) -> None:
    SolverTable.from_scheduler(DDIMScheduler(clip_sample=False), 2).save(tmp_path / "t.json")
    change(tmp_path / "t.json", path, value)

    def sampled() -> None:
        table = SolverTable.load(tmp_path / "t.json")
        assert ((table.timesteps >= 0) & table.timesteps.isfinite()).all()
        FastSampler(Layer(), table, shape=(3, 4, 4))(1)

    holds(sampled)


FIELDS = (
    "target run env env/gpu env/cpu env/cores env/threads env/packages provider preset batch steps dtype median_s raw_s"
    " raw_s/0"
)


@pytest.mark.parametrize(("path", "value"), lies(FIELDS))
def test_rows(holds: Oracle, tmp_path: Path, path: str, value: Any) -> None:
    """A row that is no row costs no more than itself."""
    lines = ROWS.read_text().splitlines()[:3]
    lines[1] = json.dumps(replaced(json.loads(lines[1]), path, value))
    (tmp_path / "bad.jsonl").write_text("\n".join(lines) + "\n")

    def read() -> None:
        compare(read_rows(ROWS)[0], read_rows(tmp_path / "bad.jsonl")[0])
        distribute(tmp_path / "bad.jsonl", tmp_path / "out")
        tables = [TABLES["sampling"](of).markdown() for of in groups(read_rows(tmp_path / "bad.jsonl")[0])]
        assert tables
        if NIGHTLY:  # drawing takes a second
            write_report([tmp_path / "bad.jsonl"], tmp_path / "out" / "report.html")

    holds(read)


CSV: dict[str, Lie] = NO_FILES | {
    "formula": b'id,age\n=cmd|\'/C calc\'!A0,"=HYPERLINK(""http://x"")"\n',
    "nul": b"id,age\n\0,\0\n",
    "empty": b"",
    "one-line": b"id,age\n",
    "columns-10^6": b"id" + b",a" * 10**6 + b"\n1" + b",1" * 10**6 + b"\n",
    "twice": b"id,age\nsub-01,1\nsub-01,2\n",
    "column-twice": b"id,age,age\nsub-01,1,2\n",
    "ragged": b"id,age\nsub-01\n",
    "field-200k": b"id,age\nsub-01," + b"9" * 200_000 + b"\n",
    "digits-5000": b"id,age\n" + b"9" * 5000 + b",1\n",
    "quote": b'id,age\n"sub-01,1\n',
    "utf-16": "id,age\n1,1\n".encode("utf-16"),
    "latin-1": b"id,age\nsub-01,\xe9\n",
    "escape": b"id,age\n\x1b[2Jsub-01,1,2\n",
    "other-digits": "id,age\n٣,1\n²,1\n".encode(),
}


@pytest.mark.parametrize("case", CSV)
def test_csv(holds: Oracle, tmp_path: Path, case: str) -> None:
    path = tmp_path / "c.csv"
    path.write_bytes(b"")
    lay(path, CSV[case])
    if case == "fifo":
        pytest.skip("bash makes one of <(...), which is a good use")
    holds(lambda: Covariates(path).of(["scans/sub-01", "scans/1"]))
