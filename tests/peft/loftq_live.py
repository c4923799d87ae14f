"""LoftQ here and in PEFT: what the few bits hold, and the product that starts beside it.

usage: loftq_live.py PACK_TENSORS_PROGRAM
"""

import argparse
import inspect
import os
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

os.environ["TORCHDYNAMO_DISABLE"] = "1"
warnings.filterwarnings("ignore")
from peft.utils import loftq_utils  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

# Rows of bitsandbytes are whole blocks: elsewhere its AVX-512 kernel takes the scale of another block.
CASES = [((64, 192), 4, 1), ((96, 64), 4, 3), ((33, 64), 8, 2), ((128, 128), 16, 5), ((5, 320), 2, 1)]  # rank, steps


def loftq_on_cpu():
    """PEFT's own function, which asks for an accelerator, on the CPU."""
    source = inspect.getsource(loftq_utils.loftq_init)
    asks = 'compute_device = "xpu" if is_xpu_available() else "cuda"'
    assert asks in source, "PEFT chooses its device in another way now"
    scope = dict(vars(loftq_utils))
    exec(source.replace(asks, 'compute_device = "cpu"'), scope)
    return scope["loftq_init"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    program = parser.parse_args().program
    torch.manual_seed(0)
    weights = {f"case{i}": torch.randn(shape) * 0.1 for i, (shape, _, _) in enumerate(CASES)}
    how = {f"case{i}": f"loftq {rank} {steps}" for i, (_, rank, steps) in enumerate(CASES)}
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "in.safetensors", Path(folder) / "out.safetensors"
        save_file(weights, given, metadata=how)
        subprocess.run([program, "pack", given, found], check=True)
        mine = load_file(found)
    loftq_init, worst = loftq_on_cpu(), 0.0
    for i, (shape, rank, steps) in enumerate(CASES):
        name = f"case{i}"
        held, a, b = loftq_init(weights[name], 4, rank, steps)
        differences = [
            (mine[f"{name}.dense"] - held).abs().max().item(),
            (mine[f"{name}.B"] @ mine[f"{name}.A"] + mine[f"{name}.dense"] - b @ a - held).abs().max().item(),
            (mine[f"{name}.A"].norm() - a.norm()).abs().item(),
        ]
        print(f"{shape}, rank {rank}, {steps} steps: {differences}")
        assert all(difference < 1e-4 for difference in differences), differences  # which a NaN is not, either
        worst = max([worst, *differences])
    print(f"{len(CASES)} matrices, largest difference {worst:.2g}")


main()
