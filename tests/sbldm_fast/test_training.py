"""Training on a small population: it learns, resumes to the bit, and stops where it must."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from sbldm_fast import Pipeline, UNet2D, preset
from sbldm_fast.data import prepare
from sbldm_fast.models.config import Preset
from sbldm_fast.training import Objective, Optimisation, Stopped, checkpoint, train_pipeline
from sbldm_fast.training.loop import Step, amp_dtype, batches, train
from sbldm_fast.training.stages import augment, unet_loss

SMALL = Preset(
    replace(preset("demo").vae, block_out_channels=(8, 8, 8, 8)),
    replace(
        preset("demo").unet,
        block_out_channels=(16, 16),
        attention_head_dim=8,
        layers_per_block=1,
        time_embed_dim=32,
        dropout=0.1,
    ),
    preset("demo").scheduler,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip(
        "nilearn", reason="nilearn, of the extra data, brings the maps that synthetic brains are made of"
    )
    folder = tmp_path_factory.mktemp("data") / "d"
    prepare(["synthetic:3"], folder, every=6, progress=False)
    return folder


def optimisation(steps: int, **values: Any) -> Optimisation:
    return Optimisation(**({"steps": steps, "batch_size": 4, "lr": 1e-3, "save_every": 2, "amp": "off"} | values))


def weights(folder: Path) -> dict[str, Tensor]:
    pipe = Pipeline.from_pretrained(folder / "pipeline")
    return {f"{n}.{k}": v for n, m in (("vae", pipe.vae), ("unet", pipe.unet)) for k, v in m.state_dict().items()}


def test_both_stages_end_in_a_pipeline_that_samples(data: Path, tmp_path: Path, device: torch.device) -> None:
    stages: dict[str, Any] = {"vae": optimisation(3), "unet": optimisation(3, ema_decay=0.9)}
    result = train_pipeline(SMALL, data, tmp_path, **stages, views=2, device=device, progress=False)
    assert result["slices"] > 4
    assert result["scaling_factor"] > 0
    assert 0 < result["val_l1"] < 2
    pipe = Pipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.vae.config.scaling_factor == result["scaling_factor"]
    assert pipe.sample(1, steps=2).shape == (1, 1, 128, 128)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows if "loss" in row] == [("vae", 3), ("unet", 3)]
    assert [(row["stage"], row["step"]) for row in rows if "val" in row] == [
        (n, i) for n in ("vae", "unet") for i in (2, 3)
    ]
    assert all(math.isfinite(row.get("loss", row.get("val"))) for row in rows)
    for name in ("vae", "unet"):
        best = min((row["val"], row["step"]) for row in rows if row["stage"] == name and "val" in row)
        assert result["kept_steps"][name] == best[1]
    with pytest.raises(ValueError, match=r"holds a run \(checkpoint-.*\); allowed is a new folder, or --resume"):
        train_pipeline(SMALL, data, tmp_path, vae=optimisation(3), unet=optimisation(3, ema_decay=0.9), progress=False)


RUN = """
import pathlib, sys
from sbldm_fast.training import Objective, Optimisation, Stopped, torchrun, train_pipeline
from sbldm_fast.models.config import *
SMALL = CONFIGURATIONS
def stage(**values):
    return Optimisation(steps=30, batch_size=4, lr=1e-3, save_every=4, amp="off", **values)
with torchrun() as device:
    try:
        train_pipeline(
            SMALL, sys.argv[1], sys.argv[2], vae=stage(), unet=stage(ema_decay=0.9), device=device, views=2,
            resume=True, progress=False,
            objective=Objective(low_weight=2.0, snr_gamma=5.0, cutmix_prob=float(sys.argv[3])),
        )
    except (Stopped, OSError) as error:
        sys.exit(str(error))
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that the tests kill: this file's small models, trained for 30 steps of each stage."""
    folder = tmp_path_factory.mktemp("script")
    # configurations print as what makes them
    (folder / "run.py").write_text(RUN.replace("CONFIGURATIONS", repr(SMALL)))
    return folder / "run.py"


