"""`ken check` on small sets with one planted trouble each, and on none."""

import csv
import hashlib
import json
import signal
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from kenspeckle import checkfiles, health
from kenspeckle.cli import main
from kenspeckle.core import InvalidValueError, MissingExtraError
from kenspeckle.findings import Finding
from kenspeckle.images import Limits
from kenspeckle.pixels import Cache, default_cache_folder
from kenspeckle.sources import Dataset, open_dataset
from kenspeckle.splits import with_groups
from tests.conftest import png
from tests.test_duplicates import scene
from tests.test_files import full_disk  # noqa: F401 - a fixture

CLASSES = ("one", "two")


def examined(data, labels=False, **options):
    dataset = data if isinstance(data, Dataset) else open_dataset(data)
    cache = Cache(default_cache_folder())
    work = health.examine(dataset, Limits(), cache, labels=labels, **options)
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def write(path, image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture
def scenes(tmp_path):
    """Two classes of 30 pictures that nothing tells apart."""
    root = tmp_path / "data"
    for index in range(60):
        write(root / CLASSES[index % 2] / f"{index:02d}.png", scene(index, (48, 48)))
    return root


@pytest.fixture
def many(scenes):
    """So many pictures that a signal comes while they are looked at."""
    for path in list(scenes.rglob("*.png")):
        for copy in range(50):
            path.with_stem(f"{path.stem}-{copy}").hardlink_to(path)
    return scenes


def kinds(found) -> dict[str, Finding]:
    return {finding.kind: finding for finding in found.health.findings}


def names(finding) -> list[list[str]]:
    return [[exhibit.name for exhibit in case.pictures] for case in finding.cases]


def test_nothing_is_found_where_nothing_is_wrong(scenes):
    found = examined(scenes)
    assert found.health.findings == ()
    assert found.health.counts == {"all": (30, 30)}
    assert {check.name for check in found.health.checks if check.ran} >= {
        "files",
        "duplicates and leaks",
        "shortcuts",
    }


def test_exact_duplicates_and_labels_in_conflict(scenes):
    write(scenes / "one" / "again.png", scene(0, (48, 48)))
    write(scenes / "two" / "other.png", scene(2, (48, 48)))
    found = kinds(examined(scenes))
    assert names(found["exact-duplicates"]) == [
        ["one/00.png", "one/again.png"],
        ["one/02.png", "two/other.png"],
    ]
    assert names(found["conflicting-labels"]) == [["one/02.png", "two/other.png"]]
    assert found["conflicting-labels"].severity == "warning"


def test_near_duplicates_stay_together(scenes):
    write(scenes / "one" / "small.png", scene(0, (48, 48)).resize((30, 30)))
    found = examined(scenes)
    assert names(kinds(found)["near-duplicates"]) == [["one/00.png", "one/small.png"]]
    dataset, copies = found.subject.dataset, found.subject.copies
    a, b = (
        i for i, item in enumerate(dataset.items) if item.name in ("one/00.png", "one/small.png")
    )
    assert copies.together[a] == copies.together[b]
    assert len(np.unique(copies.together)) == 60


def test_pictures_that_are_all_alike_can_still_be_split(tmp_path):
    base = np.asarray(scene(0, (48, 48))).astype(int)
    for index in range(120):
        noise = np.random.default_rng(index).integers(-2, 3, base.shape)
        picture = Image.fromarray(np.clip(base + noise, 0, 255).astype(np.uint8))
        write(tmp_path / "data" / CLASSES[index % 2] / f"{index:03d}.png", picture)
    found = examined(tmp_path / "data")
    assert len(np.unique(found.subject.copies.together)) == 120
    assert all(f.severity == "note" for f in found.health.findings if f.kind == "near-duplicates")


@pytest.fixture
def divided(tmp_path):
    """A given split of 40 training and 20 test pictures."""
    root = tmp_path / "data"
    for index in range(60):
        part = "train" if index < 40 else "test"
        write(root / part / CLASSES[index % 2] / f"{index:02d}.png", scene(index, (48, 48)))
    return root


def test_leaks_are_named(divided):
    write(divided / "test" / "one" / "exact.png", scene(0, (48, 48)))
    write(divided / "test" / "two" / "near.png", scene(1, (48, 48)).resize((32, 32)))
    found = examined(divided)
    leaks = kinds(found)["leaks-into-test"]
    assert leaks.title.startswith("2 of 22 test pictures")
    assert names(leaks) == [
        ["test/one/exact.png", "train/one/00.png"],
        ["test/two/near.png", "train/two/01.png"],
    ]


def test_shares_that_differ_are_named(tmp_path):
    for index in range(400):
        part = "train" if index < 300 else "test"
        label = "one" if index % (2 if part == "train" else 10) == 0 else "two"
        write(tmp_path / "data" / part / label / f"{index}.png", scene(index, (24, 24)))
    assert "class-shares" in kinds(examined(tmp_path / "data"))


def test_a_mark_in_a_corner_is_found(tmp_path):
    for index in range(160):
        pixels = np.array(scene(index, (64, 64)))
        if index % 2:
            pixels[1:6, 57:63] = 255
        write(tmp_path / "data" / CLASSES[index % 2] / f"{index}.png", Image.fromarray(pixels))
    found = kinds(examined(tmp_path / "data"))["shortcut"]
    assert "top-right corner" in found.title


def test_imbalance_and_few_pictures(tmp_path):
    for index in range(100):
        label = "one" if index % 20 == 0 else "two"
        write(tmp_path / "data" / label / f"{index}.png", scene(index, (24, 24)))
    found = kinds(examined(tmp_path / "data"))
    assert found["imbalance"].title.startswith("Classes are uneven, 19 : 1")
    assert "'one' 5" in found["few-pictures"].title


def test_what_a_centre_crop_leaves_out(scenes):
    write(scenes / "one" / "tall.png", scene(99, (100, 25)))
    (case,) = kinds(examined(scenes))["crop-loss"].cases
    assert case.words == "100x25: 75 % left out"


def test_odd_files(scenes):
    scene(101, (48, 48)).save(scenes / "one" / "misnamed.png", "JPEG")
    frames = [scene(seed, (48, 48)).convert("P") for seed in (200, 201)]
    frames[0].save(scenes / "two" / "film.gif", save_all=True, append_images=frames[1:])
    (scenes / "one" / "notes.txt").write_text("hello")
    (scenes / "two" / "stray.jpg").write_bytes(b"no picture")
    found = kinds(examined(scenes))
    assert names(found["wrong-endings"]) == [["one/misnamed.png"]]
    assert names(found["several-frames"]) == [["two/film.gif"]]
    assert names(found["ignored-files"]) == [["one/notes.txt"]]
    assert names(found["broken-files"]) == [["two/stray.jpg"]]
    assert found["broken-files"].severity == "error"


def test_each_picture_is_counted_once(scenes):
    (scenes / "one" / "bad.png").write_bytes(b"")
    found = examined(scenes)
    assert found.health.num_pictures == 61
    assert sum(found.health.counts["all"]) + len(found.broken) == 61


def test_nothing_is_altered(scenes, tmp_path):
    (scenes / "one" / "bad.png").write_bytes(b"")

    def state():
        return {
            path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
            for path in scenes.rglob("*.png")
        }

    before = state()
    found = examined(scenes)
    checkfiles.write_health(tmp_path / "out", found, Limits())
    assert state() == before


def test_only_broken_pictures(tmp_path):
    for name in CLASSES:
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "x.png").write_bytes(b"junk")
    found = examined(tmp_path / "data")
    assert kinds(found)["broken-files"].num_pictures == 2
    checkfiles.write_health(tmp_path / "out", found, Limits())


