"""An evaluation from a prepared folder to a page, gone on with where it was cut off."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sbldm_fast import AutoencoderKL, Pipeline, UNet2D, preset
from sbldm_fast.data import Slices, prepare
from sbldm_fast.data.dataset import read_manifest
from sbldm_fast.evaluation import parts
from sbldm_fast.evaluation.material import Material, Settings
from sbldm_fast.evaluation.report import evaluate_pipeline
from sbldm_fast.training.conditions import find_covariates

pytest.importorskip("skimage", reason="the extra eval is not installed")
SETTINGS = Settings(n=8, steps=3, extractor="vae")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "d"
    prepare(["synthetic:4"], folder, every=8, progress=False)
    return folder


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    rows: list[dict[str, Any]] = [{"stage": s, "step": i, "loss": 1 / i} for s in ("vae", "unet") for i in range(1, 20)]
    rows.append({"stage": "unet", "step": 19, "val": 0.25})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def made(data: Path, log: Path, fresh_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of random weights, all parts."""
    out = tmp_path_factory.mktemp("evaluation") / "e"
    pipeline = Pipeline.from_pretrained(fresh_demo)
    evaluate_pipeline(pipeline, data, out, replace(SETTINGS, log=str(log)), progress=False)
    return out


def test_all_parts_are_there_with_their_pictures(made: Path) -> None:
    report = json.loads((made / "evaluation.json").read_text())
    assert list(report["parts"]) == list(parts.PARTS) == list(parts.TITLES)
    for name, part in report["parts"].items():
        assert ("skipped" in part) == (name == "coherence"), name  # of a pipeline that knows no position
        for picture in part.get("pictures", ()):
            with Image.open((made / picture).with_suffix(".png")) as image:
                assert np.asarray(image.convert("L")).std() > 1, "a picture that shows something"
                assert "not for diagnosis" in image.info["Description"]


def test_the_page_holds_every_number_and_picture_and_asks_for_nothing(made: Path) -> None:
    page, report = (made / "evaluation.html").read_text(), json.loads((made / "evaluation.json").read_text())
    pictures = sum(len(part.get("pictures", ())) for part in report["parts"].values())
    assert page.count("<img ") == pictures == 11
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "synthetic, not for diagnosis" in page.lower()
    table = (made / "evaluation.md").read_text()
    for name, part in report["parts"].items():
        for key in part.get("figures", ()):
            assert f"| {name} | {key}" in table
            assert key.replace("_", " ") in page


def test_a_browser_shows_it_on_a_screen_and_on_a_phone(made: Path, browse: Callable[..., str], tmp_path: Path) -> None:
    page = made / "evaluation.html"
    shots = {}
    for name, flags in (("light", ()), ("dark", ("--force-dark-mode", "--blink-settings=preferredColorScheme=0"))):
        browse(page.as_uri(), f"--screenshot={tmp_path / name}.png", "--window-size=1000,500", *flags)
        with Image.open(tmp_path / f"{name}.png") as image:
            shots[name] = np.asarray(image.convert("L"), np.float32)
    assert shots["light"].mean() > 200 > 80 > shots["dark"].mean()
    frame = tmp_path / "frame.html"
    script = (
        "onload=()=>{let d=document.querySelector('iframe').contentDocument.documentElement,"
        " shown=[...d.querySelectorAll('img')].filter(i=>i.complete&&i.naturalWidth>0).length;"
        " document.title=[d.scrollWidth,d.clientWidth,shown]}"
    )
    frame.write_text(
        f'<iframe width="390" height="800" srcdoc="{html.escape(page.read_text())}"></iframe><script>{script}</script>'
    )
    title = re.search(r"<title>(\d+),(\d+),(\d+)</title>", browse(frame.as_uri(), "--dump-dom"))
    assert title is not None
    scroll, client, shown = map(int, title.groups())
    assert scroll <= client <= 390, "no page that has to be moved sideways"
    assert shown == 11, "every picture is drawn"


def test_numbers_are_those_of_the_formulas(made: Path, data: Path, fresh_demo: Path) -> None:
    found = json.loads((made / "evaluation.json").read_text())["parts"]
    material = Material(Pipeline.from_pretrained(fresh_demo), data, made, SETTINGS)
    error = (material.reconstructions - material.unseen).abs().mean()
    assert found["reconstruction"]["figures"]["l1"]["mean"] == pytest.approx(float(error), rel=1e-5)
    q = material.pipeline.vae.encode(material.unseen)
    kl = found["latents"]["figures"]["kl_nats_a_slice"]["mean"]
    assert kl == pytest.approx(float(q.kl().mean()), rel=1e-4)
    ratio = found["findings"]["figures"]
    for end in ("least", "most"):
        assert ratio[f"equation 4 over H W times the error, {end}"] == pytest.approx(1, abs=1e-5)
    assert found["curves"]["figures"] == {"unet: least validation loss": 0.25}


