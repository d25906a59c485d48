"""The benchmark of whole steps: what it makes of a profile, and its parts on a CPU with a tiny shape."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import gpu_step
import step_contestants
from step_contestants import Kernel

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("products", "nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NTN"),
        ("products", "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>"),
        ("products", "fused_kernel"),
        ("attention", "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, cutlass::bfloat16_t>>"),
        ("attention", "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)"),
        ("optimizer", "void kOptimizerStatic8bit2StateBlockwise<__nv_bfloat16, 0, 256, 1>(__nv_bfloat16*)"),
        ("elementwise", "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<float>>"),
        ("elementwise", "void at::native::multi_tensor_apply_kernel<at::native::LpNormFunctor<c10::BFloat16>>"),
        ("elementwise", "gather_kernel"),
        ("copies", "Memcpy DtoD (Device -> Device)"),
    ],
)
def test_kernel_classes(kind, name):
    assert step_contestants.kernel_class(name) == kind


def test_overlapping_kernels_are_not_idle_twice():
    kernels = [Kernel("nvjet", 0, 1000), Kernel("gather_kernel", 500, 1500), Kernel("nvjet", 2000, 2500)]
    found = step_contestants.time_by_class(kernels, wall=4000)
    assert found["classes"]["products"] == {"ms": 1.5, "launches": 2}
    assert found["classes"]["elementwise"] == {"ms": 1.0, "launches": 1}
    assert found["idle ms"] == pytest.approx(2.0)
    assert found["largest"][0]["name"] == "nvjet"
    with pytest.raises(RuntimeError, match="saw no kernel"):
        step_contestants.time_by_class([], wall=1)


def test_annotations_and_the_host_are_no_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def event(name, device, annotation=False):
        time_range = SimpleNamespace(start=1.0, end=3.0)
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation, time_range=time_range)

    events = [
        event("cudaLaunchKernel", DeviceType.CPU),
        event("nvjet", DeviceType.CUDA),
        event("Optimizer.step#AdamW8bit.step", DeviceType.CUDA),
        event("a region", DeviceType.CUDA, annotation=True),
    ]
    assert step_contestants.read_kernels(events) == [Kernel("nvjet", 1.0, 3.0)]


def test_no_speed_where_the_first_loss_is_off():
    found = {"first loss": 0.7, "ms": {}, "profile": {}}
    assert gpu_step.checked(dict(found), "trl-tuned") == found
    off = gpu_step.checked(dict(found), "dpo-fast")
    assert "ms" not in off
    assert "0.70000, not ln 2" in off["error"]


def run(out, *options):
    script = Path(gpu_step.__file__)
    return subprocess.run(
        [sys.executable, str(script), "--shape", "tiny", "--out", str(out), *options],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(script.parent.parent)},
    )


def test_a_part_that_fails_is_reported_and_the_others_run(tmp_path):
    out = tmp_path / "found.json"
    options = ("--only", "dpo-fast:2", "trl-tuned:2", "--fail", "trl-tuned:2")
    done = run(out, *options)
    parts = json.loads(out.read_text())["parts"]
    assert done.returncode == 1, done.stderr
    assert parts["tiny trl-tuned 2"]["error"] == "RuntimeError: made to fail"
    assert "tiny trl-tuned 2: RuntimeError: made to fail" in done.stdout
    ours = parts["tiny dpo-fast 2"]
    assert "error" not in ours
    assert ours["first loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert ours["profile"]["classes"]["products"]["launches"] > 0
    # What is there is not run again; a part that no time is left for is named.
    again = run(out, *options, "--resume", "--budget", "0")
    assert again.returncode == 1, again.stderr
    assert json.loads(out.read_text())["parts"]["tiny dpo-fast 2"] == ours
    assert "tiny trl-tuned 2: no time left" in again.stdout
