"""Adapters that this library combines, beside what Python's peft makes of them:
python combine_live.py COMBINE_ADAPTERS

peft's add_weighted_adapter combines the updates themselves where it is told to cut them off after an SVD, here at full
rank (6, that of every layer) unless said otherwise; what it leaves to chance is computed with its functions and the
same seed. The updates have to be those of the adapters that the library wrote, as peft loads them.
"""

import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import merge_utils
from strict_peft import load_adapter

CONFIGS = {
    "a": {"r": 2, "lora_alpha": 3, "target_modules": ["fc", "table", "conv"]},
    "b": {"r": 4, "lora_alpha": 6, "target_modules": ["fc", "conv"]},
    "c": {"r": 3, "lora_alpha": 1, "target_modules": ["fc", "table", "conv"], "use_rslora": True},
}
WEIGHTS = [0.5, 1.25, -2.0]
LAYERS = ["fc", "table", "conv"]
DENSITY, SEED = 0.4, 5
TOLERANCE = 1e-12
KINDS = {
    "cat": {"combination_type": "cat"},
    "linear": {"combination_type": "svd", "svd_rank": 6},
    "svd": {"combination_type": "svd", "svd_rank": 3},
    "ties total": {"combination_type": "ties_svd", "density": DENSITY, "svd_rank": 6},
    "ties frequency": {
        "combination_type": "ties_svd",
        "density": DENSITY,
        "svd_rank": 6,
        "majority_sign_method": "frequency",
    },
    "ties svd": {"combination_type": "ties_svd", "density": DENSITY, "svd_rank": 3},
    "magnitude_prune": {"combination_type": "magnitude_prune_svd", "density": DENSITY, "svd_rank": 6},
}
OF_CHANCE = {"dare_linear": merge_utils.dare_linear, "dare_ties": merge_utils.dare_ties}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(6, 6)
        self.table = torch.nn.Embedding(7, 6)
        self.conv = torch.nn.Conv2d(4, 6, 3)
        self.double()


def make_adapters(folder):
    """The adapters in peft, and as files."""
    torch.manual_seed(0)
    first, *rest = CONFIGS
    model = get_peft_model(Net(), LoraConfig(**CONFIGS[first]), adapter_name=first, autocast_adapter_dtype=False)
    for name in rest:
        model.add_adapter(name, LoraConfig(**CONFIGS[name]), autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.5)
    model.save_pretrained(folder)
    return model


def update(model, layer, name):
    return getattr(model.base_model.model, layer).get_delta_weight(name).detach()


def by_chance(model, merge, layer):
    used = [(name, weight) for name, weight in zip(CONFIGS, WEIGHTS) if layer in CONFIGS[name]["target_modules"]]
    weights = torch.tensor([weight for _, weight in used], dtype=torch.float64)
    return merge([update(model, layer, name) for name, _ in used], weights, DENSITY)


def updates_of_peft(model, kind):
    if kind in OF_CHANCE:
        torch.manual_seed(SEED)
        return {layer: by_chance(model, OF_CHANCE[kind], layer) for layer in LAYERS}
    model.add_weighted_adapter(list(CONFIGS), WEIGHTS, kind, **KINDS[kind])
    return {layer: update(model, layer, kind) for layer in LAYERS}


def main():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    failed = 0
    with tempfile.TemporaryDirectory(prefix="lora_combine_") as folder:
        folder = Path(folder)
        model = make_adapters(folder)
        subprocess.run([sys.argv[1], folder], check=True)
        for kind in [*KINDS, *OF_CHANCE]:
            expected = updates_of_peft(model, kind)
            loaded = load_adapter(Net(), folder / kind)
            distance = max((update(loaded, name, "default") - expected[name]).abs().max().item() for name in LAYERS)
            size = min(tensor.abs().max().item() for tensor in expected.values())
            failed += not (distance <= TOLERANCE and size > 0.1)
            print(f"{kind}: largest distance {distance:.1e} of updates up to {size:.2f}")
    print(f"{len(KINDS) + len(OF_CHANCE)} kinds, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