def test_unseen_slices_are_unseen(data: Path, fresh_demo: Path, tmp_path: Path) -> None:
    material = Material(Pipeline.from_pretrained(fresh_demo), data, tmp_path, SETTINGS)
    assert {row["split"] for row in material.unseen_rows} <= {"val", "test"}
    training = Slices(data)[torch.arange(len(Slices(data)))]
    apart = torch.cdist(material.unseen.flatten(1), training.flatten(1))
    assert float(apart.min()) > 0
    held = {row["sha256"]: row for row in material.unseen_rows}
    assert len(held) == len(material.unseen) == 8
    for row, image in zip(material.unseen_rows, material.unseen, strict=True):
        split = Slices(data, row["split"])
        place = [r["sha256"] for r in split.rows].index(row["sha256"])
        assert torch.equal(split[torch.tensor([place])][0], image)


def test_it_goes_on_where_it_was_cut_off(
    data: Path, fresh_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, asked = Pipeline.from_pretrained(fresh_demo), []
    sample = Pipeline.sample
    monkeypatch.setattr(Pipeline, "sample", lambda self, n, **how: asked.append(n) or sample(self, n, **how))

    def cut_off(material: Material) -> dict[str, Any]:
        raise KeyboardInterrupt

    def run() -> dict[str, Any]:
        return evaluate_pipeline(pipeline, data, tmp_path / "e", SETTINGS, only=["samples", "spectra"], progress=False)

    with monkeypatch.context() as patch:
        patch.setitem(parts.PARTS, "spectra", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run()
    before = (tmp_path / "e" / "samples.json").stat().st_mtime_ns
    report = run()
    assert list(report["parts"]) == ["samples", "spectra"]
    assert (tmp_path / "e" / "samples.json").stat().st_mtime_ns == before
    assert asked == [8], "samples are made once"


@pytest.fixture
def conditional(data: Path) -> Pipeline:
    """Of random weights; it can be asked for age and position."""
    p = preset("demo")
    told = replace(p.unet, covariates=find_covariates(read_manifest(data), ["age", "position"]))
    return Pipeline(AutoencoderKL(p.vae), UNet2D(told), replace(p.scheduler, prediction_type="v_prediction"))


def test_a_conditional_pipeline_is_asked_for_what_unseen_slices_are(
    data: Path, conditional: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def sample(self: Any, n: int, *, cond: Any = None, **_: Any) -> Tensor:
        asked.append(cond)
        return torch.zeros(n, 1, 128, 128)

    monkeypatch.setattr(Pipeline, "sample", sample)
    report = evaluate_pipeline(conditional, data, tmp_path / "e", SETTINGS, only=["sharpness"], progress=False)
    assert report["asked"] == ["age", "position"]
    material = Material(conditional, data, tmp_path / "e", SETTINGS)
    wanted = [row["covariates"]["age"] for row in material.unseen_rows]
    assert [float(v) for v in asked[0]["age"]] == pytest.approx(wanted)


def test_all_parts_of_a_conditional_pipeline(data: Path, conditional: Pipeline, tmp_path: Path) -> None:
    """Fewer samples than are followed on their way; people outside the trained range."""
    only = [name for name in parts.PARTS if name not in ("diversity", "latents", "spectra", "coherence")]
    report = evaluate_pipeline(conditional, data, tmp_path / "e", SETTINGS, only=only, progress=False)
    assert list(report["parts"]) == only
    assert "of 8 that fall below 0.05" in " ".join(report["parts"]["findings"]["figures"])


def test_training_slices_beside_asked_samples_are_of_the_same_contrast_and_height(
    data: Path, conditional: Pipeline, tmp_path: Path
) -> None:
    material = Material(conditional, data, tmp_path, SETTINGS)
    places = material.places.tolist()
    assert len(set(places)) == 8
    rows = [material.train.rows[place] for place in places]
    apart = [
        abs(r["covariates"]["position"] - w["covariates"]["position"])
        for r, w in zip(rows, material.unseen_rows, strict=True)
    ]
    assert sum(apart) / 8 < 25, "every eighth slice, 24 mm from one another"
    there = {row["modality"] for row in material.train.rows}
    for row, wanted in zip(rows, material.unseen_rows, strict=True):
        if wanted["modality"] in there:  # a made brain has one contrast, and these are few
            left = [r for r in material.train.rows if r["modality"] == wanted["modality"] and r not in rows]
            assert row["modality"] == wanted["modality"] or not left


def test_what_a_part_is_of_decides_whether_it_is_made_again(
    data: Path, fresh_demo: Path, log: Path, tmp_path: Path
) -> None:
    pipeline, of = Pipeline.from_pretrained(fresh_demo), ["curves", "distribution"]

    def run(**settings: Any) -> dict[str, Any]:
        return evaluate_pipeline(
            pipeline, data, tmp_path / "e", replace(SETTINGS, **settings), only=of, progress=False
        )["parts"]

    assert "skipped" in run()["curves"]
    (tmp_path / "log").write_text(log.read_text())
    assert run(log=str(tmp_path / "log"))["curves"]["figures"] == {"unet: least validation loss": 0.25}
    (tmp_path / "log").write_text(log.read_text().replace("0.25", "0.125"))
    found = run(log=str(tmp_path / "log"), extractor="sbldm_fast.evaluation.metrics:radial_spectrum")
    assert found["curves"]["figures"] == {"unet: least validation loss": 0.125}
    assert found["distribution"]["figures"]["extractor"] == "sbldm_fast.evaluation.metrics:radial_spectrum"
    assert str(tmp_path) not in (tmp_path / "e" / "evaluation.json").read_text(), "no path of a machine"


def test_without_a_log_the_curves_say_why(data: Path, fresh_demo: Path, tmp_path: Path) -> None:
    pipeline = Pipeline.from_pretrained(fresh_demo)
    report = evaluate_pipeline(pipeline, data, tmp_path / "e", SETTINGS, only=["curves"], progress=False)
    assert report["parts"]["curves"] == {"skipped": "no training log beside the pipeline; --log names one"}
    assert "Not made: no training log" in (tmp_path / "e" / "evaluation.html").read_text()


NO_LOGS = ["", "no json", '{"step": 1}\n', '{"stage": "vae", "step": 1}\n', '{"stage": "vae", "loss": 1}\n', "[]\n"]


@pytest.mark.parametrize("text", NO_LOGS)
def test_what_is_no_log_is_named(data: Path, fresh_demo: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "log").write_text(text)
    settings = replace(SETTINGS, log=str(tmp_path / "log"))
    with pytest.raises(ValueError, match="log is no training log"):
        evaluate_pipeline(
            Pipeline.from_pretrained(fresh_demo), data, tmp_path / "e", settings, only=["curves"], progress=False
        )


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_noise_that_a_prediction_means(kind: str) -> None:
    x0, noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double().split(1)
    a = torch.tensor([0.3], dtype=torch.float64)
    x = a.sqrt() * x0 + (1 - a).sqrt() * noise
    output = {"epsilon": noise, "sample": x0, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x0}[kind]
    torch.testing.assert_close(parts.epsilon_of(x, output, a, kind), noise)


def refuse(run: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run()


def test_bad_input_is_named_and_nothing_is_written(data: Path, fresh_demo: Path, tmp_path: Path) -> None:
    pipe, out = Pipeline.from_pretrained(fresh_demo), tmp_path / "e"

    def run(to: Path = out, of: Path = data, only: tuple[str, ...] = ("sharpness",), **settings: Any) -> object:
        return evaluate_pipeline(pipe, of, to, replace(SETTINGS, **settings), only=only, progress=False)

    refuse(lambda: run(only=("fid",)), "only: got 'fid', allowed are curves, samples, ")
    refuse(lambda: run(n=7), "n: got 7, allowed is 8 or more")
    refuse(lambda: run(n=10_000), r"n: got 10000, allowed are as many as unseen slices in .*, \d+")
    refuse(lambda: run(of=tmp_path / "nowhere"), "manifest.json does not exist")
    refuse(lambda: run(steps=0), "steps: got 0, allowed is")
    refuse(lambda: run(only=("distribution",), extractor="zzz"), "extractor: got 'zzz'")
    prepare(["synthetic:1"], tmp_path / "one", every=30, progress=False)
    refuse(lambda: run(of=tmp_path / "one"), "has neither validation nor test slices: nothing to compare with")
    assert not out.exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    refuse(lambda: run(tmp_path / "mine"), r"mine holds notes\.txt; allowed is a new folder or one that evaluate wrote")
    run()
    refuse(lambda: run(seed=1), "holds an evaluation of another pipeline, other data or other settings")
