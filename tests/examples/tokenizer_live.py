"""Compares the ids of examples/finetune_gpt/tokenizer.hpp with those of the Python package `tokenizers`.

    tokenizer_live.py --program build/cmake/programs/tokenize_lines [--lines 100000] [tokenizer.json ...]

Without a tokenizer.json it trains three on the spot (the styles of GPT-2, SmolLM2 and Llama 3) and changes copies of
them (other patterns, ways to split, flags of added tokens, missing bytes), which are compared with fewer lines. The
lines: the King James Bible (Debian's bible-kjv), Python's own library, every code point alone, behind a letter, a
digit, an apostrophe and an added token, emoji, combining marks, control characters, long runs, random Unicode, special
tokens inside the text. Ends with 1 if a single list of ids differs.
"""
import argparse
import json
import pathlib
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
          r"|\s+(?!\S)|\s")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DEEPSEEK = [r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+",
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"]
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
ALL_CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
# Without most of the syllables and ideographs, which are all alike, and of the planes that are private or free.
CODE_POINTS = [c for c in ALL_CODE_POINTS if c < 0x3400 or 0xA000 <= c < 0xAC00 or 0xD7A0 <= c < 0xE000
               or 0xF900 <= c < 0x20000 or 0xE0000 <= c < 0xE0200 or c % 61 == 0]


def bible():
    program = shutil.which("bible") or "/usr/games/bible"
    if not pathlib.Path(program).exists():
        return []
    text = subprocess.run([program, "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True).stdout
    return text.splitlines()


def python_library():
    """Lines of Python's own library, and now and then a whole page, for what crosses line breaks."""
    lines = []
    for file in sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in file.parts or "dist-packages" in file.parts:
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        lines += text.splitlines() + [text[i : i + 2000] for i in range(0, len(text), 40000)]
    return lines


def each_code_point(whole, tokens):
    """Every code point between spaces, and most beside letters, digits, apostrophes, added tokens and alone.
    Without `whole` there are fewer of them."""
    contexts = [("'{0}", CODE_POINTS, 24), (" {0} ", ALL_CODE_POINTS if whole else CODE_POINTS, 200)]
    if "<|word|>" in tokens:
        contexts.append(("<|word|>{0}<|word|>", CODE_POINTS, 24))
    if whole:
        others = ["a{0}a", "1{0}1", "!{0}\n", "'l{0}", "A{0}b{0}", "\t{0}\u0301", "{0}<|one|>{0}<|two|> {0}"]
        contexts += [(context, CODE_POINTS, 24) for context in others]
    lines = [chr(c) for c in CODE_POINTS] if whole else []
    for context, points, size in contexts:
        parts = [context.format(chr(c)) for c in points]
        lines += ["".join(parts[i : i + size]) for i in range(0, len(parts), size)]
    return lines


def hostile(rng, count, tokens):
    """Mixtures of what goes wrong: white space of every kind, marks, joiners, bidi controls, emoji, special tokens."""
    pieces = [" ", "  ", "\n", "\r\n", "\r", "\t", "\v", "\f", "\x00", "\x01", "\x1b[0m", "\x7f", "\x85", "\u00a0",
              "\u00ad", "\u1680", "\u180e", "\u2003", "\u200b", "\u200d", "\u2028", "\u2029", "\u202e", "\u2060",
              "\u3000", "\ufeff", "\ufffd", "\uffff", "\U0010ffff", "\u0301", "e\u0301", "\u0345", "\u20dd", "a", "Z",
              "ß", "ſ", "K", "ﬁ", "İ", "ı", "ǅ", "ʰ", "中文", "ひらがな", "カタカナ", "한국어", "हिन्दी", "ไทย", "العربية",
              "עִבְרִית", "٣", "Ⅷ", "½", "²", "①", "𝟘", "𞤀", "𠀀",
              "0", "1234567", "3.14", "'s", "'S", "'ſ", "'ll", "'LL",
              "'Re", "don't", "I'VE", "''", "’s", "👨‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪", "1️⃣", "❤️", "…", "–", "_", "__init__",
              "$x=1;", "<|", "|>", "<", "Ġ", "Ċ", "Ģthe", "Hello", " world", "the", " The", "//", "\n\n\n", "\r\n\r\n",
              "   \n"] + 2 * tokens
    for _ in range(count):
        kind = rng.random()
        if kind < 0.6:
            yield "".join(rng.choices(pieces, k=rng.randint(1, 30)))
        elif kind < 0.75:
            yield "".join(map(chr, rng.choices(CODE_POINTS, k=rng.randint(1, 60))))
        elif kind < 0.9:
            block = rng.choice([0, 0x80, 0x300, 0x370, 0x590, 0x600, 0x900, 0x1100, 0x2000, 0x2190, 0x3040, 0xA700,
                                0x11000, 0x16D00, 0x1CC00, 0x1D400, 0x1F300, 0x1F900, 0x2EBF0, 0x31350])
            size = rng.randint(1, 60)
            yield "".join(chr(block + rng.randrange(0x100)) + rng.choice(["", "", " "]) for _ in range(size))
        else:
            yield rng.choice(pieces) * rng.randint(1, 40) + rng.choice(pieces) * rng.randint(1, 40)


def long_runs(whole):
    for piece in [" ", "\n", "\r\n", "\t", "1", "a", "'", "!", "e\u0301", "👍🏽", "中", "ab ", "<|one|>", "\u3000",
                  "\x00"]:
        for length in [2, 3, 255, 256, 257, 1000] + [20000] * whole:
            yield piece * length
            yield "x" + piece * length + "y"
    if whole:
        yield " " * 200000 + "z"
        yield "ab" * 200000


def make_lines(count, tokens, whole):
    """`count` lines: long runs (less long without `whole`), half of the rest hostile, half real text."""
    rng = random.Random(2024)
    lines = ["", " ", *long_runs(whole)]
    lines += hostile(rng, (count - len(lines)) // 2, tokens)
    text = bible() + python_library()
    rng.shuffle(text)
    return lines + text[: count - len(lines)]


def train(pattern, corpus, special, size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pattern
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def byte_level(**options):
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, "use_regex": True, **options})


def split_with(*patterns, behavior="isolated", invert=False):
    steps = [pre_tokenizers.Split(p, behavior, invert=invert) for p in patterns]
    return pre_tokenizers.Sequence(steps + [byte_level(use_regex=False)])


def legacy_merges(text):
    content = json.loads(text)
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    return json.dumps(content, ensure_ascii=False)


def changed(tokenizer, **fields):
    """A copy of `tokenizer` with other fields of its model."""
    content = json.loads(tokenizer.to_str())
    content["model"].update(fields)
    return Tokenizer.from_str(json.dumps(content))


def without_bytes(tokenizer, **fields):
    """A copy that has no tokens for some bytes, and no merges with them."""
    content = json.loads(tokenizer.to_str())
    gone = set("ĀāĂ©½zq'")
    model = content["model"]
    model["vocab"] = {t: i for t, i in model["vocab"].items() if not gone & set(t)}
    model["merges"] = [pair for pair in model["merges"] if not gone & set("".join(pair))]
    ids = {t: n for n, t in enumerate(sorted(model["vocab"], key=model["vocab"].get))}
    model["vocab"] = ids
    content["added_tokens"] = [dict(t, id=ids[t["content"]]) for t in content["added_tokens"] if t["content"] in ids]
    model.update(fields)
    return Tokenizer.from_str(json.dumps(content))


def make_tokenizers(folder, corpus):
    """name -> (file, whether decode gives the text back, whether all lines are compared)."""
    special = ["<|endoftext|>", "<|one|>", "<|two|>"]
    gpt2 = train(byte_level(), corpus, ["<|endoftext|>"], 8000)
    smol = train(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level()]), corpus,
                 special + ["<|im_start|>", "<|im_end|>"], 6000)
    llama = train(split_with(Regex(LLAMA3)), corpus, special, 8000)
    made = {"gpt2": (gpt2.to_str(), True, True), "smollm2": (legacy_merges(smol.to_str()), True, True),
            "llama3": (changed(llama, ignore_merges=True).to_str(), True, True)}

    def variant(name, tokenizer, decodes=True):
        made[name] = (tokenizer.to_str(), decodes, False)

    def with_steps(steps):
        copy = Tokenizer.from_str(llama.to_str())
        copy.pre_tokenizer = steps
        return copy

    variant("cl100k", with_steps(split_with(Regex(CL100K))))
    variant("o200k", with_steps(split_with(Regex(O200K))))
    variant("deepseek", with_steps(split_with(*map(Regex, DEEPSEEK))))
    variant("bloom", with_steps(split_with(Regex(BLOOM))))
    variant("digits", with_steps(pre_tokenizers.Sequence([pre_tokenizers.Digits(False), byte_level()])))
    variant("prefix space", with_steps(pre_tokenizers.Sequence([pre_tokenizers.Digits(True),
                                                               byte_level(add_prefix_space=True)])), False)
    variant("prefix space, no regex", with_steps(byte_level(add_prefix_space=True, use_regex=False)), False)
    for behavior in ["removed", "isolated", "merged_with_previous", "merged_with_next", "contiguous"]:
        for invert in [False, True]:
            decodes = behavior != "removed"
            variant(f"{behavior}, invert {invert}", with_steps(split_with(Regex(r"\s|\d|a"), behavior=behavior,
                                                                         invert=invert)), decodes)
    variant("string pattern", with_steps(split_with("\r\n", "e.", behavior="merged_with_next")))
    variant("empty matches", with_steps(split_with(Regex(r"(?<=[\p{Lu}'])|x*y"))))
    variant("no bytes, dropped", without_bytes(smol), False)
    variant("no bytes, unknown", without_bytes(smol, unk_token="<|endoftext|>"), False)
    variant("no bytes, unknown fused", without_bytes(smol, unk_token="<|endoftext|>", fuse_unk=True), False)

    flags = Tokenizer.from_str(smol.to_str())
    flags.add_tokens([AddedToken("<|word|>", single_word=True, normalized=False), AddedToken("the", single_word=True),
                      AddedToken("  ", normalized=True), AddedToken("Hello", lstrip=True), AddedToken("Hello world"),
                      AddedToken("<|", normalized=False), AddedToken("été", rstrip=True), AddedToken("1234")])
    flags.add_special_tokens([AddedToken("<|left|>", lstrip=True), AddedToken("<|right|>", rstrip=True),
                              AddedToken("<|both|>", lstrip=True, rstrip=True)])
    variant("added tokens", flags, False)
    for name, (text, _, _) in made.items():
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return {name: (folder / f"{name}.json", decodes, whole) for name, (_, decodes, whole) in made.items()}


def compare(program, file, lines, folder, decodes):
    """Prints what was found; the number of lines whose ids differ."""
    source = folder / "lines.txt"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="ascii")
    ran = subprocess.run([program, str(file), str(source)], capture_output=True, text=True)
    if ran.returncode != 0:
        print(f"  {ran.stderr.strip()}")
        return len(lines)
    theirs_from = time.time()
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    theirs = [tokenizer.encode(line, add_special_tokens=False).ids for line in lines]
    theirs_time = time.time() - theirs_from
    ours = [list(map(int, line.split())) for line in ran.stdout.split("\n")[:-1]]
    assert len(ours) == len(theirs) == len(lines)
    different = [n for n in range(len(lines)) if ours[n] != theirs[n]]
    for n in different[:5]:
        print(f"  {lines[n][:80]!a}\n    here   {ours[n][:20]}\n    Python {theirs[n][:20]}")
    changed_lines = int(ran.stderr.split(" lines, ")[1].split()[0])
    ids = sum(map(len, theirs))
    print(f"  {len(lines)} lines, {ids} ids, {len(different)} lines differ; {changed_lines} lines change in decode; "
          f"{ran.stderr.split()[-2]} s here, {theirs_time:.2f} s in Python", flush=True)
    if decodes and changed_lines:
        print("  decode(encode(line)) has to be the line")
        return len(different) + changed_lines
    return len(different)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True, help="the compiled tests/examples/tokenize_lines.cpp")
    parser.add_argument("--lines", type=int, default=100000,
                        help="lines of text for each tokenizer, to which those of all code points are added")
    parser.add_argument("tokenizers", nargs="*", type=pathlib.Path, help="tokenizer.json files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        if options.tokenizers:
            chosen = {str(file): (file, False, True) for file in options.tokenizers}
        else:
            text = [line for line in make_lines(20000, [], False) if len(line) < 1000]
            chosen = make_tokenizers(folder, text)
        failed = 0
        for name, (file, decodes, whole) in chosen.items():
            print(name, flush=True)
            added = json.loads(file.read_text(encoding="utf-8")).get("added_tokens") or []
            tokens = [token["content"] for token in added][:50]
            count = options.lines if whole else options.lines // 10
            lines = make_lines(count, tokens, whole) + each_code_point(whole, tokens)
            failed += compare(options.program, file, lines, folder, decodes)
    print("no difference" if failed == 0 else f"{failed} differences")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
