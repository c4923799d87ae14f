"""Fine-tunes tiny models with finetune_gpt and does the same in peft: python finetune_live.py --programs DIR

For a Llama and a GPT-2, with LoRA and with DoRA: twenty steps, replayed by peft from the same initial tensors and
batches (every loss within 1e-5); every adapter tensor must have trained in both; the adapter written must give peft the
logits that it gives here; and the merged directories of finetune_gpt and of merge_checkpoint must load in transformers
and give the logits of peft's merged model. What generate says greedily, with that adapter or with it merged, is what
peft's model says. A run in bfloat16 trains, and shows samples from before and after. One on a base in 12 bits is
replayed as well. Runs with the base in few bits train; their adapters are merged into the weights of the files, which
again give the logits of peft's merged model, and generate speaks with them to the last token. On bases that
quantize_checkpoint wrote in 4 bits peft and bitsandbytes have the logits of the adapter that was trained here.
"""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import adapter_logits
import bitsandbytes.nn.modules
import make_tiny_model
import replay_run
import torch
from safetensors.torch import load_file, save_file
from strict_peft import fail, largest_distance, load_adapter, load_base
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

LAYERS = 3  # of the tiny models
RUNS = [  # architecture, adapted layers in a block, method, tensors of one adapted layer, data, ways that change no loss
    ("llama", 2, "LowRank", 2, "--text", []),
    ("llama", 2, "DoRA", 3, "--jsonl", ["--checkpoint"]),
    ("gpt2", 1, "LowRank", 2, "--text", ["--without", "loss", "products"]),
    ("gpt2", 1, "DoRA", 3, "--text", ["--checkpoint"]),
    ("llama", 2, "LowRank", 2, "conversations", ["--without", "loss"]),
]
WAYS = {
    "--checkpoint": "computes the activations inside of a block again",
    "--without": "LibTorch's own way: loss",
    "--quantize": "linear layers but the head in lossless",
}
TOKENS = 16  # that generate writes


def write_data(folder):
    """A text, and pairs of different lengths, of which only the completions count in the loss."""
    text, pairs = folder / "text.txt", folder / "pairs.jsonl"
    text.write_text(make_tiny_model.TEXT * 12, encoding="utf-8")
    words = make_tiny_model.TEXT.split()
    lines = [
        {"prompt": " ".join(words[i : i + 2]), "completion": " " + " ".join(words[i + 2 : i + 4 + i % 4])}
        for i in range(len(words) - 8)
    ]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    conversations = folder / "conversations.jsonl"
    messages = [
        [{"role": "user", "content": line["prompt"]}, {"role": "assistant", "content": line["completion"]}]
        for line in lines
    ]
    conversations.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in messages), encoding="utf-8")
    return {"--text": ["--text", text], "--jsonl": ["--jsonl", pairs], "conversations": ["--jsonl", conversations]}


def run_whole(program, *arguments, said=""):
    """The program, which has to succeed, given `said` on its standard input."""
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # more would only wait for each other in models this small
    command = [program, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, env=one_thread, input=said.encode())
    if result.returncode != 0:
        reason = (result.stderr.strip() or result.stdout.strip()).decode()
        fail(f"{program.name} ended with {result.returncode}: {reason}")
    return result


def run(program, *arguments, said=""):
    """What such a program prints."""
    return run_whole(program, *arguments, said=said).stdout


def fine_tune(programs, base, data, method, ways, out):
    sizes = ["--steps", 20, "--batch", 2, "--accumulate", 2, "--block", 32, "--validation-blocks", 4]
    adapter = ["--method", method, "--rank", 4, "--alpha", 8, "--dropout", 0]
    schedule = ["--lr", 5e-3, "--warmup", 5, "--eval-every", 5, "--device", "cpu", "--sample-tokens", 0]
    said = run(
        programs / "finetune_gpt",
        *["--model", base, *data, "--out", out, "--export-run", out / "run"],
        *[*sizes, *adapter, *schedule, *ways],
    ).decode()
    if any((text in said) != (way in ways) for way, text in WAYS.items()):
        fail(f"finetune_gpt {' '.join(ways)} says something else: {said}")


