"""From a trained network to the members of a model file, which must answer alike.

The graph holds everything between a prepared `uint8` picture and the calibrated probabilities, so
no runtime can normalise differently. A graph that disagrees with the network is refused.

Torch's exporter takes seconds for a deep network. One that was trained from a backbone needs none:
its weights take the place of the backbone's in a graph that was exported once (`graft`).
"""

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kenspeckle.core import Geometry, InvalidValueError, ModelFileError, Normalisation, Pixels
from kenspeckle.images import prepare
from kenspeckle.layers import Classifier, normalise
from kenspeckle.prediction import TOLERANCE, Model
from kenspeckle.references import reference_pictures

__all__ = [
    "Deployed",
    "Trunk",
    "check_parity",
    "cut",
    "deployable",
    "fold_norms_",
    "graft",
    "reference_members",
    "to_onnx",
    "to_safetensors",
]


class Deployed(nn.Module):
    """A network with all that stands before and after it: `uint8` pictures in, probabilities out.

    Args:
        network: the classifier.
        normalisation: the map from grey levels to inputs.
        temperature: what the logits are divided by before the softmax.
    """

    output_names = ("logits", "probabilities", "embedding", "features")

    def __init__(
        self, network: Classifier, normalisation: Normalisation, temperature: float
    ) -> None:
        super().__init__()
        self.network = network
        self.normalisation = normalisation
        self.temperature = temperature

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Map ``uint8 (N, H, W, 3)`` to logits, probabilities, embedding and features."""
        inputs = normalise(images, self.normalisation.mean, self.normalisation.deviation)
        features = self.network.features(inputs)
        embedding = self.network.embed(features)
        logits = self.network.classify(embedding)
        return logits, (logits / self.temperature).softmax(dim=1), embedding, features


class Trunk(nn.Module):
    """A network without its last layer: `uint8` pictures in; embedding, features and middle out.

    Args:
        network: the classifier.
        normalisation: the map from grey levels to inputs.
    """

    def __init__(self, network: Classifier, normalisation: Normalisation) -> None:
        super().__init__()
        self.network = network
        self.normalisation = normalisation

    @property
    def output_names(self) -> tuple[str, ...]:
        """What `forward` returns; the middle where the network has a tail."""
        return ("embedding", "features", *(["middle"] if self.network.has_tail else []))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map ``uint8 (N, H, W, 3)`` to embedding, features and, where there is one, middle."""
        inputs = normalise(images, self.normalisation.mean, self.normalisation.deviation)
        if not self.network.has_tail:
            features = self.network.features(inputs)
            return self.network.embed(features), features
        middle = self.network.middle(inputs)
        features = self.network.tail(middle)
        return self.network.embed(features), features, middle


def to_onnx(module: Deployed | Trunk, geometry: Geometry) -> bytes:
    """Return the module as a serialised ONNX model whose batch size is free.

    Raises:
        ModelFileError: the exporter cannot express the network.
    """
    import onnx

    module = module.to("cpu").eval()
    height, width = geometry.size
    example = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)  # it warns that torchvision is missing; nothing needs it
    try:
        with warnings.catch_warnings(), torch.no_grad(), _simplified(module):
            warnings.simplefilter("ignore", FutureWarning)  # torch's own use of its own old names
            warnings.simplefilter("ignore", DeprecationWarning)
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("n")},),
                input_names=["images"],
                output_names=list(module.output_names),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ModelFileError(f"the network cannot be written as ONNX: {error}") from error
    finally:
        exporter_log.setLevel(level)
    if program is None:
        raise ModelFileError("the network cannot be written as ONNX: the exporter gave nothing")
    graph = program.model_proto
    for node in graph.graph.node:  # where the exporter was called from is nobody's business
        del node.metadata_props[:]
        node.doc_string = ""
    del graph.graph.value_info[:]
    _simplify_(graph.graph)
    buffer = io.BytesIO()
    onnx.save_model(graph, buffer)
    return cut(buffer.getvalue(), module.output_names)


