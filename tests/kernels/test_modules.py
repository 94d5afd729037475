"""The module against eager PyTorch in fp64 on whole logits, and against the loss of Liger."""

import itertools
from typing import Any

import pytest
import torch
from kernel_inputs import BACKENDS, DEVICE
from marks import slow
from module_inputs import (
    BIASES,
    IGNORED,
    NAMES,
    PADDED,
    PADDINGS,
    B,
    H,
    T,
    V,
    arguments,
    backward,
    eager,
    gradients,
    with_gradients,
)
from sodfast_kernels.modules import FusedLinearDistillationLoss
from torch import Tensor


def compare(given: dict[str, Any], options: dict[str, Any], **settings: Any) -> None:
    """Loss, parts and every gradient in fp64."""
    ours, plain = with_gradients(given), with_gradients(given)
    module = FusedLinearDistillationLoss(
        **options, ignore_index=IGNORED, return_parts=True, **settings
    )
    found = module(**ours)[:3]
    expected = eager(plain, **options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    backward(found[0])
    backward(expected[0])
    torch.testing.assert_close(gradients(ours), gradients(plain), rtol=1e-9, atol=1e-12)


WEIGHTS = [(0.0, 1.0), (0.7, 0.3), (0.6, 0.0)]


@pytest.mark.parametrize("shift", [True, *slow(False)])
@pytest.mark.parametrize("shape", [(B, T), *slow(((B * T,),))], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none", *slow("sum", "batchmean")])
@pytest.mark.parametrize("temperature", [1.7, *slow(1.0)])
def test_values_and_gradients_in_fp64(shift, shape, reduction, temperature):
    divergences = itertools.cycle([(0.5, None), (0.0, None), (0.3, 4), (1.0, None), (0.5, 4)])
    for biases, padding, (hard, soft) in itertools.product(BIASES, PADDINGS, WEIGHTS):
        alpha, top_k = next(divergences)
        options = {
            "alpha": alpha,
            "top_k": top_k,
            "temperature": temperature,
            "hard_weight": hard,
            "soft_weight": soft,
            "reduction": reduction,
            "shift": shift,
        }
        compare(arguments(shape, padding, biases), options, backend="torch")


FLOOR = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 3e-3}
# Temperature, top_k, reduction, type, and the rows of both heads.
CASES = [
    (1.0, None, "mean", torch.float32, (PADDED, V)),
    *slow(
        (1.7, 4, "none", torch.float32, (V, PADDED)),
        (1.7, None, "mean", torch.bfloat16, (PADDED, V)),
        (1.0, 4, "none", torch.bfloat16, (V, V)),
        (1.7, None, "batchmean", torch.float16, (V, PADDED)),
        (1.0, None, "sum", torch.bfloat16, (V, PADDED)),
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature, top_k, reduction, dtype, padding", CASES)
def test_gradients_are_those_of_fp64(backend, temperature, top_k, reduction, dtype, padding):
    """Relative to their norm; with 2H + 2 rows, so that a slab does not hold them all."""
    given = arguments((2 * H + 2,), padding, dtype=dtype)
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "reduction": reduction,
        "hard_weight": 0.3,
        "soft_weight": 0.7,
    }
    ours = with_gradients(given)
    exact = with_gradients(
        {
            name: value if value is None or name == "labels" else value.double()
            for name, value in given.items()
        }
    )
    module = FusedLinearDistillationLoss(**options, ignore_index=IGNORED, backend=backend)
    loss, expected = module(**ours), eager(exact, **options)[0]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    backward(loss)
    backward(expected)
    for found, wanted in zip(gradients(ours), gradients(exact), strict=True):
        assert found.dtype == dtype
        assert (found.double() - wanted).norm() < FLOOR[dtype] * wanted.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", *slow("sum", "none", "batchmean")])
def test_all_labels_ignored_give_no_loss_and_no_gradient(backend, reduction):
    given = arguments(dtype=torch.float32)
    given["student_hidden"].fill_(torch.nan)
    given["teacher_hidden"].fill_(torch.inf)
    given["labels"].fill_(IGNORED)
    given = with_gradients(given)
    for temperature in (1.0, 2.0):
        loss = FusedLinearDistillationLoss(
            hard_weight=1.0,
            temperature=temperature,
            ignore_index=IGNORED,
            reduction=reduction,
            backend=backend,
        )(**given)
        assert not loss.any() and loss.shape == ((B, T) if reduction == "none" else ())
        loss.sum().backward()
        assert not any(gradient.any() for gradient in gradients(given))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [2.0, *slow(1.0)])
def test_ignored_rows_may_hold_anything(backend, temperature):
    clean = arguments(dtype=torch.float32)
    broken = clean | {
        name: clean[name].masked_fill((clean["labels"] == IGNORED)[..., None], torch.nan)
        for name in ("student_hidden", "teacher_hidden")
    }
    results = []
    for given in (with_gradients(clean), with_gradients(broken)):
        loss = FusedLinearDistillationLoss(
            hard_weight=0.5, temperature=temperature, ignore_index=IGNORED, backend=backend
        )(**given)
        loss.backward()
        results.append([loss.detach(), *gradients(given)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_parts_and_statistics_have_the_shape_of_the_labels():
    given = arguments()
    module = FusedLinearDistillationLoss(
        hard_weight=0.2, ignore_index=IGNORED, shift=True, return_parts=True
    )
    loss, hard, soft, output = module(**with_gradients(given))
    torch.testing.assert_close(loss, hard + soft)
    assert output.loss is loss and loss.requires_grad
    assert not hard.requires_grad and not soft.requires_grad
    kept = given["labels"][:, 1:] != IGNORED
    for entries in output[1:]:
        assert entries.shape == (B, T - 1) and not entries.requires_grad
        assert torch.equal(entries != 0, kept)
    torch.testing.assert_close(0.2 * -output.student_logprob.sum() / kept.sum(), hard)
    torch.testing.assert_close(output.divergence.sum() / kept.sum(), soft)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_small_part_does_not_drown_in_the_other(backend, reduction):
    """In fp32, a millionth of the other, and nothing where its weight is 0."""
    given = arguments(dtype=torch.float32)
    for hard, soft in ((0.0, 1.0), (1e-6, 1.0), (1.0, 1e-6), (1.0, 0.0)):
        options = {"hard_weight": hard, "soft_weight": soft, "reduction": reduction}
        parts = FusedLinearDistillationLoss(
            **options, ignore_index=IGNORED, return_parts=True, backend=backend
        )(**given)[1:3]
        expected = eager(given, **options)[1:]
        for found, wanted in zip(parts, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_without_hard_labels_the_hard_part_is_zero(temperature):
    hard = FusedLinearDistillationLoss(
        temperature=temperature, ignore_index=IGNORED, return_parts=True
    )(**arguments(dtype=torch.float32))[1]
    assert hard == 0


def test_the_last_state_is_nowhere_with_shift():
    given = with_gradients(arguments())
    FusedLinearDistillationLoss(ignore_index=IGNORED, shift=True)(**given).backward()
    assert not given["student_hidden"].grad[:, -1].any()
    assert given["labels"].view(-1)[0] == IGNORED  # the caller's labels are as they were


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [NAMES[1], *slow(NAMES[0], NAMES[2])])
def test_only_what_requires_a_gradient_gets_one(backend, wanted):
    given = arguments(dtype=torch.float32, vocabularies=(PADDED, V))
    module = FusedLinearDistillationLoss(
        hard_weight=0.5, ignore_index=IGNORED, backend=backend, max_scratch_bytes=2**15
    )
    every = with_gradients(given)
    module(**every).backward()
    alone = given | {wanted: given[wanted].clone().requires_grad_()}
    module(**alone).backward()
    torch.testing.assert_close(alone[wanted].grad, every[wanted].grad)
    if wanted != "student_hidden":
        assert not alone[wanted].grad[V:].any()
    assert all(given[name].grad is None for name in given if given[name] is not None)


@pytest.mark.parametrize("hard", [0.0, 0.5])
def test_no_tokens(hard):
    for shape in ((0,), (0, T), (B, 0)):
        for reduction, shift in itertools.product(("mean", "batchmean", "none"), (False, True)):
            given = arguments((B * T,))
            given = with_gradients(
                given
                | {
                    "student_hidden": torch.zeros(*shape, H, dtype=torch.float64, device=DEVICE),
                    "teacher_hidden": torch.zeros(*shape, H + 1, device=DEVICE).double(),
                    "labels": torch.zeros(shape, dtype=torch.int64, device=DEVICE),
                }
            )
            loss = FusedLinearDistillationLoss(hard_weight=hard, reduction=reduction, shift=shift)(
                **given
            )
            loss.sum().backward()
            assert not loss.any() and not any(entry.any() for entry in gradients(given))


def test_autocast_casts_like_a_linear_layer():
    given = with_gradients(arguments(dtype=torch.float32))
    module = FusedLinearDistillationLoss(hard_weight=0.5, ignore_index=IGNORED)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        mixed = module(**given)
    mixed.backward()
    assert all(gradient.dtype == torch.float32 for gradient in gradients(given))
    rounded = {
        name: value if value is None or name == "labels" else value.detach().bfloat16()
        for name, value in given.items()
    }
    torch.testing.assert_close(mixed.detach(), module(**rounded))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled(backend, reduction):
    given = arguments(dtype=torch.float32, vocabularies=(PADDED, V))
    module = FusedLinearDistillationLoss(
        hard_weight=0.5, temperature=2.0, reduction=reduction, shift=True, ignore_index=IGNORED,
        backend=backend,
    )  # fmt: skip
    results = []
    for function in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
        leaves = with_gradients(given)
        loss = function(**leaves)
        loss.sum().backward()
        results.append([loss.detach(), *gradients(leaves)])
    torch.testing.assert_close(*results)


@pytest.mark.slow
@pytest.mark.triton
def test_a_label_outside_the_vocabulary_is_nan_where_it_cannot_be_checked(monkeypatch):
    """As on a GPU, where looking at it would stall."""
    monkeypatch.setattr("sodfast_kernels.modules._check_labels", lambda *_: None)
    monkeypatch.setattr("sodfast_kernels.distillation.arguments._check_ids_on_cpu", lambda *_: None)
    for temperature in (1.0, 2.0):
        given = with_gradients(arguments((B * T,), dtype=torch.float32))
        given["labels"][3] = V
        module = FusedLinearDistillationLoss(
            hard_weight=0.5, temperature=temperature, reduction="none", ignore_index=IGNORED,
            backend="triton",
        )  # fmt: skip
        loss = module(**given)
        loss.sum().backward()
        assert loss.isnan().nonzero().flatten().tolist() == [3]
        assert given["student_hidden"].grad[3].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_nothing_waits_for_the_gpu(temperature):
    given = with_gradients(arguments(dtype=torch.bfloat16))
    module = FusedLinearDistillationLoss(
        hard_weight=0.5, temperature=temperature, shift=True, ignore_index=IGNORED
    )
    module(**given).backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(**given).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "name, value",
    [
        ("alpha", -0.1),
        ("temperature", 0.0),
        ("top_k", 0),
        ("ignore_index", 1.5),
        ("hard_weight", -1.0),
        ("hard_weight", float("nan")),
        ("soft_weight", float("inf")),
        ("reduction", "average"),
        ("shift", 2),
        ("max_scratch_bytes", 0),
    ],
)
def test_an_unusable_setting_is_named_at_once(name, value):
    with pytest.raises(ValueError, match=name):
        FusedLinearDistillationLoss(**{name: value})


@pytest.mark.parametrize(
    "name, change",
    [
        ("student_hidden", lambda given: given["student_hidden"][0, 0]),
        ("student_hidden", lambda given: [1.0]),
        ("student_head", lambda given: given["student_head"][:, 1:]),
        ("teacher_hidden", lambda given: given["teacher_hidden"][:, 1:]),
        ("teacher_head", lambda given: given["teacher_head"].float()),
        ("teacher_head", lambda given: given["teacher_head"][:0]),
        ("teacher_head", lambda given: None),
        ("labels", lambda given: given["labels"].int()),
        ("labels", lambda given: given["labels"].flatten()),
        ("labels", lambda given: given["labels"].tolist()),
        ("labels", lambda given: given["labels"].clamp(min=V)),
        ("labels", lambda given: given["labels"].to("meta")),
        ("student_bias", lambda given: given["student_bias"][1:]),
        ("student_bias", lambda given: given["student_bias"].float()),
        ("student_bias", lambda given: 1.0),
        ("teacher_bias", lambda given: given["teacher_bias"][None]),
        ("teacher_bias", lambda given: given["teacher_bias"].to("meta")),
    ],
)
def test_an_unusable_argument_is_named(name, change):
    given = {
        key: value if value is None else value.cpu()
        for key, value in arguments(vocabularies=(PADDED, V)).items()
    }
    with pytest.raises(ValueError, match=name):
        FusedLinearDistillationLoss(ignore_index=IGNORED)(**given | {name: change(given)})


# ---------------------------------------------------------------- Liger's loss


def liger(given: dict[str, Any], **settings: float) -> Tensor:
    """The loss by Liger's chunks, the package of the extra `peers`."""
    chunked = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is absent")
    module = chunked.LigerFusedLinearJSDLoss(
        ignore_index=IGNORED, compiled=False, chunk_size=4, **settings
    )
    names = ("student_hidden", "student_head", "teacher_hidden", "teacher_head", "labels")
    biases = (given["student_bias"], given["teacher_bias"])
    loss: Tensor = module(*(given[name] for name in names), *biases)
    return loss


@pytest.mark.parametrize("biases", [(False, False), (True, True)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_equals_liger(alpha, temperature, biases):
    given = arguments((B * T,), biases=biases, dtype=torch.float32)
    ours, theirs = with_gradients(given), with_gradients(given)
    expected = liger(
        theirs, beta=alpha, temperature=temperature, weight_hard_loss=0.4, weight_soft_loss=0.6
    )
    loss = FusedLinearDistillationLoss(
        alpha=alpha,
        temperature=temperature,
        hard_weight=0.4,
        soft_weight=0.6,
        ignore_index=IGNORED,
    )(**ours)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=1e-4, atol=1e-6)


def bf16_errors(loss_of: Any, given: dict[str, Any], exact: list[Tensor]) -> list[float]:
    leaves = with_gradients(given)
    loss_of(leaves).backward()
    pairs = zip(gradients(leaves), exact, strict=True)
    return [float((found.double() - wanted).norm() / wanted.norm()) for found, wanted in pairs]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("peer", ["eager", "liger"])
@pytest.mark.parametrize("temperature", [1.7, *slow(1.0)])
@pytest.mark.parametrize("hard, soft", [(0.0, 1.0), (0.5, 0.5)])
def test_bf16_gradients_are_no_worse_than_a_peers(backend, peer, temperature, hard, soft):
    """The teacher is near the student, as in on-policy distillation."""
    given = arguments((32,), (200, 200), dtype=torch.bfloat16, hidden=32, drift=0.02)
    options = {"temperature": temperature, "hard_weight": hard, "soft_weight": soft}
    wide = with_gradients(
        {name: value if name == "labels" else value.double() for name, value in given.items()}
    )
    eager(wide, **options)[0].backward()
    settings = {"weight_hard_loss": hard, "weight_soft_loss": soft, "temperature": temperature}

    def theirs(leaves: dict[str, Any]) -> Tensor:
        return eager(leaves, **options)[0] if peer == "eager" else liger(leaves, **settings)

    module = FusedLinearDistillationLoss(**options, ignore_index=IGNORED, backend=backend)
    others = bf16_errors(theirs, given, gradients(wide))
    for ours, other in zip(
        bf16_errors(lambda leaves: module(**leaves), given, gradients(wide)), others, strict=True
    ):
        assert ours <= other
