"""What runs on a GPU, recorded without one: the real models run on meta tensors, which compute nothing.

Meta tensors take CUDA's path through our ops. `counts` counts what is recorded here, `t4` prices it, and
`kernels.preflight` compiles it: the calls of our ops lie in kernels/launches.json, where float16 stands for whatever a
model computes in.

python -m sbldm_fast.benchmarks.record > kernels/launches.json     a test fails when they differ
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from sbldm_fast.kernels import backend, ddim_step, diffuse, frequency_loss, philox_normal, solver_step, spectral_mse
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from sbldm_fast import UNet2D, preset
from sbldm_fast.models import AutoencoderKL
from sbldm_fast.models.presets import PRESETS, Preset
from sbldm_fast.models.slices import MIXING, SLICE
from sbldm_fast.sampling.loop import Buffers, make_step
from sbldm_fast.sampling.model import merge_biases, predictor, replace_upsampling

LAYOUTS = (torch.contiguous_format, torch.channels_last)
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")  # and a flow's, which only `diffuse` takes
# the sides of `brain`, no multiples of 16, make half as many kernels again, with narrower loads: no gate compiles them
GATED = tuple(name for name in PRESETS if name != "brain")
ALIGNED = 16  # elements: of any dtype they are a multiple of 16 bytes


class Call(NamedTuple):
    """One call of an operator."""

    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any


class Recorder(TorchDispatchMode):
    """Keeps every call that is made inside its `with` block, autograd's included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._overloadpacket is torch.ops.aten.convolution and any(
            suggest_memory_format(t) == torch.channels_last for t in args[:2]
        ):
            # as cuDNN has it; on meta tensors it would be NCHW
            out = torch.empty_like(out, memory_format=torch.channels_last)
        self.calls.append(Call(func, tuple(args), kwargs, out))
        return out


def record(work: Callable[[], object]) -> list[Call]:
    """The calls that `work` makes."""
    recorder = Recorder()
    with backend("auto"), recorder:
        work()
    return recorder.calls


