"""What the phases allocate on tensors without memory, and how it is added up."""

import json
from typing import Any

import pytest
import torch
from architectures import gemma, qwen
from kernel_inputs import DEVICE
from marks import slow
from rollouts import tiny
from sodfast_kernels import linear_distillation_loss, linear_scratch_bytes
from sodfast_kernels.distillation import torch_path
from sodfast_kernels.distillation.arguments import Call, Settings, Sides, Tokens

from sodfast.config import load_config
from sodfast.memory import trace
from sodfast.memory.network import empty_network
from sodfast.memory.trace import LiveBytes, depths, peak, prefill, scoring, training
from sodfast.rollout.admission import Draw
from sodfast.rollout.batch import Batch
from sodfast.rollout.decoder import Decoder
from sodfast.rollout.engine import SampleKey, Sampling

# ---------------------------------------------------------------- what is counted


def test_live_bytes_counts_storages_once_and_while_they_live() -> None:
    known = torch.zeros(1000)
    with LiveBytes([known]) as live:
        a = torch.zeros(100)
        b = a.view(10, 10)[2:]
        del a
        known.add_(1)
        known.view(10, 100)
        assert live.take_peak() == 400
        del b
        c = torch.zeros(50)
        assert live.take_peak() == 400  # what there was when the last peak was taken
        del c
        assert live.take_peak() == 200
        assert live.take_peak() == 0


def test_live_bytes_adds_what_an_operator_takes_for_itself() -> None:
    a = torch.zeros(100)
    scratch = {torch.ops.aten.add.Tensor: lambda left, right: 7 * left.numel()}
    with LiveBytes([a], scratch) as live:
        b = a + a
        assert live.take_peak() == b.nbytes + 700
        b.mul_(2)
        assert live.take_peak() == b.nbytes


