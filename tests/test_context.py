"""What the teacher is shown: which questions fit, who gets which hint, and the prompt's cut."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sodfast.config import TeacherConfig, load_config
from sodfast.context import Questions, TeacherContext, choose_demonstrations, fitting_questions
from sodfast.errors import UsageError
from sodfast.lab.model import build_tokenizer
from sodfast.model.load import LanguageModel
from sodfast.model.random_weights import byte_tokenizer
from sodfast.run.console import Reporter
from sodfast.tasks.arithmetic import question_pools
from sodfast.tasks.base import Question
from sodfast.tasks.build import build_task

# ---------------------------------------------------------------- demonstrations


@given(
    st.integers(2, 6).flatmap(
        lambda size: st.tuples(
            st.just(size),
            st.lists(st.sampled_from([0.0, 0.4, 0.5, 1.0]), min_size=size, max_size=size),
            st.lists(st.sampled_from([0.0, 1.0]), min_size=size, max_size=size),
        )
    ),
    st.integers(0, 2**63 - 1),
    st.integers(0, 1000),
)
def test_a_demonstration_is_a_successful_sibling(
    groups: tuple[int, list[float], list[float]], seed: int, step: int
) -> None:
    size, first, second = groups
    rewards = first + second
    for index, chosen in enumerate(choose_demonstrations(rewards, size, 0.5, seed, step)):
        group = range(index - index % size, index - index % size + size)
        siblings = [other for other in group if other != index and rewards[other] >= 0.5]
        assert chosen in siblings if siblings else chosen is None


def test_one_success_teaches_the_others_but_not_itself() -> None:
    assert choose_demonstrations([0, 1, 0, 0], 4, 0.5, 0, 1) == [1, None, 1, 1]
    assert choose_demonstrations([0, 0, 0, 0], 4, 0.5, 0, 1) == [None] * 4
    assert choose_demonstrations([1, 1], 2, 0.5, 0, 1) == [1, 0]


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


@settings(max_examples=60, deadline=None)
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


def test_a_feedback_that_does_not_fit_says_what_to_change() -> None:
    tight = context(False, max_prompt_tokens=12)
    assert tight.fits(question())
    with pytest.raises(UsageError, match=r"teacher\.max_prompt_tokens=12"):
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