def check_trained(out, expected_count):
    """Every tensor that finetune_gpt wrote differs from its initial value."""
    initial = load_file(out / "run/initial_adapter/adapter_model.safetensors")
    trained = load_file(out / "adapter/adapter_model.safetensors")
    changed = [name for name in trained if largest_distance(trained[name], initial[name]) > 0]
    print(f"adapter tensors that trained: {len(changed)} of {expected_count}")
    return len(changed) == len(trained) == len(initial) == expected_count


def check_replay(out):
    steps = [str(out / "run"), str(out / "metrics.csv"), "--tolerance-each", "1e-5", "--tolerance-validation", "1e-5"]
    return replay_run.main([*steps, "--expect-all-trained", "--trained-adapter", str(out / "adapter")]) == 0


def check_logits(programs, base, out):
    run(programs / "merge_checkpoint", base, out / "adapter", out / "merged_from_files")
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    ids = torch.randint(0, vocabulary, (2, 40), generator=torch.Generator().manual_seed(5))
    save_file({"ids": ids}, out / "ids.safetensors")
    logits = out / "logits.safetensors"
    run(programs / "print_logits", base, out / "ids.safetensors", logits, "--adapter", out / "adapter")
    merged = ["--merged", str(out / "merged"), "--merged", str(out / "merged_from_files")]
    return adapter_logits.main([str(base), str(out / "adapter"), str(logits), *merged]) == 0


def greedy_bytes(base, adapter, prompt):
    """The bytes of what peft's model says after a prompt."""
    from tokenizers import Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    model = load_adapter(load_base(base), adapter).eval()
    ids, said = tokenizer.encode(prompt).ids, b""
    with torch.no_grad():
        for _ in range(TOKENS):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
            if ids[-1] == model.config.eos_token_id:
                break
            said += bytes(byte_of[letter] for letter in tokenizer.id_to_token(ids[-1]))
    return said


def check_generate(programs, base, out):
    prompt = "The river rises in"
    options = ["--model", base, "--adapter", out / "adapter", "--temperature", 0, "--max-new-tokens", TOKENS]
    generate = programs / "generate"
    said = {
        "adapted": run(generate, *options, "--prompt", prompt),
        "merged": run(generate, *options, "--prompt", prompt, "--merge"),
        "from standard input": run(generate, *options, said=prompt + "\n"),
    }
    expected = greedy_bytes(base, out / "adapter", prompt) + b"\n"
    print(f"generate: {expected!r}")
    different = [name for name, text in said.items() if text != expected]
    chat = run(generate, *options, "--prompt", prompt, "--chat", "--system", "Answer.")
    wrong = subprocess.run([generate, "--model", base, "--temperature", "-1"], capture_output=True, text=True)
    print(f"generate --temperature -1: {wrong.stderr.strip()}")
    refused = wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and len(wrong.stderr) < 200
    if different:
        print(f"generate says something else: {', '.join(f'{name} {said[name]!r}' for name in different)}")
    return not different and refused and chat != said["adapted"] and len(expected) > TOKENS / 2


def validation_losses(out):
    with open(out / "metrics.csv", newline="") as file:
        return [float(row["validation_loss"]) for row in csv.DictReader(file) if row["validation_loss"]]


def check_bfloat16(programs, base, data, out):
    """That it trains; what it costs in digits is in the tests of the library."""
    options = ["--model", base, *data, "--out", out, "--dtype", "bfloat16", "--lr", 2e-2, "--prompt", "The river"]
    sizes = ["--steps", 20, "--warmup", 2, "--batch", 2, "--block", 32, "--rank", 4, "--eval-every", 20]
    said = run(programs / "finetune_gpt", *options, *sizes, "--sample-tokens", 5, "--device", "cpu")
    said = said.decode(errors="replace")
    samples = [line for line in said.splitlines() if line.startswith(("sample ", "  The river >>> "))]
    losses = validation_losses(out)
    print(f"bfloat16: validation losses {losses}; {samples}")
    load_base(out / "merged", "bfloat16")
    shows_both = [line.split(" >>> ")[0] for line in samples] == [
        "sample before training", "  The river", "sample after training", "  The river"
    ]
    return shows_both and losses[-1] < losses[0] - 0.1


