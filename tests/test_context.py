"""What the teacher is shown: which questions fit, who gets which hint, and the prompt's cut."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import slow

from sodfast.config import TeacherConfig, load_config
from sodfast.context import (
    Hint,
    Questions,
    TeacherContext,
    choose_demonstrations,
    fitting_questions,
    reference_solution,
    teacher_prompts,
)
from sodfast.errors import UsageError
from sodfast.lab.model import build_tokenizer
from sodfast.model.language_model import LanguageModel
from sodfast.model.random_weights import byte_tokenizer
from sodfast.run.console import Reporter
from sodfast.run.samples import read_samples
from sodfast.tasks.arithmetic import question_pools
from sodfast.tasks.base import Grade, Question
from sodfast.tasks.build import build_task

# ---------------------------------------------------------------- demonstrations


@given(
    st.integers(1, 6).flatmap(
        lambda size: st.tuples(
            st.just(size),
            st.lists(st.sampled_from([0.0, 0.4, 0.5, 1.0]), min_size=size, max_size=size),
            st.lists(st.sampled_from([0.0, 1.0]), min_size=size, max_size=size),
        )
    ),
    st.integers(0, 2**63 - 1),
    st.integers(0, 1000),
    st.booleans(),
)
def test_a_demonstration_is_a_successful_sibling(
    groups: tuple[int, list[float], list[float]], seed: int, step: int, own: bool
) -> None:
    size, first, second = groups
    rewards = first + second
    for index, chosen in enumerate(choose_demonstrations(rewards, size, 0.5, seed, step, own)):
        group = range(index - index % size, index - index % size + size)
        siblings = [other for other in group if (other != index or own) and rewards[other] >= 0.5]
        assert chosen in siblings if siblings else chosen is None


def test_one_success_teaches_the_others_but_not_itself() -> None:
    assert choose_demonstrations([0, 1, 0, 0], 4, 0.5, 0, 1) == [1, None, 1, 1]
    assert choose_demonstrations([0, 0, 0, 0], 4, 0.5, 0, 1) == [None] * 4
    assert choose_demonstrations([1, 1], 2, 0.5, 0, 1) == [1, 0]
    assert choose_demonstrations([0, 1, 0, 0], 4, 0.5, 0, 1, demonstrate_self=True) == [1] * 4


def test_demonstrations_are_drawn_uniformly() -> None:
    counts = [0] * 5
    for step in range(3000):
        chosen = choose_demonstrations([1, 1, 0, 1, 1], 5, 0.5, 0, step)[0]
        assert chosen is not None
        counts[chosen] += 1
    assert counts[0] == counts[2] == 0
    assert all(abs(count - 1000) < 5 * 26 for count in (counts[1], counts[3], counts[4]))


# ---------------------------------------------------------------- what it sees


CHAT = (
    "{% for m in messages %}|{{ m.content }}{% endfor %}{% if add_generation_prompt %}=?{% endif %}"
)
TEMPLATES = {
    "template": "{prompt}|{demonstration}{feedback}+{prompt}*",
    "demonstration_template": "={demonstration}=",
    "feedback_template": "?{feedback}?",
}


def context(chat: bool, **changes: Any) -> TeacherContext:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT if chat else None
    model = LanguageModel(None, tokenizer, (1,), 0)
    return TeacherContext(TeacherConfig(**{**TEMPLATES, **changes}), model)


def rendered(context: TeacherContext, *arguments: Any) -> str:
    return context.model.tokenizer.decode(context.render(*arguments))


def question(prompt: str = "12", system: str | None = None) -> Question:
    return Question(prompt=prompt, answer="", system=system, id="q")


def test_the_prompt_comes_first_and_the_request_last() -> None:
    assert rendered(context(False), question(), "345", None) == "12|=345=+12*"
    assert rendered(context(True), question(), "345", None) == "|12|=345=+12*=?"
    assert rendered(context(True), question(system="9"), "3", None) == "|9|12|=3=+12*=?"


def test_feedback_has_a_section_of_its_own() -> None:
    assert rendered(context(False), question(), "345", "67") == "12|=345=?67?+12*"
    assert rendered(context(False), question(), None, "67") == "12|?67?+12*"


def test_thinking_is_not_shown() -> None:
    shown = "1<think>2\n</think>3<think>4</think> "
    assert rendered(context(False), question(), shown, None) == "12|=13=+12*"


def test_braces_in_a_text_are_text() -> None:
    text = TeacherContext(TeacherConfig(), context(False).model)
    seen: list[str] = []
    text._encode = lambda q, d, f: seen.append(d) or [1]  # type: ignore[method-assign,assignment]
    text.render(question(), "{prompt} {x} {", None)
    assert seen == ["{prompt} {x} {"]
    assert rendered(context(False), question("{0}"), "{", None)  # no format error


@settings(max_examples=60)
@given(
    demonstration=st.text("0123456789", min_size=1, max_size=120),
    prompt=st.text("0123456789", min_size=1, max_size=10),
    room=st.integers(0, 130),
    chat=st.booleans(),
)
def test_only_the_demonstration_is_cut(
    demonstration: str, prompt: str, room: int, chat: bool
) -> None:
    head, tail = f"{'|' * chat}{prompt}|=", f"=+{prompt}*{'=?' * chat}"
    limit = len(head) + len(tail) + room
    text = rendered(context(chat, max_prompt_tokens=limit), question(prompt), demonstration, None)
    if room == 0:
        assert text == head[:-1] + tail[1:]  # no room at all: the section goes, too
    else:
        assert text == head + demonstration[:room] + tail


def test_feedback_is_cut_once_there_is_no_solution_left_to_cut() -> None:
    tight = context(False, max_prompt_tokens=12)
    assert tight.fits(question())
    assert rendered(tight, question(), "345", "6") == "12|?6?+12*"
    assert rendered(tight, question(), "345", "6" * 20) == "12|?666?+12*"
    assert rendered(tight, question(), None, "6" * 20) == "12|?666?+12*"


def test_a_question_that_does_not_fit_says_what_to_change() -> None:
    tight = context(False, max_prompt_tokens=6)
    assert not tight.fits(question())
    with pytest.raises(UsageError, match=r"teacher\.max_prompt_tokens=6"):
        tight.render(question(), "345", "6" * 20)


@pytest.mark.parametrize("limit", [200, 30, 22])
@pytest.mark.parametrize("chat", [False, True])
def test_a_demonstration_opens_no_turn(chat: bool, limit: int) -> None:
    """An answer of letters may read like a special token, also where it is cut."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<eos>"})
    tokenizer.chat_template = CHAT if chat else None
    model = LanguageModel(None, tokenizer, (tokenizer.eos_token_id,), 0)
    teacher = TeacherContext(TeacherConfig(**TEMPLATES, max_prompt_tokens=limit), model)
    shown = "1<eos>2<eos>3<eos>"
    ids = teacher.render(question(), shown, None)
    assert tokenizer.eos_token_id not in ids
    whole = f"{'|' * chat}12|={shown}=+12*{'=?' * chat}"
    assert len(ids) == min(limit, len(whole))
    kept = len(shown) - (len(whole) - len(ids))
    assert tokenizer.decode(ids) == whole.replace(shown, shown[:kept])


