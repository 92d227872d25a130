"""A pipeline, its samplers and its folder."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch

from sbldm_fast import DDIMScheduler, Pipeline, RFlowScheduler, SchedulerConfig, UniPCMultistepScheduler
from sbldm_fast.files import read_json, write_json
from sbldm_fast.sampling.sampler import MAX_LOOPS

from ..small import relative, scheduler, small_pipeline


@pytest.fixture
def pipeline() -> Pipeline:
    torch.manual_seed(2)
    return small_pipeline()


def test_a_pipeline_notices_new_weights_and_shares_the_old(pipeline: Pipeline) -> None:
    before = pipeline.sample(1, steps=2)
    shared = {p.data_ptr() for p in pipeline.unet.parameters()}
    own = [p for p in pipeline.sampler(2).source.network.model.parameters() if p.data_ptr() not in shared]
    assert len(own) == 1, "the transposed convolution alone"
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(2)
    assert relative(pipeline.sample(1, steps=2), before) > 1e-3
    for steps in range(1, 9):
        pipeline.sample(1, steps=steps)
    assert len(pipeline._samplers) == MAX_LOOPS


def test_solvers_by_name_start_at_the_last_timestep_and_more_steps_are_nearer(pipeline: Pipeline) -> None:
    pytest.importorskip("diffusers", reason="diffusers does the arithmetic of dpm")
    wanted = pipeline.sampler(500, scheduler="ddim")(4)
    for name in ("dpm", "unipc"):
        errors = []
        for steps in (10, 20, 50, 100):
            sampler = pipeline.sampler(steps, scheduler=name)
            assert sampler.timesteps[0] == 999
            errors.append(relative(sampler(4), wanted))
        assert errors == sorted(errors, reverse=True), name
    assert pipeline.sampler(10, scheduler="ddim").timesteps[0] == 900, "DDIM is that of the paper"


def test_a_copy_of_a_pipeline_or_a_sampler_is_its_own(pipeline: Pipeline) -> None:
    before = pipeline.sample(1, steps=2)
    other = copy.deepcopy(pipeline)
    with torch.no_grad():
        other.unet.conv_out.weight.mul_(2)
    assert torch.equal(pipeline.sample(1, steps=2), before)
    assert relative(other.sample(1, steps=2), before) > 1e-3
    sampler = pipeline.sampler(2)
    again = copy.deepcopy(sampler)
    assert torch.equal(again(1), sampler(1))
    assert again._turn is not sampler._turn


def test_a_pipelines_own_scheduler_may_be_any(pipeline: Pipeline) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers brings this scheduler")
    own = pipeline.sample(2, steps=4)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config.to_dict() | {"beta_schedule": "linear"}
    )
    euler = pipeline.sample(2, steps=4)
    assert relative(euler, own) > 1e-3
    assert torch.equal(euler, pipeline.sample(2, steps=4, scheduler=pipeline.scheduler))


def test_pipeline_survives_its_folder(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.save(tmp_path / "p")
    assert sorted(str(p.relative_to(tmp_path / "p")) for p in (tmp_path / "p").rglob("*") if p.is_file()) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    again = Pipeline.from_pretrained(tmp_path / "p")
    images = pipeline.sample(3, seed=1, steps=3)
    assert images.shape == (3, 1, 16, 16)
    assert images.abs().max() <= 1
    assert torch.equal(again.sample(3, seed=1, steps=3), images)
    assert relative(again.sample(3, seed=1, steps=3, batch_size=2), images) < 1e-5


@pytest.mark.parametrize("name", ["vae/mine.txt", "unet/diffusion_pytorch_model.safetensors", "model_index.json"])
def test_a_pipeline_is_saved_over_nothing_but_a_pipeline(name: str, pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "p" / name).parent.mkdir(parents=True)
    (tmp_path / "p" / name).write_text('{"_class_name": "DDPMPipeline"}')
    with pytest.raises(ValueError, match="which would be lost; allowed is a new folder or one that save wrote"):
        pipeline.save(tmp_path / "p")
    assert (tmp_path / "p" / name).read_text() == '{"_class_name": "DDPMPipeline"}'
    pipeline.save(tmp_path / "q")
    pipeline.save(tmp_path / "q")
    (tmp_path / "q" / "vae" / "mine.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds vae/mine\.txt, which would be lost"):
        pipeline.save(tmp_path / "q")


def test_scheduler_file_is_diffusers(pipeline: Pipeline, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers reads the file that this test writes")
    pipeline.scheduler = scheduler(beta_schedule="scaled_linear")
    pipeline.save(tmp_path / "p")
    theirs = diffusers.DDIMScheduler.from_pretrained(tmp_path / "p" / "scheduler")
    assert torch.equal(theirs.alphas_cumprod, pipeline.scheduler.alphas_cumprod)


def test_bundled_weights_make_images() -> None:
    images = Pipeline.from_pretrained("demo").sample(2, seed=0, steps=10)
    assert images.shape == (2, 1, 128, 128)
    corners = images[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.max() < -0.8, "air around the head is dark"
    assert images[:, 0, 48:80, 48:80].mean() > -0.7, "there is a head in the middle"


def test_bad_pipelines_are_named(pipeline: Pipeline, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "model.pt")
    for call, message in (
        (
            lambda: Pipeline.from_pretrained(tmp_path / "nothing"),
            "is not a pipeline folder: it has no model_index.json",
        ),
        (lambda: Pipeline.from_pretrained(tmp_path / "model.pt"), "no pickle is ever read"),
        (lambda: pipeline.sample(0), "n: got 0, allowed is 1 or more"),
        (lambda: pipeline.sample(1, batch_size=0), "batch_size: got 0, allowed is 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_default_is_unipc_by_twelve_calls(pipeline: Pipeline, tmp_path: Path) -> None:
    sampler = pipeline.sampler()
    assert type(sampler.scheduler).__name__ == "UniPCMultistepScheduler"
    assert (sampler.steps, sampler.timesteps[0], sampler.table.history) == (12, 999, 3)
    before = pipeline.sampler(scheduler="ddim")
    assert (before.steps, before.timesteps[0], before.timesteps[-1]) == (50, 980, 0), "the paper's, one option away"
    assert pipeline.default_steps("dpm") == pipeline.default_steps(before.scheduler) == 50
    pipeline.save(tmp_path / "p")
    assert Pipeline.from_pretrained(tmp_path / "p").sampler().timesteps == sampler.timesteps
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.save(tmp_path / "p")
    again = Pipeline.from_pretrained(tmp_path / "p")
    assert type(again.scheduler) is DDIMScheduler, "the folder says what its solver is"
    assert (again.scheduler_name, Pipeline.from_pretrained("demo").scheduler_name) == ("ddim", "unipc")
    assert again.sampler(10).timesteps[0] == again.sampler(10, scheduler="ddim").timesteps[0] == 999
    before, again.scheduler = again.sampler(scheduler="ddim"), DDIMScheduler.from_config(again.scheduler.config)
    assert again.sampler(scheduler="ddim") is before, "the same solver"
    again.scheduler = UniPCMultistepScheduler.from_config(again.scheduler.config)
    assert again.sampler(scheduler="ddim").timesteps[0] == 980, "a kept sampler is of the solver that is asked for"
    again.scheduler = RFlowScheduler()
    with pytest.raises(ValueError, match="scheduler: got RFlowScheduler, allowed to be saved are ours: DDIM"):
        again.save(tmp_path / "p")
    clips = Pipeline(again.vae, again.unet, SchedulerConfig())
    assert (type(clips.scheduler), clips.default_steps()) == (DDIMScheduler, 50), "UniPC would not clip"
    config = read_json(tmp_path / "p" / "scheduler" / "scheduler_config.json")
    write_json(tmp_path / "p" / "scheduler" / "scheduler_config.json", config | {"_class_name": "PNDMScheduler"})
    assert Pipeline.from_pretrained(tmp_path / "p").default_steps() == 12, "of another class the noise schedule is read"


def test_the_bundled_student_is_nearer_than_unipc_by_as_many_calls(tmp_path: Path) -> None:
    """To what its teacher converges to, from the same seeds."""
    teacher, student = Pipeline.from_pretrained("demo"), Pipeline.from_pretrained("demo-student")
    n = student.default_steps()
    assert n == student.unet.config.distilled_steps == 4
    assert student.latent_shape == teacher.latent_shape
    for cond in (None, {"age": [30, 60] * 4, "modality": "T1", "position": [-20, 0, 20, 40] * 2}):
        wanted = teacher.sample(8, steps=50, cond=cond)
        errors = [(pipe.sample(8, steps=n, cond=cond) - wanted).square().mean().sqrt() for pipe in (student, teacher)]
        assert errors[0] < errors[1]
    with pytest.raises(ValueError, match="steps: got 5 model calls, allowed for this network is 4, which it was dist"):
        student.sample(1, steps=5)
    leading = DDIMScheduler.from_config(teacher.scheduler.config, timestep_spacing="leading")
    for other in ({"scheduler": "unipc"}, {"scheduler": "ddpm"}, {"eta": 1.0}, {"scheduler": leading}):
        with pytest.raises(ValueError, match="allowed for this network is DDIM without noise on trailing"):
            student.sample(1, steps=4, **other)
    student.save(tmp_path / "p")
    assert torch.equal(Pipeline.from_pretrained(tmp_path / "p").sample(1), student.sample(1))
    shutil.rmtree(tmp_path / "p" / "vae")
    with pytest.raises(ValueError, match="vae"):
        Pipeline.from_pretrained(tmp_path / "p")
