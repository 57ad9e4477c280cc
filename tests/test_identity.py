"""Claims: hosts with other numbers of devices are named by what all of them know; digests see values and their order.

What makes a run another one is shown in test_train.py, and hosts that differ otherwise in test_processes.py.
"""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
import toy

from rpt_jax.learning import identity
from rpt_jax.records import InputError


def test_hosts_with_other_numbers_of_devices_are_named(monkeypatch, tmp_path):
    """No collective could compare them: JAX's want as many devices everywhere."""
    devices = [SimpleNamespace(process_index=process) for process in (0, 0, 1, 2, 2)]
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(InputError, match="2 in process 0, 1 in process 1, 2 in process 2"):
        identity.require_same_settings(toy.config(tmp_path))


def test_digests_see_values_and_their_order():
    a, b = np.arange(3), np.arange(3.0)
    assert identity.digest([a, None, b]) == identity.digest([a.copy(), b.copy()])
    assert len({identity.digest(each) for each in ([a, b], [b, a], [a], [a[::-1], b])}) == 4
    texts = [[1, 2], [3]], [[1], [2, 3]], [[3], [1, 2]]
    assert len({identity.digest_of_texts(map(np.array, each)) for each in texts}) == 3
