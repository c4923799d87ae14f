"""Renders conversations with real chat templates here and in transformers.

    chat_template_live.py --program build/cmake/programs/render_chat --templates build/jinja/templates

Each template, in a model directory of its own with special tokens in tokenizer_config.json, writes every conversation,
with the opening of a reply and without. The texts have to be the same, character by character; where the template
refuses the conversation, it has to be refused here too.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
CONVERSATIONS = [  # the roles' first letters, and what they say
    ("u", ['Hi! <|im_end|> é "q"\n  ']),
    ("u", [""]),
    ("su", ["  Be brief.\n", "Hi!"]),
    ("uau", ["Hi!", " Hello.\n", "And?"]),
    ("suaua", ["S", "{{ messages }}", "Hello", "And?", "<think>x</think>\n\nNo."]),
    ("uu", ["Hi!", "Ho"]),
    ("au", ["Hello", "Hi!"]),
]
ROLES = {"s": "system", "u": "user", "a": "assistant"}
# What they expect beside messages, so that transformers renders nothing of them.
NEED_MORE = {"fireworks-ai-llama-3-firefunction-v2.jinja"}


def expected(template, messages, open_reply):
    try:
        texts, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=open_reply, **TOKENS)
        return texts[0]
    except Exception:  # noqa: BLE001  whatever the template raises
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", required=True, help="the compiled tests/examples/render_chat.cpp")
    parser.add_argument("--templates", type=Path, required=True)
    options = parser.parse_args()
    cases, lines = [], []
    with tempfile.TemporaryDirectory(prefix="lora_chat_") as folder:
        for file in sorted(options.templates.glob("*.jinja")):
            if file.name in NEED_MORE:
                continue
            model = Path(folder) / file.stem
            model.mkdir()
            template = file.read_text(encoding="utf-8")
            (model / "chat_template.jinja").write_text(template, encoding="utf-8")
            (model / "tokenizer_config.json").write_text(json.dumps(TOKENS))
            for roles, contents in CONVERSATIONS:
                messages = [{"role": ROLES[role], "content": text} for role, text in zip(roles, contents)]
                for open_reply in (False, True):
                    cases.append((file.name, roles, open_reply, expected(template, messages, open_reply)))
                    lines.append(json.dumps({"model": str(model), "messages": messages, "open_reply": open_reply}))
        source = Path(folder) / "conversations.jsonl"
        source.write_text("".join(line + "\n" for line in lines))
        ran = subprocess.run([options.program, source], capture_output=True, text=True)
    if ran.returncode != 0:
        sys.exit(ran.stderr)
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(found) == len(cases)
    failed = refused = 0
    for (name, roles, open_reply, text), result in zip(cases, found):
        refused += text is None
        if result.get("text") != text:
            failed += 1
            print(f"{name}, {roles}, open_reply={open_reply}:\n  here         {result}\n  transformers {text!r}")
    templates = len({name for name, *_ in cases})
    print(f"{templates} templates, {len(cases)} texts, of which transformers refuses {refused}; {failed} differ")
    return int(failed > 0 or templates < 20 or refused > len(cases) / 5)


if __name__ == "__main__":
    sys.exit(main())
