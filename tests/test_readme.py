"""What README.md and docs/ say exists: files, flags, functions, commands, and the example of a body of your own."""
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import train
from bodies import ModelError

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page: page.read_text() for page in PAGES}
COMMANDS = [(page, line) for page in PAGES for block in re.findall(r"```sh\n(.*?)```", TEXT[page], re.DOTALL)
            for line in re.sub(r"\\\n\s*", " ", block).splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!http|\.\./\.\./actions)([^)#]+)", TEXT[page])
    assert not [link for link in links if not (page.parent / link).exists()]


def test_commands_are_understood():
    """Every `python X.py flags` is parsed by X's own parser, also after torchrun."""
    seen = set()
    for page, line in COMMANDS:
        words = shlex.split(line, comments=True)
        scripts = [i for i, word in enumerate(words) if re.fullmatch(r"(train|evaluate|predict|data)\.py", word)]
        for i in scripts:
            flags = words[i + 1:words.index("&&", i) if "&&" in words[i:] else None]
            module = importlib.import_module("sources.check" if words[i] == "data.py" else words[i].removesuffix(".py"))
            try:
                module.parse(flags)
            except SystemExit:
                pytest.fail(f"{page.name}: {line}")
            seen.add(words[i])
    assert seen == {"train.py", "evaluate.py", "predict.py", "data.py"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_and_names_in_the_text_exist(page):
    sources = [ROOT / "sources/check.py", *(path for folder in (".", "experiments", "toy")
                                            for path in (ROOT / folder).glob("*.py"))]
    flags = {flag for path in sources for flag in re.findall(r'\("(--[a-z-]+)"', path.read_text())}
    flags |= {f"--{s.name.replace('_', '-')}" for s in train.SETTINGS}
    flags |= {"--help", "--nproc-per-node", "--local-dir"}  # argparse's, torchrun's, the hub's
    for text in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT[page], flags=re.DOTALL)):
        assert set(re.findall(r"(?<!\S)--[a-z-]+", text)) <= flags, text
        home, _, name = text.rpartition(".")
        path = ROOT / home.replace(".", "/")
        module = path.with_suffix(".py").exists() or path.is_dir() and home
        if module and re.fullmatch(r"[\w.]+", text) and name not in ("py", "txt", "png"):
            assert hasattr(importlib.import_module(home), name), text


def test_speeds_in_the_text_are_those_that_were_measured():
    readme, results = TEXT[ROOT / "README.md"], TEXT[ROOT / "docs/results.md"]
    for file in ("benchmark", "benchmark-171"):
        found = json.loads((ROOT / "experiments/results" / f"{file}.json").read_text())
        assert f"at commit {found['commit']}:" in results
        for name, test in found["test"].items():
            cells = [f"`{name}`", found["settings"]["classes"], "–", "–", f"{test['images_per_s']:.0f}",
                     f"{test['peak_mb'] / 1000:.1f}", f"{found['cost'][name]['gflops']:.0f}"]
            if train := found["train"].get(name):
                speed, memory = train["images_per_s"], f"{train['peak_mb'] / 1000:.1f}"
                cells[2:4] = f"{speed:.0f}", memory
                said = {("resnet50", "20"): f"at {speed:.0f} images/s, so 20,000 steps of 16 take "
                                            f"{20000 * 16 / speed / 60:.0f} min and {memory} GB",
                        ("segnext-b", "20"): f"at {speed:.0f}, {20000 * 16 / speed / 60:.0f} min and {memory} GB",
                        ("resnet50", "171"): f"80,000 steps take {80000 * 16 / speed / 3600:.1f} hours"}
                assert said.get((name, cells[1]), "") in readme.replace("\n", " ")
            assert f"| {' | '.join(cells)} |" in results


def test_the_body_of_your_own_builds_as_it_stands():
    pytest.importorskip("timm")
    code, = re.findall(r"```python\n(.*?)```", TEXT[ROOT / "README.md"], re.DOTALL)
    names = {}
    exec(code.replace("pretrained=True", "pretrained=False"), names)
    with torch.no_grad():
        assert names["net"](torch.rand(1, 3, 64, 64)).shape == (1, 128, 2, 2)
        with pytest.raises(ModelError, match="call set_classes"):
            names["net"].logits(torch.rand(1, 3, 64, 64))


def test_the_first_commands_run_as_they_stand(tmp_path):
    """README's first two blocks, in an empty folder; the training is cut to 4 steps."""
    lines = [line.partition("#")[0].strip() for page, line in COMMANDS if page.name == "README.md"]
    first = [line for line in lines[:lines.index("python data.py --dataset voc --download")]
             if line.startswith("python ")]
    assert first == ["python train.py", "python predict.py", "python evaluate.py", "python train.py --resume"]
    for line in first:
        words = [word if word != "train.py" else "train.py --steps 4" for word in line.split()[1:]]
        script, *flags = " ".join(words).split()
        done = subprocess.run([sys.executable, ROOT / script, *flags], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and "error" not in done.stderr.lower(), f"{line}: {done.stderr}"
    assert (tmp_path / "runs/toy/predictions/demo.overlay.png").exists()


def test_the_tour_runs_and_is_stored_with_its_outputs(tmp_path):
    path = ROOT / "docs/tour.ipynb"
    tour = nbformat.read(path, as_version=4)
    for file in ROOT.iterdir():  # the repository without its data, which it draws
        if file.name not in ("data", "runs"):
            (tmp_path / file.name).symlink_to(file)
    cells = [cell for cell in tour.cells if cell.cell_type == "code"]
    assert path.stat().st_size < 2**20 and all(cell.outputs and cell.execution_count for cell in cells)
    training, = [cell for cell in cells if "STEPS, bank = " in cell.source]
    training.source = re.sub(r"STEPS, bank = \d+", "STEPS, bank = 2", training.source)
    NotebookClient(tour, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    pictures = [sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in cells]
    assert sum(pictures) >= 6
