"""Launches of the row kernels: arguments by their names, options, rows that lie far apart."""

import math

import pytest
import torch
from kernel_inputs import DEVICE
from sodfast_kernels import distillation_loss, reference
from sodfast_kernels.distillation import row_launch


def test_production_configurations_name_real_arguments():
    names = set()
    for (
        name,
        kernel,
        signature,
        constexprs,
        _,
        streamed,
        sweeps,
    ) in row_launch.production_configurations():
        assert name not in names
        names.add(name)
        assert not signature.keys() & constexprs.keys()
        assert signature.keys() | constexprs.keys() == set(kernel.arg_names)
        assert set(streamed) <= signature.keys()
        assert sweeps or name.endswith(("_softcap", "_dual_clip", "_unaligned"))


def test_every_variant_is_compiled_over_our_own_tiles():
    names = {configuration.name for configuration in row_launch.production_configurations()}
    for variant in row_launch.VARIANTS:
        assert {f"{variant}_{kind}_fp32" for kind in row_launch.KINDS} <= names


def test_the_buffer_of_candidates_is_a_power_of_two_with_room_to_spare():
    for top_k in (1, 20, 100, 170, 171, 1024):
        slots = row_launch.capacity(top_k)
        assert slots >= 1.5 * top_k - 1 and slots >= 256 and slots & (slots - 1) == 0


def test_a_thread_has_eight_elements_neighbours_where_rows_are_aligned():
    assert row_launch.BLOCK_SIZE == 32 * row_launch.NUM_WARPS * 8
    whole = torch.empty(6, 64, dtype=torch.bfloat16)
    assert row_launch.tile_columns(whole, None, whole[2:]) == 8
    for other in (whole[:, 1:], torch.empty(6, 63), whole[:, :24].contiguous()):
        assert row_launch.tile_columns(whole, other) == 1


def test_the_lanes_of_a_row_hold_all_of_it_and_enough_of_them_are_few_elements():
    for vocabulary in (5, 1024, 1025, 32_000, 151_936, 262_144):
        for top_k in (1, 100, 512, 513, 1024):
            for columns in (1, 8):
                options = row_launch.top_k_options(top_k, vocabulary, columns)
                lanes = row_launch.lane_count(options, columns)
                assert lanes * options["ROUNDS"] * columns >= vocabulary
                assert lanes & (lanes - 1) == 0
                if vocabulary > 20_000:
                    # Elements above the k-th of the lanes' maxima, where each is as likely to be.
                    expected = -lanes * math.log1p(-top_k / lanes)
                    assert expected + 5 * expected**0.5 < options["CAPACITY"]


@pytest.mark.triton
def test_rows_further_apart_than_32_bits_count():
    base = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)  # untouched pages are free
    student = base.as_strided((2, 40), (2**31, 1))
    generator = torch.Generator().manual_seed(4)
    student.copy_(torch.randn(2, 40, generator=generator))
    teacher = torch.randn(2, 40, generator=generator).to(DEVICE)
    logits = student.detach().requires_grad_()
    output = distillation_loss(logits, teacher, top_k=5, backend="triton")
    exact = reference.distillation_loss(student.double(), teacher.double(), top_k=5)
    torch.testing.assert_close(output.divergence.double(), exact.divergence, rtol=1e-5, atol=0)
