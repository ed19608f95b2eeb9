"""A tiny language model of transformers: random weights, a tokenizer of bytes made here."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from probkit.rng import scope

# Servers and proxies of the tests are imported by their own names.
sys.path.append(str(Path(__file__).parent))

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% if not (continue_final_message and loop.last) %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny_model(folder, *, positions=256, seed=0, sharpness=8.0):
    """Write model and tokenizer as ``save_pretrained`` does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789ABC .,:\n<|>_/"))
    alphabet = dict(zip(pre_tokenizers.ByteLevel.alphabet(), range(300), strict=False))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    symbols = [level.pre_tokenize_str(letter)[0][0] for letter in letters]
    symbols += ["Ã", "©", "Ċ" + "Ċ", "a" + "b"]  # the two bytes of é; merged pairs
    assert set("Ã©") <= set(alphabet)
    vocabulary = {"<|im_start|>": 0, "<|im_end|>": 1}
    for symbol in symbols:
        vocabulary.setdefault(symbol, len(vocabulary))
    core = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ"), ("a", "b")]))
    core.pre_tokenizer, core.decoder = level, decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=None,
    )
    with scope(rng=seed, foreign=True):
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
