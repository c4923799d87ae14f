"""Compares the example's models with Python's transformers, on the same files and token ids, in float32.

usage: python logits_live.py PRINT_LOGITS MERGE_CHECKPOINT [MODEL_DIR...]

Small random models of every supported kind, and the directories given, are run by both; the logits may differ by at
most LIMIT. The directory that save_model writes has to give transformers the same logits again. With random PEFT
adapters on the small models, attached here and merged by merge_checkpoint, the logits have to be those of peft.
"""
import json
import pathlib
import subprocess
import sys
import tempfile
import warnings

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

LIMIT = 1e-3
SMALL = dict(vocab_size=211, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
             num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, initializer_range=0.15)
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
GPT2 = dict(vocab_size=211, n_embd=48, n_layer=3, n_head=4, n_positions=128, initializer_range=0.15)


TIED = "LoRA of a tied parameter"  # which peft adapts in the embedding alone
FULL = "LoRA, some layers in full"


def llama(**changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, **changes}))


def gpt2(**changes):
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**GPT2, **changes}))


MODELS = {
    "llama": lambda: llama(),
    "llama tied, llama3 rope": lambda: llama(tie_word_embeddings=True, rope_parameters=LLAMA3),
    "llama biased, linear rope, head_dim": lambda: llama(
        attention_bias=True, mlp_bias=True, head_dim=16,
        rope_parameters=dict(rope_type="linear", rope_theta=1000.0, factor=4.0)),
    "gpt2": lambda: gpt2(),
    "gpt2 untied, scaled by layer": lambda: gpt2(tie_word_embeddings=False, n_inner=100,
                                                 scale_attn_by_inverse_layer_idx=True),
}


