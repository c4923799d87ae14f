"""Does fine-tuning here reach what peft reaches, how long does a step take, and how much memory?

python finetune_vs_peft.py [--programs DIR] [--model DIR] [--text FILE] [--out DIR] [--steps N] [--threads N] [--seed N]
                           [--device cpu|cuda] [--bfloat16] [-- OPTIONS OF finetune_gpt]

Without options it takes what `sh tests/run.sh` and `sh examples/finetune_gpt/run.sh` have left in build/, and needs
the Python of build/venv.

The default run (100 steps of 4x128 tokens, rank 8, alpha 16, q_proj and v_proj) with finetune_gpt, then in peft, each
in a process of its own, from the same initial tensors, batches and learning rates. Prints the losses side by side, and
the median time of a step and the peak memory, on a CPU of both processes and else on the device, as ratios; of a Llama
on a CPU also what the step's products with frozen weights take alone, by the program `products`. The
adapter that finetune_gpt wrote is then read by peft, which has to give, on a CPU, the logits that are given here. Exits
with 1 when a loss is more than 0.02 away from peft's, or a logit more than 3e-4, a hundred-thousandth of the largest.

What follows `--` changes the run of both, e.g. `-- --targets all-linear`, or that of finetune_gpt alone, as
`-- --checkpoint` does; with a `--dropout`, which is random in both, losses are not compared. With --bfloat16 both read
a copy of the model whose files are in bfloat16, as most are published, which is what `-- --quantize lossless` takes.
"""

import argparse
import csv
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPLAY = ROOT / "tests" / "peft" / "replay_run.py"
MODEL = ROOT / "build" / "models" / "SmolLM2-135M-Instruct"
TOLERANCE = 0.02
LOGITS_TOLERANCE = 3e-4
GIBIBYTE = 1 << 30


def run_measured(command, threads, output=None):
    """Runs a program to its end; returns its exit status, its peak memory in bytes and its processor time in seconds,
    that in the kernel left out. What it prints is not shown, but passed line by line to `output` if there is one."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    stdout = subprocess.PIPE if output else None
    process = subprocess.Popen([str(part) for part in command], env=environment, stdout=stdout, text=True)
    if output:
        with process.stdout as lines:
            for line in lines:
                output(line)
    _, status, usage = os.wait4(process.pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024, usage.ru_utime


def finetune_options(description):
    """A parser of the options that every benchmark of finetune_gpt has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--programs", type=Path, default=ROOT / "build/cmake/programs", help="folder of finetune_gpt")
    parser.add_argument("--model", type=Path, default=MODEL, help="Hugging Face directory")
    parser.add_argument("--text", type=Path, default=ROOT / "build/text/kjv.txt")
    parser.add_argument("--out", type=Path, help="keep the runs there")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser


def require(script, *paths):
    """Ends the program when something is missing that the script makes."""
    for path in paths:
        if not path.exists():
            sys.exit(f"error: {path} is missing; sh {script} makes it")


def our_seconds_per_step(metrics, tokens_per_step):
    with open(metrics, newline="") as file:
        rates = [float(row["tokens_per_second"]) for row in csv.DictReader(file) if row["tokens_per_second"]]
    return statistics.median(tokens_per_step / rate for rate in rates)


def run_finetune(command, options):
    """Runs finetune_gpt and returns the most memory that it took."""
    lines = []

    def show(line):
        lines.append(line)
        print(line, end="", flush=True)

    status, of_process, _ = run_measured(command, options.threads, show)
    if status != 0:
        sys.exit(f"error: finetune_gpt ended with {status}")
    if options.device == "cpu":
        return of_process
    return float(re.search(r"^memory +([0-9.]+) GB at most so far", "".join(lines), re.MULTILINE)[1]) * 1e9


def table_row(name, ours, theirs, unit):
    return f"{name:<28} {ours:>9.3f} {unit:<4} {theirs:>9.3f} {unit:<4} {ours / theirs:>7.3f}"


def measure(options, out):
    """Runs both and returns (seconds per step, peak memory) of ours and of peft, and whether the losses agree."""
    run, metrics, summary = out / "run", out / "metrics.csv", out / "peft.json"
    fine_tune = [options.programs / "finetune_gpt", "--model", options.model, "--text", options.text, "--out", out]
    # Neither samples nor merging: peft's process does not do them either.
    settings = ["--export-run", run, "--device", options.device, "--sample-tokens", 0, "--no-merge", "--overwrite"]
    schedule = ["--steps", options.steps, "--warmup", min(10, options.steps)]
    sizes = [*schedule, "--seed", options.seed, "--threads", options.threads]
    our_memory = run_finetune([*fine_tune, *settings, *sizes, *options.rest], options)
    drops = "--dropout" in options.rest
    tolerance = "inf" if drops else TOLERANCE
    tolerances = ["--allow-dropout"] if drops else []
    tolerances += ["--tolerance-each", tolerance, "--tolerance-validation", tolerance, "--summary", summary]
    tolerances += ["--device", options.device]
    command = [sys.executable, REPLAY, run, metrics, *tolerances, "--trained-adapter", out / "adapter"]
    status, peft_memory, _ = run_measured(command, options.threads)
    if not summary.exists():
        sys.exit(f"error: the replay in peft ended with {status}")
    replay = json.loads(summary.read_text())
    if options.device != "cpu":
        peft_memory = replay["peak_memory_bytes"]  # of the device
    ours = our_seconds_per_step(metrics, options.tokens_per_step), our_memory
    return ours, (replay["seconds_per_step"], peft_memory), status == 0


