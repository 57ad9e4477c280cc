"""Claims: arrays come back as numpy wrote them; a file that says something else than is wanted is refused by its
header, before what it claims is allocated and without running anything that it holds."""

import io
import os
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest

from rpt_jax.learning.array_file import read_arrays
from rpt_jax.records import InputError

ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b/c": np.ones(0, np.float32)}
WANTED = {name: array.shape for name, array in ARRAYS.items()}


def npy(shape, kind="<f4", content=b"", columns=False) -> bytes:
    """An .npy file whose header says whatever it likes."""
    header = f"{{'descr': {kind!r}, 'fortran_order': {columns}, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


def zipped(path, members, **options):
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_come_back(tmp_path, save):
    save(tmp_path / "x.npz", **ARRAYS)
    read = read_arrays(tmp_path / "x.npz", WANTED, np.dtype("float32"))
    assert all(np.array_equal(read[name], array) and read[name].dtype == array.dtype for name, array in ARRAYS.items())
    save(tmp_path / "y.npz", a=np.asfortranarray(ARRAYS["a"]))
    read = read_arrays(tmp_path / "y.npz", {"a": (2, 3)}, np.dtype("float32"))
    np.testing.assert_array_equal(read["a"], ARRAYS["a"])


class Payload:
    """What np.load(allow_pickle=True) would run."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy("(2, 4)"), r"'a' has shape \(2, 4\), policy.json says \(2, 3\)"),
        (npy("(2, 3)", "<f8", bytes(48)), "'a' is float64, policy.json says float32"),
        (npy("(2, 3)", "|O", bytes(48)), "'a' is object, policy.json says float32"),
        (npy("(2, 3)", content=bytes(23)), "'a' has another number of bytes"),
        (npy("(2, 3)", content=bytes(25)), "'a' has another number of bytes"),
        (npy("(" * 500), "cannot be read"),
        (npy("__import__('os').mkdir('ran')"), "cannot be read"),
        (npy("(2, 3)", [("f4", "f4")]), "cannot be read|is .*, policy.json says"),
        (b"\x93NUMPY\x09\x00", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_other_contents_are_refused(tmp_path, content, message):
    zipped(tmp_path / "x.npz", {"a": content})
    with pytest.raises(InputError, match=message):
        read_arrays(tmp_path / "x.npz", {"a": (2, 3)}, np.dtype("float32"))
    assert [each.name for each in tmp_path.iterdir()] == ["x.npz"]


def test_a_pickle_is_not_opened(tmp_path):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.array([Payload(tmp_path / "ran")], object), allow_pickle=True)
    zipped(tmp_path / "x.npz", {"a": buffer.getvalue()})
    (tmp_path / "y.npz").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    for name in ("x.npz", "y.npz"):
        with pytest.raises(InputError):
            read_arrays(tmp_path / name, {"a": (1,)}, np.dtype("float32"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_what_is_claimed_is_not_allocated(tmp_path, compression):
    """Header and policy.json agree on two terabytes that the file has not; neither a thousandth of it is taken."""
    zipped(tmp_path / "x.npz", {"a": npy("(1048576, 524288)")}, compression=compression)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="would have 2199023255552 bytes, which no file of its size holds"):
            read_arrays(tmp_path / "x.npz", {"a": (2**20, 2**19)}, np.dtype("float32"))
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_other_ways_to_pack_are_refused(tmp_path):
    zipped(tmp_path / "x.npz", {"a": npy("(2, 3)", content=bytes(24))}, compression=zipfile.ZIP_LZMA)
    with pytest.raises(InputError, match="'a' is not packed as this program does"):
        read_arrays(tmp_path / "x.npz", {"a": (2, 3)}, np.dtype("float32"))
