"""Log lines are printed only where nobody has configured logging, and only for a while."""

from __future__ import annotations

import logging

import pytest

from trainbus.console import ConsoleLines, console_lines

logger = logging.getLogger("trainbus")
pytestmark = pytest.mark.usefixtures("unconfigured_logging")


class TestConsoleLines:
    def test_prints(self, capsys):
        """
        From INFO upwards, each record is one line on stdout.
        """
        with console_lines():
            logger.debug("not this")
            logger.info("saved %s", "best.pt")
            logger.warning("careful")

        assert capsys.readouterr().out == "saved best.pt\ncareful\n"

    def test_beside_handlers_that_show_warnings(self, capsys, monkeypatch):
        """
        A root logger that shows warnings only goes on doing so, and the rest is printed.
        """
        seen = []
        root = logging.Logger("root", logging.WARNING)
        root.addHandler(ConsoleLines(seen.append))
        monkeypatch.setattr(logger, "parent", root)
        with console_lines():
            logger.info("saved best.pt")
            logger.warning("careful")
        logger.warning("afterwards")

        assert capsys.readouterr().out == "saved best.pt\n"
        assert seen == ["careful", "afterwards"]

    def test_leaves_no_trace(self):
        """
        Afterwards, also after an exception, the logger is as it was.
        """
        logger.setLevel(logging.ERROR)
        try:
            with pytest.raises(KeyError), console_lines():
                raise KeyError
            assert (logger.level, logger.handlers) == (logging.ERROR, [])
        finally:
            logger.setLevel(logging.NOTSET)

    def test_configured(self, capsys):
        """
        A handler of the user's is left to do the work, at the level the user set.
        """
        mine = logging.NullHandler()
        logger.addHandler(mine)
        try:
            with console_lines():
                logger.warning("for the user's handler")
                assert (logger.handlers, logger.level) == ([mine], logging.NOTSET)
        finally:
            logger.removeHandler(mine)

        assert capsys.readouterr().out == ""

    def test_nested(self):
        """
        An inner context redirects the lines of the outer one.
        """
        outer, inner = [], []
        with console_lines(outer.append):
            with console_lines(inner.append):
                logger.info("one")
            logger.info("two")

        assert (inner, outer) == (["one"], ["two"])

    def test_failing_write(self, capsys):
        """
        A write that fails is reported by logging and stops nothing.
        """

        def fail(line):
            raise OSError("closed")

        ConsoleLines(fail).handle(logging.makeLogRecord({"msg": "lost"}))

        assert "OSError: closed" in capsys.readouterr().err
