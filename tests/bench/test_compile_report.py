"""The compile report finds what it is there to find: narrow accesses, spills, their absence.

It runs in a process of its own: here Triton's kernels are made for the interpreter.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import compiled_table
import pytest

pytestmark = pytest.mark.exhaustive  # its process compiles kernels for GPUs

BENCH = Path(__file__).parents[2] / "bench"
PROGRAM = """
import json
import compile_report as report

modules = (report.teacher_kernels, report.adamw_kernels)
configurations = {c.name: c for module in modules for c in module.production_configurations()}
found = {}
for name in ("average_bf16_from_bf16", "adamw_8bit_bf16"):
    found[name] = report.examine(configurations[name], 90)
wide = configurations["gradient_squares_bf16"]
narrow = wide._replace(constexprs=wide.constexprs | {"VECTOR": False})
found["narrow"] = report.examine(narrow, 90)
decode = next(
    c for c in report.attention_kernel.production_configurations() if c.name == "decode_bf16"
)
found["decode_bf16"] = report.examine(decode, 90)
unpipelined = decode._replace(constexprs=decode.constexprs | {"STAGES": 2})
found["unpipelined"] = report.examine(unpipelined, 90)
absent = wide._replace(streamed={"numel": 32})
found["absent"] = report.examine(absent, 90)

from sodfast_kernels.distillation import row_launch
from sodfast_kernels.launch import Sweep

for configuration in row_launch.production_configurations():
    if configuration.name in report.compiled_table.TARGETS:
        found_here, problems = report.examine(configuration, 90)
        problems += report.compiled_table.grown(found_here, report.triton.__version__)
        found["bounded " + configuration.name] = found_here, problems
        undeclared = configuration._replace(sweeps={"add_tile": Sweep(7.0)})
        found["undeclared"] = report.examine(undeclared, 90)

ptx = '''
ld.param.b64 %rd1, [k_param_0];
ld.param.b64 %rd2, [k_param_1];
@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
ld.global.b64 %rd3, [%rd2];
shl.b64 %rd4, %rd3, 2;
add.s64 %rd5, %rd1, %rd4;
ld.global.b32 %r5, [%rd5];
cp.async.cg.shared.global [ %r9 + 0 ], [ %rd1 + 0 ], 0x10, 0x10;
st.global.v2.b32 [ %rd1 + 8 ], { %r1, %r2 };
'''
found["accesses"] = [
    [sorted(origin), width] for origin, width in report.accesses(ptx, ["logits_ptr", "ids_ptr"])
]
log = "0 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\\nUsed 40 registers"
found["ptxas"] = report.read_ptxas(log)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(BENCH), *filter(None, sys.path)])
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["average_bf16_from_bf16", "adamw_8bit_bf16", "decode_bf16"])
def test_production_kernels_are_clean(found, name):
    report, problems = found[name]
    assert problems == [] and report["spill_bytes"] == 0
    assert report["narrowest_streamed_access_bytes"] == 16
    assert report["arch"] == "sm_90" and 0 < report["registers"] <= 255


def test_a_narrow_access_is_found(found):
    report, problems = found["narrow"]
    assert report["narrowest_streamed_access_bytes"] == 2
    assert problems == ["grad_table (16 bits) is accessed 2 bytes at a time"]


def test_a_loop_that_waits_for_all_of_its_copies_is_a_problem(found):
    assert found["unpipelined"][1] == [
        "_add_block waits for all of its copies: nothing is pipelined"
    ]


def test_a_streamed_name_that_is_never_accessed_is_a_problem(found):
    assert found["absent"][1] == ["no access to numel found"]


def test_addresses_are_followed_to_their_arguments(found):
    assert found["accesses"] == [
        [["logits_ptr"], 16],
        [["ids_ptr"], 8],
        [["*ids_ptr", "logits_ptr"], 4],  # a gather
        [["logits_ptr"], 16],
        [["logits_ptr"], 8],
    ]


def test_spills_are_read_from_ptxas(found):
    assert found["ptxas"] == [40, 28]


@pytest.mark.skipif(
    version("triton") != compiled_table.load()["triton"],
    reason="the targets are those of the code that another version of Triton generates",
)
def test_the_row_kernels_meet_their_targets_and_have_not_grown(found):
    bounded = {key: entry for key, entry in found.items() if key.startswith("bounded")}
    assert len(bounded) == len(compiled_table.TARGETS)
    for report, problems in bounded.values():
        assert problems == [], report["name"]
        assert report["predicted"]["H200"]["picoseconds"] > 0


def test_a_loop_that_is_not_declared_and_one_of_other_bytes_are_problems(found):
    _, problems = found["undeclared"]
    assert any("is not declared" in problem for problem in problems)
    assert any("bytes an element, not 7.0" in problem for problem in problems)