def start(script: Path, data: Path, folder: Path, cutmix: float = 0.25, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, str(script), str(data), str(folder), str(cutmix)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def curve(folder: Path) -> list[dict[str, Any]]:
    """The log without what a clock says."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "items_per_s")} for row in rows]


@pytest.fixture(scope="module")
def whole(script: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    assert start(script, data, folder).wait() == 0
    assert len(curve(folder)) == 2 * (8 + 1)
    return folder


def same_run(a: Path, b: Path) -> None:
    assert curve(a) == curve(b)
    expected, got = weights(a), weights(b)
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


def wait_for(folder: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not list(folder.glob(pattern)):
        time.sleep(0.001)


def test_killed_at_any_point_it_goes_on_to_the_same_end(script: Path, data: Path, whole: Path, tmp_path: Path) -> None:
    # KILLS=20 for the long form
    rng = random.Random(os.environ.get("KILLS", ""))
    for _ in range(int(os.environ.get("KILLS", "2"))):
        process = start(script, data, tmp_path)
        had = set(tmp_path.iterdir())
        while process.poll() is None and set(tmp_path.iterdir()) == had:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 1.5))
        process.kill()
        process.wait()
    (tmp_path / ".best-vae.7.part").mkdir(exist_ok=True)
    if (tmp_path / "best-vae").exists():  # a kill between two renames
        (tmp_path / "best-vae").rename(tmp_path / ".best-vae.7.old")
    assert start(script, data, tmp_path).wait() == 0
    same_run(whole, tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.name.endswith((".part", ".old"))], "what kills left is cleared"


def test_a_signal_saves_and_ends(script: Path, data: Path, whole: Path, tmp_path: Path) -> None:
    process = start(script, data, tmp_path)
    wait_for(tmp_path, "checkpoint-unet-00000004", process)
    process.send_signal(signal.SIGTERM)
    error = process.communicate()[1]
    assert process.returncode == 1
    assert "unet: stopped by SIGTERM at step" in error
    at = int(error.split("at step ")[1].split(";")[0])
    assert (tmp_path / f"checkpoint-unet-{at:08d}").is_dir()
    assert at < 30
    assert start(script, data, tmp_path).wait() == 0
    same_run(whole, tmp_path)


def test_a_full_disk_stops_and_names_the_last_good_checkpoint(
    script: Path, data: Path, whole: Path, tmp_path: Path
) -> None:
    process = start(script, data, tmp_path)
    wait_for(tmp_path, "checkpoint-unet-00000008", process)
    process.kill()
    process.wait()
    good = sorted(tmp_path.glob("checkpoint-unet-*"))[-1]

    def full() -> None:  # a write beyond 60 kB fails, as on a disk that is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    process = start(script, data, tmp_path, preexec_fn=full)
    error = process.communicate()[1]
    assert process.returncode == 1
    assert "File too large" in error
    assert f"last good checkpoint: {good}" in error
    assert sorted(tmp_path.glob("checkpoint-unet-*"))[-1] == good
    assert start(script, data, tmp_path).wait() == 0
    same_run(whole, tmp_path)


def test_two_processes_have_the_curve_of_one(script: Path, data: Path, tmp_path: Path) -> None:
    """To rounding: dropout and CutMix, which look at one process's part, are off."""
    without = tmp_path / "run.py"
    without.write_text(script.read_text().replace("dropout=0.1", "dropout=0.0"))
    assert start(without, data, tmp_path / "one", 0.0).wait() == 0
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(without),
        str(data),
    ]
    subprocess.run([*command, str(tmp_path / "two"), "0"], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert [(row["stage"], row["step"]) for row in one] == [(row["stage"], row["step"]) for row in two]
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "val"):
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=2e-4), (a, b)


