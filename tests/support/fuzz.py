"""Seeded damage to mask files and studies, read in a process of bounded memory: ``fuzz.py KIND COUNT SEED FOLDER``.

Every damaged file must be refused by a UserError of one line, or give the right masks (the checksum of the original);
of a study, a plan. Prints how many ended in which way; ends with a traceback at the first that ended in another.
"""

import io
import json
import random
import resource
import signal
import sys
import traceback
import zipfile
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import save

from sparse_ft.errors import UserError
from sparse_ft.masks.files import load_masks, make_header
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.masks.readers import HEADER_KEY
from sparse_ft.study.plan import make_plan
from sparse_ft.study.study_file import load_study

ROOM = 512 << 20  # bytes that the process may take above what it has once everything is imported
SECONDS = 20  # for one file
SIZES = (-1, 0, 1, 2, 7, 8, 9, 255, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64, 10**30)
VALUES = (
    None, True, False, "", "x", "\ud800", "\x00", 0.5, -0.5, 7, 1e308, float("nan"), float("inf"), -float("inf"),
    [], {}, [[]], [1, 8], {"a": {}}, "../..", "0.5", "none", "9" * 30, "&a [*a]", "=1", "é" * 300, *SIZES,
)  # fmt: skip
STUDY = """\
name: fuzz
grid: {model: [tiny-llama, a/b], sparsity: '0.1:0.5:0.2', mode: [sparse_to_sparse, dense], seed: [0, 1]}
cell:
  data_dir: made
  max_steps: 2
  learning_rate: 1e-4
  eval_limit: none
  keep: &k adapter
dense_baseline: true
keep: *k
"""


def original():
    generator = torch.Generator().manual_seed(3)
    tensors = {f"layers.{i}.w": torch.rand(5, 19, generator=generator) > 0.5 for i in range(3)}
    about = {"method": "unstructured", "sparsity": 0.5, "calibration": {"samples": 4, "length": 8}, "notes": ["a"]}
    return MaskSet.from_bool(tensors, about | {"pattern": "2:4", "model": "m", "seed": 0})


def damage_bytes(content, pick):
    """Flips, overwrites, cuts, inserts, repeats or moves some bytes."""
    content = bytearray(content)
    for _ in range(pick.choice((1, 1, 1, 2, 5, 40))):
        place, length = pick.randrange(len(content) + 1), pick.choice((1, 1, 2, 4, 8, 64, 1000))
        kind = pick.randrange(7)
        if kind == 0 and place < len(content):
            content[place] ^= 1 << pick.randrange(8)
        elif kind == 1:
            content[place : place + length] = pick.randbytes(length)
        elif kind == 2:
            del content[place : place + length]
        elif kind == 3:
            content[place:place] = pick.randbytes(length)
        elif kind == 4:
            content[place:place] = content[place : place + length] * pick.randrange(1, 4)
        elif kind == 5:
            del content[place:]
        else:
            size = pick.choice((2, 4, 8))
            content[place : place + size] = (pick.choice(SIZES) % 2 ** (8 * size)).to_bytes(size, "little")
    return bytes(content)


