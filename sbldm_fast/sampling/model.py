"""A model made ready for the loop: one way to call every kind, and the surgery that is exact algebra."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from sbldm_fast.kernels import group_norm_silu
from sbldm_fast.kernels._arguments import CHANNELS_LAST
from sbldm_fast.models import UNet2D
from sbldm_fast.models.covariates import MAPS
from sbldm_fast.models.layers import Attention, ResBlock, Upsample, added_by_norms, attend_in_three, is_bare_conv
from sbldm_fast.models.slices import SLICE

from ..errors import UserError

Cond = Tensor | Mapping[str, Any] | None  # what a caller gives
# what the loop handles, by name; "" is a tensor that came without a name, "a/b" one inside another mapping
TensorDict = dict[str, Tensor]
_EVALUATED = threading.Lock()
_USERS: WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = WeakKeyDictionary()
Predict = Callable[[Tensor, Tensor, TensorDict], Tensor]
LIST = "a list in cond"
COND_NAMES = ("encoder_hidden_states", "context", "class_labels", "cond")  # diffusers', MONAI's, both, ours


def tensors_by_name(cond: Cond, argument: str = "cond") -> TensorDict:
    """A conditioning as tensors by name: what lies deeper, as SDXL's `added_cond_kwargs` does, by `outer/inner`; None
    is left out.

    Raises:
        ValueError: something that is neither a tensor nor an array, nor a mapping of them, nor a list in a mapping.
    """
    if cond is None:
        return {}
    if isinstance(cond, Mapping):
        found: TensorDict = {}
        for key, value in cond.items():
            inside = argument not in ("cond", "uncond")  # where a tensor has a name, as one that comes alone has not
            if not isinstance(key, str) or (inside and not key) or "/" in key or (key[:1] == "#" and argument != LIST):
                raise UserError(f"{argument}: got the name {key!r}, allowed are names of arguments")
            inner: Any = value
            if isinstance(value, (list, tuple)):
                if any(v is None for v in value):
                    raise UserError(
                        f"{argument}[{key!r}]: got None in a list, allowed are tensors and arrays in each of its places"
                    )
                inner = {f"#{i}": v for i, v in enumerate(value)}
            what = LIST if inner is not value else f"{argument}[{key!r}]"
            found |= {f"{key}/{rest}" if rest else key: v for rest, v in tensors_by_name(inner, what).items()}
        return found
    tensor = torch.from_numpy(cond) if isinstance(cond, np.ndarray) else cond
    if not isinstance(tensor, Tensor) or not tensor.dim():
        got = "a number" if isinstance(tensor, Tensor) else type(cond).__name__
        raise UserError(
            f"{argument}: got {got}, allowed are tensors and arrays with a row for each sample, and mappings of them"
        )
    return {"": tensor}


def _nested(cond: TensorDict) -> dict[str, Any]:
    """What `tensors_by_name` took apart, a list as a tuple."""
    out: dict[str, Any] = {}
    for path, value in cond.items():
        *outer, last = path.split("/")
        at = out
        for key in outer:
            at = at.setdefault(key, {})
        at[last] = value
    return {k: _listed(v) for k, v in out.items()}


def _listed(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    inner = {k: _listed(v) for k, v in value.items()}
    return (
        tuple(inner[k] for k in sorted(inner, key=lambda k: int(k[1:]))) if all(k[0] == "#" for k in inner) else inner
    )


def ours(model: object) -> TypeGuard[UNet2D]:
    """Whether a model is a `UNet2D` whose forward pass nobody has changed: then its rows of time are made before the
    loop."""
    if not isinstance(model, UNet2D) or type(model).forward is not UNet2D.forward or "forward" in vars(model):
        return False
    return not _hooked(model)


def read_cond(model: Any, cond: Cond, n: int, *, extrapolate: bool = False, argument: str = "cond") -> TensorDict:
    """A conditioning of n samples as tensors: for a `UNet2D` its covariates by name, checked, NaN where unknown; for
    others what was given.

    Raises:
        ValueError: as `UNet2D.read_condition` and `tensors_by_name`.
    """
    if reads_condition(model):
        read: TensorDict = model.read_condition(cond, n, extrapolate=extrapolate, argument=argument)
        return read
    return tensors_by_name(cond, argument)


def reads_condition(model: Any) -> bool:
    """Whether a model has covariates, as a `UNet2D` or an exported one: then what is left out is unknown, not 0."""
    return hasattr(model, "read_condition")


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def predictor(model: Callable[..., Any], each: bool = False) -> Predict:
    """`(x, row, cond) -> prediction` for any model; `row` is `[1, R]` of `UNet2D.time_rows` for ours, else the timestep
    `[1]`.

    What a model takes is read from its signature. The timestep comes as `[1]`, which goes with any batch, except that
    `timesteps` (MONAI) gets one per sample, as every model does with `each`, where `row` may also have a timestep per
    sample. `return_dict` (diffusers) is set to False. A conditioning without a name goes by the first of the names
    above, whole numbers by `class_labels` if there is such an argument, or else as the third argument.
    """
    if ours(model):
        return model.forward_rows
    if isinstance(model, UNet2D):  # with hooks, or a forward pass of somebody's own
        names = [c.name for c in model.config.covariates]

        def call(x: Tensor, row: Tensor, cond: TensorDict) -> Tensor:
            numbers = cond.get(SLICE)
            if MAPS in cond or not names:
                given = {
                    k: v if k in (MAPS, SLICE) else [None if n != n else n for n in v.tolist()] for k, v in cond.items()
                }
                out: Tensor = model(x, row, given or None)
            else:  # checked already, also what was extrapolated
                out = model(x, row, torch.stack([cond[k] for k in names], 1), numbers)
            return out

        return call
    try:
        takes: Mapping[str, Any] = inspect.signature(
            model.forward if isinstance(model, nn.Module) else model
        ).parameters
    except ValueError:  # a scripted model says nothing
        takes = {}
    name = next((n for n in COND_NAMES if n in takes), None)
    options = {"return_dict": False} if "return_dict" in takes else {}
    each = each or "timesteps" in takes

    def predict(x: Tensor, row: Tensor, cond: TensorDict) -> Tensor:
        t = row.expand(x.shape[0]) if each else row
        given = _nested(cond)
        unnamed = [given.pop("")] if "" in given else []
        if unnamed and name:
            known = "class_labels" if "class_labels" in takes and not unnamed[0].is_floating_point() else name
            given[known] = unnamed.pop()
        watched = not torch.compiler.is_compiling() and not x.is_inference()
        before = x._version if watched else 0
        out = model(x, t, *unnamed, **given, **options)
        if watched and x._version != before:
            raise UserError(
                "model: it writes into its input x, allowed is one that leaves x as it is: the step needs it"
            )
        prediction: Tensor = out if isinstance(out, Tensor) else out.sample if hasattr(out, "sample") else out[0]
        return prediction

    return predict


def prepare_model(model: Any, dtype: torch.dtype, device: torch.device, dims: int) -> tuple[Any, torch.memory_format]:
    """The model as the loop wants it, and the layout of its input: `model` itself, or a copy where something is to be
    changed."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    layout = torch.preserve_format
    if ours(model):
        model = replace_upsampling(model).eval()
        model = merge_biases(model) if added_by_norms(device) else model
    if parameter is not None and dtype != parameter.dtype:
        model, layout = to_half(model, dtype, dims)
        model.eval()
    return model, layout


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Inside, a module is in evaluation mode; what of it was training trains again when the last of those who evaluate
    it has left."""
    if not isinstance(model, nn.Module):
        yield
        return
    with _EVALUATED:
        users, training = _USERS.get(model, (0, []))
        training = training or [m for m in model.modules() if m.training]
        _USERS[model] = users + 1, training
        for m in training:
            m.training = False
    try:
        yield
    finally:
        with _EVALUATED:
            users, training = _USERS.pop(model)
            if users > 1:
                _USERS[model] = users - 1, training
            else:
                for m in training:
                    m.training = True


def replace_upsampling(model: UNet2D) -> UNet2D:
    """A copy in which each nearest-neighbour doubling with its 3x3 convolution is one 4x4 transposed convolution of
    stride 2.

    `K[r] = W[2 - r] + W[3 - r]` along each axis, W zero outside 0 ... 2: four phases of 2x2 taps, 2.25 times fewer
    multiplications.
    """
    # what does not change is shared, so that a copy per sampler costs nothing
    model = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Upsample) and not _hooked(child) and is_bare_conv(child.conv):
                setattr(parent, name, _transposed(child.conv))
    return model


def merge_biases(model: UNet2D) -> UNet2D:
    """Each shortcut's bias moved into that of the convolution that it is added to; in place, of a copy that shares what
    does not change."""
    for block in model.modules():
        if isinstance(block, ResBlock) and isinstance(block.skip, nn.Conv2d) and block.skip.bias is not None:
            assert block.conv2.bias is not None
            block.conv2.bias = nn.Parameter((block.conv2.bias + block.skip.bias).detach(), requires_grad=False)
            block.skip.bias = None
    return model


def _transposed(conv: nn.Conv2d) -> nn.ConvTranspose2d:
    W = conv.weight.detach()
    for axis in (2, 3):
        flipped = W.flip(axis)
        zero = torch.zeros_like(flipped.narrow(axis, 0, 1))
        W = torch.cat([flipped, zero], axis) + torch.cat([zero, flipped], axis)
    out = nn.ConvTranspose2d(
        conv.in_channels, conv.out_channels, 4, stride=2, padding=1, device=W.device, dtype=W.dtype
    )
    # parameters of their own: what is said of these must not reach the caller's
    bias = None if conv.bias is None else nn.Parameter(conv.bias.detach(), requires_grad=False)
    out.weight, out.bias = nn.Parameter(W.transpose(0, 1).contiguous(), requires_grad=False), bias
    return out


def to_half(model: nn.Module, dtype: torch.dtype, dims: int) -> tuple[nn.Module, torch.memory_format]:
    """A copy in half precision, and how samples of `dims` dimensions should lie.

    Convolutions in half precision want the channels side by side, on tensor cores as on AMX.
    """
    kind = {3: nn.Conv2d, 4: nn.Conv3d}.get(dims)
    found = kind is not None and any(isinstance(m, kind) for m in model.modules())
    half = mend_half(_channels_last(copy.deepcopy(model).to(dtype)), dtype)
    return half, CHANNELS_LAST[dims + 1] if found else torch.preserve_format


def mend_half(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """What a model lacks in `dtype` without autocast, in place, of a copy: MONAI's `upcast_attention` multiplies
    float32 weights with values, and PyTorch has no mean of volumes in half precision on a CPU."""

    def narrow(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return out.to(dtype)

    def widen(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.float() if x.device.type == "cpu" else x for x in given)

    for module in model.modules():
        dropout = getattr(module, "drop_weights", None)
        if getattr(module, "attention_dtype", None) is not None and isinstance(dropout, nn.Module):
            dropout.register_forward_hook(narrow)
        if isinstance(module, nn.AvgPool3d):
            module.register_forward_pre_hook(widen)
            module.register_forward_hook(narrow)
    return model


def for_cpu(model: nn.Module) -> nn.Module:
    """A copy as a CPU wants it: weights for oneDNN with the channels side by side, attention in three operators, as
    PyTorch's own is made for long sequences."""
    model = _channels_last(copy.deepcopy(model))
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = attend_in_three
    return model