def test_latents_are_encoded_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {"vae": optimisation(2), "unet": optimisation(2), "progress": False, "resume": True}
    train_pipeline(SMALL, data, tmp_path, views=2, **arguments)

    def refuse(*_: object) -> Tensor:
        raise AssertionError("encoded again")

    monkeypatch.setattr("sbldm_fast.training.stages.encode", refuse)
    train_pipeline(SMALL, data, tmp_path, views=2, **arguments)
    with pytest.raises(AssertionError, match="encoded again"):
        train_pipeline(SMALL, data, tmp_path, views=1, **arguments)


def test_checkpoints_are_few_and_the_best_is_kept(tmp_path: Path) -> None:
    values = iter([3.0, 1.0, 2.0, 1.0, 5.0])
    seen: list[float] = []

    def validate(model: nn.Module) -> float:
        seen.append(float(next(model.parameters()).detach()))
        return next(values)

    o = Optimisation(steps=10, batch_size=4, lr=0.1, amp="off", save_every=2, keep=2)
    kept = train(Line(), loss_of, 8, o, tmp_path, name="line", validate=validate, progress=False)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-line-00000008",
        "checkpoint-line-00000010",
    ]
    assert json.loads((tmp_path / "best-line" / "state.json").read_text()) == {"step": 4, "val": 1.0}
    assert float(next(kept.parameters()).detach()) == seen[1]


def test_tensorboard_gets_scalars_and_pictures(tmp_path: Path) -> None:
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="the extra `train` is not installed"
    )
    o = Optimisation(steps=4, batch_size=4, lr=0.1, amp="off", save_every=2)
    pictures = {"synthetic samples": torch.linspace(-1, 1, 2 * 16).reshape(2, 1, 4, 4)}
    train(Line(), loss_of, 8, o, tmp_path, name="line", pictures=lambda model: pictures, progress=False)
    train(Line(), loss_of, 8, o, tmp_path, name="next", progress=False)
    board = events.EventAccumulator(str(tmp_path / "tensorboard" / "line"))
    board.Reload()
    assert {"line/loss", "line/grad_norm", "line/lr", "line/items_per_s"} <= set(board.Tags()["scalars"])
    (tag,) = board.Tags()["images"]
    assert tag == "line/synthetic samples, not for diagnosis"
    assert [(e.step, e.width, e.height) for e in board.Images(tag)] == [(2, 8, 4), (4, 8, 4)]


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_min_snr_weights(kind: str) -> None:
    a = torch.tensor([0.99, 0.5, 0.1, 0.0])
    got = Objective(snr_gamma=5.0).weights(a, kind).tolist()
    # by hand: snr is 99, 1, 1/9, 0
    by_hand = {
        "epsilon": [5 / 99, 1, 1, 1],
        "sample": [5, 1, 1 / 9, 0],
        "v_prediction": [5 / 100, 1 / 2, (1 / 9) / (10 / 9), 0],
    }
    assert got == pytest.approx(by_hand[kind], rel=1e-5)
    assert Objective().weights(a, kind).tolist() == [1, 1, 1, 1]


def test_the_objective_is_its_formula() -> None:
    pred, target = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    w = torch.tensor([0.5, 1.0, 2.0, 0.25], dtype=torch.float64)
    weighted = w[:, None, None, None].sqrt() * (pred - target)
    plain = float((pred - target).square().mean())

    def loss(objective: Objective) -> float:
        return float(objective.loss(pred.float(), target.float(), w.float()))

    assert loss(Objective()) == pytest.approx(plain, rel=1e-5)
    assert loss(Objective(snr_gamma=5.0)) == pytest.approx(float(weighted.square().mean()), rel=1e-5)
    assert loss(Objective(spectral_weight=0.1)) == pytest.approx((1 + 0.1 * 64) * plain, rel=1e-5)
    power = torch.fft.fft2(pred - target, norm="ortho").abs().square()
    f = torch.fft.fftfreq(8, dtype=torch.float64)
    low = (f[:, None] ** 2 + f[None] ** 2).sqrt() <= 0.25
    bands = float((power * torch.where(low, 2.0, 0.5)).mean())
    assert loss(Objective(low_weight=2.0, high_weight=0.5)) == pytest.approx(bands, rel=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cutmix_prob": 1.5}, "cutmix_prob: got 1.5, allowed is 0 to 1"),
        ({"low_weight": -1.0}, "low_weight: got -1.0, allowed is 0 or more"),
        ({"cutoff": math.nan}, "cutoff: got nan"),
        ({"cutoff": 1.5}, "cutoff: got 1.5, allowed is 0 to 1"),
        ({"high_weight": math.inf}, "high_weight: got inf"),
        ({"snr_gamma": 0.0}, "snr_gamma: got 0.0, allowed is above 0, or none"),
        ({"snr_gamma": math.inf}, "snr_gamma: got inf"),
        ({"low_weight": 0.0, "high_weight": 0.0}, "low_weight, high_weight, spectral_weight: got 0 three times"),
    ],
)
def test_bad_objective_is_named(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**values)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_every_prediction_type_trains(kind: str, data: Path, tmp_path: Path) -> None:
    preset = SMALL._replace(scheduler=replace(SMALL.scheduler, prediction_type=kind))
    train_pipeline(preset, data, tmp_path, vae=optimisation(1), unet=optimisation(2), views=1, progress=False)
    assert Pipeline.from_pretrained(tmp_path / "pipeline").scheduler.config.prediction_type == kind


