"""The keys of a gpt-oss GGUF file: shape, positions, tokenizer, chat template.

llama.cpp knows tokenizers by the name of the rule that splits text before byte pairs are merged.
The rule is recognized by what it does to a probe text, because a name that does not fit would give
other tokens without any message.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import GptOssConfig

from sparselong.errors import StageError
from sparselong.files import read_json
from sparselong.model import load_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURE = "gpt-oss"
_TOKENIZER = "tokenizer.json"
_LETTERS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    rf"{_LETTERS}*{_LOWER}+{_ENDING}|{_LETTERS}+{_LOWER}*{_ENDING}|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pattern of o200k, the vocabulary of gpt-oss."""
_PROBE = (
    "Don't WE'LL camelCaseWord ÉCOLE école 12345,678 x=1  two   three\n\n\tif a/b://c\r\n  end. "
    "naïve ÄÖÜß Привет мир 你好世界 こんにちは e\u0301 ™ 🙂🙂 <|start|> ?!/\n ...'s 'S   "
)


def add_keys(writer: GGUFWriter, config: GptOssConfig, folder: Path, name: str) -> None:
    """Add all keys of the file.

    Args:
        writer: of the file.
        config: the architecture.
        folder: with tokenizer, chat template and config.json.
        name: of the model, for people.

    Raises:
        StageError: llama.cpp would compute another model than this one, or split text otherwise.
    """
    import gguf

    _check(config)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_MXFP4_MOE)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_sliding_window(int(config.sliding_window or 0))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
    writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    _add_tokenizer(writer, config, folder)


def _check(config: GptOssConfig) -> None:
    """Raise unless what llama.cpp takes for granted about gpt-oss is true of a model."""
    kinds = ("sliding_attention", "full_attention")
    if config.layer_types != [kinds[i % 2] for i in range(config.num_hidden_layers)]:
        _refuse("layers that alternate, sliding first", f"layer_types {config.layer_types}")
    rope = _rope(config)
    scale, natural = rope.get("attention_factor"), 1 + 0.1 * math.log(rope["factor"])
    others = [key for key in ("mscale", "mscale_all_dim") if rope.get(key) is not None]
    if others or (scale is not None and not math.isclose(scale, natural, rel_tol=1e-6)):
        _refuse(f"an attention factor of {natural:.6f}, without mscale", json.dumps(rope))


def _rope(config: GptOssConfig) -> dict[str, Any]:
    return dict(config.rope_parameters or {})


def _refuse(expected: str, found: str) -> None:
    raise StageError(
        "llama.cpp cannot compute this model as it was trained",
        expected,
        found,
        "export it as mxfp4 or hf-bf16",
    )


def _add_tokenizer(writer: GGUFWriter, config: GptOssConfig, folder: Path) -> None:
    import gguf

    document = read_json(folder / _TOKENIZER)
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(_split_rule(folder / _TOKENIZER))
    tokens, kinds = _tokens(document, config.vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=config.vocab_size)
    # Of several templates, and of two places for one, the package takes another than transformers.
    special.chat_template = load_tokenizer(folder).chat_template
    if not special.merges:
        raise StageError(
            f"the tokenizer in {folder} is incomplete",
            "merges",
            "none",
            "restore the tokenizer files of the base, and redo the stages",
        )
    special.add_to_gguf(writer, quiet=True)


def _tokens(document: dict[str, Any], count: int) -> tuple[list[str], list[int]]:
    """Return the text and llama.cpp's type of each token id; ids without a token are unused."""
    from gguf import TokenType

    tokens = [f"[PAD{number}]" for number in range(count)]
    kinds = [int(TokenType.UNUSED)] * count
    for text, number in document["model"]["vocab"].items():
        tokens[number], kinds[number] = text, int(TokenType.NORMAL)
    for added in document["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], int(kind)
    return tokens, kinds


def _split_rule(path: Path) -> str:
    """Return llama.cpp's name of the rule by which a tokenizer splits text.

    Raises:
        StageError: the tokenizer is no byte-level BPE with a rule that llama.cpp has.
    """
    tokenizer = Tokenizer.from_file(str(path))
    pattern = pre_tokenizers.Split(Regex(_O200K), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rules = {
        "gpt-4o": pre_tokenizers.Sequence([pattern, to_bytes]),
        "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    }
    own = tokenizer.pre_tokenizer
    if own is not None and tokenizer.normalizer is None:
        pieces = own.pre_tokenize_str(_PROBE)
        for name, rule in rules.items():
            if rule.pre_tokenize_str(_PROBE) == pieces:
                return name
    raise StageError(
        f"llama.cpp has no rule for the tokenizer of {path}",
        "byte-level BPE that splits as o200k or GPT-2 does, without a normalizer",
        f"{type(own).__name__} and {type(tokenizer.normalizer).__name__}",
        "export it as mxfp4 or hf-bf16",
    )
