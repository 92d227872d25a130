"""The commands that tell how good a pipeline is: evaluate, ablate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import Json, OutFolder, PipelineFolder, Prediction, Seed, Steps, place, say

Recovery = Annotated[int | None, typer.Option(min=4, help="Ask for this many brains and measure what comes, instead.")]
Guidance = Annotated[float | None, typer.Option(help="Of --recovery: how strongly the condition is followed.")]


def _recover(pipeline: Any, data: Path, out: Path, n: int, seed: int, guidance: float | None, as_json: bool) -> None:
    """Measure what a pipeline shows of what it is asked for, and print it beside how well that can be measured."""
    from sbldm_fast.evaluation.recovery import covariate_recovery

    report = covariate_recovery(pipeline, data, out, n=n, seed=seed, guidance_scale=guidance, progress=not as_json)
    if as_json:
        print(json.dumps(report))
        return
    inside, ceiling, after = report["inside"], report["ceiling"], report["ceiling_after_autoencoder"]
    print(f"{'asked for, then measured':26} {'figure':>8} {'95 % interval':>16} {'measurer':>9} {'after VAE':>10}")
    for name, figure, key in (
        ("ventricle", "r", "ventricle_r"),
        ("position", "r", "position_r"),
        ("modality", "right", "modality_accuracy"),
    ):
        low, high = inside[name]["interval"]
        print(f"{name:26} {inside[name][figure]:8.3f} {low:8.3f}{high:8.3f} {ceiling[key]:9.3f} {after[key]:10.3f}")
    for where in ("edge", "outside"):
        one = report[where]
        print(
            f"ventricles {where + ' of the range' if where == 'edge' else 'outside the range':20} mean error"
            f" {one['error_ml']:.2f} ml, bias {one['bias_ml']:+.2f} ml ({one['brains']} brains)"
        )
    leak, follow = report["age_swept"], report["ventricles_swept"]
    print(f"age held, ventricles swept   {follow['ml_a_unit']:.2f} ml measured a ml asked for (r {follow['r']:.3f})")
    print(f"ventricles held, age swept   {leak['ml_a_unit']:+.3f} ml measured a year asked for (r {leak['r']:.3f})")
    print(f"{n} brains of {report['slices_a_brain']} slices; {report['notice']}; see {out / 'ages.png'}")


Only = Annotated[
    list[str] | None, typer.Option(help="Make this part alone; again for more. The page has all that are there.")
]


def evaluate(
    pipeline: PipelineFolder,
    data: Annotated[Path, typer.Option(help="The folder that prepare wrote and train read.")],
    out: OutFolder,
    n: Annotated[int, typer.Option("-n", min=8, help="Samples, and unseen slices that they are compared with.")] = 200,
    seed: Seed = 0,
    steps: Steps = None,
    only: Only = None,
    extractor: Annotated[
        str, typer.Option(help="Features: efficientnet-lite0, vae, inception or package.module:name.")
    ] = "efficientnet-lite0",
    weights: Annotated[Path | None, typer.Option(help="The file of extractor inception.")] = None,
    log: Annotated[
        Path | None, typer.Option(help="Training log (default: that of the run that the pipeline is in).")
    ] = None,
    recovery: Recovery = None,
    guidance: Guidance = None,
    as_json: Json = False,
) -> None:
    """Measure samples beside unseen slices: numbers, figures, a page. Example: sbldm-fast evaluate demo --data data -o
    evaluation

    With --recovery whether they show what was asked: sbldm-fast evaluate demo --data data -o recovery --recovery 300
    """
    from sbldm_fast import Pipeline
    from sbldm_fast.evaluation.features import DEFAULT
    from sbldm_fast.evaluation.material import Settings
    from sbldm_fast.evaluation.report import evaluate_pipeline, render_markdown
    from sbldm_fast.sampling.pipeline import find_folder

    if recovery is not None:
        if only or weights or log or extractor != DEFAULT:
            raise typer.BadParameter(
                "got a value, allowed without --only, --extractor, --weights and --log", param_hint="--recovery"
            )
        _recover(Pipeline.from_pretrained(pipeline), data, out, recovery, seed, guidance, as_json)
        return
    if guidance is not None:
        raise typer.BadParameter("got a value, allowed with --recovery", param_hint="--guidance")
    beside = find_folder(pipeline).parent / "log.jsonl"
    log = log or (beside if beside.is_file() else None)
    files = [None if path is None else str(path) for path in (weights, log)]
    settings = Settings(n, seed, steps, extractor, *files)
    loaded = Pipeline.from_pretrained(pipeline)
    report = evaluate_pipeline(loaded, data, out, settings, only=only or (), progress=not as_json)
    if as_json:
        print(json.dumps(report))
        return
    print(render_markdown(report))
    print(f"{', '.join(report['parts'])}: see {out / 'evaluation.html'}")


Size = Annotated[int, typer.Option(min=16, help="Pixels a side: 128, 64 or 32.")]
Narrow = Annotated[int, typer.Option(min=1, help="Divide the widths of the preset's UNet by this.")]


def ablate(
    out: Annotated[Path, typer.Argument(callback=place, help="Folder of the rows and tables.")],
    data: Annotated[Path, typer.Option(help="A folder that prepare wrote.")],
    preset: Annotated[str, typer.Option(help="paper, template or demo.")] = "demo",
    table: Annotated[
        list[str] | None, typer.Option(help="4.4.1, 4.4.2, 4.4.3, 4.5 or B; again for more (default: all).")
    ] = None,
    seeds: Annotated[int, typer.Option(min=3, help="Runs of each setting.")] = 3,
    size: Size = 64,
    narrow: Narrow = 1,
    steps: Annotated[int, typer.Option(min=8, help="Of each UNet.")] = 2000,
    vae_steps: Annotated[int, typer.Option(min=1, help="Of each autoencoder.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=2, help="Slices or latents a step.")] = 32,
    n: Annotated[int, typer.Option("-n", min=8, help="Samples of each run, and unseen slices beside them.")] = 200,
    prediction_type: Annotated[Prediction, typer.Option(help="What the networks predict.")] = Prediction.v_prediction,
    as_json: Json = False,
) -> None:
    """Fill the tables of document 000: settings times seeds. Example: sbldm-fast ablate ablation --data data

    Cut off, the same command makes the missing runs.

    Seeds at a time: torchrun --nproc-per-node=3 -m sbldm_fast ablate ablation --data data
    """
    from sbldm_fast import preset as find
    from sbldm_fast.evaluation.ablation import ablate as run
    from sbldm_fast.evaluation.settings import TABLES, Budget
    from sbldm_fast.training import Stopped

    budget = Budget(size, narrow, vae_steps, steps, batch_size, n, prediction_type.value, preset)
    try:
        rows = run(find(preset), data, out, budget, tables=table or tuple(TABLES), seeds=seeds, progress=not as_json)
    except (Stopped, KeyboardInterrupt):
        say(f"sbldm-fast: interrupted; finished rows stay in {out}, the same command makes the rest")
        raise typer.Exit(130) from None
    text = (out / "tables.md").read_text()
    print(json.dumps({"out": str(out), "rows": len(rows)}) if as_json else text)
