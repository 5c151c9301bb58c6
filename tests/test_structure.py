"""What reviews hold to and no linter knows: size, documented errors, exports, safe calls, docs."""

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

import kenspeckle
from kenspeckle.cli import app
from kenspeckle.config import MODEL_CONFIGS
from kenspeckle.losses import LOSSES
from kenspeckle.optimizers import OPTIMIZERS, SCHEDULES
from kenspeckle.recipes import RECIPES

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "kenspeckle"
MODULES = sorted(SOURCE.rglob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

by_module = pytest.mark.parametrize(
    "path", MODULES, ids=lambda path: path.relative_to(SOURCE).as_posix()
)
by_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_of(path: Path):
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return importlib.import_module(".".join(p for p in parts if p != "__init__"))


@by_module
def test_no_module_is_over_500_lines(path):
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= 500


# Documented errors.


def public_functions(tree: ast.Module) -> Iterator[tuple[str, Function, str]]:
    """Yield name, node and docstring of every function and method that others may call."""
    for node in tree.body:
        owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        if not owner.startswith("_"):
            for function in node.body if isinstance(node, ast.ClassDef) else [node]:
                if isinstance(function, Function) and not function.name.startswith("_"):
                    yield owner + function.name, function, ast.get_docstring(function) or ""


def raised_by(function: Function) -> set[str]:
    """Return the names of the classes in its `raise X` and `raise X(...)`."""
    raised = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Raise) and node.exc is not None:
            called = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = called.attr if isinstance(called, ast.Attribute) else ast.unparse(called)
            if re.fullmatch(r"[A-Z]\w*", name):
                raised.add(name)
    return raised


def undocumented(tree: ast.Module) -> list[str]:
    return [
        f"{name} raises {error}"
        for name, function, text in public_functions(tree)
        for error in sorted(raised_by(function))
        if not re.search(rf"^\s*{error}: ", text, re.MULTILINE)
    ]


def is_command(node: ast.AST) -> bool:
    """Return whether a function is a command, whose docstring is its help text."""
    return isinstance(node, Function) and any(
        ast.unparse(decorator).startswith("app.") for decorator in node.decorator_list
    )


@by_module
def test_every_error_that_a_public_function_raises_is_in_its_docstring(path):
    tree = tree_of(path)
    tree.body = [node for node in tree.body if not is_command(node)]
    assert undocumented(tree) == []


def test_the_search_for_undocumented_errors_finds_them():
    text = '''
def f():
    """Do.

    Raises:
        KeyError: never.
    """
    raise ValueError("x")

class C:
    """Hold."""
    def n(self):
        """Do."""
        raise core.DataError
    def m(self):
        """Do.

        Raises:
            OSError: always.
        """
        raise OSError from None
    def _n(self):
        raise TypeError
'''
    assert undocumented(ast.parse(text)) == ["f raises ValueError", "C.n raises DataError"]


# Exports.


def order(name: str) -> tuple[int, str]:
    """Return a key that sorts constants before classes before the rest, as ruff does."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


@by_module
def test_exports_are_sorted_unique_and_complete(path):
    if path.name == "__main__.py":
        return
    names = list(module_of(path).__all__)
    assert names == sorted(set(names), key=order)
    assert all(hasattr(module_of(path), name) for name in names)
    defined = [
        node.name
        for node in tree_of(path).body
        if isinstance(node, Function | ast.ClassDef) and not is_command(node)
    ]
    assert [n for n in defined if not n.startswith("_") and n not in names] == []


def test_the_package_names_every_export_once_and_lists_them():
    assert set(kenspeckle.__all__) <= set(dir(kenspeckle))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = kenspeckle.nothing


# Unsafe calls.

UNSAFE_IMPORTS = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "random"}
UNSAFE_CALLS = {
    *("eval", "exec", "compile", "__import__", "input", "breakpoint"),
    *("os.system", "os.popen", "torch.load", "torch.hub.load", "torch.manual_seed"),
    *("torch.seed", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all"),
    *("np.random.seed", "numpy.random.seed"),
}
UNSAFE_METHODS = {"extractall", "extract", "unpack_archive"}
UNSAFE_OPTIONS = {
    "allow_pickle": True,
    "shell": True,
    "trust_remote_code": True,
    "weights_only": False,
}


def unsafe(tree: ast.AST) -> list[str]:
    """Return what could run code from files, reach outside, or touch the global seed."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
            found += sorted(names & UNSAFE_IMPORTS)
        elif isinstance(node, ast.ImportFrom):
            found += sorted({(node.module or "").split(".")[0]} & UNSAFE_IMPORTS)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "torch.load" and "weights_only" in {o.arg for o in node.keywords}:
                called = "torch.load, of tensors only"  # unless the option is off: see below
            if called in UNSAFE_CALLS or called.split(".")[-1] in UNSAFE_METHODS:
                found.append(called)
            found += [
                f"{option.arg}={ast.unparse(option.value)}"
                for option in node.keywords
                if option.arg in UNSAFE_OPTIONS
                and not (
                    isinstance(option.value, ast.Constant)
                    and option.value.value is (not UNSAFE_OPTIONS[option.arg])
                )
            ]
    return found


