"""Fine-tunes tiny models with finetune_gpt and does the same in peft: python finetune_live.py --programs DIR

For a Llama and a GPT-2, with LoRA and with DoRA: twenty steps, replayed by peft from the same initial tensors and
batches (every loss within 1e-5); every adapter tensor must have trained in both; the adapter written must give peft the
logits that it gives here; and the merged directories of finetune_gpt and of merge_checkpoint must load in transformers
and give the logits of peft's merged model.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import adapter_logits
import make_tiny_model
import replay_run
import torch
from safetensors.torch import load_file, save_file
from strict_peft import fail, largest_distance

LAYERS = 3  # of the tiny models
RUNS = [  # architecture, adapted layers in a block, method, tensors of one adapted layer, data
    ("llama", 2, "LowRank", 2, "--text"),
    ("llama", 2, "DoRA", 3, "--jsonl"),
    ("gpt2", 1, "LowRank", 2, "--text"),
    ("gpt2", 1, "DoRA", 3, "--text"),
]


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
    return {"--text": text, "--jsonl": pairs}


def run(program, *arguments):
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # more would only wait for each other in models this small
    result = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, env=one_thread)
    if result.returncode != 0:
        fail(f"{program.name} ended with {result.returncode}: {result.stderr.strip() or result.stdout.strip()}")


def fine_tune(programs, base, data, method, out):
    sizes = ["--steps", 20, "--batch", 2, "--accumulate", 2, "--block", 32, "--validation-blocks", 4]
    adapter = ["--method", method, "--rank", 4, "--alpha", 8, "--dropout", 0]
    schedule = ["--lr", 5e-3, "--warmup", 5, "--eval-every", 5, "--device", "cpu", "--sample-tokens", 0]
    run(
        programs / "finetune_gpt",
        *["--model", base, *data, "--out", out, "--export-run", out / "run"],
        *sizes,
        *adapter,
        *schedule,
    )


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
        for architecture, layers_adapted, method, tensors, kind in RUNS:
            base, out = folder / architecture, folder / f"{architecture}_{method}"
            if not base.exists():
                make_tiny_model.main([str(base), "--architecture", architecture])
            print(f"\n{architecture}, {method}, {kind}")
            fine_tune(programs, base, [kind, data[kind]], method, out)
            checks = {
                "trained": check_trained(out, LAYERS * layers_adapted * tensors),
                "replay": check_replay(out),
                "logits": check_logits(programs, base, out),
                "files": check_same_files(out),
            }
            count += len(checks)
            failed += [f"{architecture}, {method}: {name}" for name, passed in checks.items() if not passed]
    print(f"\n{count} checks, {len(failed)} failed{': ' if failed else ''}{'; '.join(failed)}")
    return int(bool(failed) or count != 4 * len(RUNS))


if __name__ == "__main__":
    sys.exit(main())
