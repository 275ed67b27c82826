"""Mask files that are not what they say: one line, in every format, in no more memory than they have bytes."""

import io
import json
import resource
import subprocess
import sys
import textwrap
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparse_ft.errors import UserError
from sparse_ft.masks.files import load_masks, make_header, save_masks
from sparse_ft.masks.mask_set import MaskSet
from sparse_ft.masks.readers import HEADER_KEY
from sparse_ft.settings.commands import FORMATS

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def masks():
    generator = torch.Generator().manual_seed(5)
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.rand(6, 19, generator=generator) > 0.5 for i in range(3)}
    tensors["experts"] = torch.rand(2, 3, 16, generator=generator) > 0.5
    return MaskSet.from_bool(
        tensors, {"method": "unstructured", "sparsity": 0.5, "calibration": None, "notes": ["one"]}
    )


def write(path, header, bits):
    """A file of the suffix's format with any header text and any tensors."""
    if path.suffix == ".safetensors":
        save_file(bits, path, metadata={HEADER_KEY: header})
    elif path.suffix == ".npz":
        text = np.frombuffer(header.encode("utf-8", "surrogatepass"), np.uint8)
        np.savez(path, **{HEADER_KEY: text}, **{name: tensor.numpy() for name, tensor in bits.items()})
    else:
        torch.save({HEADER_KEY: header, "bits": bits}, path)
    return path


def header_of(masks):
    return json.loads(make_header(masks.checksum, masks.shapes, masks.metadata))


def complaint(path):
    """What both doors say of a file: one line that names it."""
    with pytest.raises(UserError) as raised:
        load_masks(path)
    assert path.name in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 700
    return str(raised.value)


@pytest.mark.parametrize("kind", FORMATS)
def test_right_masks_come_back_bit_for_bit(masks, kind, tmp_path):
    for path in (
        save_masks(masks, tmp_path / f"saved.{kind}"),
        write(tmp_path / f"written.{kind}", json.dumps(header_of(masks)), masks.packed),
    ):
        loaded = load_masks(path)
        assert loaded.checksum == masks.checksum
        assert all(torch.equal(loaded[name], masks[name]) for name in masks)
        assert loaded.shapes == masks.shapes


def _shape(shape):
    return lambda header: header["shapes"].update({NAME: shape})


def _about(**values):
    return lambda header: header["metadata"].update(values)


