"""Imports run one way: each one in each file, inside functions too, goes down this list or stays in its package."""
import ast
import sys

from conftest import ROOT

LAYERS = ("support", "clip losses bodies", "clip_head", "model", "toy.world", "sources", "data",
          "evaluate", "train predict", "toy.pretrain", "experiments", "tests")
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}
OUTSIDE = {"torch", "torchvision", "ftfy", "regex", "numpy", "PIL"}  # requirements.txt


def part(module):
    """sources.voc -> sources, toy.world -> toy.world; what is not of the project -> its first word."""
    return module if module in LEVEL else module.split(".")[0]


def imports(path):
    """-> (line, module) of each"""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: write the whole name"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"  # from sources import check: sources/check.py
                file = ROOT / f"{inner.replace('.', '/')}.py"
                yield node.lineno, inner if file.is_file() else node.module


def test_imports_run_one_way():
    wrong = []
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]):
        relative = path.relative_to(ROOT)
        own = part(".".join(relative.with_suffix("").parts).removesuffix(".__init__"))
        if own == "toy":  # which is empty
            continue
        if own not in LEVEL:
            wrong.append(f"{relative} has no place in this list")
            continue
        for line, target in imports(path):
            there, where = part(target), f"{relative}:{line} imports {target}"
            if there == own:
                continue
            if there in LEVEL and LEVEL[there] >= LEVEL[own]:
                wrong.append(f"{where}, which does not lie below it")
            elif there not in {*LEVEL, *OUTSIDE, *sys.stdlib_module_names} and own not in ("experiments", "tests"):
                wrong.append(f"{where}, which requirements.txt does not have")
    assert not wrong, "\n".join(wrong)