def _channels_last(model: nn.Module) -> nn.Module:
    # not Module.to, which refuses a model that has weights of volumes among those of images
    for p in model.parameters():
        if p.dim() in CHANNELS_LAST:
            p.data = p.data.contiguous(memory_format=CHANNELS_LAST[p.dim()])
    return model


def fuse_norms(
    predict: Predict, model: Callable[..., Any], x: Tensor, row: Tensor, cond: TensorDict
) -> tuple[Predict, int]:
    """`predict` with every GroupNorm that only a SiLU reads replaced by `group_norm_silu`, and how many those were.

    Raises:
        ValueError: torch.export cannot trace the model; the message says why.
    """

    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model  # so that its weights stay shared parameters

        def forward(self, x: Tensor, row: Tensor, cond: TensorDict) -> Tensor:
            return predict(x, row, cond)

    try:
        graph = torch.export.export(Traced(), (x, row, cond), strict=False).module()
    except Exception as failure:  # whatever the tracer raises on a foreign model
        raise UserError(f"fuse: {type(model).__name__} cannot be traced by torch.export: {failure}") from failure
    found = 0
    for norm in list(graph.graph.nodes):
        readers = list(norm.users)
        if norm.target is not torch.ops.aten.group_norm.default or [r.target for r in readers] != [
            torch.ops.aten.silu.default
        ]:
            continue
        if not 3 <= norm.args[0].meta["val"].dim() <= 5:  # what the kernel takes
            continue
        found += 1
        with graph.graph.inserting_before(readers[0]):
            both = graph.graph.call_function(_norm_silu, norm.args[:5], norm.kwargs)
        readers[0].replace_all_uses_with(both)
        graph.graph.erase_node(readers[0])
        graph.graph.erase_node(norm)
    graph.recompile()
    return graph, found


def _norm_silu(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, **_: object
) -> Tensor:
    return group_norm_silu(x, num_groups, weight, bias, eps)
