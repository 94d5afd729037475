"""The Triton kernels of the look-up: any texts, as the plain search finds them."""

import pytest
from drafts import case, long_case, plain_search
from kernel_inputs import DEVICE
from marks import slow
from sodfast_kernels import find_drafts
from sodfast_kernels.speculation import kernel


def found(arguments, count):
    return find_drafts(*(x.to(DEVICE) for x in arguments), count, backend="triton").tolist()


@pytest.mark.triton
@pytest.mark.parametrize("count", [3, *slow(1, 15)])
def test_drafts_are_those_of_a_plain_search(count):
    for seed in range(3):
        arguments = case(seed, vocabulary=2 + seed)
        assert found(arguments, count) == plain_search(*arguments, count)
    assert found(case(7, 2), count) == plain_search(*case(7, 2), count)


@pytest.mark.slow
@pytest.mark.triton
def test_a_match_behind_the_first_stretch(monkeypatch):
    monkeypatch.setattr(kernel, "BLOCKS", 2)
    arguments = long_case()
    assert found(arguments, 3) == plain_search(*arguments, 3)


def test_each_kernel_has_a_configuration_to_be_compiled():
    names = {configuration.kernel for configuration in kernel.production_configurations()}
    assert names == {kernel.match_kernel, kernel.draft_kernel}
