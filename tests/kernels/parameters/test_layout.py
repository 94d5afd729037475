"""A layout is the same exactly while a kernel may use the same addresses in the same way."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from sodfast_kernels.parameters.layout import is_capturing, layout
from torch import Tensor


def test_tensors_over_the_same_memory_have_one_layout():
    tensors = [torch.zeros(4, 6), torch.zeros(3, dtype=torch.bfloat16), torch.zeros(())]
    again = [tensor.detach() for tensor in tensors]
    assert layout(again) == layout(tensors) and hash(layout(again)) == hash(layout(tensors))
    assert layout(tensors).strides == (None, None, None)
    assert layout([tensors[0].T]).strides == ((1, 6),)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.clone(),  # `.data` swapped, or the memory freed and taken anew
        lambda data: data[1:],
        lambda data: data[:2],  # a shard at the same address
        lambda data: data.view(3, 4),
        lambda data: data.T,
        lambda data: data.view(torch.int32),
        lambda data: data.view(torch.bfloat16)[:, :3],
    ],
)
def test_whatever_changes_under_a_tensor_changes_its_layout(change: Callable[[Tensor], Tensor]):
    tensor = torch.zeros(4, 3)
    before, others = layout([tensor]), [torch.zeros(2)]
    beside = layout([tensor, *others])
    tensor.data = change(tensor.data)
    assert layout([tensor]) != before
    assert layout([tensor, *others]) != beside != before


def test_the_order_of_tensors_counts():
    left, right = torch.zeros(2), torch.zeros(2)
    assert layout([left, right]) != layout([right, left])


def test_a_layout_keeps_no_memory_alive():
    tensor = torch.zeros(4)
    alive = weakref.ref(tensor.untyped_storage())
    kept = layout([tensor])
    assert alive() is not None
    del tensor
    gc.collect()
    assert alive() is None and len(kept.addresses) == 1


def test_without_a_gpu_no_graph_is_captured():
    assert not is_capturing(torch.device("cpu"))