def written_tokens(result):
    """How many tokens generate says that it wrote, of which each is a byte or more of its output."""
    count = int(re.search(rb"^(\d+) tokens after", result.stderr, re.MULTILINE).group(1))
    return count if len(result.stdout) > count else 0


def check_quantized(programs, base, data, out):
    """A base in few bits trains; its adapter is merged into the weights of the files, and generate runs with it.

    That the numbers of such a model are right is in the tests of the library; here, that the options reach it.
    """
    quantized = ["--quantize", "nf4", "--quantize-embedding", "int8"]
    options = ["--model", base, *data, "--out", out, *quantized, "--lr", 2e-2, "--device", "cpu", "--sample-tokens", 0]
    sizes = ["--steps", 20, "--warmup", 2, "--batch", 2, "--block", 32, "--rank", 4, "--eval-every", 20]
    said = run(programs / "finetune_gpt", *options, *sizes).decode()
    losses = validation_losses(out)
    in_float = ["--model", base, *data, "--out", out / "float", "--device", "cpu", "--sample-tokens", 0, "--no-merge"]
    run(programs / "finetune_gpt", *in_float, "--steps", 1, "--warmup", 0, "--batch", 2, "--block", 32)
    generate = [programs / "generate", "--model", base, *quantized, "--prompt", "The river rises in"]
    generate += ["--temperature", 0, "--max-new-tokens", TOKENS]
    with_adapter = [*generate, "--adapter", out / "adapter"]
    alone = run(*generate)
    adapted = run_whole(*with_adapter)
    wrong = subprocess.run([*map(str, with_adapter), "--merge"], capture_output=True)
    print(f"in few bits: validation losses {losses}; generate: {alone!r}, adapted {adapted.stdout!r}")
    merged_logits = check_logits(programs, base, out)
    merged = [(out / name / "model.safetensors").read_bytes() for name in ("merged", "merged_from_files")]
    passed = {
        "trains": losses[-1] < losses[0] - 0.1,
        "holds few bits": losses[0] != validation_losses(out / "float")[0],
        "says so": "linear layers but the head in nf4" in said and "embedding and head in int8" in said,
        "merged as in peft": merged_logits,
        "merges as merge_checkpoint": merged[0] == merged[1],  # by the same function: that it is called
        "generates all tokens": written_tokens(adapted) == TOKENS,
        "generates with the adapter": adapted.stdout != alone,  # that it is read
        "refuses to merge": wrong.returncode == 2 and b"merge_checkpoint" in wrong.stderr,
    }
    print("in few bits:", "; ".join(f"{name}: {'yes' if is_so else 'NO'}" for name, is_so in passed.items()))
    return all(passed.values())


def check_quantized_logits(programs, base, out):
    """peft's logits on the base in few bits are those here, and those of the merged model. (In peft a merged one is in
    few bits again, and has others.)"""
    run(programs / "merge_checkpoint", base, out / "adapter", out / "merged_from_files")
    vocabulary = config_of(base)["vocab_size"]
    ids, logits = out / "ids.safetensors", out / "logits.safetensors"
    save_file({"ids": torch.randint(0, vocabulary, (2, 40), generator=torch.Generator().manual_seed(5))}, ids)
    results = []
    for model in [base, "--adapter", out / "adapter"], [out / "merged"], [out / "merged_from_files"]:
        run(programs / "print_logits", model[0], ids, logits, *model[1:])
        results.append(adapter_logits.main([str(base), str(out / "adapter"), str(logits)]) == 0)
    return all(results)


