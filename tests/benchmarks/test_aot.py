"""The compile gate: what it lists is what the launchers launch, and it fails on what it should."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.slow

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "aot.py"


@pytest.fixture(scope="module")
def aot():
    spec = importlib.util.spec_from_file_location("aot", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules["aot"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["aot"]


@pytest.mark.parametrize("capability", [80, 89, 90, 100])
def test_every_kernel_is_listed_and_states_its_fp_fusion(aot, capability):
    variants = aot.launches(capability)
    kernels = {variant.kernel.__name__ for variant in variants}
    assert kernels == {
        *("target_kernel", "slice_kernel", "fused_kernel", "scale_rows_kernel", "forward_kernel", "gradient_kernel"),
        *("gather_kernel", "sum_kernel", "adamw_kernel", "adamw_single_kernel"),
    }
    # Triton 3.9 warns where it is left to the default, which 3.10 turns round. The optimizer's fma are explicit.
    unfused = {variant.kernel.__name__ for variant in variants if ("enable_fp_fusion", True) not in variant.options}
    assert unfused == {"adamw_kernel", "adamw_single_kernel"}
    assert all("enable_fp_fusion" in dict(variant.options) for variant in variants)
    assert any("tensordesc" in str(variant.signature) for variant in variants) is (capability >= 90)


@pytest.mark.parametrize(
    ("arch", "change", "faults"),
    [
        ("sm_90a", {}, []),
        ("sm_90a", {"spills": 8}, ["spills"]),
        ("sm_90a", {"wgmma": 0}, ["a product without WGMMA"]),
        ("sm_100a", {"wgmma": 0}, []),
        ("sm_90a", {"shared": 232_449}, ["shared memory over 232448"]),
        ("sm_89", {"shared": 101_377}, ["shared memory over 101376"]),
    ],
)
def test_the_gate_fails_on_what_it_should(aot, monkeypatch, arch, change, faults):
    product = next(v for v in aot.launches(90) if "tensordesc" in str(v.signature))
    found = {"registers": 200, "spills": 0, "wgmma": 4, "mma": 0, "tma": 8, "shared": 80_000} | change
    compiled = SimpleNamespace(asm={"cubin": b""}, metadata=SimpleNamespace(shared=found.pop("shared")))
    monkeypatch.setattr(aot.triton, "compile", lambda *args, **kwargs: compiled)
    monkeypatch.setattr(aot, "nvidia_figures", lambda binary: found)
    assert aot.check(product, arch)[1] == faults


@pytest.mark.parametrize("name", ["target bf16", "fused bf16 redo keep", "adamw i64 remainder", "adamw_single fp32"])
def test_a_kernel_compiles_without_a_gpu(aot, name):
    """One of each sort of arithmetic; fp64 products of cast operands are what Triton 3.6 could not lower."""
    variant = next(v for v in aot.launches(90) if v.name.startswith(name))
    figures, faults = aot.check(variant, "sm_90a")
    assert faults == []
    assert figures["registers"] > 10
