"""Laws of how many cores and how much memory a process may use."""

import os

import pytest

from diffusion import devices, machine


@pytest.fixture
def limits(tmp_path, monkeypatch):
    """Writes the files of a container, in which the process is in the group /jobs/7 of version 2 or of version 1."""
    monkeypatch.setattr(machine, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)

    def write(contents):
        (tmp_path / "own").write_text("4:memory:/jobs/7\n3:cpu,cpuacct:/jobs/7\n0::/jobs/7\n")
        for name, content in contents.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    return write


@pytest.mark.parametrize(
    ("contents", "cores"),
    [
        ({}, 16),
        ({"cpu.max": "150000 100000\n"}, 1),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 16),
        ({"jobs/7/cpu.max": "400000 100000"}, 4),
        ({"jobs/7/cpu.max": "400000 100000", "jobs/cpu.max": "300000 100000"}, 3),
        ({"cpu/jobs/7/cpu.cfs_quota_us": "500000", "cpu/jobs/7/cpu.cfs_period_us": "100000"}, 5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
    ],
    ids=str,
)
def test_the_tightest_quota_of_a_container_bounds_the_cores(limits, contents, cores):
    limits(contents)
    assert machine.cores() == cores


@pytest.mark.parametrize(
    ("contents", "memory"),
    [
        ({}, None),
        ({"memory.max": "1000000\n"}, 1_000_000),
        ({"memory.max": "max\n"}, None),
        ({"jobs/memory.max": "3000000", "jobs/7/memory.max": "max"}, 3_000_000),
        ({"memory/jobs/7/memory.limit_in_bytes": "5000000"}, 5_000_000),
        ({"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
    ],
    ids=str,
)
def test_the_tightest_limit_of_a_container_bounds_the_memory(limits, contents, memory):
    limits(contents)
    assert machine.memory() == (memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def test_a_cpu_gets_a_device_for_each_core_that_may_be_used(monkeypatch):
    asked = {}
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    monkeypatch.setattr(devices.machine, "cores", lambda: 7)
    monkeypatch.setattr(devices.heap, "prepare", lambda: None)
    monkeypatch.setattr(devices.jax.config, "update", asked.__setitem__)
    devices.prepare()
    assert asked["jax_num_cpu_devices"] == 7
