"""Replays an exported run in peft: python replay_run.py RUN_DIR METRICS_CSV [options]

RUN_DIR holds run.json (model, steps, accumulate, lr of each step, betas, eps, weight_decay, clip, dropout, dtype,
quantize, quantize_embedding, eval_every), batches.safetensors (train_inputs and train_targets, int64 (steps,
accumulate, B, T), and validation_inputs and validation_targets, (n, T); targets are shifted already and -100 does not
count) and initial_adapter, the PEFT directory from before the first step. The same batches go through transformers,
peft and torch.optim.AdamW; the losses of METRICS_CSV are printed beside peft's. Exits with 1 when one is out of
tolerance.
"""

import argparse
import csv
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from strict_peft import fail, largest_distance, load_adapter, load_base


def read_metrics(path):
    """{step: (training loss or None, validation loss or None)}"""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    number = lambda text: float(text) if text else None  # noqa: E731
    return {int(row["step"]): (number(row["train_loss"]), number(row["validation_loss"])) for row in rows}


def summed_loss(model, inputs, targets):
    logits = model(input_ids=inputs, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


def count(targets):
    return (targets != -100).sum().item()


@torch.no_grad()
def validation_loss(model, inputs, targets, rows):
    model.eval()
    total = sum(summed_loss(model, i, t).item() for i, t in zip(inputs.split(rows), targets.split(rows)))
    return total / count(targets)


class Stopwatch:
    """Counts from when it is made, but for where it is stopped; waits for what a device still has to do."""

    def __init__(self, device):
        self.wait = (lambda: None) if device == "cpu" else torch.get_device_module(device).synchronize
        self.seconds = 0.0
        self.go_on()

    def go_on(self):
        self.begin = time.perf_counter()

    def stop(self):
        self.wait()
        self.seconds += time.perf_counter() - self.begin


class Replay:
    def __init__(self, run_dir, options):
        self.run = json.loads((run_dir / "run.json").read_text())
        self.batches = load_file(run_dir / "batches.safetensors")
        if not {self.run.get("quantize", "none"), self.run.get("quantize_embedding", "none")} <= {"none", "lossless"}:
            fail("the base of the run was held in few bits; runs on weights as they are in the files can be replayed")
        if self.run["dropout"] != 0 and not options.allow_dropout:
            fail(f"the run drops out {self.run['dropout']} of its inputs; masks differ, see --allow-dropout")
        base = load_base(options.model or self.run["model"], self.run["dtype"], options.attention)
        self.model = load_adapter(base, run_dir / "initial_adapter", trainable=True).to(options.device)
        self.batches = {name: batch.to(options.device) for name, batch in self.batches.items()}
        self.named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.initial = {name: p.detach().clone() for name, p in self.named.items()}
        self.largest_gradient = dict.fromkeys(self.named, 0.0)
        self.optimizer = torch.optim.AdamW(
            self.named.values(),
            lr=self.run["lr"][0],
            betas=tuple(self.run["betas"]),
            eps=self.run["eps"],
            weight_decay=self.run["weight_decay"],
        )
        self.seconds = []
        self.device = options.device

    def validate(self):
        inputs, targets = self.batches["validation_inputs"], self.batches["validation_targets"]
        return validation_loss(self.model, inputs, targets, self.batches["train_inputs"].shape[2])

    def step(self, index):
        """One update; returns the mean loss over the tokens of all its micro-batches, before the update."""
        watch = Stopwatch(self.device)
        self.model.train()
        inputs, targets = self.batches["train_inputs"][index], self.batches["train_targets"][index]
        tokens, total = count(targets), 0.0
        for micro_inputs, micro_targets in zip(inputs, targets):
            loss = summed_loss(self.model, micro_inputs, micro_targets) / tokens
            loss.backward()
            total += loss.item()
        watch.stop()
        self.note_gradients()
        watch.go_on()
        if self.run["clip"] > 0:
            torch.nn.utils.clip_grad_norm_(self.named.values(), self.run["clip"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.run["lr"][index]
        self.optimizer.step()
        self.optimizer.zero_grad()
        watch.stop()
        self.seconds.append(watch.seconds)
        return total

    def note_gradients(self):
        for name, parameter in self.named.items():
            size = 0.0 if parameter.grad is None else parameter.grad.abs().max().item()
            self.largest_gradient[name] = max(self.largest_gradient[name], size)

    def untrained(self):
        """Adapter tensors that never had a gradient, or that no step changed."""
        same = {name for name, p in self.named.items() if torch.equal(p, self.initial[name])}
        return sorted(same | {name for name, size in self.largest_gradient.items() if size == 0.0})


class Comparison:
    """Prints ours beside theirs and remembers the largest difference."""

    def __init__(self, name, tolerance):
        self.name, self.tolerance, self.largest, self.compared = name, tolerance, 0.0, 0

    def add(self, step, ours, theirs):
        difference = abs(ours - theirs)
        self.largest = max(self.largest, difference if difference == difference else float("inf"))
        self.compared += 1
        print(f"{self.name:<10} {step:>5} {ours:>12.6f} {theirs:>12.6f} {difference:>10.2e}", flush=True)

    def report(self):
        if self.compared == 0:
            fail(f"no {self.name} loss was compared")
        within = self.largest <= self.tolerance
        print(
            f"{self.name}: {self.compared} losses, largest difference {self.largest:.2e}, "
            f"at most {self.tolerance:.0e}: {'ok' if within else 'FAILED'}"
        )
        return within


def compare_losses(replay, metrics, options):
    training = Comparison("training", options.tolerance_each)
    validation = Comparison("validation", options.tolerance_validation)
    print(f"{'':<10} {'step':>5} {'ours':>12} {'peft':>12} {'difference':>10}")
    for step in range(replay.run["steps"] + 1):
        if step > 0 and (step not in metrics or metrics[step][0] is None):
            fail(f"{options.metrics}: no training loss for step {step}")
        if step > 0:
            training.add(step, metrics[step][0], replay.step(step - 1))
        if step in metrics and metrics[step][1] is not None:
            validation.add(step, metrics[step][1], replay.validate())
    return [training.report(), validation.report()]


def compare_adapter(replay, directory):
    """Shows how far our trained adapter lies from peft's. It is not judged: where a gradient is nothing but rounding,
    Adam still makes a full step of it."""
    from peft import get_peft_model_state_dict

    ours = load_file(Path(directory) / "adapter_model.safetensors")
    theirs = get_peft_model_state_dict(replay.model)
    if ours.keys() != theirs.keys():
        fail(f"{directory}: not the tensors of peft: {sorted(ours.keys() ^ theirs.keys())}")
    distances = {name: largest_distance(ours[name], theirs[name].cpu()) for name in ours}
    worst = max(distances, key=distances.get)
    print(f"trained adapter: {len(distances)} tensors, largest distance {distances[worst]:.2e} ({worst})")


def peak_memory(device):
    """The most bytes that a device held, or, where it is the CPU, the process."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.get_device_module(device).max_memory_allocated(device)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("metrics")
    parser.add_argument("--model", help="the base model, when it is no longer where run.json says")
    parser.add_argument("--tolerance-each", type=float, default=1e-5, help="for each training loss")
    parser.add_argument("--tolerance-validation", type=float, default=1e-5, help="for each validation loss")
    parser.add_argument("--attention", choices=["eager", "sdpa"], default="sdpa")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--allow-dropout", action="store_true", help="replay a run with dropout, with peft's masks")
    parser.add_argument("--expect-all-trained", action="store_true", help="every adapter tensor must have trained")
    parser.add_argument("--trained-adapter", metavar="DIR", help="show how far this adapter lies from peft's")
    parser.add_argument("--summary", type=Path, help="write step time and peak memory to this JSON file")
    options = parser.parse_args(arguments)

    replay = Replay(options.run_dir, options)
    results = compare_losses(replay, read_metrics(options.metrics), options)
    untrained = replay.untrained()
    if options.expect_all_trained:
        print(f"adapter tensors in peft that trained: {len(replay.named) - len(untrained)} of {len(replay.named)}")
        results.append(not untrained)
        for name in untrained:
            print(f"not trained: {name}", file=sys.stderr)
    if options.trained_adapter:
        compare_adapter(replay, options.trained_adapter)
    if options.summary:
        summary = {
            "seconds_per_step": statistics.median(replay.seconds),
            "peak_memory_bytes": peak_memory(options.device),
        }
        options.summary.write_text(json.dumps(summary) + "\n")
    return int(not all(results))


if __name__ == "__main__":
    sys.exit(main())
