"""Numbers of a run as TensorBoard reads them.

Written at once, by the process itself: tensorboardX's SummaryWriter hands them to a thread, and where that has died of
a full disk the run waits for it for ever.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar


def open_events(folder: Path, start: int | None) -> EventsWriter:
    """A new file of events. start: updates made before it in this folder, after which none seen before count."""
    folder.mkdir(parents=True, exist_ok=True)
    events = EventsWriter(str(folder / "events"), f".{os.getpid()}")
    if start is not None:
        events.write_event(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))
    return events


def write_scalars(events: EventsWriter, numbers: Mapping[str, float], step: int) -> None:
    """All of them, on disk when this returns; raises OSError."""
    for name, value in numbers.items():
        events.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
    events.flush()