def randomize_vectors(model):
    """Biases start at zero and norms at one: mistakes in them would not show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def run(*command):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{command[0]} failed: {result.stderr.strip()}")


@torch.no_grad()
def logits_of(model, ids):
    return model.eval()(ids).logits


def load(folder):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                                    output_loading_info=True)
    unexpected = [name for name in info["unexpected_keys"] if not name.endswith(".masked_bias")]
    assert not info["missing_keys"] and not unexpected and not info["mismatched_keys"], info
    return model


class Comparison:
    def __init__(self):
        self.failed = self.count = 0

    def check(self, what, found, expected):
        distance = (found.double() - expected.double()).abs().max().item()
        passed = distance <= LIMIT  # false for NaN
        print(f"{'ok  ' if passed else 'FAIL'} {what}: distance {distance:.1e}, largest logit {expected.abs().max():.1f}")
        self.count += 1
        self.failed += not passed


def compare(comparison, print_logits, name, folder, scratch):
    expected_model = load(folder)
    ids = torch.randint(0, expected_model.config.vocab_size, (2, 70), generator=torch.Generator().manual_seed(1))
    save_file({"ids": ids}, scratch / "ids.safetensors")
    run(print_logits, folder, scratch / "ids.safetensors", scratch / "logits.safetensors", scratch / "saved")
    expected = logits_of(expected_model, ids)
    comparison.check(name, load_file(scratch / "logits.safetensors")["logits"], expected)
    comparison.check(f"{name}, saved again", logits_of(load(scratch / "saved"), ids), expected)


def adapters_for(name):
    """Both methods, and every rule by which a scaling is found; one kind is enough where only the files differ."""
    is_gpt2 = "gpt2" in name
    targets = ["c_attn", "c_proj", "c_fc"] if is_gpt2 else ["q_proj", "v_proj", "down_proj"]
    first = r"h\.0\.attn\.c_attn" if is_gpt2 else r"layers\.0\.self_attn\.q_proj"
    patterns = dict(rank_pattern={first: 5}, alpha_pattern={"attn.c_proj" if is_gpt2 else "v_proj": 2.5})
    common = dict(r=3, lora_alpha=7, target_modules=targets, init_lora_weights=False, fan_in_fan_out=is_gpt2)
    kinds = {"DoRA": dict(common, use_dora=True, **patterns)}
    if "one file" in name:
        kinds["LoRA"] = dict(common, **patterns)
        kinds["rank-stabilized LoRA"] = dict(common, use_rslora=True)
        kinds["LoRA with all biases"] = dict(common, bias="all")
    if "llama tied" in name:
        kinds["LoRA on the head"] = dict(common, target_modules=targets + ["lm_head"])
        kinds["LoRA on the embedding"] = dict(common, target_modules=["embed_tokens", "v_proj"])
        kinds["LoRA, the head in full"] = dict(common, modules_to_save=["lm_head"])
        kinds["LoRA of a parameter"] = dict(common, target_modules=[], target_parameters=["mlp.down_proj.weight"])
        kinds[TIED] = dict(common, target_modules=[], target_parameters=["embed_tokens.weight"])
    if name == "gpt2, one file":
        kinds[FULL] = dict(common, target_modules=["c_attn"], modules_to_save=["c_fc"])
    if "llama biased" in name:
        kinds["LoRA with biases"] = dict(common, init_lora_weights=True, lora_bias=True)
    return kinds


def compare_adapted(comparison, print_logits, merge_checkpoint, name, folder, scratch):
    ids = torch.randint(0, 211, (2, 70), generator=torch.Generator().manual_seed(2))
    save_file({"ids": ids}, scratch / "ids.safetensors")
    for kind, options in adapters_for(name).items():
        torch.manual_seed(3)
        adapted = peft.get_peft_model(load(folder), peft.LoraConfig(task_type="CAUSAL_LM", **options))
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if "lora_magnitude" in key:
                    parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
                elif parameter.requires_grad:
                    parameter.normal_(0, 0.1)
        with_table = "on the" in kind  # as peft by itself decides
        adapted.save_pretrained(scratch / kind, save_embedding_layers=with_table)
        expected = logits_of(adapted, ids)
        if kind == FULL:
            as_linear(scratch / kind)
        run(print_logits, folder, scratch / "ids.safetensors", scratch / "logits.safetensors", "--adapter", scratch / kind)
        attached = load_file(scratch / "logits.safetensors")["logits"]
        if kind == TIED:
            assert (attached - expected).abs().max() > 1
            expected = attached
        else:
            comparison.check(f"{name}, {kind} attached", attached, expected)
        run(merge_checkpoint, folder, scratch / kind, scratch / f"{kind} merged")
        comparison.check(f"{name}, {kind} merged", logits_of(load(scratch / f"{kind} merged"), ids), expected)


def as_linear(folder):
    """Weights in full as this library writes those of its linear layers, and not as Python's Conv1D has them."""
    file = folder / "adapter_model.safetensors"
    tensors = {name: tensor.t().contiguous() if name.endswith("c_fc.weight") else tensor
               for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def without_prefix(folder):
    """GPT-2 as it was first published: no "transformer." before the names, buffers of the attention among them."""
    weights = load_file(folder / "model.safetensors")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 128, 128).tril()
    weights["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def called_tied(folder):
    """Two tables that differ, in a directory whose config.json says that they are one."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))


def under_the_head(folder):
    """One table, in the file under the head's name only."""
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith(("embed_tokens.weight", "wte.weight")))
    weights["lm_head.weight"] = weights.pop(name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


EDITS = {  # form: the models it is for, and what makes it
    "without prefix": (["gpt2"], without_prefix),
    "called tied": (["llama", "gpt2 untied, scaled by layer"], called_tied),
    "under the head": (["llama tied, llama3 rope", "gpt2"], under_the_head),
}


def main():
    print_logits, merge_checkpoint, *folders = sys.argv[1:]
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    comparison = Comparison()
    for name, make in MODELS.items():
        for form in ["one file", "sharded", *EDITS]:
            models, edit = EDITS.get(form, ([name], None))
            if name not in models:
                continue
            with tempfile.TemporaryDirectory() as scratch:
                scratch = pathlib.Path(scratch)
                torch.manual_seed(0)
                model = make()
                randomize_vectors(model)
                model.save_pretrained(scratch / "model", max_shard_size="60KB" if form == "sharded" else "1GB")
                assert (scratch / "model" / "model.safetensors.index.json").exists() == (form == "sharded")
                if edit is not None:
                    edit(scratch / "model")
                compare(comparison, print_logits, f"{name}, {form}", scratch / "model", scratch)
                compare_adapted(comparison, print_logits, merge_checkpoint, f"{name}, {form}", scratch / "model",
                                scratch)
    for folder in folders:
        with tempfile.TemporaryDirectory() as scratch:
            compare(comparison, print_logits, folder, pathlib.Path(folder), pathlib.Path(scratch))
    print(f"{comparison.count} comparisons, {comparison.failed} failed")
    return comparison.failed > 0


if __name__ == "__main__":
    sys.exit(main())
