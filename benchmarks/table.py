"""What peft takes, and what of it is needed here: one table of layers, fine-tuning, the first step, and loading.

python table.py [--programs DIR] [--model DIR] [--text FILE] [--out DIR] [--device cpu|cuda] [--threads N] [--turns N]
                [--steps N] [--short]

Runs the work of layer_vs_peft.py, finetune_vs_peft.py and load_vs_peft.py, here and in peft in turns. A row has the
medians of the turns, that of their ratios, and the spread of these, (largest - smallest) / median. Layers are on one
thread and counted in the time of LibTorch's frozen layer. On other devices than a CPU there are no batches of mixed
rows, and nothing is loaded. The table comes last, and is left in DIR as benchmarks.md, with a picture, benchmarks.png,
where there is gnuplot. Exits with 1 when a loss of a run without dropout, or a logit of an adapter, is not peft's.
With --short everything runs as briefly as it can, which shows that it runs, and no times.
"""

import argparse
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import finetune_vs_peft
import layer_vs_peft
import load_vs_peft

RUNS = {
    "q and v": [],
    "q and v, checkpoints": ["--checkpoint"],
    "all linear layers, dropout 0.05": ["--targets", "all-linear", "--dropout", "0.05"],
}


class Row:
    """Measurements of one thing here and in peft, a value for each turn."""

    def __init__(self, name, unit, here, peft):
        self.name, self.unit = name, unit
        self.here, self.peft = statistics.median(here), statistics.median(peft)
        ratios = [mine / theirs for mine, theirs in zip(here, peft, strict=True)]
        self.ratio = statistics.median(ratios)
        self.spread = f"{100 * (max(ratios) - min(ratios)) / self.ratio:.0f} %" if len(ratios) > 1 else "-"

    def text(self):
        here, peft = (f"{value:.4g}{self.unit}" for value in (self.here, self.peft))
        return f"| {self.name} | {here} | {peft} | {self.ratio:.2f} | {self.spread} |"


def layers(options):
    rounds = 2 if options.short else 60
    here, peft = layer_vs_peft.compare(options.programs, rounds, options.turns, options.device)
    return [Row(case, "", [mine for mine, _ in here[case]], peft[case]) for case in here if case in peft]


def fine_tuning(options):
    rows, agree = [], True
    names = ["q and v, checkpoints"] if options.short else RUNS  # of all, that with most of the program in it
    for name in names:
        options.rest = RUNS[name]
        here, peft = [], []
        for _ in range(options.turns):
            with tempfile.TemporaryDirectory(prefix="lora_benchmark_") as out:
                mine, theirs, is_same = finetune_vs_peft.measure(options, Path(out))
                if not here:
                    is_same = finetune_vs_peft.same_logits(options, Path(out)) and is_same
            here.append(mine)
            peft.append(theirs)
            agree = agree and is_same
        seconds = [run[0] for run in here], [run[0] for run in peft]
        memory = [run[1] / 1e9 for run in here], [run[1] / 1e9 for run in peft]
        rows += [Row(f"fine-tuning, {name}: a step", " s", *seconds), Row(f"{name}: memory", " GB", *memory)]
    return rows, agree


