"""The command: friendly words, right exit codes, one clear line for each bad input."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from kenspeckle import cli
from kenspeckle.recipes import RECIPES
from tests.conftest import CLASSES, is_root, make_folder, picture, png

QUICK = ["--no-labels", "--recipe", "seed-cnn", "--size", "16", "--epochs", "1", "--threads", "1"]
QUICK += ["--set", "channels=4", "--set", "hidden=8", "--set", "batch_size=8"]


@pytest.fixture
def ken(monkeypatch, capsys, tmp_path):
    """Run `ken` in an empty folder; return exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["ken", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run


def one_line(err: str) -> str:
    """Return the one error message; notices may stand before it."""
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    lines = [line for line in lines if not line.endswith(" …")]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


def test_ken_alone_says_what_to_do_first(ken):
    code, out, _ = ken()
    assert code == 0
    assert "ken train sample" in out


@pytest.mark.parametrize("verb", ["train", "evaluate", "predict", "info", "recipes"])
def test_every_verb_has_help_with_an_example(ken, verb):
    code, out, _ = ken(verb, "--help")
    assert code == 0
    assert f"Example:  ken {verb}" in out


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["trian", "x"], "train"),
        (["train", "--epoch", "3", "x"], "--epochs"),
        (["train", "sampel"], "sample"),
        (["train", "sample", "--recipe", "seed-cn"], "seed-cnn"),
        (["train", "sample", "--set", "kernelsize=5"], "kernel_size"),
        (["train", "sample", "--device", "cudda"], "cuda"),
    ],
)
def test_wrong_words_get_the_nearest_right_ones(ken, words, remedy):
    code, _, err = ken(*words)
    assert code == 2
    assert remedy in err


def test_the_main_job_end_to_end(ken, folder, tmp_path):
    code, out, err = ken("train", folder, "--out", "m.ken", *QUICK)
    assert code == 0, err
    assert "note: 42 train, 9 validation, 9 test pictures of 3 classes" in err
    assert "epoch 1/1" in err
    for words in ("m.ken", "report.html", "ken predict", "ken info", "ken evaluate"):
        assert words in out
    (run_folder,) = (tmp_path / "runs").iterdir()
    assert {p.name for p in run_folder.iterdir()} == {
        "best.safetensors",
        "check.html",
        "check.json",
        "findings.csv",
        "log.jsonl",
        "recipe.json",
        "report.html",
        "report.json",
        "split.csv",
    }
    shot = tmp_path / "shot.png"
    shot.write_bytes(png(picture(CLASSES["red"], 5)))
    code, out, _ = ken("predict", "m.ken", shot)
    assert code == 0
    assert out.startswith(str(shot))
    code, out, _ = ken("evaluate", "m.ken", folder)
    assert code == 0
    assert "balanced accuracy" in out
    code, out, _ = ken("info", "m.ken", "--verify")
    assert code == 0
    assert "verified: " in out
    assert "3: blue, green, red" in out


def test_json_of_a_training_is_json(ken, folder):
    code, out, err = ken("train", folder, "--out", "m.ken", "--json", *QUICK)
    assert (code, err) == (0, "")
    plain = json.loads(out)
    assert plain["model"] == "m.ken"
    assert plain["report"]["validation"]["classes"] == ["blue", "green", "red"]
    code, out, err = ken("info", "m.ken", "--json", "--verify")
    assert code == 0
    assert all(entry["agrees"] for entry in json.loads(out)["verification"])


def test_quiet_prints_the_result_only(ken, folder):
    code, out, err = ken("train", folder, "--out", "m.ken", "--quiet", *QUICK)
    assert (code, err) == (0, "")
    assert "m.ken" in out


def test_the_default_name_never_overwrites(ken, folder):
    assert ken("train", folder, "-q", *QUICK)[0] == 0
    assert ken("train", folder, "-q", *QUICK)[0] == 0
    assert Path("colours.ken").exists()
    assert Path("colours-2.ken").exists()


