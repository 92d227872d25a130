"""The compiled steps on disk: what tells two of them apart, and who may have put them there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sbldm_fast import DDIMScheduler, FastSampler
from sbldm_fast.sampling import ahead, modes

from ..small import relative, scheduler


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("SBLDM_FAST_CACHE", str(folder))
    return folder


def inside_autocast(x: Tensor, c: float) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return x * c


def inside_grad(x: Tensor, c: float) -> Tensor:
    with torch.enable_grad():
        return x * c


def inside_a_branch(x: Tensor, c: float) -> Tensor:
    out: Tensor = torch.cond(x.sum() > 0, lambda v: v * c, lambda v: v * (c + 1), (x,))
    return out


def plain(x: Tensor, c: float) -> Tensor:
    return x * c


def name_of(
    region: Callable[[Tensor, float], Tensor], c: float, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> str:
    """The name under which a step with a constant inside a region would be kept."""
    names: list[str] = []
    kept = ahead._digest

    def digest(*arguments: Any) -> str:
        names.append(kept(*arguments))
        raise ahead.Unavailable("seen")

    with monkeypatch.context() as patched:
        patched.setattr(ahead, "_digest", digest)
        with pytest.raises(ahead.Unavailable, match="seen"):
            ahead.compile_ahead(lambda x: region(x, c), None, (torch.ones(2, 3),), settings.get("mode", "default"))
    return names[0]


@pytest.mark.parametrize("region", [plain, inside_autocast, inside_grad, inside_a_branch])
def test_a_constant_in_any_region_is_part_of_the_name(
    region: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = name_of(region, 0.1, monkeypatch)
    assert name_of(region, 0.1, monkeypatch) == first
    assert name_of(region, 0.9, monkeypatch) != first


def test_settings_build_threads_and_processor_are_part_of_the_name(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    names = {name_of(plain, 0.1, monkeypatch), name_of(plain, 0.1, monkeypatch, mode="max-autotune")}
    with config.patch({"cpp.enable_floating_point_contract_flag": "fast"}):
        names.add(name_of(plain, 0.1, monkeypatch))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "__version__", "9.9")
        names.add(name_of(plain, 0.1, patched))
    with monkeypatch.context() as patched:
        patched.setattr(torch.__config__, "show", lambda: "another build")
        names.add(name_of(plain, 0.1, patched))
    with monkeypatch.context() as patched:
        patched.setattr(ahead, "_processor", lambda: "another processor")
        names.add(name_of(plain, 0.1, patched))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "get_num_threads", lambda: 17)
        names.add(name_of(plain, 0.1, patched))
    assert len(names) == 7


@pytest.mark.usefixtures("packages")
def test_two_models_that_differ_inside_a_region_are_two_packages(cache: Path) -> None:
    """A whole run: the second model must not be given what was compiled for the first."""

    class Scaled(nn.Module):
        def __init__(self, c: float) -> None:
            super().__init__()
            self.c = c

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return inside_autocast(x, self.c).float()

    def make(c: float, mode: str) -> FastSampler:
        return FastSampler(Scaled(c), DDIMScheduler(clip_sample=False), shape=(2, 3, 3), steps=2, mode=mode)

    for c in (0.1, 0.9):
        compiled = make(c, "compile")
        torch.testing.assert_close(compiled(2), make(c, "eager")(2), rtol=2e-2, atol=2e-2)
        assert compiled.stats()["compiled"] == 1
    assert len(list(cache.glob("*.pt2"))) == 2


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o1777])
def test_a_folder_that_others_may_write_to_is_refused_aloud(mode: int, cache: Path) -> None:
    cache.mkdir()
    cache.chmod(mode)
    model = nn.Conv2d(2, 2, 1)
    sampler = FastSampler(lambda x, t: model(x), DDIMScheduler(), shape=(2, 3, 3), steps=2, mode="compile")
    with pytest.raises(
        ValueError, match=r"SBLDM_FAST_CACHE: .*cache can be written by others, allowed is a folder that only its user"
    ):
        sampler(1)
    assert not list(cache.iterdir())
    chosen, why = modes.choose(torch.device("cpu"), 1000, 50)
    assert chosen == "eager"
    assert "can be written by others" in why


def test_a_folder_above_that_others_may_write_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "open" / "own").mkdir(parents=True)
    (tmp_path / "open").chmod(0o777)
    monkeypatch.setenv("SBLDM_FAST_CACHE", str(tmp_path / "open" / "own"))
    with pytest.raises(ahead.Unavailable, match=r"open, above .*own, can be written by others"):
        ahead.cache_folder()
    (tmp_path / "open").chmod(0o1777)  # as /tmp: each may move only his own
    assert ahead.cache_folder() == tmp_path / "open" / "own"
    (tmp_path / "link").symlink_to(tmp_path / "open" / "own")
    monkeypatch.setenv("SBLDM_FAST_CACHE", str(tmp_path / "link"))
    assert ahead.cache_folder() == tmp_path / "open" / "own", "where a link leads is looked at"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SBLDM_FAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(ahead.Unavailable, match=r"no folder can be made: .*file is a file"):
        ahead.cache_folder()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_what_somebody_else_owns_is_not_loaded(cache: Path) -> None:
    ahead.cache_folder()
    package = cache / "x.pt2"
    package.write_bytes(b"")
    package.chmod(0o600)
    assert ahead._own(package)
    os.chown(package, 12345, 12345)
    assert not ahead._own(package)
    os.chown(package, 0, 0)
    package.chmod(0o664)
    assert not ahead._own(package)
    os.chown(cache, 12345, 12345)
    with pytest.raises(ahead.Unavailable, match="can be written by others"):
        ahead.cache_folder()


def test_inductor_keeps_its_files_below_the_cache_and_gives_the_setting_back(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "before")
    with ahead.private_caches(torch.device("cpu")):
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache / "inductor")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "before"


def test_without_a_compiler_auto_is_eager_and_compile_says_so(tmp_path: Path) -> None:
    code = """
