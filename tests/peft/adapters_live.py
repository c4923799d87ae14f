"""Adapters of small models go from Python's peft to this library and back: python adapters_live.py EXCHANGE_ADAPTER

For every configuration below peft writes an adapter, from which this library has to compute peft's logits, unmerged and
merged, and which it has to write again with the same bytes; and this library writes one with values of its own, which
peft has to read without a warning and with every tensor in its place, and to give the logits that it gives here. For
some, twenty steps of training from peft's start have to give peft's losses.

Left out is what peft gets wrong: convolutions with a dilation or a padding_mode, which it does not pass on to its A;
DoRA on a convolution of several groups, whose norms it takes of a scrambled product; an embedding with max_norm, which
it also applies to A. Of a convolution of several groups peft's own A reads the inputs of all groups, which is refused
here; the other way round works, but peft cannot merge it. What it adds twice (see adds_out_proj_twice) is halved.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from exchange_model import LanguageNet, Net
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import MultiheadAttention
from safetensors.torch import load_file, save_file
from strict_peft import largest_distance, load_adapter

FILE = "adapter_model.safetensors"
TOLERANCE = {"float32": 1e-5, "float64": 1e-10, "bfloat16": 0.1, "float16": 5e-3}
STEPS, RATE = 20, 1e-2


def layer(name, kind, *sizes, **options):
    return {"name": name, "kind": kind, "sizes": list(sizes), **options}


def blocks(prefix, make, count=3):
    return [part for i in range(count) for part in make(f"{prefix}.{i}.")]


def text_model(head, embedding="embed", **options):
    """An embedding, three blocks, and a head."""
    block = lambda prefix: [
        layer(prefix + "self_attn", "SelfAttention", 8, 2),
        layer(prefix + "mlp.fc1", "Linear", 8, 12),
        layer(prefix + "mlp.fc2", "Linear", 12, 8, bias=False),
    ]
    return [
        layer(embedding, "Embedding", 11, 8, **options),
        *blocks("model.layers", block),
        layer("norm", "LayerNorm", 8),
        head,
    ]


def tied(head="head", embedding="embed"):
    return layer(head, "Linear", 8, 11, bias=False, tied=embedding)


def gpt(**attention):
    """GPT-2's layers, of which the Conv1D's keep their weights transposed."""
    attention = {"transposed": True, **attention}
    linear = "Conv1D" if attention["transposed"] else "Linear"
    block = lambda prefix: [
        layer(prefix + "attn", "FusedAttention", 8, 2, **attention),
        layer(prefix + "mlp.c_fc", linear, 8, 16),
        layer(prefix + "mlp.c_proj", linear, 16, 8),
    ]
    return [layer("wte", "Embedding", 11, 8), *blocks("layers", block, 2), layer("ln_f", "LayerNorm", 8), tied("lm_head", "wte")]


def convolutions(dimensions, inputs, **second):
    kind, batch_norm = f"Conv{dimensions}d", f"BatchNorm{dimensions}d"
    return [
        layer("conv1", kind, 3, 8, kernel_size=3, padding=1),
        layer("norm", batch_norm, 8),
        layer("conv2", kind, 8, 8, **{"kernel_size": 3, **second}),
        layer("flatten", "Flatten"),
        layer("head", "Linear", inputs, 5),
    ]


IDS, VECTORS = "ids", (2, 5, 8)
MODELS = {  # description, input
    "mlp": (
        [
            layer("fc1", "Linear", 8, 16),
            layer("fc2", "Linear", 16, 8, bias=False),
            layer("norm", "LayerNorm", 8),
            layer("xfc1", "Linear", 8, 8),
            layer("head", "Linear", 8, 4),
        ],
        VECTORS,
    ),
    "text": (text_model(layer("head", "Linear", 8, 11), padding_idx=1), IDS),
    "tied": (text_model(tied()), IDS),
    "language": (text_model(tied("lm_head", "embed_tokens"), "embed_tokens"), IDS),
    "gpt": (gpt(), IDS),
    "grouped_qkv": (gpt(transposed=False, kv_width=4), IDS),
    "conv1d": (convolutions(1, 40, stride=2), (2, 3, 11)),
    "conv2d": (convolutions(2, 72, stride=2, padding=1), (2, 3, 6, 5)),
    "conv3d": (convolutions(3, 64, padding=1, stride=2), (2, 3, 4, 3, 4)),
    "conv2d_same": (convolutions(2, 240, padding="same", bias=False), (2, 3, 6, 5)),
    "conv2d_oblong": (convolutions(2, 160, kernel_size=[3, 1], bias=False), (2, 3, 6, 5)),
    "conv2d_point": (convolutions(2, 240, kernel_size=1), (2, 3, 6, 5)),
    "conv2d_groups": (convolutions(2, 72, stride=2, padding=1, groups=2), (2, 3, 6, 5)),
    "conv1d_depthwise": (convolutions(1, 72, groups=8), (2, 3, 11)),
    "attention": (
        [
            layer("fc", "Linear", 8, 8),
            layer("attn", "MultiheadAttention", 8, 2),
            layer("block.attn", "MultiheadAttention", 8, 4, bias=False),
            layer("head", "Linear", 8, 4),
        ],
        VECTORS,
    ),
    "experts": (
        [layer("fc", "Linear", 8, 8), layer("mlp.experts", "Experts", 4, 8, 6), layer("head", "Linear", 8, 4)],
        VECTORS,
    ),
}


@dataclass
class Case:
    name: str
    model: str
    config: dict
    dtype: str = "float32"
    second: dict = field(default_factory=dict)  # configuration of one more adapter, whose output is compared
    fused: list = field(default_factory=list)  # parts of fused projections
    reads: bool = True  # whether peft can make such an adapter by itself
    refused: str = ""  # why this library does not read what peft writes
    merges: bool = True  # whether peft's merged model computes what it computes unmerged
    half_adapter: bool = False  # whether the tensors in peft's file are in half precision
    pickled: bool = False  # whether peft writes adapter_model.bin
    steps: int = 0  # of training
    warning: str = ""  # what peft says about the model, whatever the adapter


def case(name, model, targets, **options):
    own = {key: options.pop(key) for key in list(options) if key in Case.__dataclass_fields__}
    config = {"r": 4, "lora_alpha": 6, **({} if targets is None else {"target_modules": targets}), **options}
    return Case(name, model, config, **own)


def parts(module, sizes, adapted):
    return {"fused": [{"module": module, "sizes": sizes, "adapted": adapted}], "reads": False}


DORA, RSLORA = {"use_dora": True}, {"use_rslora": True}
PATTERNS = {"rank_pattern": {r"^model\.layers\.0\..*q_proj": 2, "q_proj": 3}, "alpha_pattern": {"self_attn.v_proj": 9, r"layers\.2\..*": 5}}
GROUPS = {"merges": False, "warning": "groups > 1", "refused": "reads inputs of other groups"}
GPT = {"fan_in_fan_out": True}
EXPERTS = ["mlp.experts.gate_up", "mlp.experts.down"]

CASES = [
    case("list", "mlp", ["fc1", "fc2"], steps=STEPS),
    case("regex", "mlp", r"fc\d|head"),
    case("regex with alternatives and a look-ahead", "text", r"(?!model\.layers\.1).*\.(q_proj|mlp\.fc[12])"),
    case("all linear layers", "mlp", "all-linear"),
    case("all linear layers of blocks", "text", "all-linear", r=2),
    case("exclude a list", "text", ["q_proj", "fc1"], exclude_modules=["model.layers.0.self_attn.q_proj"]),
    case("exclude a regex", "text", ["q_proj", "fc1"], exclude_modules=r".*\.2\..*"),
    case("rsLoRA", "mlp", ["fc1", "head"], **RSLORA, steps=STEPS),
    case("rsLoRA with patterns", "text", ["q_proj", "v_proj"], **RSLORA, **PATTERNS),
    case("alpha that is not whole", "mlp", ["fc1"], lora_alpha=2.5),
    case("DoRA", "mlp", ["fc1", "fc2"], **DORA, steps=STEPS),
    case("DoRA and rsLoRA with patterns", "text", ["q_proj", "v_proj"], **DORA, **RSLORA, **PATTERNS),
    case("dropout", "mlp", ["fc1", "fc2"], lora_dropout=0.3),
    case("DoRA with dropout", "mlp", ["fc1", "head"], **DORA, lora_dropout=0.3),
    case("Gaussian start", "mlp", ["fc1", "fc2"], init_lora_weights="gaussian"),
    case("orthogonal start", "mlp", ["fc1", "fc2"], init_lora_weights="orthogonal"),
    case("all biases", "mlp", ["fc1", "fc2"], bias="all", steps=STEPS),
    case("biases of adapted layers", "mlp", ["fc1", "fc2"], bias="lora_only", steps=STEPS),
    case("biases of blocks", "text", ["k_proj", "fc1", "fc2"], bias="lora_only"),
    case("DoRA and biases", "mlp", ["fc1", "head"], bias="lora_only", **DORA),
    case("a head in full", "mlp", ["fc1"], modules_to_save=["head"], steps=STEPS),
    case("head and norm in full", "mlp", ["fc1", "fc2"], modules_to_save=["head", "norm"]),
    case("all linear layers, a head in full", "mlp", "all-linear", modules_to_save=["head"]),
    case("a layer in full whose name ends that of another", "mlp", ["fc2"], modules_to_save=["fc1"]),
    case("a block in full", "text", ["q_proj"], modules_to_save=["layers.1.mlp"]),
    case("DoRA and a head in full", "mlp", ["fc1"], modules_to_save=["head"], **DORA),
    case("all biases and a head in full", "mlp", ["fc1"], bias="all", modules_to_save=["head"]),
    case("a second adapter", "mlp", ["fc1", "fc2"], second={"r": 3, "target_modules": ["fc2", "head"], **DORA}),
    case("adapter_model.bin", "mlp", ["fc1", "fc2"], pickled=True),
    case("one block", "text", ["q_proj", "v_proj"], layers_to_transform=1),
    case("some blocks of a list", "text", ["q_proj", "fc1"], layers_to_transform=[0, 2], layers_pattern="layers"),
    case("some blocks, one layer by its full name", "text", ["model.layers.1.mlp.fc2", "q_proj"], layers_to_transform=[0]),
    case("one block of a list that nothing precedes", "grouped_qkv", ["c_attn"], layers_to_transform=[1], reads=False),
    case("ranks by patterns", "text", ["q_proj", "v_proj"], **PATTERNS),
    case("embedding", "text", ["embed"], steps=STEPS),
    case("embedding and layers, rsLoRA", "text", ["embed", "q_proj"], **RSLORA, steps=STEPS),
    case("embedding, DoRA", "text", ["embed"], **DORA, steps=STEPS),
    case("embedding in full", "text", ["q_proj"], modules_to_save=["embed"]),
    case("tied embedding", "tied", ["embed"], merges=False, steps=STEPS),
    case("tied head", "tied", ["head"], merges=False, steps=STEPS),
    case("tied head and embedding", "tied", ["head", "embed"], merges=False),
    case("tied head, DoRA", "tied", ["head", "fc1"], merges=False, **DORA),
    case("tied head in full", "tied", ["q_proj"], modules_to_save=["head"]),
    case("tied embedding in full", "tied", ["q_proj"], modules_to_save=["embed"]),
    case("embedding of a language model", "language", ["embed_tokens", "q_proj"], merges=False),
    case("head of a language model", "language", ["lm_head", "q_proj"], merges=False),
    case("c_attn", "gpt", ["c_attn"], **GPT, steps=STEPS),
    case("every projection, rsLoRA", "gpt", ["c_attn", "c_proj", "c_fc"], **GPT, **RSLORA),
    case("c_attn, DoRA", "gpt", ["c_attn", "mlp.c_proj"], **GPT, **DORA),
    case("c_attn and biases", "gpt", ["c_attn"], **GPT, bias="lora_only"),
    case("query and value of c_attn", "gpt", ["c_attn"], **GPT, **parts("c_attn", [8, 8, 8], [True, False, True])),
    case("query and key of unequal width", "grouped_qkv", ["c_attn", "c_proj"], **parts("attn.c_attn", [8, 4, 4], [True, True, False])),
    case("key and value, rsLoRA", "grouped_qkv", ["c_attn"], **RSLORA, **parts("c_attn", [8, 4, 4], [False, True, True])),
    case("parts with patterns", "grouped_qkv", ["c_attn", "c_proj"], rank_pattern={"layers.1.attn.c_attn": 2}, alpha_pattern={"c_attn": 3}, **parts("c_attn", [8, 4, 4], [True, False, True])),
    case("Conv1d", "conv1d", ["conv1", "conv2"]),
    case("Conv1d, DoRA", "conv1d", ["conv1", "conv2"], **DORA),
    case("Conv2d", "conv2d", ["conv1", "conv2"], steps=STEPS),
    case("Conv2d and head, rsLoRA, ranks by patterns", "conv2d", ["conv1", "conv2", "head"], **RSLORA, rank_pattern={"conv2": 2}, steps=STEPS),
    case("Conv2d, DoRA", "conv2d", ["conv1", "conv2"], **DORA, steps=STEPS),
    case("Conv2d and biases", "conv2d", ["conv1", "conv2"], bias="lora_only"),
    case("Conv2d, batch norm in full", "conv2d", ["conv1"], modules_to_save=["norm"]),
    case("Conv2d in full", "conv2d", ["conv1"], modules_to_save=["conv2"]),
    case("Conv2d, padding as wide as the kernel", "conv2d_same", ["conv1", "conv2"]),
    case("Conv2d, oblong kernel", "conv2d_oblong", ["conv2"]),
    case("Conv2d, oblong kernel, DoRA", "conv2d_oblong", ["conv2"], **DORA),
    case("Conv2d, kernel of one point", "conv2d_point", ["conv2", "head"]),
    case("Conv2d and all biases", "conv2d", ["conv2"], bias="all"),
    case("Conv2d of two groups", "conv2d_groups", ["conv1", "conv2"], **GROUPS),
    case("Conv2d of two groups, rsLoRA", "conv2d_groups", ["conv2"], **RSLORA, **GROUPS),
    case("Conv1d, depthwise", "conv1d_depthwise", ["conv2"], r=8, **GROUPS),
    case("Conv3d", "conv3d", ["conv1", "conv2"]),
    case("Conv3d, DoRA", "conv3d", ["conv1", "conv2"], **DORA),
    case("MultiheadAttention", "attention", ["attn"], steps=STEPS),
    case("MultiheadAttention by its full name", "attention", ["block.attn", "fc"], **RSLORA),
    case("MultiheadAttention, ranks by patterns", "attention", ["attn"], rank_pattern={"block.attn": 2}, alpha_pattern={"attn": 3}),
    case("MultiheadAttention, all biases", "attention", ["attn"], bias="all"),
    case("MultiheadAttention, its biases", "attention", ["attn"], bias="lora_only"),
    case("MultiheadAttention in full", "attention", ["fc"], modules_to_save=["block.attn"]),
    case("parameter of experts", "experts", [], target_parameters=EXPERTS[:1]),
    case("parameters of experts", "experts", [], target_parameters=EXPERTS, steps=STEPS),
    case("parameters and layers, rsLoRA", "experts", ["fc"], target_parameters=EXPERTS, **RSLORA),
    case("parameters, ranks by patterns", "experts", [], target_parameters=EXPERTS, rank_pattern={"gate_up": 2}, alpha_pattern={"experts.down": 3}, warning="did not match any targeted module"),
    case("parameter that is a matrix", "experts", [], target_parameters=["experts.mix"]),
    case("three parameters of one module", "experts", [], target_parameters=[*EXPERTS, "experts.mix"]),
    case("weight of a layer as a parameter", "mlp", ["fc1"], target_parameters=["head.weight"]),
    case("float64", "text", ["embed", "q_proj", "fc1"], dtype="float64"),
    case("float64, DoRA", "mlp", ["fc1", "head"], **DORA, dtype="float64"),
    case("float64, Conv2d", "conv2d", ["conv1", "conv2"], dtype="float64"),
    case("bfloat16", "text", ["embed", "q_proj", "fc1"], dtype="bfloat16"),
    case("bfloat16, DoRA", "mlp", ["fc1", "head"], **DORA, dtype="bfloat16"),
    case("bfloat16, head in full", "mlp", ["fc1"], modules_to_save=["head"], dtype="bfloat16"),
    case("bfloat16, adapter too", "text", ["q_proj", "fc1"], dtype="bfloat16", half_adapter=True),
    case("float16", "mlp", ["fc1", "fc2"], dtype="float16"),
    case("float16, adapter too", "mlp", ["fc1", "fc2"], dtype="float16", half_adapter=True),
]


def make_model(case):
    description, _ = MODELS[case.model]
    kind = LanguageNet if case.model == "language" else Net
    return kind(description, seed=3).to(getattr(torch, case.dtype)).eval()


def make_input(case):
    sizes = MODELS[case.model][1]
    generator = torch.Generator().manual_seed(4)
    if sizes == IDS:
        return torch.randint(0, 11, (2, 5), generator=generator)
    return torch.randn(sizes, generator=generator).to(getattr(torch, case.dtype))


def write_tensors(case, path):
    model = make_model(case)
    with torch.no_grad():
        output = model(make_input(case))
    tensors = {f"model.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).to(output.dtype)
    save_file({**tensors, "input": make_input(case), "target": target}, path)


def adds_out_proj_twice():
    """Whether this peft is one that adds the update of MultiheadAttention's out_proj twice (its pull request 3774)."""
    attention = torch.nn.Sequential(torch.nn.MultiheadAttention(1, 1))
    model = get_peft_model(attention, LoraConfig(r=1, lora_alpha=1, target_modules=["0"], init_lora_weights=False))
    out_proj = model.base_model.model[0].base_layer.out_proj
    before, delta = out_proj.weight.item(), out_proj.get_delta_weight("default").item()
    return (model.merge_and_unload()[0].out_proj.weight.item() - before) / delta > 1.5


