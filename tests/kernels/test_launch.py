"""What launches share: 64-bit numbers as two signed words, and the tensors' device."""

import pytest
import torch
from sodfast_kernels.launch import on_device, power_of_two, words


@pytest.mark.parametrize("number", [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 + 2**31 + 5, 2**64 - 1])
def test_two_signed_words_hold_the_number(number):
    low, high = words(number)
    assert -(2**31) <= low < 2**31 and -(2**31) <= high < 2**31
    assert (low & 0xFFFFFFFF) | (high & 0xFFFFFFFF) << 32 == number


def test_the_next_power_of_two():
    assert [power_of_two(value) for value in (1, 2, 3, 4, 5, 1024, 1025)] == [
        1, 2, 4, 4, 8, 1024, 2048,
    ]  # fmt: skip


def test_a_negative_seed_is_its_two_complement():
    assert words(-1) == words(2**64 - 1)


def test_the_current_device_is_that_of_the_tensors():
    with on_device(torch.device("cpu")):
        pass
    if torch.cuda.device_count() > 1:
        with on_device(torch.device("cuda:1")):
            assert torch.cuda.current_device() == 1
        assert torch.cuda.current_device() == 0
