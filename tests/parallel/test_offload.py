"""A copy in host memory computes and follows as one on the device, through a few buffers."""

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from marks import slow
from sodfast_kernels import ema_update_, parameter_distance
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)

from sodfast.errors import UsageError
from sodfast.model.language_model import decoder_layers, output_head
from sodfast.model.packing import packed_hidden, use_packed_attention
from sodfast.parallel.offload import ALIGNMENT, SLOTS, HostCopy, pinned_bytes, pinned_setting

SIZES: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "pad_token_id": 0,
}
MODELS: dict[str, PretrainedConfig] = {
    "untied": Qwen3Config(**SIZES, num_hidden_layers=5, tie_word_embeddings=False),
    "tied": LlamaConfig(**SIZES, num_hidden_layers=4, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SIZES, num_hidden_layers=3, sliding_window=4),
    "fewer layers than slots": Qwen3Config(**SIZES, num_hidden_layers=1),
}


def build(config: PretrainedConfig, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config).to(device, dtype).eval()
    use_packed_attention(network)
    return network


def inputs() -> list[Tensor]:
    return [torch.arange(9) + 1, torch.arange(6) + 10]


@torch.no_grad()
def move(network: nn.Module, seed: int, size: float = 0.01) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter += size * noise.to(parameter.device, parameter.dtype)


def assert_equal(left: nn.Module, right: nn.Module) -> None:
    a, b = dict(left.named_parameters()), dict(right.named_parameters())
    assert a.keys() == b.keys()
    assert all(a[name].cpu().equal(b[name].cpu()) for name in a)


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


# ---------------------------------------------------------------- values


# ---------------------------------------------------------------- pinned memory


@pytest.mark.parametrize(
    ("version", "setting", "taken"),
    [
        ("2.11.0+cu128", "", 2**22),
        ("2.13.0", "pinned_max_round_threshold_mb:1", 3 * 2**20),
        ("2.14.1+cu130", "pinned_max_round_threshold_mb:1", 3 * 2**20),
    ],
)
def test_pinned_buffers_are_rounded_where_torch_has_no_setting_against_it(
    version: str, setting: str, taken: int
) -> None:
    assert pinned_setting(version) == setting
    assert pinned_bytes(3 * 2**20, version) == taken
    assert pinned_bytes(3 * 2**18, version) == 2**20  # small ones are rounded by any version


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_are_those_of_the_source(name: str) -> None:
    source = build(MODELS[name])
    host, sequences = HostCopy(source), inputs()
    assert_equal(host.network, source)
    with torch.no_grad():
        expected = packed_hidden(source, sequences)
        with host.on_device() as network:
            for _ in range(3):  # the layers come round again
                assert packed_hidden(network, sequences).equal(expected)
            head = output_head(network).detach()
        assert head.equal(output_head(source))
    assert_equal(host.network, source)


def test_a_copy_does_not_follow_the_source_until_it_is_told() -> None:
    source = build(MODELS["untied"])
    host, before = HostCopy(source), copy.deepcopy(source)
    move(source, 1)
    assert_equal(host.network, before)
    places = [p.data_ptr() for p in host.network.parameters()]
    host.copy_(source)
    assert_equal(host.network, source)
    assert [p.data_ptr() for p in host.network.parameters()] == places


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, *slow(torch.float32)])
def test_updates_are_bit_for_bit_those_of_a_copy_on_the_device(
    name: str, dtype: torch.dtype
) -> None:
    """Also the stochastic rounding of bf16, which is keyed by the place of an element."""
    source = build(MODELS[name], dtype)
    host, resident = HostCopy(source), copy.deepcopy(source).requires_grad_(False)
    for step, rate in enumerate([0.0, 0.04, 0.5, 0.04, 1.0]):
        move(source, step)
        key = {"seed": 3, "step": step}
        parameters = list(resident.parameters()), list(source.parameters())
        expected = parameter_distance(*parameters)
        assert ema_update_(*parameters, rate, **key).equal(expected)
        distance = host.update_(source, rate, **key)
        assert distance.dtype == torch.float32 and distance.equal(expected)
        assert_equal(host.network, resident)
    assert host.update_(source, 0.0, seed=3, step=9) == 0  # after a copy


