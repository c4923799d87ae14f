"""Compares logits with those of peft: python adapter_logits.py BASE_DIR ADAPTER_DIR LOGITS [--merged DIR]...

LOGITS is a safetensors file with "ids", int64 (B, T), and "logits", (B, T, V), of the base with the adapter. Prints the
largest distance and exits with 1 when it is above --tolerance, or when peft finds anything wrong with the adapter. Each
--merged directory must load in transformers with every tensor in its place and give the logits of peft's merged model.
ADAPTER_DIR "-" compares the base alone.
"""

import argparse
import sys

from strict_peft import fail, largest_distance, load_adapter, load_base


def read_logits(path):
    from safetensors.torch import load_file

    tensors = load_file(path)
    if "ids" not in tensors or "logits" not in tensors:
        fail(f'{path}: needs "ids" and "logits", has {sorted(tensors)}')
    return tensors["ids"], tensors["logits"]


def compare(name, ours, theirs, tolerance):
    distance = largest_distance(ours, theirs)
    within = distance <= tolerance
    print(f"{name}: largest distance {distance:.2e}, at most {tolerance:.0e}: {'ok' if within else 'FAILED'}")
    return within


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("adapter")
    parser.add_argument("logits")
    parser.add_argument("--merged", action="append", default=[], metavar="DIR")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    options = parser.parse_args(arguments)

    import torch

    ids, ours = read_logits(options.logits)
    with torch.no_grad():
        model = load_base(options.base)
        base_logits = model(ids).logits
        if options.adapter == "-":
            return int(not compare("base", ours, base_logits, options.tolerance))
        model = load_adapter(model, options.adapter).eval()
        adapted_logits = model(ids).logits
        moved = largest_distance(adapted_logits, base_logits)
        print(f"the adapter moves the logits of the base by {moved:.2e}")
        results = [moved > 10 * options.tolerance, compare("adapted", ours, adapted_logits, options.tolerance)]
        merged_logits = model.merge_and_unload()(ids).logits
        for directory in options.merged:
            found = load_base(directory)(ids).logits
            results.append(compare(f"merged, {directory}", found, merged_logits, options.tolerance))
    if not results[0]:
        print("error: the adapter hardly changes anything, so this comparison could not fail", file=sys.stderr)
    return int(not all(results))


if __name__ == "__main__":
    sys.exit(main())
