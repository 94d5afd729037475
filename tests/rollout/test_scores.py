"""Log-probs of training's own forward pass beside those that a sample was drawn with."""

from dataclasses import replace

import torch

from sodfast.model.language_model import LanguageModel
from sodfast.model.packing import own_attention
from sodfast.rollout.engine import Sample
from sodfast.rollout.scores import recompute, student_scores


def drawn(lengths: list[int]) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    return [
        Sample(
            torch.randint(3, 12, (4 + index,), generator=generator),
            torch.randint(3, 12, (length,), generator=generator),
            torch.full((length,), -3.0),
            torch.full((length,), 0.5),
            index % 2 == 0,
        )
        for index, length in enumerate(lengths)
    ]


def test_recomputed_log_probs_are_the_models_and_the_drawn_ones_stay(model: LanguageModel) -> None:
    samples = drawn([5, 1, 7, 3])
    samples[1] = replace(samples[1], sampler_logprob=torch.tensor([-2.0]))
    found = recompute(model, samples, 0.7, micro_batch_tokens=16)
    for index, (old, new) in enumerate(zip(samples, found, strict=True)):
        if index == 1:  # an engine has done it already
            assert new is old
            continue
        tokens = torch.cat([old.prompt, old.response])[None]
        with torch.no_grad(), own_attention(model.network):
            logits = model.network(tokens).logits[0, len(old.prompt) - 1 : -1].double() / 0.7
        expected = logits.log_softmax(-1).gather(-1, old.response[:, None])[:, 0]
        torch.testing.assert_close(new.logprob.double(), expected, rtol=1e-4, atol=1e-5)
        assert new.behavior_logprob.equal(old.logprob) and new.entropy.equal(old.entropy)
        assert new.response is old.response and new.capped == old.capped


def test_scores_have_the_entropy_too(model: LanguageModel) -> None:
    sample = drawn([6])[0]
    (logprob, entropy), *_ = student_scores(model, [sample.prompt], [sample.response], 1.0)
    with torch.no_grad(), own_attention(model.network):
        logits = model.network(torch.cat([sample.prompt, sample.response])[None]).logits[0]
    log_s = logits[len(sample.prompt) - 1 : -1].double().log_softmax(-1)
    torch.testing.assert_close(
        entropy.double(), -(log_s.exp() * log_s).sum(-1), rtol=1e-4, atol=1e-5
    )
    assert logprob.shape == entropy.shape == (6,)