HEADERS = {
    "shape []": (_shape([]), "the shape of"),
    "a negative size": (_shape([-6, 19]), "the shape of"),
    "a huge size": (_shape([6, 2**63]), "the shape of"),
    "a huge product": (_shape([2**40, 2**40]), "the shape of"),
    "a size of 1e400": (_shape([10**400, 19]), "the shape of"),
    "a fraction": (_shape([6.0, 19]), "the shape of"),
    "a size as text": (_shape(["6", 19]), "the shape of"),
    "true as a size": (_shape([True, 19]), "the shape of"),
    "a number as shape": (_shape(6), "the shape of"),
    "no shape": (_shape(None), "the shape of"),
    "nine dimensions": (_shape([1] * 8 + [19]), "the shape of"),
    "another shape": (_shape([6, 27]), "bits are"),
    "a transposed shape": (_shape([19, 6]), "bits are"),
    "no checksum": (lambda header: header.pop("checksum"), "'checksum'"),
    "a number as checksum": (lambda header: header.update(checksum=7), "'checksum'"),
    "null as checksum": (lambda header: header.update(checksum=None), "'checksum'"),
    "another checksum": (lambda header: header.update(checksum="0" * 64), "changed after it was written"),
    "no shapes": (lambda header: header.pop("shapes"), "'shapes'"),
    "a list of shapes": (lambda header: header.update(shapes=[]), "'shapes'"),
    "fewer shapes": (lambda header: header["shapes"].pop(NAME), "name different tensors"),
    "a shape more": (lambda header: header["shapes"].update(more=[1, 8]), "name different tensors"),
    "no metadata": (lambda header: header.pop("metadata"), "'metadata'"),
    "a list as metadata": (lambda header: header.update(metadata=[1]), "'metadata'"),
    "text as metadata": (lambda header: header.update(metadata="x"), "'metadata'"),
    "no version": (lambda header: header.pop("version"), "no mask file"),
    "version null": (lambda header: header.update(version=None), "format version None"),
    "version []": (lambda header: header.update(version=[1]), "format version"),
    "sparsity NaN": (_about(sparsity=float("nan")), "NaN"),
    "sparsity Infinity": (_about(sparsity=float("inf")), "Infinity"),
    "sparsity 7": (_about(sparsity=7), "its sparsity is '7'"),
    "sparsity -0.1": (_about(sparsity=-0.1), "its sparsity"),
    "sparsity as text": (_about(sparsity="0.5"), "its sparsity"),
    "sparsity true": (_about(sparsity=True), "its sparsity"),
    "sparsity null": (_about(sparsity=None), "its sparsity"),
    "sparsity []": (_about(sparsity=[0.5]), "its sparsity"),
    "achieved 2": (_about(achieved=2), "its achieved"),
    "method 3": (_about(method=3), "its method"),
    "method null": (_about(method=None), "its method"),
    "importance []": (_about(importance=["wanda"]), "its importance"),
    "fingerprint 1": (_about(fingerprint=1), "its fingerprint"),
    "source_fingerprint {}": (_about(source_fingerprint={}), "its source_fingerprint"),
    "pattern 2": (_about(pattern=2.4), "its pattern"),
    "calibration as text": (_about(calibration="boolq"), "its calibration"),
    "calibration samples as text": (_about(calibration={"samples": "many"}), "its calibration"),
    "reconstruction as text": (_about(reconstruction="block"), "its reconstruction"),
    "epochs as text": (_about(reconstruction={"epochs": "many"}), "its reconstruction"),
    "refine 1": (_about(refine=1), "its refine"),
    "notes as text": (_about(notes="one"), "its notes"),
    "notes of numbers": (_about(notes=[1]), "its notes"),
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_is_wrong_is_one_line(masks, case, kind, tmp_path):
    header, (change, said) = header_of(masks), HEADERS[case]
    change(header)
    assert said in complaint(write(tmp_path / f"masks.{kind}", json.dumps(header), masks.packed))


TEXTS = {
    "empty": "",
    "no JSON": "{",
    "a list": "[]",
    "a number": "1e999",
    "null": "null",
    "nested deeply": "[" * 100_000,
    "nested deeply in metadata": '{"version": 1, "metadata": ' + '{"a":' * 50_000,
    "a number of 10,000 digits": '{"version": ' + "1" * 10_000 + "}",
    "a key twice": '{"version": 1, "version": 1, "checksum": "", "shapes": {}, "metadata": {}}',
    "a lone surrogate as a name": '{"version": 1, "checksum": "", "shapes": {"\\ud800": [1, 8]}, "metadata": {}}',
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_header_that_is_no_header_is_one_line(masks, text, kind, tmp_path):
    complaint(write(tmp_path / f"masks.{kind}", TEXTS[text], masks.packed))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float32, torch.int64])
def test_bits_of_another_dtype_are_refused(masks, dtype, kind, tmp_path):
    bits = {**masks.packed, NAME: masks.packed[NAME].to(dtype)}
    said = complaint(write(tmp_path / f"masks.{kind}", json.dumps(header_of(masks)), bits))
    assert "bits are" in said or "Storage, which no mask file does" in said


@pytest.mark.parametrize("kind", FORMATS)
def test_bits_beyond_the_end_of_a_row_are_refused(masks, kind, tmp_path):
    bits = {**masks.packed, NAME: masks.packed[NAME] | 0x80}
    assert "beyond the end" in complaint(write(tmp_path / f"masks.{kind}", json.dumps(header_of(masks)), bits))


THINGS = {
    "a sparse tensor": lambda bits: bits.to_sparse(),
    "a compressed sparse tensor": lambda bits: bits.to_sparse_csr(),
    "a tensor on no device": lambda bits: bits.to("meta"),
    "one byte as many": lambda bits: bits[:1, :1].expand(6, 3),
    "every second byte": lambda bits: torch.cat([bits, bits], 1)[:, ::2],
    "a quantised tensor": lambda bits: torch.quantize_per_tensor(bits.float(), 1.0, 0, torch.quint8),
    "a parameter": lambda bits: torch.nn.Parameter(bits, requires_grad=False),
    "a list": lambda bits: bits.tolist(),
    "a number": lambda bits: 3,
    "none": lambda bits: None,
    "text": lambda bits: "bits",
    "an array": lambda bits: bits.numpy(),
    "a module": lambda bits: torch.nn.Linear(2, 2),
    "a dtype": lambda bits: torch.uint8,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("thing", THINGS)
def test_things_in_a_pt_file_that_are_no_bits_are_refused(masks, thing, tmp_path):
    bits = {**masks.packed, NAME: THINGS[thing](masks.packed[NAME])}
    complaint(write(tmp_path / "masks.pt", json.dumps(header_of(masks)), bits))


@pytest.mark.parametrize(
    "content", [[1, 2], torch.zeros(3), None, "text", {HEADER_KEY: 3}, {HEADER_KEY: torch.ones(1)}]
)
def test_a_pt_file_of_something_else_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "masks.pt")
    assert "no mask file" in complaint(tmp_path / "masks.pt")


