"""Modules exported from Python with torch.jit.script and torch.jit.trace and adapted by the library, beside the same
modules in Python whose weights are W + s B A: outputs and gradients, with and without gradient, in training and
evaluation mode, merged, saved, and loaded again by both.

usage: torchscript_live.py ADAPT_SCRIPT_PROGRAM
"""

import json
import subprocess
import sys
import tempfile
import warnings

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

TOLERANCE = 1e-9  # relative, in float64
LOOSE_TOLERANCE = 2e-2  # for what is computed in bfloat16
SCALING = 3 / 2  # alpha / rank


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3, bias=False)

    def forward(self, x):
        return self.fc2(self.norm(self.fc1(x).tanh()))


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")
        self.grouped = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, 2, groups=2)
        self.line = nn.Conv1d(4, 2, 3, dilation=2)

    def forward(self, x):
        return self.line(self.up(self.grouped(self.plain(x).tanh())).flatten(2))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(7, 4, padding_idx=5), nn.Linear(4, 7)
        self.head.weight = self.tokens.weight

    def forward(self, numbers):
        return self.head(self.tokens(numbers).tanh())


class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.pair = nn.EmbeddingBag(7, 4, mode="mean"), nn.Bilinear(4, 4, 3)

    def forward(self, numbers):
        return self.pair(self.bag(numbers), self.bag(numbers.flip(0)))


class Attention(nn.Module):
    def __init__(self, cross=False, **options):
        super().__init__()
        self.cross, self.attn = cross, nn.MultiheadAttention(4, 2, **options)

    def forward(self, x, other, mask):
        if self.cross:
            y, weights = self.attn(x, other, other)
        else:
            y, weights = self.attn(x, x, x, attn_mask=mask)
        return y * (1 + weights.square().mean()) if weights is not None else y


class Encoder(nn.Module):
    def __init__(self, layers, nested=False, causal=False, **options):
        super().__init__()
        self.register_buffer("mask", torch.ones(5, 5).triu(1).bool() if causal else None)
        options = {"dim_feedforward": 6, "dropout": 0.0, "batch_first": True} | options
        layer = nn.TransformerEncoderLayer(4, 2, **options)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=nested) if layers > 1 else layer

    def forward(self, x, padding):
        y = self.encoder(x, self.mask, padding)
        return y * padding.logical_not().unsqueeze(-1)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(4, 2, dim_feedforward=6, dropout=0.0)

    def forward(self, x, memory):
        return self.layer(x, memory)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 3, num_layers=2, bidirectional=True, proj_size=2)
        self.gru, self.rnn = nn.GRU(4, 3), nn.RNN(3, 5, nonlinearity="relu", batch_first=True)

    def forward(self, x):
        return self.rnn(self.gru(self.lstm(x)[0])[0])[0]


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(4, 3), nn.GRUCell(3, 4), nn.RNNCell(4, 2)

    def forward(self, x):
        return self.rnn(self.gru(self.lstm(x)[0]))


class Functions(nn.Module):
    """Functional calls with parameters of a user's own."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(3, 4))
        self.experts = nn.Parameter(torch.randn(2, 3, 4))

    def forward(self, x):
        y = F.linear(x, self.matrix).tanh() @ self.matrix
        z = torch.bmm(y.expand(2, -1, -1), self.experts.transpose(1, 2)).sum(0)
        return z + torch.einsum("ni,oi->no", x, self.experts[1])


class Control(nn.Module):
    """What only torch.jit.script keeps: loops, branches, another thread."""

    def __init__(self):
        super().__init__()
        self.step, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        later = torch.jit.fork(self.other, x)
        for i in range(3):
            x = self.step(x).tanh() if i < 2 else x + self.step(x)
        return x + torch.jit.wait(later)


class Forks(nn.Module):
    """What is forked is kept in a list, so that executors of its own run it."""

    def __init__(self):
        super().__init__()
        self.first, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        later = [torch.jit.fork(self.other, x) for _ in range(3)]
        y = self.first(x)
        for one in later:
            y = y * torch.jit.wait(one)
        return y


class Autocast(nn.Module):
    """Switches autocast on by itself, so that TorchScript casts its weights."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 6).float(), nn.Linear(6, 3).float()

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.fc2(self.fc1(x.float()).tanh())
        return y.float()


