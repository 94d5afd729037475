"""The model behind the predicted times, by hand-made numbers."""

import predict
import pytest


def test_programs_at_once_are_bound_by_registers_shared_memory_and_warps():
    gpu = predict.GPUS["H100"]
    # 57 registers are given out as 64: 65,536 / (64 · 128) = 8.
    assert predict.programs_at_once(57, 16, 4, gpu) == 8
    assert predict.programs_at_once(32, 16, 4, gpu) == 16
    assert predict.programs_at_once(16, 0, 4, gpu) == 16  # 64 warps
    assert predict.programs_at_once(16, 0, 1, gpu) == 32
    assert predict.programs_at_once(32, 56 << 10, 4, gpu) == 4


def test_a_loop_takes_the_longer_of_its_bytes_and_its_instructions():
    gpu = predict.Gpu(90, 1, 1e9, copy=1e9, shared=0, products=1e12)
    rate = 32 * 4 * 0.75 * 1e9
    assert predict.seconds_an_element([(1, 8)], 32, gpu) == pytest.approx(8e-9)
    assert predict.seconds_an_element([(9600, 8)], 32, gpu) == pytest.approx(9600 / rate)
    both = predict.seconds_an_element([(1, 8), (9600, 8)], 32, gpu)
    assert both == pytest.approx(8e-9 + 9600 / rate)
    few = predict.seconds_an_element([(9600, 8)], 8, gpu)
    assert few == pytest.approx(9600 / rate * 0.75 / 0.45)


def test_over_the_products_adds_the_row_kernel_to_four_products():
    gpu = predict.Gpu(90, 1, 1e9, copy=1e9, shared=0, products=8.0)
    # Four products of 1 · 1 · 1: 8 flop, one second; the row kernel half a second.
    assert predict.over_the_products(0.5, gpu, 1, 1, 1) == pytest.approx(1.5)
