"""What the programs read of a model directory, beside transformers, which reads the same:

    model_directory_live.py --programs build/cmake/programs --templates build/jinja/templates [MODEL_DIR]

Tiny random models (and MODEL_DIR) with a beginning of text in their post_processor, with the chat templates of
well-known models, with a generation_config.json, with tokens that have no row. Rows of training, prompts, what is said
after them, and the directories written have to be those of transformers and peft.
"""
import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent / "peft"))
import make_tiny_model  # noqa: E402

BAD_OPTIONS, BLOCK, TOKENS = 2, 16, 24
WORDS = make_tiny_model.TEXT.split()
TURNS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]"]
TURNS += ["[/INST]", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<bos>", "<eos>"]
DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {  # file: bos, eos, what closes a reply, whether a system message may be there, and learned from
    "meta-llama-Llama-3.1-8B-Instruct": ("<s>", "<|eot_id|>", "<|eot_id|>", True, True),
    "Qwen-Qwen2.5-7B-Instruct": (None, "<|im_end|>", "<|im_end|>", True, True),
    "mistralai-Mistral-Nemo-Instruct-2407": ("<s>", "</s>", "</s>", True, False),
    "google-gemma-2-2b-it": ("<bos>", "<eos>", "<end_of_turn>", False, False),
    "microsoft-Phi-3.5-mini-instruct": (None, "<|endoftext|>", "<|end|>", True, True),
}
checks = failures = 0


def check(holds, what):
    global checks, failures
    checks += 1
    failures += not holds
    print(f"{'ok    ' if holds else 'FAILED'}  {what}", flush=True)


def equal(found, expected, what):
    check(found == expected, what)
    if found != expected:
        print(f"        here         {str(found)[:600]}\n        transformers {str(expected)[:600]}")


def run(program, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(part) for part in (program, *arguments)], capture_output=True, env=environment)


def must_run(program, *arguments):
    result = run(program, *arguments)
    if result.returncode != 0:
        sys.exit(f"{program} {arguments} ended with {result.returncode}: {result.stderr.decode()}")
    return result


def make_model(folder, post_processor=None, template=None, bos=None, eos="<|endoftext|>", **generation):
    """A tiny Llama with a tokenizer that knows the tokens of all templates here."""
    special = make_tiny_model.SPECIAL_TOKENS + TURNS
    tokenizer = make_tiny_model.make_tokenizer("llama", make_tiny_model.TEXT.splitlines(), special)
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    model = AutoModelForCausalLM.from_config(make_tiny_model.llama_config(tokenizer.get_vocab_size(), True))
    make_tiny_model.randomize(model, 3)
    model.generation_config = GenerationConfig(**{"eos_token_id": tokenizer.token_to_id(eos), **generation})
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def rows_of(programs, model, data, folder, *options):
    """The rows that finetune_gpt learns from and evaluates, in the order of the data: inputs and targets, as lists."""
    shutil.rmtree(folder, ignore_errors=True)
    shared = ["--model", model, "--out", folder, "--export-run", folder / "run", "--no-merge", "--sample-tokens", 0]
    small = ["--batch", 1, "--rank", 1, "--eval-every", 0, "--device", "cpu", "--validation-blocks", 1000]
    must_run(programs / "finetune_gpt", *shared, *small, *data, *options)
    batches = load_file(folder / "run/batches.safetensors")
    rows = set()
    for part in ("train", "validation"):
        inputs, targets = (batches[f"{part}_{kind}"].flatten(0, -2).tolist() for kind in ("inputs", "targets"))
        for row, target in zip(inputs, targets):
            while target and target[-1] == -100:  # filled up, or not learned
                target.pop()
            rows.add((tuple(row[: len(target)]), tuple(target)))
    return rows


