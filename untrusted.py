"""Read files that others wrote. A bad file is an InputError, and never code, a hang or a bomb.

A reader bounds what it builds by what the file holds: sizes that a file declares are compared with
its own size before memory is taken for them. The formats that a single package reads have their
checks there: HDF5 in features/hdf5.py, an index's database in videoindex/schema.py.
"""

import contextlib
import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from utils import InputError, require_path

MAX_TEXT = 1 << 30  # bytes of a text, JSON or pickle file: the largest annotations have 4 MB
MAX_ITEMS = 1 << 26  # items of a nested value, shared parts counted wherever they are used
MAX_DEPTH = 50  # containers in containers
MAX_INT_BITS = 128  # the magic number of old PyTorch files has 77
MAX_INT_KEY = 1 << 60  # larger integers can all have one hash: n of them take n² steps
MAX_RATIO = 200  # unpacked to packed bytes of a compressed array: features reach 10


@contextlib.contextmanager
def reading(path: str | os.PathLike, what: str, advice: str) -> Iterator[None]:
    """In this block, whatever goes wrong is an InputError: `what` PATH cannot be read; `advice`.

    For libraries that raise nearly anything on a damaged file. An OSError with a number, such as a
    missing permission, says itself what is wrong and passes.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno and error.filename:
            raise
        reason = reason_of(error)
        raise InputError(f"{what} {str(path)!r} cannot be read ({reason}); {advice}") from None


def reason_of(error: Exception) -> str:
    """What a library says of a damaged file, for a message: one line, without its internals."""
    if isinstance(error, KeyError) and isinstance(error.args[0], int):  # a code of a pickle
        return "its bytes are not of this form"
    lines = str(error).splitlines()
    if not lines:
        return type(error).__name__
    # HDF5: "Can't read data (file read failed: time = ..., filename = ..., errno = 5, ...)"
    return re.sub(r": \S+ = .*\)", ")", lines[0])[:200]


# --- text and JSON -------------------------------------------------------------------------------


def read_bytes(path: str | os.PathLike, what: str) -> bytes:
    """The content of a file of at most MAX_TEXT bytes."""
    with open(require_path(path, what), "rb") as file:
        data = file.read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise InputError(
            f"{what} {str(path)!r} has more than {MAX_TEXT >> 20} MiB; is it the right file?"
        )
    return data


def read_text(path: str | os.PathLike, what: str, advice: str = "is it the right file?") -> str:
    """The content of a text file in UTF-8, without the mark that some editors put first."""
    try:
        text = read_bytes(path, what).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{what} {str(path)!r} is not UTF-8 text ({error}); {advice}") from None
    return text.replace("\r\n", "\n")


def read_json(
    path: str | os.PathLike, what: str, advice: str = "is it complete?", **options: Any
) -> Any:
    """The value in a JSON file; `options` are those of json.loads."""
    text = read_text(path, what, advice)
    try:
        return json.loads(text, **options)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} {str(path)!r} is not JSON ({error}); {advice}") from None


def read_ids(path: str | os.PathLike, what: str = "id list") -> list[str]:
    """The ids of a text file, one a line. Empty lines are skipped.

    Raises:
        InputError: the file is absent, is not UTF-8 text, or has no id
    """
    # Not str.splitlines, which also splits at separators that an id may hold.
    lines = read_text(path, what, "it must have an id a line").split("\n")
    ids = [line.strip(" \t\r") for line in lines if line.strip(" \t\r")]
    if not ids:
        raise InputError(f"{what} {str(path)!r} is empty; it must have an id a line")
    return ids


def is_object(value: Any, *kinds: type) -> bool:
    """Whether a value is {string: value}, each of one of `kinds` if given: an object of JSON."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        return False
    return not kinds or all(isinstance(item, kinds) for item in value.values())


# --- pickles -------------------------------------------------------------------------------------


