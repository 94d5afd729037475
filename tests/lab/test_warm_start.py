"""The embedded lab: tokenizer, reproducible warm start, cache, and the student it leaves."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow
from safetensors.torch import load_file

from sodfast.config import ArithmeticConfig, LabConfig, load_config
from sodfast.context import reference_solution
from sodfast.lab import warm_start
from sodfast.lab.model import build_tokenizer, new_model
from sodfast.lab.warm_start import WarmStartData
from sodfast.tasks.arithmetic import ArithmeticTask, Question, question_pools

TINY = LabConfig(hidden_size=32, layers=1, heads=2, intermediate_size=64, batches=3, rows=2)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def same_bits(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    first, second = weights(left), weights(right)
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def text(ids: list[int]) -> str:
    return str(build_tokenizer().decode(ids, skip_special_tokens=False))


# What the warm start is fed.


def test_the_preset_shows_the_teacher_what_the_warm_start_showed() -> None:
    teacher = load_config("lab", []).teacher
    shown = teacher.template.format(
        prompt="1*2+3=",
        demonstration=teacher.demonstration_template.format(demonstration="2+3=5"),
        feedback="",
    )
    assert shown == warm_start.TEACHER_TEMPLATE.format(prompt="1*2+3=", demonstration="2+3=5")


def test_batches_hold_train_questions_only_and_depend_on_seed_and_index_alone() -> None:
    data = WarmStartData(LabConfig())
    test = {question.prompt for question in question_pools()[1]}
    seen = {text(e.ids).split("=")[0] + "=" for i in range(50) for r in data.batch(i) for e in r}
    assert len(seen) > 500
    assert not seen & test
    again = WarmStartData(LabConfig())
    assert [e.ids for r in again.batch(7) for e in r] == [e.ids for r in data.batch(7) for e in r]
    other = WarmStartData(LabConfig(seed=1))
    assert [e.ids for r in other.batch(7) for e in r] != [e.ids for r in data.batch(7) for e in r]


def test_demonstrated_examples_end_right_and_teach_nothing_wrong() -> None:
    task = ArithmeticTask(ArithmeticConfig(train=1104))
    answers = {question.prompt: question for question in task.train}
    data = WarmStartData(LabConfig())
    count, detours = 0, 0
    for example in (e for i in range(20) for row in data.batch(i) for e in row):
        line = text(example.ids).removesuffix("<eos>")
        if "|" not in line:
            continue
        count += 1
        before, response = line.split("|")
        prompt, demonstration = before.split("=", 1)[0] + "=", before.split("=", 1)[1]
        response = response.removeprefix(prompt)
        question = answers[prompt]
        assert task.score(question, demonstration) == task.score(question, response) == 1.0
        # A learned result is the answer, whichever pass it stands in.
        start = len(line) - len(response)
        assert all(label == -100 for label in example.labels[:start])
        for position in range(start, len(line)):
            if line[position] == "=" and example.labels[position + 1] != -100:
                assert line[position + 1 :].startswith(question.answer)
        detours += any(label == -100 for label in example.labels[start:])
    assert count > 100
    assert detours > 10


def demonstrated(data: WarmStartData, batches: int) -> list[tuple[tuple[int, int, int], str]]:
    """Operands and demonstrated response of the examples that show a right solution; what is not
    learned of a response is blank."""
    found = []
    for example in (e for i in range(batches) for row in data.batch(i) for e in row):
        before, bar, after = text(example.ids).removesuffix("<eos>").partition("|")
        if bar:
            start = len(before) + 1 + after.index("=") + 1
            learned = [label != -100 for label in example.labels[start:-1]]
            pairs = zip(after.split("=", 1)[1], learned, strict=True)
            response = "".join(c if kept or c in "?+=" else " " for c, kept in pairs)
            found.append((warm_start._operands(before.split("=")[0]), response))
    return found


@pytest.mark.slow
def test_a_stubborn_misconception_survives_its_demonstration() -> None:
    """Wrong as often as without one; all others are cured; answers are no longer for it."""
    tables = {share: WarmStartData(LabConfig(stubborn=share)) for share in (0.0, 0.5, 1.0)}
    half = tables[0.5].misconceptions
    assert len(half.stubborn_products) == 72 and len(half.stubborn_sums) == 45
    assert half.products == tables[0.0].misconceptions.products
    lengths = {}
    for share, data in tables.items():
        found = demonstrated(data, 60)
        passes = [(operands, response.split("?")) for operands, response in found]
        lengths[share] = sum(len(parts) for _, parts in passes) / len(passes)
        wrong: dict[bool, list[bool]] = {False: [], True: []}
        for (a, b, c), parts in passes:
            product, total = parts[-1].split(f"+{c}=")
            stubborn = data.misconceptions.stubborn_products
            if product.strip():
                wrong[(a, b) in stubborn].append(int(product) != a * b)
            cured = (a, b) not in stubborn
            cured &= (a * b % 10, c) not in data.misconceptions.stubborn_sums
            if cured and total.strip():
                assert int(total) == a * b + c
        assert not any(wrong[False])
        if share:
            # Mean probability of a wrong product: (0.05 + 0.9) / 2, less in later passes.
            assert 0.3 < sum(wrong[True]) / len(wrong[True]) < 0.5
    assert lengths[0.5] == pytest.approx(lengths[0.0], rel=0.05)
    assert lengths[1.0] == pytest.approx(lengths[0.0], rel=0.05)


def test_the_key_of_a_lab_without_stubbornness_is_that_of_earlier_releases() -> None:
    assert "stubborn" not in warm_start._cache_key(LabConfig())
    assert '"stubborn": 0.5' in warm_start._cache_key(LabConfig(stubborn=0.5))


@torch.no_grad()
def test_packed_rows_give_the_loss_of_separate_examples() -> None:
    model = new_model(TINY)
    rows = WarmStartData(TINY).batch(0)
    examples = [example for row in rows for example in row]
    assert len(examples) > 2 * len(rows)
    total, labelled = 0.0, 0
    for example in examples:
        logits_TV = model(input_ids=torch.tensor([example.ids])).logits[0, :-1]
        labels_T = torch.tensor(example.labels[1:])
        total += float(torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum"))
        labelled += int((labels_T != -100).sum())
    assert float(warm_start._packed_loss(model, rows)) == pytest.approx(total / labelled, rel=1e-5)


# Reproducibility and the cache.


@pytest.mark.slow
def test_two_builds_are_equal_bit_for_bit_and_leave_no_trace(tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected_next = torch.rand(1)
    torch.manual_seed(1)
    threads = torch.get_num_threads()
    first, _ = warm_start.build(TINY, tmp_path / "a")
    assert torch.equal(torch.rand(1), expected_next)
    assert torch.get_num_threads() == threads
    torch.manual_seed(2)
    torch.set_num_threads(threads + 1)
    try:
        second, _ = warm_start.build(TINY, tmp_path / "b")
    finally:
        torch.set_num_threads(threads)
    assert same_bits(first, second)
    other, _ = warm_start.build(TINY.model_copy(update={"seed": 1}), tmp_path / "a")
    assert not same_bits(first, other)
    assert len(list((tmp_path / "a").iterdir())) == 2


def test_a_second_build_loads_and_a_first_one_shows_progress(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    first, _ = warm_start.build(TINY, tmp_path, lambda *call: calls.append(call))
    assert calls == [("warm start", done, 3) for done in (1, 2, 3)]
    calls.clear()
    second, tokenizer = warm_start.build(TINY, tmp_path, lambda *call: calls.append(call))
    assert calls == []
    assert same_bits(first, second)
    assert not second.training
    assert second.lm_head.weight is second.model.embed_tokens.weight
    assert second.config.eos_token_id == tokenizer.eos_token_id


def test_the_cache_directory_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SODFAST_CACHE", str(tmp_path / "chosen"))
    warm_start.build(TINY)
    assert [path.suffix for path in (tmp_path / "chosen").iterdir()] == [".safetensors"]


def flip_a_weight(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_another_lab(path: Path) -> None:
    other = path.parent / "other"
    warm_start.build(TINY.model_copy(update={"seed": 1}), other)
    next(other.iterdir()).replace(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [empty, *slow(flip_a_weight, cut_in_half, replace_by_another_lab)],
)
def test_a_damaged_entry_is_reported_and_rebuilt(
    damage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = warm_start.build(TINY, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    sound = path.read_bytes()
    damage(path)
    assert path.read_bytes() != sound
    second, _ = warm_start.build(TINY, tmp_path)
    assert same_bits(first, second)
    assert str(path) in caplog.text
    assert "anew" in caplog.text
    caplog.clear()
    assert load_file(path).keys() == weights(first).keys()
    third, _ = warm_start.build(TINY, tmp_path)
    assert same_bits(first, third)
    assert caplog.text == ""


def test_builds_that_start_together_share_one_warm_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the trials of a sweep do. Each thread opens the directory itself, as a process would."""
    run, started = warm_start._warm_start, []

    def slow(*arguments: Any) -> None:
        started.append(1)
        others.wait(timeout=60)  # until the others wait for the lock, or soon will
        run(*arguments)

    others = threading.Barrier(3)
    built: list[Any] = []

    def build() -> None:
        if threading.current_thread() is not first:
            others.wait(timeout=60)
        built.append(warm_start.build(TINY, tmp_path)[0])

    monkeypatch.setattr(warm_start, "_warm_start", slow)
    first, *rest = [threading.Thread(target=build) for _ in range(3)]
    first.start()
    while not started:
        first.join(0.01)
    for thread in rest:
        thread.start()
    for thread in (first, *rest):
        thread.join()
    assert len(started) == 1 and len(built) == 3
    assert all(same_bits(built[0], other) for other in built[1:])


