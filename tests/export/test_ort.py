"""`ORTSampler`: the call, the seeds and the samples of `FastSampler`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnxruntime
import pytest
import torch
from sbldm_fast.export import ORTSampler, export

from sbldm_fast import FastSampler, Pipeline

from .conftest import SDE

Exported = Callable[..., Path]
MODES = ("step", "sampler")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "call",
    [{"n": 1}, {"n": 3, "seed": 7}, {"seed": [4, 4, 9], "n": 3}, {"indices": [5, 2], "seed": 1}, {"n": 5, "seed": 2}],
    ids=str,
)
def test_the_same_call_gives_the_same_images(
    exported: Exported, pipeline: Pipeline, mode: str, call: dict[str, Any]
) -> None:
    expected = pipeline.sampler(4, "eager")(**call)
    got = ORTSampler(exported(target="ort"), mode=mode)(**call)
    assert got.dtype == np.float32
    assert np.abs(got - expected.numpy()).max() <= 1e-4


@pytest.fixture(scope="module")
def stochastic(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model in batches of 2, under a solver that looks back and draws noise."""
    folder = tmp_path_factory.mktemp("stochastic") / "o"
    export(tiny(), folder, scheduler=SDE(), steps=4, shape=(3, 8, 8), batch=2)
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_a_solver_with_history_and_noise_in_batches(stochastic: Path, tiny: Any, mode: str) -> None:
    sampler = ORTSampler(stochastic, mode=mode)
    assert sampler.solver.history == 1
    assert sampler.solver.stochastic
    expected = FastSampler(tiny(), sampler.table, shape=(3, 8, 8), mode="eager")(3, seed=3)
    for _ in range(2):  # a second run starts from clean buffers
        assert np.abs(sampler(3, seed=3) - expected.numpy()).max() <= 1e-4


def test_noise_comes_as_an_array_or_a_tensor(exported: Exported, pipeline: Pipeline) -> None:
    sampler, noise = ORTSampler(exported(target="ort")), torch.randn(2, 4, 8, 8)
    expected = pipeline.sampler(4, "eager")(noise=noise).numpy()
    assert np.abs(sampler(noise=noise) - expected).max() <= 1e-4
    np.testing.assert_array_equal(sampler(noise=noise.numpy()), sampler(noise=noise))


def test_a_callback_sees_every_step(exported: Exported, pipeline: Pipeline) -> None:
    seen: list[tuple[int, float, np.ndarray]] = []
    ORTSampler(exported(target="ort"))(1, seed=3, callback=lambda i, t, x: seen.append((i, t, x)))
    expected = FastSampler(
        pipeline.unet, pipeline.scheduler, shape=pipeline.latent_shape, steps=4, mode="eager"
    ).trajectory(1, seed=3)
    assert [i for i, _, _ in seen] == [0, 1, 2, 3]
    assert [t for _, t, _ in seen] == pipeline.sampler(4, "eager").timesteps
    for x, want in zip((x for _, _, x in seen), expected, strict=True):
        assert np.abs(x - want.numpy()).max() <= 1e-4


def test_guidance_and_conditioning(tiny: Any, tmp_path: Path, pipeline: Pipeline) -> None:
    model, cond, uncond = tiny(), torch.randn(3, 5), torch.randn(3, 5)
    export(model, tmp_path / "o", scheduler=pipeline.scheduler, steps=3, shape=(3, 8, 8), cond=cond)
    reference = FastSampler(model, pipeline.scheduler, shape=(3, 8, 8), steps=3, mode="eager")
    for mode in MODES:
        sampler = ORTSampler(tmp_path / "o", mode=mode)
        plain = sampler(3, seed=1, cond=cond)  # w = 1: no guidance
        assert np.abs(plain - reference(3, seed=1, cond=cond).numpy()).max() <= 1e-4
        asked = {"cond": cond, "uncond": uncond, "guidance_scale": torch.tensor([0.5, 2.0, 4.0])}
        assert np.abs(sampler(3, seed=1, **asked) - reference(3, seed=1, **asked).numpy()).max() <= 1e-4
        with pytest.raises(ValueError, match=r"cond: got \{\}, allowed is one row each of \{'': \[5\]\}"):
            sampler(3)
        with pytest.raises(ValueError, match=r"cond: got \{'': \[3, 4\]\}, allowed is one row each"):
            sampler(3, cond=cond[:, :4])
    with pytest.raises(ValueError, match="cond: got"):
        ORTSampler(tmp_path / "o")(2, cond={"class_labels": torch.zeros(2)})


