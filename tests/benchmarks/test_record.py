"""What the models launch: recorded on meta tensors, and committed for the kernels that are compiled from it."""

from __future__ import annotations

import pytest
import torch
from sbldm_fast.benchmarks.record import GATED, Call, describe, launches, record
from sbldm_fast.kernels._specializations import LAUNCHES, Launch, _argument
from sbldm_fast.kernels._specializations import launches as read_launches

from sbldm_fast import Pipeline, kernels
from sbldm_fast.models import AutoencoderKL, UNet2D
from sbldm_fast.models.layers import GroupNormSiLU
from sbldm_fast.models.presets import PRESETS
from sbldm_fast.sampling.loop import make_buffers


def test_what_is_committed_is_what_the_models_launch() -> None:
    """`python -m sbldm_fast.benchmarks.record > kernels/launches.json` mends it."""
    assert LAUNCHES.read_text() == launches()


def test_every_norm_of_every_preset_is_recorded() -> None:
    """Hooks see the norms that the models call; each is among the recorded calls."""
    wanted = set()

    def note(module: torch.nn.Module, args: tuple[torch.Tensor, ...], given: dict[str, object]) -> None:
        assert isinstance(module, GroupNormSiLU)
        terms = given.get("conv_bias") is not None, given.get("residual") is not None
        wanted.add((tuple(args[0].shape[1:]), module.num_groups, module.activation == "silu", *terms))

    for p in (PRESETS[name] for name in GATED):
        unet, vae = UNet2D(p.unet).eval().to("meta"), AutoencoderKL(p.vae).eval().to("meta")
        for m in (*unet.modules(), *vae.modules()):
            if isinstance(m, GroupNormSiLU):
                m.register_forward_pre_hook(note, with_kwargs=True)
        with torch.no_grad(), torch.device("meta"):
            unet(torch.empty(2, *p.unet.shape), torch.zeros(2).long())
            vae.decode(vae.encode(torch.empty(2, p.vae.in_channels, *p.vae.size)).mean)
    norms = [launch.arguments for launch in read_launches(torch.float16) if launch.op == "group_norm_silu"]
    found = {(tuple(a[0].shape[1:]), a[3], a[9], a[1] is not None, a[2] is not None) for a in norms}
    assert len(wanted) > 30
    assert wanted <= found


def test_every_op_is_recorded() -> None:
    ops = {name for name in vars(kernels) if name[0] != "_" and hasattr(torch.ops.sbldm_fast, name)}
    assert {launch.op for launch in read_launches(torch.float16)} == ops
    assert len(ops) == 9


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    p = PRESETS["demo"]
    return Pipeline(AutoencoderKL(p.vae), UNet2D(p.unet), p.scheduler)


@pytest.fixture(scope="module")
def steps() -> list[Launch]:
    return [launch for launch in read_launches(torch.float16) if launch.op == "solver_step"]


@pytest.mark.parametrize("n", [1, 2, 16])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", ["ddim", "dpm", "unipc"])
@pytest.mark.parametrize("last", [False, True])
def test_what_the_sampler_gives_a_step_is_recorded(
    n: int, guided: bool, name: str, last: bool, pipeline: Pipeline, steps: list[Launch]
) -> None:
    """The shapes of a loop's buffers, in float32 and, with the channels side by side, in half precision."""
    pytest.importorskip("diffusers")
    sampler = pipeline.sampler(50, "eager", scheduler=name)
    buffers = make_buffers(sampler.plan, n, guided)
    shape = (n, *sampler.shape)
    for launch in steps:
        x, m, table, counter, guidance, history, seeds, frozen, x0, statistics, clip_range = launch.arguments
        given = (guidance, history, seeds, frozen, x0, statistics)
        wanted = (getattr(buffers, key) for key in ("guidance", "history", "seeds", "frozen", "x0", "statistics"))
        if (
            (x.shape, table.shape) == (shape, sampler.plan.solver_rows.shape)
            and m.shape[0] == n * (1 + guided)
            and m.is_contiguous() != last
            and counter.shape == buffers.counter.shape
            and [None if t is None else t.shape for t in given] == [None if t is None else t.shape for t in wanted]
            and clip_range is None
        ):
            return
    raise AssertionError("no such call is recorded")


def test_a_call_is_kept_with_its_result() -> None:
    x = torch.empty(2, 3, device="meta")
    (call,) = record(lambda: x.exp())
    assert isinstance(call, Call)
    assert call.operator is torch.ops.aten.exp.default
    assert call.args[0] is x
    assert call.out.shape == (2, 3)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.empty(2, 3, device="meta", dtype=torch.float16), "float16[2,3]"),
        (
            torch.empty(2, 3, 4, 4, device="meta").contiguous(memory_format=torch.channels_last),
            "float32[2,3,4,4] strides [48,1,12,3]",
        ),
        (torch.empty(64, device="meta")[3], "float32[] offset 3"),
        (torch.empty(64, device="meta")[32:34], "float32[2]"),
        (torch.float16, "torch.float16"),
        ("epsilon", "epsilon"),
        (None, None),
        (2.5, 2.5),
    ],
)
def test_an_argument_as_text_and_back(value: object, text: object) -> None:
    assert describe(value) == text
    again = _argument(text)
    if isinstance(value, torch.Tensor):
        assert isinstance(again, torch.Tensor)
        assert (again.dtype, again.shape, again.stride()) == (value.dtype, value.shape, value.stride())
        assert again.storage_offset() == value.storage_offset() % 16
    else:
        assert again == value


def test_float16_stands_for_the_dtype_of_a_model() -> None:
    (half,) = {launch.arguments[0].dtype for launch in read_launches(torch.bfloat16) if launch.op == "ddim_step"}
    assert half == torch.bfloat16
    assert (
        Launch("ddim_step", read_launches(torch.float16)[0].arguments).name == "1x4x32x32 noise prediction_type=epsilon"
    )
