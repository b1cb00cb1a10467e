"""What a user installs, and the rules that the code base holds itself to."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_wheel_works_in_a_clean_environment(tmp_path):
    """Builds the wheel, installs it alone into a new environment, and runs it outside the checkout."""
    source = tmp_path / "source"  # a copy: setuptools would put modules of an earlier build into the wheel
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "runs", "*.egg-info"))
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("mbdist-*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env/bin/python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True, timeout=120)
    # The dependencies are gigabytes and installed beside us: lend them, but not the checkout itself.
    site = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    lent = [entry for entry in site.iterdir() if "mbdist" not in entry.name]
    (tmp_path / "lent").mkdir()
    for entry in lent:
        (tmp_path / "lent" / entry.name).symlink_to(entry)
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path / "lent"), "HOME": str(tmp_path)}
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([tmp_path / "env/bin/mbdist", "--help"], **run)
    assert done.returncode == 0 and "multi-Boolean" in done.stdout, done.stderr
    code = (
        "import mbdist, mbdist_kernels, mbdist_launch; print(mbdist.__file__, mbdist_kernels.native._SOURCE.exists())"
    )
    done = subprocess.run([python, "-c", code], **run)
    assert str(tmp_path / "env") in done.stdout and done.stdout.strip().endswith("True"), done.stderr


def test_a_model_loads_after_import_mbdist_in_either_order(tmp_path, llama_folder):
    subprocess.run(
        ["mbdist", "convert", llama_folder, tmp_path / "model", "--init", "joint"], check=True, capture_output=True
    )
    load = f"print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path / 'model')!r})).__name__)"
    for imports in (
        "import mbdist; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import mbdist",
    ):
        done = subprocess.run([sys.executable, "-c", f"{imports}; {load}"], capture_output=True, text=True)
        assert done.stdout.strip() == "LlamaForCausalLM", done.stderr[-2000:]


def test_imports_go_one_way():
    done = subprocess.run(["lint-imports"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