def test_an_existing_model_is_replaced_only_when_told(ken, folder):
    Path("m.ken").write_text("mine")
    code, _, err = ken("train", folder, "--out", "m.ken", *QUICK)
    assert code == 2
    assert "--force" in one_line(err)
    assert Path("m.ken").read_text() == "mine"
    assert ken("train", folder, "--out", "m.ken", "--force", "-q", *QUICK)[0] == 0
    assert Path("m.ken").stat().st_size > 1000


def test_a_recipe_that_was_written_runs_again_to_the_same_weights(ken, folder):
    first = json.loads(ken("train", folder, "--out", "a.ken", "--json", *QUICK)[1])
    recipe = Path(first["run_folder"]) / "recipe.json"
    words = ("--out", "b.ken", "--json", "--threads", "1")
    second = json.loads(ken("train", folder, "--recipe", recipe, *words)[1])
    key = "weights_sha256"
    assert first["report"]["provenance"][key] == second["report"]["provenance"][key]
    assert first["report"]["test"] == second["report"]["test"]


@pytest.mark.parametrize(
    ("flag", "changes"),
    [
        (["--seed", "1"], "weights_sha256"),
        (["--set", "lr=0.5"], "weights_sha256"),
        (["--no-thumbnails"], None),
    ],
)
def test_flags_change_the_outcome(ken, folder, flag, changes):
    plain = json.loads(ken("train", folder, "--out", "a.ken", "--json", *QUICK)[1])["report"]
    other = json.loads(ken("train", folder, "--out", "b.ken", "--json", *QUICK, *flag)[1])["report"]
    if changes:
        assert plain["provenance"][changes] != other["provenance"][changes]
    else:
        assert any(mistake["picture"] for mistake in plain["mistakes"])
        assert not any(mistake["picture"] for mistake in other["mistakes"])


def test_cache_flags(ken, folder, tmp_path):
    assert ken("train", folder, "-q", *QUICK, "--cache-dir", "here")[0] == 0
    assert list((tmp_path / "here" / "pixels").iterdir())
    code, *_ = ken("train", folder, "-q", *QUICK, "--cache-dir", "there", "--cache-limit", "0")
    assert code == 0
    assert not list((tmp_path / "there").glob("pixels/*"))


# Bad input: one clear line, the right exit code, nothing written half.


def with_file(root: Path, name: str, data: bytes) -> Path:
    """Return a good folder of pictures with one file changed or added."""
    make_folder(root / "data", 5)
    (root / "data" / name).write_bytes(data)
    return root / "data"


def a_file(root: Path, name: str, data: bytes) -> Path:
    """Return a file with the given content."""
    (root / name).write_bytes(data)
    return root / name


def a_zip(root: Path, name: str, entry: zipfile.ZipInfo, data: bytes) -> Path:
    """Return a ZIP archive with one member."""
    with zipfile.ZipFile(root / name, "w") as archive:
        archive.writestr(entry, data)
    return root / name


def a_link() -> zipfile.ZipInfo:
    """Return a member that is a symbolic link."""
    entry = zipfile.ZipInfo("a/link.png")
    entry.external_attr = 0o120777 << 16
    return entry


def an_empty_folder(root: Path) -> Path:
    """Return a folder without files."""
    (root / "empty").mkdir()
    return root / "empty"


BAD_DATA = {
    "missing": (lambda root: root / "missing", 2),
    "empty": (an_empty_folder, 1),
    "only": (lambda root: make_folder(root / "data", 5, {"only": (1, 2, 3)}), 1),
    "red/notes.jpg": (lambda root: with_file(root, "red/notes.jpg", b"buy milk"), 1),
    "red/000.png": (
        lambda root: with_file(root, "red/000.png", png(picture((9, 9, 9), 1))[:99]),
        1,
    ),
    "columns.csv": (lambda root: a_file(root, "columns.csv", b"a,b\n1,2\n"), 1),
    "x.zip": (lambda root: a_file(root, "x.zip", b"PK not really"), 1),
    "dots.zip": (
        lambda root: a_zip(root, "dots.zip", zipfile.ZipInfo("a/../../evil.png"), b"x"),
        1,
    ),
    "link.zip": (lambda root: a_zip(root, "link.zip", a_link(), b"/etc/passwd"), 1),
}


