"""A launch recorded in the interpreter compiles for GPUs that are not here."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from tests.mdproof import triton_canaries as kernels

from mdproof.triton.compiling import (
    SHARED_MEMORY_LIMIT,
    assert_tensor_cores,
    compile_launches,
)
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
    machine = [set(row["tensor_core"]) for row in rows]
    virtual = [{name for name in row["ptx"] if "mma" in name} for row in rows]
    assert machine == [{"HMMA"}] * 3  # a tile of 16 is too small for the later instructions
    assert virtual == [{"mma.sync"}] * 3
    assert_tensor_cores(rows)
    assert_tensor_cores(rows, "matmul")


def test_each_generation_has_its_own_tensor_core_instruction(compiled):
    a = torch.zeros(128, 128, dtype=torch.bfloat16)
    with record() as launches:
        kernels.wide_tile[(1,)](a, torch.empty(128, 128), N=128)
    rows = compiled(launches)
    assert [list(row["tensor_core"]) for row in rows] == [["HMMA"], ["HGMMA"], ["UTCHMMA"]]
    virtual = [[name for name in row["ptx"] if "mma" in name] for row in rows]
    assert virtual == [["mma.sync"], ["wgmma.mma_async"], ["tcgen05.mma"]]
    assert_tensor_cores(rows)


def test_a_product_that_misses_the_tensor_cores_is_told(compiled):
    a = torch.zeros(16, 16)  # float32 in full precision: no tensor core has it
    with record() as launches:
        kernels.product[(1,)](a, a, a.clone(), N=16, PRECISION="ieee", DTYPE=tl.float32)
        launch_cast(32)
    rows = compiled(launches, capabilities=(90,))
    with pytest.raises(
        AssertionError, match=r"^product on sm_90 has no tensor-core instruction\.$"
    ):
        assert_tensor_cores(rows, "product")
    message = r"^no row is of matmul; there is cast, product\.$"
    with pytest.raises(AssertionError, match=message):
        assert_tensor_cores(rows, "matmul")
    with pytest.raises(AssertionError, match=r"^no row is of any kernel; there is no kernel\.$"):
        assert_tensor_cores([])


def test_what_compiles_and_cannot_be_launched_is_refused(compiled):
    a = torch.zeros(256, 256)
    with record() as launches:
        kernels.wide_tile[(1,)](a, a.clone(), N=256, num_warps=16)
    row = compiled(launches, capabilities=(80,))[0]
    message = r"^asks for (\d+) bytes of shared memory; sm_80 has 166912$"
    found = re.fullmatch(message, row["error"])
    assert found is not None
    assert int(found[1]) == row["shared_bytes"] > SHARED_MEMORY_LIMIT[80]
    with pytest.raises(AssertionError, match=r"^wide_tile on sm_80 does not compile: asks for"):
        assert_tensor_cores([row])


def test_spills_and_rare_options_are_reported(compiled):
    a = torch.zeros(128, 128, dtype=torch.bfloat16)
    with record() as launches:
        kernels.wide_tile[(1,)](a, torch.empty(128, 128), N=128, maxnreg=32)
    assert launches[0]["maxnreg"] == 32
    row = compiled(launches, capabilities=(80,))[0]
    assert row["registers"] <= 32
    assert row["stack_bytes"] > 0
    assert row["spill_instructions"] > 0


UNCORRECTED = """
import torch
from tests.mdproof import triton_canaries as kernels
from mdproof.triton.launches import record
for source, target in ((torch.bfloat16, torch.float32), (torch.float32, torch.float8_e5m2)):
    try:
        with record():
            kernels.cast[(1,)](torch.ones(32).to(source), torch.empty(32).to(target), 32, BLOCK=32)
    except RuntimeError as error:
        print(error)
with record() as launches:
    kernels.cast[(1,)](torch.ones(32), torch.empty(32).half(), 32, BLOCK=32)
print(len(launches))
"""


def test_what_the_uncorrected_interpreter_gets_wrong_is_not_recorded():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", UNCORRECTED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    remedy = "Call mdproof.triton.interpreter.install() before the launch."
    wrong = "Triton's own interpreter gets it wrong."
    assert done.stdout.splitlines() == [
        f"the kernel takes bf16: {wrong} {remedy}",
        f"the kernel takes fp8e5: {wrong} {remedy}",
        "1",
    ]


def test_nothing_is_left_behind():
    builder = triton.runtime.interpreter.InterpreterBuilder
    before = builder.get_bf16_ty
    with record():
        assert builder.get_bf16_ty is not before
    assert builder.get_bf16_ty is before


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
