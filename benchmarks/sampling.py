"""Latency of sampling: our reference, our modes, and diffusers with a UNet of the same size, in one interleaved run."""

from __future__ import annotations

import copy
import functools
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sbldm_fast.kernels import backend, philox_normal
from torch import Tensor, nn

from sbldm_fast import DDIMScheduler, FastSampler, UNet2D, preset
from sbldm_fast.models import UNetConfig
from sbldm_fast.sampling.loop import compilation
from sbldm_fast.training.loop import amp_dtype

from .timing import interleaved, machine, summary

TOLERANCE = 1e-4  # float32, relative to the largest value, after all steps
PEER = "diffusers"


def bench_sampling(
    *, preset_name: str = "paper", steps: int = 50, batches: Sequence[int] = (1, 8), rounds: int = 5, modes: Sequence[str] | None = None,
    half: bool = True, say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row for each provider and batch: seconds for `batch` latents of `steps` DDIM steps, noise to latent.

    Providers: `reference` (UNet and scheduler stepped as in a textbook, PyTorch ops only), `FastSampler` in each mode that this
    machine has, diffusers' own UNet2DModel and DDIMScheduler in diffusers' own loop, eager and through torch.compile, the same
    diffusers objects under `FastSampler`, and, on a CPU, that UNet in ONNX Runtime and OpenVINO; in float32 and, with `half`, in
    the machine's native half precision. Each row holds its error against its own float32 loop and gets no speed-up where that is
    too large. The speed-up is over eager float32 diffusers. A provider that is absent or fails is a row that says why. TF32 is
    off, so that float32 means float32.

    Raises:
        ValueError: steps, batches or rounds below 1.
    """
    if min(steps, rounds, *batches) < 1:
        raise ValueError(f"steps, batch, rounds: got {steps}, {list(batches)}, {rounds}, allowed is 1 or more")
    p = preset(preset_name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    modes = modes or (("eager", "compile", "step-graph", "loop-graph") if device.type == "cuda" else ("eager", "compile"))
    dtypes = [torch.float32, *([amp_dtype("auto", device)] if half else [])]
    torch.manual_seed(0)
    unet = UNet2D(p.unet).to(device).eval()
    shape = (p.unet.in_channels, p.unet.sample_size, p.unet.sample_size)
    ours = unet, DDIMScheduler.from_config(p.scheduler)
    peer, absence = _diffusers(p.unet, p.scheduler.to_dict(), device)
    run = datetime.now(UTC).isoformat(timespec="seconds")
    rows = []
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        for batch in batches:
            noise = philox_normal((batch, *shape), 0, device=device)
            cases = _cases(noise, ours, peer, steps, modes, [d for d in dtypes if d])
            missing: list[dict[str, Any]] = []
            if peer is not None and device.type == "cpu" and "compile" in modes:
                say(f"exporting for the runtimes: batch {batch}")
                runtimes, missing = _runtimes(noise, peer, steps, half and bool(dtypes[-1]))
                cases |= runtimes
            common = {"target": "sampling", "run": run, "preset": preset_name, "steps": steps, "batch": batch, "env": machine()}
            rows += [common | row for row in timed(cases, noise, steps, rounds, say)]
            rows += [common | row for row in missing]
            if peer is None:
                rows.append(common | {"provider": PEER, "absent": absence})
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    return rows


class Case(NamedTuple):
    """A provider: a run, its precision, and what its output is held against."""

    run: Callable[[], Tensor]
    dtype: torch.dtype
    against: str  # the provider whose output this one must equal
    plain: str  # the provider that is the plain loop in this precision: twice its loss is allowed


def _cases(
    noise: Tensor, ours: tuple[UNet2D, DDIMScheduler], peer: tuple[nn.Module, Any] | None, steps: int, modes: Sequence[str],
    dtypes: Sequence[torch.dtype],
) -> dict[str, Case]:  # fmt: skip
    unet, scheduler = ours
    # Dynamo counts versions of a function over the whole process; each batch starts afresh
    torch.compiler.reset()

    def reference() -> Tensor:
        with backend("torch"):
            return stepped(unet, scheduler, steps, noise)

    def fast(model: nn.Module, sched: Any, mode: str, dtype: torch.dtype) -> Callable[[], Tensor]:
        sampler = FastSampler(model, sched, shape=noise.shape[1:], steps=steps, mode=mode, dtype=dtype)
        return lambda: sampler(noise=noise)

    def loop(model: Callable[..., Any], sched: Any, dtype: torch.dtype) -> Callable[[], Tensor]:
        return lambda: stepped(lambda x, t: model(x.to(dtype), t, return_dict=False)[0].float(), sched, steps, noise)

    cases = {"reference": Case(reference, torch.float32, "reference", "reference")}
    for dtype in dtypes:
        name = str(dtype)[6:]
        for mode in modes:
            plain = "reference" if dtype == torch.float32 else f"FastSampler eager {name}"
            cases[f"FastSampler {mode} {name}"] = Case(fast(unet, scheduler, mode, dtype), dtype, "reference", plain)
        if peer is None:
            continue
        model, sched = peer
        title = PEER if dtype == torch.float32 else f"{PEER} {name}"
        if dtype != torch.float32:
            model = copy.deepcopy(model).to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch has it, its stub has not
        cases[title] = Case(loop(model, sched, dtype), dtype, PEER, title)
        if "compile" in modes:
            run = loop(torch.compile(model, dynamic=False), sched, dtype)
            cases[f"{title} torch.compile"] = Case(_as_ours(run, noise.device), dtype, PEER, title)
        cases[f"{title} under FastSampler {modes[-1]}"] = Case(fast(peer[0], sched, modes[-1], dtype), dtype, PEER, title)
    return cases


def _runtimes(noise: Tensor, peer: tuple[nn.Module, Any], steps: int, half: bool) -> tuple[dict[str, Case], list[dict[str, Any]]]:
    """diffusers' loop with its UNet in ONNX Runtime and in OpenVINO, as many threads as PyTorch; and a row for each that is missing."""
    model, sched = peer
    cases: dict[str, Case] = {}
    missing: list[dict[str, Any]] = []
    threads = torch.get_num_threads()

    def case(name: str, call: Callable[[dict[str, Any]], Any], dtype: torch.dtype, plain: str) -> None:
        def predict(x: Tensor, t: Tensor) -> Tensor:
            return torch.from_numpy(call({"x": x.numpy(), "t": t.expand(len(x)).numpy()}))

        cases[name] = Case(lambda: stepped(predict, sched, steps, noise), dtype, PEER, plain)

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's notices are not about the model
        path = f"{folder}/unet.onnx"
        for name in ("ONNX Runtime", "OpenVINO"):
            try:
                if not cases and not Path(path).exists():
                    t = torch.full((len(noise),), 1)
                    program = torch.onnx.export(model, (noise, t), dynamo=True, input_names=["x", "t"], output_names=["m"], verbose=False)
                    assert program is not None  # the exporter gives None only for dynamo=False
                    program.save(path)
                if name == "ONNX Runtime":
                    import onnxruntime

                    options = onnxruntime.SessionOptions()
                    options.intra_op_num_threads = threads
                    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
                    case(f"{PEER} {name}", functools.partial(_run_onnxruntime, session), torch.float32, PEER)
                    continue
                import openvino

                core = openvino.Core()
                for hint, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16))[: 1 + half]:
                    config = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
                    request = core.compile_model(core.read_model(path), "CPU", config).create_infer_request()
                    title = f"{PEER} {name}" if dtype == torch.float32 else f"{PEER} {name} bfloat16"
                    plain = PEER if dtype == torch.float32 else f"{PEER} bfloat16"
                    case(title, functools.partial(_run_openvino, request), dtype, plain)
            except ImportError as error:
                missing.append({"provider": f"{PEER} {name}", "absent": f"not installed ({error})"})
    return cases, missing