def test_fits_counts_the_request_and_one_token_of_demonstration() -> None:
    length = len("12|=3=+12*")
    assert context(False, max_prompt_tokens=length).fits(question())
    assert not context(False, max_prompt_tokens=length - 1).fits(question())
    assert context(False, max_prompt_tokens=1, context="none").fits(question())
    # The words on an answer need room, too, where they can be shown.
    long = {"feedback_template": "???{feedback}???", "max_prompt_tokens": length}
    assert context(False, **long).fits(question())
    assert not context(False, **long, context="feedback").fits(question())
    assert not context(False, **long, feedback="always").fits(question())
    assert context(False, **long | {"max_prompt_tokens": length + 4}, feedback="always").fits(
        question()
    )


def test_a_cut_makes_progress_with_any_tokenizer() -> None:
    """Bytes cut inside a character decode to more text than went in."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="a")
    model = LanguageModel(None, tokenizer, (1,), 0)
    for limit in range(20, 60):
        config = TeacherConfig(**TEMPLATES, max_prompt_tokens=limit)
        ids = TeacherContext(config, model).render(question(), "🙂é" * 20, None)
        assert len(ids) <= limit
        assert tokenizer.decode(ids).startswith("12|") and tokenizer.decode(ids).endswith("+12*")


# ---------------------------------------------------------------- who gets which hint


ROW = {"prompt": "2+3=?", "answer": "5", "solution": "Add: 5.", "tests": "hidden"}
ASK = "Using what is shown above, answer the original question yourself."
SOLVED = "Here is a correct solution:\n\n{}\n\n"
SAID = "Feedback on an earlier attempt:\n\n{}\n\n"


def asked(row: dict[str, Any], id: str = "q") -> Question:
    return Question(row["prompt"], row.get("answer"), row.get("system"), id, columns=row)


def hints(
    questions: Sequence[Question],
    answers: Sequence[tuple[str, float, str | None]],
    *overrides: str,
    switches: dict[str, Any] | None = None,
    template: str = CHAT,
) -> list[tuple[str, int | None, str] | None]:
    """A step's hints with their prompts as text; `answers` are (text, reward, feedback), in groups
    of equal size, one for each question."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<eos>"})
    tokenizer.chat_template = template
    model = LanguageModel(None, tokenizer, (tokenizer.eos_token_id,), 0)
    model = replace(model, chat_template_kwargs=switches or {})
    count = len(answers) // len(questions)
    config = load_config("base", [f"rollout.samples_per_prompt={count}", *overrides])
    found = teacher_prompts(
        config,
        TeacherContext(config.teacher, model),
        1,
        [question for question in questions for _ in range(count)],
        [text for text, _, _ in answers],
        [Grade(reward, feedback) for _, reward, feedback in answers],
    )
    assert all(hint is None or isinstance(hint, Hint) for hint in found)
    return [hint and (hint.kind, hint.source, tokenizer.decode(hint.prompt)) for hint in found]


