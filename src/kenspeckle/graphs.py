"""Look into an ONNX graph before a runtime does, without the `onnx` package.

A graph from a stranger can name files to read (external data), libraries to load (custom
operators), or sizes to allocate (a 111-byte `Tile`). What kenspeckle writes needs none of it, so
everything outside a short list of operators is refused. The reader below knows just enough of the
protobuf wire format (https://protobuf.dev/programming-guides/encoding) and of onnx.proto
(https://github.com/onnx/onnx/blob/main/onnx/onnx.proto) to walk a model.
"""

from collections.abc import Iterator

from kenspeckle.core import ModelFileError

__all__ = ["ALLOWED_OPERATORS", "check_graph"]

ALLOWED_OPERATORS = frozenset(
    {
        "Add",
        "AveragePool",
        "BatchNormalization",
        "Cast",
        "Clip",
        "Concat",
        "Constant",
        "Conv",
        "Div",
        "Erf",
        "Flatten",
        "Gelu",
        "Gemm",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "LayerNormalization",
        "MatMul",
        "MaxPool",
        "Mul",
        "Pow",
        "ReduceL2",
        "ReduceMax",
        "ReduceMean",
        "Relu",
        "Reshape",
        "Shape",
        "Sigmoid",
        "Slice",
        "Softmax",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Tanh",
        "Transpose",
        "Unsqueeze",
    }
)
"""Operators of the standard domain that map tensors to tensors of a size the graph states."""

MAX_NODES = 20_000

# Field numbers of onnx.proto.
MODEL_GRAPH, MODEL_TRAINING, MODEL_FUNCTIONS = 7, 20, 25
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_SPARSE = 1, 5, 15
NODE_OPERATOR, NODE_ATTRIBUTE, NODE_DOMAIN = 4, 5, 7
ATTRIBUTE_TENSOR, ATTRIBUTE_TENSORS = 5, 10
ATTRIBUTE_SUBGRAPHS = frozenset({6, 11, 22, 23})  # graphs and sparse tensors
TENSOR_EXTERNAL, TENSOR_LOCATION = 13, 14

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def check_graph(model: bytes) -> None:
    """Refuse an ONNX model that could reach beyond its own bytes.

    Raises:
        ModelFileError: not an ONNX model; external data, functions, subgraphs, sparse tensors, an
            operator outside `ALLOWED_OPERATORS`, or too many nodes.
    """
    num_nodes = 0
    for number, value in _fields(_graph_of(model)):
        if number == GRAPH_SPARSE:
            raise ModelFileError("the graph holds sparse tensors; refused")
        if number == GRAPH_INITIALIZER:
            _check_tensor(value)
        if number == GRAPH_NODE:
            num_nodes += 1
            _check_node(value)
    if num_nodes > MAX_NODES:
        raise ModelFileError(f"the graph has {num_nodes:,} nodes; at most {MAX_NODES:,} are read")


def _graph_of(model: bytes) -> memoryview:
    graphs = []
    for number, value in _fields(memoryview(model)):
        if number in {MODEL_TRAINING, MODEL_FUNCTIONS}:
            raise ModelFileError("the graph holds functions or training steps; refused")
        if number == MODEL_GRAPH:
            graphs.append(value)
    # Protobuf merges repeated messages: with two graphs, what is checked is not what would run.
    if len(graphs) != 1 or isinstance(graphs[0], int):
        raise ModelFileError(f"it must hold one ONNX graph; got {len(graphs)}")
    return graphs[0]


def _check_node(node: memoryview | int) -> None:
    operator = domain = b""
    for number, value in _fields(node):
        if number == NODE_OPERATOR:
            operator = _bytes(value)
        elif number == NODE_DOMAIN:
            domain = _bytes(value)
        elif number == NODE_ATTRIBUTE:
            _check_attribute(value)
    name = operator.decode(errors="replace")
    if domain not in {b"", b"ai.onnx"} or name not in ALLOWED_OPERATORS:
        where = domain.decode(errors="replace") or "ai.onnx"
        raise ModelFileError(f"the graph uses the operator {where}:{name[:60]!r}, which is refused")


def _check_attribute(attribute: memoryview | int) -> None:
    for number, value in _fields(attribute):
        if number in ATTRIBUTE_SUBGRAPHS:
            raise ModelFileError("the graph holds subgraphs or sparse tensors; refused")
        if number in {ATTRIBUTE_TENSOR, ATTRIBUTE_TENSORS}:
            _check_tensor(value)


def _check_tensor(tensor: memoryview | int) -> None:
    for number, value in _fields(tensor):
        if number == TENSOR_EXTERNAL or (number == TENSOR_LOCATION and value != 0):
            raise ModelFileError("the graph keeps weights in another file; refused")


def _bytes(value: memoryview | int) -> bytes:
    if isinstance(value, int):
        raise ModelFileError("the ONNX graph is damaged: a number stands where text should")
    return bytes(value[:256])


def _fields(message: memoryview | int) -> Iterator[tuple[int, memoryview | int]]:
    """Yield (field number, value) of one protobuf message; nothing is copied."""
    if isinstance(message, int):
        raise ModelFileError("the ONNX graph is damaged: a number stands where a message should")
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if kind == BYTES:
            length, position = _varint(message, position)
        elif kind in {FIXED32, FIXED64}:
            length = 4 if kind == FIXED32 else 8
        else:
            raise ModelFileError("the ONNX graph is damaged: unknown wire type")
        if position + length > len(message):
            raise ModelFileError("the ONNX graph is damaged: it ends too early")
        yield number, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise ModelFileError("the ONNX graph is damaged: it ends too early")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ModelFileError("the ONNX graph is damaged: a number is too long")