def _run_onnxruntime(session: Any, inputs: dict[str, Any]) -> Any:
    return session.run(None, inputs)[0]


def _run_openvino(request: Any, inputs: dict[str, Any]) -> Any:
    return request.infer(inputs)["m"].copy()


def _as_ours(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    def compiled_as_ours() -> Tensor:
        with compilation(device):
            return run()

    return compiled_as_ours


def timed(
    cases: dict[str, Case], noise: Tensor, steps: int, rounds: int, say: Callable[[str], None], base_name: str = PEER
) -> list[dict[str, Any]]:
    """A row for each case, warmed up, then interleaved; the speed-up is over the case `base_name`, and only with parity."""
    first: dict[str, float] = {}
    outputs: dict[str, Tensor] = {}
    failed: list[dict[str, Any]] = []
    for name, case in list(cases.items()):
        say(f"warming up: batch {len(noise)}, {name}")
        start = time.perf_counter()
        try:
            with torch.no_grad():
                outputs[name] = case.run().float().cpu()
        except Exception as failure:  # one provider's failure is its row, not the end of the others
            failed.append({"provider": name, "absent": f"failed: {type(failure).__name__}: {str(failure).strip().splitlines()[0][:160]}"})
            del cases[name]
            continue
        first[name] = time.perf_counter() - start
    say(f"timing: batch {len(noise)}, {rounds} rounds of {len(cases)} providers")
    with torch.no_grad():
        seconds = interleaved({name: case.run for name, case in cases.items()}, rounds)
    base = summary(seconds[base_name])["median_s"] if base_name in cases else None
    rows: list[dict[str, Any]] = []
    for name, case in cases.items():
        s = summary(seconds[name])
        error = _relative(outputs[name], outputs[case.against]) if case.against in outputs else math.inf
        # the three-way rule; a plain loop that failed allows nothing beyond float32
        lost = _relative(outputs[case.plain], outputs[case.against]) if case.plain in outputs and case.against in outputs else 0.0
        allowed = TOLERANCE + 2 * lost
        ok = error <= allowed
        rows.append(
            s
            | {
                "provider": name,
                "shape": list(noise.shape),
                "dtype": str(case.dtype)[6:],
                "device": str(noise.device),
                "ms_per_step": 1e3 * s["median_s"] / steps,
                "ms_per_image": 1e3 * s["median_s"] / len(noise),
                "first_call_s": first[name],
                "parity": {"against": case.against, "error": error, "allowed": allowed, "ok": ok},
                "speedup": {"over": base_name, "factor": base / s["median_s"]} if base and ok else None,
            }
        )
    return rows + failed


def stepped(model: Callable[[Tensor, Tensor], Tensor], scheduler: Any, steps: int, noise: Tensor) -> Tensor:
    """The textbook loop: the model, then `scheduler.step`, for each timestep."""
    scheduler.set_timesteps(steps, device=noise.device)
    x: Tensor = noise * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return x


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def _diffusers(c: UNetConfig, scheduler: dict[str, Any], device: torch.device) -> tuple[tuple[nn.Module, Any] | None, str]:
    """diffusers' UNet2DModel of the same widths, blocks and attention, and its DDIMScheduler on the same betas."""
    try:
        import diffusers
    except ImportError as error:
        return None, f"diffusers is not installed ({error})"
    attends = [c.sample_size >> i in c.attention_resolutions for i in range(len(c.block_out_channels))]
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=c.sample_size, in_channels=c.in_channels, out_channels=c.out_channels, layers_per_block=c.layers_per_block,
        block_out_channels=c.block_out_channels, norm_num_groups=c.norm_num_groups, attention_head_dim=c.attention_head_dim,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
    )  # fmt: skip
    own = DDIMScheduler(**{k: v for k, v in scheduler.items() if not k.startswith("_")})
    sched = diffusers.DDIMScheduler(
        trained_betas=own.betas.numpy(), clip_sample=own.config.clip_sample, prediction_type=own.config.prediction_type
    )
    return (model.to(device).eval(), sched), ""