def test_a_buffer_takes_no_foreign_bytes(tiny: Any, tmp_path: Path, pipeline: Pipeline) -> None:
    cond = torch.randn(2, 5)
    export(tiny(), tmp_path / "o", scheduler=pipeline.scheduler, steps=2, shape=(3, 8, 8), cond=cond, batch=2)
    for mode in MODES:
        sampler = ORTSampler(tmp_path / "o", mode=mode)
        expected = sampler(2, cond=cond)
        for other in (
            cond.double(),
            cond.half(),
            cond.numpy(),
            cond.numpy().astype(np.float64),
            cond.clone().requires_grad_(),
        ):
            assert np.abs(sampler(2, cond=other) - expected).max() <= 2e-3  # half precision rounds
        np.testing.assert_array_equal(sampler(2, cond=cond), expected)
        with pytest.raises(ValueError, match="guidance_scale: got a value without cond"):
            sampler(2, guidance_scale=3.0)


def test_a_solver_of_scaled_inputs_and_broken_timesteps(tiny: Any, tmp_path: Path) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="linspace")
    model = tiny()
    export(model, tmp_path / "o", scheduler=scheduler, steps=7, shape=(3, 8, 8), batch=2)
    expected = FastSampler(model, scheduler, shape=(3, 8, 8), steps=7, mode="eager")(3, seed=4)
    for mode in MODES:
        sampler = ORTSampler(tmp_path / "o", mode=mode)
        assert sampler.solver.scaled
        assert sampler.table.timesteps.is_floating_point()
        assert np.abs(sampler(3, seed=4) - expected.numpy()).max() <= 1e-4 * float(expected.abs().max())


def test_one_step_is_enough(tiny: Any, tmp_path: Path, pipeline: Pipeline) -> None:
    model = tiny()
    export(model, tmp_path / "o", scheduler=pipeline.scheduler, steps=1, shape=(3, 8, 8))
    expected = FastSampler(model, pipeline.scheduler, shape=(3, 8, 8), steps=1, mode="eager")(2, seed=4)
    for mode in MODES:
        assert np.abs(ORTSampler(tmp_path / "o", mode=mode)(2, seed=4) - expected.numpy()).max() <= 1e-4 * float(
            expected.abs().max()
        )


def test_bad_calls_are_named(stochastic: Path) -> None:
    folder = stochastic
    with pytest.raises(ValueError, match=r"batch_size: got 3, allowed is 2, which step.onnx was exported with"):
        ORTSampler(folder)(3, batch_size=3)
    with pytest.raises(ValueError, match="callback: got one, allowed in mode 'sampler' is None"):
        ORTSampler(folder, mode="sampler")(1, callback=lambda i, t, x: None)
    with pytest.raises(ValueError, match="n: got 0, allowed is 1 or more"):
        ORTSampler(folder)(0)
    with pytest.raises(ValueError, match=r"noise: got shape \(1, 4, 8, 8\)"):
        ORTSampler(folder)(noise=np.zeros((1, 4, 8, 8), np.float32))
    with pytest.raises(ValueError, match="cond: got"):
        ORTSampler(folder)(1, cond=torch.zeros(1, 2))
    with pytest.raises(ValueError, match="mode: got 'loop', allowed are step, sampler"):
        ORTSampler(folder, mode="loop")
    with pytest.raises(ValueError, match="providers: got CUDAExecutionProvider, allowed on this machine are"):
        ORTSampler(folder, providers=["CUDAExecutionProvider"])
    with pytest.raises(ValueError, match="providers: got none, allowed is one or more"):
        ORTSampler(folder, providers=[])
    with pytest.raises(
        ValueError, match="cuda_graph: got True for CPUExecutionProvider and 'step', allowed is CUDAExecutionProvider"
    ):
        ORTSampler(folder, cuda_graph=True)
    with pytest.raises(ValueError, match="fuse: got True for CPUExecutionProvider"):
        ORTSampler(folder, fuse=True)