# What is written.

NAUGHTY = [
    "=1+1",
    "+cmd|' /C calc'!A0",
    "-2",
    "@SUM(A1)",
    "'quoted",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "null",
    "مرحبا",
    "\u202eesrever",
    "田中さん",
    "👩\u200d🔬",
    "a\nb",
    "'; DROP TABLE users;--",
    "%s%n",
    "{{7*7}}",
]


def test_naughty_names_come_through_whole(tmp_path):
    root = tmp_path / "data"
    for number, name in enumerate(NAUGHTY):
        folder = root / name.replace("/", "_")
        write(folder / f"{name.replace('/', '_')}.png", scene(number, (24, 24)))
        write(folder / "twin.png", scene(number, (24, 24)))
    found = examined(root)
    out = tmp_path / "out"
    checkfiles.write_health(out, found, Limits())
    plain = json.loads((out / "check.json").read_text())
    told = {
        (exhibit["name"], exhibit["label"])
        for finding in plain["findings"]
        if finding["kind"] == "exact-duplicates"
        for case in finding["cases"]
        for exhibit in case["pictures"]
    }
    dataset = open_dataset(root)
    labels = [dataset.classes[label] for label in dataset.labels]
    wanted = [item.name for item in dataset.items]
    assert told == set(zip(wanted, labels, strict=True))
    page = (out / "check.html").read_text()
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    with (out / "findings.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in rows for cell in row)


def fixes(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_fixes_can_be_edited_and_read_again(scenes, tmp_path, kind):
    write(scenes / "two" / "other.png", scene(2, (48, 48)))
    data = scenes
    if kind == "zip":
        import shutil

        data = shutil.make_archive(str(tmp_path / "packed"), "zip", scenes)
    found = examined(data)
    path = tmp_path / "fixes.csv"
    assert checkfiles.write_fixes(path, found) == 2
    rows = fixes(path)
    assert len(rows) == 61
    assert [row["doubt"] for row in rows[:3]] == ["conflicting-labels", "conflicting-labels", ""]
    again = open_dataset(path)
    assert again.classes == CLASSES
    before, after = found.subject, examined(again).subject
    assert sorted(map(bytes, before.survey.digests)) == sorted(map(bytes, after.survey.digests))


def test_fixes_are_never_written_over(scenes, tmp_path):
    path = tmp_path / "fixes.csv"
    path.write_text("an afternoon of edits")
    with pytest.raises(InvalidValueError, match="exists already"):
        checkfiles.check_fixes(path, open_dataset(scenes))
    with pytest.raises(InvalidValueError, match="must end in"):
        checkfiles.check_fixes(tmp_path / "fixes.txt", open_dataset(scenes))
    with pytest.raises(InvalidValueError, match="members of a ZIP archive"):
        checkfiles.check_fixes(tmp_path / "new.csv", open_dataset("sample"))


# Groups by name.


def test_groups_by_pattern_and_folder(tmp_path):
    for name in ("one/p1-a.png", "one/p1-b.png", "two/p2-a.png", "two/deep/p3-a.png"):
        write(tmp_path / "data" / name, scene(1, (24, 24)))
    dataset = open_dataset(tmp_path / "data")
    by_name = {
        pattern: {item.name: item.group for item in with_groups(dataset, pattern).items}
        for pattern in (r"(p\d)-", "p[13]", "folder")
    }
    assert by_name[r"(p\d)-"] == {
        "one/p1-a.png": "p1",
        "one/p1-b.png": "p1",
        "two/p2-a.png": "p2",
        "two/deep/p3-a.png": "p3",
    }
    assert by_name["p[13]"]["two/p2-a.png"] is None
    assert by_name["folder"]["two/deep/p3-a.png"] == "two/deep"
    for pattern, words in {"(": "regular expression", "zzz": "nothing", ".": "tell"}.items():
        with pytest.raises(InvalidValueError, match=words):
            with_groups(dataset if pattern != "." else dataset.subset([0, 1]), pattern)


# The command.


def ken(capsys, monkeypatch, *words) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["ken", *map(str, words)])
    try:
        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_writes_a_page_and_says_where(scenes, tmp_path, capsys, monkeypatch):
    write(scenes / "two" / "other.png", scene(2, (48, 48)))
    monkeypatch.chdir(tmp_path)
    code, out, err = ken(capsys, monkeypatch, "check", scenes, "--no-labels")
    assert code == 0
    assert "stands under two labels" in out
    (folder,) = (tmp_path / "runs").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "check.html",
        "check.json",
        "findings.csv",
    }
    assert str(folder.name) in out
    assert "looking at every picture" in err


