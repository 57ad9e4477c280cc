"""Compiled programs: counted, and kept where the user says."""

import jax
import jax.numpy as jnp
import pytest

from rpt_jax import compilation


def test_a_program_counts_when_it_is_compiled_and_not_when_it_runs_again():
    double = jax.jit(lambda x: 2 * x + 1)
    before = compilation.programs()
    double(jnp.ones(3)).block_until_ready()
    assert compilation.programs() > before
    after = compilation.programs()
    double(jnp.zeros(3)).block_until_ready()
    assert compilation.programs() == after
    double(jnp.zeros(4)).block_until_ready()
    assert compilation.programs() > after


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"XDG_CACHE_HOME": "/x"}, "/x/rpt_jax/compiled"),
        ({"HOME": "/home/a"}, "/home/a/.cache/rpt_jax/compiled"),
        ({"JAX_COMPILATION_CACHE_DIR": ""}, None),
    ],
)
def test_programs_are_kept_in_the_users_cache_unless_he_says_where(monkeypatch, environment, folder):
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    said = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: said.append((name, value)))
    compilation.keep_on_disk()
    assert said == ([("jax_compilation_cache_dir", folder)] if folder else [])
