"""A container's limits count, not the machine's, for both versions of the kernel's control groups."""

from pathlib import Path

from peftscale import machine

GIB = 1 << 30


def lay(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_without_control_groups_the_whole_machine_counts(tmp_path: Path) -> None:
    assert machine.num_cpus(tmp_path) >= machine.num_cpus() >= 1
    assert machine.memory_bytes(tmp_path) >= machine.memory_bytes()
    assert 0 < machine.free_bytes(tmp_path) <= machine.memory_bytes(tmp_path)


def test_limits_of_version_2_hold_also_when_they_stand_on_a_group_around(tmp_path: Path) -> None:
    root = lay(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/inner\n",
            "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/pod/inner/cpu.max": "max 100000\n",
            "sys/fs/cgroup/pod/memory.max": f"{GIB}\n",
            "sys/fs/cgroup/pod/memory.current": f"{GIB // 2}\n",
            "sys/fs/cgroup/pod/memory.stat": f"anon 5\ninactive_file {GIB // 4}\n",
            "sys/fs/cgroup/pod/inner/memory.max": "max\n",
        },
    )
    assert machine.num_cpus(root) == 1
    assert machine.memory_bytes(root) == GIB
    assert machine.free_bytes(root) == 3 * GIB // 4


def test_limits_of_version_1_hold_and_its_huge_number_means_none(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/box\n1:cpu,cpuacct:/box\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
        "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0\n",
    }
    root = lay(tmp_path / "limited", files)
    assert (machine.num_cpus(root), machine.memory_bytes(root)) == (1, 2 * GIB)
    assert machine.free_bytes(root) == GIB
    free = lay(tmp_path / "free", {**files, "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"})
    assert machine.memory_bytes(free) == machine.memory_bytes(tmp_path / "nothing")
