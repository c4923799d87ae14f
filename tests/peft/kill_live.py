"""Saving that is interrupted: a process that saves one adapter after the other is killed at random moments, and each time
Python and this library find one complete adapter, the last that was there or the next. Then two processes at a time, and
a disk that is full.

usage: kill_live.py SAVE_FOREVER_PROGRAM [--kills 60] [--seed 0]
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peft import PeftConfig
from safetensors.torch import load_file

FILES = {"adapter_config.json", "adapter_model.safetensors"}


def found_by_python(directory):
    """The number of the adapter in a directory, None when there is none; fails when it holds parts of two."""
    if not any((directory / name).exists() for name in FILES):
        return None
    config = PeftConfig.from_pretrained(str(directory))
    tensors = load_file(directory / "adapter_model.safetensors")
    number = config.lora_alpha
    assert config.r == 2 + number % 2, (config.r, number)
    assert len(tensors) == 4, sorted(tensors)
    for name, tensor in tensors.items():
        assert (tensor == number).all(), f"alpha is {number}, but {name} holds {tensor.flatten()[0]}"
        assert config.r == tensor.shape[0 if "lora_A" in name else 1], (name, tensor.shape, config.r)
    return number


class Saver:
    """The program, which starts processes that save and tells what it finds."""

    def __init__(self, program, directory):
        self.directory = directory
        self.process = subprocess.Popen([program, directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, line):
        print(line, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()

    def save(self, number):
        return int(self.ask(f"save {number}"))

    def check(self):
        """The number of the adapter that is there, which both sides have to find."""
        ours, theirs = self.ask("load"), found_by_python(self.directory)
        assert ours == ("nothing" if theirs is None else str(theirs)), f"Python finds {theirs}, the library {ours}"
        return theirs

    def check_clean(self):
        """The next save clears up whatever the killed ones left."""
        subprocess.run([self.process.args[0], self.directory, "1"], check=True)
        names = set(os.listdir(self.directory))
        assert names == FILES | {"README.md"}, names
        assert not any((self.directory / name).is_symlink() for name in names)
        assert self.check() == 1


def a_save_takes(saver):
    """Of so many that the time in which a process starts, which varies, does not count."""
    begin = time.perf_counter()
    subprocess.run([saver.process.args[0], saver.directory, "1"], check=True)
    once = time.perf_counter()
    subprocess.run([saver.process.args[0], saver.directory, "1001"], check=True)
    return (time.perf_counter() - once - (once - begin)) / 1000


def kill_one(saver, rng, kills, duration):
    """Some of the processes are killed in their first save, others in a later one."""
    number, saved, leftovers, nothing = 1000, 0, 0, 0
    for _ in range(kills):
        if rng.random() < 0.1 and saver.directory.exists():
            shutil.rmtree(saver.directory)
        before = found_by_python(saver.directory)
        child = saver.save(number)
        time.sleep(rng.random() * 4 * duration)
        os.kill(child, signal.SIGKILL)
        leftovers += bool(set(os.listdir(saver.directory)) - FILES if saver.directory.exists() else False)
        after = saver.check()
        assert after == before or after >= number, f"{before} was there, {number} and later were saved, {after} is there"
        saved += after != before
        nothing += after is None
        number = max(number, after or 0) + 1000 + rng.randrange(2)
    print(f"{kills} killed: {saved} after their first save, {leftovers} in the middle of one, {nothing} before there was any")
    assert saved > kills / 10 and leftovers > kills / 10


def kill_two(saver, rng, kills, duration):
    for _ in range(kills):
        children = [saver.save(n) for n in (rng.randrange(10**5, 10**6), rng.randrange(10**5, 10**6))]
        for child in children:
            time.sleep(rng.random() * 4 * duration)
            os.kill(child, signal.SIGKILL)
        saver.check()
    print(f"{kills} times two at once")


def fill_disk(program, folder):
    """In a file system of its own with room for three small adapters, most of it taken by another file."""
    script = f"""
        mount -t tmpfs -o size=64k tmpfs '{folder}' || exit 77
        '{program}' '{folder}/adapter' 7 || exit 79
        head -c 100k /dev/zero > '{folder}/rest' 2> /dev/null
        '{program}' '{folder}/adapter' 8 && exit 78
        ls -A '{folder}/adapter' && cat '{folder}/adapter/adapter_config.json'"""
    result = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    if result.returncode == 77 or "unshare" in result.stderr:
        print("full disk: not tested, no file system can be mounted here:", result.stderr.strip())
        return
    error, *names, config = result.stdout.split("\n", 3)
    assert result.returncode == 0 and error.endswith("No space left on device"), result
    assert f"error: {folder}/adapter/adapter_" in error, error
    assert set(names) == FILES and json.loads(config)["lora_alpha"] == 7, result.stdout
    print("full disk:", error)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program")
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="lora kill \u00e9\u4e2d ") as folder:
        saver = Saver(options.program, Path(folder) / "adapter")
        duration = a_save_takes(saver)
        print(f"one save takes {duration * 1e3:.1f} ms")
        kill_one(saver, rng, options.kills, duration)
        kill_two(saver, rng, max(10, options.kills // 10), duration)
        saver.directory.mkdir(exist_ok=True)
        (saver.directory / "README.md").write_text("stays")
        saver.check_clean()
        (Path(folder) / "full").mkdir()
        fill_disk(options.program, Path(folder) / "full")


if __name__ == "__main__":
    sys.exit(main())
