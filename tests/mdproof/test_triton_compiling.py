"""A launch recorded in the interpreter compiles for GPUs that are not here."""

import importlib.util
import json

import pytest
import torch
from tests.mdproof import triton_canaries as kernels

from mdproof.triton.compiling import SHARED_MEMORY_LIMIT, compile_launches
from mdproof.triton.launches import record


def launch_cast(n: int) -> None:
    kernels.cast[(1,)](torch.zeros(n), torch.empty(n, dtype=torch.float16), n, BLOCK=32)


def test_a_launch_is_recorded_with_types_constants_and_divisibility():
    with record() as launches:
        launch_cast(32)
    assert launches == [
        {
            "kernel": "tests.mdproof.triton_canaries:cast",
            "signature": {"x_ptr": "*fp32", "y_ptr": "*fp16", "n": "i32", "BLOCK": "constexpr"},
            "constants": {"BLOCK": 32},
            "divisible_by_16": ["x_ptr", "y_ptr", "n"],
            "num_warps": 4,
            "num_stages": 3,
        }
    ]
    assert json.loads(json.dumps(launches)) == launches


def test_equal_launches_are_recorded_once_and_different_ones_each():
    with record() as launches:
        for n in (32, 64, 31, 1):
            launch_cast(n)
    kinds = [(row["signature"]["n"], "n" in row["divisible_by_16"]) for row in launches]
    assert kinds == [("i32", True), ("i32", False), ("constexpr", False)]


def test_recording_ends_with_the_context():
    with record() as launches:
        pass
    launch_cast(32)
    assert launches == []


def test_a_value_that_json_cannot_hold_is_refused():
    message = r"^n is list; only tensors and numbers can be recorded\.$"
    with record(), pytest.raises(ValueError, match=message):
        kernels.cast[(1,)](torch.zeros(1), torch.empty(1), [1], BLOCK=32)


def test_recorded_launches_compile_with_tensor_cores_for_three_architectures(compiled):
    a = torch.zeros(16, 16, dtype=torch.bfloat16)
    with record() as launches:
        kernels.matmul[(1,)](a, a, torch.empty(16, 16), N=16)
    rows = compiled(launches)
    assert [row["capability"] for row in rows] == [80, 90, 100]
    for row in rows:
        assert row["error"] is None
        assert 0 < row["registers"] <= 255
        assert row["stack_bytes"] == 0
        assert row["shared_bytes"] <= SHARED_MEMORY_LIMIT[row["capability"]]
        assert sum(row["tensor_core"].values()) > 0
        assert len(row["cubin_sha256"]) == 64


def test_a_cubin_is_reproducible(compiled, tmp_path, monkeypatch):
    with record() as launches:
        launch_cast(32)
    first = compiled(launches, capabilities=(90,))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # compile again, from nothing
    second = compile_launches(launches, capabilities=(90,))
    assert first == second


def test_what_a_target_refuses_is_reported(compiled):
    with record() as launches:
        kernels.cast[(1,)](
            torch.zeros(32), torch.empty(32, dtype=torch.float8_e4m3fn), 32, BLOCK=32
        )
    refused, accepted = compiled(launches, capabilities=(80, 90))
    assert "fp8e4nv" in refused["error"]
    assert accepted["error"] is None


def test_a_missing_triton_is_said_plainly(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = r"^Triton is not installed; kernels are compiled with the extra zhizhi\[gpu\]\.$"
    with pytest.raises(RuntimeError, match=message):
        compile_launches([])


def test_a_failing_worker_tells_why():
    launch = {"kernel": "no_such_module:kernel"}
    with pytest.raises(RuntimeError, match="No module named 'no_such_module'"):
        compile_launches([launch | {"num_warps": 4, "num_stages": 3}])
