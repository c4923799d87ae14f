"""Random and adversarial tensors in NF4, FP4 and int8, packed by this library and by Python's bitsandbytes: codes,
statistics and numbers have to be the same, bit for bit. What this library writes into a file, bitsandbytes reads, and the
other way round, with the same numbers.

usage: quantize_live.py PACK_TENSORS_PROGRAM [--tensors 1000] [--seed 0]
"""

import argparse
import os
import random
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # what bitsandbytes would compile anew for each shape
torch.set_printoptions(threshold=10, edgeitems=2)
torch.set_num_threads(1)  # the mean of very many scales depends on the number of threads
warnings.filterwarnings("ignore")
import bitsandbytes.functional as bnb  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]


def shape_of(rng, scheme):
    if scheme == "int8":
        return [rng.choice([1, 2, 3, 17, 40]), rng.choice([1, 2, 7, 15, 16, 17, 31, 64, 65, 130, 1000])]
    kind = rng.randrange(4)
    if kind == 0:
        return [rng.choice([1, 2, 3, 5, 31, 32, 33, 63, 64, 65, 127, 1000, 4095, 4096, 4097, 9001])]
    if kind == 1:
        return [rng.choice([1, 3, 16, 50]), rng.choice([1, 7, 32, 64, 96, 100, 513])]
    if kind == 2:
        return [rng.choice([2, 5]), rng.choice([3, 8]), rng.choice([1, 3, 3, 5, 64])]
    return [rng.choice([64, 257, 300]), rng.choice([64, 100, 255, 256])]