def check_their_files(programs, base, out):
    """A base that transformers wrote in 4 bits gives peft's logits with the same adapter."""
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    theirs, ids, logits = out / "theirs", out / "ids.safetensors", out / "logits.safetensors"
    AutoModelForCausalLM.from_pretrained(base, quantization_config=how, dtype=torch.float32).save_pretrained(theirs)
    run(programs / "print_logits", theirs, ids, logits, "--adapter", out / "adapter")
    return adapter_logits.main([str(theirs), str(out / "adapter"), str(logits)]) == 0


def config_of(model):
    return json.loads((model / "config.json").read_text())


def quantize(programs, base, out, *options):
    said = run(programs / "quantize_checkpoint", base, out, "--dtype", "float32", *options).decode()
    tensors = load_file(out / "model.safetensors")
    four = sum(name.endswith("quant_state.bitsandbytes__nf4") for name in tensors)
    return said, four, sum(name.endswith(".SCB") for name in tensors)


def check_quantized_files(programs, base, data, out):
    """A base that quantize_checkpoint wrote: adapters train on it, and peft gives the logits of adapter and base."""
    layers = (7 if "llama" in base.name else 4) * LAYERS
    ours, mixed, nearest = out / "base", out / "mixed", out / "nearest"
    blocks = [*data, "--block", 32]
    said, *counts = quantize(programs, base, ours, *blocks)
    first = quantize(programs, base, mixed, *blocks, "--int8", r".*\b0\..*")
    quantize(programs, base, nearest)
    sizes = ["--steps", 20, "--warmup", 2, "--batch", 2, "--block", 32, "--rank", 4, "--eval-every", 20, "--lr", 2e-2]
    sizes += ["--method", "DoRA" if "llama" in base.name else "LowRank"]
    run_options = [*data, "--device", "cpu", "--sample-tokens", 0, *sizes]
    trained = run(programs / "finetune_gpt", "--model", ours, "--out", out, *run_options).decode()
    losses = {out: validation_losses(out)}
    for other in mixed, nearest:
        run(programs / "finetune_gpt", "--model", other, "--out", other, *run_options)
        losses[other] = validation_losses(other)
    print(f"files in few bits: {said.strip()}; validation losses {list(losses.values())}")
    codes = [load_file(folder / "model.safetensors") for folder in (ours, nearest)]
    weights = [name for name in codes[0] if name.endswith(".weight.absmax")]
    wrong = [
        subprocess.run([str(part) for part in command], capture_output=True, text=True)
        for command in (
            [programs / "quantize_checkpoint", ours, out / "again"],
            [programs / "quantize_checkpoint", base, out / "again", "--int8", "q_proj"],
            [programs / "quantize_checkpoint", base, out / "again", "--int8", "(_proj"],
            [programs / "quantize_checkpoint", base, out / "again", "--int8", "q_proj", "--quantize", "int8"],
            [programs / "quantize_checkpoint", base, out / "again", "--quantize", "int8", *data],
            [programs / "quantize_checkpoint", base, out / "again", "--calibrate", 8],
            [programs / "finetune_gpt", "--model", ours, "--out", out / "again", *data, "--quantize", "nf4"],
            [programs / "generate", "--model", ours, "--adapter", out / "adapter", "--merge", "--prompt", "A"],
        )
    ]
    # Where a processor has products of bfloat16, bitsandbytes takes them for layers of 32, 64, ... rows only.
    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    reasons = ["in few bits already", "matches no linear layer", "no regular expression", "nothing beside", "no use for"]
    reasons += ["--calibrate", "leave --quantize out", "merge_checkpoint"]
    passed = {
        "all layers in 4 bits": counts == [layers, 0],
        "some in 8": first[1:] == (layers - layers // LAYERS, layers // LAYERS),
        "calibrated": any((codes[0][name[:-7]] != codes[1][name[:-7]]).any() for name in weights),
        "under the same scales": all(torch.equal(codes[0][name], codes[1][name]) for name in weights),
        "says so": "in the few bits that its files have" in trained and f"{layers} layers in nf4:" in said,
        "trains": all(after < before - 0.1 for before, *_, after in losses.values()),
        "transformers and peft": check_quantized_logits(programs, ours, out),
        "read as transformers writes it": check_their_files(programs, base, out),
        "nothing of few bits in the configuration of a mixture": "quantization_config" not in config_of(mixed),
        "nor of what is merged": "quantization_config" not in config_of(out / "merged"),
        "refuses": all(
            result.returncode == 2 and reason in result.stderr for result, reason in zip(wrong, reasons, strict=True)
        ),
    }
    print("files in few bits:", "; ".join(f"{name}: {'yes' if is_so else 'NO'}" for name, is_so in passed.items()))
    return all(passed.values())


def check_lossless(programs, base, data, out):
    """Weights of bfloat16 in 12 bits are the weights, so that peft repeats the run on the files."""
    make_tiny_model.main([str(base), "--bfloat16"])
    fine_tune(programs, base, data, "LowRank", ["--quantize", "lossless", "--quantize-embedding", "lossless"], out)
    return check_trained(out, LAYERS * 2 * 2) and check_replay(out)


def check_same_files(out):
    """The model merged in memory and the one merged from file to file are one model."""
    ours, streamed = (load_file(out / name / "model.safetensors") for name in ("merged", "merged_from_files"))
    if ours.keys() != streamed.keys():
        print(f"the merged directories differ in tensors: {sorted(ours.keys() ^ streamed.keys())}")
        return False
    distance = max(largest_distance(ours[name], streamed[name]) for name in ours)
    print(f"merged in memory and from files: {len(ours)} tensors, largest distance {distance:.2e}, at most 1e-06")
    return distance <= 1e-6


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=Path, required=True, help="folder of finetune_gpt and the others")
    programs = parser.parse_args().programs
    torch.set_num_threads(1)
    failed, count = [], 0
    with tempfile.TemporaryDirectory(prefix="lora_finetune_") as folder:
        folder = Path(folder)
        data = write_data(folder)
        for architecture, layers_adapted, method, tensors, kind, ways in RUNS:
            base, out = folder / architecture, folder / f"{architecture}_{method}_{kind}"
            if not base.exists():
                make_tiny_model.main([str(base), "--architecture", architecture])
            print(f"\n{architecture}, {method}, {kind}")
            fine_tune(programs, base, data[kind], method, ways, out)
            checks = {
                "trained": check_trained(out, LAYERS * layers_adapted * tensors),
                "replay": check_replay(out),
                "logits": check_logits(programs, base, out),
                "files": check_same_files(out),
                "generate": check_generate(programs, base, out),
            }
            count += len(checks)
            failed += [f"{architecture}, {method}: {name}" for name, passed in checks.items() if not passed]
        count += 6
        if not check_bfloat16(programs, folder / "llama", data["--text"], folder / "bfloat16"):
            failed.append("bfloat16")
        if not check_lossless(programs, folder / "llama_bfloat16", data["--text"], folder / "lossless"):
            failed.append("lossless")
        for architecture in "llama", "gpt2":
            out = folder / f"{architecture}_quantized"
            if not check_quantized(programs, folder / architecture, data["--text"], out):
                failed.append(f"{architecture} in few bits")
            # Of layers that are no whole number of blocks wide, the kernel of bitsandbytes (0.50.2) for AVX-512 takes
            # the scales of other blocks.
            base = folder / f"{architecture}_of_blocks"
            make_tiny_model.main([str(base), "--architecture", architecture, "--whole-blocks"])
            if not check_quantized_files(programs, base, data["--text"], folder / f"{architecture}_files"):
                failed.append(f"{architecture}, files in few bits")
    print(f"\n{count} checks, {len(failed)} failed{': ' if failed else ''}{'; '.join(failed)}")
    return int(bool(failed) or count != 5 * len(RUNS) + 6)


if __name__ == "__main__":
    sys.exit(main())