def generated(model_dir, ids, **options):
    """What transformers says after a prompt."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    prompt = torch.tensor([ids])
    with torch.no_grad():
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=TOKENS, **options)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    said = out[0, len(ids) :].tolist()
    return said[:-1] if said and said[-1] in ends else said


def bytes_of(tokenizer, ids):
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    added = {id: token.content.encode() for id, token in tokenizer.added_tokens_decoder.items()}
    return b"".join(added.get(id) or bytes(byte_of[x] for x in tokenizer.convert_ids_to_tokens(id)) for id in ids)


def check_said(programs, model, ids, what, *options, **theirs):
    """Prompt and continuation of generate, greedy unless the model says otherwise."""
    result = must_run(programs / "generate", "--model", model, "--max-new-tokens", TOKENS, *options)
    tokenizer = AutoTokenizer.from_pretrained(model)
    said = generated(model, ids, **theirs)
    equal(result.stdout, bytes_of(tokenizer, said) + b"\n", f"{what}: {len(said)} tokens are said")
    counts = f"{len(said)} tokens after a prompt of {len(ids)} "
    check(counts in result.stderr.decode(), f"{what}: {counts}")


def text_rows(tokenizer, files, end):
    ids = []
    for file in files:
        if ids and ids[-1] != end:
            ids.append(end)
        ids += tokenizer(file.read_text(encoding="utf-8"))["input_ids"]
    cuts = range(0, len(ids) - BLOCK, BLOCK)
    return {(tuple(ids[i : i + BLOCK]), tuple(ids[i + 1 : i + 1 + BLOCK])) for i in cuts}


def check_post_processors(programs, folder):
    bos, eos = ("<s>", 10), ("</s>", 11)

    def around(single):
        return processors.TemplateProcessing(single=single, special_tokens=[bos, eos])

    byte_level = processors.ByteLevel(trim_offsets=False)
    kinds = {
        "none": None,
        "ByteLevel": byte_level,
        "TemplateProcessing, BOS": around("<s> $A"),
        "TemplateProcessing, BOS and EOS": around("<s> $A </s>"),
        "Sequence": processors.Sequence([byte_level, around("<s> $A")]),
        "RobertaProcessing": processors.RobertaProcessing(eos, bos),
        "BertProcessing": processors.BertProcessing(eos, bos),
    }
    files = [folder / "one.txt", folder / "two.txt"]
    for file, lines in zip(files, (make_tiny_model.TEXT.splitlines()[:3], make_tiny_model.TEXT.splitlines()[2:])):
        file.write_text("\n".join(lines), encoding="utf-8")
    pairs = [(" ".join(WORDS[i : i + 3]), " " + WORDS[i + 3]) for i in range(0, 24, 4)]
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs]
    (folder / "pairs.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    for name, processor in kinds.items():
        model = make_model(folder / "model", processor, bos="<s>", eos="</s>")
        tokenizer = AutoTokenizer.from_pretrained(model)
        assert tokenizer.convert_tokens_to_ids(["<s>", "</s>"]) == [10, 11]
        expected = text_rows(tokenizer, files, 11)
        train = len(expected) - round(len(expected) * 0.05 + 1e-9)
        options = ["--block", BLOCK, "--steps", train, "--warmup", 1]
        found = rows_of(programs, model, ["--text", *files], folder / "out", *options)
        equal(found, expected, f"post_processor {name}: {len(expected)} rows of two texts")

        empty = tokenizer("")["input_ids"]
        ends = [] if empty[-1:] == [11] else [11]
        expected = set()
        for prompt, completion in pairs:
            front = [id for id in empty if id == 10] + tokenizer(prompt, add_special_tokens=False)["input_ids"]
            back = tokenizer(completion, add_special_tokens=False)["input_ids"] + ends + [id for id in empty if id == 11]
            ids, targets = front + back, [-100] * len(front) + back
            expected.add((tuple(ids[:-1]), tuple(targets[1:])))
        found = rows_of(programs, model, ["--jsonl", folder / "pairs.jsonl"], folder / "out", "--steps", len(pairs) - 1)
        equal(found, expected, f"post_processor {name}: {len(expected)} pairs")
        prompt = " ".join(WORDS[:6])
        check_said(programs, model, tokenizer(prompt)["input_ids"], f"post_processor {name}", "--prompt", prompt)


def conversations(has_system):
    said = [" ".join(WORDS[i : i + 2]) for i in range(0, 40, 2)]
    roles = [["user", "assistant"], ["user", "assistant", "user", "assistant"]]
    if has_system:
        roles += [["system", "user", "assistant"], ["system", *roles[1], "user", "assistant"]]
    lists = [[{"role": role, "content": said[n + i]} for i, role in enumerate(turns)] for n, turns in enumerate(roles)]
    return lists + [[{"role": "user", "content": said[9]}, {"role": "assistant", "content": said[10]}]]


def check_chat(programs, folder, model, name, closing, has_system=True, learns_system=True):
    tokenizer = AutoTokenizer.from_pretrained(model)
    lists = conversations(learns_system)
    lines = [json.dumps({"messages": messages}) + "\n" for messages in lists]
    (folder / "chats.jsonl").write_text("".join(lines), encoding="utf-8")
    options = ["--steps", len(lists) - 1, "--block", 250]
    found = rows_of(programs, model, ["--jsonl", folder / "chats.jsonl"], folder / "out", *options)
    whole = [tokenizer.apply_chat_template(messages, return_dict=False) for messages in lists]
    for messages, ids in zip(lists, whole):
        rows = [row for row in found if row[0] == tuple(ids[: len(row[0])]) and len(row[0]) > 3]
        learned = [id for row in rows[:1] for id in row[1] if id != -100]
        replies = [m["content"] + (closing or tokenizer.eos_token) for m in messages if m["role"] == "assistant"]
        text = tokenizer.decode(learned).replace(" ", "")
        if tokenizer.eos_token != closing and text.endswith(tokenizer.eos_token):
            text = text.removesuffix(tokenizer.eos_token)  # what a template writes behind the last reply
        what = f"{name}, {len(messages)} messages: {len(ids)} tokens, learned are the replies and their ends"
        equal(text.replace("\n", ""), "".join(replies).replace(" ", ""), what)
        first = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
        prompt = tokenizer.apply_chat_template(messages[:first], add_generation_prompt=True, return_dict=False)
        starts = [next(i for i, id in enumerate(row[1]) if id != -100) + 1 for row in rows[:1]]
        equal(starts, [len(prompt)], f"{name}: the first reply is behind the {len(prompt)} tokens of its prompt")

    question = [{"role": "user", "content": " ".join(WORDS[3:9])}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    check_said(programs, model, ids, f"{name}, --chat", "--chat", "--prompt", question[0]["content"])
    if has_system:
        system = [{"role": "system", "content": "Be brief."}, *question]
        ids = tokenizer.apply_chat_template(system, add_generation_prompt=True, return_dict=False)
        arguments = ["--chat", "--system", "Be brief.", "--prompt", question[0]["content"]]
        check_said(programs, model, ids, f"{name}, --system", *arguments)
    else:
        refused = run(programs / "generate", "--model", model, "--chat", "--system", "S", "--prompt", "Hi")
        check(refused.returncode == 1 and b"System role not supported" in refused.stderr, f"{name}: {refused.stderr}")
    if has_system and not learns_system:
        messages = [*system, {"role": "assistant", "content": "So."}]
        (folder / "chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
        options = ["--model", model, "--jsonl", folder / "chats.jsonl", "--out", folder / "refused"]
        said = run(programs / "finetune_gpt", *options).stderr.decode().strip()
        text = "chats.jsonl:1: messages[2]: the chat template writes the conversation up to this reply in another way"
        check(text in said, f"{name}, learning with a system message: {said}")


def check_templates(programs, templates, folder):
    model = make_model(folder / "model", template=DEFAULT_SYSTEM, eos="<|im_end|>")
    check_chat(programs, folder, model, "a default system message", "<|im_end|>")
    for name, (bos, eos, *rest) in TEMPLATES.items():
        template = (templates / f"{name}.jinja").read_text(encoding="utf-8")
        model = make_model(folder / "model", None, template, bos, eos)
        check_chat(programs, folder, model, name, *rest)

    # A beginning of text that post_processor adds and the template writes is there once.
    around = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 10)])
    template = (templates / "meta-llama-Llama-3.1-8B-Instruct.jinja").read_text(encoding="utf-8")
    model = make_model(folder / "model", around, template, "<s>", "<|eot_id|>")
    check_chat(programs, folder, model, "Llama 3.1 with post_processor", "<|eot_id|>")


def check_generation_config(programs, folder):
    plain = make_model(folder / "model")
    prompt = " ".join(WORDS[:6])
    ids = AutoTokenizer.from_pretrained(plain)(prompt)["input_ids"]
    said = generated(plain, ids)
    ends = [next(id for id in said[5:] if said.index(id) >= 5), 0]
    model = make_model(folder / "model", eos_token_id=ends)
    check_said(programs, model, ids, f"eos_token_id {ends}", "--prompt", prompt)
    check(len(generated(model, ids)) < len(said), "it ends the text earlier")
    model = make_model(folder / "model", repetition_penalty=1.7)
    check_said(programs, model, ids, "repetition_penalty 1.7", "--prompt", prompt)
    check(generated(model, ids) != said, "it changes the text")

    settings = dict(do_sample=True, temperature=1.5, top_k=3, top_p=0.97)
    model = make_model(folder / "model", **settings)
    options = ["--model", model, "--prompt", prompt, "--max-new-tokens", 1]
    results = [must_run(programs / "generate", *options, "--seed", seed) for seed in range(24)]
    scores = AutoModelForCausalLM.from_pretrained(model)(torch.tensor([ids])).logits[0, -1]
    likely = {bytes_of(AutoTokenizer.from_pretrained(model), [id]) + b"\n" for id in scores.topk(3).indices.tolist()}
    found = {result.stdout for result in results}
    check(1 < len(found) and found <= likely, f"do_sample, top_k 3: {found} of {likely}")
    described = b"drawn with temperature 1.5, top-k 3, top-p 0.97"
    check(described in results[0].stderr, f"do_sample: {results[0].stderr}")
    greedy = must_run(programs / "generate", *options, "--temperature", 0)
    equal(greedy.stdout, bytes_of(AutoTokenizer.from_pretrained(model), said[:1]) + b"\n", "the command line counts more")
    model = make_model(folder / "model", no_repeat_ngram_size=2)
    said = must_run(programs / "generate", *options).stderr
    check(b'asks for "no_repeat_ngram_size": 2, which is not done here' in said, f"no_repeat_ngram_size: {said}")


def check_trained_end(programs, folder):
    """Replies end with <|im_end|>, of which the model's generation_config.json says nothing."""
    model = make_model(folder / "model", template=make_tiny_model.CHAT_TEMPLATE, eos="<|endoftext|>")
    lines = [json.dumps({"messages": messages}) + "\n" for messages in conversations(True)]
    (folder / "chats.jsonl").write_text("".join(lines), encoding="utf-8")
    out = folder / "out"
    options = ["--steps", 2, "--rank", 2, "--batch", 2, "--device", "cpu", "--sample-tokens", 0, "--out", out]
    shutil.rmtree(out, ignore_errors=True)
    must_run(programs / "finetune_gpt", "--model", model, "--jsonl", folder / "chats.jsonl", *options)
    must_run(programs / "merge_checkpoint", model, out / "adapter", out / "from_files")
    template = AutoTokenizer.from_pretrained(model).chat_template
    for name in ("merged", "from_files"):
        ends = GenerationConfig.from_pretrained(out / name).eos_token_id
        equal(ends, [0, 2], f"{name}/generation_config.json ends texts with the token that was trained too")
        equal(AutoTokenizer.from_pretrained(out / name).chat_template, template, f"{name}: the chat template")
    AutoPeftModelForCausalLM.from_pretrained(out / "adapter")
    (folder / "text.txt").write_text(make_tiny_model.TEXT * 3, encoding="utf-8")
    must_run(programs / "finetune_gpt", "--model", model, "--text", folder / "text.txt", *options)
    left = [(out / name / "generation_config.json").exists() for name in ("adapter", "merged")]
    ends = GenerationConfig.from_pretrained(out / "merged").eos_token_id
    check(left == [False, True] and ends == 0, f"of an earlier run nothing is left: {left}, {ends}")


