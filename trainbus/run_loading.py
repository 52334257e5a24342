"""The part of a `Handler` that loads: a file into its objects, the newest of a folder."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Collection
from typing import Any

from trainbus.callback import Callback
from trainbus.checkpoint.background_writer import finish_saves
from trainbus.checkpoint.load import load_checkpoint
from trainbus.checkpoint.manifest import Manifest
from trainbus.loading import load_newest, own_part, read_state
from trainbus.run_saving import RunSaving
from trainbus.state.collect import restore

__all__ = ["RunLoading"]

logger = logging.getLogger("trainbus")


class RunLoading(RunSaving):
    """What `Handler` does about checkpoints."""

    callbacks: dict[str, Callback]
    resumed: bool
    stopped: bool
    stop_reason: str | None
    lineage: tuple[str, ...]
    left_at: dict[str, tuple[int, int]]
    _unclaimed: dict[str, Any]  # states that were loaded for callbacks not yet added

    def load(
        self, path: str | os.PathLike[str], *, only: Collection[str] | None = None, strict: bool = True
    ) -> Manifest | None:
        """
        Load a checkpoint into this run's objects; first finishes a pending save of that file.

        Every rank reads the file and takes its own random state and data position from it. What a file of
        another number of ranks cannot say is told in the log. Collective when more than one rank runs: saves
        of them all are finished first. Of parameters that are divided among ranks each reads its part, in
        place. With the progress, a stop of the training so far is over: loops go on from the file's moment.

        Args:
            path: A file of this class, the folder of a sharded checkpoint, or a module's state dict saved
                by anything.
            only: Top-level parts to load, out of ``module, optimizer, scheduler, scaler, extra,
                callbacks, progress, rng, data``. ``("module",)`` is the warm start.
            strict: Refuse what does not fit, in the module's names too.

        Returns:
            The file's manifest, None if it has none.

        Raises:
            CheckpointCorruptError: If the file is damaged; nothing has been changed.
            StateMismatchError: If file and run have different parts.
        """
        self._finish_saves(path, "handler.load")
        # A stop from before all training, such as a signal's, is none of what the load goes back behind.
        stop_is_over = self.stopped and self.global_step > 0
        parts = self._parts()
        if self._divided is None:
            loaded = read_state(path, only, lambda wanted: load_checkpoint(path))
        else:
            divided = self._divided
            loaded = read_state(path, only, lambda wanted: divided.read(path, wanted, parts, strict))
            parts = divided.parts(parts)
        self.fence()
        restore(parts, loaded.state, loaded.wanted, strict)
        if "callbacks" in loaded.wanted:
            states = loaded.state["callbacks"] or {}
            self._unclaimed = {key: state for key, state in states.items() if key not in self.callbacks}
        own = own_part(loaded, path)
        if "progress" in loaded.wanted:
            self._saves.skip_postponed(f"{os.fspath(path)!r} was loaded before the next optimizer step")
            self._loop.reset()
        self._moments.restore(own.state, own.wanted)
        if "progress" in loaded.wanted:
            self.resumed = True
            if stop_is_over:
                logger.info("The stop is over (%s): %s was loaded.", self.stop_reason, os.fspath(path))
                self.stopped, self.stop_reason = False, None
            if loaded.manifest is not None:
                self.lineage = (*loaded.manifest.parents, loaded.manifest.run_id)
                self.left_at = loaded.manifest.left_from_here()
        return loaded.manifest

    def resume(self, folder: str | os.PathLike[str], *, interrupted: bool = False) -> Manifest | None:
        """
        Load the newest valid checkpoint in *folder*; damaged ones are named and passed over.

        Collective when more than one rank runs: rank 0 looks for it, and all load the same.

        Args:
            folder: Where to look.
            interrupted: Take one that `OnException` has saved too, if it is the newest.

        Returns:
            Its manifest, or None if there is nothing to resume from: a first run goes on
            from the start with the same script. The log says why, at INFO.

        Raises:
            StateMismatchError: The newest file does not fit this run.
            NotADirectoryError: *folder* is a file.
            RankError: A rank could not load what the others did.
        """
        self._finish_saves(folder, "handler.resume")
        return load_newest(folder, self.load, interrupted=interrupted)

    def _finish_saves(self, path: str | os.PathLike[str], what: str) -> None:
        # It may be what rank 0 is writing, for this handler or another, and the other ranks see it then only.
        if self._agreement.is_shared:
            self.finish_writing()
            self._agreement.finish_others(functools.partial(finish_saves, path), what)
