"""A new run that starts from an old one: fine-tuning on another task, reward or budget."""

from __future__ import annotations

from pathlib import Path

from rlplastic.checkpoint import Loaded
from rlplastic.errors import CheckpointError, ConfigurationError, nearest
from rlplastic.session import Session, named_parts, part
from rlplastic.sharding import ShardedStore

PARTS = ("actor", "critic", "replay")


def initialise(session: Session, run: str, what: str) -> str:
    """Take parts of the newest checkpoint of ``run`` into a session at step 0; returns a sentence for the banner.

    With an actor, exploration follows it from the first step, instead of uniform random actions; with a replay,
    learning starts at once. Optimizers, counters and schedules always start anew.

    Args:
        session: just built.
        run: directory of the old run.
        what: some of `PARTS`, separated by commas.

    Raises:
        ConfigurationError: unknown part, no such run, or networks or replay of other sizes.
        CheckpointError: the old run's checkpoints are damaged.
    """
    parts = named_parts(what)
    for name in parts:
        if name not in PARTS:
            raise ConfigurationError(f"init_what={what!r} asks for {name!r}; {nearest(name, PARTS)}")
    store = ShardedStore(Path(run), 1, session.agent.COLUMNS, session.group)
    loaded = store.newest(segments="replay" in parts)
    if loaded is None:
        raise ConfigurationError(f"init_from={run!r} has no checkpoint; expected the directory of a run that saved one")
    networks = [name for name in parts if name != "replay"]
    try:
        if networks:
            session.agent.initialise(loaded.tensors("agent"), networks)
        if "replay" in parts:
            _take_replay(session, loaded)
    except (RuntimeError, CheckpointError) as error:
        reason = str(error).strip().split("\n")[-1].strip()
        raise ConfigurationError(
            f"init_from={run!r} does not fit this run ({reason}); expected the same sizes of environments and networks"
        ) from error
    return f"{', '.join(parts)} of {run} at its step {loaded.step:,}"


def _take_replay(session: Session, loaded: Loaded) -> None:
    """All stored transitions; the old heads stay as rows that are no transition."""
    session.replay.clear()
    for segment in loaded.segments():
        session.replay.import_rows(part(segment, "replay."))
    session.replay.import_head(loaded.tensors("replay_head"))
    session.replay.begin(session.observation)
