"""The wheel, built and used away from the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from trainbus.checkpoint import host_copy, record_sums

ROOT = Path(__file__).parent.parent
EXTENSIONS = {
    "trainbus/checkpoint/_nontemporal.abi3.so": host_copy.copy_past_caches,
    "trainbus/checkpoint/_writing.abi3.so": record_sums.complete_in_c,
}


@pytest.mark.full
class TestWheel:
    def test_holds_the_packages_and_nothing_else(self, wheel):
        """The wheel has both packages with their type markers, and no tests."""
        names = zipfile.ZipFile(wheel).namelist()

        assert {name.split("/")[0].split("-")[0] for name in names} == {"trainbus", "trainbus_callbacks"}
        assert {"trainbus/py.typed", "trainbus_callbacks/py.typed", "trainbus/cli/demo.py"} <= set(names)

    def test_needs_no_compiler(self, source, wheel, tmp_path):
        """Where nothing can be compiled the same wheel is built, without what speeds up saves."""
        plain = build(source, tmp_path, CC="false")

        extensions = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")}
        assert extensions == {name for name, function in EXTENSIONS.items() if function is not None}
        others = {*zipfile.ZipFile(wheel).namelist()} - extensions
        assert {*zipfile.ZipFile(plain).namelist()} == others

    def test_passes_the_tests(self, wheel, tmp_path):
        """The tests pass against the wheel where there is no source tree to fall back on."""
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site", wheel],
            check=True,
        )
        for name in ("tests", "setup.cfg", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "docs"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, tmp_path / name)
        # PYTHONPATH comes before what an editable installation adds.
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
        where = "import trainbus, trainbus_callbacks; print(trainbus.__file__, trainbus_callbacks.__file__)"
        for code in (where, None):
            command = (
                ["-c", code]
                if code
                else [
                    "-m",
                    "pytest",
                    "-q",
                    "--ignore=tests/benchmarks",  # they are no part of it
                    "--ignore=tests/test_end_to_end.py",
                    "--ignore=tests/test_layering.py",
                    "--ignore=tests/test_troubleshooting.py",  # these two read the sources
                ]
            )
            done = subprocess.run(
                [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout[-5000:] + done.stderr
            if code:
                assert done.stdout.count(str(tmp_path / "site")) == 2


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what is under version control."""
    source = tmp_path_factory.mktemp("source")
    for name in (
        "trainbus",
        "trainbus_callbacks",
        "setup.cfg",
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    ):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    return source


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """The wheel, built from it."""
    return build(source, tmp_path_factory.mktemp("target"))


def build(source: Path, target: Path, **environment: str) -> Path:
    """Build the wheel of *source* into *target*; leave nothing behind in *source*."""
    command = [sys.executable, "-m", "build", "-q", "--wheel", "--outdir", target, source]
    subprocess.run(command, check=True, env={**os.environ, **environment})
    shutil.rmtree(source / "build")
    (built,) = target.glob("*.whl")
    return built
