"""Damage to files, by a random.Random: bytes, values of other types, foreign HDF5 and SQLite.

A mutation takes (path, rng) and changes the file in place. Each is small, so that a file stays
valid up to the place that it tries.
"""

import contextlib
import io
import json
import pickle
import sqlite3
import zipfile

import h5py
import numpy as np
import torch

# --- bytes ---------------------------------------------------------------------------------------

INTERESTING = [b"\0", b"\xff", b"\x7f", b"\x80", b"\xff" * 4, b"\0" * 8, b"\x7f" + b"\xff" * 7]
INTERESTING += [
    b"\xff" * 7 + b"\x7f",
    b"\0\0\0\x80",
    b"\x1b[31m",
    b"\xed\xa0\x80",
    b"\n",
    b"{",
    b"(",
]


def flip(data, rng):
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)


def overwrite(data, rng):
    piece = rng.choice(INTERESTING)
    at = rng.randrange(len(data))
    data[at : at + len(piece)] = piece


def insert(data, rng):
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice(INTERESTING) * rng.choice([1, 1, 1, 1000])


def remove(data, rng):
    at = rng.randrange(len(data))
    del data[at : at + rng.choice([1, 4, 64, len(data)])]


def repeat(data, rng):
    at, length = rng.randrange(len(data)), rng.choice([1, 8, 100, 5000])
    data[at:at] = data[at : at + length] * rng.choice([1, 2, 50])


BYTES = [flip, flip, overwrite, overwrite, insert, remove, repeat]


def mutate_bytes(path, rng):
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        if data:
            rng.choice(BYTES)(data, rng)
    path.write_bytes(data)


# --- values --------------------------------------------------------------------------------------

ODD = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    -(2**70),
    10**400,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
]
ODD += ["", " ", "x", "\x1b[31m\n\u202e", "../../x", "x" * 5000, "\ud800", "1", "nan", "🎬\0"]
ODD += [[], {}, [[]], [None], {"a": 1}, {"": {}}, ["a", 1], [1.5] * 300, {"x" * 300: [[[[]]]]}]
ODD_PYTHON = ODD + [(), (1, 2), b"\xff", set(), {1}, frozenset(), {1: 2}, {None: 1}, {(1, 2): 3}]


def mutate_value(value, rng, odd):
    """A copy of a nested value with one place changed; arrays and tensors count as places."""
    children = list(value) if isinstance(value, list | tuple | dict | set | frozenset) else []
    if not children or rng.random() < 0.15:
        if isinstance(value, np.ndarray | torch.Tensor) and rng.random() < 0.8:
            return mutate_array(value, rng)
        return rng.choice(odd)
    if isinstance(value, dict):
        changed, key = dict(value), rng.choice(children)
        action = rng.randrange(8)
        if action == 0:
            del changed[key]
        elif action == 1:
            with contextlib.suppress(TypeError):  # an unhashable key
                changed[rng.choice(odd)] = changed.pop(key)
        else:
            changed[key] = mutate_value(value[key], rng, odd)
        return changed
    changed, at = children, rng.randrange(len(children))
    action = rng.randrange(8)
    if action == 0:
        del changed[at]
    elif action == 1:
        changed.insert(at, rng.choice(changed))
    elif action == 2:
        changed.insert(at, rng.choice(odd))
    else:
        changed[at] = mutate_value(changed[at], rng, odd)
    with contextlib.suppress(TypeError):
        return type(value)(changed)
    return changed


def mutate_array(array, rng):
    """An array or tensor of another shape, type or content."""
    if isinstance(array, torch.Tensor):
        if rng.random() < 0.2 and array.numel():  # repeated without end, by strides of zero
            return array.flatten()[:1].expand(rng.choice([10, 10**6, 10**11]))
        dense = array.detach().float().numpy() if array.layout == torch.strided else np.zeros(3)
        with contextlib.suppress(TypeError, ValueError):
            return torch.from_numpy(np.array(mutate_array(dense, rng)))
        return torch.zeros(0)
    actions = [
        lambda: array[:0],
        lambda: array.ravel(),
        lambda: array[None],
        lambda: array.T,
        lambda: array[..., :-1] if array.ndim else array,
        lambda: np.full_like(array, rng.choice([0, -1, 1]), dtype=np.float32),
        lambda: np.full(array.shape, rng.choice([np.nan, np.inf, 1e38, -1.0])),
        lambda: array.astype(rng.choice(["f2", ">f4", "i8", "u1", "S3", "c8", "?", "U4", "M8[s]"])),
        lambda: np.array(rng.choice([0, -1, 2**62, 0.5])),
        lambda: np.zeros(rng.choice([0, 1, 7]), rng.choice(["f4", "S0", "V3", "u8"])),
    ]
    with contextlib.suppress(TypeError, ValueError):
        return rng.choice(actions)()
    return np.zeros(2)