# One question, three rollouts: right, wrong with the task's words on it, wrong without any.
ANSWERS = [("It is 5.", 1.0, None), ("It is 6.", 0.0, "6 is too much."), ("No.", 0.0, " ")]
D, R, F, N = "demonstration", "reference", "feedback", "none"


@pytest.mark.parametrize(
    ("overrides", "kinds", "second"),
    [
        (["demonstration"], [None, D, D], SOLVED.format("It is 5.")),
        (["reference"], [R, R, R], SOLVED.format("Add: 5.")),
        (["demonstration_or_reference"], [R, D, D], SOLVED.format("It is 5.")),
        (["feedback"], [None, F, None], SAID.format("6 is too much.")),
        (["none"], [N, N, N], None),
        (
            ["demonstration", "teacher.feedback=always"],
            [None, D, D],
            SOLVED.format("It is 5.") + SAID.format("6 is too much."),
        ),
        (
            ["demonstration", "teacher.feedback=without_solution"],
            [None, D, D],
            SOLVED.format("It is 5."),
        ),
        (
            ["demonstration", "teacher.feedback=without_solution", "teacher.success_reward=2"],
            [None, F, None],
            SAID.format("6 is too much."),
        ),
        (["demonstration", "teacher.demonstrate_self=true"], [D, D, D], SOLVED.format("It is 5.")),
        (
            ["reference", "teacher.feedback=always"],
            [R, R, R],
            SOLVED.format("Add: 5.") + SAID.format("6 is too much."),
        ),
        (["reference", "teacher.feedback=without_solution"], [R, R, R], SOLVED.format("Add: 5.")),
    ],
)
def test_the_hints_of_a_golden_row(
    overrides: list[str], kinds: list[str | None], second: str | None
) -> None:
    """Who has a hint (m_i = 1), of which kind, and what the teacher of the second rollout reads."""
    found = hints([asked(ROW)], ANSWERS, f"teacher.context={overrides[0]}", *overrides[1:])
    assert [hint and hint[0] for hint in found] == kinds
    assert [hint and hint[1] for hint in found] == [0 if kind == D else None for kind in kinds]
    shown = "|2+3=?=?" if second is None else f"|2+3=?\n\n{second}{ASK}=?"
    assert found[1] is not None and found[1][2] == shown


