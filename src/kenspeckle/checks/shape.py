"""Findings on the shape of the data: how many of which class, how large, and of what colour."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kenspeckle.checks import Subject
from kenspeckle.core import printable
from kenspeckle.findings import Case, Finding

__all__ = ["class_counts", "shape_facts", "shape_findings"]

_IMBALANCED = 3.0  # largest class over smallest: from here on accuracy hides the small one
_GRAVELY_IMBALANCED = 10.0
_FEW = 20  # pictures of a class, of which three or so are tested
_LARGE_CROP_LOSS = 0.25  # of a picture that a centre crop leaves out


def class_counts(subject: Subject) -> dict[str, tuple[int, ...]]:
    """Return the pictures of every class in each given split; under ``all`` without one."""
    dataset = subject.dataset
    parts = np.array([item.split or "all" for item in dataset.items])
    labelled = dataset.labels >= 0
    if not len(parts):
        return {"all": (0,) * len(dataset.classes)}
    return {
        part: tuple(
            np.bincount(
                dataset.labels[(parts == part) & labelled], minlength=len(dataset.classes)
            ).tolist()
        )
        for part in ("all", "train", "validation", "test")
        if (parts == part).any()
    }


def shape_facts(subject: Subject) -> dict[str, str]:
    """Return sizes, formats and colour in words, by name."""
    survey, traits = subject.survey, subject.survey.traits
    height, width = traits.height, traits.width
    if not len(height):
        return {}
    facts = {
        "height, pixels": _spread(height),
        "width, pixels": _spread(width),
        "width : height": _spread(np.round(width / height, 2)),
        "file size, kB": _spread(np.round(traits.num_bytes / 1000, 1)),
        "formats": _shares([survey.formats[code] for code in traits.format]),
        "pixel modes": _shares([survey.modes[code] for code in traits.mode]),
        "grey pictures": f"{100 * _grey(subject).mean():.3g} %",
        "left out by a centre crop": f"{100 * _crop_loss(subject).mean():.3g} % on average",
    }
    quality = traits.quality
    if (quality > 0).any():
        facts["JPEG quality"] = _spread(quality[quality > 0])
    cameras = [survey.cameras[code] for code in traits.camera]
    if any(cameras):
        facts["cameras"] = _shares([camera or "not stated" for camera in cameras])
    return facts


def shape_findings(subject: Subject) -> Iterator[Finding]:
    """Yield what is uneven: classes, aspect ratios, colour."""
    yield from _imbalance(subject)
    yield from _crop(subject)
    yield from _colour(subject)


def _imbalance(subject: Subject) -> Iterator[Finding]:
    dataset = subject.dataset
    labels = dataset.labels[dataset.labels >= 0]
    counts = np.bincount(labels, minlength=len(dataset.classes))
    few = [k for k in np.argsort(counts, kind="stable") if counts[k] < _FEW]
    if few:
        words = ", ".join(f"'{printable(dataset.classes[k])}' {counts[k]:,}" for k in few[:5])
        yield Finding(
            kind="few-pictures",
            severity="warning",
            title=f"{len(few):,} class{'es have' if len(few) > 1 else ' has'} fewer than {_FEW} "
            f"pictures: {words}{' …' if len(few) > 5 else ''}.",
            why="Nothing reliable can be learnt from so few, and their own figures say nothing.",
            remedy="Add pictures, or merge or leave out these classes.",
            training="learns from what there is.",
            num_pictures=int(counts[few].sum()),
        )
    present = counts[counts > 0]
    if len(present) < 2:
        return
    ratio = float(present.max() / present.min())
    if ratio >= _IMBALANCED:
        large = int(counts.argmax())
        small = int(np.where(counts > 0, counts, counts.max()).argmin())
        yield Finding(
            kind="imbalance",
            severity="warning" if ratio >= _GRAVELY_IMBALANCED else "note",
            title=f"Classes are uneven, {ratio:.3g} : 1: '{printable(dataset.classes[large])}' has "
            f"{counts[large]:,} pictures, '{printable(dataset.classes[small])}' {counts[small]:,}.",
            why=f"Always saying '{printable(dataset.classes[large])}' would be right on "
            f"{100 * counts[large] / counts.sum():.3g} %: accuracy hides how the small classes do.",
            remedy="Read the balanced accuracy and the recall of each class; add pictures of the "
            "small ones, or train with --set imbalance=weights.",
            training="looks for a remedy by cross-validation where it is planned; a recipe does "
            "what its imbalance says. The balanced accuracy is reported too.",
            num_pictures=int(counts.sum()),
        )


def _crop_loss(subject: Subject) -> NDArray[np.float64]:
    """Return the share of each picture that a square cut from its centre leaves out."""
    traits = subject.survey.traits
    short, long = np.minimum(traits.height, traits.width), np.maximum(traits.height, traits.width)
    return 1 - short / np.maximum(long, 1)


def _crop(subject: Subject) -> Iterator[Finding]:
    loss = _crop_loss(subject)
    cut = np.flatnonzero(loss > _LARGE_CROP_LOSS)
    if not len(cut):
        return
    worst = cut[np.argsort(-loss[cut], kind="stable")]
    yield Finding(
        kind="crop-loss",
        severity="note",
        title=f"A centre crop would leave out more than a quarter of {len(cut):,} pictures "
        f"({100 * len(cut) / len(loss):.3g} %).",
        why="What is to be recognised may lie near the edge of a tall or wide picture.",
        remedy="Choose what suits the pictures with --set fit=squash, pad or crop; below is what a "
        "crop would leave out of each.",
        training="squashes to the network's size, which leaves nothing out but changes the shape.",
        num_pictures=len(cut),
        cases=tuple(
            Case(
                subject.exhibits([i]),
                f"{subject.survey.traits.height[i]}x{subject.survey.traits.width[i]}: "
                f"{100 * loss[i]:.0f} % left out",
                float(loss[i]),
            )
            for i in worst
        ),
    )


def _grey(subject: Subject) -> NDArray[np.bool_]:
    """Return whether each picture is without colour; a few levels are what JPEG leaves."""
    sketches = subject.survey.traits.sketches
    grey = np.zeros(len(sketches), bool)
    for start in range(0, len(sketches), 4096):
        some = sketches[start : start + 4096].astype(np.int16)
        grey[start : start + 4096] = (some.max(axis=3) - some.min(axis=3)).max(axis=(1, 2)) <= 6
    return grey


def _colour(subject: Subject) -> Iterator[Finding]:
    grey = _grey(subject)
    if not len(grey):
        return
    rare, name = (grey, "grey") if grey.mean() < 0.5 else (~grey, "in colour")
    if not rare.any():
        return
    found = np.flatnonzero(rare)
    yield Finding(
        kind="mixed-colour",
        severity="note",
        title=f"{len(found):,} of {len(grey):,} pictures {'is' if len(found) == 1 else 'are'} "
        f"{name}, unlike the others.",
        why="If colour goes with the class or the source, it is learnt instead of the thing.",
        remedy="Look whether they are of one class or source.",
        training="reads all as RGB.",
        num_pictures=len(found),
        cases=tuple(Case(subject.exhibits([i])) for i in found),
    )


def _spread(values: NDArray[np.generic]) -> str:
    low, middle, high = (f"{v:g}" for v in np.quantile(values.astype(np.float64), (0, 0.5, 1)))
    return low if low == high else f"{low} to {high}, median {middle}"


def _shares(words: list[str]) -> str:
    counts = Counter(words)
    shown = [f"{word} {100 * num / len(words):.3g} %" for word, num in counts.most_common(6)]
    return ", ".join(shown) + (f" and {len(counts) - 6} more" if len(counts) > 6 else "")
