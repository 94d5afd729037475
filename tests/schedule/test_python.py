"""A schedule of the user's own: what it decides, keeps and sees, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from sodfast.config import PythonScheduleConfig
from sodfast.errors import RunFailed, UsageError
from sodfast.schedule import Schedule, build_schedule, replay

OWN = """
from sodfast.schedule import Decision

class Own:
    def __init__(self, every=2):
        self.every, self.seen = every, []
    def observe(self, statistics):
        self.seen.append(statistics.step)
        mark = {"schedule/seen": len(self.seen), "schedule/loss": statistics.metrics["optim/loss"]}
        return Decision("keep" if statistics.step % self.every else "copy", metrics=mark)
    def state_dict(self):
        return {"seen": self.seen}
    def load_state_dict(self, state):
        self.seen = state["seen"]
"""
LINES = [
    {"step": 0, "eval/mean@2": 0.5},
    *(
        {
            "step": step,
            "reward/mean": 0.5,
            "length/mean": 3.0,
            "length/max": 4,
            "optim/loss": step / 8,
            "teacher/drift": 0.1,
            "time/step": 1.0,
            "eval/mean@2": 0.25,
        }
        for step in range(1, 6)
    ),
]


def own(folder: Path, text: str = OWN, **options: Any) -> Schedule:
    (folder / "own.py").write_text(text)
    source = f"{folder / 'own.py'}:Own"
    return build_schedule(PythonScheduleConfig(source=source, options=options))


def test_an_own_schedule_decides_and_its_age_is_counted(tmp_path: Path) -> None:
    decisions = replay(own(tmp_path, every=3), LINES)
    assert [decision.action for decision in decisions] == ["keep", "keep", "copy", "keep", "keep"]
    assert [decision.age for decision in decisions] == [1, 2, 3, 1, 2]
    assert decisions[4].metrics == {"schedule/seen": 5, "schedule/loss": 5 / 8}


def test_it_sees_what_the_line_has_when_the_teacher_is_about_to_move(tmp_path: Path) -> None:
    text = OWN.replace('{"seen": self.seen}', "dict(self.last)").replace(
        "self.seen.append(statistics.step)",
        "self.seen.append(statistics.step); self.last = statistics.metrics",
    )
    schedule = own(tmp_path, text)
    schedule.observe_line(LINES[1])
    late = ("teacher/drift", "time/step", "eval/mean@2")
    expected = {key: value for key, value in LINES[1].items() if key not in late}
    assert schedule.state_dict()["own"] == expected


def test_its_state_goes_on_and_is_a_snapshot(tmp_path: Path) -> None:
    whole, begun, resumed = (own(tmp_path) for _ in range(3))
    decisions = [whole.observe_line(line) for line in LINES[1:]]
    for line in LINES[1:4]:
        begun.observe_line(line)
    state = begun.state_dict()
    begun.observe_line(LINES[4])
    assert state == {"last_copy": 2, "own": {"seen": [1, 2, 3]}}
    resumed.load_state_dict(json.loads(json.dumps(state)))
    assert [resumed.observe_line(line) for line in LINES[4:]] == decisions[3:]


def test_after_another_schedule_it_has_seen_the_steps_or_follows_itself(tmp_path: Path) -> None:
    schedule = own(tmp_path)
    schedule.follow(LINES, {3})
    assert schedule.state_dict() == {"last_copy": 3, "own": {"seen": [1, 2, 3, 4, 5]}}
    text = OWN + "    def follow(self, lines, copies):\n        self.seen = sorted(copies)\n"
    schedule = own(tmp_path, text)
    schedule.follow(LINES, {3})
    assert schedule.state_dict() == {"last_copy": 3, "own": {"seen": [3]}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Own = 3", "TypeError"),
        ("class Other: pass", "has no 'Own'"),
        ("class Own: pass", "has no method observe"),
        ("class Own:\n    observe = state_dict = print", "has no method load_state_dict"),
        ("class Own:\n    def __init__(self, *, must): pass", "TypeError"),
        ("import nothing_of_this_name", "own.py:1: ModuleNotFoundError"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(UsageError, match=r"schedule\.source: ") as refused:
        own(tmp_path, text)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_source_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for source in (f"{tmp_path / 'none.py'}:Own", "no_such_module:Own"):
        with pytest.raises(UsageError, match=r"schedule\.source: there is no"):
            build_schedule(PythonScheduleConfig(source=source))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("1 / 0", r"own\.py:5: ZeroDivisionError: division by zero"),
        ("return 'copy'", "must return a sodfast.schedule.Decision, not 'copy'"),
        ("return Decision('move')", "action must be one of keep, copy, average"),
        ("return Decision('average', rate=2)", r"rate must lie in \[0, 1\], not 2"),
        ("return Decision('keep', gates={})", "gates are CGTR's"),
        ("return Decision('keep', metrics={'step': 1})", "begin with schedule/"),
        ("return Decision('keep', metrics={'schedule/x': float('nan')})", "finite number"),
        ("return Decision('keep', metrics={'schedule/x': 10**400})", "finite number"),
        ("return Decision('keep', metrics=[1])", r"metrics must be a dict, not '\[1\]'"),
    ],
)
def test_a_failing_step_is_one_line(tmp_path: Path, body: str, message: str) -> None:
    head = (
        "from sodfast.schedule import Decision\n\nclass Own:\n    def observe(self, statistics):\n"
    )
    schedule = own(tmp_path, f"{head}        {body}\n")
    with pytest.raises(RunFailed, match=message) as failed:
        schedule.observe_line(LINES[1])
    assert "own.py" in str(failed.value) and "\n" not in str(failed.value)


@pytest.mark.parametrize("body", ["while True: pass", "import time; time.sleep(60)"])
def test_a_call_that_hangs_fails_the_run(tmp_path: Path, body: str) -> None:
    """Neither Ctrl-C nor SIGTERM would end it: a step that has begun to move the teacher ends."""
    (tmp_path / "own.py").write_text(
        f"class Own:\n    def observe(self, statistics):\n        {body}\n"
    )
    source = f"{tmp_path / 'own.py'}:Own"
    schedule = build_schedule(PythonScheduleConfig(source=source, timeout=0.2))
    with pytest.raises(RunFailed, match=r"own\.py:3: took longer than schedule\.timeout=0\.2 sec"):
        schedule.observe_line(LINES[1])


@pytest.mark.parametrize("value", ["object()", "float('nan')"])
def test_a_state_that_is_no_json_fails(tmp_path: Path, value: str) -> None:
    schedule = own(tmp_path, OWN.replace("return {", f"return {value}, {{"))
    with pytest.raises(RunFailed, match="state_dict: must return JSON values"):
        schedule.state_dict()


def test_the_example_copies_on_a_plateau() -> None:
    source = f"{Path(__file__).parents[2] / 'examples' / 'plateau_schedule.py'}:OnPlateau"
    schedule = build_schedule(PythonScheduleConfig(source=source, options={"patience": 2}))
    rewards = [0.1, 0.3, 0.2, 0.3, 0.4, 0.1]
    lines = [{**LINES[1], "step": i, "reward/mean": r} for i, r in enumerate(rewards, 1)]
    assert [d.action for d in replay(schedule, lines)] == ["keep"] * 3 + ["copy"] + ["keep"] * 2
