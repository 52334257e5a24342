"""What is better, and what happens to a score while its file is on the way."""

from __future__ import annotations

import math
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainbus_callbacks.best_score import ScoreLedger, Standing, resolve_mode


class TestResolveMode:
    @pytest.mark.parametrize("mode", ["min", "max"])
    def test_explicit(self, mode):
        """
        What the user says is taken, whatever the name.
        """
        assert resolve_mode("anything", mode) == mode

    @pytest.mark.parametrize(
        ("monitor", "mode"),
        [
            ("val_acc", "max"),
            ("acc", "max"),
            ("test_accuracy", "max"),
            ("val/accuracy", "max"),
            ("fmeasure", "max"),
            ("val_loss", "min"),
            ("train_loss", "min"),
            ("rmse", "min"),
        ],
    )
    def test_auto_of_known(self, monitor, mode):
        """
        The auto rule gives the direction of well-known metrics without a word.
        """
        assert resolve_mode(monitor, "auto") == mode

    @pytest.mark.parametrize(
        ("monitor", "mode"), [("accumulated_loss", "max"), ("vaccine_loss", "max"), ("my_score", "min")]
    )
    def test_auto_of_unknown(self, monitor, mode):
        """
        On a name it does not know, the auto rule guesses and says so.
        """
        with pytest.warns(RuntimeWarning, match=f"takes '{mode}' for '{monitor}', a metric it does not know"):
            assert resolve_mode(monitor, "auto") == mode

    def test_nearest(self):
        """
        The warning names the nearest known metric.
        """
        with pytest.warns(RuntimeWarning, match="Did you mean 'loss'"):
            resolve_mode("val_los", "auto")

    @pytest.mark.parametrize(
        "monitor", ["val_f1", "auc", "map", "iou", "bleu", "r2", "psnr", "reward", "top1", "val_fmeasure"]
    )
    def test_auto_of_contrary(self, monitor):
        """
        Metrics that the auto rule gets wrong are warned of, with the direction they have.
        """
        with pytest.warns(RuntimeWarning, match=r"is better at its max. Pass mode="):
            assert resolve_mode(monitor, "auto") == "min"

    def test_unknown_mode(self):
        """
        An unknown mode is warned of, and auto is used.
        """
        with pytest.warns(RuntimeWarning, match="Unknown mode 'Max'; 'auto' is used"):
            assert resolve_mode("val_acc", "Max") == "max"

    def test_without_monitor(self):
        """
        Without a monitor there is nothing to guess.
        """
        assert resolve_mode(None, "auto") == "min"


def save(ledger, score, path="best.pt", *, epoch=0, global_step=1):
    """Propose a save with a score, as a callback would."""
    proposal = ledger.propose(path, score, epoch=epoch, global_step=global_step)
    proposal.save = object()
    return proposal.save


class TestImproves:
    @pytest.mark.parametrize(("mode", "worse", "better"), [("min", 0.6, 0.4), ("max", 0.4, 0.6)])
    def test_strict(self, mode, worse, better):
        """
        Only strictly better is better; equal is not.
        """
        ledger = ScoreLedger(mode)
        ledger.settle(save(ledger, 0.5), durable=True)

        assert [ledger.improves(score) for score in (worse, 0.5, better)] == [False, False, True]

    @pytest.mark.parametrize("mode", ["min", "max"])
    @pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
    def test_not_finite(self, mode, score):
        """
        NaN and infinity are never best, neither first nor later; the first finite value is.
        """
        ledger = ScoreLedger(mode)

        assert not ledger.improves(score)
        assert ledger.improves(1e300 if mode == "min" else -1e300)
        ledger.settle(save(ledger, 0.0), durable=True)
        assert not ledger.improves(score)


