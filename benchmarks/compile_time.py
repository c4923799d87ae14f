"""How long does a compiler take for a program with lora, and how much of that is LibTorch alone?

Prints CPU seconds, the least of several runs, of one translation unit for each of: LibTorch alone, parts of lora, all of
it, and programs that use it; first with the bodies of lora's functions in its headers, then with those of
lora::compiled, whose own seconds are the last line, unless there is --only. Without further options it is c++ -O2; CXX
names another compiler.

    build/venv/bin/python benchmarks/compile_time.py --runs 3 -- -O0
"""

import argparse
import importlib.util
import os
import resource
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

TRAIN = """
  torch::nn::Sequential model(torch::nn::Linear(64, 128), torch::nn::ReLU(), torch::nn::Linear(128, 10));
  auto adapters = lora::attach(*model, lora::LoRAConfig(4).alpha(8).target_modules({"0", "2"}));
  torch::optim::AdamW optimizer(adapters.parameters(), 1e-2);
  for (int step = 0; step < 3; ++step) {
    auto active = adapters.activate();
    auto loss = model->forward(torch::ones({2, 64})).sum();
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
  }
"""
TRAIN_WITHOUT_LORA = """
  torch::nn::Sequential model(torch::nn::Linear(64, 128), torch::nn::ReLU(), torch::nn::Linear(128, 10));
  torch::optim::AdamW optimizer(model->parameters(), 1e-2);
  for (int step = 0; step < 3; ++step) {
    auto loss = model->forward(torch::ones({2, 64})).sum();
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
  }
"""
SAVE_AND_MERGE = """
  adapters.save("adapter");
  adapters.merge_and_unload();
"""

MODULES = ("linear", "embedding", "conv", "attention")

# What is compiled: a name, the headers after <torch/torch.h>, and the body of main().
UNITS = [
    ("torch/torch.h", [], ""),
    ("... and lora/options.hpp", ["lora/options.hpp"], ""),
    ("... and lora/modules/*.hpp", [f"lora/modules/{kind}.hpp" for kind in MODULES], ""),
    ("... and lora/files/safetensors.hpp", ["lora/files/safetensors.hpp"], ""),
    ("... and lora/attach.hpp", ["lora/attach.hpp"], ""),
    ("... and lora/peft/checkpoint.hpp", ["lora/peft/checkpoint.hpp"], ""),
    ("... and lora/lora.hpp", ["lora/lora.hpp"], ""),
    ("a program that trains without lora", [], TRAIN_WITHOUT_LORA),
    ("attaches and trains", ["lora/attach.hpp"], TRAIN),
    ("attaches, trains, saves and merges", ["lora/attach.hpp", "lora/peft/checkpoint.hpp"], TRAIN + SAVE_AND_MERGE),
    ("the same, with lora/lora.hpp", ["lora/lora.hpp"], TRAIN + SAVE_AND_MERGE),
]


def libtorch():
    return Path(importlib.util.find_spec("torch").origin).parent


def cpu_seconds(command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1, help="the least of so many is printed (1)")
    parser.add_argument("--only", default="", help="only the units whose names contain this")
    parser.add_argument("options", nargs="*", default=["-O2"], help="options of the compiler (-O2)")
    arguments = parser.parse_args()
    include = libtorch() / "include"
    compiler = [os.environ.get("CXX", "c++"), "-std=c++17", *arguments.options, "-DFMT_HEADER_ONLY", f"-I{ROOT}/include"]
    compiler += ["-isystem", include, "-isystem", include / "torch/csrc/api/include"]
    print(f"CPU seconds of {' '.join([compiler[0], *arguments.options])}: header-only, compiled", flush=True)
    with tempfile.TemporaryDirectory(prefix="lora_compile_time_") as folder:

        def seconds(source, *options):
            command = [*compiler, *options, "-c", source, "-o", Path(folder) / "unit.o"]
            return min(cpu_seconds(command) for _ in range(arguments.runs))

        for name, headers, body in UNITS:
            if arguments.only not in name:
                continue
            source = Path(folder) / "unit.cpp"
            includes = "".join(f"#include <{header}>\n" for header in ["torch/torch.h", *headers])
            source.write_text(f"{includes}\nint main() {{\n{body}}}\n")
            compiled = f"{seconds(source, '-DLORA_COMPILED'):6.1f}" if headers else " " * 6
            print(f"{seconds(source):6.1f}  {compiled}  {name}", flush=True)
        if not arguments.only:
            own = seconds(ROOT / "cmake/lora_compiled.cpp", "-DLORA_COMPILED")
            print(f"{'':6}  {own:6.1f}  lora::compiled itself", flush=True)


if __name__ == "__main__":
    main()
