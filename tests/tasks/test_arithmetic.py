"""The generated task: its questions, their split, its scorer."""

import re

import pytest

from sodfast.config import ArithmeticConfig, ArrivalConfig
from sodfast.errors import UsageError
from sodfast.tasks import build_task
from sodfast.tasks.arithmetic import ArithmeticTask, question_pools


@pytest.fixture(scope="module")
def task() -> ArithmeticTask:
    return ArithmeticTask(ArithmeticConfig())


def test_the_pools_hold_every_question_once() -> None:
    train, test = question_pools()
    prompts = [question.prompt for question in (*train, *test)]
    assert len(set(prompts)) == len(prompts) == 18 * 8 * 9
    assert len({question.id for question in (*train, *test)}) == len(prompts)


def test_answers_are_right_and_the_split_is_fixed() -> None:
    train, test = question_pools()
    for question in (*train, *test):
        a, b, c = (int(number) for number in re.findall("[0-9]+", question.prompt))
        assert question.prompt == f"{a}*{b}+{c}="
        assert question.answer == str(a * b + c)
        assert question.columns == {"solution": f"{a * b}+{c}={a * b + c}"}
    # A new split would make every published figure of the lab incomparable.
    assert [question.prompt for question in test[:3]] == ["18*5+9=", "2*2+4=", "15*4+6="]


def test_counts_take_the_beginning_of_each_pool(task: ArithmeticTask) -> None:
    small = build_task(ArithmeticConfig(train=10, test=5))
    assert list(small.train) == list(task.train)[:10]
    assert list(small.test) == list(task.test)[:5]
    assert not {q.prompt for q in task.train} & {q.prompt for q in task.test}


def test_a_later_phase_has_the_largest_left_factors(task: ArithmeticTask) -> None:
    later = ArithmeticTask(ArithmeticConfig(arrival=ArrivalConfig(step=100, share=0.5)))
    for question in later.train:
        left = int(question.prompt.partition("*")[0])
        assert question.arrival == (100 if left >= 11 else 0)  # of 2 to 19
    assert [q.prompt for q in later.train] == [q.prompt for q in task.train]
    assert list(later.test) == list(task.test)
    assert not any(question.arrival for question in task.train)
    few = {q.arrival for q in later.train if q.prompt.startswith(("19*", "18*", "17*"))}
    assert few == {100}
    rare = ArithmeticTask(ArithmeticConfig(arrival=ArrivalConfig(step=9, share=0.1)))
    assert {q.prompt[:2] for q in rare.train if q.arrival} == {"18", "19"}


@pytest.mark.parametrize("counts", [{"train": 1105}, {"test": 193}])
def test_more_questions_than_there_are_is_a_usage_error(counts: dict[str, int]) -> None:
    key, count = next(iter(counts.items()))
    with pytest.raises(UsageError, match=rf"task\.{key}={count}.*{count - 1}"):
        ArithmeticTask(ArithmeticConfig(**counts))


@pytest.mark.parametrize(
    ("response", "extracted"),
    [
        ("136+6=142", "142"),
        ("142", None),  # no result at all
        ("=142", "142"),
        ("128+6=134?136+6=142", "142"),  # the last pass counts
        ("136+6=142?128+6=134", "134"),
        ("136+6=142?136+6=14", "14"),  # cut at the cap, in a number
        ("136+6=142?136+6=", None),  # cut before it
        ("136+6=142?", None),
        ("136+6=142?136", None),
        ("136+6=0142", "142"),
        ("136+6=000", "0"),
        ("136+6==142", "142"),
        ("136+6=142\n", None),
        ("136+6=14 2", None),
        ("136+6=١٤٢", None),  # digits, but not of the vocabulary
        ("=" + "9" * 5000, "9" * 5000),
        ("", None),
    ],
)
def test_extract(task: ArithmeticTask, response: str, extracted: str | None) -> None:
    assert task.extract(response) == extracted


def test_score_compares_the_extracted_answer(task: ArithmeticTask) -> None:
    question = next(q for q in question_pools()[0] if q.prompt == "17*8+6=")
    assert task.score(question, "136+6=142") == 1.0
    assert task.score(question, "1+1=2?136+6=142") == 1.0
    assert task.score(question, "136+6=142?1+1=2") == 0.0
    assert task.score(question, "142") == 0.0


def test_feedback_on_a_wrong_answer_is_the_product_and_what_is_left_to_do(
    task: ArithmeticTask,
) -> None:
    question = next(q for q in question_pools()[0] if q.prompt == "17*8+6=")
    assert task.feedback(question, "136+6=142") is None
    for wrong in ("142", "128+6=134", "136+6=132", "136+6=142?128+6=134", ""):
        assert task.feedback(question, wrong) == "136+6=|"