def test_a_row_without_a_solution_has_no_reference() -> None:
    bare = asked({"prompt": "Why?"})
    found = hints([bare], ANSWERS, "teacher.context=reference", "teacher.feedback=without_solution")
    assert [hint and hint[0] for hint in found] == [None, F, None]
    found = hints([bare], ANSWERS, "teacher.context=demonstration_or_reference")
    assert [hint and hint[0] for hint in found] == [None, D, D]
    thought = asked({"prompt": "Why?", "solution": "<think>because</think>"})
    assert hints([thought], ANSWERS, "teacher.context=reference") == [None] * 3


@pytest.mark.parametrize(
    ("overrides", "kinds"),
    [
        (["demonstration"], [None, None]),
        (["demonstration", "teacher.feedback=without_solution"], [None, F]),
        (["demonstration_or_reference"], [R, R]),
        (["demonstration", "teacher.demonstrate_self=true"], [None, None]),
    ],
)
def test_an_answer_that_is_nothing_but_thoughts_is_no_demonstration(
    overrides: list[str], kinds: list[str | None]
) -> None:
    thoughts = "<think>It is 5.</think>"
    keys = [f"teacher.context={overrides[0]}", *overrides[1:]]
    found = hints([asked(ROW)], [(thoughts, 1.0, None), ("No.", 0.0, "no number")], *keys)
    assert [hint and hint[0] for hint in found] == kinds
    answers = [(thoughts, 1.0, None), ("No.", 0.0, None), ("It is 5.", 1.0, None)]
    found = hints([asked(ROW)], answers, *keys)
    assert [hint and hint[1] for hint in found][:2] == [2, 2]


@pytest.mark.parametrize(
    ("row", "solution"),
    [
        ({"solution": "s", "answer": "a"}, "s"),
        ({"answer": "a"}, "a"),
        ({"solution": None, "answer": "a"}, "a"),
        ({"solution": " ", "answer": "a"}, "a"),
        ({"solution": "", "answer": ""}, None),
        ({}, None),
        ({"answer": 0}, "0"),
        ({"answer": 0.5}, "0.5"),
        (
            {"answer": [{"Action": "é", "Action_Input": {"n": 1}}]},
            '[{"Action": "é", "Action_Input": {"n": 1}}]',
        ),
    ],
)
def test_a_solution_is_the_field_of_that_name_or_else_the_answer(
    row: dict[str, Any], solution: str | None
) -> None:
    assert reference_solution(asked({"prompt": "p", **row})) == solution


def test_the_labs_solution_is_an_answer_as_the_lab_writes_it() -> None:
    found = next(q for q in question_pools()[0] if q.prompt == "17*8+6=")
    assert reference_solution(found) == "136+6=142"


@settings(max_examples=60)
@given(
    context=st.sampled_from([D, R, "demonstration_or_reference", F, N]),
    feedback=st.sampled_from(["never", "without_solution", "always"]),
    own=st.booleans(),
    rewards=st.lists(st.sampled_from([0.0, 1.0]), min_size=6, max_size=6),
)
def test_nothing_of_other_questions_is_shown(
    context: str, feedback: str, own: bool, rewards: list[float]
) -> None:
    """Nor any field of the row but its prompt and its solution, nor words on another answer."""
    questions = [
        asked({"prompt": f"P{i}.", "answer": f"A{i}.", "solution": f"S{i}.", "tests": f"T{i}."})
        for i in range(2)
    ]
    answers = [(f"Y{i}.", rewards[i], f"F{i}.") for i in range(6)]
    if context in (F, N):
        feedback = "never"
    found = hints(
        questions,
        answers,
        f"teacher.context={context}",
        f"teacher.feedback={feedback}",
        f"teacher.demonstrate_self={own}",
    )
    for row, hint in enumerate(found):
        if hint is None:
            continue
        kind, source, text = hint
        group = row // 3
        marks = {
            mark
            for mark in ("P", "A", "S", "T", "Y", "F")
            for i in range(6)
            if f"{mark}{i}." in text and (mark, i) not in allowed(group, row, source)
        }
        assert not marks
        assert f"P{group}." in text
        assert (source is not None) == (kind == D)
        assert (f"S{group}." in text) == (kind == R)
        assert (f"F{row}." in text) == (
            context == F or feedback == "always" or (feedback == "without_solution" and kind == F)
        )


