"""The benchmark of volumes: MONAI's loop and ours have one latent, and the problem is the published one."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from sbldm_fast.benchmarks import suite_volumes as module
from sbldm_fast.benchmarks.schema import fault_of
from sbldm_fast.benchmarks.suite_volumes import BUNDLE, LATENT, MONAI, bench_volumes
from sbldm_fast.benchmarks.table import TABLES

QUICK: dict[str, Any] = {"steps": (2,), "rounds": 1, "compiled": False, "small": True, "preset_name": "monai-brain"}


def test_every_loop_has_monais_latent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "obstacle", lambda _: None)  # norms by the reference, which is all that a CPU has
    monkeypatch.setattr(module, "native_half", lambda _: torch.bfloat16)
    rows = {r["provider"]: r for r in bench_volumes(**QUICK)}
    under = "under FastSampler eager"
    assert rows.keys() == {
        f"{name}{how}"
        for half in ("", " bfloat16")
        for name, how in (
            (f"{MONAI}{half}", ""),
            (f"MONAI{half} {under}", ""),
            (f"MONAI{half} {under}", " fused norms"),
        )
    }
    for row in rows.values():
        assert row["parity"]["ok"], row
        assert row["parity"]["against"] == MONAI
        assert row["speedup"]["over"] == MONAI
        assert (row["preset"], row["shape"], row["steps"]) == ("monai-brain-small", [1, 3, 8, 8, 4], 2)
        assert row["ms_per_image"] == pytest.approx(1e3 * row["median_s"])
        assert not fault_of(row)
    assert rows[f"MONAI {under}"]["parity"]["error"] < 1e-5
    assert rows[MONAI]["family"] == "peer"
    assert rows[f"MONAI {under}"]["family"] == "drop-in"
    assert f"| MONAI {under} |" in TABLES["volumes"](list(rows.values())).markdown()


def test_another_latent_has_no_speed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.Planes, "forward", lambda self, x, timesteps, context: 0.1 * x)
    right = module.FastSampler.__call__
    monkeypatch.setattr(module.FastSampler, "__call__", lambda *given, **named: 1.01 * right(*given, **named))
    rows = {r["provider"]: r for r in bench_volumes(**QUICK, dtypes=("float32",))}
    assert rows[MONAI]["speedup"]["factor"] == 1
    assert not rows["MONAI under FastSampler eager"]["parity"]["ok"]
    assert rows["MONAI under FastSampler eager"]["speedup"] is None


def test_the_network_is_as_large_as_the_published_one() -> None:
    """553 million parameters; the latent goes twice to its half."""
    nets = importlib.import_module("monai.networks.nets")
    with torch.device("meta"):
        unet = nets.DiffusionModelUNet(**BUNDLE)
    assert sum(p.numel() for p in unet.parameters()) == 553_168_899
    assert LATENT == (3, 160 // 8, 224 // 8, 160 // 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 0}, r"steps, rounds: got \[2\], 0, allowed is 1 or more"),
        ({"dtypes": ("int8",)}, "dtypes: got int8, allowed are float32"),
        ({"preset_name": "paper"}, "preset: got 'paper', allowed are monai-brain, demo-80, brain-160"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(bench_volumes(**QUICK | arguments))


@pytest.mark.parametrize(("name", "shape"), [("demo-80", [4, 8, 16, 16]), ("brain-160", [4, 8, 28, 20])])
def test_slices_of_ours_mix_and_are_decoded(name: str, shape: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "native_half", lambda _: torch.bfloat16)
    rows = {r["provider"]: r for r in bench_volumes(**QUICK | {"preset_name": name})}
    mixed, alone = "slices mixed eager", "slices each for itself eager"
    assert rows.keys() == {mixed, alone, f"{mixed} bfloat16", f"{alone} bfloat16", "decoding, once"}
    for row in rows.values():
        assert not fault_of(row)
        assert (row["preset"], row["shape"]) == (f"{name}-small", shape)
    assert rows[f"{mixed} bfloat16"]["parity"]["ok"]
    assert rows[alone].get("speedup") is None
    assert [name for name, row in rows.items() if row["decodes"]] == ["decoding, once"]
    assert rows["decoding, once"]["ms_per_step"] == pytest.approx(1e3 * rows["decoding, once"]["median_s"])