def first_step_in_peft(options):
    """What finetune_gpt does until its first step is done: reads the model and the text, evaluates a row, and trains
    once."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model = model.to(options.device)
    tokens = AutoTokenizer.from_pretrained(options.model)(options.text.read_text())["input_ids"]
    ids = torch.tensor(tokens[: options.tokens_per_step], device=options.device).view(4, -1)
    with torch.no_grad():
        model(ids[:1], labels=ids[:1]).loss.item()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    print("step 1, loss", loss.item(), flush=True)


def seconds_to(beginning, command, threads):
    """From the start of a process until it prints a line that begins so."""
    found = []
    start = time.perf_counter()

    def look(line):
        if line.startswith(beginning) and not found:
            found.append(time.perf_counter() - start)

    status, _, _ = finetune_vs_peft.run_measured(command, threads, look)
    if status != 0 or not found:
        sys.exit(f"error: {command[0]} ended with {status} and printed no line that begins with \"{beginning}\"")
    return found[0]


def first_steps(options):
    inputs = ["--model", options.model, "--text", options.text, "--device", options.device]
    inputs += ["--threads", options.threads]
    brief = ["--steps", 1, "--validation-blocks", 1, "--sample-tokens", 0, "--no-merge"]
    here, peft = [], []
    for _ in range(options.turns):
        with tempfile.TemporaryDirectory(prefix="lora_benchmark_") as out:
            command = [options.programs / "finetune_gpt", *inputs, *brief, "--out", out]
            here.append(seconds_to("step 1/1", command, options.threads))
        command = [sys.executable, __file__, "--first-step-in-peft", *inputs]
        peft.append(seconds_to("step 1", command, options.threads))
    return [Row("from the start of the process to the end of its first step", " s", here, peft)]


def loading(options):
    count = 3 if options.short else 100
    size, here, peft = load_vs_peft.compare(options.programs, options.model, count, options.turns)
    medians = [[statistics.median(run) for run in runs] for runs in (here, peft)]
    return [Row(f"an adapter of {size / 1e6:.1f} MB more", " ms", *medians)]


def machine(options):
    """The processor, or the GPU, and what was used of it."""
    import torch

    if options.device != "cpu":
        return f"{torch.cuda.get_device_name(options.device)}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.exists() else []
    name = names[0] if names else platform.machine()
    return f"{name}, torch {torch.__version__}; layers on one thread, the rest on {options.threads}"


def draw(rows, file):
    """A box for each ratio, with gnuplot."""
    if not shutil.which("gnuplot"):
        print("gnuplot is not installed (Debian: gnuplot-nox): no picture")
        return
    values = "\n".join(f'"{row.name}" {row.ratio:.4f}' for row in rows)
    commands = f"""$rows << END
{values}
END
set terminal png size 1000,{120 + 24 * len(rows)}
set output '{file}'
set style fill solid 0.6
set grid xtics
set xrange [0:1.05<*]
set yrange [{len(rows)}:-1]
set xlabel 'of what peft takes'
set arrow from 1, graph 0 to 1, graph 1 nohead
plot $rows using ($2 / 2):0:($2 / 2):(0.35):ytic(1) with boxxyerror notitle
"""
    subprocess.run(["gnuplot"], input=commands, text=True, check=True)


def main():
    parser = finetune_vs_peft.finetune_options(__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--first-step-in-peft", action="store_true", help=argparse.SUPPRESS)  # this process is peft's
    parser.set_defaults(steps=10, out=finetune_vs_peft.ROOT / "build")
    options = parser.parse_args()
    options.tokens_per_step = 4 * 128  # the defaults of finetune_gpt
    if options.turns < 1:
        parser.error("--turns has to be at least 1")
    if options.first_step_in_peft:
        return first_step_in_peft(options)
    if options.short:
        options.turns, options.steps = 1, 2
    programs = [options.programs / name for name in ("layer", "rows", "finetune_gpt", "load_adapter", "print_logits")]
    finetune_vs_peft.require("benchmarks/run.sh", *programs, options.model, options.text)
    options.out.mkdir(parents=True, exist_ok=True)

    os.environ["OMP_NUM_THREADS"] = "1"
    rows = layers(options)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    runs, agree = fine_tuning(options)
    rows += runs + first_steps(options)
    if options.device == "cpu":
        rows += loading(options)
    heading = f"{machine(options)}; turns: {options.turns}"
    table = ["| | here | peft | ratio | spread |", "|---|---|---|---|---|", *(row.text() for row in rows)]
    text = "\n".join([heading, "", *table]) + "\n"
    (options.out / "benchmarks.md").write_text(text)
    draw(rows, options.out / "benchmarks.png")
    print(f"\n{text}", flush=True)
    return int(not agree)


if __name__ == "__main__":
    sys.exit(main())
