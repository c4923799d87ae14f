"""Fetches the Jinja engine that renders chat templates: python prepare_jinja.py OUT_DIR

It is common/jinja of llama.cpp (MIT), six C++ files, taken from the source archive of the package xllamacpp. They
include llama.cpp's wrapper of nlohmann/json; OUT_DIR/json.h is nlohmann/json itself under that name. OUT_DIR/templates
holds the chat templates of well-known models that llama.cpp is tested with, for the tests here. OUT_DIR appears only
when it is complete.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "xllamacpp"
REQUIREMENT = f"{PACKAGE}==2026.10.11549 --hash=sha256:c17ee1163006f70726abb9f72137830818f3d8cb60bfc34cb232d08428eaa22b"
PARTS = {  # of the archive's llama.cpp -> where they go; caps.* asks a template what it can do, which nobody does here
    "common/jinja/": ["lexer.cpp", "lexer.h", "parser.cpp", "parser.h", "runtime.cpp", "runtime.h", "string.cpp"]
    + ["string.h", "utils.h", "value.cpp", "value.h"],
    "common/": ["unicode.cpp", "unicode.h"],
    "": ["LICENSE"],
}
JSON_H = """\
#pragma once
#include <nlohmann/json.hpp>
using common_json = nlohmann::ordered_json;
using common_json_error = nlohmann::json::exception;
"""


def download(folder):
    """Fetches the source archive through pip, which checks its hash."""
    requirements = folder / "requirements.txt"
    requirements.write_text(REQUIREMENT + "\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    kind = ["--no-binary", PACKAGE, "--require-hashes", "--dest", folder, "--requirement", requirements]
    if subprocess.run([*pip, *kind]).returncode != 0:
        sys.exit(f"prepare_jinja.py: pip could not fetch {PACKAGE}, see above")
    return next(folder.glob(f"{PACKAGE}-*.tar.gz"))


def extract(archive, target):
    (target / "jinja").mkdir(parents=True)
    with tarfile.open(archive) as tar:
        root = f"{archive.name.removesuffix('.tar.gz')}/thirdparty/llama.cpp/"
        for folder, names in PARTS.items():
            for name in names:
                place = target / "jinja" / name if folder.endswith("jinja/") else target / name
                place.write_bytes(tar.extractfile(root + folder + name).read())
        (target / "templates").mkdir()
        for member in tar:
            if member.name.startswith(root + "models/templates/") and member.name.endswith(".jinja"):
                (target / "templates" / Path(member.name).name).write_bytes(tar.extractfile(member).read())
    (target / "json.h").write_text(JSON_H)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    target = parser.parse_args().out_dir
    if (target / "json.h").exists():
        print(f"{target} is there already")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"{target}: fetching the Jinja engine for chat templates (38 MB), about ten seconds", flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".preparing-") as temporary:
        complete = Path(temporary) / "complete"
        extract(download(Path(temporary)), complete)
        if target.exists():
            shutil.rmtree(target)  # what another program left half done
        os.rename(complete, target)


if __name__ == "__main__":
    main()