def test_a_nan_reaches_the_distance() -> None:
    source = build(MODELS["untied"])
    host = HostCopy(source)
    with torch.no_grad():
        next(iter(decoder_layers(source)[2].parameters())).view(-1)[0] = float("nan")
    assert host.update_(source, 0.0, seed=0, step=1).isnan()


# ---------------------------------------------------------------- memory


def test_only_a_few_layers_are_on_the_device() -> None:
    """Every layer runs from one of SLOTS buffers of a layer's size, and nothing stays there."""
    source = build(MODELS["untied"])
    host = HostCopy(source)
    at_home = {storage(p) for p in host.network.parameters()}
    assert len(at_home) == 5 + 2  # five layers, the embedding, norm and head
    assert not at_home & {storage(p) for p in source.parameters()}
    buffers: dict[int, int] = {}
    resident = set()

    def look(layer: nn.Module, _: Any) -> None:
        (memory,) = {p.untyped_storage() for p in layer.parameters()}
        buffers[memory.data_ptr()] = memory.nbytes()
        resident.update(storage(p) for p in host.network.base_model.embed_tokens.parameters())
        resident.add(storage(output_head(host.network)))

    with host.on_device() as network, torch.no_grad():
        for layer in decoder_layers(network):  # hooks run in the order of their registration
            layer.register_forward_pre_hook(look)
        for _ in range(2):
            packed_hidden(network, inputs())
        head = output_head(network).detach()

    layer_bytes = sum(p.nbytes for p in decoder_layers(source)[0].parameters())
    count = len(list(decoder_layers(source)[0].parameters()))
    assert len(buffers) == SLOTS
    assert all(layer_bytes <= size < layer_bytes + count * ALIGNMENT for size in buffers.values())
    assert len(resident) == 2 and not resident & (at_home | buffers.keys())
    assert {storage(p) for p in host.network.parameters()} == at_home
    assert head.equal(output_head(source)) and storage(head) not in at_home


def test_a_failed_forward_leaves_the_weights_at_home() -> None:
    source = build(MODELS["untied"])
    host = HostCopy(source)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    hook = decoder_layers(host.network)[2].register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError), torch.no_grad(), host.on_device() as network:
        packed_hidden(network, inputs())
    hook.remove()
    assert_equal(host.network, source)
    with host.on_device() as network, torch.no_grad():
        assert packed_hidden(network, inputs()).equal(packed_hidden(source, inputs()))
    assert not any(layer._forward_pre_hooks for layer in decoder_layers(host.network))


def test_layers_out_of_order_are_refused() -> None:
    host = HostCopy(build(MODELS["untied"]))
    with host.on_device() as network, torch.no_grad():
        network.base_model.layers = nn.ModuleList(reversed(network.base_model.layers))
        with pytest.raises(RuntimeError, match="in order"):
            packed_hidden(network, inputs())


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    lone = build(BloomConfig(vocab_size=31, hidden_size=16, n_layer=2, n_head=2))
    assert len(decoder_layers(lone)) == 2  # whatever the list is called
    del lone.base_model.h
    with pytest.raises(UsageError, match=r"teacher\.storage=device"):
        decoder_layers(lone)
    shared = build(MODELS["untied"])
    shared.base_model.layers[1] = shared.base_model.layers[0]
    with pytest.raises(UsageError, match=r"teacher\.storage=device"):
        HostCopy(shared)


# ---------------------------------------------------------------- the two streams


class Stream:
    """Knows what must have ended before its next work begins."""

    def __init__(self) -> None:
        self.ended: set[Any] = set()

    def wait_event(self, event: "Event") -> None:
        self.ended |= event.ended

    def wait_stream(self, other: "Stream") -> None:
        self.ended |= other.ended

    def run(self, work: Any) -> set[Any]:
        """Returns what ended before `work` began."""
        before = set(self.ended)
        self.ended.add(work)
        return before


class Event:
    def __init__(self) -> None:
        self.ended: set[Any] = set()

    def record(self, stream: Stream) -> None:
        self.ended = set(stream.ended)


class Device:
    """Stands in for torch.cuda: one transfer whenever the copy stream is made the current one."""

    Event = Event

    def __init__(self) -> None:
        self.compute, self.copies = Stream(), Stream()
        self.before_transfer: list[set[Any]] = []

    def current_stream(self, device: torch.device) -> Stream:
        return self.compute

    def stream(self, stream: Stream) -> AbstractContextManager[None]:
        assert stream is self.copies
        transfer = ("transfer", len(self.before_transfer))
        self.before_transfer.append(stream.run(transfer))
        return nullcontext()