def unet_step(device: torch.device, amp: str, ema_decay: float = 0.9) -> Step:
    torch.manual_seed(0)
    model = UNet2D(SMALL.unet).to(device)
    latents = torch.randn(16, 8, 16, 16, device=device)
    o = optimisation(100, amp=amp, ema_decay=ema_decay)
    step = Step(
        model,
        unet_loss(latents, SMALL.scheduler, Objective(snr_gamma=5.0, low_weight=2.0, cutmix_prob=0.25), o.seed),
        o,
    )
    model.train()
    return step


class Reads(TorchDispatchMode):
    """Counts how often a number is brought from a tensor to Python: on a GPU each is a wait."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_step_brings_no_number_to_the_host(amp: str) -> None:
    step = unet_step(torch.device("cpu"), amp, ema_decay=0.0)  # the EMA has a scalar on a CPU, a tensor elsewhere
    index = torch.arange(4)
    step(0, index)
    with Reads() as reads:
        step(1, index)
    assert reads.count == 0
    with Reads() as reads:
        step.read(2)
    assert reads.count > 0, "the count counts"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("amp", ["off", "fp16", "auto"])
def test_a_captured_step_is_the_step_and_waits_for_nothing(amp: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, with kernels that add in one order: AdamW makes steps of the rounding of gradients that are zero."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    device = torch.device("cuda")
    captured, eager = unet_step(device, amp), unet_step(device, amp)
    eager.run = eager._work
    index = torch.arange(8, device=device).split(4)
    for i in range(8):
        if i == 5:  # captured after three
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        with sdpa_kernel(SDPBackend.MATH):
            try:
                captured(i, index[i % 2])
            finally:
                torch.cuda.set_sync_debug_mode("default")
            eager(i, index[i % 2])
    assert captured.read(8)["loss"] == eager.read(8)["loss"]
    for a, b in zip(captured.trained.parameters(), eager.trained.parameters(), strict=True):
        assert torch.equal(a, b)


class Line(nn.Module):
    """y = a x, which should become 3 x."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x