class TestSettle:
    def test_durable(self):
        """
        The best changes when the file is durable, not before.
        """
        ledger = ScoreLedger("min")
        one = save(ledger, 0.5, epoch=2, global_step=30)
        before = ledger.durable

        ledger.settle(one, durable=True)

        assert before == Standing()
        assert ledger.durable == Standing(0.5, "best.pt", 2, 30)

    def test_rolled_back(self):
        """
        A failed save takes its score with it: what was worse than it is an improvement again.
        """
        ledger = ScoreLedger("min")
        one = save(ledger, 0.5)
        refused = ledger.improves(0.6)

        ledger.settle(one, durable=False)

        assert (refused, ledger.improves(0.6)) == (False, True)
        assert ledger.durable == ledger.expected == Standing()

    def test_newest_pending_counts(self):
        """
        Decisions compare with the newest pending score, and after its failure with the one before.
        """
        ledger = ScoreLedger("min")
        first, second = save(ledger, 0.5), save(ledger, 0.4)
        with_both = ledger.improves(0.45)

        ledger.settle(second, durable=False)

        assert (with_both, ledger.improves(0.45)) == (False, True)
        ledger.settle(first, durable=True)
        assert ledger.durable.best_score == 0.5

    def test_came_late(self):
        """
        A save that was rolled back and is durable after all counts, until a later one is durable.
        """
        ledger = ScoreLedger("min")
        hung, refused = save(ledger, 0.5), save(ledger, 0.4)
        for one in (hung, refused):
            ledger.settle(one, durable=False)
        ledger.settle(hung, durable=True)

        assert ledger.durable == ledger.expected and ledger.durable.best_score == 0.5
        ledger.settle(refused, durable=True)
        assert ledger.durable.best_score == 0.5

    @pytest.mark.parametrize("paths", [("a.pt", "b.pt"), ("best.pt", "best.pt")])
    def test_any_order(self, paths):
        """
        Reports that come in another order end with the same best.
        """
        ledger = ScoreLedger("max")
        first, second = save(ledger, 0.4, paths[0]), save(ledger, 0.5, paths[1])

        ledger.settle(second, durable=True)
        ledger.settle(first, durable=True)

        assert (ledger.durable.best_score, ledger.durable.best_path) == (0.5, paths[1])

    def test_unknown_save(self):
        """
        Other callbacks' saves are of no concern, also while a request is under way.
        """
        ledger = ScoreLedger("min")
        ledger.propose("best.pt", 0.5, epoch=0, global_step=1)

        ledger.settle(object(), durable=True)

        assert ledger.durable == Standing()

    def test_overwritten(self):
        """
        When a later file takes the name of the best one, the score stays known and the path does not.
        """
        ledger = ScoreLedger("min")
        for score in (0.5, 0.7):
            ledger.settle(save(ledger, score, "last.pt"), durable=True)

        assert (ledger.durable.best_score, ledger.durable.best_path) == (0.5, None)

    @pytest.mark.parametrize("first_settled", [0, 1])
    def test_better_one_fails(self, first_settled):
        """
        A save asked for while a better one was pending is the best once that one has failed.
        """
        ledger = ScoreLedger("min")
        ledger.settle(save(ledger, 0.6, "1.pt"), durable=True)
        better, worse = save(ledger, 0.3, "2.pt"), save(ledger, 0.4, "3.pt")
        settle = [(better, False), (worse, True)]

        for one, durable in (settle[first_settled], settle[1 - first_settled]):
            ledger.settle(one, durable=durable)

        assert (ledger.durable.best_score, ledger.durable.best_path) == (0.4, "3.pt")
        assert not ledger.improves(0.5)

    def test_overwritten_while_pending(self):
        """
        A save asked for behind a better one of the same name takes its place.
        """
        ledger = ScoreLedger("min")
        both = save(ledger, 0.5, "last.pt"), save(ledger, 0.7, "last.pt")
        expected = ledger.expected

        for one in both:
            ledger.settle(one, durable=True)

        assert expected == ledger.durable
        assert (ledger.durable.best_score, ledger.durable.best_path) == (0.5, None)

    def test_expected(self):
        """
        The expected standing is that with every pending save durable.
        """
        ledger = ScoreLedger("min")
        save(ledger, 0.5, epoch=0, global_step=3)
        save(ledger, 0.4, "b.pt", epoch=1, global_step=6)

        assert ledger.expected == Standing(0.4, "b.pt", 1, 6)

    @given(
        st.lists(st.tuples(st.floats(), st.booleans()), max_size=12),
        st.sampled_from(["min", "max"]),
    )
    def test_best_of_the_durable(self, saves, mode):
        """
        Whatever fails: in the end the best is that of the finite scores whose files are durable.
        """
        ledger = ScoreLedger(mode)
        proposed = [(save(ledger, score), durable) for score, durable in saves]

        for one, durable in proposed:
            ledger.settle(one, durable=durable)

        kept = [score for score, durable in saves if durable and math.isfinite(score)]
        assert ledger.durable.best_score == (({"min": min, "max": max}[mode])(kept) if kept else None)
        assert ledger.durable == ledger.expected


class TestGate:
    @pytest.mark.parametrize(("mode", "other"), [("min", 0.6), ("max", 0.4)])
    def test_opens_once(self, mode, other):
        """
        The gate opens at the first strictly better score and stays open.
        """
        ledger = ScoreLedger(mode, 0.5)

        passed = [ledger.gate(score) for score in (other, 0.5, math.nan, None, 1 - other, other, None)]

        assert passed == [False, False, False, False, True, True, True]

    def test_without_threshold(self):
        """
        Without a threshold everything passes.
        """
        assert ScoreLedger("min").gate(None)

    def test_restore(self):
        """
        A restored ledger goes on from what it is given; its pending saves are forgotten.
        """
        ledger = ScoreLedger("min", 0.5)
        one = save(ledger, 0.1)

        ledger.restore(Standing(0.4, "b.pt", 1, 6), threshold_passed=True)
        ledger.settle(one, durable=True)

        assert ledger.expected == Standing(0.4, "b.pt", 1, 6)
        assert ledger.gate(0.9)

    def test_restore_without_threshold(self):
        """
        A threshold that is no longer asked for holds nothing back.
        """
        ledger = ScoreLedger("min")

        ledger.restore(Standing(), threshold_passed=False)

        assert ledger.gate(None)


def test_no_warning_for_explicit_mode():
    """An explicit mode never warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve_mode("val_f1", "max")
