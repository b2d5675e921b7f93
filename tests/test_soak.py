"""Training for long: memory, pace and files stay as they are. SOAK_SECONDS=3600 makes it the hour of the README."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parent.parent
SECONDS = int(os.environ.get("SOAK_SECONDS", 120))
LINES = 10  # of the log, 20 steps each, that are compared at the start and at the end


def state(process, out):
    """-> last logged step, CPU seconds so far, resident MB."""
    log = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    ticks, pages = int(fields[11]) + int(fields[12]), int(fields[21])
    step = json.loads(log[-1])["step"] if log else -1
    return step, ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def sizes(out):
    """Files that a save under way has not yet renamed have names that start with a point."""
    return {path.name: path.stat().st_size for path in out.iterdir() if not path.name.startswith(".")}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads Linux's /proc")
def test_long_training_keeps_memory_pace_and_files(tmp_path):
    out, seen = tmp_path / "run", []
    command = [sys.executable, ROOT / "train.py", "--steps", "1000000", "--workers", "0", "--device", "cpu",
               "--save-every", "40", "--out-dir", out]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                               stdout=subprocess.DEVNULL)
    end, files = time.time() + SECONDS, None
    while time.time() < end and process.poll() is None:
        now = state(process, out)
        if now[0] >= 0 and (not seen or now[0] > seen[-1][0]):  # a line of the log is new
            seen.append(now)
        if files is None and (out / "former.pt").exists():
            files = sizes(out)
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0

    pace = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(seen, seen[1:])]  # CPU seconds a step, of 20 steps each
    first, last = median(pace[1:LINES + 1]), median(pace[-LINES:])
    memory = [mb for _, _, mb in seen[LINES:]]
    print(f"\n{seen[-1][0]} steps in {SECONDS} s: CPU {first:.4f} s a step at the start, {last:.4f} at the end "
          f"({100 * (last / first - 1):+.1f} %); memory {memory[0]:.0f} MB after {seen[LINES][0]} steps, "
          f"{min(memory):.0f} to {max(memory):.0f} since, {memory[-1]:.0f} at the end")
    assert len(pace) > 2 * LINES
    assert last < 1.05 * first
    assert max(memory) < 1.02 * memory[0]
    now = sizes(out)
    assert now.keys() == files.keys()  # since the second save
    grown = {name for name in files if now[name] > files[name] + 1000}
    assert grown <= {"log.jsonl", "curves.png"}, grown
