"""A pipeline to ONNX: one file for the decoder and one for the UNet, with the proof that they compute the same."""

from __future__ import annotations

import copy
import hashlib
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sbldm_fast.kernels import backend
from torch import Tensor, nn

from sbldm_fast import Pipeline
from sbldm_fast.files import whole_folder, write_json

OPSET = 18  # with a dynamic batch, ONNX Runtime can fuse GroupNorm from this form; GroupNormalization-18 itself is never emitted
TOLERANCE = 1e-4
TARGETS = ("ort",)


class _UNet(nn.Module):
    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        self.unet = pipeline.unet

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.unet(x, t)
        return out


class _Decoder(nn.Module):
    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        self.vae = pipeline.vae

    def forward(self, z: Tensor) -> Tensor:
        return self.vae.decode(z / self.vae.config.scaling_factor)


def export(pipeline: Pipeline, out: str | Path, *, target: str = "ort", latents: Tensor | None = None) -> dict[str, Any]:
    """Write `unet.onnx`, `vae_decoder.onnx` and `manifest.json` to the folder `out`, verified by ONNX Runtime on the CPU.

    Graphs are single files, opset 18, float32, with a dynamic batch: `unet` takes `x [N, C, h, w]` and `t [N]` int64,
    `vae_decoder` takes scaled latents `z` and gives images in [-1, 1].

    Args:
        target: `"ort"`.
        latents: scaled latents for the parity check, at least two; None: the pipeline samples two in ten steps.

    Returns:
        The manifest: sha256, opset, shapes, parity figures, versions.

    Raises:
        ValueError: an unknown target, too few latents, a missing package, or a graph that differs from PyTorch by more than 1e-4.
    """
    if target not in TARGETS:
        raise ValueError(f"target: got {target!r}, allowed are {', '.join(TARGETS)}")
    try:
        import onnx
        import onnxruntime
        import onnxscript
    except ImportError as missing:
        raise ValueError(f"export needs {missing.name}: pip install 'sbldm_fast[onnx]'") from None
    if latents is None:
        latents = _sampled(pipeline)
    if len(latents) < 2:
        raise ValueError(f"latents: got {len(latents)}, allowed is 2 or more (the exporter takes a batch of 1 for a constant)")
    pipeline = copy.deepcopy(pipeline).to("cpu")  # the caller's stays where it is
    latents = latents.float().cpu()
    t = torch.linspace(0, pipeline.scheduler.config.num_train_timesteps - 1, len(latents)).long()
    jobs: dict[str, tuple[nn.Module, dict[str, Tensor]]] = {
        "unet": (_UNet(pipeline), {"x": latents, "t": t}),
        "vae_decoder": (_Decoder(pipeline), {"z": latents}),
    }
    manifest: dict[str, Any] = {
        "format": 1, "target": target, "opset": OPSET, "dtype": "float32", "tolerance": TOLERANCE,
        "notice": "images are synthetic, not for diagnosis",
        "versions": {p.__name__: p.__version__ for p in (torch, onnx, onnxscript, onnxruntime)},
        "latent_shape": list(pipeline.latent_shape), "scaling_factor": pipeline.vae.config.scaling_factor,
        "scheduler": pipeline.scheduler.config.to_dict(), "graphs": {},
    }  # fmt: skip
    with whole_folder(out) as folder:
        for name, (module, inputs) in jobs.items():
            path = folder / f"{name}.onnx"
            _write(module.eval(), inputs, path)
            error = _parity(module, inputs, path)
            if not error <= TOLERANCE:
                raise ValueError(f"{name}.onnx: ONNX Runtime differs from PyTorch by {error:.1e}, allowed is {TOLERANCE:.0e}")
            manifest["graphs"][name] = {
                "file": path.name,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "inputs": {k: ["batch", *v.shape[1:]] for k, v in inputs.items()},
                "parity_max_abs_error": error,
            }
        write_json(folder / "manifest.json", manifest)
    return manifest


def _sampled(pipeline: Pipeline) -> Tensor:
    from sbldm_fast import FastSampler

    return FastSampler(pipeline.unet, pipeline.scheduler, shape=pipeline.latent_shape, steps=10, mode="eager")(2, seed=0)


def _write(module: nn.Module, inputs: dict[str, Tensor], path: Path) -> None:
    import onnx

    batch = torch.export.Dim("batch", min=1)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with backend("torch"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's deprecation notices are not about our model
        program = torch.onnx.export(
            module, tuple(inputs.values()), dynamo=True, opset_version=OPSET, verbose=False, external_data=False,
            input_names=list(inputs), output_names=["out"], dynamic_shapes=tuple({0: batch} for _ in inputs),
        )  # fmt: skip
    assert program is not None  # the exporter gives None only for dynamo=False
    program.save(path, external_data=False)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    for value in (*model.graph.input, *model.graph.output):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise ValueError(f"{path.name}: {value.name} has a fixed batch; the exporter fell back to a static shape")


def _parity(module: nn.Module, inputs: dict[str, Tensor], path: Path) -> float:
    """The largest absolute difference, on the batch exported and on its first sample alone."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for n in (len(next(iter(inputs.values()))), 1):
        some = {k: v[:n] for k, v in inputs.items()}
        with torch.no_grad(), backend("torch"):
            expected = module(*some.values()).numpy()
        got = session.run(None, {k: v.numpy() for k, v in some.items()})[0]
        worst = max(worst, float(np.abs(got - expected).max()))
    return worst
