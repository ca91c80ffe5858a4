"""The profiler's stages: each operator counted once, and in the stage that it serves."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from benchmarks.__main__ import main
from benchmarks.timing import profile
from correctness.problems.problem import Problem
from moe_impls import functional
from moe_impls.interface import Implementation, Support
from moe_impls.registry import resolve

pytestmark = pytest.mark.xdist_group("profiles")
PROBLEM = Problem("p", T=64, D=128, H=64, O=128, E=4, K=2, bias=False)
EAGER = ("dense_mask", "sorted_dispatch", "index_add")


@pytest.fixture(scope="module", params=EAGER)
def profiled(request: pytest.FixtureRequest) -> profile.Profile:
    return profile.profile_call(resolve(request.param), PROBLEM, "forward_backward")


def stages_of(profiled: profile.Profile, *operators: str) -> set[str]:
    table = profiled.operators
    return set(table[table["operator"].isin(operators)]["stage"])


def test_the_stages_add_up_to_the_call(profiled: profile.Profile) -> None:
    assert profiled.stages["stage"].tolist() == list(profile.STAGES)
    assert sum(profiled.stages["percent"]) == pytest.approx(100, abs=0.1)


def test_every_stage_takes_time_and_little_is_left_over(profiled: profile.Profile) -> None:
    percent = dict(zip(profiled.stages["stage"], profiled.stages["percent"], strict=True))
    assert all(percent[stage] > 0 for stage in ("route", "dispatch", "expert_gemms", "activation", "combine"))
    assert percent["other"] < 10


def test_matrix_products_are_expert_gemms_forward_and_backward(profiled: profile.Profile) -> None:
    assert stages_of(profiled, "aten::mm", "aten::bmm", "aten::addmm") == {"expert_gemms"}
    gemms = profiled.operators[profiled.operators["stage"] == "expert_gemms"]
    assert set(gemms["pass"]) == {"forward", "backward"}


def test_the_activation_and_its_backward_are_activation(profiled: profile.Profile) -> None:
    assert stages_of(profiled, "aten::silu", "aten::silu_backward") == {"activation"}


def test_routing_is_route_and_sorting_is_dispatch() -> None:
    profiled = profile.profile_call(resolve("sorted_dispatch"), PROBLEM, "forward")
    assert stages_of(profiled, "aten::_softmax") == {"route"}
    assert stages_of(profiled, "aten::sort") == {"dispatch"}
    assert stages_of(profiled, "aten::sum") == {"combine"}
    assert set(profiled.operators["pass"]) == {"forward"}


def test_sums_into_rows_are_combine() -> None:
    profiled = profile.profile_call(resolve("index_add"), PROBLEM, "forward")
    assert stages_of(profiled, "aten::index_add_") == {"combine"}


def event(name: str, start: float, end: float, device: DeviceType = DeviceType.CUDA) -> FunctionEvent:
    return FunctionEvent(1, name, 1, start, end, device_type=device)


def test_what_a_device_did_and_how_often_the_host_waited_are_means_of_a_call() -> None:
    host = DeviceType.CPU
    events = [
        event(profile.CALL, 0, 100, host), event(profile.CALL, 1000, 1100, host),
        event("moe::expert_gemms", 50, 900),  # a range, which the profiler shows on the device as well
        event("gemm", 50, 250), event("gemm", 200, 300),  # on two streams
        event("Memcpy DtoH (Device -> Pageable)", 400, 500), event("cudaStreamSynchronize", 90, 510, host),
        event("cudaLaunchKernel", 10, 20, host),
        event("gemm", 1050, 1250), event("cudaDeviceSynchronize", 1200, 1300, host),  # after the last call
    ]  # fmt: skip
    (use,) = profile.device_use(events).to_dict("records")
    assert use == {"launches": 2, "busy_ms": 0.275, "gaps_ms": 0.325, "host_waits": 0.5}


def test_a_call_that_launches_nothing_leaves_the_device_idle() -> None:
    (use,) = profile.device_use([event(profile.CALL, 0, 100, DeviceType.CPU)]).to_dict("records")
    assert set(use.values()) == {0}


def test_nothing_stays_patched() -> None:
    before = (functional.activate, functional.combine_slots)
    profile.profile_call(resolve("sorted_dispatch"), PROBLEM, "forward")
    assert (functional.activate, functional.combine_slots) == before
    assert torch._C._len_torch_function_stack() == 0


def test_what_is_not_declared_is_not_profiled() -> None:
    subject = Implementation("partial", resolve("index_add").forward, Support(dtypes=(torch.float64,)))
    with pytest.raises(ValueError, match="dtype float32 not declared"):
        profile.profile_call(subject, PROBLEM, "forward")


def test_the_command_writes_stages_operators_and_trace(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sizes = [f"--{n}={v}" for n, v in {"T": 8, "D": 16, "H": 8, "E": 4, "K": 2}.items()]
    assert main(["profile", "--impl", "index_add", *sizes, "--mode", "forward", "--out", str(tmp_path)]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [path.name for path in paths] == ["stages.csv", "operators.csv", "trace.json"]  # no device.csv
    assert pd.read_csv(paths[0])["stage"].tolist() == list(profile.STAGES)
    assert set(pd.read_csv(paths[1]).columns) == {"operator", "stage", "pass", "calls", "self_ms", "total_ms"}
    assert b"moe::expert_gemms" in paths[2].read_bytes()


@pytest.mark.parametrize(
    ("arguments", "valid"),
    [
        (["--impl", "fastest"], "dense_mask, sorted_dispatch, index_add, compiled"),
        (["--impl", "index_add", "--model", "gpt-9"], "mixtral-8x7b, mixtral-8x22b"),
        (["--impl", "index_add", "--dtype", "int8"], "float64, float32, bfloat16, float16"),
        (["--impl", "index_add", "--device", "tpu"], "cpu, cuda"),
        (["--impl", "index_add", "--mode", "sideways"], "forward, forward_backward"),
        (["--impl", "index_add", "--load", "heavy"], "uniform, zipf"),
        (["--impl", "index_add", "--K", "64"], "must not exceed E, here 32"),
        (["--impl", "index_add", "--model", "olmoe-1b-7b", "--E", "8"], "valid is --T"),
        (["--impl", "index_add", "--T", "0"], "at least 1"),
        ([], "--impl"),
    ],
)
def test_bad_input_is_one_line_with_what_is_valid_and_exit_status_2(arguments, valid, capsys) -> None:
    try:
        status = main(["profile", *arguments])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert valid in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture) -> None:
    assert main(["profile", "--impl", "index_add", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
