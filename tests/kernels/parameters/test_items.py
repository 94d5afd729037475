"""The table of work items: who works on what, which tensors share a launch."""

from array import array

import pytest
import torch
import triton
import triton.language as tl
from kernel_inputs import DEVICE, HUGE_SEED
from sodfast_kernels.launch import words
from sodfast_kernels.parameters import items
from sodfast_kernels.parameters.items import (
    CHUNK,
    NO_PROGRAM,
    Table,
    alike,
    as_int64,
    is_vector,
    load_scalar,
    load_words,
    write,
)

CPU = torch.device("cpu")


def test_each_program_finds_its_tensor_and_each_tensor_its_programs():
    numels = [CHUNK, 3 * CHUNK + 1, 5]
    table = Table(numels, CPU, {"offset": [7, 8, 9]}, {"MODE": 2})
    arguments = table.arguments
    assert table.programs == 1 + 4 + 1 and len(table.partial_sums()) == 6
    assert arguments["TENSORS"] == 4  # padded to a power of two
    assert arguments["first_program_table"].tolist() == [0, 1, 5, NO_PROGRAM]
    assert arguments["numel_table"].tolist() == [CHUNK, 3 * CHUNK + 1, 5, 0]
    assert arguments["offset_table"].tolist() == [7, 8, 9, 0]
    assert arguments["MODE"] == 2
    assert items.LAUNCH.items() <= arguments.items()


def test_one_tensor_still_makes_a_table():
    table = Table([3], CPU, {}, {})
    assert table.arguments["first_program_table"].tolist() == [0, NO_PROGRAM]


def test_tensors_of_one_kind_share_a_launch_in_their_order():
    assert alike([1, 2, 3, 4, 5], lambda number: number % 2) == [[1, 3, 5], [2, 4]]


def test_wide_accesses_need_address_and_size_in_multiples_of_16():
    buffer = torch.empty(65)
    assert buffer.data_ptr() % 16 == 0

    def wide(*tensors: torch.Tensor) -> bool:
        return is_vector(tensors[0].numel(), *(tensor.data_ptr() for tensor in tensors))

    assert wide(buffer[:64], buffer[4:36]) and wide(buffer[4:36])
    assert not wide(buffer) and not wide(buffer[1:17]) and not wide(buffer[:8])
    assert not wide(buffer[:16], buffer[1:17])


def test_a_table_is_not_made_while_a_graph_is_captured(monkeypatch):
    """The graph would copy from the host's memory at every replay, when others have it."""
    monkeypatch.setattr(items, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="once before the capture"):
        Table([3], torch.device("cuda"), {}, {})


@pytest.mark.triton
@pytest.mark.parametrize("number", [0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, HUGE_SEED])
def test_a_number_in_memory_has_the_words_of_the_number(number):
    @triton.jit
    def kernel(low_high, number):
        low, high = load_words(number)
        tl.store(low_high, low)
        tl.store(low_high + 1, high)

    low_high = torch.empty(2, dtype=torch.int32, device=DEVICE)
    kernel[(1,)](low_high, torch.tensor(as_int64(number), device=DEVICE))
    assert tuple(low_high.tolist()) == words(number)


@pytest.mark.triton
def test_a_scalar_in_memory_is_rounded_as_one_passed_by_value():
    @triton.jit
    def kernel(out, scalars, value):
        tl.store(out, load_scalar(scalars))
        tl.store(out + 1, value)

    numbers = array("d", [1 - 0.999, (1 - 0.999**3) ** -0.5, 1e-8, 1e-5 / (1 - 0.9**7), 1e-40])
    scalars = torch.empty(len(numbers), dtype=torch.int64, device=DEVICE)
    write(scalars, torch.frombuffer(numbers, dtype=torch.int64))
    for index, number in enumerate(numbers):
        out = torch.empty(2, device=DEVICE)
        kernel[(1,)](out, scalars[index], number)
        assert out[0] == out[1] == torch.tensor(number, dtype=torch.float32)