def check_refusals(programs, folder):
    """Nothing runs: no metrics.csv, no token."""
    model = make_model(folder / "model", template=make_tiny_model.CHAT_TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    tokenizer.save_pretrained(model)
    (folder / "plain.txt").write_text(make_tiny_model.TEXT * 3, encoding="utf-8")
    (folder / "new.txt").write_text(make_tiny_model.TEXT * 3 + "<|new|>" + WORDS[0] * BLOCK, encoding="utf-8")
    sizes = '"<|new|>", number 384, but the model\'s embedding has 384 rows (0 to 383) for the 385 tokens'
    fine_tune = ["finetune_gpt", "--block", BLOCK, "--steps", 1, "--device", "cpu", "--out", folder / "refused", "--text"]
    wrong = {
        "a token without a row in the data": ([*fine_tune, folder / "new.txt"], sizes),
        "a token without a row in --prompt": ([*fine_tune, folder / "plain.txt", "--prompt", "a<|new|>"], sizes),
        "a token without a row in the prompt": (["generate", "--prompt", "a<|new|>"], sizes),
        "one in the message": (["generate", "--chat", "--prompt", "a<|new|>"], sizes),
    }
    out_of_range = '"eos_token_id" 384 is no token of the model, whose embedding has 384 rows (0 to 383)'

    def refuse(what, arguments, text):
        shutil.rmtree(folder / "refused", ignore_errors=True)
        result = run(programs / arguments[0], "--model", model, *arguments[1:])
        said = result.stderr.decode()
        is_refused = result.returncode == BAD_OPTIONS and text in said and said.count("\n") == 1 and not result.stdout
        check(is_refused and not (folder / "refused/metrics.csv").exists(), f"{what}: {said.strip()}")

    for what, (arguments, text) in wrong.items():
        refuse(what, arguments, text)
    must_run(programs / "generate", "--model", model, "--prompt", "a", "--max-new-tokens", 1)  # it is not used
    (model / "generation_config.json").write_text('{"eos_token_id": [0, 384]}')
    refuse("eos out of range", [*fine_tune, folder / "plain.txt"], out_of_range)
    refuse("eos out of range", ["generate", "--prompt", "a"], out_of_range)


def check_all_linear(programs, folder):
    model = make_model(folder / "model")
    (folder / "plain.txt").write_text(make_tiny_model.TEXT * 3, encoding="utf-8")
    options = ["--steps", 1, "--device", "cpu", "--sample-tokens", 0, "--no-merge", "--out", folder / "linear"]
    data = ["--text", folder / "plain.txt", "--block", BLOCK]
    must_run(programs / "finetune_gpt", "--model", model, *data, "--targets", "all-linear", *options)
    found = AutoPeftModelForCausalLM.from_pretrained(folder / "linear/adapter").state_dict()
    base = AutoModelForCausalLM.from_pretrained(model)
    expected = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).state_dict()
    check(found.keys() == expected.keys(), f"--targets all-linear: {sum('lora_A' in key for key in found)} layers")


