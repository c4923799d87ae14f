"""The rules by which a configuration selects layers, ranks and alphas, beside Python's peft on thousands of random
models and configurations. Where an entry matches nothing, peft is silent and this library has to report an error.

usage: select_live.py SELECT_TARGETS_PROGRAM [CASES]
"""

import json
import math
import random
import re
import subprocess
import sys
import tempfile

from peft import LoraConfig
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import get_pattern_key

PARTS = ["q_proj", "v_proj", "xq_proj", "fc1", "down"]
LISTS = ["layers", "blocks", "h"]


def random_names(rng):
    """Linear layers of a model like "model.layers.3.attn.q_proj", with some outside of the list of blocks."""
    prefix, blocks = rng.choice(["model", "net.encoder"]), rng.choice(LISTS)
    groups = rng.choice([[""], ["attn.", "mlp."], ["experts.0.", "experts.1."]])
    names = [f"{prefix}.{blocks}.{i}.{group}{part}" for i in range(3) for group in groups for part in PARTS]
    return rng.sample(names, 12) + rng.sample(["lm_head", "model.lm_head", f"{prefix}.q_proj", "fc1"], 2)


def random_entry(rng, names):
    name = rng.choice(names)
    parts = name.split(".")
    return rng.choice([parts[-1], parts[-1], name, ".".join(parts[-2:]), "nothing" if rng.random() < 0.1 else parts[-1]])


def random_pattern(rng, names):
    name = rng.choice(names)
    return rng.choice([name.split(".")[-1], re.escape(name), "^" + re.escape(name), ".*" + name[-4:], r"\d+\..*", "q.*"])


def random_config(rng, names):
    config = {"peft_type": "LORA", "r": rng.randint(1, 9), "lora_alpha": rng.randint(1, 32), "use_rslora": rng.random() < 0.3}
    if rng.random() < 0.25:
        config["target_modules"] = rng.choice([r".*\.(q|v)_proj", r".*\.[01]\..*fc1", ".*", "q_proj", r"(?!lm).*proj"])
    else:
        config["target_modules"] = sorted({random_entry(rng, names) for _ in range(rng.randint(1, 3))})
        if rng.random() < 0.4:
            config["layers_to_transform"] = rng.choice([0, 1, [0, 2], [1, 7]])
            if rng.random() < 0.5:
                config["layers_pattern"] = rng.choice(["layers", ["blocks", "h"], LISTS])
    if rng.random() < 0.3:
        config["exclude_modules"] = rng.choice([[random_entry(rng, names)], r".*\.1\..*"])
    for field in ("rank_pattern", "alpha_pattern"):
        if rng.random() < 0.4:
            config[field] = {random_pattern(rng, names): rng.randint(1, 64) for _ in range(rng.randint(1, 3))}
    return config


def modules(names):
    """Every module of the model, parents included."""
    found = []
    for name in names:
        parts = name.split(".")
        found += [".".join(parts[: i + 1]) for i in range(len(parts))]
    return list(dict.fromkeys(found))


def selected(config, names):
    found = [name for name in modules(names) if check_target_module_exists(config, name)]
    return [name for name in found if not isinstance(check_target_module_exists(config, name), _ExcludedModule)]


def matches(name, entry):
    return name == entry or name.endswith("." + entry)


def complaint(raw, config, names):
    """What this library has to refuse although peft is silent, or None."""
    chosen = selected(config, names)
    if not chosen:
        return "nothing selected"
    if any(name not in names for name in chosen):
        return "selects a module without a weight"
    if isinstance(raw["target_modules"], list):
        if any(not any(matches(name, entry) for name in modules(names)) for entry in raw["target_modules"]):
            return "target without a match"
        wanted = raw.get("layers_to_transform")
        free = LoraConfig(**{k: v for k, v in raw.items() if k in ("target_modules", "layers_pattern")} | {"layers_to_transform": list(range(99))}) if wanted is not None else None
        if free is not None:
            exact = set(raw["target_modules"])
            for layer in [wanted] if isinstance(wanted, int) else wanted:
                free.layers_to_transform = layer
                if not any(check_target_module_exists(free, name) for name in modules(names) if name not in exact):
                    return "layer without a match"
    excluded = raw.get("exclude_modules")
    targets = LoraConfig(**{k: v for k, v in raw.items() if k not in ("exclude_modules", "peft_type")})
    if isinstance(excluded, list) and any(
        not any(matches(name, entry) for name in modules(names) if check_target_module_exists(targets, name)) for entry in excluded
    ):
        return "exclusion without a match"
    if isinstance(excluded, str) and not any(
        re.fullmatch(excluded, name) for name in modules(names) if check_target_module_exists(targets, name)
    ):
        return "exclusion without a match"
    for field in ("rank_pattern", "alpha_pattern"):
        if any(not any(re.match(rf"(.*\.)?({key})$", name) for name in chosen) for key in raw.get(field, {})):
            return f"{field} without a match"
    return None


def expected(config, names):
    result = {}
    for name in selected(config, names):
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
        result[name] = [rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)]
    return result


def main():
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 3000
    rng = random.Random(0)
    cases = []
    while len(cases) < count:
        names = random_names(rng)
        cases.append({"names": names, "config": random_config(rng, names)})
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/cases.json", "w") as file:
            json.dump(cases, file)
        output = subprocess.run([sys.argv[1], f"{folder}/cases.json", folder], check=True, capture_output=True, text=True)
    lines = [json.loads(line) for line in output.stdout.splitlines()]
    assert len(lines) == len(cases), (len(lines), len(cases))
    agreed = refused = 0
    for case, ours in zip(cases, lines):
        raw, names = case["config"], case["names"]
        config = LoraConfig(**{key: value for key, value in raw.items() if key != "peft_type"})
        reason = complaint(raw, config, names)
        if reason is not None:
            assert isinstance(ours, str), f"not refused ({reason}): {json.dumps(case)}\n{ours}"
            refused += 1
            continue
        theirs = expected(config, names)
        assert isinstance(ours, dict), f"refused: {json.dumps(case)}\n{ours}"
        assert ours.keys() == theirs.keys(), f"{json.dumps(case)}\nours   {sorted(ours)}\ntheirs {sorted(theirs)}"
        for name in ours:
            assert ours[name][0] == theirs[name][0] and abs(ours[name][1] - theirs[name][1]) < 1e-12, (case, name)
        agreed += 1
    print(f"{count} cases: the same selection as peft in {agreed}, refused because an entry matches nothing in {refused}")
    assert agreed > count / 5 and refused > count / 10


if __name__ == "__main__":
    main()