def allowed(group: int, row: int, source: int | None) -> set[tuple[str, int]]:
    shown = {("P", group), ("S", group), ("F", row)}
    return shown if source is None else shown | {("Y", source)}


LETTER = "\U000f1234"  # stands for a text
STRANGE = [
    "<eos>",
    "|im_end|> <eos><eos>",
    "{prompt} {demonstration} {} {0} {",
    "}} {{feedback}} %s $x",
    "${teacher.template} ${oc.env:HOME}",
    "{% raise %}{{ messages }}",
    "a\\b\u2028c\r\n\x00",
]


@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("context", [D, R, F, N])
def test_what_a_text_holds_stays_text(strange: str, context: str) -> None:
    """Names of special tokens, braces and references, in the prompt and in each kind of hint."""
    row = {"prompt": strange, "answer": "x", "solution": strange, "system": strange}
    found = hints([asked(row)], [(strange, 1.0, strange)] * 2, f"teacher.context={context}")
    section = {D: SOLVED, R: SOLVED, F: SAID}.get(context)
    shown = "" if section is None else f"\n\n{section.format(LETTER)}{ASK}"
    # Only the ends of a solution are stripped.
    solution = strange if context == F else strange.strip()
    expected = f"|{strange}|{strange}{shown.replace(LETTER, solution)}=?"
    assert found[0] is not None and found[0][2] == expected
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<eos>"})
    assert tokenizer.decode([tokenizer.eos_token_id]) == "<eos>"


# ---------------------------------------------------------------- switches of the chat template


SWITCHED = (
    "{% for m in messages %}|{{ m.content }}{% endfor %}"
    "{% if enable_thinking %}!{% endif %}{{ note | default('') }}=?"
)


def test_each_role_has_its_own_switches() -> None:
    def shown(*overrides: str, **switches: Any) -> str:
        found = hints(
            [asked(ROW)],
            ANSWERS,
            "teacher.context=none",
            *overrides,
            switches=switches,
            template=SWITCHED,
        )
        assert found[0] is not None
        return found[0][2]

    teacher = "teacher.chat_template_kwargs="
    assert shown() == "|2+3=?=?"
    assert shown(enable_thinking=True) == "|2+3=?!=?"  # the student's, unless it has its own
    assert shown(teacher + "{}", enable_thinking=True) == "|2+3=?=?"
    assert shown(teacher + "{enable_thinking: true}") == "|2+3=?!=?"
    assert shown(teacher + "{note: now}", enable_thinking=True) == "|2+3=?now=?"


def test_a_thought_that_the_template_opens_is_not_shown() -> None:
    thinking = SWITCHED.replace("!", "<think>\n").replace("=?", "")
    answers = [("hm</think>\n5", 1.0, None), ("6", 0.0, None)]
    for opened, text in ((True, "5"), (False, "hm</think>\n5")):
        found = hints(
            [asked(ROW)],
            answers,
            "teacher.chat_template_kwargs={}",
            switches={"enable_thinking": opened},
            template=thinking,
        )
        assert found[1] is not None and found[1][2] == f"|2+3=?\n\n{SOLVED.format(text)}{ASK}"


# ---------------------------------------------------------------- which questions fit


def fitting(model: LanguageModel, *overrides: str) -> tuple[Questions, list[str]]:
    """What is left of eight questions, of 5 to 7 tokens, and what the user is told."""
    said: list[str] = []
    reporter = Reporter()
    reporter.message = said.append  # type: ignore[method-assign,assignment]
    config = load_config("lab", ["task.train=40", "task.test=8", *overrides])
    return fitting_questions(config, model, build_task(config.task), reporter), said


def test_questions_that_fit_are_all_kept(model: LanguageModel) -> None:
    found, said = fitting(model)
    assert (len(found.train), len(found.test), found.dropped, said) == (40, 8, 0, [])
    assert found.longest == max(len(q.prompt) for q in [*found.train, *found.test]) == 7