def product(weight, a, b):
    return SCALING * torch.matmul(b, a).reshape(weight.shape)


def table(weight, a, b):
    return SCALING * a.T @ b.T


def transposed(weight, a, b):
    """A transposed convolution: (groups, out / groups, in / groups * k) to (in, out / groups, k...)."""
    delta = SCALING * torch.matmul(b, a)
    groups, outputs = (b.shape[0], b.shape[1]) if b.dim() == 3 else (1, b.shape[0])
    delta = delta.reshape(groups, outputs, weight.shape[0] // groups, *weight.shape[2:])
    return delta.transpose(1, 2).reshape(weight.shape)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def numbers():
    return torch.tensor([[0, 3, 2], [1, 6, 3]])


def causal(length):
    return torch.ones(length, length).triu(1).bool()


def padding():
    return torch.tensor([[False] * 5, [False, False, False, True, True]])


def layers(*names, of=product):
    """Layers that keep their weight in `weight`."""
    return {name: (name + ".weight", of) for name in names}


def attention(name, packed=True):
    inner = {name: (name + ".in_proj_weight", product)}
    if not packed:
        inner = {f"{name}.{part}_proj_weight": (f"{name}.{part}_proj_weight", product) for part in "qkv"}
    return inner | layers(name + ".out_proj")


def encoder(prefix):
    return attention(prefix + "self_attn") | layers(prefix + "linear1", prefix + "linear2")


def parameters(*names):
    return {name: (name, product) for name in names}


def recurrent(**matrices):
    return parameters(*(f"{layer}.{name}" for layer, names in matrices.items() for name in names.split()))


LSTM = " ".join(f"weight_{part}_l{layer}" for part in ("ih", "hh", "hr") for layer in "0 0_reverse 1 1_reverse".split())

# name: (module, inputs, target_modules, target_parameters, what is adapted: the parameter and how its update looks)
CASES = {
    "mlp": (Mlp, lambda: [random(2, 3, 4)], ["fc1", "fc2"], [], layers("fc1", "fc2")),
    "convolutions": (Convolutions, lambda: [random(2, 2, 5, 5)], ["plain", "grouped", "up", "line"], [],
                     layers("plain", "grouped", "line") | layers("up", of=transposed)),
    "tied tokens": (Tied, lambda: [numbers()], ["tokens"], [], layers("tokens", of=table)),
    "tied head": (Tied, lambda: [numbers()], ["head"], [], layers("head")),
    "tied parameter": (Tied, lambda: [numbers()], [], ["tokens.weight"], parameters("tokens.weight")),
    "bag": (Bags, lambda: [numbers()], ["bag", "pair"], [], layers("bag", of=table) | layers("pair")),
    "attention": (lambda: Attention(batch_first=True), lambda: [random(2, 5, 4), random(2, 3, 4), causal(5)],
                  ["attn"], [], attention("attn")),
    "attention, sequence first": (Attention, lambda: [random(5, 2, 4), random(3, 2, 4), causal(5)], ["attn"], [],
                                  attention("attn")),
    "cross attention": (lambda: Attention(cross=True, batch_first=True),
                        lambda: [random(2, 5, 4), random(2, 3, 4), causal(5)], ["attn"], [], attention("attn")),
    "attention, other widths": (lambda: Attention(cross=True, kdim=3, vdim=3),
                                lambda: [random(5, 2, 4), random(3, 2, 3), causal(5)], ["attn"], [],
                                attention("attn", packed=False)),
    "encoder layer": (lambda: Encoder(1), lambda: [random(2, 5, 4), padding()], ["self_attn", "linear1", "linear2"], [],
                      encoder("encoder.")),
    "encoder layer, norm first": (lambda: Encoder(1, causal=True, norm_first=True, activation="gelu"),
                                  lambda: [random(2, 5, 4), padding()], ["self_attn", "linear1", "linear2"], [],
                                  encoder("encoder.")),
    "encoder, only linear1": (lambda: Encoder(2), lambda: [random(2, 5, 4), padding()], ["linear1"], [],
                              layers("encoder.layers.0.linear1", "encoder.layers.1.linear1")),
    "encoder": (lambda: Encoder(2), lambda: [random(2, 5, 4), padding()], ["self_attn", "linear1", "linear2"], [],
                encoder("encoder.layers.0.") | encoder("encoder.layers.1.")),
    "nested encoder": (lambda: Encoder(2, nested=True), lambda: [random(2, 5, 4), padding()],
                       ["self_attn", "linear1", "linear2"], [],
                       encoder("encoder.layers.0.") | encoder("encoder.layers.1.")),
    "decoder layer": (Decoder, lambda: [random(5, 2, 4), random(3, 2, 4)],
                      ["self_attn", "multihead_attn", "linear2"], [],
                      attention("layer.self_attn") | attention("layer.multihead_attn") | layers("layer.linear2")),
    "recurrent": (Recurrent, lambda: [random(5, 2, 4)], ["lstm", "gru", "rnn"], [],
                  recurrent(lstm=LSTM, gru="weight_ih_l0 weight_hh_l0", rnn="weight_ih_l0 weight_hh_l0")),
    "recurrent cells": (Cells, lambda: [random(5, 4)], ["lstm", "gru", "rnn"], [],
                        recurrent(lstm="weight_ih weight_hh", gru="weight_ih weight_hh", rnn="weight_ih weight_hh")),
    "parameters": (Functions, lambda: [random(5, 4)], [], ["matrix", "experts"], parameters("matrix", "experts")),
    "parameters of known layers": (Mlp, lambda: [random(2, 3, 4)], [], ["fc2.weight"], parameters("fc2.weight")),
    "autocast": (Autocast, lambda: [random(2, 3, 4)], ["fc1", "fc2"], [], layers("fc1", "fc2")),
    "forks in a list": (Forks, lambda: [random(3, 4)], ["first", "other"], [], layers("first", "other")),
    "control flow": (Control, lambda: [random(3, 4)], ["step", "other"], [], layers("step", "other")),
}


ONLY_SCRIPTED = ("autocast", "control flow", "forks in a list")


def exports(module, inputs, name):
    """Every way to export: (description, mode, exported module)."""
    for training in (True, False):
        mode = "train" if training else "eval"
        module.train(training)
        yield "script", mode, torch.jit.script(module)
        if name in ONLY_SCRIPTED:
            continue
        yield "trace", mode, torch.jit.trace(module, inputs, check_trace=False)
        if not training:
            with torch.no_grad():  # keeps the fused operators
                yield "trace without gradient", mode, torch.jit.trace(module, inputs, check_trace=False)


def refusals(name, way, mode):
    """What cannot work, with a part of the error it has to be."""
    if name in ("tied tokens", "tied head") and way != "script":
        return {"merge": "reads it in one place for both"}
    if name == "nested encoder" and mode == "eval" and way != "trace":
        return {"gradients": "has no gradient for nested tensors"}
    return {}


class Quantized(nn.Module):
    """With one layer that stays as it is, or without."""

    def __init__(self, keeps_one):
        super().__init__()
        self.fc1 = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4) if keeps_one else nn.Identity()

    def forward(self, x):
        return self.norm(self.fc1(x))


