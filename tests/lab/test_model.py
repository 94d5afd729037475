"""The lab's language and the tiny Qwen3 that is trained on it."""

from pathlib import Path

import torch

from sodfast.config import LabConfig, load_config
from sodfast.lab.model import EOS, PAD, VOCABULARY, build_tokenizer, new_model
from sodfast.tasks.arithmetic import question_pools

# The tokenizer.


def test_tokenizer_is_one_token_per_character_and_comes_back() -> None:
    tokenizer = build_tokenizer()
    line = "17*8+6=128+6=134?136+6=142|17*8+6="
    ids = tokenizer(line)["input_ids"]
    assert len(ids) == len(line)
    assert tokenizer.decode(ids) == line
    assert tokenizer.unk_token_id not in ids
    assert len(tokenizer) <= 40
    assert {tokenizer.pad_token, tokenizer.eos_token} == {"<pad>", "<eos>"}
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == line


def test_unknown_characters_become_unk_one_by_one() -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer("1 a\n2")["input_ids"]
    assert ids[1:4] == [tokenizer.unk_token_id] * 3
    assert [ids[0], ids[4]] == tokenizer("12")["input_ids"]


def test_tokenizer_survives_being_saved(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    line = "17*8+6="
    assert loaded(line)["input_ids"] == tokenizer(line)["input_ids"]
    assert loaded.decode(loaded(line)["input_ids"]) == line


# The network.


def test_the_default_lab_is_small() -> None:
    model = new_model(LabConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) <= 1_000_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.model_type == "qwen3"


def test_the_network_speaks_the_tokenizers_language() -> None:
    model, tokenizer = new_model(LabConfig()), build_tokenizer()
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == len(VOCABULARY)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.eos_token_id == tokenizer.eos_token_id == VOCABULARY[EOS]
    assert model.config.pad_token_id == tokenizer.pad_token_id == VOCABULARY[PAD]
    longest = max(len(tokenizer(question.prompt).input_ids) for question in question_pools()[0])
    assert longest + load_config("lab", []).rollout.max_new_tokens <= (
        model.config.max_position_embeddings
    )


def test_the_size_is_the_configurations() -> None:
    config = LabConfig(hidden_size=48, layers=3, heads=4, intermediate_size=80)
    model = new_model(config)
    attention = model.model.layers[0].self_attn
    assert len(model.model.layers) == 3
    assert attention.q_proj.weight.shape == attention.k_proj.weight.shape == (48, 48)
    assert attention.head_dim == 12 and attention.q_norm.weight.shape == (12,)
    assert model.model.layers[2].mlp.gate_proj.weight.shape == (80, 48)


def test_weights_are_a_function_of_the_seed_and_leave_no_trace() -> None:
    def flat(seed: int) -> torch.Tensor:
        config = LabConfig(hidden_size=32, layers=1, heads=2, intermediate_size=64, seed=seed)
        return torch.cat([p.detach().flatten() for p in new_model(config).parameters()])

    torch.manual_seed(5)
    expected_next = torch.rand(1)
    torch.manual_seed(5)
    first = flat(0)
    assert torch.rand(1).equal(expected_next)
    assert flat(0).equal(first) and not flat(1).equal(first)
