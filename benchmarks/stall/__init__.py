"""
What a checkpoint costs the training thread, beside the peers: ``python -m benchmarks.stall``.

**Lost time** of a save is the sum of (step - median step) over the steps from this save to the
next, the call included; the median is that of the same loop in the same process without saves,
measured before the first save and after the last. How long the call takes is another column: it
hides what a background write takes from the steps that follow.

- Each run of a peer on a workload is a process of its own, and the rounds alternate between the
  peers, so that a busy moment hits them alike. The row ``no saves`` does everything but save: what
  it shows is the noise.
- Intervals are 95 % intervals of the median from the order statistics of all saves; with fewer
  than six saves they are the range. A peer has lost ``more`` or ``less`` than we only where its
  interval and ours do not overlap; else the two are equal within noise.
- The first save of each process is a column of its own and in no other.
- ``complete`` is the time from the request until the file is complete by the peer's own means: a
  future, a return. For those that never sync it may by then be in memory only.
- ``host`` is the peak of resident memory over that of the same training alone, with the peer
  imported; processes of the peer count, the page cache does not.
- ``pause`` is how long a Python thread that only looks at the clock is kept from it during a save: of the
  longest pauses in each millisecond the 99th percentile and the longest, and the sum of them all in a
  save. ``beside Python`` is how long that save takes until it is complete, beside such a thread. Both
  end after two seconds.
- ``torn`` counts files that are no state the training was ever in.
- The clock stands still while a file is removed, for all alike: the previous one, once the next
  is complete.
"""
