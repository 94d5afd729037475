"""How the suite runs its cases: what it needs, what it keeps, what it leaves out, and what its exit
code says. What the cases measure is tested with their modules."""

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_suite
import pytest
import torch
from suite_record import Case, Plan, Result, Skipped, check, cpu_result, versions
from suite_targets import judge

KERNEL_PARTS = [part for part in gpu_suite.PARTS if part != "rollout"]
Suite = Callable[..., int]
PASS: Result = {"checks": [check("error", 0.5, 1.0)]}
MISS: Result = {"checks": [check("error", 2.0, 1.0)]}

# Runs the suite where only torch, triton and what they need are installed.
WITHOUT_OTHERS = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
ABSENT = {
    "sodfast", "pydantic", "omegaconf", "transformers", "liger_kernel", "trl", "fla", "torchao",
    "flashinfer", "matplotlib", "scipy", "pandas", "pytest",
}
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ABSENT:
            return PathFinder.find_spec(name, path, target)
sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Finder()]
import gpu_suite
sys.exit(gpu_suite.main(sys.argv[1:]))
"""


def without_others(*arguments: str) -> subprocess.CompletedProcess[str]:
    bench = Path(gpu_suite.__file__).parent
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_OTHERS, *arguments],
        cwd=bench,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_kernel_parts_need_torch_and_triton_alone() -> None:
    done = without_others(*KERNEL_PARTS, "--list")
    assert done.returncode == 0, done.stderr
    listed = [line.split()[0] for line in done.stdout.splitlines()]
    assert set(listed) == set(KERNEL_PARTS)


@pytest.mark.slow
def test_rollout_is_listed_without_what_it_needs_and_fails_as_a_result(tmp_path: Path) -> None:
    assert without_others("rollout", "--list").returncode == 0
    done = without_others("rollout", "--rehearse", "--out", str(tmp_path))
    assert done.returncode == 1, done.stderr
    cases = json.loads((tmp_path / "rollout.json").read_text())["cases"]
    assert cases and all("ModuleNotFoundError" in case["failed"] for case in cases.values())


@pytest.mark.exhaustive
def test_everything_is_rehearsed_on_a_cpu(tmp_path: Path) -> None:
    done = without_others(*KERNEL_PARTS, "--rehearse", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    for part in KERNEL_PARTS:
        content = json.loads((tmp_path / f"{part}.json").read_text())
        assert content["versions"]["full_sizes"] is False
        for name, case in content["cases"].items():
            assert "failed" not in case, (part, name, case)
            assert all("failed" not in row for row in case.get("rows", [])), (part, name)
    skipped = {"two streams", "another device", "CUDA graph"}
    judged = json.loads((tmp_path / "correctness.json").read_text())["cases"]
    assert {name for name, case in judged.items() if "skipped" in case} == skipped
    assert all(case.get("checks") for name, case in judged.items() if name not in skipped)


@pytest.mark.slow
def test_rollout_is_rehearsed_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, gpu_suite.__file__, "rollout", "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = json.loads((tmp_path / "rollout.json").read_text())["cases"]
    assert len(cases) == 5 and all(case.get("checks") or case["rows"] for case in cases.values())


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Suite:
    """`suite(cases, *arguments)`: the exit code of a rehearsal of one part with these cases."""

    # A rehearsal sets it, for good: kernels of later tests would be interpreted on a GPU.
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def run(cases: list[Case], *arguments: str) -> int:
        module = SimpleNamespace(__file__=__file__, cases=lambda plan: cases)
        monkeypatch.setitem(sys.modules, "suite_invented", module)
        monkeypatch.setattr(gpu_suite, "PARTS", {"invented": "suite_invented"})
        out = ["--out", str(tmp_path)]
        return gpu_suite.main(["invented", "--rehearse", *out, *arguments])

    return run


def content(folder: Path) -> Any:
    return json.loads((folder / "invented.json").read_text())


def fail() -> Result:
    raise RuntimeError("out of order")


def skip() -> Result:
    raise Skipped("needs two GPUs")


@pytest.mark.parametrize(
    ("runs", "code"),
    [
        ([lambda: PASS], 0),
        ([lambda: PASS, skip], 0),
        ([lambda: PASS, lambda: MISS], 1),
        ([lambda: {"checks": [check("error", float("nan"), 1.0)]}], 1),
        ([fail, lambda: PASS], 1),
    ],
)
def test_the_exit_code_says_whether_all_targets_are_met(
    suite: Suite, tmp_path: Path, runs: list[Any], code: int
) -> None:
    assert suite([Case(str(n), 0.0, run) for n, run in enumerate(runs)]) == code
    assert len(content(tmp_path)["cases"]) == len(runs)


def test_results_are_written_after_every_case(suite: Suite, tmp_path: Path) -> None:
    seen = []

    def look() -> Result:
        seen.append(list(content(tmp_path)["cases"]))
        return PASS

    suite([Case("first", 0.0, lambda: PASS), Case("second", 0.0, look), Case("third", 0.0, look)])
    assert seen == [["first"], ["first", "second"]]
    assert sorted(path.name for path in tmp_path.glob("invented*")) == ["invented.json"]


def test_what_a_killed_command_leaves_is_not_a_pass(suite: Suite, tmp_path: Path) -> None:
    """Nor does a later command with other peers change how it is judged."""

    def killed() -> Result:
        raise KeyboardInterrupt

    cases = [Case("first", 0.0, lambda: PASS), Case("second", 0.0, killed)]
    with pytest.raises(KeyboardInterrupt):
        suite(cases, "--without", "trl")
    found = content(tmp_path)
    assert list(found["cases"]) == ["first"] and found["without"] == ["trl"]
    assert found["not_run"] == {"second": "the command ended before it did"}
    (target,) = (t for t in judge(tmp_path, ["invented"]) if t.verdict != "pass")
    assert (target.name, target.verdict) == ("second", "not run")


def test_what_is_there_is_not_repeated_and_what_failed_is(suite: Suite, tmp_path: Path) -> None:
    ran = []

    def run(name: str, result: Result) -> Case:
        def once() -> Result:
            ran.append(name)
            return fail() if name == "broken" and len(ran) < 4 else result

        return Case(name, 0.0, once)

    cases = [run("good", PASS), run("missed", MISS), run("broken", PASS)]
    assert suite(cases) == 1
    assert suite(cases) == 1  # the miss is still one
    assert ran == ["good", "missed", "broken", "broken"]
    assert "failed" not in content(tmp_path)["cases"]["broken"]


def test_other_versions_start_anew(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def run() -> Result:
        ran.append(1)
        return PASS

    suite([Case("one", 0.0, run)])
    monkeypatch.setattr("suite_record.version", lambda package: "99")
    suite([Case("one", 0.0, run)])
    assert len(ran) == 2 and content(tmp_path)["versions"]["triton"] == "99"


def test_versions_tell_sources_and_sizes_apart(tmp_path: Path) -> None:
    source = tmp_path / "kernel.py"
    found = []
    for text, full in (("a", False), ("b", False), ("a", True), ("a", False)):
        source.write_text(text)
        found.append(versions(Plan(torch.device("cpu"), full), [source]))
    assert found[0] == found[3]
    assert found[0] != found[1] and found[0] != found[2]


def test_a_cpu_bench_reports_a_failed_row_as_an_error() -> None:
    said: list[str] = []
    good = {"name": "ours", "milliseconds": 1.0}
    assert cpu_result([good], said.append)["cases"] == [good] and len(said) == 1
    with pytest.raises(RuntimeError, match="ours: ValueError"):
        cpu_result([good, {"name": "ours", "failed": "ValueError: no"}], said.append)


def test_what_does_not_fit_the_budget_is_named(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time is made to pass by three minutes a case, and minutes count as at full size."""
    clock = [0.0]
    monkeypatch.setattr(gpu_suite, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    plan = Plan(torch.device("cpu"), full=True)
    monkeypatch.setattr("suite_record.Plan", lambda *given, **named: plan)

    def run() -> Result:
        clock[0] += 180
        return PASS

    cases = [Case(name, 4.0, run) for name in ("first", "second", "third")]
    assert suite(cases, "--budget-minutes", "8") == 3
    found = content(tmp_path)
    assert list(found["cases"]) == ["first", "second"]
    assert "2.0 minutes left" in found["not_run"]["third"]
    # The same command again does what is left, and forgets that it was not run.
    assert suite(cases, "--budget-minutes", "8") == 0
    assert not content(tmp_path)["not_run"]


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main(["logits"]) == 2
    assert "--rehearse" in capsys.readouterr().out


def test_the_gpu_has_an_index_and_each_part_begins_with_what_the_one_before_left_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some functions of torch refuse a device without an index. A part's objects may be in cycles:
    a network beside the next part's would not fit."""
    gpus: list[torch.device] = []
    alive: list[Any] = []

    class Network:
        def __init__(self) -> None:
            self.itself = self

    def cases(plan: Plan) -> list[Case]:
        gpus.append(plan.device)
        assert not any(made() for made in alive)
        network = Network()
        alive.append(weakref.ref(network))
        return [Case("runs", 1.0, lambda: PASS if network else MISS)]

    for name, value in {
        "is_available": lambda: True,
        "get_device_properties": lambda device: SimpleNamespace(total_memory=141 << 30),
        "get_device_name": lambda device: "a GPU",
        "set_per_process_memory_fraction": lambda share: None,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(gpu_suite, "import_module", lambda name: module)
    monkeypatch.setattr(gpu_suite, "report", lambda *_: 0)
    module = SimpleNamespace(cases=cases, __file__=__file__)
    gc.disable()
    try:
        assert gpu_suite.main(["logits", "sampling", "--out", str(tmp_path)]) == 0
    finally:
        gc.enable()
    assert gpus == [torch.device("cuda", 0)] * 2


def test_a_profile_keeps_no_figure(
    suite: Suite, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    def multiply() -> Result:
        ran.append("slow one")
        torch.ones(8, 8) @ torch.ones(8, 8)
        return MISS

    cases = [Case("other", 0.0, lambda: ran.append("other") or PASS), Case("slow", 0.0, multiply)]
    suite(cases)
    before = (tmp_path / "invented.json").read_text()
    assert suite(cases, "--profile", "low") == 0
    assert ran == ["other", "slow one", "slow one"]
    assert (tmp_path / "invented.json").read_text() == before
    table = (tmp_path / "invented.profile.txt").read_text()
    assert table.startswith("slow: ") and "MISS error" in table and "aten::mm" in table
    assert suite(cases, "--profile", "none such") == 2
    assert "'none such'" in capsys.readouterr().out


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu_suite.main(["logit"])
    assert "no part 'logit'" in capsys.readouterr().err


def test_parts_fit_their_minutes() -> None:
    """By their estimates, which are made for the slower of the machines."""
    plan = Plan(torch.device("cpu"), full=True)
    for part, module in gpu_suite.PARTS.items():
        cases = __import__(module).cases(plan)
        names = [case.name for case in cases]
        assert len(set(names)) == len(names)
        assert sum(case.minutes for case in cases) <= gpu_suite.MINUTES_A_PART, part
