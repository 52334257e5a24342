"""The command line's entry, without running a command."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from trainbus.cli import main
from trainbus.errors import StateMismatchError


class TestMain:
    @pytest.mark.parametrize("package", ["typer", "rich", "tqdm"])
    def test_names_the_extra(self, package, tmp_path):
        """A command whose packages are missing says which extra to install, without a traceback."""
        code = f"import sys; sys.modules[{package!r}] = None; from trainbus.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code, "demo", str(tmp_path)], capture_output=True, text=True, timeout=60
        )

        assert done.returncode == 1
        assert 'pip install "trainbus[cli]"' in done.stderr and "Traceback" not in done.stderr

    def test_lists_its_commands(self, monkeypatch, capsys):
        """--help names the commands."""
        monkeypatch.setattr(sys, "argv", ["trainbus", "--help"])
        with pytest.raises(SystemExit) as info:
            main()

        assert info.value.code == 0
        assert "demo" in capsys.readouterr().out

    def test_folder_that_may_not_be_read(self, tmp_path, monkeypatch, capsys):
        """What the system refuses is one line, and no traceback."""

        def scandir(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)

        monkeypatch.setattr(os, "scandir", scandir)
        monkeypatch.setattr(sys, "argv", ["trainbus", "ls", str(tmp_path)])
        with pytest.raises(SystemExit) as info:
            main()

        assert info.value.code == f"trainbus: [Errno 13] Permission denied: {str(tmp_path)!r}"

    def test_error_of_trainbus(self, tmp_path, monkeypatch, capsys):
        """What trainbus itself refuses is one line too."""

        def scandir(path):
            raise StateMismatchError("does not fit")

        monkeypatch.setattr(os, "scandir", scandir)
        monkeypatch.setattr(sys, "argv", ["trainbus", "ls", str(tmp_path)])
        with pytest.raises(SystemExit) as info:
            main()

        assert info.value.code == "trainbus: does not fit"

    def test_python_m(self, tmp_path):
        """``python -m trainbus`` is the same command, in the Python that runs it."""
        command = [sys.executable, "-m", "trainbus", "ls", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)

        assert done.returncode == 0, done.stderr
        assert str(tmp_path) in done.stdout + done.stderr
