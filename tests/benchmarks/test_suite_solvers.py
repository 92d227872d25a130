"""Steps against error: more steps are nearer, and the front is the front."""

from __future__ import annotations

import pytest
import torch
from sbldm_fast.benchmarks import suite_solvers as module
from sbldm_fast.benchmarks.schema import fault_of
from sbldm_fast.benchmarks.suite_solvers import bench_solvers
from sbldm_fast.benchmarks.table import few_table, pareto, solvers_table

from sbldm_fast import Pipeline


def test_more_steps_are_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONVERGED", 10)
    monkeypatch.setattr(module, "PEER_STEPS", 10)
    kept = {name: module.SOLVERS[name] for name in ("ddim", "unipc Karras")}
    monkeypatch.setattr(module, "SOLVERS", kept)
    monkeypatch.setattr(module, "STOPS", {"x0_delta": (0.05,), "eps_norm": (1e-9,)})
    monkeypatch.setattr(module, "TOLERANCES", (1.0, 0.1))
    monkeypatch.setattr(module, "Runtime", lambda dtype, runtime="": module.Diffusers(dtype))
    rows = {r["provider"]: r for r in bench_solvers(batch=1, steps=(3, 10), rounds=1, judged=2)}
    judged = {name: r for name, r in rows.items() if "rms" in r}
    assert rows.keys() - judged.keys() == {"diffusers"}, "a loop with weights of its own has no difference"
    assert judged["ddim 10"]["rms"] < 1e-6, "the converged images themselves"
    for solver in ("ddim", "unipc Karras"):
        assert judged[f"{solver} 10"]["rms"] < judged[f"{solver} 3"]["rms"]
    assert judged["adaptive 0.1"]["rms"] < judged["adaptive 1.0"]["rms"]
    assert judged["adaptive 0.1"]["calls"] > judged["adaptive 1.0"]["calls"] > 3
    assert judged["student 4"]["calls"] == 4
    assert judged["ddim 10, x0_delta 0.05"]["calls"] < 10 == judged["ddim 10, eps_norm 1e-09"]["calls"]
    assert all(r["median_s"] > 0 for r in rows.values())
    renamed = [r | {"provider": {"ddim 10": "ddim 50"}.get(name, name)} for name, r in rows.items()]
    few = few_table(renamed).markdown().splitlines()
    assert [line.split(" | ")[0] for line in few[2:5]] == ["| diffusers", "| ddim 50", "| student 4"]
    assert few[2].endswith("| 1.0 |"), "the quickest peer, which the others are held against"
    assert few[2].split(" | ")[2:4] == ["as ddim 50"] * 2, "its solver's error, not one of its own"
    with pytest.raises(ValueError, match="few: got rows without ddim 50"):
        few_table(list(rows.values()))
    text = solvers_table(list(rows.values())).markdown()
    assert f"| ddim 3 | 3 | {rows['ddim 3']['rms']:.4f} | {rows['ddim 3']['rms_unasked']:.4f} |" in text
    assert not [why for r in rows.values() if (why := fault_of(r))]


def test_an_adaptive_solver_ends_in_the_answer_of_a_model_that_has_one() -> None:
    """Whatever its steps are, alpha x0 + sigma e stays that, and the last call gives x0."""
    pipe = Pipeline.from_pretrained("demo")
    a = pipe.scheduler.alphas_cumprod
    x0 = torch.randn(2, *pipe.latent_shape)

    def says(x: torch.Tensor, t: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        low = t.long()
        of = torch.lerp((a / (1 - a)).log()[low], (a / (1 - a)).log()[(low + 1).clamp(max=999)], t - low)
        alpha, sigma = torch.sigmoid(of).sqrt(), torch.sigmoid(-of).sqrt()
        return (alpha[:, None, None, None] * x - x0[: len(x)]) / sigma[:, None, None, None]

    pipe.unet.forward = says  # type: ignore[method-assign,assignment]
    pipe.decode = lambda z: z  # type: ignore[method-assign]
    run, calls = module._adaptive(pipe, 0.1)
    torch.testing.assert_close(run(2, seed=0, cond=None), x0, rtol=1e-3, atol=1e-3)
    assert calls() < 12, "no error, so the longest steps that are allowed"


def test_the_front_by_hand() -> None:
    points = {"a": (1, 3), "b": (2, 2), "c": (3, 2), "d": (2, 5), "e": (4, 1)}
    assert pareto([{"provider": k, "median_s": s, "rms": e} for k, (s, e) in points.items()]) == {"a", "b", "e"}


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="batch, steps, rounds, judged: got 0"):
        next(bench_solvers(batch=0))
