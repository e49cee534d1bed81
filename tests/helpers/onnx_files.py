"""ONNX files written by hand, so that tests need no exporter and can write what exporters refuse.

An ONNX file is a protocol buffer: fields of (number, wire type) and value. The numbers are those of
onnx.proto3.
"""

import numpy as np

FLOAT, UINT8, FLOAT16 = 1, 2, 10
TYPES = {np.dtype(np.float32): FLOAT, np.dtype(np.int64): 7}


def varint(number):
    """A number of up to 64 bits, seven bits a byte, the lowest first."""
    number &= (1 << 64) - 1
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def field(number, value):
    """A field of a message: an int, or bytes (text, or an inner message)."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(name, array, external=None):
    """An initialiser; `external` names another file that is said to hold its values."""
    dims = b"".join(field(1, n) for n in array.shape)
    out = dims + field(2, TYPES[array.dtype]) + field(8, name)
    if external:
        entry = field(1, "location") + field(2, external)
        return out + field(13, entry) + field(14, 1)
    return out + field(9, array.tobytes())


def value_info(name, kind, shape):
    """An input or output: each dimension a number, or the name of one that is free."""
    dims = b"".join(field(1, field(1 if isinstance(n, int) else 2, n)) for n in shape)
    return field(1, name) + field(2, field(1, field(1, kind) + field(2, dims)))


def node(kind, inputs, outputs, **attributes):
    """An operation; attributes are whole numbers or lists of them."""
    out = b"".join(field(1, name) for name in inputs) + b"".join(field(2, n) for n in outputs)
    out += field(4, kind)
    for name, value in attributes.items():
        if isinstance(value, int):
            out += field(5, field(1, name) + field(3, value) + field(20, 2))
        else:
            numbers = b"".join(field(8, n) for n in value)
            out += field(5, field(1, name) + numbers + field(20, 7))
    return out


def network(inputs, nodes, outputs, tensors=()):
    """A file's bytes."""
    graph = b"".join(field(1, part) for part in nodes) + field(2, "graph")
    graph += b"".join(field(5, part) for part in tensors)
    graph += b"".join(field(11, part) for part in inputs)
    graph += b"".join(field(12, part) for part in outputs)
    return field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 17))


def mean_colour_network(kind=UINT8, shape=("n", "h", "w", 3), weight=None):
    """Mean colour of a frame (3,), by a matrix (3, D) if given: a vector a frame."""
    axes = [1, 2] if shape[3] == 3 else [2, 3]
    nodes = [
        node("Cast", ["image"], ["x"], to=FLOAT),
        node("ReduceMean", ["x"], ["mean"], axes=axes, keepdims=0),
        node("MatMul", ["mean", "w"], ["vector"]),
    ]
    weight = np.eye(3, dtype=np.float32) if weight is None else weight
    outputs = [value_info("vector", FLOAT, ["n", weight.shape[1]])]
    return network([value_info("image", kind, shape)], nodes, outputs, [tensor("w", weight)])
