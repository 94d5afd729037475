"""Would the copy be the better teacher? The student and the teacher answer the same questions.

The candidate, the student's weights as they are, and the incumbent, the teacher's, answer in the
contexts that the teacher is shown. `schedule.Evidence` decides on what the probes say.
"""

from collections.abc import Callable, Sequence
from math import ceil, fsum

from torch import Tensor

from sodfast.config import Config, EvidenceConfig
from sodfast.model.language_model import LanguageModel
from sodfast.parallel.ranks import Ranks
from sodfast.rewards import grade_answers, with_noise
from sodfast.rng import Stream, draw_key
from sodfast.rollout.engine import Engine, Sample, SampleKey, Sampling
from sodfast.tasks.base import Question, Task
from sodfast.teacher import Teacher

TAIL = 0.05  # the longest share of a step's rollouts


def is_due(config: Config, step: int) -> bool:
    """Whether the schedule looks at a probe of this step."""
    schedule = config.schedule
    return isinstance(schedule, EvidenceConfig) and step % schedule.probe_every == 0


def probe(
    config: Config,
    model: LanguageModel,
    engine: Engine,
    task: Task,
    teacher: Teacher,
    questions: Sequence[Question],
    contexts: Sequence[Tensor | None],
    step: int,
    ranks: Ranks,
    progress: Callable[[int, int], None],
) -> dict[str, float]:
    """`probe/*` of a step, but for `probe/longest`: see `schedule.ProbedStep`; beside its fields
    the rewards of both, summed over the questions, and the tokens that were drawn.

    `questions`: one for each group of the step. `contexts`: the teacher's prompts [P] of the
    groups' rollouts, one group after the other; None where there is none. The first
    `probe_questions` questions that have a context are asked, `probe_samples` times each, with the
    contexts of the group in turn. Both answer under the same keys, of a random stream of their
    own: equal weights give equal answers, so what both do alike adds no noise to their difference.

    Nothing is asked while the teacher equals the student. The student's and the teacher's weights
    are afterwards what they were. Under `teacher.storage=host` the teacher's stream to the device
    and back.
    """
    schedule = config.schedule
    assert isinstance(schedule, EvidenceConfig)
    asked, prompts = _asked(schedule, questions, contexts)
    if teacher.weights is None:
        asked, prompts = [], []
    drawn: list[list[Sample]] = [[], []]
    if prompts:
        sampling = Sampling.of(config, config.rollout)
        key = SampleKey(draw_key(config.seed, Stream.PROBE), step)
        drawn[0] = engine.generate(prompts, range(len(prompts)), sampling, key, progress)
        with teacher.in_students_place():
            drawn[1] = engine.generate(prompts, range(len(prompts)), sampling, key, progress)
    samples = drawn[0] + drawn[1]
    texts = [model.decode(sample.response) for sample in samples]
    grades = grade_answers(config, task, asked * 2, texts, ranks)
    grades = with_noise(config, step, grades, probe=True)
    rewards = _means([grade.reward for grade in grades], schedule.probe_samples)
    lengths = _means([len(sample.response) for sample in samples], schedule.probe_samples)
    count = len(rewards) // 2
    gains = [mine - other for mine, other in zip(rewards[:count], rewards[count:], strict=True)]
    return {
        "probe/questions": count,
        "probe/gain": fsum(gains),
        "probe/gain_squared": fsum(gain * gain for gain in gains),
        "probe/candidate_length": fsum(lengths[:count]),
        "probe/incumbent_length": fsum(lengths[count:]),
        "probe/candidate_reward": fsum(rewards[:count]),
        "probe/incumbent_reward": fsum(rewards[count:]),
        "probe/tokens": sum(len(sample.response) for sample in samples),
    }


def longest_mean(samples: Sequence[Sample]) -> float:
    """Mean length in tokens of the longest 5 % of the responses, at least one."""
    lengths = sorted(len(sample.response) for sample in samples)
    count = ceil(TAIL * len(lengths))
    return sum(lengths[-count:]) / count


def _asked(
    schedule: EvidenceConfig, questions: Sequence[Question], contexts: Sequence[Tensor | None]
) -> tuple[list[Question], list[Tensor]]:
    """For every answer its question and its prompt, the answers to a question one after another."""
    size = len(contexts) // len(questions)
    asked: list[Question] = []
    prompts: list[Tensor] = []
    for group, question in enumerate(questions):
        rollouts = contexts[group * size : (group + 1) * size]
        shown = [context for context in rollouts if context is not None]
        if shown and len(asked) < schedule.probe_questions * schedule.probe_samples:
            asked += [question] * schedule.probe_samples
            prompts += [shown[number % len(shown)] for number in range(schedule.probe_samples)]
    return asked, prompts


def _means(values: Sequence[float], size: int) -> list[float]:
    return [fsum(values[i : i + size]) / size for i in range(0, len(values), size)]
