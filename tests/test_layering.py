"""Who may import whom. A new module must be given a place in this table."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EVENTS = {"trainbus.errors", "trainbus.events"}
SUBSCRIBING = {*EVENTS, "trainbus.receiver", "trainbus.subscription"}
FILE = {"trainbus.errors", "trainbus.checkpoint.file_format", "trainbus.checkpoint.manifest"}
STATE = {"trainbus.errors", "trainbus.ranks", "trainbus.state."}
RUN = {"trainbus.errors", "trainbus.ranks", "trainbus.state.", "trainbus.loop.", "trainbus.console"}
PUBLIC = {
    "trainbus",
    "trainbus.errors",
    "trainbus.ranks",
    "trainbus.callback",
    "trainbus.console",
    "trainbus.checkpoint.folder",
    "trainbus.checkpoint.manifest",
    "trainbus.checkpoint.retention",
    "trainbus.checkpoint.sharded_format",
}

# module (or a room, with a dot at its end) -> what of ours it may import, in the same spelling
ALLOWED: dict[str, set[str]] = {
    "trainbus": {"trainbus."},  # lazily: see test_costs_no_torch
    # leaves
    "trainbus.errors": set(),
    "trainbus.ranks": {"trainbus.errors", "trainbus.rank_table"},
    "trainbus.rank_table": {"trainbus.errors"},
    "trainbus.unwrap": set(),
    "trainbus.claims": set(),
    "trainbus.console": set(),
    # the event half
    "trainbus.events": EVENTS,
    "trainbus.receiver": EVENTS,
    "trainbus.subscription": {*EVENTS, "trainbus.receiver"},
    "trainbus.signals": SUBSCRIBING,
    "trainbus.bus": {*SUBSCRIBING, "trainbus.signals"},
    "trainbus.callback": {*SUBSCRIBING, "trainbus.bus"},
    # the checkpoint half: knows no bus, no callback, no handler
    "trainbus.checkpoint": set(),
    "trainbus.checkpoint.stats": set(),
    "trainbus.checkpoint.snapshot_plan": {"trainbus.errors"},
    "trainbus.checkpoint.staging_memory": {"trainbus.errors"},
    "trainbus.checkpoint.collector": set(),
    "trainbus.checkpoint.nesting": set(),
    "trainbus.checkpoint.host_copy": {"trainbus.checkpoint._nontemporal"},
    "trainbus.checkpoint.background_copy": {"trainbus.errors", "trainbus.checkpoint.host_copy"},
    "trainbus.checkpoint.copy_thread": {"trainbus.checkpoint.background_copy"},
    "trainbus.checkpoint.cuda": set(),
    "trainbus.checkpoint.page_locking": {
        "trainbus.checkpoint.cuda",
        "trainbus.checkpoint.staging_memory",
    },
    "trainbus.checkpoint.device_copy": {
        "trainbus.checkpoint.kinds_kept",
        "trainbus.checkpoint.cuda",
        "trainbus.checkpoint.page_locking",
        "trainbus.checkpoint.snapshot_plan",
    },
    "trainbus.checkpoint.zip_records": set(),
    "trainbus.checkpoint.turns": set(),
    "trainbus.checkpoint.state_pickle": {"trainbus.checkpoint._writing", "trainbus.checkpoint.turns"},
    "trainbus.checkpoint.hasher": set(),
    "trainbus.checkpoint.record_sums": {
        "trainbus.checkpoint._writing",
        "trainbus.checkpoint.hasher",
        "trainbus.checkpoint.turns",
    },
    "trainbus.checkpoint.image_records": {
        "trainbus.checkpoint.hasher",
        "trainbus.checkpoint.record_sums",
        "trainbus.checkpoint.turns",
        "trainbus.checkpoint.zip_records",
    },
    "trainbus.checkpoint.archive": {
        "trainbus.checkpoint.collector",
        "trainbus.checkpoint.hasher",
        "trainbus.checkpoint.image_records",
        "trainbus.checkpoint.record_sums",
        "trainbus.checkpoint.state_pickle",
        "trainbus.checkpoint.turns",
        "trainbus.checkpoint.zip_records",
    },
    "trainbus.checkpoint.snapshot_views": {
        "trainbus.checkpoint.kinds_kept",
        "trainbus.checkpoint.archive",
        "trainbus.checkpoint.host_copy",
        "trainbus.checkpoint.page_locking",
        "trainbus.checkpoint.snapshot_plan",
        "trainbus.checkpoint.staging_memory",
    },
    "trainbus.checkpoint.kinds_kept": set(),
    "trainbus.checkpoint.staging_copy": {
        "trainbus.checkpoint.kinds_kept",
        "trainbus.checkpoint.background_copy",
        "trainbus.checkpoint.copy_thread",
        "trainbus.checkpoint.cuda",
        "trainbus.checkpoint.device_copy",
        "trainbus.checkpoint.nesting",
        "trainbus.checkpoint.page_locking",
        "trainbus.checkpoint.snapshot",
        "trainbus.checkpoint.snapshot_plan",
        "trainbus.checkpoint.snapshot_views",
        "trainbus.checkpoint.staging_memory",
        "trainbus.checkpoint.zip_records",
    },
    "trainbus.checkpoint.snapshot": {
        "trainbus.checkpoint.archive",
        "trainbus.checkpoint.background_copy",
        "trainbus.checkpoint.staging_memory",
    },
    "trainbus.checkpoint.throttle": set(),
    "trainbus.checkpoint.warm_up": {"trainbus.checkpoint.staging_copy"},
    "trainbus.checkpoint.fence": {"trainbus.checkpoint.background_copy"},
    "trainbus.checkpoint.disk": {"trainbus.errors"},
    "trainbus.checkpoint.manifest": {"trainbus.errors"},
    "trainbus.checkpoint.file_format": {"trainbus.errors", "trainbus.checkpoint.manifest"},
    "trainbus.checkpoint.write_behind": {
        "trainbus.errors",
        "trainbus.checkpoint._writing",
        "trainbus.checkpoint.disk",
        "trainbus.checkpoint.staging_memory",
    },
    "trainbus.checkpoint.output_stream": {
        *FILE,
        "trainbus.checkpoint.disk",
        "trainbus.checkpoint.hasher",
        "trainbus.checkpoint.write_behind",
    },
    "trainbus.checkpoint.commit": {
        *FILE,
        "trainbus.checkpoint.disk",
        "trainbus.checkpoint.write_behind",
        "trainbus.checkpoint.output_stream",
        "trainbus.checkpoint.sharded_commit",
        "trainbus.checkpoint.sharded_format",
        "trainbus.checkpoint.temporary",
    },
    "trainbus.checkpoint.sharded_format": {*FILE, "trainbus.checkpoint.temporary"},
    "trainbus.checkpoint.sharded_commit": {
        *FILE,
        "trainbus.checkpoint.disk",
        "trainbus.checkpoint.write_behind",
        "trainbus.checkpoint.output_stream",
        "trainbus.checkpoint.sharded_format",
        "trainbus.checkpoint.temporary",
    },
    "trainbus.checkpoint.sharded_state": {"trainbus.checkpoint.nesting"},
    "trainbus.checkpoint.sharded_writer": {
        *FILE,
        "trainbus.checkpoint.disk",
        "trainbus.checkpoint.collector",
        "trainbus.checkpoint.write_behind",
        "trainbus.checkpoint.commit",
        "trainbus.checkpoint.sharded_commit",
        "trainbus.checkpoint.sharded_format",
        "trainbus.checkpoint.sharded_state",
    },
    "trainbus.checkpoint.sharded_contents": {
        *FILE,
        "trainbus.checkpoint.sharded_format",
        "trainbus.checkpoint.sharded_state",
        "trainbus.checkpoint.unpickling",
        "trainbus.checkpoint.verify",
    },
    "trainbus.checkpoint.sharded_load": {
        *FILE,
        "trainbus.checkpoint.outline",
        "trainbus.checkpoint.sharded_contents",
        "trainbus.checkpoint.sharded_format",
        "trainbus.checkpoint.sharded_state",
    },
    "trainbus.checkpoint.sharded": {"trainbus.errors", "trainbus.checkpoint."},
    "trainbus.checkpoint.temporary": {"trainbus.checkpoint.disk"},
    "trainbus.checkpoint.template_lock": {"trainbus.errors", "trainbus.checkpoint.disk"},
    "trainbus.checkpoint.pending_save": {*FILE, "trainbus.checkpoint.stats"},
    "trainbus.checkpoint.retries": set(),
    "trainbus.checkpoint.interpreter_exit": {"trainbus.errors"},
    "trainbus.checkpoint.write_job": {
        *FILE,
        "trainbus.checkpoint.pending_save",
        "trainbus.checkpoint.retries",
    },
    "trainbus.checkpoint.patience": {"trainbus.checkpoint.write_job"},
    "trainbus.checkpoint.save_outcomes": {
        *FILE,
        "trainbus.checkpoint.interpreter_exit",
        "trainbus.checkpoint.pending_save",
    },
    "trainbus.checkpoint.job_runner": {
        "trainbus.checkpoint.commit",
        "trainbus.checkpoint.pending_save",
        "trainbus.checkpoint.save_outcomes",
        "trainbus.checkpoint.write_job",
    },
    "trainbus.checkpoint.background_writer": {
        *FILE,
        "trainbus.checkpoint.interpreter_exit",
        "trainbus.checkpoint.job_runner",
        "trainbus.checkpoint.patience",
        "trainbus.checkpoint.pending_save",
        "trainbus.checkpoint.save_outcomes",
        "trainbus.checkpoint.write_job",
    },
    "trainbus.checkpoint.folder": {*FILE, "trainbus.checkpoint.sharded_format"},
    "trainbus.checkpoint.retention": {*FILE, "trainbus.checkpoint.folder"},
    "trainbus.checkpoint.digest": set(),
    "trainbus.checkpoint.verify": {
        *FILE,
        "trainbus.checkpoint.digest",
        "trainbus.checkpoint.folder",
        "trainbus.checkpoint.sharded_format",
    },
    "trainbus.checkpoint.outline": FILE,
    "trainbus.checkpoint.unpickling": set(),
    "trainbus.checkpoint.load": {
        *FILE,
        "trainbus.checkpoint.folder",
        "trainbus.checkpoint.sharded_format",
        "trainbus.checkpoint.sharded_load",
        "trainbus.checkpoint.unpickling",
        "trainbus.checkpoint.verify",
    },
    "trainbus.checkpoint.damage": {*FILE, "trainbus.checkpoint.load", "trainbus.checkpoint.nesting"},
    "trainbus.checkpoint.saver": {"trainbus.errors", "trainbus.checkpoint."},
    "trainbus.state.": STATE,
    "trainbus.state": set(),
    # the run
    "trainbus.loop.": RUN,
    "trainbus.loop": set(),
    "trainbus.loop.read_only": set(),
    "trainbus.save_load": {"trainbus", "trainbus.checkpoint.", "trainbus.state."},
    "trainbus.agreement": {
        "trainbus.errors",
        "trainbus.ranks",
        "trainbus.checkpoint.manifest",
        "trainbus.checkpoint.pending_save",
    },
    "trainbus.divided_saves": {
        "trainbus.errors",
        "trainbus.ranks",
        "trainbus.checkpoint.",
        "trainbus.state.",
    },
    "trainbus.reserved_names": {
        "trainbus.errors",
        "trainbus.ranks",
        "trainbus.claims",
        "trainbus.checkpoint.template_lock",
    },
    "trainbus.save_requests": {
        "trainbus.agreement",
        "trainbus.errors",
        "trainbus.ranks",
        "trainbus.claims",
        "trainbus.checkpoint.",
        "trainbus.divided_saves",
        "trainbus.loop.moments",
        "trainbus.loop.unread_metrics",
        "trainbus.state.plain_types",
        "trainbus.state.rank_parts",
        "trainbus.save_load",
    },
    "trainbus.leaving": {"trainbus.bus", "trainbus.errors"},
    "trainbus.loading": {
        "trainbus.errors",
        "trainbus.ranks",
        "trainbus.checkpoint.background_writer",
        "trainbus.checkpoint.manifest",
        "trainbus.checkpoint.folder",
        "trainbus.checkpoint.sharded_format",
        "trainbus.state.",
    },
    "trainbus.save_reports": {
        "trainbus.errors",
        "trainbus.ranks",
        "trainbus.bus",
        "trainbus.checkpoint.stats",
    },
    "trainbus.run_position": {*RUN, "trainbus.checkpoint.saver", "trainbus.save_requests"},
    "trainbus.run_saving": {
        *RUN,
        "trainbus.agreement",
        "trainbus.bus",
        "trainbus.checkpoint.",
        "trainbus.reserved_names",
        "trainbus.run_position",
        "trainbus.save_reports",
        "trainbus.save_requests",
    },
    "trainbus.run_loading": {
        "trainbus.callback",
        "trainbus.checkpoint.",
        "trainbus.loading",
        "trainbus.run_saving",
        "trainbus.state.",
    },
    "trainbus.handler": {
        *RUN,
        "trainbus",
        "trainbus.agreement",
        "trainbus.bus",
        "trainbus.callback",
        "trainbus.checkpoint.",
        "trainbus.divided_saves",
        "trainbus.leaving",
        "trainbus.reserved_names",
        "trainbus.run_loading",
        "trainbus.save_reports",
        "trainbus.save_requests",
        "trainbus.unwrap",
    },
    # around it
    "trainbus.testing.": {
        "trainbus.testing.",
        *SUBSCRIBING,
        "trainbus.bus",
        "trainbus.checkpoint.",
        "trainbus.callback",
        "trainbus.loop.read_only",
    },
    "trainbus.testing": {"trainbus.testing."},
    "trainbus.cli.report.": {"trainbus", "trainbus.", "trainbus_callbacks.history_file"},
    "trainbus.cli.report": {"trainbus.", "trainbus_callbacks.history_file"},
    "trainbus.cli.": {"trainbus.", "trainbus_callbacks"},
    "trainbus.cli": {"trainbus.errors", "trainbus.cli.app"},
    "trainbus.__main__": {"trainbus.cli"},
    "trainbus_callbacks.": {*PUBLIC, "trainbus_callbacks."},
    "trainbus_callbacks": {"trainbus_callbacks.", "trainbus.checkpoint.retention"},
}

SOURCES = sorted(
    path for package in ("trainbus", "trainbus_callbacks") for path in (ROOT / package).rglob("*.py")
)
NO_TORCH = [
    "trainbus",
    "trainbus.bus",
    "trainbus.events",
    "trainbus.cli",
    "trainbus.testing.plugin",
    "trainbus.checkpoint.file_format",
    "trainbus.checkpoint.folder",
    "trainbus.checkpoint.sharded_format",
    "trainbus.checkpoint.outline",
    "trainbus.checkpoint.background_writer",
    "trainbus.cli.ls",
    "trainbus.cli.report",
    "trainbus.cli.show",
    "trainbus_callbacks",
]


def module_name(path: Path) -> str:
    """Return the dotted name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Return the modules of ours that a source file imports at run time, wherever in the file."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            for alias in node.names:
                submodule = ROOT / node.module.replace(".", "/") / f"{alias.name}.py"
                found.add(f"{node.module}.{alias.name}" if submodule.exists() else node.module)
    return {name for name in found if name.split(".")[0] in ("trainbus", "trainbus_callbacks")}


