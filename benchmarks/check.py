"""What `ken check` finds of what was planted, and how long it takes.

    python benchmarks/check.py SHARED_DATA

SHARED_DATA holds flowers.zip, objects.zip and cifar10-train.zip. Everything is planted in copies.

Prints, for 2,000 clean pictures (flowers, then CIFAR-10; what the check calls a copy among them is
left out first): the share of planted exact, re-encoded, resized, brightened and trimmed copies that
are found, and the share of clean pictures that are called a copy; how often a corner mark on one
class is found; the accuracy of a linear head on a test part of which a fifth leaks, as given and
without the leaks, beside that of the clean test part; the accuracy with corrupt files skipped and
with the same files removed; the time and memory of the check of 50,000 pictures, without labels,
cold and warm, in a process of its own.
"""

import argparse
import io
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from kenspeckle import health
from kenspeckle.checks.copies import leaked
from kenspeckle.fit import Finished, Options, fit
from kenspeckle.heads import head_answers
from kenspeckle.images import Limits, decode
from kenspeckle.pixels import Cache
from kenspeckle.recipes import named
from kenspeckle.settings import with_settings
from kenspeckle.sources import Dataset, open_dataset

NUM_CLEAN, NUM_PLANTED = 2_000, 300


def encoded(image: Image.Image, quality: int) -> Image.Image:
    """Return a picture after a trip through JPEG."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def scaled(image: Image.Image, factor: float) -> Image.Image:
    """Return a picture resized."""
    return image.resize((round(image.width * factor), round(image.height * factor)))


def trimmed(image: Image.Image, share: float) -> Image.Image:
    """Return a picture without `share` of each side."""
    x, y = max(1, round(share * image.width)), max(1, round(share * image.height))
    return image.crop((x, y, image.width - x, image.height - y))


CHANGES = {
    "exact": lambda image: image,
    "JPEG 30": lambda image: encoded(image, 30),
    "JPEG 60": lambda image: encoded(image, 60),
    "JPEG 90": lambda image: encoded(image, 90),
    "half size": lambda image: scaled(image, 0.5),
    "3/4 size": lambda image: scaled(image, 0.75),
    "1.5 size": lambda image: scaled(image, 1.5),
    "20 % brighter": lambda image: image.point(lambda level: min(255, round(1.2 * level))),
    "2 % trimmed": lambda image: trimmed(image, 0.02),
    "5 % trimmed": lambda image: trimmed(image, 0.05),
}


def checked(dataset: Dataset, cache: Path, *, labels: bool = False) -> health.Examined:
    """Return a data set after its check."""
    work = health.examine(dataset, Limits(), Cache(cache), labels=labels)
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def clean_pictures(data: Path, scratch: Path) -> list[tuple[str, Image.Image]]:
    """Return pictures with their classes, none of which the check calls a copy of another."""
    dataset = open_dataset(data)
    chosen = np.random.default_rng(0).permutation(len(dataset.items))[: NUM_CLEAN + 400]
    subset = dataset.subset(sorted(chosen.tolist()))
    together = checked(subset, scratch).subject.copies.together
    alone = np.flatnonzero(np.bincount(together, minlength=len(together))[together] == 1)
    print(
        f"{data.stem}: {1 - len(alone) / len(together):.1%} of {len(together):,} pictures, before"
    )
    print("  anything is planted, are called a copy of another and left out")
    pictures = []
    for index in alone[:NUM_CLEAN].tolist():
        item = subset.items[index]
        source = subset.reader.read(index)
        if isinstance(source, bytes) and item.label is not None:
            image = Image.fromarray(decode(source, item.name))
            pictures.append((subset.classes[item.label], image))
    return pictures


def write(folder: Path, pictures: list[tuple[str, Image.Image]], prefix: str) -> None:
    """Write pictures as PNG files, one folder a class."""
    for number, (label, image) in enumerate(pictures):
        path = folder / label / f"{prefix}{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def copies(data: Path) -> None:
    """Print the share of planted copies that are found, and of clean pictures called copies."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        pictures = clean_pictures(data, scratch / "cache")
        print(f"{data.stem}: {len(pictures):,} clean pictures, {NUM_PLANTED} copies of each kind")
        chosen = np.random.default_rng(1).permutation(len(pictures))[:NUM_PLANTED].tolist()
        for change, function in CHANGES.items():
            folder = scratch / change.replace("/", "-")
            write(folder, pictures, "clean")
            planted = [(pictures[i][0], function(pictures[i][1])) for i in chosen]
            write(folder, planted, "copy")
            found = checked(open_dataset(folder), scratch / "cache")
            items, together = found.subject.dataset.items, found.subject.copies.together
            number = {item.name: group for item, group in zip(items, together, strict=True)}
            hits = sum(
                number[f"{label}/copy{place:05d}.png"] == number[f"{label}/clean{i:05d}.png"]
                for place, (i, (label, _)) in enumerate(zip(chosen, planted, strict=True))
            )
            clean = [number[f"{label}/clean{i:05d}.png"] for i, (label, _) in enumerate(pictures)]
            false = len(clean) - len(set(clean))
            print(f"  {change:14} {hits / NUM_PLANTED:6.1%} found, {false / len(clean):.2%} false")


