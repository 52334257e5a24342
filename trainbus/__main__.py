"""``python -m trainbus``: the command line of this very Python, whatever is on the path."""

from __future__ import annotations

from trainbus.cli import main

main()