def damage_tree(tree, pick):
    """Another value, a lost or a doubled entry, or a new one somewhere in plain data."""
    places = []

    def visit(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                visit(node[key])

    visit(tree)
    node, key = pick.choice(places)
    kind, value = pick.randrange(5), pick.choice(VALUES)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[pick.choice(("", "\ud800", "x" * 300, "layers.0.w", "a/b"))] = node[key]
    elif kind == 2:
        node[key] = [node[key]]
    elif kind == 3 and isinstance(node, list):
        node.insert(key, value)
    else:
        node[key] = value
    return tree


def damage_bits(bits, pick):
    name = pick.choice(list(bits))
    tensor = bits[name]
    changes = [
        lambda: tensor.to(pick.choice((torch.int8, torch.bool, torch.float32, torch.int64))), lambda: tensor[:-1],
        lambda: tensor.flatten(), lambda: tensor[None], lambda: tensor.T.contiguous(), lambda: tensor ^ 1,
        lambda: torch.zeros(0, 3, dtype=torch.uint8), lambda: torch.tensor(3, dtype=torch.uint8), lambda: tensor | 255,
    ]  # fmt: skip
    bits[pick.choice((name, name, name, "other"))] = pick.choice(changes)().clone().contiguous()
    return bits


def odd_things(bits, pick):
    """What only a pickle can hold."""
    name = pick.choice(list(bits))
    tensor = bits[name]
    things = [
        tensor.to_sparse(), tensor.to("meta"), tensor[:1, :1].expand(5, 3), tensor.tolist(), None, 3, "bits", set(),
        torch.nn.Linear(1, 1), tensor.numpy(), torch.float32, torch.zeros(1).expand(2**20, 2**20), {1: tensor},
    ]  # fmt: skip
    bits[pick.choice((name, 1, None, ("a",)))] = pick.choice(things)
    return bits


def pack(kind, header, bits):
    """A file of the format."""
    if kind == "safetensors":
        return save(bits, {HEADER_KEY: header})
    stream = io.BytesIO()
    if kind == "npz":
        text = np.frombuffer(header.encode("utf-8", "surrogatepass"), np.uint8)
        np.savez(stream, **{HEADER_KEY: text}, **{name: tensor.numpy() for name, tensor in bits.items()})
    else:
        torch.save({HEADER_KEY: header, "bits": bits}, stream)
    return stream.getvalue()


def damage_archive(content, pick):
    """Other members, whole as archives go: damaged inside, compressed, doubled, lost, renamed."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        members = [(info.filename, file.read(info)) for info in file.infolist()]
    number = pick.randrange(len(members))
    name, data = members[number]
    kind, method = pick.randrange(6), zipfile.ZIP_STORED
    if kind == 0:
        del members[number]
    elif kind == 1:
        members[number] = (pick.choice((name + "x", "../../" + name, "", "a" * 300)), data)
    elif kind == 2:
        members.append((name, pick.choice((data, data[::-1]))))
    elif kind == 3:
        method = pick.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    else:
        members[number] = (name, damage_bytes(data, pick))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as file:
        for name, data in members:
            file.writestr(name or "x", data)
    return stream.getvalue()


def damage_head(content, pick):
    """The format's own header of a safetensors file, its length right again."""
    size = int.from_bytes(content[:8], "little")
    try:
        head = json.dumps(damage_tree(json.loads(content[8 : 8 + size]), pick)).encode()
    except RecursionError:
        return content
    return len(head).to_bytes(8, "little") + head + content[8 + size :]


def damaged_masks(kind, masks, pick):
    header = make_header(masks.checksum, masks.shapes, masks.metadata)
    bits = dict(masks.packed)
    how = pick.randrange(5)
    if how == 0:
        tree = json.loads(header)
        for _ in range(pick.choice((1, 1, 2, 3))):
            tree = damage_tree(tree, pick) or {"version": 1}
        header = json.dumps(tree)
    elif how == 1:
        header = damage_bytes(header.encode(), pick).decode("latin-1")
    elif how == 2:
        bits = odd_things(bits, pick) if kind == "pt" and pick.random() < 0.7 else damage_bits(bits, pick)
    content = pack(kind, header, bits)
    if how == 3:
        content = damage_head(content, pick) if kind == "safetensors" else damage_archive(content, pick)
    return damage_bytes(content, pick) if how == 4 else content


def damaged_study(_, __, pick):
    if pick.random() < 0.5:
        return damage_bytes(STUDY.encode(), pick)
    tree = yaml.safe_load(STUDY)
    for _ in range(pick.choice((1, 1, 2, 3))):
        tree = damage_tree(tree, pick) or {"grid": {}}
    try:
        return yaml.safe_dump(tree, allow_unicode=pick.random() < 0.5).encode("utf-8", "surrogatepass")
    except yaml.YAMLError:
        return json.dumps(tree).encode()


def read_masks(path, checksum):
    masks = load_masks(path)
    assert masks.checksum == checksum, "other masks"
    assert all(masks[name].shape == masks.shapes[name] for name in masks)


def read_plan(path, _):
    assert make_plan(load_study(path)).cells


def main(kind, count, seed, folder):
    masks, ended = original(), {"refused": 0, "right": 0}
    make, read = (damaged_study, read_plan) if kind == "yaml" else (damaged_masks, read_masks)
    path = Path(folder) / f"damaged.{kind}"
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(f"{kind} {number}: more than {SECONDS} seconds"))
    path.write_bytes(STUDY.encode() if kind == "yaml" else pack(kind, make_header(
        masks.checksum, masks.shapes, masks.metadata), dict(masks.packed)))  # fmt: skip
    read(path, masks.checksum)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM,) * 2)
    for number in range(int(seed), int(seed) + int(count)):
        path.write_bytes(make(kind, masks, random.Random(number)))
        signal.alarm(SECONDS)
        try:
            read(path, masks.checksum)
            ended["right"] += 1
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 3000, error
            ended["refused"] += 1
        except BaseException:
            traceback.print_exc()
            sys.exit(f"{kind} {number}: neither refused nor right")
        signal.alarm(0)
    print(json.dumps(ended))


if __name__ == "__main__":
    import warnings

    warnings.filterwarnings("ignore")
    main(*sys.argv[1:])
