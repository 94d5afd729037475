"""What a fault or a hand makes of a file: the same random numbers give the same damage."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml

from sodfast.run import checkpoint

HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1, 0.5, "", "x", [], {}, [[]], [None], {"": None}, {"a": {"b": 1}}),
    *(2**31, 2**63, -(2**63), 10**400, 1e308, -1e308, 1e-320, float("nan"), float("inf")),
    *("../../outside/canary.txt", "/dev/zero", "/", "nosuch", "a\0b", "\ud800", "é" * 300),
    *("x" * 70_000, "${steps}", "${oc.env:HOME}", "{prompt}", "%s", "=1+1", "<eos><pad>", "1e999"),
    *("{{ 1/0 }}", "{% for x in range(10**9) %}{% endfor %}", "cuda:7", "<script>x</script>"),
    *(
        "0x" + "f" * 4000,
        "2001-01-01",
        "!!binary aGk=",
        "!!set {a}",
        "1:1:1",
        "&a [*a]",
        "{[1]: 2}",
    ),
    *([0] * 3000, {str(n): n for n in range(500)}, ["a", 1, None, {}]),
]
BYTES = [b"", b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"[" * 50_000, b'{"a":' * 20_000, b"\n\n", b"}"]


def damage_bytes(data: bytes, rng: Random) -> bytes:
    """Cut, flip, drop, repeat or insert bytes."""
    kind, length = rng.randrange(6), len(data)
    start = rng.randrange(length + 1)
    end = min(length, start + rng.choice([1, 2, 8, 64, 4096]))
    if kind == 0:
        return data[:start]
    if kind == 1 and length:
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 3, 30])):
            changed[rng.randrange(length)] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 2:
        return data[:start] + data[end:]
    if kind == 3:
        return data[:end] + data[start:]
    if kind == 4:
        return data[:start] + rng.choice(BYTES) + data[start:]
    return rng.choice(BYTES)


def damage_value(value: Any, rng: Random) -> Any:
    """A mapping or list in which one place is replaced, dropped, renamed, wrapped or repeated."""
    holder: Any = {"": value}
    places = list(_places(holder))
    where, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind == 0:
        del where[key]
    elif kind == 1:
        where[key] = [where[key]]
    elif kind == 2 and isinstance(where, dict):
        where[str(key) + rng.choice(["", "x", "\0", "."])] = where.pop(key)
    elif kind == 3:
        other, name = rng.choice(places)
        where[key] = json.loads(json.dumps(other.get(name) if other is holder else other[name]))
    elif kind == 4 and isinstance(where[key], int | float):
        where[key] = where[key] * rng.choice([-1, 10, 10**9, 10**30, 1e300])
    elif kind == 5:
        where[key] = str(where[key])
    else:
        where[key] = rng.choice(HOSTILE)
    return holder.get("")


def _places(value: Any) -> list[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value))
    places = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], dict | list) and value[key]:
            places += _places(value[key])
    return places


def damage_json(data: bytes, rng: Random) -> bytes:
    return json.dumps(damage_value(json.loads(data), rng)).encode()


def damage_state(data: bytes, rng: Random) -> bytes:
    """Other values of a checkpoint, under hashes that fit them."""
    state = json.loads(data)
    files = state.pop("files", {})
    state.pop("sha256", None)
    changed = damage_value(state, rng)
    if not files or not isinstance(changed, dict):
        return json.dumps(changed).encode()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.write_state(Path(folder), {**changed, "files": files})
        return (Path(folder) / "state.json").read_bytes()


def damage_lines(data: bytes, rng: Random) -> bytes:
    """One JSON line damaged, dropped, repeated or moved."""
    lines = data.splitlines()
    index, kind = rng.randrange(len(lines)), rng.randrange(6)
    if kind == 0:
        del lines[index]
    elif kind == 1:
        lines.insert(rng.randrange(len(lines)), lines[index])
    elif kind == 2:
        rng.shuffle(lines)
    else:
        lines[index] = damage_json(lines[index], rng)
    return b"\n".join(lines) + b"\n"


def damage_yaml(data: bytes, rng: Random) -> bytes:
    value = damage_value(yaml.safe_load(data), rng)
    return json.dumps(value).encode() if rng.randrange(2) else yaml.dump(value).encode()


def damage_safetensors(data: bytes, rng: Random) -> bytes:
    """Another header before the same tensors, its length mended or not."""
    length = int.from_bytes(data[:8], "little")
    header = damage_json(data[8 : 8 + length], rng)
    stated = rng.choice([len(header), len(header), 0, 2**40, 2**64 - 1, length])
    return stated.to_bytes(8, "little") + header + data[8 + length :]


BY_SUFFIX: dict[str, Callable[[bytes, Random], bytes]] = {
    ".json": damage_json,
    ".jsonl": damage_lines,
    ".yaml": damage_yaml,
    ".safetensors": damage_safetensors,
}
BY_NAME = {"state.json": damage_state}


def damage_file(file: Path, outside: Path, rng: Random) -> str:
    """Damage a file in place, by its contents or by what stands in its place; says how."""
    kind = rng.randrange(12)
    if kind == 0:
        file.unlink()
        return "removed"
    if kind == 1:
        file.unlink()
        file.mkdir()
        return "a directory"
    if kind == 2:
        target = rng.choice(
            [outside / "canary.txt", outside, Path("/dev/null"), file, Path("gone")]
        )
        file.unlink()
        os.symlink(target, file)
        return f"a link to {target.name}"
    if kind == 3:
        siblings = sorted(other for other in file.parent.iterdir() if other.is_file())
        shutil.copyfile(
            rng.choice([o for o in siblings if o != file] or [outside / "canary.txt"]), file
        )
        return "another file's contents"
    data, structured = file.read_bytes(), BY_SUFFIX.get(file.suffix)
    structured = BY_NAME.get(file.name, structured) if rng.randrange(4) else structured
    try:
        changed = structured(data, rng) if structured and kind < 9 else damage_bytes(data, rng)
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError, yaml.YAMLError):
        changed = damage_bytes(data, rng)  # it was damaged before
    file.unlink()  # others may share it by a hard link
    file.write_bytes(changed)
    return "other contents"