def refused_modules():
    """Modules that cannot be adapted, each with the target and a part of the error that `attach` has to throw."""
    for keeps_one, error in ((True, "\"fc1\" is a quantized Linear, which has no weight that can be adapted"),
                             (False, "the weights of this TorchScript module are quantized")):
        module = torch.ao.quantization.quantize_dynamic(Quantized(keeps_one).float().eval(), {nn.Linear})
        yield f"quantized, one layer kept: {keeps_one}", torch.jit.script(module), "fc1", error


def loss_of(output):
    return (output * torch.arange(output.numel(), dtype=output.dtype).cos().reshape(output.shape)).sum()


def expected(case, module, inputs, adapted, results):
    """Output and gradients of the Python module with W + s B A."""
    weights, leaves = {}, {}
    for layer, (parameter, delta) in adapted.items():
        leaves[layer + ".lora_A"], leaves[layer + ".lora_B"] = (
            results[f"{layer}.lora_{matrix}"].clone().requires_grad_() for matrix in "AB"
        )
        weight = module.get_parameter(parameter).detach()
        weights[parameter] = weight + delta(weight, leaves[layer + ".lora_A"], leaves[layer + ".lora_B"])
    output = functional_call(module, weights, tuple(inputs), tie_weights=case["target_parameters"] != [])
    gradients = torch.autograd.grad(loss_of(output), list(leaves.values()))
    return output.detach(), dict(zip(leaves, gradients))


