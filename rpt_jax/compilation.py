"""What XLA compiles: kept on disk from run to run, and counted, since a shape that is new costs seconds to minutes.

In: a folder. Out: JAX's persistent cache there, and the number of programs that this process has compiled or fetched.
"""

import os
from pathlib import Path

import jax

EVENT = "/jax/core/compile/backend_compile_duration"  # once a program, whether XLA compiles it or the cache has it
_count = 0


def _listen(event: str, seconds: float, **_) -> None:
    global _count
    _count += event == EVENT


jax.monitoring.register_event_duration_secs_listener(_listen)


def programs() -> int:
    """How many programs have been made ready since this module was imported."""
    return _count


def keep_on_disk() -> None:
    """Lets JAX keep compiled programs in JAX_COMPILATION_CACHE_DIR ("": nowhere) or else in the user's cache."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "rpt_jax" / "compiled"))
