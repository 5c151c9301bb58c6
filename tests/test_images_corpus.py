"""Odd, hostile and broken files, each judged in another process that may hang or die.

The parent feeds one file at a time; the child answers with one line of JSON: verdict, seconds and
growth of its peak memory. Run as a script, this file is the child.
"""

import csv
import io
import json
import re
import select
import struct
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from kenspeckle.core import Geometry, ImageError
from kenspeckle.images import decode, prepare

CORPORA = Path(__file__).parents[2] / "shared" / "corpora"
MAX_SECONDS = 10.0
MAX_GROWTH_MB = 384.0


def judge_from_stdin() -> None:
    while header := sys.stdin.buffer.readline():
        name, size = json.loads(header)
        data = sys.stdin.buffer.read(size)
        print(json.dumps(judge(name, data)), flush=True)  # noqa: T201 - the protocol


def judge(name: str, data: bytes) -> dict[str, Any]:
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak becomes the present size
    before = memory_mb("VmRSS")
    start = time.perf_counter()
    try:
        picture = prepare(data, name, Geometry((224, 224)))
        verdict = "ok" if picture.shape == (224, 224, 3) and picture.dtype == np.uint8 else "odd"
    except ImageError as error:
        verdict = error.reason
    seconds = time.perf_counter() - start
    return {"verdict": verdict, "seconds": seconds, "growth_mb": memory_mb("VmHWM") - before}


def memory_mb(field: str) -> float:
    status = Path("/proc/self/status").read_text("ascii")
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


class Judge:
    """A child process that is killed and replaced when it does not answer."""

    def __init__(self, script: tuple[str, ...] = (__file__,), seconds: float = MAX_SECONDS) -> None:
        self.script, self.seconds = script, seconds

    def __enter__(self) -> "Judge":
        self.start()
        return self

    def start(self) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-W", "error", *self.script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libtiff writes there
        )

    def __call__(self, name: str, data: bytes) -> dict[str, Any]:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(json.dumps([name, len(data)]).encode() + b"\n" + data)
        self.child.stdin.flush()
        ready, _, _ = select.select([self.child.stdout], [], [], self.seconds)
        answer = self.child.stdout.readline() if ready else b""
        if answer:
            return dict(json.loads(answer))
        self.__exit__()
        self.start()
        return {"verdict": "crashed" if ready else "hung", "seconds": 0.0, "growth_mb": 0.0}

    def __exit__(self, *_: object) -> None:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.kill()
        self.child.stdin.close()
        self.child.stdout.close()
        self.child.wait()


@pytest.fixture(scope="module")
def corpus() -> dict[str, bytes]:
    if not CORPORA.is_dir():
        pytest.skip("needs shared/corpora")
    with zipfile.ZipFile(CORPORA / "odd_images.zip") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def manifest(corpus) -> dict[str, dict[str, str]]:
    with (CORPORA / "odd_images.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    assert rows.keys() == corpus.keys()
    return rows


@pytest.fixture(scope="module")
def answers(corpus) -> dict[str, dict[str, Any]]:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's account of memory")
    with Judge() as child:
        return {name: child(name, data) for name, data in corpus.items()}


@pytest.mark.parametrize(
    ("what", "seconds", "verdict"),
    [("time.sleep(60)", 0.3, "hung"), ("os._exit(1)", 20, "crashed")],
)
def test_the_judge_reports_hangs_and_crashes(what, seconds, verdict):
    script = ("-S", "-c", f"import os, sys, time; sys.stdin.readline(); {what}")
    with Judge(script, seconds) as child:
        assert child("first", b"")["verdict"] == verdict
        assert child("second", b"")["verdict"] == verdict


def test_every_file_gives_a_picture_or_an_error_in_time_and_memory(answers):
    assert len(answers) == 1008
    bad = {
        name: answer
        for name, answer in answers.items()
        if answer["verdict"] in {"hung", "crashed", "odd"}
        or answer["seconds"] > MAX_SECONDS
        or answer["growth_mb"] > MAX_GROWTH_MB
    }
    assert bad == {}


def test_reasons_are_one_line_without_the_name(answers):
    reasons = {name: answer["verdict"] for name, answer in answers.items()}
    assert [r for n, r in reasons.items() if "\n" in r or n in r or not 2 <= len(r) < 250] == []


def test_verdicts_are_those_of_pillow_but_for_what_is_named_here(answers, manifest, corpus):
    opened: set[str] = set()
    refused: set[str] = set()
    for name, row in manifest.items():
        is_ok = answers[name]["verdict"] == "ok"
        if is_ok != (row["pillow_verdict"] == "ok"):
            (opened if is_ok else refused).add(name)
    netpbm = {name for name in opened if re.match(rb"P[1-6f]\s", corpus[name])}
    assert len(netpbm) == 10  # not allowed when the manifest was taken
    # Grey with premultiplied alpha, which Pillow converts in two steps only.
    assert opened - netpbm == {"strongcourage/0973.tiff"}
    # A page of 35 million pixels, over our cap.
    assert refused == {"imagetestsuite/0478.tif"}
    assert answers["imagetestsuite/0478.tif"]["verdict"].startswith("too many pixels")


def test_jpeg_pixels_are_those_of_pillow(answers, manifest, corpus):
    names = [
        name
        for name, row in manifest.items()
        if row["format"] in {"JPEG", "MPO"} and answers[name]["verdict"] == "ok"
    ]
    assert len(names) > 60
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(corpus[name]), formats=["JPEG"]) as image:
                expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        np.testing.assert_array_equal(decode(corpus[name], name), expected, err_msg=name)


