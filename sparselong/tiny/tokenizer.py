"""The small model's tokenizer: byte-level BPE with the harmony special tokens.

It is trained on the demo's own text in a second or two and behaves like the tokenizer of gpt-oss:
any valid UTF-8 survives a round trip, the special tokens come after the ordinary ones, `<|return|>`
ends a generation, and the chat template is harmony. The template (`harmony.jinja` in this folder)
supports text conversations; tool calls are left out.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
)
_HARMONY_TEMPLATE = Path(__file__).with_name("harmony.jinja")


def train_tokenizer(
    training_texts: Iterable[str], vocab_size: int, max_length_tokens: int
) -> PreTrainedTokenizerFast:
    """Train and return the tokenizer; the same texts give the same tokenizer.

    Args:
        training_texts: texts from which the merges are learned.
        vocab_size: total entries, including the nine special tokens; at least 265.
        max_length_tokens: the model's maximum context, recorded in the tokenizer's config.

    Raises:
        ValueError: vocab_size is below 265, or the texts do not yield enough merges.
    """
    ordinary = vocab_size - len(SPECIAL_TOKENS)
    if ordinary < 256:
        raise ValueError(f"vocab_size {vocab_size} < {256 + len(SPECIAL_TOKENS)}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        training_texts,
        trainers.BpeTrainer(
            vocab_size=ordinary,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    if tokenizer.get_vocab_size() != ordinary:
        raise ValueError(f"the texts yield {tokenizer.get_vocab_size()} tokens, not {ordinary}")
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|return|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=max_length_tokens,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=_HARMONY_TEMPLATE.read_text(encoding="utf-8"),
    )