# ---------------------------------------------------------------- the objective's own buffers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [None, 20])
@pytest.mark.parametrize("rows", [7, 900])
def test_the_objectives_buffers_on_a_cpu_are_bounded(
    dtype: torch.dtype, top_k: int | None, rows: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    sides = [
        torch.randn(count, 32, generator=generator).to(dtype) for count in (rows, 4000, rows, 4000)
    ]
    sides[0].requires_grad_()
    sides[1].requires_grad_()
    weight = torch.full((rows,), 1 / rows)
    settings = Settings(0.5, 1.0, None, top_k, True, 0.2, 0.28, None, None, False, None)
    with LiveBytes([*sides, weight]) as live, torch.no_grad():
        results = torch_path.evaluate(
            Call(
                Sides(*sides, None, None),
                Tokens(weight, None, None, None, None),
                settings,
                None,
                True,
                True,
            )
        )
        taken = live.take_peak() - sum(result.nbytes for result in results)
    bound = linear_scratch_bytes(*sides, top_k=top_k, backend="torch")
    assert 0.5 * bound < taken <= bound


@pytest.mark.parametrize("top_k", [20, *slow(None)])
@pytest.mark.parametrize(
    ("triton", "dtype"),
    # Off a GPU, products of 16-bit matrices copy them into fp32.
    [(False, torch.float32), *slow((False, torch.bfloat16)), (True, torch.float32)],
)
def test_a_bound_holds_with_labels_biases_and_padding(
    dtype: torch.dtype, top_k: int | None, triton: bool
) -> None:
    """And with labels that take a softmax of their own."""
    path = torch_path
    if triton:
        pytest.importorskip("triton")
        from sodfast_kernels.distillation import triton_path as path  # type: ignore[no-redef]

    rows, bound = 700, 2**21
    shapes = ((rows, 32), (4100, 32), (rows, 32), (4000, 32), (4100,), (4000,))
    sides = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    weight, ids = torch.ones(rows), torch.zeros(rows, dtype=torch.int64)
    settings = Settings(0.5, 2.0, None, top_k, True, 0.2, 0.28, None, None, triton, bound)
    call = Call(
        Sides(*sides[:4], None, None, *sides[4:]),
        Tokens(weight, ids, None, weight, None),
        settings,
        None,
        True,
        True,
        True,
    )
    known = [*sides, weight, ids]
    with trace._no_kernels(), LiveBytes(known) as live, torch.no_grad():
        results = path.evaluate(call)
        taken = live.take_peak() - sum(result.nbytes for result in results)
    assert 0.4 * bound < taken <= bound + 32 * rows  # vectors of the rows are not counted


@pytest.mark.parametrize("top_k", [None, 20])
@pytest.mark.parametrize("rows", [40, 700])
def test_the_objectives_buffers_on_a_gpu_are_what_is_allocated(
    top_k: int | None, rows: int
) -> None:
    pytest.importorskip("triton")
    from sodfast_kernels.distillation import triton_path

    sides = [torch.zeros(count, 32) for count in (rows, 4000, rows, 4000)]
    settings = Settings(0.5, 1.0, None, top_k, True, 0.2, 0.28, None, None, False, None)
    taken = 0
    for want_head in (True, False):  # their slabs differ, and either may take more
        with trace._no_kernels(), LiveBytes(sides) as live:
            results = triton_path.evaluate(
                Call(
                    Sides(*sides, None, None),
                    Tokens(torch.ones(rows), None, None, None, None),
                    settings,
                    None,
                    True,
                    want_head,
                )
            )
            taken = max(taken, live.take_peak() - sum(result.nbytes for result in results))
    # The candidates of a top-k tile are gone when the slab's gradients are computed.
    bound = linear_scratch_bytes(*sides, top_k=top_k, backend="triton")
    vectors = 32 * rows
    assert taken - vectors <= bound < 1.1 * taken


def test_the_heads_gradient_is_summed_in_fp32_over_several_slabs() -> None:
    def scratch(rows: int) -> int:
        sides = [torch.empty(n, 2048, dtype=torch.bfloat16) for n in (rows, 4000, rows, 4000)]
        return linear_scratch_bytes(*sides, backend="triton")

    # One slab of 2·2048 rows, and two of them.
    assert scratch(8192) - scratch(4096) == 4 * 2048 * 4000


@pytest.mark.triton
def test_the_kernels_run_again_after_a_trace() -> None:
    hidden, head = torch.randn(3, 8).to(DEVICE), torch.randn(20, 8).to(DEVICE)
    with trace._no_kernels():
        pass
    loss = [
        linear_distillation_loss(hidden, head, hidden + 1, head, backend=backend).loss
        for backend in ("torch", "triton")
    ]
    torch.testing.assert_close(loss[0], loss[1])


# ---------------------------------------------------------------- networks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("contents", "recompute", "tokens"),
    [(qwen(), False, 8), pytest.param(gemma(), True, 60, marks=pytest.mark.slow)],
    ids=["qwen3", "gemma2-recomputed"],
)
def test_a_deep_network_is_what_two_depths_of_it_say(
    contents: dict[str, Any], recompute: bool, tokens: int
) -> None:
    """Also where the embedding's gradient outweighs the activations of few layers."""
    objective = load_config(None, []).objective
    network = empty_network(json.dumps(contents), torch.float32, recompute, False)
    period = 2 if contents["model_type"] == "gemma2" else 1
    assert depths(network) == (2 * period, 3 * period)
    sequences = ((5, tokens), (4, 7))
    for phase in (
        (training, objective, sequences, 64, True, False),
        (scoring, sequences),
    ):
        found = peak(network, *phase)
        assert found == pytest.approx(peak(network, *phase, whole=True), rel=1e-4)
    assert len(network.model.layers) == 8


@pytest.mark.slow
def test_layers_that_are_set_up_otherwise_are_all_measured() -> None:
    """Those that keep their activations are the last ones, the others continue linearly."""
    objective = load_config(None, []).objective
    phase = (training, objective, ((5, 60), (4, 7)), 64, True, False)
    found = []
    for kept in (0, 2, 3, 8):
        network = empty_network(json.dumps(qwen(8)), torch.float32, True, False, None, kept)
        assert depths(network, kept) == ((2, 3) if kept < 5 else None)
        found.append(peak(network, *phase, last=kept))
        assert found[-1] == pytest.approx(peak(network, *phase, whole=True), rel=1e-4)
    assert found == sorted(found) and found[-1] > 1.5 * found[0]


def test_layers_that_do_not_repeat_are_all_measured() -> None:
    odd = {**gemma(), "layer_types": ["full_attention"] + ["sliding_attention"] * 7}
    for contents in (odd, qwen(3)):
        assert depths(empty_network(json.dumps(contents), torch.float32, False, False)) is None


def test_ligers_kernels_keep_less_and_leave_other_networks_alone() -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is absent")
    objective = load_config(None, []).objective

    def taken(liger: bool) -> int:
        network = empty_network.__wrapped__(json.dumps(qwen(3)), torch.bfloat16, False, liger)
        return peak(network, training, objective, ((5, 400),), 64, True, True)

    before = taken(False)
    assert taken(True) < 0.9 * before
    assert taken(False) == pytest.approx(before, rel=1e-4)


