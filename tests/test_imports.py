"""Imports run one way: each one in each file, inside functions too, goes down this list or stays in its package."""
import ast
import graphlib
import sys

import pytest
from conftest import ROOT

LAYERS = ("support", "clip losses bodies", "clip_head", "model", "toy.world", "sources", "data",
          "evaluate", "train predict", "toy.pretrain", "experiments", "tests")
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}
OUTSIDE = {"torch", "torchvision", "ftfy", "regex", "numpy", "PIL"}  # requirements.txt


def part(module):
    """sources.voc -> sources, toy.world -> toy.world; what is not of the project -> its first word."""
    return module if module in LEVEL else module.split(".")[0]


def imports(path, root):
    """-> {(line, module, takes names from it, runs when the file itself is imported)}"""
    tree, found = ast.parse(path.read_text()), set()
    later = {node for function in ast.walk(tree) if isinstance(function, (ast.FunctionDef, ast.Lambda))
             for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(node.lineno, alias.name, False, node not in later) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: write the whole name"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"  # from sources import check: sources/check.py
                file = root / f"{inner.replace('.', '/')}.py"
                found.add((node.lineno, inner if file.is_file() else node.module, True, node not in later))
    return sorted(found)


def faults(root):
    """What breaks the rules, a line each."""
    wrong, circle = [], {}
    for path in sorted([*root.glob("*.py"), *root.glob("*/*.py")]):
        relative = path.relative_to(root)
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        own = part(module)
        if own not in LEVEL:
            if own != "toy":  # which is empty
                wrong.append(f"{relative} has no place in this list")
            continue
        for line, target, names, at_once in imports(path, root):
            there, where = part(target), f"{relative}:{line} imports {target}"
            if there in LEVEL:
                if there == "experiments" and own not in ("experiments", "tests"):
                    wrong.append(f"{where}, which its tests alone may")
                elif there != own and LEVEL[there] >= LEVEL[own]:
                    wrong.append(f"{where}, which lies {'above' if LEVEL[there] > LEVEL[own] else 'beside'} it")
                if names and at_once:  # a name is needed at once, a module may still be half made
                    circle.setdefault(module, set()).add(target)
            elif there not in OUTSIDE | sys.stdlib_module_names and own not in ("experiments", "tests"):
                wrong.append(f"{where}, which requirements.txt does not have")
    try:
        graphlib.TopologicalSorter(circle).prepare()
    except graphlib.CycleError as error:
        wrong.append("a circle of imports: " + " <- ".join(error.args[1]))
    return wrong


def test_imports_run_one_way():
    assert not faults(ROOT), "\n".join(faults(ROOT))


@pytest.mark.parametrize("file, line, fault", [
    ("losses.py", "from support.log import Log; import model", "losses.py:1 imports model, which lies above it"),
    ("support/a.py", "def f():\n    from losses import IGNORE", "support/a.py:2 imports losses, which lies above it"),
    ("clip/model.py", "import bodies", "clip/model.py:1 imports bodies, which lies beside it"),
    ("sources/check.py", "from data import TrainSet", "sources/check.py:1 imports data, which lies above it"),
    ("sources/toy.py", "from toy import world, pretrain", "sources/toy.py:1 imports toy.pretrain, which lies above it"),
    ("train.py", "import predict", "train.py:1 imports predict, which lies beside it"),
    ("toy/pretrain.py", "from experiments import study", "toy/pretrain.py:1 imports experiments.study, which its tests "
     "alone may"),
    ("toy/world.py", "import scipy", "toy/world.py:1 imports scipy, which requirements.txt does not have"),
    ("model.py", "import timm, json", "model.py:1 imports timm, which requirements.txt does not have"),
    ("sources/a.py", "from sources.b import x", "a circle of imports: sources."),
    ("new.py", "", "new.py has no place in this list"),
    ("sources/c.py", "import clip.model; from sources.b import y", None),
])
def test_an_arrow_that_runs_back_up_is_named(file, line, fault, tmp_path):
    for name in (file, "toy/world.py", "toy/pretrain.py", "experiments/study.py", "sources/b.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "sources/b.py").write_text("from sources.a import y")
    (tmp_path / file).write_text(line)
    found = faults(tmp_path)
    assert len(found) == bool(fault) and all(text.startswith(fault) for text in found), found
