"""What do bases in few bits cost fine-tuning, in loss, memory and time?

python quantized_finetune.py [--programs DIR] [--model DIR] [--text FILE] [--out DIR] [--steps N] [--threads N]
                             [--seed N] [--targets NAME ...] [--calibrate ROWS] [--only NAME ...]

Without options it takes what `sh tests/run.sh` and `sh examples/finetune_gpt/run.sh` have left in build/, and needs
the Python of build/venv.

The default run of finetune_gpt (100 steps of 4x128 tokens, rank 8, alpha 16, on q_proj and v_proj unless --targets says
otherwise) on the same model held in different ways, each in a process of its own, from the same seed and data; what is
calibrated was written by quantize_checkpoint. Prints a line of a Markdown table for each: validation loss of the base
and after training, memory of the base, also as a share of float32, what the process took at most while the base was
loaded and in all, and the processor time of a step on one thread, which hardly depends on what else the machine does:
that of a run of six steps, less that of a run of one. Below the table, the share for the linear layers alone, of which
some bases hold everything else in floating point.
"""

import csv
import math
import re
import sys
import tempfile
from pathlib import Path

from finetune_vs_peft import finetune_options, require, run_measured
from safetensors import safe_open

BASES = {  # name: --dtype, --quantize, --quantize-embedding
    "float32": ("float32", "none", "none"),
    "bfloat16": ("bfloat16", "none", "none"),
    "int8": ("float32", "int8", "none"),
    "int8, embedding int8": ("float32", "int8", "int8"),
    "NF4": ("float32", "nf4", "none"),
    "NF4, embedding int8": ("float32", "nf4", "int8"),
    "NF4, embedding NF4": ("float32", "nf4", "nf4"),
    "NF4, rest bfloat16": ("bfloat16", "nf4", "none"),
    "bfloat16, lossless": ("bfloat16", "lossless", "lossless"),
    "NF4, rest bfloat16, embedding lossless": ("bfloat16", "nf4", "lossless"),
    "NF4, calibrated": ("float32", "none", "none"),
    "NF4, calibrated, rest bfloat16, embedding lossless": ("bfloat16", "none", "lossless"),
    "NF4, five blocks int8, calibrated, rest bfloat16, embedding lossless": ("bfloat16", "none", "lossless"),
}
CALIBRATED = {  # what quantize_checkpoint is told for those that it writes
    "NF4, calibrated": [],
    "NF4, calibrated, rest bfloat16, embedding lossless": [],
    "NF4, five blocks int8, calibrated, rest bfloat16, embedding lossless": ["--int8", r".*\.layers\.[0-4]\..*"],
}
MEMORY = re.compile(r"the model takes ([\d.]+) GB \(([\d.]+) GB in float32\); ([\d.]+) GB at most while it was loaded")


def run(command, threads):
    """Runs a program that has to succeed; returns what it prints, its peak memory in bytes and its processor time."""
    lines = []

    def show(line):
        lines.append(line)
        print("  ", line, end="", file=sys.stderr, flush=True)

    status, peak, seconds = run_measured(command, threads, show)
    if status != 0:
        sys.exit(f"error: {command[0]} ended with {status}")
    return "".join(lines), peak, seconds


def read_metrics(path):
    """Validation losses before and after training."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["validation_loss"]) for row in rows if row["validation_loss"]]
    return losses[0], losses[-1]


def measure(options, base, out):
    dtype, layers, embedding = BASES[base]
    model = options.model
    if base in CALIBRATED:
        model = out / "base"
        data = ["--text", options.text, "--calibrate", options.calibrate, "--dtype", dtype, "--device", "cpu"]
        quantize = [options.programs / "quantize_checkpoint", options.model, model, *data, *CALIBRATED[base]]
        run(quantize, options.threads)
    command = [options.programs / "finetune_gpt", "--model", model, "--text", options.text, "--out", out]
    command += ["--dtype", dtype, "--quantize", layers, "--quantize-embedding", embedding]
    command += ["--targets", *options.targets, "--seed", options.seed, "--device", "cpu"]
    command += ["--sample-tokens", 0, "--no-merge", "--overwrite"]
    short = [*command, "--eval-every", 0, "--validation-blocks", 1, "--threads", 1]
    one, six = (run([*short, "--steps", steps], 1)[2] for steps in (1, 6))
    whole = [*command, "--threads", options.threads, "--steps", options.steps]
    printed, peak, _ = run(whole, options.threads)
    memory, in_float, loading = map(float, MEMORY.search(printed).groups())
    before, after = read_metrics(out / "metrics.csv")
    return {
        "memory": memory,
        "share": memory / in_float,
        "loading": loading,
        "peak": peak / 1e9,
        "before": before,
        "after": after,
        "seconds": (six - one) / 5,
    }


def count_numbers(model):
    """All numbers of a checkpoint in one file, and those of its linear layers but the head."""
    total = linear = 0
    with safe_open(model / "model.safetensors", "pt") as file:
        for name in file.keys():
            shape = file.get_slice(name).get_shape()
            numbers = math.prod(shape)
            total += numbers
            is_table = any(part in name for part in ("embed_tokens", "lm_head", "wte", "wpe"))
            linear += numbers if len(shape) == 2 and not is_table else 0
    return total, linear


def main():
    parser = finetune_options(__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=["q_proj", "v_proj"], metavar="NAME", help="or all-linear")
    parser.add_argument("--calibrate", type=int, default=256, metavar="ROWS", help="of training data (256)")
    parser.add_argument("--only", nargs="+", choices=list(BASES), default=list(BASES), metavar="NAME")
    options = parser.parse_args()
    require("examples/finetune_gpt/run.sh", options.programs / "finetune_gpt", options.model, options.text)

    results = {}
    with tempfile.TemporaryDirectory(prefix="lora_benchmark_") as temporary:
        for number, base in enumerate(options.only):
            print(f"{base}:", file=sys.stderr)
            out = (options.out or Path(temporary)) / str(number)
            out.mkdir(parents=True, exist_ok=True)
            results[base] = measure(options, base, out)

    print(f"| base | loss before | after {options.steps} steps | base, GB | of float32 | loading, GB | peak, GB | step, s |")
    print("|---|---|---|---|---|---|---|---|")
    for base, r in results.items():
        print(
            f"| {base} | {r['before']:.3f} | {r['after']:.3f} | {r['memory']:.3f} | {r['share']:.3f} | "
            f"{r['loading']:.3f} | {r['peak']:.2f} | {r['seconds']:.2f} |"
        )
    total, linear = count_numbers(options.model)
    print(f"\nthe linear layers alone, {linear / 1e6:.1f} of {total / 1e6:.1f} million numbers:")
    for base, r in results.items():
        dtype, layers, embedding = BASES[base]
        if (layers != "none" or base in CALIBRATED) and embedding == "none":
            rest = (total - linear) * (4 if dtype == "float32" else 2)
            print(f"{base:<22} {(r['memory'] * 1e9 - rest) / (4 * linear):.3f} of float32")


if __name__ == "__main__":
    main()
