"""Adapters of small models go from Python's peft to this library and back: python adapters_live.py EXCHANGE_ADAPTER

For every configuration below peft writes an adapter, from which this library has to compute peft's logits, unmerged and
merged, and which it has to write again with the same bytes; and this library writes one with values of its own, which
peft has to read without a warning and with every tensor in its place, and to give the logits that it gives here. For
some, twenty steps of training from peft's start have to give peft's losses.

Left out is what peft gets wrong: convolutions with a dilation or a padding_mode, which it does not pass on to its A;
DoRA on a convolution of several groups, whose norms it takes of a scrambled product; an embedding with max_norm, which
it also applies to A. Of a convolution of several groups peft's own A reads the inputs of all groups, which is refused
here; the other way round works, but peft cannot merge it. What it adds twice (see adds_out_proj_twice) is halved, or
adapted twice here, too (LoadOptions::out_proj_twice).
"""

import argparse
import copy
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from exchange_cases import CASES, IDS, MODELS, STEPS
from exchange_model import LanguageNet, Net
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from peft.tuners.lora.layer import MultiheadAttention
from safetensors.torch import load_file, save_file
from strict_peft import largest_distance, load_adapter

FILE = "adapter_model.safetensors"
TOLERANCE = {"float32": 1e-5, "float64": 1e-10, "bfloat16": 0.1, "float16": 5e-3}
RATE = 1e-2
CONFIGS = {"LORA": LoraConfig, "VERA": VeraConfig, "IA3": IA3Config}


def make_model(case):
    description, _ = MODELS[case.model]
    kind = LanguageNet if case.model.startswith("language") else Net
    return kind(description, seed=3).to(getattr(torch, case.dtype)).eval()


def make_base(case):
    """The model that peft adapts, which may have more tokens."""
    model = make_model(case)
    if case.added:
        model.add_tokens(case.added)
    return model


def make_input(case):
    sizes = MODELS[case.model][1]
    generator = torch.Generator().manual_seed(4)
    if case.added:  # each of the new ones, too
        return torch.arange(11 + case.added).view(2, -1)
    if sizes == IDS:
        return torch.randint(0, 11, (2, 5), generator=generator)
    return torch.randn(sizes, generator=generator).to(getattr(torch, case.dtype))


def write_tensors(case, path):
    model = make_model(case)
    with torch.no_grad():
        output = make_base(case)(make_input(case))
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


def add_once(model, case):
    """Halves the scaling of what peft adds twice, unless that is what is wanted."""
    for module in model.modules():
        if isinstance(module, MultiheadAttention) and ADDS_OUT_PROJ_TWICE and "out_proj_twice" not in case.options:
            module.get_base_layer().out_proj.scaling["default"] /= 2
    return model


def make_config(kind, fields):
    return CONFIGS[kind](**copy.deepcopy(fields))  # since peft adds to the lists that it is given


def peft_model(case, noise):
    """An adapter as peft makes it, with `noise` added to everything that is trained."""
    torch.manual_seed(6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            make_base(case), make_config(case.type, case.config), autocast_adapter_dtype=not case.half_adapter
        )
    add_noise(model, noise)
    if case.second:
        model.add_adapter("second", make_config(case.type, case.second))
        model.set_adapter("second")
        add_noise(model, noise)
    return add_once(model, case).eval()


def add_noise(model, size):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))


def save(model, folder, pickled=False, tables=False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tables = {"save_embedding_layers": True} if tables else {}
        model.save_pretrained(folder, safe_serialization=not pickled, **tables)


def logits(model, case):
    """What peft's model computes, and what it computes when it is merged."""
    with torch.no_grad():
        unmerged = model.get_base_model()(make_input(case))  # the others want what transformers' models have
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
        if case.writes:
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
        save(model, self.folder / "peft", self.case.pickled, self.case.tables)
        self.expected = logits(self.reload(), self.case)
        options = {"options": self.case.options, "save": str(self.folder / "copy")}
        self.add_job("reading", adapter=str(self.folder / "peft"), **options)

    def reload(self):
        """As peft reads it, since it writes patterns in another order than it was given, and the first match counts."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kept = not self.case.half_adapter
            model = PeftModel.from_pretrained(
                make_base(self.case), self.folder / "peft", autocast_adapter_dtype=kept
            )
            if self.case.second:
                model.load_adapter(self.folder / "peft" / "second", "second")
                model.set_adapter("second")
        return add_once(model, self.case).eval()

    def prepare_writing(self):
        """From a configuration that says only what is not a default."""
        files = {}
        for name, config in (("config", self.case.config), ("second", self.case.second)):
            if config:
                files[name] = str(self.folder / f"{name}.json")
                Path(files[name]).write_text(json.dumps({"peft_type": self.case.type, **config}))
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
        self.check_config()
        if not self.case.half_adapter and not self.case.pickled and "out_proj_twice" not in self.case.options:
            for folder in ("", "second") if self.case.second else ("",):
                self.check_bytes(*(self.folder / name / folder / FILE for name in ("copy", "peft")))

    def check_config(self):
        """What the configuration says is kept, also of modules that are not there."""
        ours, theirs = (json.loads((self.folder / name / "adapter_config.json").read_text()) for name in ("copy", "peft"))
        names = ["rank_pattern", "alpha_pattern", "target_parameters", "task_type"]
        if theirs.get("layers_to_transform") is None:  # else the layers are written by name
            names += ["target_modules", "exclude_modules"]
        value = lambda config, name: sorted(config[name]) if isinstance(config.get(name), list) else config.get(name)
        changed = [name for name in names if value(ours, name) != value(theirs, name)]
        if not set(theirs.get("modules_to_save") or []) <= set(ours.get("modules_to_save") or []):
            changed.append("modules_to_save")  # to which those are added that only end in the letters of one
        if changed:
            raise AssertionError("; ".join(f"{name} is written as {ours.get(name)}, but was {theirs.get(name)}" for name in changed))

    def check_bytes(self, ours, theirs):
        """What was read is written as it was; but for what peft writes without need, so that the files differ there."""
        needless = re.compile(r"\.(original_module|modules_to_save)\.")
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
        unmerged, merged = logits(add_once(model, self.case), self.case)
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
