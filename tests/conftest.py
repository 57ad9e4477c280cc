"""What every test stands on: eight virtual CPU devices, strict broadcasting, deterministic property tests.

Real data is looked for in $RPT_DATA, otherwise in `../shared/data` beside the checkout; tests that need it carry
the mark `realdata`, take the fixture `real_data` and are skipped by name where it is absent. Warnings are errors
(setup.cfg, which lists the one of a third party that is let through).
"""

import os
import tempfile
from pathlib import Path

import fast_xla

# Before the first import of jax: the flags are read once, when its backend starts.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""  # what a test compiles is not kept
# What stands in XLA_FLAGS already comes last and wins.
os.environ["XLA_FLAGS"] = " ".join(
    ("--xla_force_host_platform_device_count=8", fast_xla.FLAGS, os.environ.get("XLA_FLAGS", ""))
)

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# The first example of a property test compiles, so a deadline would measure XLA; examples are the same in every run.
hypothesis.settings.register_profile("rpt", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("rpt")


@pytest.fixture(autouse=True, scope="module")
def few_mappings():
    """Drops compiled programs when the process holds many: each is several memory mappings, the kernel allows a process
    65,530 (vm.max_map_count), and the process that asks for one more is killed."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture(autouse=True, scope="session")
def made_once(tmp_path_factory):
    """Folders of cached helpers lie among pytest's, which removes old ones, and do not stay in /tmp for good."""
    tempfile.tempdir = str(tmp_path_factory.mktemp("made_once"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real data sets and tokenizers; skips the test where there is none."""
    checkout = Path(__file__).resolve().parent.parent
    folder = Path(os.environ.get("RPT_DATA", checkout.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist (set RPT_DATA to the folder that holds it)")
    return folder