import torch
from sbldm_fast import DDIMScheduler, FastSampler
from sbldm_fast.sampling import modes
def sampler(mode):
    return FastSampler(lambda x, t: 0.1 * x, DDIMScheduler(), shape=(2, 3, 3), steps=2, mode=mode)
modes.COMPILE_PAYS = 4
auto = sampler("auto")
assert auto(2).shape == (2, 2, 3, 3)
print(auto.reason, auto.mode)
try:
    sampler("compile")(2)
except ValueError as error:
    print(error)
"""
    (tmp_path / "bin").mkdir()
    environment = {"PATH": str(tmp_path / "bin"), "SBLDM_FAST_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    first, second = done.stdout.splitlines()
    assert first.startswith(
        "2 samples of 2 steps would win the minute of compiling back, but mode: compiling on a CPU needs a C++"
    )
    assert first.endswith(" eager")
    assert second.startswith("mode: compiling on a CPU needs a C++ compiler, and none was found")


def test_only_packages_make_room_and_never_the_new_one(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead.cache_folder()
    mine = [cache / "mine.pt2", cache / ("0" * 63 + ".pt2")]
    old = [cache / (f"{i:064x}.pt2") for i in range(ahead.KEPT + 2)]
    for i, path in enumerate([*mine, *old]):
        path.write_bytes(b"")
        os.utime(path, (2**32, 2**32 + i))  # the clock was set back since
    monkeypatch.setattr(
        torch._inductor,
        "aoti_compile_and_package",
        lambda program, package_path, **_: Path(package_path).touch() or package_path,
    )
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: path)
    made, found = ahead.compile_ahead(lambda x: x + 1, None, (torch.ones(2),), "default")
    assert not found
    assert Path(str(made)).exists()
    assert all(path.exists() for path in mine), "files of other names are the user's"
    assert sorted(cache.glob("[0-9a-f]" * 64 + ".pt2")) == sorted([*old[-ahead.KEPT + 1 :], Path(str(made))])


@pytest.mark.parametrize("empty", ["SBLDM_FAST_CACHE", "XDG_CACHE_HOME"])
def test_an_empty_setting_is_none_and_a_tilde_is_the_home(
    empty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SBLDM_FAST_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(empty, "")
    before = os.umask(0o002)
    try:
        assert ahead.cache_folder() == tmp_path / ".cache" / "sbldm_fast", (
            "and what is made above it is the user's alone"
        )
    finally:
        os.umask(before)
    monkeypatch.setenv("SBLDM_FAST_CACHE", "~/c")
    assert ahead.cache_folder() == tmp_path / "c"
    monkeypatch.setattr(
        Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
    )
    assert ahead.cache_folder() == tmp_path / "c", "a home is asked for where it is needed"
    monkeypatch.delenv("SBLDM_FAST_CACHE")
    with pytest.raises(ahead.Unavailable, match="no folder can be made: Could not determine home"):
        ahead.cache_folder()


def test_compile_is_kept_for_the_next_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBLDM_FAST_CACHE", str(tmp_path / "cache"))

    class Small(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.conv(x).tanh() + t / 1000

    def make(seed: int = 0) -> FastSampler:
        return FastSampler(Small(seed), scheduler(), shape=(3, 4, 4), steps=4, mode="compile")

    eager = FastSampler(Small(0), scheduler(), shape=(3, 4, 4), steps=4, mode="eager")(2)
    first, second = make(), make()
    assert relative(first(2), eager) < 1e-5
    assert torch.equal(second(2), first(2))
    assert (first.stats()["compiled"], second.stats()["loaded"]) == (1, 1)
    (package,) = (tmp_path / "cache").glob("*.pt2")
    good, compilations = package.read_bytes(), []

    def stub(program: Any, package_path: str, inductor_configs: Any) -> str:
        compilations.append(inductor_configs)
        Path(package_path).write_bytes(good)
        return package_path

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", stub)
    package.write_bytes(good[:1000])
    assert relative(make()(2), eager) < 1e-5, "a package that was cut short is made again"
    make(1)(2)
    make()(3)
    assert len(compilations) == 3, "other weights and another batch size are other packages"
    assert all(c["freezing"] for c in compilations)
    package.unlink()
    (tmp_path / "planted").write_bytes(good)
    package.symlink_to(tmp_path / "planted")
    linked = make()
    assert relative(linked(2), eager) < 1e-5
    assert linked.stats() == {"samples": 2, "compiled": 1}, "a link is not loaded"
    assert not package.is_symlink()