def corner_marks(data: Path) -> None:
    """Print how often a mark in a corner of one class is found, and how often without one."""
    found = {True: 0, False: 0}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        pictures = clean_pictures(data, scratch / "cache")
        classes = sorted({label for label, _ in pictures})
        for trial in range(10):
            rng = np.random.default_rng(trial)
            label, corner = classes[trial % len(classes)], int(rng.integers(4))
            for marked in found:
                folder = scratch / f"{trial}-{marked}"
                some = [
                    (name, mark(image, corner) if marked and name == label else image)
                    for name, image in pictures
                ]
                write(folder, some, "")
                kinds = checked(open_dataset(folder), scratch / "cache").health.findings
                found[marked] += any("corner" in f.title for f in kinds if f.kind == "shortcut")
    print(f"{data.stem}: a corner mark on one class found in {found[True]} of 10 sets, ")
    print(f"  an alarm without one in {found[False]} of 10")


def mark(image: Image.Image, corner: int) -> Image.Image:
    """Return a picture with a white square, a sixteenth of its width, in one corner."""
    side = max(2, image.width // 16)
    x = (image.width - side - 1) if corner % 2 else 1
    y = (image.height - side - 1) if corner // 2 else 1
    marked = image.copy()
    marked.paste((255, 255, 255), (x, y, x + side, y + side))
    return marked


def leaks(data: Path) -> None:
    """Print the accuracy on a clean test part, and on one of which a fifth leaks."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        pictures = clean_pictures(data, scratch / "cache")
        print(f"{data.stem}: a linear head, {len(pictures):,} pictures, a quarter of them tested")
        for seed in range(3):
            order = np.random.default_rng(seed).permutation(len(pictures)).tolist()
            cut = len(order) // 4
            test, train = order[:cut], order[cut:]
            planted = [(pictures[i][0], encoded(pictures[i][1], 60)) for i in train[: cut // 4]]
            said = []
            for kind, extra in (("clean", []), ("leaking", planted)):
                folder = scratch / f"{kind}-{seed}"
                write(folder / "train", [pictures[i] for i in train], "train")
                write(folder / "test", [pictures[i] for i in test], "test")
                write(folder / "test", extra, "leak")
                said.append(
                    accuracies(checked(open_dataset(folder), scratch / "cache", labels=True))
                )
            (clean, _, _), (given, honest, num) = said
            print(f"  clean {clean:.4f}; {num} leaks: {given:.4f} as given, {honest:.4f} without")


def accuracies(found: health.Examined) -> tuple[float, float, int]:
    """Return a linear head's accuracy on the test part, that without leaks, and their number."""
    if found.labelling is None:
        raise SystemExit("the features of the pretrained network are needed")
    dataset = found.subject.dataset
    parts = np.array([item.split for item in dataset.items])
    asked = np.flatnonzero(parts == "test")
    answers = head_answers(
        found.labelling.features,
        dataset.labels,
        np.flatnonzero(parts == "train"),
        asked,
        len(dataset.classes),
    )
    right = answers == dataset.labels[asked]
    fresh = ~np.isin(asked, leaked(found.subject, "test"))
    return float(right.mean()), float(right[fresh].mean()), int((~fresh).sum())


def skipped(data: Path) -> None:
    """Print the test accuracy with corrupt files skipped, and with the same files removed."""
    print(f"{data.stem}: seed-cnn, 2 epochs")
    recipe = with_settings(named("seed-cnn"), ["epochs=2", "size=32"])
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        pictures = clean_pictures(data, scratch / "cache")
        for share in (0.01, 0.05, 0.2):
            told = []
            for kind in ("spoilt", "clean"):
                folder = scratch / f"{kind}-{share}"
                write(folder, pictures, "")
                for path in sorted(folder.rglob("*.png"))[:: round(1 / share)]:
                    if kind == "clean":
                        path.unlink()
                    else:
                        path.write_bytes(path.read_bytes()[:200])
                options = Options(
                    cache=Cache(scratch / "cache"),
                    run_folder=scratch / f"run-{kind}-{share}",
                    on_bad="skip",
                    labels=False,
                )
                out = scratch / f"{kind}-{share}.ken"
                (*_, last) = fit(open_dataset(folder), recipe, out, options, threading.Event())
                told.append(last.report.test.accuracy.value if isinstance(last, Finished) else None)
            print(f"  {share:4.0%} corrupt: {told[0]} with them skipped, {told[1]} without them")


def timed(data: Path, cache: Path, num: int) -> None:
    """Print the time and memory of one check without labels."""
    started = time.perf_counter()
    dataset = open_dataset(data)
    found = checked(dataset.subset(range(0, len(dataset.items), len(dataset.items) // num)), cache)
    seconds = time.perf_counter() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    parts = {check.name: round(check.seconds, 1) for check in found.health.checks if check.ran}
    print(f"  {found.health.num_pictures:,}: {seconds:.1f} s, {memory:.0f} MiB at most; {parts}")


def main() -> None:
    """Plant, check and count."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("data", type=Path, help="the folder of the archives")
    parser.add_argument("--only", choices=PARTS, help="one part of it")
    parser.add_argument("--timed", nargs=2, metavar=("CACHE", "NUM"), help="only one timed check")
    words = parser.parse_args()
    cifar = words.data / "cifar10-train.zip"
    if words.timed:
        timed(cifar, Path(words.timed[0]), int(words.timed[1]))
        return
    for part in [words.only] if words.only else PARTS:
        PARTS[part](words.data)


def time_and_memory(folder: Path) -> None:
    """Print the time and memory of growing checks, each in a process of its own."""
    print("cifar10-train without labels, cold, then warm:", flush=True)
    with tempfile.TemporaryDirectory() as name:
        for num in (12_500, 25_000, 50_000, 50_000):
            command = [sys.executable, __file__, str(folder), "--timed", name, str(num)]
            subprocess.run(command, check=True)


PARTS: dict[str, Callable[[Path], None]] = {
    "copies": lambda folder: copies(folder / "flowers.zip"),
    "copies of CIFAR-10": lambda folder: copies(folder / "cifar10-train.zip"),
    "marks": lambda folder: corner_marks(folder / "flowers.zip"),
    "leaks": lambda folder: leaks(folder / "flowers.zip"),
    "skipped": lambda folder: skipped(folder / "flowers.zip"),
    "time": time_and_memory,
}


if __name__ == "__main__":
    main()