def loss_of(model: nn.Module, index: Tensor, step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    x = index.float() + 1
    return ((model(x) - 3 * x) ** 2).mean(), {}


def test_the_loop_finds_the_minimum(tmp_path: Path) -> None:
    o = Optimisation(steps=300, batch_size=4, lr=0.1, amp="off", weight_decay=0.0)
    trained = train(Line(), loss_of, 8, o, tmp_path, name="line", progress=False)
    assert isinstance(trained, Line)
    assert trained.a.item() == pytest.approx(3.0, abs=0.01)
    assert not trained.training


@pytest.mark.parametrize(("amp", "dtype"), [("bf16", torch.bfloat16), ("off", torch.float32)])
def test_mixed_precision_keeps_float32_weights(amp: str, dtype: torch.dtype, tmp_path: Path) -> None:
    seen = []

    def matrix(model: nn.Module, index: Tensor, step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = model(index.float()[:, None])
        seen.append(y.dtype)
        return y.float().square().mean(), {}

    o = Optimisation(steps=2, batch_size=4, lr=0.1, amp=amp)
    trained = train(nn.Linear(1, 1), matrix, 8, o, tmp_path, name="line", progress=False)
    assert next(trained.parameters()).dtype == torch.float32
    assert seen == [dtype] * 2


def test_float16_with_a_scaler_goes_on_where_it_was(tmp_path: Path) -> None:
    o = Optimisation(steps=6, batch_size=4, lr=0.1, amp="fp16", save_every=2, keep=9)
    torch.manual_seed(0)
    first = nn.Linear(1, 1)
    whole = train(copy.deepcopy(first), overflowing, 8, o, tmp_path, name="line", progress=False)
    scale = json.loads((tmp_path / "checkpoint-line-00000006" / "state.json").read_text())["scaler"]["scale"]
    assert scale < 2**16, "an overflow is a step left out, and a smaller scale"
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"checkpoint-line-{step:08d}")
    again = train(copy.deepcopy(first), overflowing, 8, o, tmp_path, name="line", progress=False)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def overflowing(model: nn.Module, index: Tensor, step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(index.float()[:, None]).float().square().mean()
    return loss * torch.where(step[0] == 3, 1e37, 1.0), {}


def test_a_gradient_that_is_not_finite_reaches_no_checkpoint(tmp_path: Path) -> None:
    def bent(model: nn.Module, index: Tensor, step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, _ = loss_of(model, index, step)
        a = next(model.parameters())
        # at 0 an infinite slope
        return loss + ((a.detach() - a).sum() + torch.where(step[0] == 5, 0.0, 1.0)).sqrt(), {}

    o = Optimisation(steps=9, batch_size=4, lr=0.1, amp="off", save_every=2)
    with pytest.raises(
        FloatingPointError, match=r"or its gradient is not finite at step 5, .*checkpoint-line-00000004"
    ):
        train(Line(), bent, 8, o, tmp_path, name="line", progress=False)
    assert max(tmp_path.glob("checkpoint-*")).name == "checkpoint-line-00000004"


def test_a_validation_that_is_not_finite_is_never_the_best(tmp_path: Path) -> None:
    values = iter([math.nan, 2.0, math.inf])
    o = Optimisation(steps=3, batch_size=4, lr=0.1, amp="off", save_every=1)
    train(Line(), loss_of, 8, o, tmp_path, name="line", validate=lambda model: next(values), progress=False)
    assert json.loads((tmp_path / "best-line" / "state.json").read_text()) == {"step": 2, "val": 2.0}
    assert [row["val"] for row in curve(tmp_path) if "val" in row] == [None, 2.0, None]


def test_a_signal_in_the_last_validation_is_heard(tmp_path: Path) -> None:
    def validate(model: nn.Module) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun sends what its processes got already
        return 1.0

    o = Optimisation(steps=2, batch_size=4, lr=0.1, amp="off")
    with pytest.raises(Stopped, match="line: stopped by SIGTERM at step 2"):
        train(Line(), loss_of, 8, o, tmp_path, name="line", validate=validate, progress=False)
    assert (tmp_path / "checkpoint-line-00000002").is_dir()


def test_a_run_does_not_go_on_with_other_slices(data: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "vae": optimisation(2),
        "unet": optimisation(2),
        "views": 1,
        "progress": False,
        "resume": True,
    }
    shutil.copytree(data, tmp_path / "data")
    train_pipeline(SMALL, tmp_path / "data", tmp_path / "run", **arguments)
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    for row in manifest["slices"]:
        row["split"] = {"val": "test", "test": "val"}.get(row["split"], row["split"])
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"data: got .*, but .*checkpoint-vae-00000002 was made with"):
        train_pipeline(SMALL, tmp_path / "data", tmp_path / "run", **arguments)


def test_ema_is_an_average_that_starts_young(tmp_path: Path) -> None:
    seen: list[float] = []

    def recording(model: nn.Module, index: Tensor, step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(float(next(model.parameters()).detach()))
        return loss_of(model, index, step)

    o = Optimisation(steps=4, batch_size=4, lr=0.5, amp="off", ema_decay=0.5, weight_decay=0.0)
    line = Line()
    averaged = train(line, recording, 8, o, tmp_path, name="line", progress=False)
    values = [*seen[1:], line.a.item()]
    # the first update copies; then the decay is (1 + n) / (10 + n) until it reaches 0.5
    expected = values[0]
    for n, value in enumerate(values[1:], start=1):
        keep = min(0.5, (1 + n) / (10 + n))
        expected = keep * expected + (1 - keep) * value
    assert isinstance(averaged, Line)
    assert averaged.a.item() == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_is_not_finite_stops_with_everything_named(tmp_path: Path) -> None:
    seen: dict[int, list[int]] = {}

    def nan_at_five(model: nn.Module, index: Tensor, step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, _ = loss_of(model, index, step)
        seen[int(step)] = index.tolist()
        return loss * torch.where(step[0] == 5, torch.nan, 1.0), {}

    o = Optimisation(steps=90, batch_size=4, lr=0.1, amp="off", save_every=2, keep=1)
    with pytest.raises(
        FloatingPointError,
        match=r"line: the loss or its gradient is not finite at step 5, items \[.*\]; last good checkpoint: .*line-",
    ) as e:
        train(Line(), nan_at_five, 8, o, tmp_path, name="line", progress=False)
    assert f"items {seen[5]};" in str(e.value)
    assert [p.name for p in tmp_path.glob("checkpoint*")] == ["checkpoint-line-00000004"]
    with pytest.raises(FloatingPointError, match=r"at step 5, items .*; last good checkpoint: none yet"):
        train(Line(), nan_at_five, 8, replace(o, save_every=80), tmp_path / "other", name="line", progress=False)


def test_a_checkpoint_of_another_model_is_named(tmp_path: Path) -> None:
    o = Optimisation(steps=2, batch_size=4, lr=0.1, amp="off")
    train(Line(), loss_of, 8, o, tmp_path, name="line", progress=False)
    with pytest.raises(ValueError, match="tensor weight is missing"):
        train(nn.Linear(1, 1), loss_of, 8, o, tmp_path, name="line", progress=False)
    for other, count, message in (
        (replace(o, steps=3), 8, "steps: got 3, but .*checkpoint-line-00000002 was made with 2"),
        (replace(o, seed=1), 8, "seed: got 1"),
        (o, 9, "items: got 9"),
    ):
        with pytest.raises(ValueError, match=message):
            train(Line(), loss_of, count, other, tmp_path, name="line", progress=False)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("state.json", "{}", "step is None, which is no state of a run"),
        (
            "state.json",
            '{"step": "2", "since": 0, "seconds": 0, "loss": 0, "settings": {}, "scaler": {}}',
            "step is '2'",
        ),
        (
            "state.json",
            '{"step": 2, "since": 0, "seconds": 0, "loss": 0, "settings": null, "scaler": {}}',
            "settings is None",
        ),
        ("optimizer.safetensors", {"7.exp_avg": torch.zeros(1)}, "tensor '7.exp_avg' is of no parameter of this model"),
        ("optimizer.safetensors", {"first.step": torch.zeros(())}, "tensor 'first.step' is of no parameter"),
        ("optimizer.safetensors", {"0.exp_avg": torch.zeros(3)}, r"tensor 0.exp_avg has shape \[3\]"),
        ("model.safetensors", {"a": torch.zeros(1, dtype=torch.int64)}, "tensor a is of int64"),
        ("../log.jsonl", "[]\n", "log.jsonl, line 1 is no row of a run"),
    ],
)
def test_a_damaged_checkpoint_is_named(file: str, content: Any, message: str, tmp_path: Path) -> None:
    o = Optimisation(steps=2, batch_size=4, lr=0.1, amp="off")
    train(Line(), loss_of, 8, o, tmp_path, name="line", progress=False)
    path = tmp_path / "checkpoint-line-00000002" / file
    if isinstance(content, str):
        path.write_text(content)
    else:
        save_file({k: v.reshape(Line().a.shape) if k == "a" else v for k, v in content.items()}, path)
    with pytest.raises(ValueError, match=message):
        train(Line(), loss_of, 8, o, tmp_path, name="line", progress=False)


def test_copies_that_a_user_made_of_checkpoints_stay_theirs(tmp_path: Path) -> None:
    o = Optimisation(steps=4, batch_size=4, lr=0.1, amp="off", save_every=1, keep=1)
    train(Line(), loss_of, 8, o, tmp_path, name="line", progress=False)
    real = tmp_path / "checkpoint-line-00000004"
    others = [
        tmp_path / "checkpoint-line-00000001-mine",
        tmp_path / "checkpoint-line-good",
        tmp_path / ".vimrc.original.old",
        tmp_path / ".notes.20261101.old",
        tmp_path / ".photos.archived.part",
    ]
    for other in others:
        shutil.copytree(real, other)
    train(Line(), loss_of, 8, o, tmp_path, name="line", progress=False)
    assert all((other / "state.json").exists() for other in others)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == [real.name]
    assert checkpoint.newest(tmp_path, "line") == real


def test_an_epoch_meets_every_item_once_from_any_start() -> None:
    order = batches(10, 3, 7, 0)
    first = [next(order) for _ in range(7)]
    assert len(set(torch.cat(first[:3]).tolist())) == 9
    assert not torch.equal(torch.cat(first[:3]), torch.cat(first[3:6]))
    again = batches(10, 3, 7, 4)
    for expected in first[4:]:
        assert torch.equal(next(again), expected)
    assert len(next(batches(2, 5, 0, 0))) == 2


def test_learning_rate() -> None:
    o = Optimisation(steps=110, batch_size=1, lr=1.0, warmup=10)
    assert [o.lr_at(s) for s in (0, 9, 10, 60)] == pytest.approx([0.1, 1.0, 1.0, 0.5])
    assert o.lr_at(109) < 0.001


def test_augmentation_keeps_air_dark_and_flips_half(device: torch.device) -> None:
    x = torch.full((64, 1, 32, 32), -1.0, device=device)
    x[:, :, 10:22, 18:26] = 1.0
    y = augment(x, torch.rand(64, 5, device=device))
    assert y.shape == x.shape
    assert y.min() >= -1.0001
    assert y.max() <= 1.0001
    assert (y[..., 0] < -0.9).all()
    right = (y[..., 16:] > 0).flatten(1).sum(1) > (y[..., :16] > 0).flatten(1).sum(1)
    assert 16 < int(right.sum()) < 48


def test_amp_dtype_by_name() -> None:
    cpu = torch.device("cpu")
    assert amp_dtype("off", cpu) is None
    assert amp_dtype("fp16", cpu) is torch.float16
    assert amp_dtype("bf16", cpu) is torch.bfloat16
    assert amp_dtype("auto", cpu) in (None, torch.bfloat16)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"amp": "tf32"}, "amp: got 'tf32'"),
        ({"keep": 0}, "keep: got 0"),
        ({"lr": -1.0}, "lr: got -1.0"),
        ({"clip_norm": 0.0}, "clip_norm: got 0.0"),
        ({"ema_decay": 1.0}, "ema_decay: got 1.0"),
        ({"warmup": -1}, "warmup: got -1"),
        ({"seed": 10**14}, "seed: got 100000000000000, allowed is 0 to 1099511627775"),
        ({"seed": -1}, "seed: got -1"),
    ],
)
def test_bad_optimisation_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Optimisation(**({"steps": 1, "batch_size": 1, "lr": 1.0} | values))


def test_bad_recon_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="recon: got 'l3', allowed are mse, l1"):
        train_pipeline(SMALL, data, tmp_path, vae=optimisation(1), unet=optimisation(1), recon="l3", progress=False)
    shutil.rmtree(tmp_path)
