"""The suite `infer`: modes give the poses of eager float32; a wrong one is found, a missing one skipped and named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from posemap_fast.apr import BACKBONES
from posemap_fast.bench.case import FAMILIES, BenchContext, Comparison, Skipped
from posemap_fast.bench.suites import infer
from posemap_fast.bench.suites.infer import MODES, Forward, Mode, Regressor
from posemap_fast.optional import OptionalLibrary

pytestmark = pytest.mark.usefixtures("one_thread")

SMOKE = BenchContext(torch.device("cpu"), is_smoke=True)
FAMILIES_HERE = [name for name in FAMILIES if name.startswith("infer/")]


def comparisons(family: str) -> list[Comparison]:
    return [case for case in FAMILIES.get(family)(SMOKE) if isinstance(case, Comparison)]


def of_mode(name: str, precision: str = "fp32") -> Comparison | Skipped:
    """The small backbone in a mode at the smoke size, also one that the smoke run leaves out."""
    net, dtype = infer._random_net("compact", SMOKE.device), infer._PRECISIONS[precision]
    return infer._of_mode(name, MODES[name], net, dtype, infer._SMOKE_SHAPE, 1.0, SMOKE)


def off_by(error: float) -> Callable[[Regressor, torch.Tensor], Forward]:
    return lambda net, images: lambda images: net(images) + error


def test_every_backbone_has_a_family() -> None:
    assert {f"infer/{name}" for name in BACKBONES} <= set(FAMILIES_HERE)


def test_every_comparison_of_the_smoke_run_verifies_and_runs() -> None:
    names = []
    for family in FAMILIES_HERE:
        for case in comparisons(family):
            names.append(case.name)
            assert case.verify() <= case.tolerance, case.name
            assert case.n_flops > 0 and case.peers
            case.run()
    assert len(set(names)) == len(names) >= 6
    assert all(name.startswith("infer/") for name in names)


@pytest.mark.parametrize("error", [0.1, float("nan")])
def test_a_wrong_mode_is_found_in_every_precision(monkeypatch, error: float) -> None:
    monkeypatch.setitem(MODES, "wrong", Mode(off_by(error)))
    wrong = [case for case in comparisons("infer/compact") if case.name.endswith("/wrong")]
    assert len(wrong) == 2  # fp32 and bf16
    assert not any(case.verify() <= case.tolerance for case in wrong)


def test_a_mode_that_only_knows_its_example_is_found(monkeypatch) -> None:
    def remembered(net: Regressor, images: torch.Tensor) -> Forward:
        poses = net(images)
        return lambda images: poses

    monkeypatch.setitem(MODES, "remembered", Mode(remembered))
    case = of_mode("remembered")
    assert isinstance(case, Comparison) and case.verify() > case.tolerance


def test_on_a_cpu_modes_that_take_long_to_make_come_at_one_size_only() -> None:
    full = BenchContext(torch.device("cpu"))
    sizes = [shape for shape in infer._CPU_SHAPES if MODES["compile"].runs("fp32", shape, full)]
    assert sizes == [infer._MAIN]
    assert not MODES["compile"].runs("fp32", infer._SMOKE_SHAPE, SMOKE)
    assert not MODES["cuda_graph"].runs("fp32", infer._MAIN, full)
    assert not MODES["channels_last"].runs("fp16", infer._MAIN, full)


def test_flops_are_those_that_the_backbone_documents() -> None:
    net = Regressor(infer._random_net("vgg16", SMOKE.device))
    assert infer._count_flops(net, torch.rand(2, 3, 120, 160)) == pytest.approx(2 * 11.7e9, rel=0.01)


def test_the_case_of_the_paper_carries_its_milliseconds() -> None:
    shape, net = infer._PAPER, infer._random_net("compact", SMOKE.device)
    names = [f"infer/{backbone}/{shape}/fp32/channels_last" for backbone in ("vgg16", "compact")]
    cases = [infer._of_mode(name, MODES["channels_last"], net, torch.float32, shape, 1.0, SMOKE) for name in names]
    assert [case.notes.get("paper_ms") for case in cases if isinstance(case, Comparison)] == [6.27, None]


def test_without_onnxruntime_its_mode_is_skipped_with_the_mend(monkeypatch) -> None:
    monkeypatch.setattr(OptionalLibrary, "version", lambda self: None)
    case = of_mode("onnxruntime")
    assert isinstance(case, Skipped) and "pip install onnx onnxscript onnxruntime" in case.reason


def test_where_torch_cannot_compile_its_mode_is_skipped_with_the_cause(monkeypatch) -> None:
    def fails(images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("InvalidCxxCompiler: no working C++ compiler\nand much more")

    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda *args, **options: fails)
    case = of_mode("compile")
    assert isinstance(case, Skipped)
    assert "no working C++ compiler" in case.reason and "much more" not in case.reason and "g++" in case.reason


@pytest.mark.slow
def test_onnxruntime_gives_the_same_poses() -> None:
    for library in infer._ONNX:
        pytest.importorskip(library.module)
    case = of_mode("onnxruntime")
    assert isinstance(case, Comparison) and case.verify() <= case.tolerance


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_networks_give_the_same_poses(precision: str) -> None:
    case = of_mode("compile", precision)
    if isinstance(case, Skipped):
        pytest.skip(case.reason)
    assert case.verify() <= case.tolerance
    assert float(case.notes["build_s"]) > 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_comparison_verifies_on_a_gpu() -> None:
    context = BenchContext(torch.device("cuda"), is_smoke=True)
    cases = [case for case in FAMILIES.get("infer/compact")(context) if isinstance(case, Comparison)]
    assert any(case.name.endswith("cuda_graph") for case in cases)
    for case in cases:
        assert case.verify() <= case.tolerance, case.name


def test_a_case_that_is_not_wanted_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def make(net: Regressor, images: torch.Tensor) -> Forward:
        built.append(tuple(images.shape))
        return net

    for name in ("channels_last", "compile"):
        monkeypatch.setitem(MODES, name, Mode(make, precisions=("fp32",), is_built=MODES[name].is_built))
    only = BenchContext(SMOKE.device, only="infer/compact/240x427/batch1/fp32/compile")
    names = [case.name for case in FAMILIES.get("infer/compact")(only)]
    assert names == [only.only] and built == [(1, 3, 240, 427)]