def _simplify_(graph: Any) -> None:  # noqa: ANN401 - a protobuf message
    """Say with allowed operators what two refused ones do in networks with a class token.

    `Expand` can ask for any memory, and so can `Gather`: `graphs` refuses both.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        rewrite = {"Expand": _added_to_zeros, "Gather": _sliced}.get(node.op_type)
        nodes += (rewrite(node, constants, graph) if rewrite else None) or [node]
    _keep_(graph.node, nodes)


def _added_to_zeros(node: Any, constants: Mapping[str, Any], graph: Any) -> list[Any]:  # noqa: ANN401
    """Repeat a constant for each picture of the batch: a zero from each picture is added to it."""
    from onnx import TensorProto, helper

    constant = constants.get(node.input[0])
    if constant is None or constant.dims[:1] != [1]:
        return []
    name = f"{node.output[0]}.zeros"
    pixels = _constant_(graph, f"{name}.pixels", np.array([1, 2, 3]))
    others = _constant_(graph, f"{name}.others", np.arange(1, len(constant.dims)))
    factor = _constant_(graph, f"{name}.factor", np.zeros((), np.float32))
    return [
        helper.make_node("Cast", ["images"], [f"{name}.levels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", [f"{name}.levels", pixels], [f"{name}.mean"], keepdims=0),
        helper.make_node("Mul", [f"{name}.mean", factor], [f"{name}.flat"]),
        helper.make_node("Unsqueeze", [f"{name}.flat", others], [name]),
        helper.make_node("Add", [node.input[0], name], list(node.output)),
    ]


def _sliced(node: Any, constants: Mapping[str, Any], graph: Any) -> list[Any]:  # noqa: ANN401
    """Take one entry along an axis, such as the class token, as a slice of length one."""
    from onnx import helper, numpy_helper

    index = constants.get(node.input[1])
    if index is None or len(index.dims):
        return []
    start, name = int(numpy_helper.to_array(index)), f"{node.output[0]}.slice"
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    starts = _constant_(graph, f"{name}.start", np.array([start]))
    ends = _constant_(graph, f"{name}.end", np.array([start + 1 or np.iinfo(np.int64).max]))
    axes = _constant_(graph, f"{name}.axis", np.array([axis]))
    return [
        helper.make_node("Slice", [node.input[0], starts, ends, axes], [name]),
        helper.make_node("Squeeze", [name, axes], list(node.output)),
    ]


def _constant_(graph: Any, name: str, values: NDArray[Any]) -> str:  # noqa: ANN401
    from onnx import numpy_helper

    graph.initializer.append(numpy_helper.from_array(values, name))
    return name


@contextlib.contextmanager
def _simplified(network: nn.Module) -> Iterator[None]:
    """Make layers do what they do in a way that exports well.

    Activations in place take the exporter a third of its time. A pooling to one pixel is a mean;
    of a map with channels last, torch writes it with operators that `graphs` refuses.
    """
    in_place = [module for module in network.modules() if getattr(module, "inplace", False)]
    pools = [module for module in network.modules() if _is_mean(module)]
    for module in in_place:
        module.inplace = False  # type: ignore[assignment]  # the hints know tensors and modules
    for module in pools:
        module.forward = _mean
    try:
        yield
    finally:
        for module in in_place:
            module.inplace = True  # type: ignore[assignment]
        for module in pools:
            del module.forward


def _is_mean(module: nn.Module) -> bool:
    return isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in {1, (1, 1)}


def _mean(maps: Tensor) -> Tensor:
    return maps.mean((2, 3), keepdim=True)


def fold_norms_(network: Classifier, size: tuple[int, int]) -> None:
    """Put each batch norm that follows a convolution into it; the answers stay the same.

    Source: Jacob et al. 2018, section 3.2, arXiv 1712.05877.

    Args:
        network: is set to evaluation.
        size: ``(height, width)`` in pixels of pictures that it takes.
    """
    names = {module: name for name, module in network.named_modules()}
    for convolution, norm in _norms(network.eval(), size).items():
        network.set_submodule(names[convolution], fuse_conv_bn_eval(convolution, norm))
        # timm has a norm with the activation inside: that part stays.
        network.set_submodule(names[norm], getattr(norm, "act", nn.Identity()))


def _norms(network: Classifier, size: tuple[int, int]) -> dict[nn.Conv2d, nn.BatchNorm2d]:
    """Return the batch norm on the map of each convolution that has one, seen on a picture."""
    maps: list[tuple[Tensor, int, nn.Conv2d]] = []
    norms: dict[nn.Conv2d, nn.BatchNorm2d] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            maps.append((output, output._version, module))
        if isinstance(module, nn.BatchNorm2d):
            for made, version, convolution in maps:  # the version tells of changes in place
                if made is inputs[0] and made._version == version:
                    norms[convolution] = module

    hooks = [module.register_forward_hook(note) for module in network.modules()]
    try:
        with torch.no_grad():
            network(torch.zeros(1, 3, *size))
    finally:
        for hook in hooks:
            hook.remove()
    return norms


def deployable(deployed: Deployed, geometry: Geometry, template: bytes | None = None) -> bytes:
    """Return what `to_onnx` does, in a fraction of a second where `graft` can.

    Args:
        deployed: the network with what stands before and after it.
        geometry: of the pictures.
        template: the graph of the backbone that the network was trained from, for the geometry's
            size; None when there is none.

    Raises:
        ModelFileError: the exporter cannot express the network.
    """
    if template is not None:
        # Not every graph of timm's keeps each weight under its name; the exporter can write it.
        with contextlib.suppress(ModelFileError):
            return graft(template, deployed.network, deployed.temperature)
    return to_onnx(deployed, geometry)


def graft(template: bytes, network: Classifier, temperature: float) -> bytes:
    """Return the graph of a trained network from the graph of the backbone that it started from.

    Its weights take the place of the template's, and its last layer, the temperature and the
    softmax are added.

    Args:
        template: of a `Trunk` with the norms folded, as `to_onnx` writes it.
        network: of the template's architecture; what it holds stays as it is.
        temperature: what the logits are divided by before the softmax.

    Returns:
        A serialised ONNX model with the inputs and outputs of a `Deployed`.

    Raises:
        ModelFileError: a weight of one has no counterpart of its shape in the other, because the
            architectures differ or the exporter merged or rearranged weights.
    """
    import onnx

    model = onnx.load_model_from_string(template)
    height, width = (d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:3])
    trained = copy.deepcopy(network).cpu()
    last = trained.last_layer()
    fold_norms_(trained, (height, width))
    weights = {f"{PREFIX}{name}": tensor for name, tensor in _weights(trained, last).items()}
    for initializer in model.graph.initializer:
        if initializer.name.startswith(PREFIX):
            _replace_(initializer, weights.pop(initializer.name, None))
    if weights:
        raise ModelFileError(f"the template must hold every weight; it lacks {next(iter(weights))}")
    _add_classes_(model.graph, last, temperature)
    graph: bytes = model.SerializeToString()
    return graph


PREFIX = "network."
"""Before the name of a weight in a graph: what `Deployed` and `Trunk` call the network."""


def _weights(network: Classifier, last: nn.Linear) -> dict[str, Tensor]:
    """Return what a network holds besides its last layer, by name."""
    (prefix,) = (name for name, module in network.named_modules() if module is last)
    state = network.state_dict().items()
    return {
        name: tensor
        for name, tensor in state
        if tensor.is_floating_point() and name.rpartition(".")[0] != prefix
    }


def _replace_(initializer: Any, weight: Tensor | None) -> None:  # noqa: ANN401 - a protobuf message
    if weight is None or tuple(initializer.dims) != tuple(weight.shape):
        found = "none" if weight is None else f"one of shape {tuple(weight.shape)}"
        raise ModelFileError(
            f"the network must have a weight {initializer.name} of shape "
            f"{tuple(initializer.dims)}; got {found}"
        )
    initializer.raw_data = _little_endian(weight)


def _little_endian(tensor: Tensor) -> bytes:
    return tensor.detach().numpy().astype("<f4").tobytes()


def _add_classes_(graph: Any, last: nn.Linear, temperature: float) -> None:  # noqa: ANN401
    """Add the last layer, the division by the temperature, and the softmax."""
    from onnx import TensorProto, helper

    tensors = {
        "last.weight": last.weight,
        "last.temperature": torch.tensor(temperature, dtype=torch.float32),
    }
    if last.bias is not None:
        tensors["last.bias"] = last.bias
    for name, tensor in tensors.items():
        data = _little_endian(tensor)
        graph.initializer.append(
            helper.make_tensor(name, TensorProto.FLOAT, tensor.shape, data, raw=True)
        )
    inputs = ["embedding", *(name for name in ("last.weight", "last.bias") if name in tensors)]
    graph.node.extend(
        [
            helper.make_node("Gemm", inputs, ["logits"], transB=1),
            helper.make_node("Div", ["logits", "last.temperature"], ["scaled_logits"]),
            helper.make_node("Softmax", ["scaled_logits"], ["probabilities"], axis=1),
        ]
    )
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    rows = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, last.out_features])
        for name in ("logits", "probabilities")
    ]
    known = {output.name: output for output in [*graph.output, *rows]}
    _keep_(graph.output, [known[name] for name in Deployed.output_names])


def cut(graph: bytes, outputs: Sequence[str]) -> bytes:
    """Return the part of an ONNX graph that some of its outputs need.

    Raises:
        InvalidValueError: the graph has no such output.
    """
    import onnx

    model = onnx.load_model_from_string(graph)
    known = {output.name: output for output in model.graph.output}
    for name in outputs:
        if name not in known:
            raise InvalidValueError(f"output must be one of {sorted(known)}; got {name!r}")
    needed, nodes = set(outputs), []
    for node in reversed(model.graph.node):  # ONNX wants each node after those it depends on
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.append(node)
    _keep_(model.graph.node, nodes[::-1])
    _keep_(model.graph.initializer, [t for t in model.graph.initializer if t.name in needed])
    _keep_(model.graph.output, [known[name] for name in outputs])
    part: bytes = model.SerializeToString()
    return part


def _keep_(repeated: Any, kept: Sequence[Any]) -> None:  # noqa: ANN401 - of protobuf messages
    """Set a repeated field to some of its messages."""
    copies = [type(message).FromString(message.SerializeToString()) for message in kept]
    del repeated[:]
    repeated.extend(copies)


def to_safetensors(state: Mapping[str, Tensor]) -> bytes:
    """Return weights as a safetensors file, the same bytes for the same weights."""
    # The format knows no memory layout but the plain one; networks are held channels last.
    return safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in state.items()})


def check_parity(deployed: Deployed, model: Model, pixels: Pixels) -> float:
    """Return the largest difference of a probability between the network and its ONNX graph.

    Raises:
        ModelFileError: they differ by more than `TOLERANCE`, or name different classes.
    """
    with torch.no_grad():
        wanted = deployed.to("cpu").eval()(torch.from_numpy(pixels.copy()))[1].numpy()
    found = model.run(pixels).probabilities
    gap = float(np.abs(found - wanted).max())
    tops = np.take_along_axis(wanted, found.argmax(1)[:, np.newaxis], 1)[:, 0]
    if not (gap <= TOLERANCE and bool((tops >= wanted.max(1) - TOLERANCE).all())):
        raise ModelFileError(
            f"the exported graph differs from the network by {gap:.2g} in a probability; "
            f"at most {TOLERANCE:g} is allowed, so nothing was saved"
        )
    return gap


def reference_members(model: Model) -> Mapping[str, bytes]:
    """Return the generated reference pictures and what the model says of them, as members."""
    pictures = reference_pictures()
    pixels = np.stack(
        [prepare(data, name, model.manifest.geometry) for name, data in pictures.items()]
    )
    rows: NDArray[np.float32] = model.run(pixels).probabilities
    expected = {name: [float(p) for p in row] for name, row in zip(pictures, rows, strict=True)}
    members = {f"reference/{name}": data for name, data in pictures.items()}
    return members | {"reference/expected.json": json.dumps(expected).encode()}
