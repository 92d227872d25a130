"""What a model can be asked for: bounds, what a user may give, and what an embedding makes of it."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from sbldm_fast.models.covariates import Covariate, CovariateEmbedding, encode, unit_range

AGE = Covariate("age", low=20.0, high=80.0, unit="years", definition="at the scan")
MODALITY = Covariate("modality", ("T1", "T2", "FLAIR"))
BOTH = (AGE, MODALITY)
NAN = math.nan


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Covariate("maps"), "name is 'maps', allowed are small letters, digits and _, and not maps"),
        (lambda: Covariate("Age"), "name is 'Age'"),
        (lambda: Covariate("age\n"), r"name is 'age\\n'"),
        (lambda: Covariate("1st"), "name is '1st'"),
        (lambda: Covariate("a" * 65), "name is 'aaa"),
        (lambda: Covariate("age", low=2.0, high=2.0), "age is from 2 to 2, allowed is a rising range"),
        (lambda: Covariate("age", low=3.0, high=2.0), "age is from 3 to 2"),
        (lambda: Covariate("age", low=NAN), "low is nan, allowed are finite numbers"),
        (lambda: Covariate("age", high=math.inf), "high is inf, allowed are finite numbers"),
        (lambda: Covariate("age", high=10**400), "high is .*, allowed is -1e\\+30 to 1e\\+30"),
        (lambda: Covariate("age", low=1e9, high=1e9 + 1), "allowed is a rising range that float32 can tell apart"),
        (lambda: Covariate("age", low=0.0, high=1e-320), "allowed is a rising range that float32"),
        (lambda: Covariate("age", tuple(map(str, range(257)))), "values of age are allowed to be 256 different names"),
        (lambda: Covariate("sex", ("F", "F")), "values of sex are allowed to be 256 different names"),
        (lambda: Covariate("sex", ("F", "")), "values of sex"),
        (lambda: Covariate("sex", ("F", "\x1b[2J")), r"values of sex has '\\x1b\[2J', allowed are 200 characters that"),
        (lambda: Covariate("sex", ("F", "M" * 201)), "values of sex has 'MM.*, allowed are 200 characters"),
        (lambda: Covariate("age", unit="y" * 41), "unit of age has 'yy.*, allowed are 40 characters"),
        (lambda: Covariate("age", definition="a\nb"), r"definition of age has 'a\\nb'"),
        (lambda: Covariate("sex", "F"), "values is 'F', allowed is one like"),  # type: ignore[arg-type]
        (lambda: Covariate("sex", (1, 2)), "values is"),  # type: ignore[arg-type]
        (lambda: Covariate("age", low=True), "low is True"),
        (lambda: Covariate.from_dict({"name": "age", "lo": 1}), "Covariate: got 'lo', allowed are"),
    ],
)
def test_what_is_no_covariate_is_named(make: Callable[[], Covariate], message: str) -> None:
    with pytest.raises(ValueError, match=message) as e:
        make()
    assert len(str(e.value)) < 400


def test_what_a_covariate_may_be() -> None:
    most = Covariate("site", tuple(f"{i:03d}" for i in range(256)))
    assert most.number("255") == 255.0
    assert len(most.allowed) <= 500, "as long as a message may be"
    assert AGE.allowed == "20 to 80 years"
    assert MODALITY.allowed == "T1 or T2 or FLAIR"
    for one in (AGE, MODALITY, Covariate("keys"), Covariate("n"), Covariate("rows"), most):
        assert Covariate.from_dict(one.to_dict()) == one


@pytest.mark.parametrize(
    ("given", "age", "modality"),
    [
        ({}, [NAN] * 3, [NAN] * 3),
        ({"age": 50, "modality": "T2"}, [50] * 3, [1] * 3),
        ({"age": [20, None, 80.0]}, [20, NAN, 80], [NAN] * 3),
        ({"age": (30, 40, 50)}, [30, 40, 50], [NAN] * 3),
        ({"age": "33.5", "modality": ["FLAIR", None, "T1"]}, [33.5] * 3, [2, NAN, 0]),
        ({"age": torch.tensor([[20.0], [30.0], [40.0]])}, [20, 30, 40], [NAN] * 3),
        ({"age": torch.tensor(20), "modality": torch.tensor([2, 0, 1])}, [20] * 3, [2, 0, 1]),
        ({"age": np.array([20, 21, 22], np.int16)}, [20, 21, 22], [NAN] * 3),
        ({"age": [np.float32(25.5)] * 3, "modality": np.array(["T1", "T2", "T1"])}, [25.5] * 3, [0, 1, 0]),
        ({"age": [torch.tensor(60.0)], "modality": [1]}, [60] * 3, [1] * 3),
        ({"age": (v for v in (20, 30, 40))}, [20, 30, 40], [NAN] * 3),
        ({"age": None, "modality": None}, [NAN] * 3, [NAN] * 3),
    ],
)
def test_a_condition_may_be_given_in_any_of_these_forms(given: Any, age: list[float], modality: list[float]) -> None:
    found = encode(BOTH, given, 3)
    assert list(found) == ["age", "modality"]
    for name, expected in (("age", age), ("modality", modality)):
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], torch.tensor(expected).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (50, "cond: got int, allowed is a mapping of age, modality"),
        (["age"], "cond: got list"),
        ({"height": 1.8}, "cond: got 'height', allowed are age, modality"),
        ({3: 1.8}, "cond: got 3, allowed are age, modality"),
        ({"age": 19.9}, "cond['age']: got 19.9, the model was trained on 20 to 80 years; with extrapolate"),
        ({"age": [20, 30, 81]}, "cond['age']: got 81, the model was trained on"),
        ({"age": NAN}, "cond['age']: got nan, allowed is 20 to 80 years; None is unknown"),
        ({"age": "nan"}, "cond['age']: got 'nan', allowed is 20 to 80 years; None is unknown"),
        ({"age": torch.tensor([20.0, NAN, 30.0])}, "cond['age']: got nan"),
        ({"age": math.inf}, "cond['age']: got inf, the model was trained on"),
        ({"age": "old"}, "cond['age']: got 'old', allowed is 20 to 80 years; None is unknown"),
        ({"age": 10**400}, "cond['age']: got 1000"),
        ({"age": 1j}, "cond['age']: got 1j, allowed is"),
        ({"age": [[20, 30]]}, "cond['age']: got [20, 30], allowed is"),
        ({"age": [torch.ones(2)]}, "cond['age']: got tensor([1., 1.]), allowed is"),
        ({"age": [20, 30]}, "cond['age']: got 2 values, allowed is one, or 3"),
        ({"age": []}, "cond['age']: got 0 values, allowed is one, or 3"),
        ({"modality": "T3"}, "cond['modality']: got 'T3', allowed is T1 or T2 or FLAIR; None is unknown"),
        ({"modality": "t1"}, "cond['modality']: got 't1'"),
        ({"modality": "1"}, "cond['modality']: got '1', allowed is T1"),
        ({"modality": 3}, "cond['modality']: got 3, allowed is"),
        ({"modality": 0.5}, "cond['modality']: got 0.5"),
        ({"modality": -1}, "cond['modality']: got -1"),
        ({"modality": NAN}, "cond['modality']: got nan"),
        ({"maps": "planes"}, "cond['maps']: got str, allowed is a tensor"),
        ({"maps": [[1, 2], [3]]}, "cond['maps']: got list, allowed is a tensor"),
    ],
)
@pytest.mark.parametrize("extrapolate", [False, True])
def test_what_cannot_be_asked_is_named(given: Any, message: str, extrapolate: bool) -> None:
    if extrapolate and "was trained on" in message and math.isfinite(max(np.ravel(list(given.values())))):
        with pytest.warns(UserWarning, match=r"cond\['age'\]: .* lies outside 20 to 80 years, on which the model was"):
            encode(BOTH, given, 3, extrapolate=True)
        return
    with pytest.raises(ValueError, match=re.escape(message)) as e:
        encode(BOTH, given, 3, extrapolate=extrapolate)
    assert len(str(e.value)) < 400


def test_extrapolation_is_to_what_float32_holds_and_names_its_argument() -> None:
    with pytest.warns(UserWarning, match=r"1e\+30 lies outside"):
        assert encode(BOTH, {"age": 1e30}, 1, extrapolate=True)["age"].isfinite().all()
    with pytest.raises(ValueError, match="got 1e\\+300, the model was trained on"):
        encode(BOTH, {"age": 1e300}, 1, extrapolate=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode(BOTH, {"age": [20, 80]}, 2, extrapolate=True)
    with pytest.raises(ValueError, match="uncond: got int"):
        encode(BOTH, 3, 1, argument="uncond")


def test_a_number_that_is_the_name_of_another_place_is_refused() -> None:
    """2 of the grades 2, 3 and unknown is no place to a user, who would be shown unknown ones."""
    grade = Covariate("grade", ("2", "3", "unknown"))
    assert grade.number("2") == 0.0
    with pytest.raises(ValueError, match=r"cond\['grade'\]: got 2, allowed is a text, '2': names are numbers"):
        grade.number(2)
    assert Covariate("grade", ("0", "1", "x")).number(1) == 1.0


def test_an_embedding_by_hand() -> None:
    torch.manual_seed(0)
    embedding = CovariateEmbedding(BOTH, 5).double()
    torch.nn.init.normal_(embedding.unknown)
    number, category = embedding.embed
    values = torch.tensor([[35.0, 2.0], [NAN, 0.0], [80.0, NAN]])
    with torch.no_grad():
        got = embedding(values)
    assert got.shape == (3, 2, 5)
    assert number.weight.shape == (5, 9)
    for n, age in ((0, 35.0), (2, 80.0)):
        u = (age - 20) / 30 - 1  # -0.5 and 1
        waves = [f(2**k * math.pi * u / 2) for f in (math.sin, math.cos) for k in range(4)]
        by_hand = number.weight.detach() @ torch.tensor([u, *waves], dtype=torch.float64) + number.bias.detach()
        torch.testing.assert_close(got[n, 0], by_hand, rtol=1e-6, atol=1e-6)
    # -1/2: a quarter of a turn is over half of the range
    sines = [math.sin(2**k * math.pi * -0.25) for k in range(4)]
    assert sines == pytest.approx([-(0.5**0.5), -1, 0, 0], abs=1e-12)
    assert torch.equal(got[1, 0], embedding.unknown[0].detach())
    assert torch.equal(got[0, 1], category.weight[2].detach())
    assert torch.equal(got[1, 1], category.weight[0].detach())
    assert torch.equal(got[2, 1], embedding.unknown[1].detach())


def test_what_is_unknown_teaches_only_its_own_vector() -> None:
    embedding = CovariateEmbedding(BOTH, 5)
    embedding(torch.full((2, 2), NAN)).sum().backward()
    assert embedding.unknown.grad is not None
    assert embedding.unknown.grad.eq(2).all()
    for p in embedding.embed.parameters():
        assert p.grad is not None
        assert p.grad.eq(0).all(), "no NaN behind the mask"


def test_unit_range() -> None:
    assert unit_range(AGE, torch.tensor([20.0, 50.0, 80.0, 110.0])).tolist() == pytest.approx([-1, 0, 1, 2], abs=1e-6)
    assert unit_range(MODALITY, torch.tensor([0.0, 1.0, 2.0])).tolist() == [-1, 0, 1]
    assert unit_range(Covariate("one", ("x",)), torch.tensor([0.0])).tolist() == [-1]


def test_the_ends_of_a_range_may_come_as_float32() -> None:
    volume = Covariate("volume", low=16.15, high=36.1)
    for end in (16.15, 36.1):
        assert encode([volume], {"volume": torch.tensor([end])}, 1)["volume"].item() == pytest.approx(end, rel=1e-6)
    with pytest.raises(ValueError, match=r"got 16\.1499, the model was trained"):
        encode([volume], {"volume": 16.1499}, 1)
