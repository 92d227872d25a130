"""What the five graphs compute, as modules from named tensors to named tensors, and where they keep float32.

    unet         prediction of a latent at a timestep
    step         one solver step: x' = a_0 x + b_0 m + d x0 + s z + sum_k (a_k x_-k + b_k m_-k)
                 with x0 = clip(c_x x + c_m m)
    sampler      all steps in one loop, then the decoder if there is one
    vae_encoder  image to the mean and logarithmic variance of its scaled latent
    vae_decoder  scaled latent to image

Inputs and outputs are float32 in every graph; float16 begins and ends inside. Norms, softmax and the last stage of the
autoencoder stay in float32: float16 overflows in the first two (65,504) and leaves steps in the third.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from sbldm_fast.kernels import GroupNormSiLU
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sbldm_fast.diffusion.table import SolverTable
from sbldm_fast.models import AutoencoderKL, UNet2D
from sbldm_fast.models.layers import Chain
from sbldm_fast.sampling.model import TensorDict, mend_half, predictor, replace_upsampling

Tensors = dict[str, Tensor]
NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase, GroupNormSiLU)
_ATTENTION = F.scaled_dot_product_attention
_NORMALIZATIONS = ("batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm", "softmax")
_WIDE = (Tensor.softmax, *(getattr(module, name) for module in (F, torch) for name in _NORMALIZATIONS))


class Float32Islands(TorchFunctionMode):
    """Norms and softmax in float32 whatever comes in; attention written out, so that of it the softmax alone is
    widened."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is _ATTENTION:
            return _attention(*args, **kwargs)
        if function is F.multi_head_attention_forward:  # what it calls inside does not come here
            with mock.patch.multiple(F, scaled_dot_product_attention=_attention, softmax=_softmax):
                return function(*args, **kwargs)
        if function in _WIDE and (dtype := (args[0] if args else kwargs["input"]).dtype) == torch.float16:
            wide = [v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for v in args]
            named = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}
            return function(*wide, **named).to(dtype)
        return function(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` without dropout, its softmax in float32."""
    if enable_gqa:
        key, value = (v.repeat_interleave(query.shape[-3] // v.shape[-3], dim=-3) for v in (key, value))
    weights = ((query * (scale or query.shape[-1] ** -0.5)) @ key.transpose(-1, -2)).float()
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        weights = weights.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else weights + attn_mask
    return torch.softmax(weights, dim=-1).to(query.dtype) @ value


def _softmax(x: Tensor, dim: int) -> Tensor:
    return torch.softmax(x.float(), dim=dim).to(x.dtype)


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in `dtype` whose norms keep float32 weights."""
    model = nn.Module.to(copy.deepcopy(model).float().eval(), dtype)  # not diffusers' own, which warns
    for module in model.modules():
        if isinstance(module, NORMS):
            module.float()
    return mend_half(model, dtype)


class Solver(NamedTuple):
    """What of a `SolverTable` is structure, built into a graph; its numbers are inputs."""

    steps: int
    history: int
    stochastic: bool
    scaled: bool
    predicts_x0: bool
    clip_range: float | None

    @classmethod
    def of(cls, table: SolverTable) -> Solver:
        """The structure of a table."""
        d = bool((table.rows[:, 2] != 0).any())
        return cls(
            len(table.timesteps),
            table.history,
            table.stochastic,
            bool((table.input_scale != 1).any()),
            d,
            table.clip_range,
        )


def table_inputs(table: SolverTable) -> Tensors:
    """The numbers of a table as the graphs take them: timesteps `[S]`, table `[S, 6 + 2 K]`, input_scale `[S]` if it is
    not 1.

    What a table does not know (NaN) is 0 here, and multiplied by 0 there.
    """
    times = table.timesteps.float() if table.timesteps.is_floating_point() else table.timesteps
    scale = {"input_scale": table.input_scale.float()} if Solver.of(table).scaled else {}
    return {"timesteps": times, "table": table.rows.nan_to_num(0.0).float(), **scale}


class UNetGraph(nn.Module):
    """`x [N, C, h, w]` or `[N, C, d, h, w]`, `t [N]` and any conditioning to the model's prediction."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.model = cast_weights(replace_upsampling(model) if isinstance(model, UNet2D) else model, dtype)
        self.predict = predictor(self.model, each=True)

    def forward(self, given: Tensors) -> Tensors:
        with Float32Islands():
            cond = self.condition(inputs_named(given, "cond"))
            return {"prediction": self.at(given["x"], self.row(given["t"]), cond)}

    def condition(self, cond: TensorDict) -> TensorDict:
        """What `at` takes of a conditioning, the same at every step: of a `UNet2D` what its covariates become."""
        return self.model.condition(cond) if isinstance(self.model, UNet2D) and cond else cond

    def row(self, t: Tensor) -> Tensor:
        """What `at` takes for timesteps `[N]`: all scales and shifts of a `UNet2D`, else the timesteps."""
        return self.model.time_rows(t) if isinstance(self.model, UNet2D) else t

    def at(self, x: Tensor, row: Tensor, cond: TensorDict) -> Tensor:
        """The prediction in float32."""
        return self.predict(
            x.to(self.dtype), row, {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in cond.items()}
        ).float()


def input_name(prefix: str, key: str) -> str:
    """The name of an input: `cond`, or `cond_NAME` of a conditioning that the model knows by name."""
    return f"{prefix}_{key}" if key else prefix


def inputs_named(given: Tensors, prefix: str) -> TensorDict:
    """The inputs of a prefix, by the names that the model knows."""
    return {
        k.removeprefix(prefix).removeprefix("_"): v
        for k, v in given.items()
        if k == prefix or k.startswith(f"{prefix}_")
    }


def is_condition(name: str) -> bool:
    """Whether an input is conditioning, of either pass."""
    return any(name == prefix or name.startswith(f"{prefix}_") for prefix in ("cond", "uncond"))


class StepGraph(nn.Module):
    """One step: x, its history and the step's number `index [1]` to those of the next step. Shapes are fixed, nothing
    branches."""

    def __init__(self, unet: UNetGraph, solver: Solver) -> None:
        super().__init__()
        self.unet, self.solver = unet, solver

    def forward(self, given: Tensors) -> Tensors:
        with Float32Islands():
            row = given["row"] if "row" in given else self.unet.row(given["timesteps"].index_select(0, given["index"]))
            x, history = self._advance(given["x"], given.get("history"), given["index"], row, given)
        out = {"x_next": x, "index_next": given["index"] + 1}
        return out if history is None else out | {"history_next": history}

    def _advance(
        self, x: Tensor, history: Tensor | None, index: Tensor, row: Tensor, given: Tensors
    ) -> tuple[Tensor, Tensor | None]:
        """The next x and history `[K, 2, N, ...]`, the newest pair of x and m first."""
        solver = self.solver
        c_x, c_m, d, s, *pairs = given["table"].index_select(0, index)[0].split(1)
        h = x * given["input_scale"].index_select(0, index) if solver.scaled else x
        m = self._guided(h, row, given)
        y = pairs[0] * x + pairs[1] * m
        if solver.predicts_x0:
            x0 = c_x * x + c_m * m
            y = y + d * (x0 if solver.clip_range is None else x0.clamp(-solver.clip_range, solver.clip_range))
        if solver.stochastic:
            y = y + s * given["noise"].index_select(0, index)[0]
        if history is not None:
            for k in range(solver.history):
                y = y + pairs[2 * k + 2] * history[k, 0] + pairs[2 * k + 3] * history[k, 1]
            history = torch.cat([torch.stack([x, m])[None], history[:-1]])
        return y, history

    def prepare(self, given: Tensors) -> TensorDict:
        """What a condition becomes before the first step; under guidance the unconditional half comes first."""
        cond, uncond = inputs_named(given, "cond"), inputs_named(given, "uncond")
        return self.unet.condition({k: torch.cat([uncond[k], v]) for k, v in cond.items()} if uncond else cond)

    def _guided(self, h: Tensor, row: Tensor, given: Tensors) -> Tensor:
        cond = inputs_named(given, "prepared") or self.prepare(given)
        if "guidance_scale" not in given:
            return self.unet.at(h, row, cond)
        both = self.unet.at(torch.cat([h, h]), row, cond)
        # chunk becomes a sequence that onnxscript cannot fold in a loop
        m_u, m_c = both[: h.shape[0]], both[h.shape[0] :]
        return m_u + given["guidance_scale"].reshape(-1, *[1] * (h.dim() - 1)) * (m_c - m_u)


class SamplerGraph(nn.Module):
    """Noise to image: the step in one loop over the rows of the table that comes in, the time of all steps computed
    before it.

    `traced` is the step as torch.export made it from `given` and the row of one step: what it traces, Dynamo need not
    understand again.
    """

    def __init__(self, step: StepGraph, traced: nn.Module, decoder: DecoderGraph | None) -> None:
        super().__init__()
        self.unet, self.solver, self.traced, self.decoder = step.unet, step.solver, traced, decoder
        self.prepare = step.prepare

    def forward(self, given: Tensors) -> Tensors:
        x, steps, K = given["x"], given["timesteps"].shape[0], self.solver.history
        with Float32Islands():
            rows = self.unet.row(given["timesteps"])
            prepared = {input_name("prepared", k): v for k, v in self.prepare(given).items()}
        others = prepared | {k: v for k, v in given.items() if k not in ("x", "timesteps") and not is_condition(k)}

        def more(i: Tensor, *_: Tensor) -> Tensor:
            return (i < steps)[0]

        def body(i: Tensor, x: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
            state = {"x": x, "index": i, "row": rows.index_select(0, i), **({"history": past[0]} if past else {})}
            after = self.traced(state | others)
            return (after["index_next"], after["x_next"], *([after["history_next"]] if past else []))

        past = (x.new_zeros(K, 2, *x.shape),) if K else ()
        x = torch.while_loop(more, body, (torch.zeros(1, dtype=torch.int64), x, *past))[1]
        return {"latent": x} if self.decoder is None else self.decoder({"z": x})


class EncoderGraph(nn.Module):
    """`image [N, 1, S, S]` in [-1, 1] to `mean` and `logvar` of its scaled latent."""

    def __init__(self, vae: AutoencoderKL, dtype: torch.dtype) -> None:
        super().__init__()
        layers, self.dtype, self.scaling_factor = list(vae.encoder), dtype, vae.config.scaling_factor
        self.first, self.last = (
            cast_weights(Chain(*layers[:-2]), dtype),
            cast_weights(Chain(*layers[-2:]), torch.float32),
        )

    def forward(self, given: Tensors) -> Tensors:
        with Float32Islands():
            mean, logvar = self.last(self.first(given["image"].to(self.dtype)).float()).chunk(2, dim=1)
        shift = 2 * torch.tensor(self.scaling_factor, dtype=torch.float64).log().item()
        return {"mean": mean * self.scaling_factor, "logvar": logvar.clamp(-30.0, 20.0) + shift}


class DecoderGraph(nn.Module):
    """Scaled latents `z [N, C, h, w]` to images in [-1, 1]."""

    def __init__(self, vae: AutoencoderKL, dtype: torch.dtype) -> None:
        super().__init__()
        layers, self.dtype, self.scaling_factor = list(vae.decoder), dtype, vae.config.scaling_factor
        cut = 1 + max((i for i, layer in enumerate(layers) if isinstance(layer, nn.ConvTranspose2d)), default=-1)
        self.first, self.last = (
            cast_weights(Chain(*layers[:cut]), dtype),
            cast_weights(Chain(*layers[cut:]), torch.float32),
        )

    def forward(self, given: Tensors) -> Tensors:
        with Float32Islands():
            return {"image": self.last(self.first((given["z"] / self.scaling_factor).to(self.dtype)).float()).tanh()}


@contextmanager
def _hooks(modules: Iterable[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    """Forward hooks that are gone after the block."""
    handles = [module.register_forward_hook(hook) for module, hook in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def count_norms(module: nn.Module, given: Tensors) -> int:
    """How many group norms a run of a module computes."""
    found: list[nn.Module] = []

    def hook(norm: nn.Module, *_: Any) -> None:
        found.append(norm)

    with _hooks((m, hook) for m in module.modules() if isinstance(m, nn.GroupNorm | GroupNormSiLU)):
        module(given)
    return len(found)


def find_not_finite(module: nn.Module, call: Callable[[], Any]) -> str:
    """The name of the first submodule whose output is NaN or infinite in a run, or ''."""
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            tensors = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)]
            if not all(t.isfinite().all() for t in tensors):
                found.append(name)

        return hook

    with _hooks((m, look(name)) for name, m in module.named_modules() if name and not list(m.children())):
        call()
    return found[0] if found else ""