def in_bfloat16(model, copy):
    """The same directory with its weights rounded to bfloat16; by a process of its own, since what this one takes would
    count as memory of those that it starts."""
    copy.mkdir(parents=True, exist_ok=True)
    round_file = (
        "import sys; from safetensors.torch import load_file, save_file; "
        "rounded = {name: t.bfloat16() if t.is_floating_point() else t for name, t in load_file(sys.argv[1]).items()}; "
        "save_file(rounded, sys.argv[2], metadata={'format': 'pt'})"
    )
    for file in model.iterdir():
        if file.suffix == ".safetensors":
            subprocess.run([sys.executable, "-c", round_file, file, copy / file.name], check=True)
        elif file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    return copy


def same_logits(options, out):
    """Whether peft gives the logits that are given here, with the adapter of the run."""
    ids, logits = out / "ids.safetensors", out / "logits.safetensors"
    save_ids = "import sys, torch; from safetensors.torch import save_file; torch.manual_seed(0); "
    save_ids += "save_file({'ids': torch.randint(0, int(sys.argv[2]), (2, 64))}, sys.argv[1])"
    vocabulary = json.loads((options.model / "config.json").read_text())["vocab_size"]
    subprocess.run([sys.executable, "-c", save_ids, ids, str(vocabulary)], check=True)
    program = [options.programs / "print_logits", options.model, ids, logits, "--adapter", out / "adapter"]
    subprocess.run(program, check=True)
    compare = ROOT / "tests" / "peft" / "adapter_logits.py"
    command = [sys.executable, compare, options.model, out / "adapter", logits, "--tolerance", str(LOGITS_TOLERANCE)]
    return subprocess.run(command).returncode == 0


def products_alone(options):
    """Seconds of a step's products with frozen weights, LibTorch's and those of a scope."""
    config = json.loads((options.model / "config.json").read_text())
    if config["model_type"] != "llama" or options.device != "cpu":
        return None
    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    shapes = [(queries, width, 1), (keys, width, 2), (width, queries, 1), (inner, width, 2), (width, inner, 1)]
    weights = [f"{out}x{into}:{count * layers}" for out, into, count in shapes]
    command = [options.programs / "products", options.tokens_per_step, options.threads, 5, *weights]
    command = [str(part) for part in [*command, f"{config['vocab_size']}x{width}:1"]]
    text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [float(seconds) for seconds in re.findall(r"([0-9.]+) s", text)]


def main():
    parser = finetune_options(__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bfloat16", action="store_true", help="of files in bfloat16")
    parser.add_argument("rest", nargs="*", metavar="OPTION", help="after --: further options of finetune_gpt")
    options = parser.parse_args()
    options.tokens_per_step = 4 * 128  # the defaults of finetune_gpt
    require("examples/finetune_gpt/run.sh", options.programs / "finetune_gpt", options.model, options.text)
    programs = ("print_logits", "products") if options.device == "cpu" else ("print_logits",)
    require("tests/run.sh", *(options.programs / name for name in programs))

    with tempfile.TemporaryDirectory(prefix="lora_benchmark_") as temporary:
        out = options.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        if options.bfloat16:
            options.model = in_bfloat16(options.model, out / "in_bfloat16")
        ours, peft, agree = measure(options, out)
        agree = same_logits(options, out) and agree
        alone = products_alone(options)
    where = f"threads: {options.threads}" if options.device == "cpu" else options.device
    print(f"\n{'':<28} {'here':>9} {'':<4} {'peft':>9} {'':<4} {'ratio':>7}   ({where})")
    print(table_row("median time of a step", ours[0], peft[0], "s"))
    print(table_row("peak memory", ours[1] / GIBIBYTE, peft[1] / GIBIBYTE, "GiB"))
    if alone:
        for name, seconds in zip(("LibTorch's", "a scope's"), alone, strict=True):
            print(f"of {name + ' products alone':<25} {seconds:>9.3f} s {'':>16} {ours[0] / seconds:>7.3f}")
    return int(not agree)


if __name__ == "__main__":
    sys.exit(main())
