"""What a sampler was made from, against what its caller has since: weights, buffers, modules, schedulers."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sbldm_fast import (
    AutoencoderKL,
    DDPMScheduler,
    FastSampler,
    Pipeline,
    SchedulerConfig,
    SolverTable,
    UNet2D,
    UNetConfig,
)
from sbldm_fast.sampling import loop

from ..small import SHAPE, UNET, VAE, make, relative, scheduler, small_pipeline
from .changes import CHANGES, Small, adapter, assigned, buffers, fused_adamw, loaded, new_data, through_data
from .test_content import bits


@pytest.fixture
def unet() -> UNet2D:
    torch.manual_seed(1)
    return UNet2D(UNET).eval()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("arguments", [{}, {"dtype": torch.bfloat16}, {"fuse": True}], ids=["eager", "half", "fuse"])
def test_a_sampler_runs_the_weights_that_its_model_has_now(
    unet: UNet2D, change: Any, arguments: dict[str, Any]
) -> None:
    model: nn.Module = Small() if "fuse" in arguments else unet
    sampler = make(model, **arguments)
    before = sampler(2)
    change(model)
    after = sampler(2)
    assert relative(after, before) > 1e-3
    assert torch.equal(after, make(model, **arguments)(2))


def test_buffers_that_are_in_no_state_dict_are_seen_too() -> None:
    model = UNet2D(UNetConfig(**{**vars(UNET), "time_embedding_type": "fourier"})).eval()
    sampler = make(model)
    before = sampler(2)
    buffers(model)
    assert relative(sampler(2), before) > 1e-3
    assert torch.equal(sampler(2), make(model)(2))


@pytest.mark.parametrize("arguments", [{}, {"dtype": torch.bfloat16}, {"fuse": True}], ids=["eager", "half", "fuse"])
def test_an_adapter_that_is_put_in_and_its_scale_are_seen(arguments: dict[str, Any]) -> None:
    model = Small()
    sampler = make(model, **arguments)
    outs = [sampler(2)]
    adapter(model)
    outs.append(sampler(2))
    model.conv.scaling["default"] = 5.0  # type: ignore[union-attr]
    outs.append(sampler(2))
    assert relative(outs[1], outs[0]) > 1e-3
    assert relative(outs[2], outs[1]) > 1e-3
    assert torch.equal(outs[2], make(model, **arguments)(2))


def test_a_compiled_step_is_compiled_again_for_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def record(function: Any, model: nn.Module, *_: Any) -> Any:
        made.append(bits(model))
        frozen = copy.deepcopy(model)  # as a package has them
        return lambda x, row, tensors, cond: frozen_call(function, model, frozen, (x, row, tensors, cond)), False

    def frozen_call(function: Any, model: nn.Module, frozen: nn.Module, arguments: Any) -> Tensor:
        model.load_state_dict(frozen.state_dict())
        out: Tensor = function(*arguments)
        return out

    monkeypatch.setattr(loop, "compile_ahead", record)
    model = Small()
    sampler = make(model, mode="compile")
    sampler(2)
    sampler(2)
    assert len(made) == 1
    for change in CHANGES[:4]:
        change(model)
        assert relative(sampler(2), make(model)(2)) < 1e-6
    assert len(set(made)) == 5


@pytest.mark.parametrize("arguments", [{}, {"dtype": torch.bfloat16}, {"fuse": True}], ids=["eager", "half", "fuse"])
def test_hooks_private_numbers_loose_tensors_and_configurations_are_seen(arguments: dict[str, Any]) -> None:
    class Odd(Small):
        def __init__(self) -> None:
            super().__init__()
            self._scale, self.loose, self.cfg = 1.0, torch.tensor(1.0), type("Config", (), {})()
            self.cfg.power = 1.0

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(x, t) * self._scale * self.loose.to(x.dtype) * self.cfg.power

    torch.manual_seed(0)
    model = Odd()
    sampler = make(model, **arguments)
    changes = (
        lambda: setattr(model, "_scale", 2.0),
        lambda: model.loose.mul_(2),
        lambda: setattr(model.cfg, "power", 0.3),
        lambda: model.conv.register_forward_hook(lambda module, given, out: out * 1.5),
    )
    for change in changes:
        before = sampler(2)
        change()
        after = sampler(2)
        assert relative(after, before) > 1e-3
        assert torch.equal(after, make(model, **arguments)(2))


def test_hooks_of_our_own_model_are_seen(unet: UNet2D) -> None:
    sampler = make(unet)
    before = sampler(2)
    unet.conv_in.register_forward_hook(lambda module, given, out: 0 * out)
    assert relative(sampler(2), before) > 1e-3


@pytest.mark.parametrize("arguments", [{}, {"dtype": torch.bfloat16}], ids=["float32", "half"])
def test_a_graph_goes_on_after_changes_in_place_and_is_recorded_anew_after_others(
    unet: UNet2D, recorded: Any, arguments: dict[str, Any]
) -> None:
    graphed = recorded(unet, **arguments)
    graphed(2)
    for change in (fused_adamw, through_data, loaded):
        change(unet)
        assert relative(graphed(2), make(unet, **arguments)(2)) < 1e-5
        assert graphed.stats()["captures"] == 1, "what was recorded reads the new numbers"
    held = {t.data_ptr() for t in next(iter(graphed._loops.values())).held}
    for i, change in enumerate((new_data, assigned), 2):
        change(unet)
        assert relative(graphed(2), make(unet, **arguments)(2)) < 1e-5
        assert graphed.stats()["captures"] == i
    assert held != {t.data_ptr() for t in next(iter(graphed._loops.values())).held}


def test_a_graph_of_the_loop_is_recorded_anew_when_the_decoder_is_another(unet: UNet2D, recorded: Any) -> None:
    pipe = Pipeline(AutoencoderKL(VAE).eval(), unet, SchedulerConfig(beta_schedule="cosine_ramp", clip_sample=False))
    graphed = recorded(unet, decode=pipe.decode)
    graphed(2)
    through_data(pipe.vae)
    graphed(2)
    assert graphed.stats()["captures"] == 1
    torch.manual_seed(7)
    pipe.vae = AutoencoderKL(VAE).eval()
    assert relative(graphed(2), make(unet, decode=pipe.decode)(2)) < 1e-5
    assert graphed.stats()["captures"] == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("arguments", [{}, {"dtype": torch.float16}], ids=["float32", "half"])
def test_cuda_graphs_run_the_weights_that_their_model_has_now(
    unet: UNet2D, change: Any, arguments: dict[str, Any]
) -> None:
    unet.cuda()
    graphed = make(unet, mode="loop-graph", **arguments)
    before = graphed(2)
    change(unet)
    after = graphed(2)
    assert relative(after, before) > 1e-3
    assert relative(after, make(unet, **arguments)(2)) < (1e-2 if arguments else 1e-4)


def test_a_model_that_trains_goes_on_training() -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.drop = nn.Conv2d(4, 4, 1), nn.Dropout(0.5)
            self.drop.eval()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            assert not self.training
            return self.drop(self.conv(x))

    model = Drops()
    make(model)(2)
    assert [m.training for m in model.modules()] == [True, True, False]
    model.conv = nn.Conv2d(4, 5, 1)
    with pytest.raises(ValueError, match="model: got an output"):
        make(model)(1)
    assert [m.training for m in model.modules()] == [True, True, False], "also after a failure"


def test_a_caller_who_drops_a_model_keeps_no_second_copy() -> None:
    model = UNet2D(UNET).eval()
    sampler = make(model, dtype=torch.bfloat16)
    first, dropped = sampler(2), weakref.ref(model)
    del model
    gc.collect()
    assert dropped() is None, "the sampler holds nothing but its copy in half precision"
    assert torch.equal(sampler(2), first)


def test_a_scheduler_that_is_changed_is_read_again(unet: UNet2D) -> None:
    sched = scheduler()
    sampler = FastSampler(unet, sched, shape=SHAPE, steps=3, mode="eager")
    before, table = sampler(2), sampler.table
    sched.set_timesteps(7)  # a run of the caller's own is no change
    assert torch.equal(sampler(2), before)
    assert sampler.table is table
    assert sampler.steps == 3
    sched.alphas_cumprod = sched.alphas_cumprod * 0.9
    after = sampler(2)
    assert relative(after, before) > 1e-3
    assert torch.equal(after, FastSampler(unet, sched, shape=SHAPE, steps=3, mode="eager")(2))
    stopping = FastSampler(unet, sched, shape=SHAPE, steps=3, mode="eager", stop="x0_delta")
    sched.alphas_cumprod = None
    for _ in range(2):  # what cannot be read is refused each time, and not answered with what was read before
        with pytest.raises(ValueError, match="mode, stop: got"), pytest.warns(UserWarning, match="its step 0 failed"):
            stopping(2)
    rows = table.rows.clone()
    given = FastSampler(unet, SolverTable(**{**vars(table), "rows": rows}), shape=SHAPE, mode="eager")
    assert torch.equal(given(2), before)
    rows[:, 4:6] *= 1.1
    assert relative(given(2), before) > 1e-3


def test_a_diffusers_scheduler_that_is_configured_anew_is_read_again(unet: UNet2D) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers brings this scheduler")
    sched = diffusers.DPMSolverMultistepScheduler(timestep_spacing="trailing")
    sampler = FastSampler(unet, sched, shape=SHAPE, steps=4, mode="eager")
    before = sampler(2)
    sched.register_to_config(prediction_type="sample")
    after = sampler(2)
    assert relative(after, before) > 1e-3
    assert torch.equal(after, FastSampler(unet, sched, shape=SHAPE, steps=4, mode="eager")(2))


def test_a_pipeline_samples_with_the_parts_that_it_has_now() -> None:
    torch.manual_seed(2)
    pipe = small_pipeline()

    def fresh() -> Tensor:
        other = Pipeline(pipe.vae, pipe.unet, SchedulerConfig(beta_schedule="cosine_ramp", clip_sample=False))
        other.scheduler = pipe.scheduler
        return other.sample(2, steps=3)

    seen = [pipe.sample(2, steps=3)]
    for change in (
        lambda: fused_adamw(pipe.unet),
        lambda: fused_adamw(pipe.unet),
        lambda: through_data(pipe.vae),
        lambda: setattr(pipe, "scheduler", scheduler(prediction_type="v_prediction")),
        lambda: setattr(pipe.scheduler, "alphas_cumprod", pipe.scheduler.alphas_cumprod * 0.8),
        lambda: setattr(pipe, "unet", UNet2D(UNET)),
    ):
        change()
        seen.append(pipe.sample(2, steps=3))
        assert torch.equal(seen[-1], fresh())
        assert relative(seen[-1], seen[-2]) > 1e-4
    names = [pipe.sample(2, steps=3, scheduler="ddim")]
    pipe.scheduler = scheduler(beta_schedule="linear")
    assert relative(pipe.sample(2, steps=3, scheduler="ddim"), names[0]) > 1e-3, (
        "a name is a scheduler on the pipeline's schedule"
    )


def test_training_and_sampling_may_take_turns(tmp_path: Any) -> None:
    """The library's own optimiser is a fused one, which leaves no trace in PyTorch's version counters."""
    from sbldm_fast.training import TrainConfig
    from sbldm_fast.training.step import Step

    torch.manual_seed(2)
    pipe = small_pipeline()
    z = torch.randn(4, *SHAPE)
    step = Step(
        pipe.unet,
        lambda m, index, number: ((m(z[index], 10) - z[index]).square().mean(), {}),
        TrainConfig(9, 4, 5e-2, amp="off"),
    )
    for number in range(3):
        before = pipe.sample(2, steps=3)
        step(number, torch.arange(4))
        after = pipe.sample(2, steps=3)
        assert relative(after, before) > 1e-3
        assert torch.equal(after, Pipeline(pipe.vae, pipe.unet, pipe.scheduler.config).sample(2, steps=3))


def test_a_latents_run_decodes_as_its_sampler_does(unet: UNet2D) -> None:
    sampler, z = make(unet, decode=torch.tanh), torch.ones(1, *SHAPE)
    sampler.from_latents(z, 0.7)
    sampler.decode = lambda v: 0 * v
    assert not sampler.from_latents(z, 0.7).any()
    sampler.scheduler = DDPMScheduler()
    with pytest.raises(ValueError, match="scheduler: got one with noise in its steps"):
        sampler.interpolate((1, 2), 3)


def test_a_table_that_is_refused_is_refused_again(unet: UNet2D) -> None:
    table = SolverTable.from_scheduler(scheduler(), 3)
    sampler = FastSampler(unet, table, shape=SHAPE, mode="eager", stop="x0_delta")
    sampler(1)
    table.rows[:, :2] = torch.nan
    for _ in range(2):
        with pytest.raises(ValueError, match="this scheduler does not tell what x0 is"):
            sampler(1)


def test_a_model_that_counts_its_calls_is_recorded_once(recorded: Any) -> None:
    class Counts(Small):
        calls = 0

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            self.calls = self.calls + 1 if not replaying else self.calls
            return super().forward(x, t)

    replaying: list[int] = []
    graphed = recorded(Counts())
    graphed(2)
    replaying.append(1)  # a replay runs no Python
    graphed(2)
    graphed(2)
    assert graphed.stats()["captures"] == 1
