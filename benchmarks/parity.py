"""Claim: one picture, one answer: training's evaluation, `ken predict` and bare ONNX Runtime agree.

    python benchmarks/parity.py --data DATA

Trains two epochs on DATA/flowers.zip (photographs), then sends 1,000 of its JPEGs three ways: the
cached pixels through torch, the files through `Model.predict`, and the pixels through an ONNX
Runtime session that knows nothing of kenspeckle.
"""

import argparse
import io
import tempfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import safetensors.torch
import torch

from kenspeckle.fit import Options, fit
from kenspeckle.images import prepare
from kenspeckle.layers import normalise
from kenspeckle.models import build
from kenspeckle.pixels import Cache
from kenspeckle.prediction import load
from kenspeckle.recipes import named
from kenspeckle.settings import with_settings
from kenspeckle.sources import open_dataset


def main(data: Path) -> None:
    """Print agreement and the largest difference of a probability."""
    dataset = open_dataset(data / "flowers.zip")
    recipe = with_settings(named("small-cnn"), ["epochs=2"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = Options(cache=Cache(folder / "cache"), run_folder=folder / "run")
        for _ in fit(dataset, recipe, folder / "m.ken", options, threading.Event()):
            pass
        model = load(folder / "m.ken")
        with zipfile.ZipFile(folder / "m.ken") as file:
            members = {n: file.read(n) for n in ("model.onnx", "weights.safetensors")}
    chosen = np.linspace(0, len(dataset.items) - 1, 1000).astype(int)
    sources = [dataset.reader.read(int(i)) for i in chosen]
    assert all(isinstance(source, bytes) for source in sources)
    manifest = model.manifest
    pixels = np.stack([prepare(s, "picture", manifest.geometry) for s in sources])

    network = build(recipe.model, len(model.classes), manifest.geometry.size, torch.Generator())
    network.load_state_dict(safetensors.torch.load(members["weights.safetensors"]))
    network.eval()
    norm = manifest.normalisation
    with torch.no_grad():
        logits = network(normalise(torch.from_numpy(pixels), norm.mean, norm.deviation))
        by_torch = (logits / manifest.temperature).softmax(1).numpy()
    rows = [dict(model.predict(source).ranking) for source in sources]
    by_ken = np.array([[row[name] for name in model.classes] for row in rows])
    session = onnxruntime.InferenceSession(io.BytesIO(members["model.onnx"]).getvalue())
    by_runtime = session.run(["probabilities"], {"images": pixels})[0]

    for name, other in (("ken predict", by_ken), ("bare ONNX Runtime", by_runtime)):
        same = float((other.argmax(1) == by_torch.argmax(1)).mean())
        gap = float(np.abs(other - by_torch).max())
        print(
            f"{name} against torch on 1,000 pictures: top-1 agreement {same:.4f}, largest "
            f"difference of a probability {gap:.2g} (bar 1e-4)"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    main(parser.parse_args().data)
