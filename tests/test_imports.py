"""Imports run one way: each one in each file, inside functions too, goes down this list or stays in its package."""
import ast
import sys

import pytest
from conftest import ROOT

LAYERS = ("support", "clip losses bodies", "clip_head", "model", "toy.world", "sources", "data",
          "evaluate", "train predict", "toy.pretrain toy.render", "experiments", "tests")
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}
OUTSIDE = {"torch", "torchvision", "ftfy", "regex", "numpy", "PIL"}  # requirements.txt
DRAWS = ("toy.render", "resvg_py")  # for whoever makes toy/sprites.png again


def part(module):
    """sources.voc -> sources, toy.world -> toy.world; what is not of the project -> its first word."""
    return module if module in LEVEL else module.split(".")[0]


def imports(path, root):
    """-> {(line, module)}"""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {(node.lineno, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: write the whole name"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"  # from sources import check: sources/check.py
                file = root / f"{inner.replace('.', '/')}.py"
                found.add((node.lineno, inner if file.is_file() else node.module))
    return sorted(found)


def faults(root):
    """What breaks the rules, a line each."""
    wrong = []
    for path in sorted([*root.glob("*.py"), *root.glob("*/*.py")]):
        relative = path.relative_to(root)
        own = part(".".join(relative.with_suffix("").parts).removesuffix(".__init__"))
        if own not in LEVEL:
            if own != "toy":  # which is empty
                wrong.append(f"{relative} has no place in this list")
            continue
        for line, target in imports(path, root):
            there, where = part(target), f"{relative}:{line} imports {target}"
            if there in LEVEL:
                if there == "experiments" and own not in ("experiments", "tests"):
                    wrong.append(f"{where}, which its tests alone may")
                elif there != own and LEVEL[there] >= LEVEL[own]:
                    wrong.append(f"{where}, which lies {'above' if LEVEL[there] > LEVEL[own] else 'beside'} it")
            elif there not in OUTSIDE | sys.stdlib_module_names and own not in ("experiments", "tests") and (
                    own, there) != DRAWS:
                wrong.append(f"{where}, which requirements.txt does not have")
    return wrong


def test_imports_run_one_way():
    assert not faults(ROOT), "\n".join(faults(ROOT))


@pytest.mark.parametrize("file, line, fault", [
    ("support/a.py", "def f():\n    from losses import IGNORE", "support/a.py:2 imports losses, which lies above it"),
    ("sources/toy.py", "from toy import world, pretrain", "sources/toy.py:1 imports toy.pretrain, which lies above it"),
    ("train.py", "import predict", "train.py:1 imports predict, which lies beside it"),
    ("toy/pretrain.py", "from experiments import study", "toy/pretrain.py:1 imports experiments.study, which its tests "
     "alone may"),
    ("toy/render.py", "import resvg_py", None),
    ("model.py", "import timm, json", "model.py:1 imports timm, which requirements.txt does not have"),
    ("new.py", "", "new.py has no place in this list"),
])
def test_an_arrow_that_runs_back_up_is_named(file, line, fault, tmp_path):
    for name in (file, "toy/world.py", "toy/pretrain.py", "experiments/study.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / file).write_text(line)
    found = faults(tmp_path)
    assert len(found) == bool(fault) and all(text.startswith(fault) for text in found), found
