"""Rules of the house that no linter knows, read off the syntax tree of every source file."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import everedit
from everedit.methods import method_names

ROOT = Path(everedit.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MOST_LINES = 330
Rule = Callable[[ast.Module], Iterator[ast.AST]]


def called(node: ast.AST) -> str:
    """The dotted name of what a call calls, or of what an import imports; else nothing."""
    if isinstance(node, ast.Import):
        return " ".join(alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return str(node.module)
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def calls(*names: str) -> Rule:
    def rule(tree: ast.Module) -> Iterator[ast.AST]:
        yield from (node for node in ast.walk(tree) if called(node) in names)

    return rule


def device_names(tree: ast.Module) -> Iterator[ast.AST]:
    names = ("cpu", "cuda", "mps", "xpu")
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.partition(":")[0] in names:
            yield node


def mutable_state(tree: ast.Module) -> Iterator[ast.AST]:
    """Lists, dicts and sets under lower-case names at module level, and whatever is declared global."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        empty = isinstance(value, ast.Call) and called(value) in ("list", "dict", "set", "defaultdict", "deque")
        if isinstance(value, (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)) or empty:
            for target in targets:
                if isinstance(target, ast.Name) and not target.id.startswith("__") and not target.id.isupper():
                    yield node
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.Global))


NUMBERS = ("engine", "methods", "policies", "evaluation", "editor.py", "patch.py")
# Name: the rule, where it holds (all files, if empty), and where it does not.
RULES: dict[str, tuple[Rule, tuple[str, ...], tuple[str, ...]]] = {
    "print": (calls("print", "sys.stdout.write"), (), ("cli/console.py",)),
    "unsafe loading": (
        calls("eval", "exec", "torch.load", "pickle", "dill", "joblib", "shelve", "marshal", "os.system"), (), ()
    ),
    "device names": (device_names, NUMBERS, ()),
    "mutable state": (mutable_state, (), ()),
    "global seeds": (calls("torch.manual_seed", "torch.seed", "random.seed", "np.random.seed"), (), ()),
    "global modes": (calls("torch.set_default_dtype", "torch.set_default_device"), (), ()),
    "waiting for a person": (calls("breakpoint", "input"), (), ()),
}  # fmt: skip


def breaches(name: str) -> list[str]:
    rule, where, exempt = RULES[name]
    found = []
    for file in FILES:
        path = file.relative_to(ROOT).as_posix()
        if path not in exempt and (not where or path.startswith(where)):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            found += [f"{path}:{getattr(node, 'lineno', 0)}" for node in rule(tree)]
    return found


@pytest.mark.parametrize("name", RULES)
def test_no_source_file_breaks_a_rule(name: str) -> None:
    assert breaches(name) == []


@pytest.mark.parametrize(
    ("name", "source", "count"),
    [
        ("print", "print('x')\nlog.print('y')", 1),
        ("unsafe loading", "import pickle\nfrom pickle import loads\neval('1')\nmodel.eval()\ntorch.load('x')", 4),
        ("device names", "x.to('cuda:0')\nx.to(device='cpu')\ny = 'cpus'", 2),
        ("mutable state", "cache = {}\n_seen = dict()\nTABLE = {}\n_TABLE = []\n__all__ = ['x']\nn = 3", 2),
        ("mutable state", "def f():\n    global x\n    held = []", 1),
        ("global seeds", "torch.manual_seed(0)\ntorch.Generator().manual_seed(0)", 1),
        ("global modes", "torch.set_default_dtype(x)", 1),
        ("waiting for a person", "input()\nbreakpoint()", 2),
    ],
)
def test_each_rule_finds_what_it_forbids(name: str, source: str, count: int) -> None:
    assert len(list(RULES[name][0](ast.parse(textwrap.dedent(source))))) == count


def test_files_are_short_and_say_what_they_are() -> None:
    assert len(FILES) > 50
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) < MOST_LINES, file
        doc = ast.get_docstring(ast.parse(text))
        assert doc, f"{file} does not say what it is"


@pytest.mark.parametrize("name", method_names())
def test_a_methods_file_opens_with_its_equation(name: str) -> None:
    doc = ast.get_docstring(ast.parse((ROOT / "methods" / f"{name.replace('-', '_')}.py").read_text(encoding="utf-8")))
    assert doc
    first = doc.splitlines()[0]
    assert "=" in first or "<-" in first, first
    # The paper is named where the equation is.
    assert any(word in doc for word in ("et al.", "arXiv", "ICLR", "NeurIPS", "ICML", "ACL", "EMNLP"))


def test_methods_and_policies_do_not_know_each_other() -> None:
    for folder, other in (("methods", "everedit.policies"), ("policies", "everedit.methods")):
        for file in (ROOT / folder).glob("*.py"):
            imports = [called(node) for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
            assert not any(name.startswith(other) for name in imports), file
