"""From a trained network to the members of a model file, which must answer alike.

The graph holds everything between a prepared `uint8` picture and the calibrated probabilities, so
no runtime can normalise differently. A graph that disagrees with the network is refused.
"""

import io
import json
import logging
import warnings
from collections.abc import Mapping

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kenspeckle.core import Geometry, ModelFileError, Normalisation, Pixels
from kenspeckle.images import prepare
from kenspeckle.layers import Classifier, normalise
from kenspeckle.prediction import TOLERANCE, Model
from kenspeckle.references import reference_pictures

__all__ = ["Deployed", "check_parity", "reference_members", "to_onnx", "to_safetensors"]

OUTPUT_NAMES = ("logits", "probabilities", "embedding", "features")


class Deployed(nn.Module):
    """A network with all that stands before and after it: `uint8` pictures in, probabilities out.

    Args:
        network: the classifier.
        normalisation: the map from grey levels to inputs.
        temperature: what the logits are divided by before the softmax.
    """

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


def to_onnx(deployed: Deployed, geometry: Geometry) -> bytes:
    """Return the network as a serialised ONNX model whose batch size is free.

    Raises:
        ModelFileError: the exporter cannot express the network.
    """
    import onnx

    deployed = deployed.to("cpu").eval()
    height, width = geometry.size
    example = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)  # it warns that torchvision is missing; nothing needs it
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own use of its own old names
            warnings.simplefilter("ignore", DeprecationWarning)
            program = torch.onnx.export(
                deployed,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("n")},),
                input_names=["images"],
                output_names=list(OUTPUT_NAMES),
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
    buffer = io.BytesIO()
    onnx.save_model(graph, buffer)
    return buffer.getvalue()


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
