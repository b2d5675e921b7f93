"""The README's own claims: line counts, files, flags and its Python example."""
import re
import subprocess
import sys
from pathlib import Path

from experiments import study

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_line_counts_are_true():
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", TEXT, re.M)
    files = [*ROOT.glob("*.py"), *ROOT.glob("toy/[a-z]*.py")]
    assert {name for name, _ in rows} == {str(p.relative_to(ROOT)) for p in files}
    for name, lines in rows:
        assert len((ROOT / name).read_text().splitlines()) == int(lines), name


def test_links_and_flags_exist():
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (ROOT / link).exists(), link
    sources = [*ROOT.glob("*.py"), *ROOT.glob("toy/*.py")]
    flags = {flag for path in sources for flag in re.findall(r'[a-z]\("(--[a-z-]+)"', path.read_text())}
    ours = re.sub(r"#SBATCH.*|torchrun (--\S+ \S+ ?\\?\s*)*", "", TEXT)  # without the flags of launchers
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours)) <= flags | {"--help", "--train"}  # experiments.study --train ROW


def test_the_python_example_prints_what_it_says():
    code = next(block for block in re.findall(r"```python\n(.*?)```", TEXT, re.S) if "set_classes" in block)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == re.search(r"# (torch\.Size\([^)]*\))", code)[1]


def test_the_report_is_what_the_runs_make(tmp_path, monkeypatch):
    lines = study.finished()
    monkeypatch.setattr(study, "RESULTS", tmp_path / "toy.jsonl")
    study.render(lines)
    assert (tmp_path / "toy.md").read_text() == (ROOT / "results/toy.md").read_text()


def test_result_rows_are_those_of_the_study():
    written = (ROOT / "results/toy.md").read_text().splitlines()
    rows = [line for line in TEXT.split("## Results")[1].split("\n## ")[0].splitlines() if line.startswith("|")]
    assert len(rows) > 4 and not set(rows) - set(written)
    assert "@@" not in TEXT  # a figure still to be measured