@pytest.fixture(scope="module")
def network() -> Any:
    return empty_network(json.dumps(qwen(2)), torch.float32, False, False)


def test_a_phase_is_measured_once_for_the_same_arguments(network: Any) -> None:
    seen = []

    def phase(network: Any, size: int) -> tuple[int, ...]:
        seen.append(size)
        return size, 3

    assert [peak(network, phase, size) for size in (5, 1, 5)] == [5, 3, 5]
    assert seen == [5, 1]


def test_a_peak_is_continued_part_by_part() -> None:
    """Of 8 layers, from what 2 and 3 take: a part that grows overtakes one that does not."""

    def phase(network: Any) -> tuple[int, ...]:
        return 50, 10 * len(network.model.layers)

    assert peak(empty_network(json.dumps(qwen(8)), torch.float32, False, False), phase) == 80


def test_training_holds_gradients_only_where_they_come_into_being(network: Any) -> None:
    objective = load_config(None, []).objective
    trained = sum(parameter.nbytes for parameter in network.parameters())
    new, kept = (
        peak(network, training, objective, ((5, 30),), 64, accumulating, True)
        for accumulating in (False, True)
    )
    assert trained < new <= kept + trained
    assert all(parameter.grad is None for parameter in network.parameters())


def test_scoring_leaves_its_hidden_states(network: Any) -> None:
    """[N, 64] fp32 of N answered tokens, and more the longer the sequences are."""
    few, many = (peak(network, scoring, ((5, tokens),)) for tokens in (20, 40))
    assert few > 20 * 64 * 4 and few + 20 * 64 * 4 < many


def paged(rows: int, width: int) -> tuple[int, int]:
    """Page and pages of a GPU's cache in which so many sequences have pages of their own."""
    return 64, 1 + rows * -(-width // 64)


def test_a_prefill_ends_in_fp32_logits_of_every_sample(network: Any) -> None:
    one, two = (
        peak(network, prefill, ((9, copies), (7, copies)), *paged(80, 32), 32, True)
        for copies in (20, 40)
    )
    assert two - one >= 2 * 20 * 500 * 4
    size = paged(1, 1024)
    assert peak(network, prefill, ((900, 1),), *size, 1024, True) > peak(
        network, prefill, ((90, 1),), *size, 1024, True
    )


def test_a_prefill_writes_a_shared_page_once(network: Any) -> None:
    """Sixteen samples of a prompt of ten whole pages write what one does; a last, partial page is
    written for each, and where a page is a whole sequence so is everything."""
    one, many, partial = (
        peak(network, prefill, ((tokens, copies),), *paged(16, 704), 704, True)
        for tokens, copies in ((640, 1), (640, 16), (650, 16))
    )
    whole = peak(network, prefill, ((640, 16),), None, 16, 704, True)
    assert one == many < partial < whole


def test_the_plans_prefill_is_the_engines() -> None:
    """The engine's own pass over pages, with tensors that have memory."""
    model = tiny("qwen3")
    contents = json.dumps(model.network.config.to_dict())
    planned = peak(
        empty_network(contents, torch.float32, False, False),
        prefill,
        ((70, 3), (9, 2)),
        *paged(5, 128),
        128,
        True,
    )
    draws = [
        Draw(row, ids, row, tuple(ids.tolist()))
        for row, ids in enumerate([torch.arange(70) % 7] * 3 + [torch.arange(9)] * 2)
    ]
    (page, pages), sampling = paged(5, 128), Sampling(1.0, 1.0, 50)
    batch = Batch(
        model, draws, 5, 128, sampling, SampleKey(1, 1), page=page, pages=pages
    )  # fmt: skip
    packs: list[Any] = []
    batch.passes.prefill = packs.append  # type: ignore[method-assign]
    batch._admit(draws)
    (pack,) = packs
    with torch.no_grad(), LiveBytes([*model.network.parameters(), batch.cache.memory]) as live:
        lengths = [len(prompt) for prompt, _ in pack]
        position_T = torch.cat([torch.arange(length) for length in lengths])
        attend = batch.cache.prefilling(lengths, [rows for _, rows in pack])
        decoder = Decoder(model.network, 128)  # its angles count
        decoder.forward(torch.cat([ids for ids, _ in pack]), position_T, attend)
    assert lengths == [70, 9]
    assert planned == pytest.approx(live.take_peak(), rel=0.02)
