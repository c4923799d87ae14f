"""Interrupts finetune_gpt and resumes it: python interrupt_live.py --programs DIR

A run of a tiny model with dropout is stopped by SIGINT, stopped again by SIGTERM, and resumed to its end. Every loss,
learning rate and gradient norm, and the adapter, must be those of a run that never stopped, to the last digit. Bad
options must give one line and exit code 2.
"""

import argparse
import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "peft"))
import make_tiny_model  # noqa: E402

INTERRUPTED, BAD_OPTIONS = 130, 2
COLUMNS = ("step", "train_loss", "validation_loss", "lr", "grad_norm")  # all but the speed
checks = failures = 0


def check(holds, what):
    global checks, failures
    checks += 1
    failures += not holds
    print(f"{'ok    ' if holds else 'FAILED'}  {what}")


def figures(out):
    with open(out / "metrics.csv", newline="") as file:
        return [[row[column] for column in COLUMNS] for row in csv.DictReader(file)]


def checkpoints(out):
    return sorted(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))


def interrupt(command, out, number, after_step):
    """Starts `command`, sends the signal once a checkpoint after `after_step` is there, and returns exit code and output."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while max(checkpoints(out), default=0) <= after_step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    return process.returncode, output


def check_interrupts(command, folder, quantized):
    print(f"the base in {quantized}")
    whole, parts = folder / f"whole-{quantized}", folder / f"parts-{quantized}"
    other_base = [*command, "--quantize", "fp4", "--out", parts, "--save-every", "3"]
    command = [*command, "--quantize", *quantized.split()]
    subprocess.run([*command, "--out", whole], check=True, capture_output=True)
    in_parts = [*command, "--out", parts, "--save-every", "3"]
    code, output = interrupt(in_parts, parts, signal.SIGINT, 0)
    check(code == INTERRUPTED and "--resume goes on" in output, f"SIGINT: exit code {code}, says how to go on")
    first = max(checkpoints(parts), default=0)
    code, output = interrupt([*in_parts, "--resume"], parts, signal.SIGTERM, first)
    check(code == INTERRUPTED and f"checkpoint-{first}" in output, f"SIGTERM after resuming from {first}: exit code {code}")
    check(len(checkpoints(parts)) == 2, f"two checkpoints are kept: {checkpoints(parts)}")

    again = subprocess.run([*command, "--out", parts], capture_output=True, text=True)
    check(again.returncode == BAD_OPTIONS and "--resume" in again.stderr, "a new run does not mix with the old one")
    for changed, expected in ([*in_parts, "--rank", "4"], "--rank was 8"), (other_base, f'--quantize was "{quantized}"'):
        other = subprocess.run([*changed, "--resume"], capture_output=True, text=True)
        is_refused = other.returncode == BAD_OPTIONS and expected in other.stderr
        check(is_refused, f"another option: {other.stderr.strip()}")

    subprocess.run([*in_parts, "--resume"], check=True, capture_output=True)
    check(figures(parts) == figures(whole), f"{len(figures(whole))} lines of figures are the same")
    adapters = [(out / "adapter/adapter_model.safetensors").read_bytes() for out in (whole, parts)]
    check(adapters[0] == adapters[1], "the adapters are the same")


def check_bad_options(command, folder):
    for options, expected in [
        (["--steps", "-3"], "--steps"),
        (["--lr", "fast"], "--lr"),
        (["--alpha", "inf"], "--alpha"),
        (["--steps", "3", "--warmup", "4"], "--warmup"),
        (["--method", "magic"], "--method"),
        (["--device", "abacus"], "device"),
        (["--targets", "w_proj"], "w_proj"),
        (["--targets", "all-linear", "q_proj"], "all-linear stands alone"),
        (["--resume"], "no checkpoint"),
        (["--quantize", "nf5"], "--quantize"),
        (["--bogus"], "--bogus"),
    ]:
        result = subprocess.run([*command, "--out", folder / "bad", *options], capture_output=True, text=True)
        first, *rest = result.stderr.splitlines() or [""]
        is_short = expected in first and all(line.startswith("  ") for line in rest)  # but for names, a line each
        check(result.returncode == BAD_OPTIONS and is_short, f"{' '.join(options)}: {result.stderr.strip()[:90]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=Path, required=True, help="folder of finetune_gpt")
    program = parser.parse_args().programs / "finetune_gpt"
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="lora_interrupt_") as folder:
        folder = Path(folder)
        make_tiny_model.main([str(folder / "model"), "--architecture", "llama"])
        (folder / "text.txt").write_text(make_tiny_model.TEXT * 12, encoding="utf-8")
        command = [program, "--model", folder / "model", "--text", folder / "text.txt", "--block", "32"]
        check_bad_options(command, folder)
        command += ["--steps", "60", "--batch", "2", "--accumulate", "2", "--dropout", "0.1", "--eval-every", "10"]
        command += ["--sample-tokens", "0", "--no-merge", "--device", "cpu"]
        for quantized in "none", "nf4":
            check_interrupts([str(part) for part in command], folder, quantized)
    print(f"{checks} checks, {failures} failed")
    return int(failures > 0 or checks == 0)


if __name__ == "__main__":
    sys.exit(main())
