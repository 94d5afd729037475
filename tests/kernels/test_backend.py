"""The choice between Triton and PyTorch: what each name means, and each refusal."""

import pytest
import torch
from kernel_inputs import DEVICE
from sodfast_kernels import AdamW, backend, copy_teacher_, distillation_loss, sample_tokens
from sodfast_kernels.backend import MAX_TOP_K, uses_triton

ON_CPU = [torch.ones(2)]


def test_auto_is_triton_on_cuda_and_pytorch_elsewhere():
    assert not uses_triton("auto", ON_CPU) and not uses_triton("torch", ON_CPU)
    assert uses_triton("auto", [torch.ones(2, device=DEVICE)]) == (DEVICE.type == "cuda")
    assert not uses_triton("auto", []) and not uses_triton("triton", [])


def test_what_triton_does_not_take_is_left_to_pytorch(monkeypatch):
    """Devices are only asked for their type, so a stand-in shows what a GPU would be given."""

    class OnGpu:
        device = torch.device("cuda")

        def __init__(self, dtype):
            self.dtype = dtype

    narrow, double = OnGpu(torch.float32), OnGpu(torch.float64)
    assert uses_triton("auto", [narrow, narrow])
    assert not uses_triton("auto", [narrow, double])
    assert not uses_triton("auto", [narrow, ON_CPU[0]])
    assert uses_triton("auto", [narrow], MAX_TOP_K)
    assert not uses_triton("auto", [narrow], MAX_TOP_K + 1)
    monkeypatch.setattr(backend, "INSTALLED", False)
    assert not uses_triton("auto", [narrow])


def test_triton_is_refused_by_name_where_it_cannot_run(monkeypatch):
    with pytest.raises(ValueError, match="backend must be one of"):
        uses_triton("cuda", ON_CPU)
    with pytest.raises(ValueError, match='backend "triton" does not take fp64'):
        uses_triton("triton", [torch.ones(2).double()])
    with pytest.raises(ValueError, match="top_k must be ≤ 1024"):
        uses_triton("triton", ON_CPU, 1025)
    monkeypatch.setattr("sodfast_kernels.launch.INTERPRETED", False)
    with pytest.raises(ValueError, match="needs CUDA tensors, or TRITON_INTERPRET=1"):
        uses_triton("triton", ON_CPU)
    monkeypatch.setattr(backend, "INSTALLED", False)
    with pytest.raises(ValueError, match="needs the package triton"):
        uses_triton("triton", ON_CPU)


def test_every_family_asks_here():
    double = [torch.ones(2).double()]
    with pytest.raises(ValueError, match='backend "triton" does not take fp64'):
        copy_teacher_(double, ON_CPU, backend="triton")
    with pytest.raises(ValueError, match="fp64"):
        distillation_loss(torch.zeros(1, 3).double(), torch.zeros(1, 3), backend="triton")
    with pytest.raises(ValueError, match="top_k"):
        distillation_loss(torch.zeros(1, 2000), torch.zeros(1, 2000), top_k=1500, backend="triton")
    with pytest.raises(ValueError, match="backend must be one of"):
        AdamW([torch.nn.Parameter(torch.ones(2))], backend="cuda")
    key = {"sample": torch.zeros(1).long(), "position": torch.zeros(1).long()}
    with pytest.raises(ValueError, match="backend must be one of"):
        sample_tokens(torch.zeros(1, 3), seed=0, step=0, backend="cuda", **key)
