"""Launches of the row kernels: arguments by their names, options, rows that lie far apart."""

import pytest
import torch
from kernel_inputs import DEVICE
from sodfast_kernels import distillation_loss, reference
from sodfast_kernels.distillation import row_launch


def test_production_configurations_name_real_arguments():
    names = set()
    for name, kernel, signature, constexprs, _, streamed in row_launch.production_configurations():
        assert name not in names
        names.add(name)
        assert not signature.keys() & constexprs.keys()
        assert signature.keys() | constexprs.keys() == set(kernel.arg_names)
        assert set(streamed) <= signature.keys()


def test_every_variant_is_compiled_over_our_own_tiles():
    names = {configuration.name for configuration in row_launch.production_configurations()}
    for variant in ("full", "top_100", "top_1024", "stored_100"):
        assert {f"{variant}_{kind}_fp32" for kind in row_launch.KINDS} <= names


def test_the_buffer_of_candidates_is_a_power_of_two_with_room_to_spare():
    for top_k in (1, 20, 100, 170, 171, 1024):
        slots = row_launch.capacity(top_k)
        assert slots >= 1.5 * top_k - 1 and slots >= 256 and slots & (slots - 1) == 0


def test_a_thread_has_eight_elements_and_twice_the_registers_with_buckets():
    for vocabulary in (100, 1024, 1025, 151_936):
        for buckets in (False, True):
            options = row_launch.launch_options(vocabulary, buckets)
            assert options["BLOCK_SIZE"] == 8 * 32 * options["num_warps"]
    full, buckets = (row_launch.launch_options(151_936, buckets) for buckets in (False, True))
    assert full["num_warps"] == 2 * buckets["num_warps"]


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
