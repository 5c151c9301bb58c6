"""Claims: an answer without torch starts in a third of the time; `ken --help` is instant.

Baseline: the same network from its safetensors weights, decoded by the same code, through torch.
Whole processes are timed, interleaved; the shortest wall time and the least peak memory count.

    python benchmarks/answering.py

Needs the default environment. Trains a model on the sample first (one epoch).
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kenspeckle.standard import write_sample_pictures

TORCH = """
import json, sys, zipfile
import numpy as np, torch, safetensors.torch
from kenspeckle.core import Geometry
from kenspeckle.images import prepare
from kenspeckle.layers import normalise
from kenspeckle.models import build
from kenspeckle.settings import from_dict
with zipfile.ZipFile(sys.argv[1]) as file:
    manifest = json.loads(file.read("manifest.json"))
    state = safetensors.torch.load(file.read("weights.safetensors"))
size = tuple(manifest["geometry"]["size"])
recipe = from_dict(manifest["recipe"])
network = build(recipe.model, len(manifest["classes"]), size, torch.Generator().manual_seed(0))
network.load_state_dict(state)
network.eval()
pixels = prepare(open(sys.argv[2], "rb").read(), sys.argv[2], Geometry(size))
norm = manifest["normalisation"]
with torch.no_grad():
    images = torch.from_numpy(pixels[None])
    inputs = normalise(images, tuple(norm["mean"]), tuple(norm["deviation"]))
    p = (network(inputs) / manifest["temperature"]).softmax(1)[0]
print(manifest["classes"][int(p.argmax())], float(p.max()))
"""


def cost(command: list[str]) -> tuple[float, float, str]:
    """Return wall seconds, peak memory in MB and the output of one process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return time.perf_counter() - started, usage.ru_maxrss / 1024, out.strip()


def main() -> None:
    """Print the ratios."""
    ken = [sys.executable, "-m", "kenspeckle"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = str(folder / "m.ken")
        (png,) = write_sample_pictures(folder, 1)
        from PIL import Image

        picture = str(folder / "shot.jpg")
        Image.open(png).convert("RGB").resize((640, 480)).save(picture, quality=90)
        words = ["train", "sample", "--out", model, "-q", "--epochs", "1"]
        subprocess.run([*ken, *words, "--run-folder", str(folder / "run")], check=True)
        commands = {
            "ken predict": [*ken, "predict", model, picture],
            "through torch": [sys.executable, "-c", TORCH, model, picture],
            "ken --help": [*ken, "--help"],
            "python -c pass": [sys.executable, "-c", "pass"],
        }
        costs: dict[str, list[tuple[float, float, str]]] = {name: [] for name in commands}
        for _ in range(10):
            for which, command in commands.items():
                costs[which].append(cost(command))
    best = {n: (min(c[0] for c in cs), min(c[1] for c in cs)) for n, cs in costs.items()}
    for name, (seconds, megabytes) in best.items():
        print(f"{name:<15} {seconds:.3f} s  {megabytes:.0f} MB")
    print("answers:", costs["ken predict"][0][2], "|", costs["through torch"][0][2])
    mine, torch = best["ken predict"], best["through torch"]
    print(f"time   {mine[0] / torch[0]:.2f} of torch's (bar 0.35)")
    print(f"memory {mine[1] / torch[1]:.2f} of torch's (bar 0.50)")
    print(f"ken --help {best['ken --help'][0]:.2f} s (bar 0.30)")


if __name__ == "__main__":
    main()