@pytest.mark.parametrize("words", BAD_DATA)
def test_bad_data_is_one_line(ken, tmp_path, words):
    make, code = BAD_DATA[words]
    path = make(tmp_path)
    before = sorted(p for p in tmp_path.rglob("*"))
    found, out, err = ken("train", path, "--out", "m.ken", *QUICK, "--cache-dir", "c")
    assert found == code, err
    assert words in one_line(err)
    assert out == ""
    shutil.rmtree("c", ignore_errors=True)
    assert sorted(p for p in tmp_path.rglob("*")) == before


@pytest.mark.skipif(is_root(), reason="nothing is unreadable for root")
def test_an_unreadable_file_is_one_line(ken, folder):
    (folder / "red" / "000.png").chmod(0)
    code, _, err = ken("train", folder, *QUICK)
    assert code == 1
    assert "red/000.png" in one_line(err)


def test_a_fifo_named_like_a_picture_never_hangs(ken, folder):
    os.mkfifo(folder / "red" / "pipe.png")
    code, _, err = ken("train", folder, "--out", "m.ken", *QUICK)
    assert code == 0
    assert "pipe.png" in err


def test_odd_class_names_survive_to_every_output(ken, tmp_path):
    names = ["a b", "ünï ☃ \U0001f600", "new\nline", "=1+1", "<b>&amp;"]
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]
    data = make_folder(tmp_path / "odd", 6, dict(zip(names, colours, strict=True)))
    code, _, err = ken("train", data, "--out", "m.ken", *QUICK)
    assert code == 0, err
    code, out, _ = ken("info", "m.ken", "--json")
    assert sorted(json.loads(out)["classes"]) == sorted(names)
    code, out, _ = ken("predict", "m.ken", data, "--json", "--top", "5")
    rows = json.loads(out)
    assert len(rows) == 30
    assert {entry["label"] for entry in rows[0]["top"]} == set(names)
    code, out, _ = ken("predict", "m.ken", data, "--csv", "--top", "5")
    cells = [cell for row in csv.reader(io.StringIO(out)) for cell in row]
    assert not any(cell.startswith("=") for cell in cells)
    code, out, _ = ken("predict", "m.ken", data)
    assert len(out.splitlines()) == 30  # a line break in a name does not break the table
    (page,) = tmp_path.glob("runs/*/report.html")
    assert "<b>&amp;</b>" not in page.read_text()


@pytest.mark.parametrize("form", [[], ["--json"], ["--csv"]])
def test_one_bad_picture_does_not_stop_the_others(ken, model_path, tmp_path, form):
    good, bad = tmp_path / "good.png", tmp_path / "bad.jpg"
    good.write_bytes(png(picture(CLASSES["green"], 1)))
    bad.write_text("hello")
    code, out, err = ken("predict", model_path, bad, good, *form)
    assert code == 1
    assert "bad.jpg" in err
    assert "green" in out
    if form == ["--json"]:
        assert [("error" in row) for row in json.loads(out)] == [True, False]


def test_predict_refuses_a_missing_picture_and_a_bad_model(ken, model_path, tmp_path):
    code, _, err = ken("predict", model_path, "nowhere.png")
    assert code == 2
    assert "nowhere.png" in one_line(err)
    (tmp_path / "bad.ken").write_text("x")
    for verb in (["predict", "bad.ken", model_path], ["info", "bad.ken"]):
        code, _, err = ken(*verb)
        assert code == 1
        assert "bad.ken: not a model file" in one_line(err)
    code, _, err = ken("info", "none.ken")
    assert code == 2
    code, _, err = ken("predict", model_path, model_path, "--json", "--csv")
    assert code == 2


def test_evaluate_refuses_an_unknown_class(ken, model_path, tmp_path):
    data = make_folder(tmp_path / "more", 3, CLASSES | {"grean": (0, 0, 0)})
    code, _, err = ken("evaluate", model_path, data)
    assert code == 1
    assert "'grean'" in one_line(err)
    assert "did you mean 'green'" in err
    code, _, err = ken("evaluate", model_path, data, "--split", "tset")
    assert code == 2