@pytest.mark.parametrize(
    "override", ["rollout.max_prompt_tokens=6", "teacher.max_prompt_tokens=15"]
)
def test_what_exceeds_a_limit_is_dropped_and_said(model: LanguageModel, override: str) -> None:
    """The student's limit, or the teacher's: `prompt|=x+prompt` with its demonstration."""
    whole, _ = fitting(model)
    found, said = fitting(model, override)
    assert 0 < len(found.train) < 40 and 0 < len(found.test) < 8
    for kept, questions in ((found.train, whole.train), (found.test, whole.test)):
        assert kept == [q for q in questions if len(q.prompt) <= found.longest]
    assert found.dropped == 48 - len(found.train) - len(found.test)
    assert said == [
        f"task.train: dropped {40 - len(found.train)} of 40 prompts as too long",
        f"task.test: dropped {8 - len(found.test)} of 8 prompts as too long",
    ]


class Asked:
    """A task of these questions."""

    def __init__(self, *prompts: str) -> None:
        self.train = [question(prompt) for prompt in prompts]
        self.test = [question("1+1=")]


def test_a_prompt_beyond_all_limits_is_not_even_encoded(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = LanguageModel.encode

    def counted(self: LanguageModel, prompt: str, *others: Any) -> list[int]:
        encoded.append(len(prompt))
        return encode(self, prompt, *others)

    monkeypatch.setattr(LanguageModel, "encode", counted)
    config = load_config("lab", [])
    found = fitting_questions(config, model, Asked("2+2=", "1" * 10**8), Reporter())  # type: ignore[arg-type]
    assert (len(found.train), found.dropped) == (1, 1)
    assert encoded and max(encoded) < 100


def test_solutions_that_are_asked_for_must_be_there(model: LanguageModel) -> None:
    def fit(*solutions: str | None) -> list[str]:
        said: list[str] = []
        reporter = Reporter()
        reporter.message = said.append  # type: ignore[method-assign,assignment]
        task = Asked(*["1+1="] * len(solutions))
        task.train = [replace(question("1+1="), answer=solution) for solution in solutions]
        config = load_config("lab", ["teacher.context=reference"])
        fitting_questions(config, model, task, reporter)  # type: ignore[arg-type]
        return said

    assert fit("2", "2") == []
    assert fit("2", None, "") == [
        "task.train: 2 of 3 questions have no solution to show the teacher"
    ]
    with pytest.raises(UsageError, match=r"teacher\.context=reference: .*task\.columns\.solution"):
        fit(None, "")


def test_some_question_must_be_there_at_the_first_step(model: LanguageModel) -> None:
    task = Asked("1+1=", "1+2=")
    config = load_config("lab", [])
    task.train = [replace(one, arrival=step) for one, step in zip(task.train, (9, 1), strict=True)]
    assert fitting_questions(config, model, task, Reporter()).train == task.train  # type: ignore[arg-type]
    task.train = [replace(one, arrival=2) for one in task.train]
    with pytest.raises(UsageError, match=r"task\.train: no question arrives by step 1"):
        fitting_questions(config, model, task, Reporter())  # type: ignore[arg-type]


def test_a_question_that_is_no_text_is_named(model: LanguageModel) -> None:
    config = load_config("lab", [])
    with pytest.raises(UsageError, match=r"task\.train: question q: .*surrogate pair"):
        fitting_questions(config, model, Asked("1\ud800"), Reporter())  # type: ignore[arg-type]


def test_a_prompt_and_its_answer_must_have_positions(model: LanguageModel) -> None:
    positions = model.network.config.max_position_embeddings
    assert fitting(model, f"rollout.max_new_tokens={positions - 7}")[0].longest == 7
    with pytest.raises(UsageError, match=rf"{positions} positions: lower rollout\.max_new_tokens"):
        fitting(model, f"rollout.max_new_tokens={positions - 6}")


def test_long_prompts_are_dropped_and_counted(train: Callable[..., Any], tmp_path: Path) -> None:
    train_pool, test_pool = question_pools()
    asked = [*train_pool[:48], *test_pool[:8]]
    long = sum(len(question.prompt) > 6 for question in asked)
    assert 0 < long < len(asked)
    run = train(tmp_path / "run", "rollout.max_prompt_tokens=6", "steps=2")
    assert run.summary["dropped_prompts"] == long


def test_a_run_without_any_fitting_prompt_writes_nothing(
    build: Callable[..., Any], tmp_path: Path
) -> None:
    for key in ("rollout.max_prompt_tokens=3", "teacher.max_prompt_tokens=9"):
        with pytest.raises(UsageError, match="max_prompt_tokens"):
            build(tmp_path / "run", key)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("context", ["feedback", *slow("reference")])
def test_a_run_shows_what_the_configuration_says(
    context: str, train: Callable[..., Any], tmp_path: Path
) -> None:
    """The lab's task has words on every wrong answer, and a solution of every question."""
    run = train(tmp_path / "run", f"teacher.context={context}", "steps=2")
    for line in run.lines[1:]:
        shown = 1.0 if context == "reference" else 1 - line["reward/mean"]
        assert line["distill/reprompt_fraction"] == pytest.approx(shown)
        assert line["distill/divergence"] > 0


def test_nothing_of_the_test_set_is_shown(train: Callable[..., Any], tmp_path: Path) -> None:
    """A run that asks each of its questions, evaluates in between, and shows every kind of hint."""
    prompt, solution = "97*86=", "8342975316"
    rows = {
        "train": [{"prompt": f"{i}*3=", "solution": f"{i}{i}"} for i in range(2, 6)],
        "test": [{"prompt": prompt, "solution": solution, "id": "tested"}],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (tmp_path / "own_reward.py").write_text(
        "def reward(prompts, completions, solution):\n"
        "    return [(float(i % 4 == 0), words) for i, words in enumerate(solution)]\n"
    )
    train(
        tmp_path / "run",
        "task.name=python",
        f"task.source={tmp_path / 'own_reward.py'}:reward",
        *(f"task.{name}={tmp_path / name}.jsonl" for name in rows),
        *("teacher.context=demonstration_or_reference", "teacher.feedback=always"),
        *("steps=2", "eval.every=1", "log.samples_every=1"),
    )
    (evaluated, *_) = read_samples(tmp_path / "run", 1, evaluation=True)
    assert [evaluated[key] for key in ("prompt", "feedback", "id")] == [prompt, solution, "tested"]
    shown = [row for step in (1, 2) for row in read_samples(tmp_path / "run", step)]
    assert {row["hint"] for row in shown} == {"demonstration", "reference"}
    for row in shown:
        assert solution[:2] not in row["feedback"] and row["feedback"] in row["teacher_prompt"]
        for text in (row["prompt"], row["teacher_prompt"], row["id"]):
            assert not [mark for mark in (prompt, solution, "tested") if mark in text]


@pytest.mark.parametrize("role", ["model", "teacher"])
def test_a_model_without_a_chat_template_takes_no_switches(
    role: str, build: Callable[..., Any], tmp_path: Path
) -> None:
    key = f"{role}.chat_template_kwargs"
    with pytest.raises(UsageError, match=rf"^{key}: .* leave it out$"):
        build(tmp_path / "run", f"{key}={{enable_thinking: true}}")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_switches_of_both_roles_reach_their_prompts(
    build: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking %}?{% endif %}"
    )
    switched = [f"model.path={folder}", "model.chat_template_kwargs={enable_thinking: true}"]
    own = "teacher.chat_template_kwargs={enable_thinking: false}"
    trainer = build(tmp_path / "run", *switched, own, "teacher.context=none")
    rollouts = trainer._rollout(1)
    trainer.run.close()
    decode = trainer.model.decode
    questions = [question.prompt for question in rollouts.questions for _ in range(4)]
    assert [decode(sample.prompt) for sample in rollouts.samples] == [q + "?" for q in questions]
    assert [decode(hint.prompt) for hint in rollouts.contexts] == questions
    for role in ("model", "teacher"):
        key = f"{role}.chat_template_kwargs"
        with pytest.raises(UsageError, match=f"^{key}: .* switch 'thinking'"):
            build(tmp_path / "other", *switched, f"{key}={{thinking: true}}")
    assert not (tmp_path / "other").exists()
