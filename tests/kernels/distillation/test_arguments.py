"""The arguments of the objective: what is refused, the defaults, and how a call is packed."""

import inspect

import pytest
import torch
from sodfast_kernels import distillation_loss, linear_distillation_loss
from sodfast_kernels.distillation.arguments import (
    Call,
    Objective,
    Sides,
    check_settings,
    check_tokens,
    packed_schema,
)

N, H, V = 5, 4, 13


def hidden_and_head(seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator, requires_grad=True)
    head = torch.randn(V, H, generator=generator, requires_grad=True)
    return hidden, head, torch.randn(N, H, generator=generator), head.detach().clone()


IDS = torch.arange(N)
ONES = torch.ones(N)


@pytest.mark.parametrize(
    "name, given",
    [
        ("alpha", {"alpha": 1.5}),
        ("temperature", {"temperature": 0.0}),
        ("softcap", {"softcap": -1.0}),
        ("top_k", {"top_k": 0}),
        ("top_k", {"top_k": 2.0}),
        ("add_tail", {"add_tail": 1}),
        ("clip_range", {"clip_range": (-0.1, 0.2)}),
        ("dual_clip", {"dual_clip": 1.0}),
        ("ratio_cap", {"ratio_cap": 0.0, "target_ids": IDS, "old_logprob": -ONES}),
        ("target_ids", {"advantage": ONES}),
        ("target_ids", {"old_logprob": ONES}),
        ("old_logprob", {"ratio_cap": 2.0, "target_ids": IDS}),
        ("advantage", {"policy_weight": ONES, "target_ids": IDS}),
        ("target_ids", {"target_ids": IDS.int()}),
        ("target_ids", {"target_ids": IDS + V - 1}),
        ("target_ids", {"target_ids": IDS[:-1]}),
        ("distill_weight", {"distill_weight": torch.ones(N, 1)}),
        ("distill_weight", {"distill_weight": IDS}),
        ("distill_weight", {"distill_weight": ONES.to("meta")}),
        ("reduction", {"reduction": "mean"}),
        ("backend", {"backend": "cuda"}),
        ("max_scratch_bytes", {"max_scratch_bytes": 0}),
        ("max_scratch_bytes", {"max_scratch_bytes": 10}),
        ("teacher_hidden", {"teacher_topk": (IDS[:, None], -ONES[:, None])}),
        ("student_head", {"student_head": torch.randn(V, H + 1)}),
        ("student_head", {"student_head": torch.randn(V, H).bfloat16()}),
        ("teacher_head", {"teacher_head": torch.randn(V + 1, H)}),
        ("teacher_head", {"teacher_head": None}),
        ("teacher_hidden", {"teacher_hidden": torch.randn(N + 1, H)}),
        ("student_hidden", {"student_hidden": torch.randn(N, H).int()}),
        ("student_hidden", {"student_hidden": torch.randn(H)}),
    ],
)
def test_an_unusable_argument_is_named(name, given):
    names = ("student_hidden", "student_head", "teacher_hidden", "teacher_head")
    arguments = dict(zip(names, hidden_and_head(), strict=True)) | given
    with pytest.raises(ValueError, match=name):
        linear_distillation_loss(**arguments)


def test_student_and_teacher_of_different_vocabulary():
    with pytest.raises(ValueError, match="teacher_logits must have vocabulary"):
        distillation_loss(torch.randn(2, 8), torch.randn(2, 9))


@pytest.mark.parametrize("function", [distillation_loss, linear_distillation_loss])
def test_the_defaults_stand_in_one_way_only(function):
    """Both public signatures repeat the fields of Objective, in order, for the users' editors."""
    signature = inspect.signature(function).parameters.values()
    keywords = {p.name: p.default for p in signature if p.kind is p.KEYWORD_ONLY}
    assert keywords == Objective._field_defaults and tuple(keywords) == Objective._fields


def call(**objective):
    sides = Sides(torch.randn(N, V), None, torch.randn(N, V), None, None, None)
    given = Objective(**objective)
    tokens = check_tokens(given, sides)
    return Call(sides, tokens, check_settings(given, sides), None, True, False)


def test_a_packed_call_comes_back_as_it_was():
    given = call(target_ids=IDS, advantage=ONES, softcap=3.0, top_k=4, max_scratch_bytes=9)
    packed = given.pack()
    assert all(a is b for a, b in zip(packed, Call.unpack(packed).pack(), strict=True))
    assert Call.unpack(packed).settings == given.settings
    names = [entry.split()[1] for entry in packed_schema().split(", ")]
    parts = (given.sides, given.tokens, given.settings)
    assert names == [name for part in parts for name in part._fields] + [*Call._fields[3:]]


def test_defaults_are_filled_in():
    tokens = call(target_ids=IDS, advantage=ONES).tokens
    uniform = torch.full((N,), 1 / N)
    assert torch.equal(tokens.distill_weight, uniform)
    assert torch.equal(tokens.policy_weight, uniform)
    assert call().tokens.policy_weight is None


@pytest.mark.parametrize("top_k, kept", [(None, None), (V, None), (V + 1, None), (V - 1, V - 1)])
def test_a_top_k_of_everything_is_the_full_vocabulary(top_k, kept):
    assert call(top_k=top_k).settings.top_k == kept


def test_rows_with_any_weight_are_active():
    weights = {"distill_weight": torch.tensor([1.0, 0, 0, 1, 0])}
    assert call(**weights).tokens.active.tolist() == [True, False, False, True, False]
    weights |= {"policy_weight": torch.tensor([0.0, 1, 0, 1, 0])}
    tokens = call(**weights, target_ids=IDS, advantage=ONES).tokens
    assert tokens.active.tolist() == [True, True, False, True, False]
    assert tokens.rows(slice(1, 3)).active.tolist() == [True, False]


def test_of_heads_with_different_padding_the_smaller_one_is_the_vocabulary():
    student, teacher = torch.zeros(V + 3, H), torch.zeros(V, H)
    hidden, bias = torch.zeros(N, H), torch.arange(V + 3.0)
    sides = Sides(hidden, student, hidden, teacher, None, None, student_bias=bias)
    assert sides.vocabulary == V
    head, cut = sides.student_layer
    assert head.shape == (V, H) and head.data_ptr() == student.data_ptr()
    assert torch.equal(cut, bias[:V])
    assert sides.teacher_layer[0].shape == (V, H) and sides.teacher_layer[1] is None
    swapped = Sides(hidden, teacher, hidden, student, None, None, teacher_bias=bias)
    assert swapped.vocabulary == V and torch.equal(swapped.teacher_layer[1], bias[:V])


def test_a_policy_weight_without_advantages_is_that_of_labels():
    assert not call().tokens.has_labels and not call(target_ids=IDS).labels_apart
    policy = call(target_ids=IDS, advantage=ONES, temperature=2.0)
    assert not policy.tokens.has_labels and not policy.labels_apart
    for temperature in (1.0, 2.0):
        given = call(target_ids=IDS, temperature=temperature)
        labelled = given._replace(tokens=given.tokens._replace(policy_weight=ONES))
        assert labelled.tokens.has_labels and labelled.labels_apart == (temperature != 1)
