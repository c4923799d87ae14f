"""Damaged and odd safetensors files, read by this library and by the Python package: both have to find the same files
valid, and the same tensors and metadata in those.

What counts as valid is what Python can turn into tensors of torch, with safe_open as well as with
safetensors.torch.load, where load knows the type at all. The package's own `deserialize` takes a little more: shapes that
torch cannot have, and types that torch has not. Where the description of the format is stricter than the package (white
space before the header, a name that comes twice), the package counts.

usage: safetensors_live.py READ_SAFETENSORS_PROGRAM [--files 5000] [--seed 0]
"""

import argparse
import base64
import collections
import json
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import safetensors.numpy
import safetensors.torch
import torch
from safetensors import deserialize, safe_open

BITS = {
    **{name: 8 for name in ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")},
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16},
    **{"I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64},
}
TYPES = {
    torch.bool: "Bool", torch.uint8: "Byte", torch.int8: "Char", torch.int16: "Short", torch.uint16: "UInt16",
    torch.int32: "Int", torch.uint32: "UInt32", torch.int64: "Long", torch.uint64: "UInt64", torch.float16: "Half",
    torch.bfloat16: "BFloat16", torch.float32: "Float", torch.float64: "Double", torch.complex64: "ComplexFloat",
    torch.float8_e5m2: "Float8_e5m2", torch.float8_e4m3fn: "Float8_e4m3fn", torch.float8_e8m0fnu: "Float8_e8m0fnu",
    torch.float8_e5m2fnuz: "Float8_e5m2fnuz", torch.float8_e4m3fnuz: "Float8_e4m3fnuz",
    torch.float4_e2m1fn_x2: "Float4_e2m1fn_x2",
}  # fmt: skip
NOT_IN_LOAD = ("F4", "F8_E8M0")  # types that safe_open reads and safetensors.torch.load does not know


class Raw(str):
    """Text that stands in the header as it is."""


class Pairs(list):
    """An object of JSON as a list of its keys and values, so that keys can come twice and in any order."""


NAMES = ["w", "a.b.weight", "", " ", "\u00e9", "\u4e2d\u6587", "\U0001f999", 'quote"', "back\\slash", "\n", "\0", "\x7f", "\uffff",
         "__metadata__", "__METADATA__", "dtype", "n" * 300, Raw('"\\ud800"'), Raw('"\\udc00x"'), Raw('"\\ud83d\\ude00"'),
         Raw('"\\u0077"'), Raw('"\\q"'), Raw('"\ud800"'), Raw("'w'"), Raw("w"), Raw('"w')]  # fmt: skip
NUMBERS = [0, 1, 2, 3, 7, 8, 255, 2**31, 2**32, 2**53, 2**60, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -1,
           -(2**63), -(2**70), 1.5, 2.0] + [Raw(text) for text in ("-0", "1e0", "1E2", "01", "+1", "1.", ".5", "0x1", "1e999",
           "-1e999", "1e-999", "NaN", "Infinity", "1_0", "1" * 400)]  # fmt: skip
VALUES = NUMBERS + [None, True, False, "", "x", [], [1], [[]], Pairs(), Pairs([("a", 1)]), Pairs([("a", 1), ("a", 2)]),
          Raw("nul"), Raw("True"), Raw(""), Raw("[1,]"), Raw("{,}"), Raw('{"a":1,}'), Raw("/**/1"), Raw('"\\ud800"'),
          Raw("[" * 120 + "]" * 120), Raw("[" * 125 + "]" * 125), Raw("[" * 126 + "]" * 126), Raw('{"a":' * 124 + "1" + "}" * 124),
          Raw("[" * 5000), Raw("[" * 5000 + "]" * 5000), Raw('"\t"'), Raw('"\\/\\b\\f"')]  # fmt: skip


def text_of(value, rng, space):
    gap = (lambda: rng.choice(["", "", "", " ", "\n", "\t", "\r", "  "])) if space else (lambda: "")
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        items = [f"{gap()}{text_of(k, rng, space)}{gap()}:{gap()}{text_of(v, rng, space)}{gap()}" for k, v in value]
        return "{" + (",".join(items) or gap()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(gap() + text_of(item, rng, space) + gap() for item in value) + "]"
    return json.dumps(value, ensure_ascii=rng.random() < 0.5)


def random_file(rng):
    """The entries of a valid header, and the data."""
    entries, data = Pairs(), b""
    for name in rng.sample(["w", "a.b.weight", "\u00e9", "x" * 20, "t", "0"], rng.choice([0, 1, 1, 2, 3, 5])):
        dtype = rng.choice(list(BITS)) if rng.random() < 0.7 else rng.choice(["F32", "BF16", "I64"])
        shape = [rng.choice([0, 1, 1, 2, 2, 3, 4]) for _ in range(rng.choice([0, 1, 2, 2, 3, 4]))]
        if BITS[dtype] % 8:
            shape.append(4)
        size = BITS[dtype] // 2
        for number in shape:
            size *= number
        size //= 4  # in bytes
        fields = [("dtype", dtype), ("shape", shape), ("data_offsets", [len(data), len(data) + size])]
        if rng.random() < 0.2:
            rng.shuffle(fields)
        entries.append((name, Pairs(fields)))
        data += rng.randbytes(size)
    if rng.random() < 0.3:
        rng.shuffle(entries)
    if rng.random() < 0.4:
        entries.insert(rng.randrange(len(entries) + 1), ("__metadata__", Pairs([("format", "pt"), ("k", "\u00e9")])))
    return entries, data


def field(entry, name):
    return next((i for i, (key, _) in enumerate(entry) if key == name), None)


def tensors_of(entries):
    return [i for i, (name, entry) in enumerate(entries) if name != "__metadata__" and isinstance(entry, Pairs)]


def change_field(rng, entries, data):
    """Offsets, shape or dtype of one tensor."""
    name, entry = entries[rng.choice(tensors_of(entries))]
    key = rng.choice(["dtype", "shape", "data_offsets"])
    at = field(entry, key)
    if at is None:
        return
    value = entry[at][1]
    if rng.random() < 0.15:
        value = rng.choice(VALUES)
    elif key == "dtype":
        value = rng.choice([rng.choice(list(BITS)), "f32", "F33", "C128", "", "F32 ", Pairs([("F32", None)]),
                            Pairs([(value, None)]), Pairs([(value, None), (value, None)]), Raw('"\\u00463\\u0032"')])  # fmt: skip
    elif isinstance(value, list):
        value = list(value)
        way = rng.randrange(6)
        if way == 0 and value:
            i = rng.randrange(len(value))
            value[i] = rng.choice(NUMBERS)
        elif way == 1 and value:
            i = rng.randrange(len(value))
            value[i] = value[i] + rng.choice([-2, -1, 1, 2]) if isinstance(value[i], int) else 1
        elif way == 2:
            rng.shuffle(value)
        elif way == 3:
            value.insert(rng.randrange(len(value) + 1), rng.choice([0, 1, 1, 1, rng.choice(NUMBERS)]))
        elif way == 4 and value:
            del value[rng.randrange(len(value))]
        else:
            value = [0] + [rng.choice([2**20, 2**32, 2**61, 2**62, 3]) for _ in range(rng.randrange(4))]
            rng.shuffle(value)
    entry[at] = (key, value)


def change_entry(rng, entries, data):
    """Fields that are missing, come twice or are unknown; entries that are no objects."""
    at = rng.choice(tensors_of(entries))
    name, entry = entries[at]
    way = rng.randrange(7)
    if way == 0 and entry:
        del entry[rng.randrange(len(entry))]
    elif way == 1 and entry:
        entry.insert(rng.randrange(len(entry) + 1), rng.choice(entry))
    elif way in (2, 3):
        entry.insert(rng.randrange(len(entry) + 1), (rng.choice(["x", "", "strides", "Dtype"]), rng.choice(VALUES)))
    elif way == 4:
        ordered = [value for key in ("dtype", "shape", "data_offsets") for k, value in entry if k == key]
        entries[at] = (name, ordered + [1] * (rng.random() < 0.2))
    elif way == 5:
        entries[at] = (name, rng.choice(VALUES))
    else:
        entries[at] = (rng.choice(NAMES), entry)


def repeat_entry(rng, entries, data):
    """A name that comes twice, with the same entry, another one or none; overlaps."""
    name, entry = entries[rng.choice(tensors_of(entries))]
    copy = Pairs(entry)
    if rng.random() < 0.5:
        change_field(rng, Pairs([(name, copy)]), data)
    if rng.random() < 0.1:
        copy = rng.choice(VALUES)
    new_name = name if rng.random() < 0.7 else rng.choice(NAMES)
    entries.insert(rng.randrange(len(entries) + 1), (new_name, copy))


def move_data(rng, entries, data):
    """Holes, overlaps, tensors that change places, empty ones and scalars in between."""
    offsets = [(i, field(entries[i][1], "data_offsets")) for i in tensors_of(entries)]
    offsets = [(entries[i][1], at) for i, at in offsets if at is not None and isinstance(entries[i][1][at][1], list)]
    way = rng.randrange(3)
    if way == 0 and len(offsets) > 1:
        (a, at), (b, bt) = rng.sample(offsets, 2)
        a[at], b[bt] = b[bt], a[at]
    elif way == 1 and offsets:
        shift, start = rng.choice([-1, 1, 2, 8]), rng.randrange(max(1, len(data)))
        for entry, at in offsets:
            numbers = entry[at][1]
            entry[at] = ("data_offsets", [n + shift if type(n) is int and n >= start else n for n in numbers])
        if rng.random() < 0.5 and shift > 0:
            return data[:start] + bytes(shift) + data[start:]
    else:
        place = rng.choice([0, len(data), rng.randrange(len(data) + 1)])
        shape = rng.choice([[0], [0, 3], [2, 0], [], [0, 2**40]])
        new = Pairs([("dtype", "U8"), ("shape", shape), ("data_offsets", [place, place + (shape == [])])])
        entries.insert(rng.randrange(len(entries) + 1), (rng.choice(["new", rng.choice(NAMES)]), new))
        if shape == [] and place == len(data):
            return data + b"7"
    return None


def change_metadata(rng, entries, data):
    at = field(entries, "__metadata__")
    value = rng.choice([None, Pairs(), Pairs([("a", "b"), ("a", "c")]), Pairs([("a", rng.choice(VALUES))]), rng.choice(VALUES),
                        Pairs([(rng.choice(NAMES), rng.choice(NAMES))])])  # fmt: skip
    if at is None or rng.random() < 0.2:
        entries.insert(rng.randrange(len(entries) + 1), ("__metadata__", value))
    else:
        entries[at] = ("__metadata__", value)


def change_header(rng, text):
    """Bytes of the header, before its length is known."""
    way = rng.randrange(9)
    at = rng.randrange(len(text) + 1)
    if way == 0:
        return rng.choice([b" ", b"\n\t", b"\xef\xbb\xbf", b"\0", b"\x0b", b"//\n"]) + text
    if way == 1:
        return text + rng.choice([b" ", b" " * 7, b"\n", b"\0", b"\x0c", b",", b"{}", b"}", b"x"])
    if way == 2:
        return text[:at] + rng.choice([b" ", b"\n", b",", b'"', b"\\", b"\0", b"\xff", b"{", b"]", b"0", b"-"]) + text[at:]
    if way == 3:
        return text[:at] + text[at + 1 :]
    if way == 4:
        return text[:at]
    if way == 5:
        return text.replace(b":", rng.choice([b"=", b"::", b" : "]), 1)
    if way == 6:
        return text.replace(b"}", b",}", 1)
    if way == 7:
        return rng.choice([b"", b"{}", b"[]", b"{", b"null", b'"w"', b"[" + text + b"]"])
    return flip(rng, text)


def flip(rng, data):
    if not data:
        return data
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def change_file(rng, file):
    way, at, to = rng.randrange(6), rng.randrange(len(file) + 1), rng.randrange(len(file) + 1)
    if way == 0:
        return file[:at]
    if way == 1:
        return file[:at] + rng.randbytes(rng.choice([1, 1, 8, 100])) + file[at:]
    if way == 2:
        return file[: min(at, to)] + file[max(at, to) :]
    if way == 3:
        return file + file[min(at, to) : max(at, to)]
    if way == 4:
        length = struct.unpack("<Q", file[:8])[0] if len(file) >= 8 else 0
        length = rng.choice([0, 1, length - 1, length + 1, length + 8, 10**8, 10**8 + 1, 2**63, 2**64 - 1, 2**64 - 8])
        return struct.pack("<Q", length % 2**64) + file[8:]
    return flip(rng, file)


def mutated_file(rng):
    entries, data = random_file(rng)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        change = rng.choice([change_field, change_field, change_entry, repeat_entry, move_data, change_metadata])
        if change is change_metadata or tensors_of(entries):
            data = change(rng, entries, data) or data
    text = text_of(entries, rng, rng.random() < 0.2).encode("utf-8", "surrogatepass")
    if rng.random() < 0.15:
        text = change_header(rng, text)
    if rng.random() < 0.5:
        text += b" " * (-len(text) % 8)
    file = struct.pack("<Q", len(text)) + text + (flip(rng, data) if rng.random() < 0.3 else data)
    return change_file(rng, file) if rng.random() < 0.15 else file


def attempt(read):
    """What `read` returns; None when it refuses."""
    try:
        return read()
    except Exception:
        return None


def open_tensors(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def summary(tensor):
    return [TYPES[tensor.dtype], list(tensor.shape), zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())]


def is_possible(tensor):
    """Whether torch can make a tensor of this shape itself: safe_open gets past the check of the strides."""
    return tensor.numel() > 0 or attempt(lambda: torch.empty(tensor.shape, dtype=tensor.dtype)) is not None


def read_by_python(file, path):
    """What the package finds, in the form of the program; None for a file that it refuses. `path` is overwritten."""
    flat = attempt(lambda: dict(deserialize(file)))
    path.write_bytes(file)
    opened = attempt(lambda: open_tensors(path))
    assert flat is not None or opened is None, "safe_open reads what deserialize does not"
    if opened is None:
        return None
    loaded = attempt(lambda: safetensors.torch.load(file))
    possible = all(is_possible(tensor) for tensor in opened[0].values())
    has_all_types = not any(value["dtype"] in NOT_IN_LOAD for value in flat.values())
    assert (loaded is not None) == (possible and has_all_types)
    if not possible:
        return None
    found = {name: summary(tensor) for name, tensor in opened[0].items()}
    assert found.keys() == flat.keys()
    assert all(found[name][2] == zlib.crc32(flat[name]["data"]) for name in flat)
    assert loaded is None or found == {name: summary(tensor) for name, tensor in loaded.items()}
    arrays = attempt(lambda: safetensors.numpy.load(file)) or {}
    for name, array in arrays.items():
        assert list(array.shape) == flat[name]["shape"] and zlib.crc32(array.tobytes()) == found[name][2]
    return {"tensors": found, "metadata": opened[1]}


def read_by_program(program, files, folder):
    packed = folder / "packed"
    packed.write_bytes(b"".join(struct.pack("<Q", len(file)) + file for file in files))
    result = subprocess.run([program, packed, folder / "one"], capture_output=True, text=True)
    assert result.returncode == 0, f"exit status {result.returncode}: {result.stderr[-2000:]}"
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(found) == len(files)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program")
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    valid, types, reasons = 0, collections.Counter(), collections.Counter()
    # In memory where that is possible: a file that is truncated and written again is brought to the disk each time.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        for start in range(0, options.files, 5000):
            files = [mutated_file(rng) for _ in range(min(5000, options.files - start))]
            for i, (file, ours) in enumerate(zip(files, read_by_program(options.program, files, Path(folder)))):
                theirs = read_by_python(file, Path(folder) / "one")
                if (ours if isinstance(ours, dict) else None) != theirs:
                    shown = base64.b64encode(file).decode()
                    sys.exit(f"file {start + i}: {file[:2000]}\nours   {ours}\ntheirs {theirs}\n{shown}")
                if theirs is None:
                    reasons[re.sub('"[^"]*"?|[0-9]+', "_", ours.split(": ", 1)[1])[:40]] += 1
                    continue
                valid += 1
                types.update(tensor[0] for tensor in ours["tensors"].values())
    print(f"{options.files} files: {valid} valid, with {sum(types.values())} tensors, the others refused by both")
    for reason, count in reasons.most_common(25):
        print(f"{count:8} {reason}")
    assert set(types) == set(TYPES.values()), set(TYPES.values()) - set(types)
    assert options.files / 5 < valid < options.files * 4 / 5


if __name__ == "__main__":
    main()