def mutate_json(path, rng):
    value = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(mutate_value(value, rng, ODD)), encoding="utf-8")


def mutate_json_line(path, rng):
    lines = path.read_text(encoding="utf-8").splitlines()
    at = rng.randrange(len(lines))
    lines[at] = json.dumps(mutate_value(json.loads(lines[at]), rng, ODD))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def mutate_pickle(path, rng):
    value = mutate_value(pickle.loads(path.read_bytes()), rng, ODD_PYTHON)
    path.write_bytes(pickle.dumps(value, protocol=rng.choice([0, 2, 4, 5])))


def mutate_torch(path, rng):
    value = torch.load(path, weights_only=True)
    for _ in range(rng.choice([1, 1, 3])):
        value = mutate_value(value, rng, ODD_PYTHON)
    torch.save(value, path, _use_new_zipfile_serialization=rng.random() < 0.8)


def mutate_zip(path, rng):
    """Rewrite an archive: members damaged, lost, compressed, or grown to many times the file."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    action = rng.randrange(5)
    if action == 0:
        del members[name]
    elif action == 1:
        members[name] += bytes(rng.choice([1, 10**5, 10**8]))
    elif action == 2:
        members[rng.choice(["../x", "x", name + "x", "arr_0.npy"])] = members[name]
    else:
        data = bytearray(members[name] or b"x")
        rng.choice(BYTES)(data, rng)
        members[name] = bytes(data)
    kind = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    if any(len(data) > 10**7 for data in members.values()):
        kind = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path, "w", kind) as archive:
        for member, data in members.items():
            archive.writestr(member, data)


def mutate_npz(path, rng):
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    changed = mutate_value(arrays, rng, [np.array("x"), np.zeros(()), np.zeros((2, 0)), np.eye(3)])
    if isinstance(changed, dict):
        data = io.BytesIO()
        np.savez(data, **{str(name): np.asarray(value) for name, value in changed.items()})
        path.write_bytes(data.getvalue())


WORDS = [
    "1",
    "[]",
    '"x"',
    "-1",
    "nan",
    "\t",
    "true",
    "{}",
    "id\tpath",
    "\x85",
    "\u2028",
    "\r",
    "1e999",
]


def mutate_text(path, rng):
    words = path.read_text(encoding="utf-8").replace("\n", " \n ").split(" ")
    for _ in range(rng.choice([1, 2, 10])):
        words[rng.randrange(len(words))] = rng.choice([*WORDS, rng.choice(words)])
    path.write_text(" ".join(words).replace(" \n ", "\n"), encoding="utf-8")


# --- HDF5 ----------------------------------------------------------------------------------------


def mutate_hdf5(path, rng):
    """Replace, lose or add a dataset, a link or an attribute."""
    with h5py.File(path, "r+") as file:
        names = []
        file.visititems(lambda name, item: names.append(name))
        name = rng.choice(names)
        with contextlib.suppress(TypeError, ValueError, OSError, KeyError, RuntimeError):
            rng.choice(HDF5)(file, name, rng)


def _replace(file, name, value=None, **options):
    del file[name]
    file.create_dataset(name, data=value, **options)


def _array(file, name, rng):
    old = file[name][()]
    if isinstance(old, np.ndarray) and old.dtype != object:
        _replace(file, name, mutate_array(old, rng))
    else:
        new = list(old)
        new[rng.randrange(len(new))] = rng.choice(["", "\x1b[31m", "x" * 10**5, "a/b", new[0]])
        _replace(file, name, new)


def _odd_type(file, name, rng):
    text, number = h5py.string_dtype(), h5py.vlen_dtype(np.int32)
    record = np.dtype([("a", "f4"), ("b", "i8")])
    kind = rng.choice(
        [text, number, h5py.ref_dtype, record, np.dtype("V5"), h5py.opaque_dtype("M8[s]")]
    )
    shape = rng.choice([(), (3,), (4, 8), (0, 8)])
    _replace(file, name, dtype=kind, shape=shape)


def _huge(file, name, rng):
    shape = rng.choice([(10**9, 512), (2**40, 8), (5, 10**10)])
    chunks = rng.choice([True, (1, 8), (1000, min(shape[1], 10**5))])
    options = rng.choice([{}, {"compression": "gzip"}, {"compression": "lzf"}])
    _replace(file, name, dtype="f2", shape=shape, chunks=chunks, **options)


def _zeros(file, name, rng):
    _replace(file, name, np.zeros((20000, 512), "f2"), compression="gzip", chunks=(20000, 512))


def _link(file, name, rng):
    links = [
        h5py.SoftLink("/ids"),
        h5py.SoftLink("/nowhere"),
        h5py.ExternalLink("/etc/passwd", "/"),
    ]
    links += [h5py.ExternalLink(file.filename, "/"), file["/"]]
    del file[name]
    file[name] = rng.choice(links)


def _external(file, name, rng):
    _replace(
        file, name, shape=(4, 8), dtype="f2", external=[(rng.choice(["/etc/passwd", "x"]), 0, 64)]
    )


def _virtual(file, name, rng):
    layout = h5py.VirtualLayout(shape=(4, 8), dtype="f2")
    layout[:] = h5py.VirtualSource(
        rng.choice([".", "/etc/passwd", "x.hdf5"]), "frames", shape=(4, 8)
    )
    del file[name]
    file.create_virtual_dataset(name, layout)


def _attribute(file, name, rng):
    odd = [
        np.zeros(10**4),
        "x" * 10**4,
        ["a"] * 200,
        np.void(b"x"),
        h5py.Empty("f4"),
        b"\xff\xfe",
        -1,
    ]
    where = rng.choice([file, file[name]])
    where.attrs[rng.choice(["checksum", "fps", "\x1b[31m", *where.attrs])] = rng.choice(odd)


def _rename(file, name, rng):
    file.move(
        name, rng.choice(["frames", "offsets", "ids", "checksums", "a/b/c", "\x1b]0;x\x07", " "])
    )


def _lose(file, name, rng):
    del file[name]


HDF5 = [_array, _array, _array, _odd_type, _huge, _zeros, _link, _external, _virtual, _attribute]
HDF5 += [_rename, _lose]


# --- SQLite --------------------------------------------------------------------------------------

SQL = [
    "CREATE TRIGGER t AFTER UPDATE ON settings BEGIN DELETE FROM files; END",
    "ALTER TABLE contents RENAME TO c; CREATE VIEW contents AS SELECT * FROM c",
    "DROP TABLE {table}",
    "DROP INDEX files_by_content",
    "ALTER TABLE {table} ADD COLUMN more DEFAULT 1",
    "CREATE TABLE extra (x)",
    "DELETE FROM {table}",
    "INSERT OR REPLACE INTO files VALUES (x'ff0a', 1, 2, 99)",
]
COLUMNS = {
    "settings": ["name", "value", "value", "value"],
    "contents": "id sha256 seconds frames frame pieces piece sizes thumbnail checksum".split(),
    "files": ["path", "size", "mtime", "content"],
}
ODD_SQL = [
    None,
    -1,
    0,
    1,
    2**31,
    2**62,
    -(2**62),
    0.5,
    1e300,
    float("inf"),
    "",
    "x",
    "12",
    b"",
    b"\xff",
]
ODD_SQL += [
    "/etc/passwd",
    "\x1b[31m\n",
    b"\xff" * 16,
    "[]",
    "{}",
    "null",
    "NaN",
    "[0, 0, 0]",
    '"../x"',
]
ODD_SQL += [
    "[1e9, 1, 1]",
    "[-1, 1, 1]",
    "99999999999999",
    '{"a": 1}',
    '"IVF99999,Flat"',
    '"PQ64"',
    "1e3",
]


def mutate_sqlite(path, rng):
    db = sqlite3.connect(path)
    table = rng.choice(list(COLUMNS))
    with contextlib.suppress(sqlite3.Error, OverflowError), db:
        if rng.random() < 0.25:
            db.executescript(rng.choice(SQL).format(table=table))
        else:
            column = rng.choice(COLUMNS[table])
            row = f"rowid = (SELECT rowid FROM {table} ORDER BY random() LIMIT 1)"
            db.execute(f"UPDATE {table} SET {column} = ? WHERE {row}", (rng.choice(ODD_SQL),))
    db.close()