@pytest.mark.parametrize("bits", [None, [1], {1: torch.zeros(1, dtype=torch.uint8)}, torch.zeros(2, dtype=torch.uint8)])
def test_a_pt_file_without_a_table_of_bits_is_refused(masks, bits, tmp_path):
    complaint(write(tmp_path / "masks.pt", json.dumps(header_of(masks)), bits))


def npy(claimed, content=b"", dtype="|u1", fortran=False, version=1):
    """An array's file that claims a shape, whatever follows."""
    head = f"{{'descr': '{dtype}', 'fortran_order': {fortran}, 'shape': {claimed}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + len(head).to_bytes(2, "little") + head + content


def archive(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def whole_npz(masks):
    """The members of a right file, by name."""
    buffer = io.BytesIO()
    text = np.frombuffer(json.dumps(header_of(masks)).encode(), np.uint8)
    np.savez(buffer, **{HEADER_KEY: text}, **{name: bits.numpy() for name, bits in masks.packed.items()})
    with zipfile.ZipFile(buffer) as file:
        return {info.filename.removesuffix(".npy"): file.read(info) for info in file.infolist()}


@pytest.mark.parametrize(
    "member",
    [
        npy("(3298534883328, 3)"),  # 9 TiB
        npy("(6, 3)", bytes(17)),
        npy("(6, 3)", bytes(19)),
        npy("(18,)", bytes(18)),
        npy("(6, 3)", bytes(18), fortran=True),
        npy("(6, 3)", bytes(18), dtype="|O"),
        npy("(6, 3)", bytes(18), version=9),
        npy("(-6, 3)", bytes(18)),
        npy("__import__('os')", bytes(18)),
        b"",
        b"\x93NUMPY",
    ],
)
def test_an_npz_whose_arrays_claim_what_they_are_not(masks, member, tmp_path):
    complaint(archive(tmp_path / "masks.npz", {**whole_npz(masks), NAME: member}))


def test_an_npz_whose_header_claims_nine_tebibytes(tmp_path):
    assert "header is too long" in complaint(archive(tmp_path / "masks.npz", {HEADER_KEY: npy("(9895604649984,)")}))


def test_compressed_archives_are_refused_unread(masks, tmp_path):
    arrays = whole_npz(masks)
    assert "is compressed" in complaint(archive(tmp_path / "masks.npz", arrays, zipfile.ZIP_DEFLATED))
    save_masks(masks, tmp_path / "stored.pt")
    with zipfile.ZipFile(tmp_path / "stored.pt") as file:
        members = {info.filename: file.read(info) for info in file.infolist()}
    with zipfile.ZipFile(tmp_path / "masks.pt", "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    assert "is compressed" in complaint(tmp_path / "masks.pt")


def test_a_bomb_costs_no_memory_and_too_little_memory_is_one_line(masks, tmp_path):
    """512 MB of zeros in half a megabyte, and 256 MB of bits, in a process that may take 200 MB more."""
    bomb, large = tmp_path / "bomb.npz", tmp_path / "large.npz"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        file.writestr(HEADER_KEY + ".npy", whole_npz(masks)[HEADER_KEY])
        with file.open(NAME + ".npy", "w") as stream:
            stream.write(npy("(65536, 8192)"))
            for _ in range(512):
                stream.write(bytes(1 << 20))
    shape = (32_000, 64_000)
    with zipfile.ZipFile(large, "w") as file:
        text = make_header("0" * 64, {"w": shape}, {}).encode()
        file.writestr(HEADER_KEY + ".npy", npy(f"({len(text)},)", text))
        with file.open("w.npy", "w") as stream:
            stream.write(npy("(32000, 8000)"))
            for _ in range(256):
                stream.write(bytes(1_000_000))
    program = f"""
        import resource
        from sparse_ft.errors import UserError
        from sparse_ft.masks.files import load_masks
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * {resource.getpagesize()} + (200 << 20),) * 2)
        for path in ({str(bomb)!r}, {str(large)!r}):
            try:
                load_masks(path)
            except UserError as error:
                print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "is compressed" in first
    assert "may not take that much memory" in second
