"""Liger's kernels, by Triton's interpreter, against transformers' own; and the refusals."""

import copy
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from networks import MODELS, build, gradients, hidden_of, packed, random_pairs
from transformers import AutoModelForCausalLM

from sodfast.errors import UsageError
from sodfast.model import liger
from sodfast.model.language_model import decoder_layers, recompute_layers
from sodfast.model.liger import patch, use_liger

CUDA = torch.device("cuda")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton's interpreter lacks for Liger's kernels: they call methods on scalar arguments,
    compiled to fp32 tensors and interpreted as Python's floats; and two functions of CUDA's
    libdevice, which has no interpreted form."""
    pytest.importorskip("liger_kernel", reason="needs liger-kernel (pip install 'sodfast[gpu]')")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled where there is a GPU")
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(argument: Any) -> Any:
        if type(argument) is not float:
            return convert(argument)
        value = np.array([argument], dtype=np.float32)
        return tl.tensor(interpreter.TensorHandle(value, tl.float32), tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    from liger_kernel.ops import geglu, rms_norm

    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: 1 / tl.sqrt(x))
    monkeypatch.setattr(geglu, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("name", "recompute"), [("qwen3", False), ("qwen3", True), ("llama", False), ("gemma2", False)]
)
def test_hidden_states_and_gradients_are_transformers(name: str, recompute: bool) -> None:
    plain, pairs = packed(build(name)), random_pairs([(2, 2), (1, 1)])
    network = copy.deepcopy(plain)
    patch(network)
    if recompute:
        recompute_layers(network)
    hidden_NH, expected_NH = hidden_of(network, pairs), hidden_of(plain, pairs)
    assert not hidden_NH.equal(expected_NH)
    torch.testing.assert_close(hidden_NH, expected_NH, rtol=0, atol=1e-4)
    found, expected = gradients(network, hidden_NH), gradients(plain, expected_NH)
    for path in expected:
        torch.testing.assert_close(found[path], expected[path], rtol=0, atol=1e-4)


@pytest.mark.usefixtures("interpreted")
def test_a_copy_computes_with_its_own_weights() -> None:
    network, pairs = packed(build("qwen3")), random_pairs([(1, 2)])
    patch(network)
    teacher = copy.deepcopy(network)
    with torch.no_grad():
        before = hidden_of(network, pairs)
        for parameter in network.parameters():
            parameter.mul_(1.5)
        assert hidden_of(teacher, pairs).equal(before)
        assert not hidden_of(network, pairs).equal(before)


@pytest.mark.usefixtures("interpreted")
def test_no_other_network_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[type(build("qwen3")).__module__]
    before, other = dict(vars(module)), packed(build("qwen3"))
    network, pairs = packed(build("qwen3")), random_pairs([(1, 2)])
    patch(network)
    assert vars(module) == before
    later = AutoModelForCausalLM.from_config(MODELS["qwen3"])
    assert type(later.model.norm) is type(other.model.norm)
    # Every attention of the patched network, and of no other, rotates by Liger's function.
    from liger_kernel.transformers import rope

    rotated = []
    dispatch = rope.dispatch
    monkeypatch.setattr(rope, "dispatch", lambda *a, **k: rotated.append(1) or dispatch(*a, **k))
    with torch.no_grad():
        hidden_of(other, pairs)
        assert not rotated
        hidden_of(network, pairs)
    assert len(rotated) == len(decoder_layers(network))


# ---------------------------------------------------------------- true, auto, false


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    monkeypatch.setattr(liger, "patch", found.append)
    return found


def on_gpu(model_type: str = "qwen3") -> Any:
    return SimpleNamespace(device=CUDA, config=SimpleNamespace(model_type=model_type))


def test_without_a_gpu(patched: list[Any]) -> None:
    network, said = build("llama"), list[str]()
    for wanted in ("auto", False):
        use_liger(network, wanted, said.append)  # type: ignore[arg-type]
    assert not said and not patched
    with pytest.raises(UsageError, match=r"model\.liger=true.*need a GPU, not cpu"):
        use_liger(network, True, said.append)


def test_without_the_package(patched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    said: list[str] = []
    use_liger(on_gpu(), "auto", said.append)
    assert len(said) == 1 and "slower" in said[0] and "sodfast[gpu]" in said[0] and not patched
    with pytest.raises(UsageError, match=r"sodfast\[gpu\]"):
        use_liger(on_gpu(), True, said.append)


def test_what_liger_knows(patched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in: Any = SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"qwen3": None})
    monkeypatch.setattr(liger, "find_spec", lambda name: name)
    for path in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, path, SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", stand_in)
    said: list[str] = []
    known, unknown = on_gpu(), on_gpu("starcoder2")
    use_liger(known, False, said.append)
    assert not said and not patched
    for wanted in ("auto", True):
        use_liger(known, wanted, said.append)  # type: ignore[arg-type]
    assert patched == [known, known] and len(said) == 2 and all("RoPE" in text for text in said)
    use_liger(unknown, "auto", said.append)
    assert "starcoder2" in said[2] and len(patched) == 2
    with pytest.raises(UsageError, match="starcoder2"):
        use_liger(unknown, True, said.append)
