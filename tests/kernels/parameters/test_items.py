"""The table of work items: who works on what, which tensors share a launch."""

import torch
from sodfast_kernels.parameters import items
from sodfast_kernels.parameters.items import CHUNK, NO_PROGRAM, Table, alike, is_vector


def test_each_program_finds_its_tensor_and_each_tensor_its_programs():
    tensors = [torch.empty(n) for n in (CHUNK, 3 * CHUNK + 1, 5)]
    table = Table(tensors)
    arguments = table.arguments(offset=[7, 8, 9])
    assert table.programs == 1 + 4 + 1 and len(table.partial_sums()) == 6
    assert arguments["TENSORS"] == 4  # padded to a power of two
    assert arguments["first_program_table"].tolist() == [0, 1, 5, NO_PROGRAM]
    assert arguments["numel_table"].tolist() == [CHUNK, 3 * CHUNK + 1, 5, 0]
    assert arguments["offset_table"].tolist() == [7, 8, 9, 0]
    assert items.LAUNCH.items() <= arguments.items()


def test_one_tensor_still_makes_a_table():
    assert Table([torch.empty(3)]).arguments()["first_program_table"].tolist() == [0, NO_PROGRAM]


def test_tensors_of_one_kind_share_a_launch_in_their_order():
    assert alike([1, 2, 3, 4, 5], lambda number: number % 2) == [[1, 3, 5], [2, 4]]


def test_wide_accesses_need_address_and_size_in_multiples_of_16():
    buffer = torch.empty(65)
    assert buffer.data_ptr() % 16 == 0
    assert is_vector(buffer[:64], buffer[4:36])
    assert not is_vector(buffer) and not is_vector(buffer[1:17]) and not is_vector(buffer[:8])