def test_broken_pictures_make_exit_code_1_and_json_is_json(scenes, tmp_path, capsys, monkeypatch):
    (scenes / "one" / "bad.png").write_bytes(b"")
    words = ("check", scenes, "--no-labels", "--json", "--run-folder", tmp_path / "run")
    code, out, err = ken(capsys, monkeypatch, *words)
    assert code == 1
    assert err == ""
    plain = json.loads(out)
    assert plain["findings"][0]["kind"] == "broken-files"
    assert plain == json.loads((tmp_path / "run" / "check.json").read_text())


def test_wrong_usage_is_exit_code_2(scenes, tmp_path, capsys, monkeypatch):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    for words, said in {
        ("nowhere",): "no such folder",
        (scenes, "--run-folder", tmp_path / "used"): "must be new or empty",
        (scenes, "--write-fixes", tmp_path / "x.txt"): "must end in .csv",
        (scenes, "--group", "["): "regular expression",
    }.items():
        code, _, err = ken(capsys, monkeypatch, "check", *words)
        assert (code, said in err) == (2, True), err


def test_stopped_pictures_of_a_png_are_no_traceback(scenes, capsys, monkeypatch, tmp_path):
    whole = png(np.asarray(scene(1)))
    (scenes / "one" / "cut.png").write_bytes(whole[:200])
    code, out, err = ken(
        capsys, monkeypatch, "check", scenes, "--no-labels", "--run-folder", tmp_path / "r"
    )
    assert code == 1
    assert "cut short" in out
    assert "Traceback" not in out + err


