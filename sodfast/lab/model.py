"""The lab's language: its characters, its tokenizer and the tiny Qwen3 that is trained on them."""

from typing import TYPE_CHECKING

from sodfast.config import LabConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

_CHARACTERS = "0123456789+*=?|"
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"

VOCABULARY = {token: index for index, token in enumerate([PAD, EOS, UNK, *_CHARACTERS])}


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """Return the tokenizer: one token per character, `<unk>` for any it does not know."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def architecture(config: LabConfig) -> "Qwen3Config":
    """The configuration of the lab's Qwen3: its sizes from `config`, one tied embedding."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        head_dim=config.hidden_size // config.heads,
        max_position_embeddings=1024,
        initializer_range=config.hidden_size**-0.5,
        tie_word_embeddings=True,
        pad_token_id=VOCABULARY[PAD],
        eos_token_id=VOCABULARY[EOS],
        bos_token_id=None,
    )


def new_model(config: LabConfig) -> "Qwen3ForCausalLM":
    """Return the lab's model (fp32, on the CPU) with random weights, a function of `config.seed`.

    torch's own generator is left as it was.
    """
    import torch
    from transformers import Qwen3ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Qwen3ForCausalLM(architecture(config)).float()