def test_nan_is_named_by_sample(exported: Exported) -> None:
    noise = np.zeros((3, 4, 8, 8), np.float32)
    noise[1, 0, 0, 0] = np.nan
    for mode in MODES:
        with pytest.raises(FloatingPointError, match=rf"{mode}.onnx: NaN or infinity in samples \[1\]"):
            ORTSampler(exported(target="ort"), mode=mode)(noise=noise)


def test_a_folder_that_is_not_whole_is_refused(exported: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "o"
    shutil.copytree(exported(target="ort"), folder)
    data = bytearray((folder / "step.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "step.onnx").write_bytes(data)
    with pytest.raises(ValueError, match=r"step.onnx: its sha256 is not the one in manifest.json"):
        ORTSampler(folder)
    (folder / "vae_decoder.onnx").unlink()
    (folder / "step.onnx").unlink()
    with pytest.raises(ValueError, match=r"step.onnx: No such file"):
        ORTSampler(folder)
    assert ORTSampler(folder, mode="sampler")(1).shape == (1, 1, 16, 16)  # needs neither
    manifest = json.loads((folder / "manifest.json").read_text())
    for wrong, message in (
        ({"graphs": {}}, "got no graph step"),
        ({"solver": {}}, "not a solver table"),
        ({"decodes": None}, "manifest.json: decodes: got None, allowed is true or false"),
        ({"graphs": {"step": 3}}, "graphs.step: got 3, allowed is a mapping"),
    ):
        (folder / "manifest.json").write_text(json.dumps(manifest | wrong))
        with pytest.raises(ValueError, match=message):
            ORTSampler(folder, mode="sampler" if "solver" in wrong else "step")
    with pytest.raises(ValueError, match="is not a folder, allowed is one that sbldm-fast export wrote"):
        ORTSampler(folder / "manifest.json")
    with pytest.raises(ValueError, match=r"manifest.json does not exist"):
        ORTSampler(tmp_path)


def test_buffers_change_places_and_are_made_once(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    plain = onnxruntime.OrtValue.ortvalue_from_numpy
    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", lambda *a: made.append(a[1]) or plain(*a))
    sampler = ORTSampler(exported(target="ort"))
    sampler(3, seed=1)
    first = len(made)
    sampler(4, seed=2)
    assert len(made) == first == 2 + 2 * 2  # timesteps and table; x and index twice
    assert set(made) == {"cpu"}


def test_threads_are_pytorchs(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert ORTSampler(exported(target="ort")).run.get_session_options().intra_op_num_threads == 3


@pytest.mark.gpu
@pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="ONNX Runtime without CUDA"
)
@pytest.mark.parametrize("options", [{}, {"cuda_graph": True}, {"fuse": True}, {"mode": "sampler"}], ids=str)
def test_cuda_makes_the_same_images(exported: Exported, pipeline: Pipeline, options: dict[str, Any]) -> None:
    sampler = ORTSampler(exported(target="ort", scheduler="sde", batch=2), **options)
    assert sampler.device == "cuda"
    expected = pipeline.sampler(4, "eager", scheduler=sampler.table)(3, seed=3)
    for _ in range(2):
        assert np.abs(sampler(3, seed=3) - expected.cpu().numpy()).max() <= 1e-4