class Autocast(TorchFunctionMode):
    """Mixed precision on meta tensors, which PyTorch's autocast does not know: products in float16, weights as they
    are."""

    PRODUCTS = (
        torch.conv2d,
        torch.conv_transpose2d,
        torch.nn.functional.linear,
        torch.nn.functional.scaled_dot_product_attention,
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.PRODUCTS:
            args, kwargs = tree_map_only(Tensor, lambda t: t.to(torch.float16), (args, kwargs))
        return func(*args, **(kwargs or {}))


class Fused(TorchFunctionMode):
    """Attention as CUDA has it in half precision: the flash operator, or with a mask the memory-efficient one. Its
    result lies heads side by side, so that the projection behind it is one launch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        mask = (kwargs or {}).get("attn_mask")
        if mask is None:
            out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
        else:
            mask = mask.expand(*args[0].shape[:-1], args[1].shape[-2])
            out = torch.ops.aten._scaled_dot_product_efficient_attention(*args, mask, False)[0]
        return torch.empty_like(out.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def record_step(
    batch: int = 1,
    dtype: torch.dtype = torch.float16,
    counter_rows: bool = False,
    preset_name: str = "paper",
    volume: bool = False,
) -> tuple[list[Call], list[Call]]:
    """One DDIM step of `FastSampler` with our kernels, and decoding; `counter_rows`: as `step-graph` reads its row;
    `volume`: the batch is the slices of one."""
    p = preset(preset_name)
    unet = merge_biases(replace_upsampling(UNet2D(p.unet))).eval().to("meta", dtype)
    unet = unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch has it, its stub has not
    vae = AutoencoderKL(p.vae).eval().to("meta")
    with torch.no_grad():
        x = torch.empty(batch, *p.unet.shape, device="meta")
        rows = unet.time_rows(torch.zeros(50, device="meta"))
        table = torch.empty(50, 6, device="meta")
        buffers = Buffers(torch.zeros(2, dtype=torch.int32, device="meta"), None, None, None, None, None, None, None)
        step = make_step(predictor(unet), dtype, torch.channels_last, None, None, 0.0)
        asked = {c.name: torch.zeros(batch, device="meta") for c in p.unet.covariates}
        asked |= {SLICE: torch.arange(batch, device="meta")} if volume else {}
        made = unet.condition(asked)  # before the loop
        cond = {k: v.to(dtype) if v.is_floating_point() else v for k, v in made.items()}

        def one_step() -> Tensor:
            row = rows.index_select(0, buffers.counter[:1]) if counter_rows else rows[:1]
            with Fused():
                return step(x, row, None, table, buffers, cond)

        return record(one_step), record(lambda: vae.decode(x / 1.0))


def _run_models(
    p: Preset, batch: int, layout: torch.memory_format, mixed: bool, training: bool, volume: bool = False
) -> None:
    """UNet and autoencoder forward, in float16 or in mixed precision, and with `training` backward; `volume`: the batch
    is the slices of one, and what mixes them trains alone."""
    dtype = torch.float32 if mixed else torch.float16

    def ready(model: nn.Module) -> Any:
        return model.train(training).to(dtype).to(memory_format=layout)  # type: ignore[call-overload]

    def new(*shape: int) -> Tensor:
        return torch.empty(batch, *shape, dtype=dtype).to(memory_format=layout)

    with torch.device("meta"), torch.set_grad_enabled(training), Autocast() if mixed else nullcontext():
        unet, vae = ready(UNet2D(p.unet)), ready(AutoencoderKL(p.vae))
        for name, parameter in unet.named_parameters() if volume else ():
            parameter.requires_grad_(bool(MIXING.search(name)))
        slices = torch.arange(batch) if volume else None
        noise = unet(new(*p.unet.shape), torch.zeros(batch, dtype=torch.int64), None, slices)
        image = vae.decode(vae.encode(new(p.vae.in_channels, *p.vae.size)).mean)
    if training:
        (noise.float().square().mean() + image.float().square().mean()).backward()


def _run_losses(p: Preset, batch: int) -> None:
    """What the objective of training may be, on predictions in float16 and on images in their place."""
    latent, image = p.unet.shape, (p.vae.in_channels, *p.vae.size)
    for shape, layout, grad in product((latent, image), LAYOUTS, (False, True)):
        pred = torch.empty(batch, *shape, dtype=torch.float16, device="meta").to(memory_format=layout)
        pred.requires_grad_(grad)
        target = torch.empty(batch, *shape, device="meta")
        frequency_loss(pred, target, low_weight=1.0, high_weight=0.5)
        for norm in ("ortho", "backward"):
            spectral_mse(pred, target, norm=norm)


def _run_noise(p: Preset, batch: int) -> None:
    """Noise, noised pairs, and the step that `ddim_step` makes alone."""
    shape = (batch, *p.unet.shape)
    philox_normal(shape, 0, device="meta")
    z, alphas = torch.empty(shape, dtype=torch.float16, device="meta"), torch.empty(1000, 2, device="meta")
    t = torch.empty(batch, dtype=torch.int64, device="meta")
    for kind in PREDICTION_TYPES:
        for eta in (0.0, 1.0):
            ddim_step(z, z, alphas[1, 0], alphas[1, 1], eta=eta, noise=z, prediction_type=kind)
    for kind in (*PREDICTION_TYPES, "flow_prediction"):
        for cutmix_prob in (0.0, 0.25):
            diffuse(z, t, alphas[:, 0].contiguous(), 0, prediction_type=kind, cutmix_prob=cutmix_prob)


def solver_uses(batch: int) -> Iterator[tuple[int, bool, bool, bool, bool]]:
    """How the sampler uses `solver_step`: steps of history, guidance, noise, stopping, channels_last.

    Every use without history; with it none or one of guidance, noise and stopping, or all. Of batches other than 2,
    which differ in how Triton specializes the batch, guidance alone.
    """
    for history, *uses in product(range(4), *[(False, True)] * 4):
        guided, noisy, stopping, _ = uses
        if batch != 2 and (noisy or stopping):
            continue
        if not history or sum((guided, noisy, stopping)) != 2:
            yield history, *uses  # type: ignore[misc]  # four of them


def _run_solver(p: Preset, batch: int, steps: int) -> None:
    """`solver_step` in each of `solver_uses`."""
    shape = (batch, *p.unet.shape)

    def new(wanted: bool, *size: int, dtype: torch.dtype = torch.float32) -> Any:
        return torch.empty(size, dtype=dtype, device="meta") if wanted else None

    for history, guided, noisy, stopping, channels_last in solver_uses(batch):
        output = new(True, batch * (1 + guided), *shape[1:], dtype=torch.float16)
        solver_step(
            new(True, *shape),
            output.to(memory_format=LAYOUTS[channels_last]),
            new(True, steps, 6 + 2 * history),
            new(True, 2, dtype=torch.int32),
            guidance_scale=new(guided, batch),
            history=new(history > 0, history, 2, *shape),
            seeds=new(noisy, batch, 2, dtype=torch.int64),
            frozen=new(stopping, batch, dtype=torch.bool),
            x0=new(stopping, *shape),
            statistics=new(stopping, batch, 2),
        )


def record_presets() -> Iterator[Call]:
    """The calls of our ops that sampling and training make with each preset of GATED.

    Triton makes another kernel where a size is 1 or a multiple of 16, so batches are 1, 2 and 16, and steps 50 and 16;
    models run in batches of 1 and 2, so that of the kernels that sum over a batch those of 16 are not among them.
    """
    for name in GATED:
        p = PRESETS[name]
        modes = ((False, False), (True, False), (True, True))  # sampling, validation and training
        for batch, layout, (mixed, training) in product((1, 2), LAYOUTS, modes):
            for volume in (False, True)[: 1 + (batch > 1 and p.unet.slice_mixing)]:
                yield from record(partial(_run_models, p, batch, layout, mixed, training, volume))
        yield from record_step(2, preset_name=name)[0]
        yield from record_step(2, preset_name=name, volume=True)[0] if p.unet.slice_mixing else ()
        for batch in (1, 2, 16):
            yield from record(partial(_run_losses, p, batch))
            with torch.no_grad():
                yield from record(partial(_run_noise, p, batch))
                yield from record(partial(_run_solver, p, batch, 50))
                yield from record(partial(_run_solver, p, batch, 16)) if batch != 2 else ()


def launches() -> str:
    """kernels/launches.json: a line for each call, the op and its arguments in the order of its schema."""
    ours = (call for call in record_presets() if call.operator.namespace == "sbldm_fast")
    lines = {json.dumps([call.operator._opname, *map(describe, call.args)]) for call in ours}
    return "[\n" + ",\n".join(sorted(lines)) + "\n]\n"


def describe(value: Any) -> Any:
    """An argument as JSON; a tensor as `dtype[shape]`, with strides where it is not contiguous and with an offset.

    Of the offset only its remainder by ALIGNED is kept: that is all that Triton looks at.
    """
    if isinstance(value, torch.dtype):
        return str(value)
    if not isinstance(value, Tensor):
        return value
    name = str(value.dtype).removeprefix("torch.")
    strides = "" if value.is_contiguous() else f" strides {_sizes(value.stride())}"
    offset = value.storage_offset() % ALIGNED
    return f"{name}{_sizes(value.shape)}{strides}{f' offset {offset}' if offset else ''}"


def _sizes(sizes: Sequence[int]) -> str:
    return f"[{','.join(map(str, sizes))}]"


if __name__ == "__main__":
    print(launches(), end="")