@pytest.mark.slow
def test_builds_that_race_leave_one_sound_entry(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lab-race.safetensors"
    model = new_model(TINY)
    stop = threading.Event()

    def save() -> None:
        while not stop.is_set():
            warm_start._save(model, path, "key")

    writers = [threading.Thread(target=save) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        while not path.exists():
            stop.wait(0.01)
        assert all(warm_start._load(new_model(TINY), path, "key") for _ in range(50))
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert caplog.text == ""
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_leaves_the_entry_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lab-full.safetensors"
    path.write_bytes(b"before")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        warm_start._save(new_model(TINY), path, "key")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"before"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["a file", "below a file", "no home", "full", "unwritable"])
def test_a_cache_that_cannot_be_used_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    """One line says so, and the model is the one that a sound cache would have kept."""
    expected, _ = warm_start.build(TINY, tmp_path / "sound")
    (tmp_path / "file").write_text("mine")
    chosen = {"a file": "file", "below a file": "file/below"}.get(fault, "cache")
    monkeypatch.setenv("SODFAST_CACHE", str(tmp_path / chosen))

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    if fault == "no home":
        monkeypatch.delenv("SODFAST_CACHE")
        monkeypatch.setattr("os.path.expanduser", lambda text: text)
    if fault == "full":
        monkeypatch.setattr(warm_start, "replace_bytes", refuse)
    if fault == "unwritable":
        monkeypatch.setattr(warm_start, "alone", refuse)
    monkeypatch.chdir(tmp_path)
    model, _ = warm_start.build(TINY)
    assert same_bits(model, expected)
    (record,) = caplog.records
    assert "is not cached" in record.getMessage() and "SODFAST_CACHE" in record.getMessage()
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "~").exists()