def covers(entry: str, module: str) -> bool:
    """Tell whether an entry of the table names a module; a dot at the end names a whole room."""
    return module == entry or (entry.endswith(".") and module.startswith(entry))


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
class TestModule:
    def test_imports_only_what_is_below(self, path):
        """Each module imports what the table allows, and is in the table."""
        name = module_name(path)
        entry = name if name in ALLOWED else next((e for e in ALLOWED if covers(e, name)), None)
        assert entry is not None, f"{name} has no place in the table of layers"

        forbidden = {i for i in imports(path) if not any(covers(allowed, i) for allowed in ALLOWED[entry])}
        assert forbidden == set(), f"{name} must not import {forbidden}"

    def test_is_short(self, path):
        """A file over 500 lines wants to be two, and most of them long before."""
        assert len(path.read_text().splitlines()) <= 500


class TestImportCost:
    def test_costs_no_torch(self):
        """What people import early, or only to look at files, imports neither torch nor NumPy."""
        code = (
            "import importlib, sys\n"
            f"for name in {NO_TORCH!r}:\n"
            "    importlib.import_module(name)\n"
            "    assert 'torch' not in sys.modules and 'numpy' not in sys.modules, name\n"
            "import trainbus\n"
            "assert trainbus.EventBus and trainbus.CheckpointFolder and trainbus.CheckpointWriteError\n"
            "assert 'torch' not in sys.modules\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)

    def test_blinker_has_one_importer(self):
        """Only signals.py knows blinker."""
        users = [
            module_name(path)
            for path in SOURCES
            if "import blinker" in path.read_text() or "from blinker" in path.read_text()
        ]
        assert users == ["trainbus.signals"]