def test_no_transfer_meets_a_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every transfer into a slot comes after the last use of it, every use after its transfer,
    and what the compute stream does last comes after every transfer."""
    host, device = HostCopy(build(MODELS["untied"])), Device()
    monkeypatch.setattr(host, "_backend", device)
    monkeypatch.setattr(host, "_copies", device.copies)
    device.compute.run("last owner of the memory")
    before_use = [
        device.compute.run(("use", number))
        for number, _ in enumerate(host._staged(host._layers * 2))
    ]
    assert len(before_use) == len(device.before_transfer) == 10
    for number, ended in enumerate(device.before_transfer):
        assert "last owner of the memory" in ended
        assert number < SLOTS or ("use", number - SLOTS) in ended
        assert ("use", number - SLOTS + 1) not in ended  # the transfer is ahead of this one
    for number, ended in enumerate(before_use):
        assert ("transfer", number) in ended
        assert ("transfer", number + 1) not in ended  # and this use does not wait for it
    assert device.compute.ended >= {("transfer", number) for number in range(10)}


# ---------------------------------------------------------------- on a GPU

LARGE = Qwen3Config(
    **{**SIZES, "hidden_size": 512, "intermediate_size": 2048, "vocab_size": 4096, "head_dim": 64},
    num_hidden_layers=24,
    tie_word_embeddings=False,
)


@pytest.mark.gpu
def test_device_memory_holds_a_few_layers() -> None:
    source = build(LARGE, torch.bfloat16, "cuda")
    everything = sum(p.nbytes for p in source.parameters())
    layer = sum(p.nbytes + ALIGNMENT for p in decoder_layers(source)[0].parameters())
    outside = sum(p.nbytes for p in source.parameters()) - 24 * sum(
        p.nbytes for p in decoder_layers(source)[0].parameters()
    )
    slack = 4 << 20  # rounding of blocks, activations of 18 tokens
    bound = SLOTS * layer + outside + slack
    assert bound < everything / 2

    # The first product takes cuBLAS's workspace, 32 MiB, which stays.
    source.lm_head(source.lm_head.weight[:64])
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    host = HostCopy(source)
    assert torch.cuda.memory_allocated() - start < slack
    assert torch.cuda.max_memory_allocated() - start < slack
    assert all(p.is_pinned() for p in host.network.parameters())
    move(source, 1)
    for rate in (0.0, 0.1):
        torch.cuda.reset_peak_memory_stats()
        host.update_(source, rate, seed=0, step=1)
        assert torch.cuda.max_memory_allocated() - start < bound
    torch.cuda.reset_peak_memory_stats()
    with host.on_device() as network, torch.no_grad():
        for _ in range(2):
            hidden = packed_hidden(network, inputs())
    assert torch.cuda.max_memory_allocated() - start < bound
    del hidden, network
    assert torch.cuda.memory_allocated() - start < slack


@pytest.mark.gpu
@pytest.mark.parametrize("slow", ["transfers", "compute"])
def test_whichever_stream_is_slow_the_bits_are_the_same(
    slow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build(LARGE, torch.bfloat16, "cuda")
    resident = copy.deepcopy(source).requires_grad_(False)
    host = HostCopy(source)
    move(source, 1)
    move(resident, 2)
    host.copy_(resident)
    with torch.no_grad():
        expected = packed_hidden(resident, inputs())

    def sleep(*_: Any) -> None:
        torch.cuda._sleep(2_000_000)  # about a millisecond

    if slow == "compute":
        for layer in decoder_layers(host.network):
            layer.register_forward_hook(sleep)
    else:
        wait = host._copies.wait_event

        def wait_and_sleep(event: Any) -> None:
            wait(event)
            with torch.cuda.stream(host._copies):
                sleep()

        monkeypatch.setattr(host._copies, "wait_event", wait_and_sleep)
    with host.on_device() as network, torch.no_grad():
        for _ in range(3):
            assert packed_hidden(network, inputs()).equal(expected)
    parameters = list(resident.parameters()), list(source.parameters())
    distance = ema_update_(*parameters, 0.3, seed=1, step=2)
    torch.testing.assert_close(
        host.update_(source, 0.3, seed=1, step=2), distance, rtol=1e-7, atol=0
    )
    assert_equal(host.network, resident)