@by_module
def test_no_call_is_unsafe(path):
    assert unsafe(tree_of(path)) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from yaml import load",
        "import random",
        "eval('1')",
        "zipfile.ZipFile(x).extractall('.')",
        "np.load(x, allow_pickle=True)",
        "np.load(x, allow_pickle=flag)",
        "torch.load(x)",
        "torch.load(x, weights_only=flag)",
        "safe(x, weights_only=False)",
        "subprocess.run(x, shell=True)",
        "torch.manual_seed(0)",
        "np.random.seed(0)",
    ],
)
def test_the_search_for_unsafe_calls_finds_them(text):
    assert unsafe(ast.parse(text))


def test_the_search_for_unsafe_calls_lets_others_pass():
    text = "network.eval()\nre.compile('x')\nnp.load(x, allow_pickle=False)\nrandom_picture()"
    text += "\ntorch.load(x, weights_only=True)"
    assert unsafe(ast.parse(text)) == []


@by_module
def test_only_the_command_and_its_progress_print(path):
    calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    prints = [call.lineno for call in calls if ast.unparse(call.func) in {"print", "pprint"}]
    assert prints == [] or path.name in {"cli.py", "progress.py"}


# Documents.

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def text_of(page: Path) -> str:
    """Return a page without the section on what is not there yet."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^## Not there yet\n.*?(?=^## |\Z)", "", text, flags=re.MULTILINE | re.DOTALL)


def command_lines(text: str) -> Iterator[tuple[str, bool]]:
    """Yield every `ken …` in a Markdown text, and whether it is whole and not just mentioned."""
    for _, block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.match(r"\s*\$?\s*(ken( .*)?)$", line)
            if command:
                yield re.split(r"\s(?:#|\||&&|>|;)", command[1])[0], True
    for span in re.findall(r"`(ken(?: [^`\n]*)?)`", FENCE.sub("", text)):
        yield span, False


def problem(command: str, whole: bool) -> str | None:
    """Return what the program's parser has against a command line."""
    words = shlex.split(command.replace("…", " "))[1:]
    group = typer.main.get_group(app)
    if not words or words[0].startswith("-"):
        return None if set(words) <= {"--help", "-h", "--version", "--install-completion"} else "?"
    commands = group.commands
    if words[0] not in commands:
        return f"no command {words[0]!r}" if whole or words[0].islower() else None
    try:
        commands[words[0]].make_context(words[0], words[1:])
    except typer.Exit:
        return None  # --help
    except Exception as error:  # noqa: BLE001 - of the parser, whose classes are private
        if type(error).__name__ == "MissingParameter" and not whole:
            return None
        return str(error)
    return None


@by_page
def test_every_command_line_in_the_documents_parses(path):
    shown = list(command_lines(text_of(path)))
    assert {line: wrong for line, whole in shown if (wrong := problem(line, whole))} == {}


@pytest.mark.parametrize(
    ("text", "parses"),
    [
        ("```\nken train flowers/ --out f.ken --epochs 3   # comment\n```", True),
        ("```console\n$ ken predict m.ken a.jpg | head\n```", True),
        ("```\nken train flowers/ \\\n    --epochs 3\n```", True),
        ("```\nken trian flowers/\n```", False),
        ("```\nken train flowers/ --epoch 3\n```", False),
        ("```\nken train flowers/ --epochs many\n```", False),
        ("```\nken train\n```", False),
        ("Try `ken info --verify`.", True),
        ("Try `ken info --verfy`.", False),
        ("Try `ken evalute m.ken DATA`.", False),
        ("`ken` and `ken --help`", True),
        ("`ken --hlep`", False),
        ("`ken COMMAND --help`", True),
    ],
)
def test_the_search_for_command_lines_finds_what_does_not_parse(text, parses):
    shown = list(command_lines(text))
    assert shown
    assert all(problem(*line) is None for line in shown) == parses


@by_page
def test_every_link_leads_to_a_file(path):
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [link.split("#")[0] for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in local if link and not (path.parent / link).exists()] == []


@by_page
def test_every_python_block_uses_names_that_exist(path):
    for language, block in FENCE.findall(path.read_text(encoding="utf-8")):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "ken":
                assert node.attr in kenspeckle.__all__
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kenspeckle"):
                found = importlib.import_module(str(node.module))
                assert all(hasattr(found, alias.name) for alias in node.names)


def section(title: str) -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^##+ {title}\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    return str(found)


def test_the_map_of_the_code_is_complete():
    rows = re.findall(r"^\| (`.*?) \|", section("A map of the code"), re.MULTILINE)
    named = [name.rstrip("/") for row in rows for name in re.findall(r"`([\w/]+)`", row)]
    there = {path.stem for path in SOURCE.glob("[a-z]*.py")}
    there |= {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert sorted(named) == sorted(there)


@pytest.mark.parametrize("names", [MODEL_CONFIGS, LOSSES, OPTIMIZERS, SCHEDULES])
def test_the_readme_names_what_there_is(names):
    assert set(names) <= set(re.findall(r"`([\w-]+)`", section("Recipes and settings")))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_names_its_command_and_its_measured_promise(name):
    module = importlib.import_module(f"kenspeckle.recipes.{name.replace('-', '_')}")
    assert module.RECIPE is RECIPES[name]
    command = re.search(r"^Command: (ken .*)$", module.__doc__ or "", re.MULTILINE)
    assert command
    assert f"--recipe {name}" in command[1]
    assert problem(command[1], whole=True) is None
    assert re.search(r"\d", RECIPES[name].promise), "a promise states a figure that was measured"