def deviation(ours, theirs):
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype or not torch.isfinite(ours).all():
        return float("inf")
    return (ours - theirs).abs().max().item() / (1e-3 + theirs.abs().max().item())


def check(case, folder):
    """The largest deviation of anything, by what deviates."""
    results = torch.load(f"{folder}/{case['id']}.results", weights_only=False)
    module, inputs, adapted = case["module"].train(case["mode"] == "train"), case["inputs"], case["adapted"]
    names = {name.removesuffix(".lora_A") for name in results if name.endswith(".lora_A") and "gradient " not in name}
    if names != set(adapted):
        return {f"{sorted(names)} are adapted": float("inf")}
    with torch.no_grad():
        found = {"base": deviation(results["base"], module(*inputs))}
    output, gradients = expected(case, module, inputs, adapted, results)
    if deviation(results["base"], output) < 5e-2:
        return {"the adapters change too little": float("inf")}
    found["adapted without gradient"] = deviation(results["adapted without gradient"], output)
    if "gradients" not in case["refusals"]:
        found["adapted"] = deviation(results["adapted"], output)
        for name, gradient in gradients.items():
            found["gradient " + name] = deviation(results["gradient " + name], gradient)
    if "merge" not in case["refusals"]:
        loaded = torch.jit.load(f"{folder}/{case['id']}.merged.pt")
        found |= {name: deviation(results[name], output) for name in ("merged", "loaded")}
        with torch.no_grad():
            found["loaded in Python"] = deviation(loaded(*inputs), output)
    return found


def export_all(folder):
    """Writes every exported module with its input; returns what the program and `check` have to know of it."""
    cases = []
    for name, (make, inputs, modules, parameters, adapted) in CASES.items():
        module, values = make(), inputs()
        for way, mode, exported in exports(module, tuple(values), name):
            case = {"id": len(cases), "name": f"{name}, {way}, {mode}", "mode": mode, "target_modules": modules,
                    "target_parameters": parameters, "refusals": refusals(name, way, mode)}
            exported.save(f"{folder}/{case['id']}.pt")
            torch.save({str(i): value for i, value in enumerate(values)}, f"{folder}/{case['id']}.inputs")
            cases.append(case | {"module": module, "inputs": values, "adapted": adapted})
    for name, module, target, error in refused_modules():
        case = {"id": len(cases), "name": name, "mode": "eval", "target_modules": [target], "target_parameters": [],
                "refusals": {"attach": error}}
        module.save(f"{folder}/{case['id']}.pt")
        torch.save({"0": random(3, 4).float()}, f"{folder}/{case['id']}.inputs")
        cases.append(case)
    with open(f"{folder}/cases.json", "w") as file:
        kept = ("id", "name", "mode", "target_modules", "target_parameters", "refusals")
        json.dump([{key: case[key] for key in kept} for case in cases], file)
    return cases


def main():
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    failures, largest = 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        cases = export_all(folder)
        program = subprocess.run([sys.argv[1], folder], capture_output=True, text=True)
        lines = dict(line.split(" ", 1) for line in program.stdout.splitlines())
        for case in cases:
            said = lines.get(str(case["id"]), "no answer")
            if "attach" in case["refusals"]:  # with the error that was expected
                failures += said != "done"
                print(f"{case['name']}: {'refused' if said == 'done' else 'FAILED: ' + said}")
                continue
            found = check(case, folder) if said == "done" else {said: float("inf")}
            worst = max(found, key=found.get)
            is_double = next(case["module"].parameters()).dtype == torch.float64
            if is_double:
                largest = max(largest, found[worst])
            if found[worst] > (TOLERANCE if is_double else LOOSE_TOLERANCE):
                failures += 1
                print(f"FAILED {case['name']}: {worst}: {found[worst]:.1e}")
            else:
                print(f"{case['name']}: {found[worst]:.1e}")
    print(program.stderr, end="", file=sys.stderr)
    print(f"{len(cases)} exported modules, {failures} wrong; the largest deviation in float64 is {largest:.1e}")
    sys.exit(failures > 0 or program.returncode != 0)


if __name__ == "__main__":
    main()