def test_evaluate_takes_a_set_that_lacks_classes(ken, model_path, tmp_path):
    data = make_folder(tmp_path / "less", 3, {"red": CLASSES["red"]})
    code, out, err = ken("evaluate", model_path, data, "--json")
    assert code == 0, err
    assert json.loads(out)["num_items"] == 3


def test_recipes_are_listed_with_their_promise(ken):
    code, out, _ = ken("recipes")
    assert code == 0
    for name, recipe in RECIPES.items():
        assert name in out
        assert recipe.promise in out
    assert set(json.loads(ken("recipes", "--json")[1])) == set(RECIPES)


@pytest.mark.parametrize("text", ["{", "[]", '{"optimizer": {"lr": -1}}'])
def test_a_recipe_file_that_is_none_is_refused(ken, folder, tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    code, _, err = ken("train", folder, "--recipe", "r.json")
    assert code == 2
    one_line(err)


def test_a_diverging_loss_says_what_to_try(ken, folder):
    code, _, err = ken("train", folder, "--out", "m.ken", *QUICK, "--set", "lr=1e30")
    assert code == 1
    assert "--set lr=" in err
    assert not Path("m.ken").exists()


SLOW_RUN = [sys.executable, "-m", "kenspeckle", "train"]


def start(folder: Path, where: Path, *words: str) -> subprocess.Popen[str]:
    """Start a training of many epochs as a process of its own."""
    words = (*QUICK, "--epochs", "100000", "--out", "m.ken", "--cache-dir", "c", *words)
    return subprocess.Popen(
        [*SLOW_RUN, str(folder), *words],
        cwd=where,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for(process: subprocess.Popen[str], words: str) -> None:
    """Read the process's standard error up to the line that holds `words`."""
    assert process.stderr is not None
    while words not in process.stderr.readline():
        assert process.poll() is None


def test_ctrl_c_saves_the_best_model_so_far(folder, tmp_path):
    process = start(folder, tmp_path)
    wait_for(process, "epoch 2/")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "best model so far" in err
    assert "Traceback" not in err
    assert "m.ken" in out
    subprocess.run(
        [sys.executable, "-m", "kenspeckle", "info", "m.ken", "--verify"], cwd=tmp_path, check=True
    )


def test_a_kill_leaves_nothing_half(folder, tmp_path):
    process = start(folder, tmp_path)
    wait_for(process, "epoch 1/")
    time.sleep(0.2)
    process.kill()
    process.communicate(timeout=30)
    assert not (tmp_path / "m.ken").exists()


def run_python(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_the_answering_side_runs_without_torch(model_path, tmp_path):
    shot = tmp_path / "shot.png"
    shot.write_bytes(png(picture(CLASSES["blue"], 3)))
    code = f"""
import sys
for name in ("torch", "onnx", "onnxscript", "matplotlib", "jinja2", "safetensors", "jaxtyping"):
    sys.modules[name] = None  # importing it is an ImportError
import kenspeckle
from kenspeckle import cli
for words in (["predict", {str(model_path)!r}, {str(shot)!r}],
              ["info", {str(model_path)!r}, "--verify"],
              ["evaluate", {str(model_path)!r}, {str(model_path.parent / "colours")!r}]):
    sys.argv = ["ken", *words]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, end.code
print(kenspeckle.load({str(model_path)!r}).predict({str(shot)!r}).label)
"""
    assert run_python(code).splitlines()[-1] == "blue"


def test_help_loads_nothing_heavy():
    code = """
import sys
from kenspeckle import cli
sys.argv = ["ken", "--help"]
try:
    cli.main()
except SystemExit:
    pass
heavy = ("torch", "onnxruntime", "PIL.Image", "rich.progress")
print([name for name in heavy if name in sys.modules])
"""
    assert run_python(code).splitlines()[-1] == "[]"