def check_default(programs, folder, model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    (folder / "plain.txt").write_text(make_tiny_model.TEXT * 3, encoding="utf-8")
    expected = text_rows(tokenizer, [folder / "plain.txt"], None)
    train = len(expected) - round(len(expected) * 0.05 + 1e-9)
    options = ["--block", BLOCK, "--steps", train, "--warmup", 1]
    found = rows_of(programs, model, ["--text", folder / "plain.txt"], folder / "out", *options)
    equal(found, expected, f"{model.name}: {len(expected)} rows of a text")
    check_chat(programs, folder, model, model.name, "<|im_end|>")
    with open(folder / "out/metrics.csv", newline="") as file:
        check(len(list(csv.reader(file))) > 1, "metrics.csv has rows")


def check_default_generation(programs, folder, model):
    """The default model with other settings in its generation_config.json."""
    changed = folder / "changed"
    changed.mkdir()
    for file in model.iterdir():
        (changed / file.name).symlink_to(file.resolve())
    settings = json.loads((model / "generation_config.json").read_text())
    prompt = "In the beginning"
    ids = AutoTokenizer.from_pretrained(model)(prompt)["input_ids"]
    said = generated(model, ids)
    check_said(programs, model, ids, f"{model.name}: as it is", "--prompt", prompt)
    for change in ({"repetition_penalty": 1.7}, {"eos_token_id": [settings["eos_token_id"], said[5]]}):
        (changed / "generation_config.json").unlink()
        (changed / "generation_config.json").write_text(json.dumps({**settings, **change}))
        check_said(programs, changed, ids, f"{model.name}: {change}", "--prompt", prompt)
        check(generated(changed, ids) != said, "it changes the text")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=Path, required=True, help="folder of finetune_gpt and the others")
    parser.add_argument("--templates", type=Path, required=True, help="folder of chat templates")
    parser.add_argument("model", type=Path, nargs="?", help="the default model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(prefix="lora_directory_") as folder:
        folder = Path(folder)
        check_post_processors(options.programs, folder)
        check_templates(options.programs, options.templates, folder)
        check_generation_config(options.programs, folder)
        check_trained_end(options.programs, folder)
        check_refusals(options.programs, folder)
        check_all_linear(options.programs, folder)
        if options.model:
            check_default(options.programs, folder, options.model)
            check_default_generation(options.programs, folder, options.model)
    print(f"{checks} checks, {failures} failed")
    return int(failures > 0 or checks < 100)


if __name__ == "__main__":
    sys.exit(main())