ADDS_OUT_PROJ_TWICE = adds_out_proj_twice()


def add_once(model):
    """Halves the scaling of what peft adds twice."""
    for module in model.modules():
        if isinstance(module, MultiheadAttention) and ADDS_OUT_PROJ_TWICE:
            module.get_base_layer().out_proj.scaling["default"] /= 2
    return model


def peft_model(case, noise):
    """An adapter as peft makes it, with `noise` added to everything that is trained."""
    torch.manual_seed(6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            make_model(case), LoraConfig(**case.config), autocast_adapter_dtype=not case.half_adapter
        )
    add_noise(model, noise)
    if case.second:
        model.add_adapter("second", LoraConfig(**case.second))
        model.set_adapter("second")
        add_noise(model, noise)
    return add_once(model).eval()


def add_noise(model, size):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))


def save(model, folder, pickled=False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, safe_serialization=not pickled)


def logits(model, case):
    """What peft's model computes, and what it computes when it is merged."""
    with torch.no_grad():
        unmerged = model(make_input(case))
        return unmerged, model.merge_and_unload()(make_input(case)) if case.merges else unmerged


def train(model, tensors):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(tensors["input"]), tensors["target"])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


class Exchange:
    """The files of one case, and the jobs that the C++ program does for it."""

    def __init__(self, case, folder):
        self.case, self.folder = case, folder
        self.folder.mkdir()
        write_tensors(case, folder / "tensors.safetensors")
        self.jobs, self.results, self.distances = {}, {}, {}
        if case.reads:
            self.prepare_reading()
        self.prepare_writing()
        if case.steps:
            self.prepare_training()

    def add_job(self, name, **more):
        self.jobs[name] = {
            "model": MODELS[self.case.model][0],
            "tensors": str(self.folder / "tensors.safetensors"),
            "output": str(self.folder / f"{name}.safetensors"),
            **more,
        }

    def prepare_reading(self):
        model = peft_model(self.case, noise=0.2)
        save(model, self.folder / "peft", self.case.pickled)
        self.expected = logits(self.reload(), self.case)
        self.add_job("reading", adapter=str(self.folder / "peft"), save=str(self.folder / "copy"))

    def reload(self):
        """As peft reads it, since it writes patterns in another order than it was given, and the first match counts."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kept = not self.case.half_adapter
            model = PeftModel.from_pretrained(
                make_model(self.case), self.folder / "peft", autocast_adapter_dtype=kept
            )
            if self.case.second:
                model.load_adapter(self.folder / "peft" / "second", "second")
                model.set_adapter("second")
        return add_once(model).eval()

    def prepare_writing(self):
        """From a configuration that says only what is not a default."""
        files = {}
        for name, config in (("config", self.case.config), ("second", self.case.second)):
            if config:
                files[name] = str(self.folder / f"{name}.json")
                Path(files[name]).write_text(json.dumps({"peft_type": "LORA", **config}))
        self.add_job("writing", **files, fused=self.case.fused, save=str(self.folder / "ours"))

    def prepare_training(self):
        model = peft_model(self.case, noise=0)
        save(model, self.folder / "start")
        self.losses = train(model, load_file(self.folder / "tensors.safetensors"))
        self.add_job("training", adapter=str(self.folder / "start"), steps=STEPS, lr=RATE)

    def output(self, name):
        if self.results[name]:
            raise AssertionError(f"{name}: {self.results[name]}")
        return load_file(self.folder / f"{name}.safetensors")

    def compare(self, what, ours, theirs, tolerance=None):
        distance = largest_distance(ours, theirs)
        self.distances[what] = distance
        tolerance = TOLERANCE[self.case.dtype] if tolerance is None else tolerance
        if not distance <= tolerance:
            raise AssertionError(f"{what}: distance {distance:.2e}, at most {tolerance:.0e}")

    def check_moved(self, output):
        moved = largest_distance(output["adapted"], output["base"])
        if not moved > max(0.01, 3 * TOLERANCE[self.case.dtype]):
            raise AssertionError(f"the adapter moves the output by {moved:.1e} only, so this could not fail")

    def check_reading(self):
        if self.case.refused:
            if self.case.refused not in self.results["reading"]:
                raise AssertionError(f"reading: not refused as it should be: {self.results['reading']!r}")
            return
        output = self.output("reading")
        self.check_moved(output)
        self.compare("read", output["adapted"], self.expected[0])
        self.compare("read, merged", output["merged"], self.expected[1])
        self.compare("read, written, read", output["again"], output["adapted"], tolerance=0)
        if not self.case.half_adapter and not self.case.pickled:
            for folder in ("", "second") if self.case.second else ("",):
                self.check_bytes(*(self.folder / name / folder / FILE for name in ("copy", "peft")))

    def check_bytes(self, ours, theirs):
        """What was read is written as it was; but for what peft writes without need, so that the files differ there."""
        needless = re.compile(r"\.(original_module|modules_to_save|base_layer\.weight$)")
        tensors, copy = load_file(theirs), load_file(ours)
        kept = {name: tensor for name, tensor in tensors.items() if not needless.search(name)}
        is_same = kept.keys() == copy.keys() and all(torch.equal(copy[name], kept[name]) for name in kept)
        if not is_same or (len(kept) == len(tensors) and ours.read_bytes() != theirs.read_bytes()):
            raise AssertionError("what was read is written in another way")

    def check_writing(self):
        output = self.output("writing")
        self.check_moved(output)
        again = None if self.case.fused else 0  # parts come back as one adapter, with another order of sums
        self.compare("written, read", output["again"], output["adapted"], tolerance=again)
        folder = self.folder / "ours" / ("second" if self.case.second else "")
        model = load_adapter(make_model(self.case), folder, expected_warning=self.case.warning).eval()
        unmerged, merged = logits(add_once(model), self.case)
        self.compare("written", output["adapted"], unmerged)
        self.compare("written, merged", output["merged"], merged)

    def check_training(self):
        losses = self.output("training")["losses"]
        if not losses[-1] < losses[0]:
            raise AssertionError(f"the loss does not fall: {losses[0]:.4f} to {losses[-1]:.4f}")
        self.compare("losses", losses, self.losses)

    def failures(self):
        found = []
        for name in self.jobs:
            try:
                getattr(self, f"check_{name}")()
            except (Exception, SystemExit) as error:
                found.append(f"{name}: {error}" if not str(error).startswith(name) else str(error))
        return found


def run(program, exchanges, folder):
    jobs = [(exchange, name) for exchange in exchanges for name in exchange.jobs]
    (folder / "jobs.json").write_text(json.dumps([exchange.jobs[name] for exchange, name in jobs]))
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([program, folder / "jobs.json"], capture_output=True, text=True, env=one_thread)
    lines = result.stdout.splitlines()
    if result.returncode != 0 or len(lines) != len(jobs):
        raise SystemExit(f"error: {program} ended with {result.returncode} after {len(lines)} jobs: {result.stderr}")
    for (exchange, name), line in zip(jobs, lines):
        exchange.results[name] = line


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program")
    parser.add_argument("--only", default="", help="only the cases with this in their names")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = [case for case in CASES if options.only in case.name]
    failed, largest = 0, {}
    with tempfile.TemporaryDirectory(prefix="lora_adapters_") as folder:
        folder = Path(folder)
        exchanges = [Exchange(case, folder / str(i)) for i, case in enumerate(cases)]
        run(options.program, exchanges, folder)
        for exchange in exchanges:
            case, problems = exchange.case, exchange.failures()
            failed += bool(problems)
            distance = max(exchange.distances.values(), default=0)
            largest[case.dtype] = max(largest.get(case.dtype, 0), distance)
            print(f"{case.name}: {', '.join(exchange.jobs)}: {'; '.join(problems) or f'{distance:.1e}'}")
    distances = ", ".join(f"{dtype} {distance:.1e}" for dtype, distance in largest.items())
    print(f"\n{len(cases)} configurations, {failed} failed; largest distances: {distances}")
    return int(failed > 0 or not cases)


if __name__ == "__main__":
    sys.exit(main())
