"""A graph that could reach beyond its own bytes is refused before a runtime sees it."""

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from kenspeckle.core import ModelFileError
from kenspeckle.graphs import check_graph


def model(*nodes, initializers=(), functions=()):
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
        initializer=list(initializers),
    )
    return helper.make_model(graph, functions=list(functions))


RELU = helper.make_node("Relu", ["x"], ["y"])


def test_a_plain_graph_passes():
    weights = numpy_helper.from_array(np.ones(3, np.float32), "w")
    check_graph(model(RELU, initializers=[weights]).SerializeToString())


def external(name="w"):
    tensor = numpy_helper.from_array(np.ones(3, np.float32), name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    return tensor


def subgraph():
    inner = helper.make_graph([RELU], "inner", [], [])
    return helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)


@pytest.mark.parametrize(
    ("hostile", "words"),
    [
        (lambda: model(RELU, initializers=[external()]), "another file"),
        (lambda: model(helper.make_node("Constant", [], ["y"], value=external())), "another file"),
        (lambda: model(helper.make_node("Tile", ["x", "r"], ["y"])), "Tile"),
        (lambda: model(helper.make_node("Expand", ["x", "r"], ["y"])), "Expand"),
        (lambda: model(helper.make_node("Relu", ["x"], ["y"], domain="com.evil")), r"com\.evil"),
        (lambda: model(subgraph()), "If|subgraphs"),
        (
            lambda: model(
                RELU,
                functions=[helper.make_function("f", "F", ["x"], ["y"], [RELU], [])],
            ),
            "functions",
        ),
    ],
)
def test_hostile_graphs_are_refused(hostile, words):
    with pytest.raises(ModelFileError, match=words):
        check_graph(hostile().SerializeToString())


def test_two_graphs_in_one_message_are_refused():
    data = model(RELU).SerializeToString()
    with pytest.raises(ModelFileError, match="one ONNX graph"):
        check_graph(data + data)


@given(st.binary(max_size=200))
def test_any_bytes_pass_or_are_refused(data):
    try:
        check_graph(data)
    except ModelFileError:
        return
    assert onnx.ModelProto.FromString(data).graph.node is not None


@given(st.integers(0, 10_000), st.integers(0, 7))
def test_a_flipped_bit_never_crashes_the_reader(place, bit):
    data = bytearray(model(RELU, initializers=[external()]).SerializeToString())
    data[place % len(data)] ^= 1 << bit
    try:
        check_graph(bytes(data))
    except ModelFileError as error:
        assert str(error)  # noqa: PT017 - refusing is as good as passing; crashing is not
