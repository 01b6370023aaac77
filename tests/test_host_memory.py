"""Host memory that a process may use: the machine's, or what is left of its container's limit."""

from pathlib import Path

import pytest

from sparselong.provenance import host_memory

MIB = 2**20
PROC = (
    "MemTotal:       8388608 kB\nMemFree:  1 kB\nMemAvailable:   6291456 kB\nHugePages_Total: 0\n"
)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, (8192, 6144)),
        ({"memory.max": "max\n"}, (8192, 6144)),
        ({"memory.max": f"{16384 * MIB}\n"}, (8192, 6144)),
        ({"memory.max": f"{4096 * MIB}\n"}, (4096, 4096)),
        ({"memory.max": f"{4096 * MIB}", "memory.current": f"{3000 * MIB}"}, (4096, 1096)),
        (
            {
                "memory.max": f"{4096 * MIB}",
                "memory.current": f"{3000 * MIB}",
                "memory.stat": f"anon 5\nactive_file {500 * MIB}\ninactive_file {1500 * MIB}\n",
            },
            (4096, 3096),
        ),
    ],
)
def test_a_containers_limit_counts_without_cached_files(tmp_path: Path, files, found):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(PROC)
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    for name, text in files.items():
        (group / name).write_text(text)
    assert host_memory(tmp_path) == tuple(size * MIB for size in found)


def test_this_machine_has_memory():
    total, available = host_memory()
    assert 0 < available <= total
