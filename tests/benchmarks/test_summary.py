"""What the benchmark says of its runs: medians with intervals, and only what they bear out."""

from __future__ import annotations

import pytest

from benchmarks.stall.summary import EQUAL, Interval, median_interval, percentile, rows


def run(peer, lost, *, first=0.5, complete=1.0, torn=0, **fields):
    """Return what one process measured: a save for each of *lost*, in seconds."""
    return {
        "peer": peer,
        "workload": "host-idle-64",
        "fsync": True,
        "save_every": 20,
        "state_bytes": 1000,
        "step": 0.1,
        "host_bytes": 1010,
        "device_bytes": 0,
        "first": {"lost": first},
        "saves": [
            {"lost": one, "wall": 2.0, "call": one / 2, "longest": one, "complete": complete} for one in lost
        ],
        "pauses": {"p99": 0.001, "max": 0.002, "per_save": 0.003, "complete": [0.4, None, 0.5]},
        "checked": 2,
        "torn": torn,
        **fields,
    }


class TestInterval:
    def test_thirty_values(self):
        """Of thirty values the interval goes from the tenth to the twenty-first: 95.7 % by the binomial."""
        assert median_interval([float(n) for n in range(30, 0, -1)]) == Interval(15.5, 10.0, 21.0)

    @pytest.mark.parametrize("count", range(1, 6))
    def test_few_values(self, count):
        """Of fewer than six the range is returned, which covers less."""
        values = [float(n) for n in range(count)]

        assert median_interval(values) == Interval((count - 1) / 2, 0.0, count - 1.0)

    def test_claims(self):
        """More or less is said only where the intervals do not overlap."""
        ours = Interval(5, 4, 6)

        assert Interval(8, 7, 9).against(ours) == "more"
        assert Interval(2, 1, 3).against(ours) == "less"
        assert Interval(8, 6, 9).against(ours) == EQUAL

    def test_percentile(self):
        """The p99 of a hundred values is the ninety-ninth."""
        assert percentile([float(n) for n in range(1, 101)], 0.99) == 99


class TestRows:
    def test_rounds_are_taken_together(self):
        """Saves of all rounds are one sample; what is the worst of a round stays the worst."""
        (row,) = rows([run("torch-save", [0.1, 0.3]), run("torch-save", [0.2], torn=1)], "host-idle-64")

        assert row["rounds"] == 2
        assert row["saves"] == 3
        assert row["lost"] == {"median": 0.2, "low": 0.1, "high": 0.3}
        assert (row["longest_step"], row["checked"], row["torn"]) == (0.3, 4, 1)
        assert row["beside_python"] == 0.5

    def test_against_ours(self):
        """Each other is compared with trainbus, and with what the disk can do."""
        limits = {
            "peer": "limits",
            "workload": "host-idle-64",
            "disk": {"1": 4000.0, "4": 3000.0},
            "sink_crc": 1500.0,
            "sink_no_crc": 9000.0,
            "load": {"trainbus": 1.2, "torch": 1.0},
            "fork": {"without": 1.0, "with": 1.5, "stepped": 1.1},
        }
        runs = [run("trainbus-auto", [0.1]), run("torch-save-fsync", [0.4], complete=2.0), limits]

        ours, other = rows(runs, "host-idle-64")

        assert other["lost_against_ours"] == "more"
        assert other["lost_per_ours"] == pytest.approx(4)
        assert ours["complete_per_fsync"] == 0.5
        assert (ours["bytes_per_second"], ours["share_of_disk"]) == (1000, 0.25)

    def test_a_peer_that_failed(self):
        """One that could not be measured says why, and the others are measured."""
        failed = {"peer": "ignite", "workload": "host-idle-64", "error": "no such module"}

        one, other = rows([failed, run("torch-save", [0.1])], "host-idle-64")

        assert one["error"] == "no such module"
        assert other["lost"]["median"] == 0.1
