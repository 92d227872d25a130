"""One optimizer step that never waits for the device.

The loss, the gradient's norm and the first step that was not finite stay on the device until they are read. On CUDA the
whole step is one graph; with deterministic convolutions and plain attention it equals the step without a graph to the
bit (a test, run on an H200). All randomness of a step is a function of the seed and of the step's number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sbldm_fast.errors import NotFinite

from .config import TrainConfig, amp_dtype
from .ranks import Ranks

LossOf = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


class Step:
    """One step of the optimizer, and what it leaves on the device: the sum of the losses since they were read, the
    gradient's norm, the first step that was not finite.

    Args:
        model: what is trained, in place.
        loss_of: `loss_of(model, index, step)` gives the loss of this process's part of the items `index` and scalars to
            log; `step` is an int64 tensor `[1]` on the device.
        config: how it is trained.
        ranks: the processes that train together.
    """

    def __init__(self, model: nn.Module, loss_of: LossOf, config: TrainConfig, ranks: Ranks | None = None) -> None:
        self.model, self.loss_of, self.config, self.ranks = model, loss_of, config, ranks or Ranks()
        self.index: Tensor | None = None  # the items, always in the same memory
        self.device = next(self.model.parameters()).device
        self.dtype = amp_dtype(self.config.amp, self.device)
        if self.device.type == "cpu" or self.dtype:  # cuDNN's float32 convolutions want the pixels side by side
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval() if self.config.ema_decay else None
        on_cuda = self.device.type == "cuda"
        parameters = list(self.model.parameters())
        lr = torch.zeros((), device=self.device)  # a tensor: a captured step reads what the loop wrote
        self.optimizer = torch.optim.AdamW(
            parameters, lr=lr, weight_decay=self.config.weight_decay, fused=True, capturable=on_cuda
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.number = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.first_bad = torch.full((1,), -1, dtype=torch.int64, device=self.device)
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.norm = torch.zeros((), device=self.device)
        self.pull = torch.zeros((), device=self.device)  # of the EMA towards the weights
        self.scalars: dict[str, Tensor] = {}
        self.run = self._in_a_graph() if on_cuda and self.ranks.size == 1 else self._work
        self.forward: nn.Module = self.model
        if self.ranks.size > 1:
            self.forward = nn.parallel.DistributedDataParallel(self.model)
        if self.config.compile:
            self.forward.compile()

    def __call__(self, step: int, index: Tensor) -> None:
        """Train on the items `index` of the whole batch."""
        torch.manual_seed(self.config.seed * 1_000_003 + step)
        self.number.fill_(step)
        self.optimizer.param_groups[0]["lr"].fill_(self.config.lr_at(step))
        # a young average forgets faster, so that a short run is not an average with its random start
        self.pull.fill_(1 - min(self.config.ema_decay, (1 + step) / (10 + step)) if step else 1.0)
        self.index = index.clone() if self.index is None else self.index.copy_(index)
        self.run()

    def _work(self) -> None:
        autocast: AbstractContextManager[Any] = (
            torch.autocast(self.device.type, self.dtype, cache_enabled=self.device.type == "cpu")
            if self.dtype
            else nullcontext()
        )
        assert self.index is not None
        self.optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss, scalars = self.loss_of(self.forward, self.index, self.number)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        self.norm.copy_(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            averaged, current = ([p.detach() for p in m.parameters()] for m in (self.ema, self.model))
            if self.device.type == "cpu":
                torch._foreach_lerp_(averaged, current, float(self.pull))
            else:  # what a captured step reads must be a tensor, and that lerp takes none
                difference = torch._foreach_sub(current, averaged)
                torch._foreach_mul_(difference, self.pull)
                torch._foreach_add_(averaged, difference)
        loss = loss.detach()
        self.loss += loss
        # a gradient that is not finite ruins the weights, except where the scaler leaves the step out
        good = loss.isfinite() if self.scaler.is_enabled() else loss.isfinite() & self.norm.isfinite()
        self.first_bad.copy_(torch.where((self.first_bad < 0) & ~good, self.number, self.first_bad))
        self.scalars = {name: value.detach() for name, value in scalars.items()}

    def _in_a_graph(self) -> Callable[[], None]:
        """The step as one CUDA graph, after three that warm up on a stream of their own, as capturing wants it."""
        graph, side, done = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device), 0

        def run() -> None:
            nonlocal done
            with torch.cuda.device(self.device):
                if done < 3:
                    side.wait_stream(torch.cuda.current_stream())
                    with torch.cuda.stream(side):
                        self._work()
                    torch.cuda.current_stream().wait_stream(side)
                else:
                    if done == 3:
                        with torch.cuda.graph(graph):  # records, does not run
                            self._work()
                    graph.replay()
            done += 1

        return run

    def read(self, steps: int) -> dict[str, float]:
        """The mean loss of the last `steps` steps and the last norm, waiting for the device; starts the next mean.

        Raises:
            FloatingPointError: a loss or gradient was not finite; its argument is the number of the first such step.
        """
        if self.ranks.any(self.is_bad):
            first = torch.where(self.first_bad < 0, 2**62, self.first_bad)
            if self.ranks.size > 1:
                dist.all_reduce(first, dist.ReduceOp.MIN)
            raise NotFinite(int(first))
        loss = self.total / steps
        self.loss.zero_()
        row = {"loss": loss, "grad_norm": float(self.norm)} | {
            k: float(self.ranks.mean(v.clone())) for k, v in self.scalars.items()
        }
        return row | ({"loss_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {})

    @property
    def is_bad(self) -> bool:
        """Whether a step was not finite; waits for the device."""
        return bool(self.first_bad >= 0)

    @property
    def total(self) -> float:
        """The sum of the losses since the last look."""
        return float(self.ranks.mean(self.loss.clone()))

    @property
    def trained(self) -> nn.Module:
        """The model to keep: the EMA if there is one."""
        return self.model if self.ema is None else self.ema
