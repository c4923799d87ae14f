"""Small files for the fuzzers to begin with, and the words of both formats.

usage: make_corpus.py FOLDER      writes FOLDER/{safetensors,config}/* and FOLDER/{safetensors,config}.dict
"""

import json
import struct
import sys
from pathlib import Path

BITS = {
    **{name: 8 for name in ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")},
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16},
    **{"I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64},
}


def packed(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header, ensure_ascii=False).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def safetensors_files():
    for dtype, bits in BITS.items():
        yield dtype, packed({"w": tensor(dtype, [2, 4], 0, bits)}, bytes(range(bits)))
    several = {
        "__metadata__": {"format": "pt", "\u00e9": "\u4e2d"},
        "a.weight": tensor("F32", [2, 1], 0, 8),
        "empty": tensor("I64", [0, 3], 8, 8),
        "scalar": tensor("F64", [], 8, 16),
        "odd": tensor("U8", [1], 16, 17),
        "unaligned": tensor("F32", [1], 17, 21),
    }
    yield "several", packed(several, bytes(range(21)))
    yield "padded", packed(b'  {"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":[1e3,{}]}}   ', b"1234")
    yield "twice", packed(b'{"w":["U8",[1],[0,1]],"w":["U8",[2],[0,2]],"__metadata__":null}', b"12")
    yield "hole", packed({"w": tensor("U8", [1], 1, 2)}, b"12")
    yield "large", packed({"w": tensor("U8", [2**62, 2**62, 0], 0, 0)})
    yield "none", packed({})
    yield "cut", packed(several)


def config_files():
    small = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
    yield "small", small
    yield "dora", small | {"use_dora": True, "lora_dropout": 0.1}
    yield "regex", small | {"target_modules": r".*\.(q|v)_proj", "exclude_modules": r"layers\.[0-1]\..*"}
    yield "all", small | {"target_modules": "all-linear", "modules_to_save": ["head"], "bias": "all"}
    yield "patterns", small | {"rank_pattern": {"^layers.0.q_proj": 4.0, "v_proj": 1}, "alpha_pattern": {r"layers\.1\..*": 1.5}}
    yield "blocks", small | {"layers_to_transform": [0, 2], "layers_pattern": "layers", "use_rslora": True}
    yield "block", small | {"layers_to_transform": 1, "layers_pattern": ["layers", "h"]}
    yield "parameters", small | {"target_modules": [], "target_parameters": ["head.weight"]}
    yield "bias", small | {"lora_bias": True}
    yield "embedding", small | {"target_modules": ["embed_tokens"], "init_lora_weights": "gaussian"}
    yield "information", small | {"base_model_name_or_path": "\u00e9", "task_type": "CAUSAL_LM", "revision": None, "unknown": [{}]}
    yield "unsupported", small | {"use_qalora": True, "init_lora_weights": "pissa"}
    yield "full", small | {"auto_mapping": None, "fan_in_fan_out": True, "inference_mode": True, "loftq_config": {}, "peft_version": "0.21.2"}


def words(*texts):
    return "".join('"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"\n' for text in texts)


def main():
    folder = Path(sys.argv[1])
    for kind in ("safetensors", "config"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for name, content in safetensors_files():
        (folder / "safetensors" / name).write_bytes(content)
    fields = set()
    for name, content in config_files():
        (folder / "config" / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
        fields |= content.keys()
    json_words = ["null", "true", "false", "[]", "{}", '":', '",', "1e999", "-0", "18446744073709551615", "\\ud83d\\ude00"]
    header_words = ['"__metadata__":', '"dtype":', '"shape":', '"data_offsets":', *(f'"{dtype}"' for dtype in BITS)]
    (folder / "safetensors.dict").write_text(words(*json_words, *header_words))
    config_words = [*(f'"{field}":' for field in sorted(fields)), '"all-linear"', '"lora_only"', "(?:", ".*", "[^", "{2,3}", "\\\\d"]
    (folder / "config.dict").write_text(words(*json_words, *config_words))


if __name__ == "__main__":
    main()