class _PlainUnpickler(pickle._Unpickler):
    """Unpickles containers, strings and numbers, in memory and time linear in the file's size.

    Python's own implementation, because its memo is a dict: in C it is an array as long as the
    largest index that the file names. Keys and members of sets are strings and numbers: the hash of
    nested tuples can take for ever. (Strings have hashes that a file cannot foresee.)
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data), encoding="latin1")
        self.budget = len(data)  # members that copied sets may have, all together

    def find_class(self, module, name):
        if module in ("builtins", "__builtin__") and name in ("set", "frozenset"):
            kind = set if name == "set" else frozenset
            return lambda members=(): self.make_set(kind, members)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in it")

    def make_set(self, kind, members):
        self.budget -= len(members)
        if self.budget < 0:
            raise pickle.UnpicklingError("its sets grow beyond the file's size")
        return kind(_plain_keys(members))

    def refuse(self):
        raise pickle.UnpicklingError("it holds an object")

    # These would call code, change a function, or allocate a size that the file declares.
    for opcode in (
        pickle.BUILD + pickle.INST + pickle.OBJ + pickle.NEWOBJ + pickle.NEWOBJ_EX + pickle.EXT1
    ) + (pickle.EXT2 + pickle.EXT4 + pickle.BYTEARRAY8 + pickle.NEXT_BUFFER):
        dispatch[opcode] = refuse

    def _check_keys_of(opcode, keys_of):
        original = pickle._Unpickler.dispatch[opcode]

        def load(self):
            _plain_keys(keys_of(self.stack))
            original(self)

        return load

    for opcode, keys_of in (
        (pickle.SETITEM[0], lambda stack: stack[-2:-1]),
        (pickle.SETITEMS[0], lambda stack: stack[::2]),
        (pickle.DICT[0], lambda stack: stack[::2]),
        (pickle.ADDITEMS[0], lambda stack: stack),
        (pickle.FROZENSET[0], lambda stack: stack),
    ):
        dispatch[opcode] = _check_keys_of(opcode, keys_of)

    def _check_int_of(opcode):
        original = pickle._Unpickler.dispatch[opcode]

        def load(self):
            original(self)
            if int(self.stack[-1]).bit_length() > MAX_INT_BITS:
                raise pickle.UnpicklingError(f"it holds a number of over {MAX_INT_BITS} bits")

        return load

    for opcode in pickle.INT + pickle.LONG + pickle.LONG1 + pickle.LONG4:
        dispatch[opcode] = _check_int_of(opcode)

    del opcode, keys_of, _check_keys_of, _check_int_of


def _plain_keys(keys: Iterable) -> Iterable:
    """`keys`, if all are strings, bytes, numbers or None."""
    for key in keys:
        if isinstance(key, int) and abs(key) > MAX_INT_KEY:
            raise pickle.UnpicklingError("it holds a key of over 60 bits")
        if not isinstance(key, str | bytes | int | float | None):
            raise pickle.UnpicklingError(f"it holds a {type(key).__name__} as a key")
    return keys


def load_pickle(path: str | os.PathLike, what: str = "annotation file") -> Any:
    """Load a pickle of builtin containers, strings and numbers.

    Raises:
        InputError: the file is not a pickle, holds any other type, which is never executed, or
            would grow far beyond its size
    """
    data = read_bytes(path, what)
    try:
        value = _PlainUnpickler(data).load()
        require_bounded(value)
        return value
    except Exception as error:  # a broken pickle can raise nearly anything
        reason = reason_of(error)
        raise InputError(
            f"{what} {str(path)!r} is not a pickle of plain containers ({reason}); "
            + _pickle_advice(data, reason)
        ) from None


def _pickle_advice(data, reason):
    """What to do about a file that is not a pickle of plain containers, by what it is instead."""
    if data.lstrip()[:1] in (b"{", b"[") and data.rstrip()[-1:] in (b"}", b"]"):
        return "it looks like JSON: write it with pickle.dump(json.load(file), ...)"
    if data.startswith((b"\x93NUMPY", b"PK")):
        return "it holds arrays or a model: is it the right file?"
    if "numpy" in reason or "pandas" in reason:
        return "write it again with plain values, such as array.tolist(), int(x) and float(x)"
    return "fetch it again"


def require_bounded(value: Any, check_leaf: Callable[[Any], None] = lambda leaf: None) -> None:
    """Raise ValueError if a nested value is deep, contains itself, or is huge where it is used.

    A few lists that hold each other twice are small in a file and in memory, and yet without end
    for whoever goes through them.

    Args:
        check_leaf: called with each value that is not a container.
    """
    sizes = {}  # {id of a container: its items, with those inside them}

    def count(container, depth):
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH}, or contains itself")
        if id(container) not in sizes:
            items = container.values() if isinstance(container, dict) else container
            total = len(container)
            for item in items:
                if isinstance(item, dict | list | tuple | set | frozenset):
                    total += count(item, depth + 1)
                else:
                    check_leaf(item)
            if total > MAX_ITEMS:
                raise ValueError(f"it expands to more than {MAX_ITEMS} items")
            sizes[id(container)] = total
        return sizes[id(container)]

    count([value], 0)


# --- PyTorch's files -----------------------------------------------------------------------------

# Bytes of an element, by the name of the storage's class.
STORAGES = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Bool": 1, "Byte": 1, "Char": 1}
STORAGES |= {"Short": 2, "Int": 4, "Long": 8, "Untyped": 1}
REBUILDERS = {
    f"torch._utils.{name}"
    for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
} | {"torch._tensor._rebuild_from_type_v2", "torch.Size", "torch.nn.parameter.Parameter"}


class _Stub:
    """Stands for an object of PyTorch in a trial; takes what an unpickler puts into it."""

    def __init__(self, *_):
        pass

    def __setitem__(self, *_):
        pass

    def extend(self, *_):
        pass

    append = extend


class _TorchTrial(_PlainUnpickler):
    """Goes through the pickle of a PyTorch file and builds nothing.

    Args:
        storage_bytes: key of a storage -> the bytes that the file has of it.
    """

    dispatch = dict(_PlainUnpickler.dispatch)

    def __init__(self, data: bytes, storage_bytes: Callable[[str], int]):
        super().__init__(data)
        self.storage_bytes = storage_bytes

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return self.ordered_dict
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return _storage_class(name.removesuffix("Storage"))
        import torch  # in functions alone: most files that are read hold no tensors

        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or f"{module}.{name}" in REBUILDERS:
            return _Stub
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in it")

    def ordered_dict(self, items=()):
        _plain_keys(key for key, _ in items)
        return _Stub()

    def persistent_load(self, pid):
        kind, storage, key, _, numel = pid[:5]
        if kind != "storage" or numel * storage.itemsize > self.storage_bytes(key):
            raise pickle.UnpicklingError("a tensor has fewer values than it declares")
        return _Stub()

    def load_build(self):
        self.stack.pop()  # the state of an object

    dispatch[pickle.BUILD[0]] = load_build


def _storage_class(name):
    if name not in STORAGES:
        raise pickle.UnpicklingError(f"torch.{name}Storage is not allowed in it")
    return type(name, (_Stub,), {"itemsize": STORAGES[name]})


def load_torch(path: str | os.PathLike, what: str = "model file") -> Any:
    """Load a PyTorch file onto the CPU: tensors and plain containers only.

    Raises:
        InputError: the file cannot be read, holds any other type, which is never executed, or
            would grow beyond its size
    """
    import torch

    path = require_path(path, what)
    with reading(path, what, "is it complete, and a PyTorch file?"):
        _try_torch(path)
        value = torch.load(path, map_location="cpu", weights_only=True)
        require_bounded(value, _require_own_values)
    return value


def _try_torch(path):
    """Raise if loading a PyTorch file would run something, hang, or take more than its size."""
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if not is_zip:
        # Five pickles, then the storages: a magic number, the version, the machine, the value, keys
        data = read_bytes(path, "model file")
        trial = _TorchTrial(data, lambda key: len(data))
        for _ in range(5):
            require_bounded(trial.load())
        return
    with zipfile.ZipFile(path) as archive:
        sizes = _member_sizes(archive, max_ratio=1)
        if len({name.partition("/")[0] for name in sizes}) > 1:
            raise InputError(f"model file {str(path)!r} holds several archives; give one")
        root = next(iter(sizes)).partition("/")[0]
        trial = _TorchTrial(archive.read(f"{root}/data.pkl"), lambda k: sizes[f"{root}/data/{k}"])
        require_bounded(trial.load())


def _require_own_values(leaf):
    """Raise ValueError for a tensor that has fewer values in memory than its shape says."""
    import torch

    if isinstance(leaf, torch.Tensor):
        if leaf.layout != torch.strided or leaf.device.type != "cpu" or leaf.is_quantized:
            raise ValueError("it holds a tensor that is not dense")
        if leaf.numel() * leaf.element_size() > leaf.untyped_storage().nbytes():
            raise ValueError("it holds a tensor that repeats its values")


def _member_sizes(archive, max_ratio):
    """{name: bytes} of a zip file's members; ValueError if they unpack to far more than it has."""
    members = archive.infolist()
    sizes = {member.filename: member.file_size for member in members}
    if len(sizes) < len(members):
        raise ValueError("a name is there twice")
    packed = os.fstat(archive.fp.fileno()).st_size
    unpacked = sum(sizes.values())
    if unpacked > max_ratio * packed:
        raise ValueError(f"{packed} bytes unpack to {unpacked}")
    return sizes


# --- arrays --------------------------------------------------------------------------------------


def load_npz(path: str | os.PathLike, what: str, advice: str) -> dict[str, np.ndarray]:
    """{name: array} of a .npz file of numbers.

    Raises:
        InputError: with `advice`, if it is another file, is damaged, or would grow far beyond its
            size
    """
    path = require_path(path, what)
    arrays = {}
    with reading(path, what, advice), zipfile.ZipFile(path) as archive:
        for name in _member_sizes(archive, MAX_RATIO):
            data = archive.read(name)
            array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
            if array.size > len(data) or array.dtype.kind not in "biuf":
                raise ValueError(f"{name} is not an array of numbers")
            arrays[name.removesuffix(".npy")] = array
    return arrays
