"""Writes a tiny random model with a tokenizer of its own as a Hugging Face directory.

python make_tiny_model.py OUT_DIR [--architecture llama|gpt2] [--seed N] [--text FILE] [--untied] [--bfloat16]
                          [--whole-blocks]

Nothing in it is trivially 0 or 1 (biases and norm weights are random too), key/value heads are shared by groups, and
the head is tied to the embedding unless --untied, so that a mistake in any part of a reader shows in the logits.
"""

import argparse
from pathlib import Path

TEXT = """\
The river rises in the hills behind the village, and in spring it carries the snow of 19 valleys to the sea.
"Who keeps the bridge?" asked the miller; nobody knew, though 1204 carts had crossed it since the harvest.
They counted: one mill, two weirs, three ferries, 47 boats - and not a single map that showed them all.
We'll mend what we can, said the smith. It isn't much, but it's ours, and the winter won't wait for us.
Über die Brücke führt der Weg nach Süden; où va le fleuve? 河は海へ流れる。 The sign was written in every tongue.
"""
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tokenizer(architecture, texts, special_tokens=SPECIAL_TOKENS):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = byte_level if architecture == "gpt2" else pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def llama_config(vocab_size, tied):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=tied,
    )


def gpt2_config(vocab_size, tied):
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=vocab_size,
        n_positions=256,
        n_embd=48,
        n_layer=3,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=tied,
    )


def randomize(model, seed):
    """Matrices that keep the size of their input, norm weights around 1, biases around 0: none of them exactly."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = parameter.dim() == 1 and name.endswith("weight")
        # The embedding is the head as well: with this size logits differ by about 1, as a trained model's would.
        scale = 0.2 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
        parameter.data.copy_(noise * scale + (1.0 if is_norm else 0.0))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--architecture", choices=["llama", "gpt2"], default="llama")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, help="train the tokenizer on this file instead of the built-in text")
    parser.add_argument("--untied", action="store_true", help="give the head a weight of its own")
    parser.add_argument("--bfloat16", action="store_true", help="write weights in bfloat16")
    parser.add_argument("--whole-blocks", action="store_true", help="only layers that read a multiple of 64 numbers")
    options = parser.parse_args(arguments)

    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    texts = options.text.read_text(encoding="utf-8").splitlines() if options.text else TEXT.splitlines()
    tokenizer = make_tokenizer(options.architecture, texts)
    make_config = gpt2_config if options.architecture == "gpt2" else llama_config
    config = make_config(tokenizer.get_vocab_size(), not options.untied)
    if options.whole_blocks:
        config.update({"n_embd": 64} if options.architecture == "gpt2" else {"intermediate_size": 128})
    model = AutoModelForCausalLM.from_config(config)
    randomize(model, options.seed)
    if options.bfloat16:
        model.bfloat16()
    model.save_pretrained(options.out_dir)
    eos = SPECIAL_TOKENS[model.config.eos_token_id]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=eos)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(options.out_dir)


if __name__ == "__main__":
    main()