def png(width: int, height: int, bits: int, colour: int, row: bytes) -> bytes:
    """Return a whole PNG file whose rows are all the same, made without holding the picture."""
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(b"\0" + row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    )


def flat_jpeg(width: int, height: int, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height), 99).save(file, "JPEG", **options)
    return file.getvalue()


def huge_webp(height: int, width: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "WEBP", lossless=True)
    data = bytearray(file.getvalue())
    assert data[12:16] == b"VP8L"
    assert data[20] == 0x2F
    (bits,) = struct.unpack_from("<I", data, 21)  # two sides of 14 bits, less one, then flags
    struct.pack_into("<I", data, 21, bits >> 28 << 28 | (height - 1) << 14 | (width - 1))
    return bytes(data)


def header_bombs() -> dict[str, bytes]:
    """Return files that announce a huge picture; none of them has to be decoded to be refused."""
    one_bit = png(30_000, 30_000, 1, 0, bytes(3750))
    assert len(one_bit) < 200_000
    tags = [(256, 30_000), (257, 30_000), (258, 8), (259, 5), (262, 1), (273, 8), (277, 1)]
    tags += [(278, 30_000), (279, 100)]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return {
        "one-bit.png": one_bit,
        "grey.png": png(9400, 9400, 8, 0, bytes(9400)),
        "progressive.jpg": flat_jpeg(8000, 8000, progressive=True),
        "screen.gif": b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\x80\0\0" + bytes(6)
        + b"," + struct.pack("<HHHH", 0, 0, 65_535, 65_535) + b"\0\x02\x02\x44\x01\0;",
        "frame.gif": b"GIF89a" + struct.pack("<HH", 8, 8) + b"\x80\0\0" + bytes(6)
        + b"," + struct.pack("<HHHH", 0, 0, 9_000, 9_000) + b"\0\x02\x02\x44\x01\0;",
        "lossless.webp": huge_webp(9_000, 10_000),
        "lines.bmp": b"BM" + struct.pack("<IHHI", 1000, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 60_000, 60_000, 1, 24, 0, 0, 1, 1, 0, 0) + bytes(900),
        "strips.tif": b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + bytes(104),
        "raw.pgm": b"P5 90000 90000 255\n" + bytes(100),
        "plain.ppm": b"P3 4000 4000 255\n" + b"1 " * 100,
        "long.png": png(70_000, 1, 8, 0, bytes(70_000)),
    }  # fmt: skip


@pytest.fixture(scope="module")
def bomb_answers() -> dict[str, dict[str, Any]]:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's account of memory")
    with Judge() as child:
        child("warm-up", flat_jpeg(8, 8))
        return {name: child(name, data) for name, data in header_bombs().items()}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("one-bit.png", "too many pixels: 30000 x 30000 = 900,000,000"),
        ("grey.png", "too many pixels: 9400 x 9400 = 88,360,000"),
        ("progressive.jpg", "too many pixels: 8000 x 8000 = 64,000,000"),
        ("screen.gif", "too many pixels"),
        ("frame.gif", "too many pixels: 9000 x 9000"),
        ("lossless.webp", "too many pixels: 9000 x 10000"),
        ("lines.bmp", "too many pixels"),
        ("strips.tif", "too many pixels: 30000 x 30000"),
        ("raw.pgm", "too many pixels"),
        ("plain.ppm", "48,000,000 samples in a slow variant of PPM"),
        ("long.png", "1 x 70000 pixels; no side may exceed 65,535"),
    ],
)
def test_bombs_are_refused_before_memory_is_taken(bomb_answers, name, reason):
    answer = bomb_answers[name]
    assert answer["verdict"].startswith(reason)
    assert answer["seconds"] < 0.5
    assert answer["growth_mb"] < 64


def test_a_69_megapixel_baseline_jpeg_is_decoded_in_little_memory():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's account of memory")
    data = flat_jpeg(8146, 8500)
    with Judge() as child:
        child("warm-up", flat_jpeg(8, 8))
        answer = child("scan.jpg", data)
    assert answer["verdict"] == "ok"
    assert answer["growth_mb"] < 64
    assert answer["seconds"] < 5


if __name__ == "__main__":
    judge_from_stdin()
