"""The contents of config.json of small networks, for what needs no weights."""

from typing import Any


def gemma() -> dict[str, Any]:
    return {
        "model_type": "gemma2", "vocab_size": 500, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "sliding_window": 32, "final_logit_softcapping": 30.0,
    }  # fmt: skip


def qwen(layers: int = 8) -> dict[str, Any]:
    return {
        "model_type": "qwen3", "vocab_size": 500, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "tie_word_embeddings": False,
    }  # fmt: skip
