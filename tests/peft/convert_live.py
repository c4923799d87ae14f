"""Adapters whose training begins by changing the frozen weights, trained by Python's peft and made plain by this
library: python convert_live.py EXCHANGE_ADAPTER

Here and in peft the plain one has to give, on weights that nobody changed, the logits of the model that was trained.
"""

import itertools
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from exchange_model import Net
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from strict_peft import largest_distance, load_adapter

MODEL = [
    {"name": "fc1", "kind": "Linear", "sizes": [8, 16]},
    {"name": "layers.0.fc2", "kind": "Linear", "sizes": [16, 8], "bias": False},
    {"name": "norm", "kind": "LayerNorm", "sizes": [8]},
    {"name": "head", "kind": "Linear", "sizes": [8, 4]},
]
PATTERNS = {"rank_pattern": {"fc2": 3}, "alpha_pattern": {"fc1": 5}}
TOLERANCE = 1e-5


def make_model():
    return Net(MODEL, seed=3).eval()


def train(model, x, target):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(10):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), target).backward()
        optimizer.step()


def save_plainly(model, folder, init):
    """As peft's users are told to: otherwise the start, too, would be taken away when it is written."""
    config = model.peft_config["default"]
    config.init_lora_weights = init
    model.save_pretrained(folder)


def prepare(folder, init, stabilized, patterns):
    """Trains with peft; returns what C++ is to do, and the logits."""
    folder.mkdir()
    torch.manual_seed(4)
    x, target = torch.randn(2, 5, 8), torch.randn(2, 5, 4)
    state = {f"model.{name}": tensor.clone() for name, tensor in make_model().state_dict().items()}
    save_file({**state, "input": x}, folder / "tensors.safetensors")
    config = LoraConfig(
        r=2, lora_alpha=6, use_rslora=stabilized, target_modules=["fc1", "fc2"], init_lora_weights=init, **patterns
    )
    model = get_peft_model(make_model(), config)
    save_plainly(model, folder / "start", True)
    train(model, x, target)
    save_plainly(model, folder / "trained", init)
    files = {name: str(folder / name) for name in ("start", "trained")}
    files |= {name: str(folder / f"{name}.safetensors") for name in ("tensors", "output")}
    with torch.no_grad():
        return {"model": MODEL, "adapter": str(folder / "plain"), **files}, model(x)


def main():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    failed = count = 0
    with tempfile.TemporaryDirectory(prefix="lora_convert_") as folder:
        folder = Path(folder)
        cases = list(itertools.product(["pissa", "olora"], [False, True], [{}, PATTERNS]))
        jobs, expected = zip(*[prepare(folder / str(i), *case) for i, case in enumerate(cases)])
        (folder / "jobs.json").write_text(json.dumps(jobs))
        result = subprocess.run([sys.argv[1], folder / "jobs.json"], capture_output=True, text=True, check=True)
        for case, job, logits, problem in zip(cases, jobs, expected, result.stdout.splitlines(), strict=True):
            if problem:
                raise SystemExit(f"error: {case}: {problem}")
            output = load_file(job["output"])
            with torch.no_grad():
                theirs = load_adapter(make_model(), job["adapter"]).eval()(load_file(job["tensors"])["input"])
            moved = largest_distance(output["adapted"], output["base"])
            here, there = largest_distance(output["adapted"], logits), largest_distance(theirs, logits)
            count += 1
            failed += not (here <= TOLERANCE and there <= TOLERANCE and moved > 0.05)
            print(f"{case}: moved {moved:.2f}, distance here {here:.1e}, in peft {there:.1e}")
    print(f"{count} conversions, {failed} failed")
    return int(failed > 0 or count == 0)


if __name__ == "__main__":
    sys.exit(main())