def tensor_of(rng, scheme, block_size, dtype):
    """Numbers of a kind that is drawn, in blocks of kinds that are drawn, too."""
    shape = shape_of(rng, scheme)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    x = torch.randn(shape, generator=generator)
    numbers = x.view(-1)
    kind = rng.choice(["normal", "scaled", "uneven", "outlier", "ties", "grid", "constant", "zero", "mixed", "bits"])
    largest = 6e4 if dtype == torch.float16 else 3.3e38
    if kind == "scaled":
        x *= 10.0 ** rng.uniform(-44, 4 if dtype == torch.float16 else 37)
    elif kind == "uneven":
        x *= 10.0 ** (torch.rand(shape, generator=generator) * 30 - 25)
    elif kind == "outlier":
        numbers[rng.randrange(len(numbers))] = rng.choice([-1, 1]) * largest
    elif kind == "ties":  # halfway between neighbours of the code, and the floats beside that, with a largest value of 1
        code = bnb.get_4bit_type("nf4" if scheme == "int8" else scheme, device="cpu").sort().values
        middle = (code[1:] + code[:-1]) / 2
        if scheme == "int8":
            middle = (torch.arange(-127, 127) + 0.5) / 127
        beside = torch.cat([middle, *(torch.nextafter(middle, torch.tensor(far)) for far in (-2.0, 2.0))])
        numbers.copy_(beside[torch.randint(len(beside), (len(numbers),), generator=generator)])
        numbers[:: max(1, block_size // 4)] = rng.choice([-1.0, 1.0])
        x *= rng.choice([2.0 ** rng.randrange(-20, 10), rng.randrange(1, 3000)])
    elif kind == "grid":
        x.round_()
    elif kind == "constant":
        x.fill_(rng.choice([1.0, -1.0, 0.1, 3.7, 1e-38, -1e-40, 65504.0]))
    elif kind == "zero":
        x.zero_()
        if rng.random() < 0.5:
            x.neg_()
    elif kind == "mixed":
        for first in range(0, len(numbers), block_size):
            block = numbers[first : first + block_size]
            block.mul_(rng.choice([0.0, -0.0, 1.0, 1e-44, 1e-39, 1e-38, 1e-30, 1e4]))
    elif kind == "bits" and dtype == torch.float32:
        drawn = torch.randint(-(2**31), 2**31, (len(numbers),), generator=generator)
        numbers.copy_(drawn.to(torch.int32).view(torch.float32))
    x = torch.where(x.isfinite(), x, torch.zeros(()))
    if scheme == "int8":
        largest = min(largest, 2.6e36)  # else refused here, and infinite there
    return x.clamp(-largest, largest).to(dtype)


def has_finite_mean(tensor, block_size):
    blocks = torch.nn.functional.pad(tensor.float().view(-1), (0, -tensor.numel() % block_size)).view(-1, block_size)
    return blocks.abs().amax(1).mean().isfinite().item()


def dequantized_by_bitsandbytes(codes, state):
    """In one row: where a row of several is no whole number of blocks, its kernel for AVX-512 (0.50.2) takes the scale of
    another block."""
    state.dtype = torch.float32
    state.shape = torch.Size([state.shape.numel()])
    return bnb.dequantize_4bit(codes, state)


def packed_by_bitsandbytes(name, tensor, how):
    """The tensors of bitsandbytes, and the numbers in float."""
    weight = name + ".weight"
    if how == "int8":
        codes, absmax, _ = bnb.int8_vectorwise_quant(tensor.clone())
        tensors = {weight: codes, name + ".SCB": absmax, name + ".weight_format": torch.tensor(0, dtype=torch.uint8)}
        return tensors, bnb.int8_vectorwise_dequant(codes, absmax)
    scheme, block_size, scales = how.split()
    codes, state = bnb.quantize_4bit(
        tensor, blocksize=int(block_size), quant_type=scheme, compress_statistics=scales == "double"
    )
    tensors = {weight: codes, **{f"{weight}.{key}": value for key, value in state.as_dict(packed=True).items()}}
    return tensors, dequantized_by_bitsandbytes(codes, state)


def loaded_by_bitsandbytes(name, tensors, how):
    """The numbers in float of a weight in a file."""
    weight = name + ".weight"
    if how == "int8":
        return bnb.int8_vectorwise_dequant(tensors[weight], tensors[name + ".SCB"])
    parts = {key[len(weight) + 1 :]: value for key, value in tensors.items() if key.startswith(weight + ".")}
    state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
    return dequantized_by_bitsandbytes(tensors[weight], state)


def same_bits(a, b):
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (x.contiguous().view(-1) for x in (a, b))
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def is_same(key, mine, other):
    """To the bit, but for the text of the state, which has to say the same."""
    if ".quant_state." in key:
        unpack = bnb.unpack_tensor_to_dict
        return unpack(mine) == unpack(other)
    return same_bits(mine, other)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("--tensors", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)

    inputs, how = {}, {}
    for index in range(arguments.tensors):
        scheme = ("nf4", "fp4", "nf4", "int8")[index % 4]
        block_size = rng.choice(BLOCK_SIZES)
        dtype = rng.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16])
        name = f"{index:04}"
        inputs[name] = tensor_of(rng, scheme, block_size, dtype)
        how[name] = scheme if scheme == "int8" else f"{scheme} {block_size} {rng.choice(['single', 'double'])}"
        if how[name].endswith("double") and not has_finite_mean(inputs[name], block_size):
            how[name] = f"{scheme} {block_size} single"  # else refused here, and not a number there
    # One of so many blocks that their mean is taken in parts, and all scales of one size.
    inputs["long"], how["long"] = torch.randn(3000, 1001), "nf4 32 double"
    inputs["even"], how["even"] = torch.ones(64, 64), "nf4 64 double"

    with tempfile.TemporaryDirectory() as folder:
        paths = {key: Path(folder) / f"{key}.safetensors" for key in ("in", "mine", "theirs", "dense")}
        save_file(inputs, paths["in"], metadata=how)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([arguments.program, "pack", paths["in"], paths["mine"]], check=True, env=environment)
        mine = load_file(paths["mine"])

        theirs, dense = {}, {}
        for name, tensor in inputs.items():
            tensors, dense[name] = packed_by_bitsandbytes(name, tensor, how[name])
            theirs.update(tensors)
        wrong = [
            f"{key} ({how[key.split('.')[0]]}): {tensor.shape}, {mine.get(key)} instead of {tensor}"
            for key, tensor in theirs.items()
            if key not in mine or not is_same(key, mine[key], tensor)
        ]
        wrong += [f"{key}: only here" for key in mine if key not in theirs and not key.endswith(".dense")]

        save_file({key: tensor.contiguous() for key, tensor in theirs.items()}, paths["theirs"], metadata=how)
        subprocess.run([arguments.program, "unpack", paths["theirs"], paths["dense"]], check=True, env=environment)
        read = load_file(paths["dense"])
        by_weight = {}
        with safe_open(paths["mine"], framework="pt") as file:
            for key in file.keys():
                by_weight.setdefault(key.split(".")[0], {})[key] = file.get_tensor(key)
        for name, numbers in dense.items():
            for what, other in (
                ("numbers here", mine[name + ".dense"]),
                ("read here", read[name + ".dense"]),
                ("read there", loaded_by_bitsandbytes(name, by_weight[name], how[name])),
            ):
                if not torch.equal(other.view(-1), numbers.view(-1)):  # there are two zeros
                    wrong.append(f"{name} ({how[name]}), {what}: {other} instead of {numbers}")
    for line in wrong[:10]:
        print(line)
    counts = {word: sum(text.startswith(word) for text in how.values()) for word in ("nf4", "fp4", "int8")}
    print(f"{len(inputs)} tensors ({counts}), {len(theirs)} tensors of bitsandbytes, {len(wrong)} differences")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
