"""An installation brings its data and scripts inside the package, and its commands run from
anywhere."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_an_installation_runs_anywhere(tmp_path):
    """python -m pytest -m slow tests/core/test_install.py: needs pip and, once, the network."""
    site, copy = tmp_path / "site", tmp_path / "copy"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(copy)], check=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site)]
    subprocess.run([*pip, str(copy)], check=True)
    top = {p.name for p in site.iterdir()}
    assert top == {"bin", "mincai", *(name for name in top if name.endswith(".dist-info"))}
    assert (site / "mincai/data/tiny/model.safetensors").is_file()
    assert (site / "mincai/lab/play.html").is_file()
    commands = sorted(p.name for p in (site / "bin").iterdir())
    assert commands[0] == "mincai" and "mincai-train-ppo" in commands and len(commands) == 10
    for name in commands:
        run = f"import sys; from mincai.plumbing import entry; sys.argv = ['{name}', '--help']; entry."
        run += {"mincai": "loop"}.get(name, name.removeprefix("mincai-").replace("-", "_")) + "()"
        ran = subprocess.run(
            [sys.executable, "-c", run],
            cwd=tmp_path,
            env={"PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0 and "usage:" in ran.stdout, ran.stderr
        assert "default: data/tiny" not in ran.stdout  # there is none where a person may be
