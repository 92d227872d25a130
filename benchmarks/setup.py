"""What is sampled: noise, steps, and each library's UNet of one size with its DDIM scheduler on the same betas."""

from __future__ import annotations

import importlib
import tempfile
import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from sbldm_fast.kernels import philox_normal
from torch import Tensor, nn

from sbldm_fast import AutoencoderKL, DDIMScheduler, UNet2D, preset


class SamplingSetup:
    """What is sampled: noise, steps, and each library's UNet of the preset's widths with its DDIM scheduler on the
    preset's betas."""

    def __init__(self, preset_name: str, steps: int, batch: int, device: torch.device) -> None:
        self.preset, self.steps, self.device = preset(preset_name), steps, device
        c = self.preset.unet
        self.noise = philox_normal((batch, *c.shape), 0, device=device)
        self.attends: list[bool] = [c.attends(level) for level in range(len(c.block_out_channels))]

    @cached_property
    def ours(self) -> tuple[UNet2D, DDIMScheduler]:
        """Our reference UNet and scheduler."""
        torch.manual_seed(0)
        return UNet2D(self.preset.unet).to(self.device).eval(), DDIMScheduler.from_config(self.preset.scheduler)

    @cached_property
    def decode(self) -> Callable[[Tensor], Tensor]:
        """Latents to images by our autoencoder, in float32 as in a `Pipeline`."""
        torch.manual_seed(0)
        vae = AutoencoderKL(self.preset.vae).to(self.device).eval()
        return lambda z: vae.decode(z / vae.config.scaling_factor)

    @cached_property
    def diffusers(self) -> tuple[nn.Module, Any]:
        """diffusers' UNet2DModel and DDIMScheduler."""
        import diffusers

        c, own = self.preset.unet, DDIMScheduler.from_config(self.preset.scheduler)
        torch.manual_seed(0)
        model = diffusers.UNet2DModel(
            sample_size=c.sample_size,
            in_channels=c.in_channels,
            out_channels=c.out_channels,
            layers_per_block=c.layers_per_block,
            block_out_channels=c.block_out_channels,
            norm_num_groups=c.norm_num_groups,
            attention_head_dim=c.attention_head_dim,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in self.attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(self.attends)),
        )
        config = {"clip_sample": own.config.clip_sample, "prediction_type": own.config.prediction_type}
        return model.to(self.device).eval(), diffusers.DDIMScheduler(trained_betas=own.betas.numpy(), **config)

    @cached_property
    def monai(self) -> tuple[nn.Module, Any]:
        """MONAI's DiffusionModelUNet and DDIMScheduler."""
        networks, schedulers = (importlib.import_module(f"monai.networks.{name}") for name in ("nets", "schedulers"))
        c, own = self.preset.unet, DDIMScheduler.from_config(self.preset.scheduler)
        torch.manual_seed(0)
        model = networks.DiffusionModelUNet(
            spatial_dims=2,
            in_channels=c.in_channels,
            out_channels=c.out_channels,
            channels=c.block_out_channels,
            num_res_blocks=c.layers_per_block,
            attention_levels=self.attends,
            norm_num_groups=c.norm_num_groups,
            num_head_channels=[c.attention_head_dim] * len(self.attends),
        )
        # it begins with zeros in its last layers, and would predict zero whatever it computes
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        scheduler = schedulers.DDIMScheduler(
            prediction_type=own.config.prediction_type, clip_sample=own.config.clip_sample
        )
        scheduler.alphas_cumprod = own.alphas_cumprod.clone()  # it has no argument for betas of one's own
        scheduler.final_alpha_cumprod = torch.tensor(1.0)
        return model.to(self.device).eval(), scheduler

    def parameters(self) -> dict[str, int]:
        """Of the networks that were made: that they are of one size can be seen in the rows."""
        made = {name: self.__dict__[name][0] for name in ("ours", "diffusers", "monai") if name in self.__dict__}
        return {name: sum(p.numel() for p in model.parameters()) for name, model in made.items()}

    @cached_property
    def folder(self) -> tempfile.TemporaryDirectory[str]:
        """Where graphs are written, as long as the problem is kept."""
        return tempfile.TemporaryDirectory()

    @cached_property
    def onnx(self) -> str:
        """diffusers' UNet as an ONNX file."""
        path = f"{self.folder.name}/unet.onnx"
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter's notices are not about the model
            t = torch.full((len(self.noise),), 1, device=self.device)
            names: dict[str, Any] = {"input_names": ["x", "t"], "output_names": ["m"]}
            program = torch.onnx.export(self.diffusers[0], (self.noise, t), dynamo=True, verbose=False, **names)
            assert program is not None  # the exporter gives None only for dynamo=False
            program.save(path)
        return path


def textbook_loop(model: Callable[[Tensor, Tensor], Tensor], scheduler: Any, steps: int, noise: Tensor) -> Tensor:
    """The textbook loop: the model, then `scheduler.step`, for each timestep. diffusers' objects and MONAI's."""
    scheduler.set_timesteps(steps, device=noise.device)
    x: Tensor = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    scale = getattr(scheduler, "scale_model_input", lambda x, _: x)
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = scheduler.step(model(scale(x, t), t), t, x)
            x = out[0] if isinstance(out, tuple) else out.prev_sample
    return x
