"""How long does it take to load one more adapter beside those that are loaded, here and in peft?

python load_vs_peft.py [--programs DIR] [--model DIR] [--count N] [--rounds N]

A new adapter of 2 MB (rank 8 on q_proj and v_proj of SmolLM2-135M) is loaded into one model again and again, each time
under another name. Processes of both take turns; the model is loaded, with one adapter, before the clock starts. Prints
the medians, over all rounds, of the first ten loads and of the last ten, and of all.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "build" / "models" / "SmolLM2-135M-Instruct"


def make_adapter(model_dir, folder):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config).save_pretrained(folder)


def load_in_peft(model_dir, folder, count):
    """Prints the microseconds of each load, as load_adapter does."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), folder, adapter_name="first")
    for i in range(count):
        start = time.perf_counter()
        model.load_adapter(folder, f"adapter_{i}")
        print((time.perf_counter() - start) * 1e6)


def times(command):
    result = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=True)
    return [float(line) / 1000 for line in result.stdout.split()]


def row(name, runs):
    first, last = (statistics.median(sum((run[part] for run in runs), [])) for part in (slice(10), slice(-10, None)))
    return f"{name:<12} {first:>8.2f} ms {last:>8.2f} ms {statistics.median(sum(runs, [])):>8.2f} ms"


def compare(programs, model, count, rounds):
    """The size of an adapter in bytes, and the milliseconds of each load of each round, here and in peft."""
    with tempfile.TemporaryDirectory(prefix="lora_load_") as folder:
        make_adapter(model, folder)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        here, there = [], []
        for _ in range(rounds):
            here.append(times([programs / "load_adapter", model, folder, count]))
            there.append(times([sys.executable, __file__, "--in-peft", folder, "--model", model, "--count", count]))
    return size, here, there


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=Path, default=ROOT / "build/cmake/programs", help="folder of load_adapter")
    parser.add_argument("--model", type=Path, default=MODEL, help="Hugging Face directory")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--in-peft", type=Path, help=argparse.SUPPRESS)  # the folder; this process is peft's
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.in_peft:
        return load_in_peft(options.model, options.in_peft, options.count)
    for path in [options.programs / "load_adapter", options.model]:
        if not path.exists():
            sys.exit(f"error: {path} is missing; sh tests/run.sh makes it")
    size, here, there = compare(options.programs, options.model, options.count, options.rounds)
    print(f"an adapter of {size / 1e6:.2f} MB, {options.count} times, {options.rounds} rounds")
    print(f"{'':<12} {'first ten':>11} {'last ten':>11} {'all':>11}")
    print(row("here", here))
    print(row("peft", there))


if __name__ == "__main__":
    sys.exit(main())
