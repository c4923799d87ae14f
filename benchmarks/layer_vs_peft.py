"""What does an adapter cost beside the frozen layer, here and in peft?

python layer_vs_peft.py [--programs DIR] [--rounds N] [--turns N] [--device cpu|cuda] [--only PART]

The cases are those of the programs `layer` (one adapter: steps of training and forward passes) and `rows` (a batch whose
rows have different adapters). Processes of both take turns, on one thread; each measures its frozen layer and the
adapted one in turns. Printed are the medians of the ratios to LibTorch's frozen layer, what of peft's time is ours, and
what of its excess over the frozen layer is our excess over the frozen layer in a scope.
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEP = re.compile(
    r"(step|forward), (\d+) rows, (\d+) -> (\d+), r=(\d+)(?:, dropout ([\d.]+))?(, DoRA)?(, bfloat16)?(?:, (\d+) layers)?$"
)
ROWS = re.compile(r"(step|forward), (\d+) rows of (\d+), (\d+) adapters, (sorted|in turns)$")


def now(device):
    """The time when the device has done all that it was asked for."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def ratio(frozen, adapted, rounds, device="cpu"):
    """The median of the times of the second over those of the first, measured in turns."""
    ratios = []
    for turn in range(-10, rounds):
        start = now(device)
        frozen()
        middle = now(device)
        adapted()
        if turn >= 0:
            ratios.append((now(device) - middle) / (middle - start))
    return statistics.median(ratios)


def adapted_layers(width_in, width_out, dtype=None, layers=1, count=1, **options):
    """Layers that have one input, as a model whose outputs are theirs; with so many adapters."""
    import torch
    from peft import LoraConfig, get_peft_model

    class Layers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.all = torch.nn.ModuleList(torch.nn.Linear(width_in, width_out, dtype=dtype) for _ in range(layers))

        def forward(self, x):
            return [layer(x) for layer in self.all]

    config = LoraConfig(target_modules=r"all\.\d+", lora_alpha=16, init_lora_weights=False, **options)
    model = get_peft_model(Layers(), config, adapter_name="adapter 0")
    for i in range(1, count):
        model.add_adapter(f"adapter {i}", config)
    return model


def single(kind, rows, width_in, width_out, rank, dropout, dora, half, layers, rounds, device):
    import torch

    is_step = kind == "step"
    dtype = torch.bfloat16 if half else torch.float
    model = adapted_layers(width_in, width_out, dtype, layers, r=rank, lora_dropout=dropout, use_dora=dora)
    model = model.train(is_step).to(device)
    sizes = dict(in_features=width_in, out_features=width_out)
    frozen = [torch.nn.Linear(**sizes, device=device, dtype=dtype).requires_grad_(False) for _ in range(layers)]
    x = torch.randn(rows, width_in, device=device, dtype=dtype, requires_grad=is_step)
    gradients = [torch.randn(rows, width_out, device=device, dtype=dtype) for _ in range(layers)]

    def run(forward):
        outputs = forward(x)
        if is_step:
            torch.autograd.backward(outputs, gradients)
        x.grad = None
        for parameter in model.parameters():
            parameter.grad = None

    with torch.set_grad_enabled(is_step):
        return ratio(lambda: run(lambda x: [layer(x) for layer in frozen]), lambda: run(model), rounds, device)


def mixed(kind, rows, positions, count, order, rounds):
    import torch

    if kind == "step":
        return None  # peft computes such batches without gradients only
    model = adapted_layers(768, 768, count=count, r=8).eval()
    plain = torch.nn.Linear(768, 768)
    names = [f"adapter {row * count // rows if order == 'sorted' else row % count}" for row in range(rows)]
    x = torch.randn(rows, positions, 768)
    with torch.no_grad():
        if count == 1:
            return ratio(lambda: plain(x), lambda: model(x), rounds)
        return ratio(lambda: plain(x), lambda: model(x, adapter_names=names), rounds)


def in_peft(case, rounds, device):
    if match := STEP.match(case):
        kind, rows, width_in, width_out, rank, dropout, dora, half, layers = match.groups()
        sizes = int(rows), int(width_in), int(width_out), int(rank)
        return single(kind, *sizes, float(dropout or 0), bool(dora), bool(half), int(layers or 1), rounds, device)
    kind, rows, positions, count, order = ROWS.match(case).groups()
    return mixed(kind, int(rows), int(positions), int(count), order, rounds)


def ours(programs, rounds, device, only):
    """Of each case the ratios to LibTorch's frozen layer, as the programs print them: of the adapted layer, and of the
    frozen layer in a scope, which `rows`, a program for a CPU, does not measure."""
    found = {}
    for program in ("layer", "rows") if device == "cpu" else ("layer",):
        command = [str(programs / program), str(rounds), *([device] if program == "layer" else []), only]
        text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        for line in text.splitlines()[2:]:
            cells = [cell.strip() for cell in line.split("|")]
            found[cells[1]] = float(cells[3]), float(cells[4]) if program == "layer" else None
    return found


def compare(programs, rounds, turns, device="cpu", only=""):
    """Of each case the ratios of all turns: those of `ours`, and peft's where it has the case."""
    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    here, there = {}, {}
    for _ in range(turns):
        for case, value in ours(programs, rounds, device, only).items():
            here.setdefault(case, []).append(value)
        for case in here:
            if (value := in_peft(case, rounds, device)) is not None:
                there.setdefault(case, []).append(value)
    return here, there


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=Path, default=ROOT / "build/cmake/programs", help="folder of layer and rows")
    parser.add_argument("--rounds", type=int, default=100, help="measurements of a case in a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="only the cases whose name contains this")
    arguments = parser.parse_args()

    import torch

    here, there = compare(**vars(arguments))
    where = "one thread" if arguments.device == "cpu" else arguments.device
    print(f"torch {torch.__version__}, {where}, {arguments.turns} turns of {arguments.rounds} rounds")
    print("| case | here | frozen here | peft | of its time | of its excess |\n|---|---|---|---|---|---|")
    for case, values in here.items():
        mine = statistics.median(value for value, _ in values)
        frozen = statistics.median(value for _, value in values) if values[0][1] is not None else None
        row = [case, f"{mine:.3f}", "-" if frozen is None else f"{frozen:.3f}", "-", "-", "-"]
        if case in there:
            theirs = statistics.median(there[case])
            row[3:5] = f"{theirs:.3f}", f"{mine / theirs:.2f}"
            if frozen is not None:
                row[5] = f"{(mine - frozen) / (theirs - 1):.2f}"
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    sys.exit(main())