def test_a_check_on_a_full_disk_fails_in_one_line(scenes, tmp_path, capsys, monkeypatch, full_disk):  # noqa: F811
    words = ("check", scenes, "--no-labels", "--run-folder", full_disk / "run")
    (full_disk / "ballast").write_bytes(b"x" * 1_040_000)
    code, out, err = ken(capsys, monkeypatch, *words)
    assert code == 1
    assert "No space left" in err
    assert "Traceback" not in out + err
    assert not [path for path in (full_disk / "run").rglob("*") if path.suffix == ".html"]


def under_way(data, where) -> subprocess.Popen[str]:
    """Return a check that has begun to look at pictures."""
    words = [sys.executable, "-m", "kenspeckle", "check", str(data), "--no-labels"]
    process = subprocess.Popen(words, cwd=where, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "looking at every picture" in process.stderr.readline()
    return process


def test_a_kill_costs_nothing(many, tmp_path):
    process = under_way(many, tmp_path)
    process.kill()
    process.communicate(timeout=30)
    assert not list(tmp_path.glob("runs/*/check.html"))
    assert kinds(examined(many)).keys() == {"exact-duplicates"}


def test_an_interrupt_is_no_traceback(many, tmp_path):
    process = under_way(many, tmp_path)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err


def test_an_archive_that_is_a_bomb_is_refused(tmp_path, capsys, monkeypatch):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("one/a.png", "two/b.png"):
            archive.writestr(name, bytes(50_000_000))
    code, _, err = ken(capsys, monkeypatch, "check", path)
    assert code == 1
    assert "bomb.zip" in err
    assert "Traceback" not in err


# With a pretrained network.


def test_labels_are_asked_about_or_the_reason_is_said(scenes, monkeypatch):
    left_out = examined(scenes, labels=False).health.checks
    assert any("--labels asks for it" in check.outcome for check in left_out if not check.ran)
    found = examined(scenes, labels=None)
    assert found.labelling is not None
    assert {check.name for check in found.health.checks if check.ran} >= {
        "features",
        "outliers",
        "wrong labels",
    }
    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)
    without = {check.name: check for check in examined(scenes, labels=None).health.checks}
    assert not without["wrong labels"].ran
    assert "kenspeckle[check]" in without["wrong labels"].outcome
    assert without["outliers"].ran


def test_labels_that_are_asked_for_need_the_network(scenes, monkeypatch):
    monkeypatch.setitem(sys.modules, "kenspeckle.features", None)
    skipped = [check for check in examined(scenes, labels=None).health.checks if not check.ran]
    assert "kenspeckle[train]" in skipped[0].outcome
    with pytest.raises(MissingExtraError, match="train"):
        examined(scenes, labels=True)


def test_a_flipped_label_leads_the_list(tmp_path):
    root = tmp_path / "data"
    for index in range(60):
        shade = (200, 40, 40) if index % 2 else (40, 40, 200)
        picture = Image.blend(scene(index, (48, 48)), Image.new("RGB", (48, 48), shade), 0.7)
        label = index % 2 if index != 7 else 0
        write(root / CLASSES[label] / f"{index:02d}.png", picture)
    suspects = kinds(examined(root, labels=True))["label-suspects"]
    assert names(suspects)[0] == ["one/07.png"]
    assert suspects.cases[0].suggested == "two"