# What the default lab's student can do.


@pytest.fixture(scope="module")
def default_lab() -> Iterator[tuple[Any, Any]]:
    yield warm_start.build(LabConfig())


@torch.no_grad()
def sample(
    default_lab: tuple[Any, Any], prompts: list[str], temperature: float, top_p: float
) -> list[str]:
    model, tokenizer = default_lab
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids_BT = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=96,
            do_sample=True,
            temperature=temperature,
            top_p=top_p,
            top_k=0,
        )
    responses_BT = ids_BT[:, inputs["input_ids"].shape[1] :]
    return [str(line) for line in tokenizer.batch_decode(responses_BT, skip_special_tokens=True)]


def scores(questions: list[Question], responses: list[str]) -> torch.Tensor:
    task = ArithmeticTask(ArithmeticConfig())
    pairs = zip(questions, responses, strict=True)
    return torch.tensor([task.score(question, response) for question, response in pairs])


@pytest.mark.slow
def test_the_lab_is_small(default_lab: tuple[Any, Any]) -> None:
    model, _ = default_lab
    assert sum(parameter.numel() for parameter in model.parameters()) <= 1_000_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.model_type == "qwen3"


@pytest.mark.slow
def test_the_student_has_headroom_and_the_teacher_knows(default_lab: tuple[Any, Any]) -> None:
    questions = [question for question in question_pools()[1][:128] for _ in range(8)]
    prompts = [question.prompt for question in questions]
    evaluated = scores(questions, sample(default_lab, prompts, 0.6, 0.95))
    assert 0.25 <= float(evaluated.mean()) <= 0.60
    responses = sample(default_lab, prompts, 1.0, 1.0)
    right = scores(questions, responses)
    assert float(right.mean()) >= 0.20
    # Not one switch: questions differ in how often they are answered rightly.
    assert float(right.view(128, 8).mean(1).std()) > 0.15

    lengths = torch.tensor([len(response) + 1.0 for response in responses])  # with the end token
    config = load_config("lab", [])
    assert config.schedule.kind == "cgtr"
    assert float(lengths.mean()) * 6 <= config.rollout.max_new_tokens
    windows = lengths[:960].view(3, 320)
    tails = windows.amax(1) / windows.mean(1)
    assert float(tails.min()) <= config.schedule.max_tail_ratio  # the length gate can pass
    assert any("?" in response for response in responses)  # and length has room to move

    shown = [i for i in range(len(questions)) if right[i]]
    demonstrated = [questions[i] for i in shown]
    teacher_prompts = [
        warm_start.TEACHER_TEMPLATE.format(prompt=questions[i].prompt, demonstration=responses[i])
        for i in shown
    ]
    for temperature, top_p in ((1.0, 1.0), (0.6, 0.95)):
        informed = scores(demonstrated, sample(default_lab, teacher_prompts, temperature, top_p))
        assert float(informed.mean()) > 0.90


@pytest.mark.slow
def test_the_teacher_reads_a_partial_hint(default_lab: tuple[Any, Any]) -> None:
    """Shown the product alone, as the task's feedback does, it gets most products right, and more
    answers than without a hint, but fewer than shown a solution."""
    task = ArithmeticTask(ArithmeticConfig())
    questions = [question for question in question_pools()[1][:128] for _ in range(4)]
    responses = sample(default_lab, [question.prompt for question in questions], 1.0, 1.0)
    wrong = [
        (question, text)
        for question, text in zip(questions, responses, strict=True)
        if not task.score(question, text)
    ]
    asked = [question for question, _ in wrong]

    def mean(hints: list[str]) -> float:
        prompts = [
            question.prompt + (hint and hint + question.prompt)
            for question, hint in zip(asked, hints, strict=True)
        ]
        return float(scores(asked, sample(default_lab, prompts, 1.0, 1.0)).mean())

    unaided = mean([""] * len(wrong))
    partial = mean([str(task.feedback(question, text)) for question, text in wrong])
    solved = mean([f"{reference_solution(question)}|" for question in asked])
    assert unaided + 0.1 < partial < solved - 0.1
