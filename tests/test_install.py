"""install.sh, the lock file and the Makefile, without a network and without installing.

Each test runs a copy of the script in a folder whose name contains a space, with a PATH that holds
only stand-ins: interpreters that report a version and pip's settings, nvidia-smi, nvcc, df, and a
uv that records its command lines. The outcome is therefore the same on every machine. Not covered:
whether uv can install the lock file, which `make test` has done before this file runs.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = "awk bash cat cut dirname du flock grep head ln ls mkdir mv rm sed sha256sum".split()
TOOLS += ["sort", "touch", "uname"]
LOCK_LINE = re.compile(r"([a-z0-9][a-z0-9-]*)==[^\s;]+( ; .*)?")


class Machine:
    """A folder with the project's installation files and a PATH of stand-ins."""

    def __init__(self, folder: Path):
        self.project = folder / "the project"
        (self.project / "requirements").mkdir(parents=True)
        for name in ("install.sh", "pyproject.toml"):
            shutil.copy(ROOT / name, self.project / name)
        for path in (ROOT / "requirements").iterdir():
            shutil.copy(path, self.project / "requirements" / path.name)
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in TOOLS:
            (self.bin / name).symlink_to(shutil.which(name) or f"missing {name}")
        self.links = folder / "wheels"
        self.links.mkdir()
        self.uv_calls = folder / "uv calls"
        self.set_free_disk(100)

    def add(self, name: str, script: str) -> Path:
        path = self.bin / name
        path.write_text(f"#!{shutil.which('bash')}\n{script}\n")
        path.chmod(0o755)
        return path

    def add_python(self, name: str, version: str) -> Path:
        settings = f":env:.find-links='{self.links}'"
        return self.add(name, f'[[ $1 == -c ]] && echo {version} || echo "{settings}"')

    def add_gpus(self, driver: str, capability: str = "8.6") -> None:
        self.add(
            "nvidia-smi",
            f"[[ $1 == *compute_cap ]] && found={capability} || found={driver}\n"
            "echo $found; echo $found",
        )

    def add_cpu_wheel(self, python_tag: str, version: str = "") -> None:
        version = version or locked_versions()["torch"]
        name = f"torch-{version}+cpu-{python_tag}-{python_tag}-manylinux_2_28_x86_64.whl"
        (self.links / name).touch()

    def add_uv(self, status_of_install: int = 0) -> None:
        """Add a uv of the pinned version whose `venv` creates a working interpreter."""
        pinned = re.search(r"UV_VERSION=(\S+)", (ROOT / "install.sh").read_text())
        assert pinned
        self.add(
            "uv",
            f'[[ $1 == --version ]] && echo "uv {pinned[1]} (stand-in)" && exit\n'
            f'echo "$*" >> "{self.uv_calls}"\n'
            f"[[ $1 == pip ]] && exit {status_of_install}\n"
            'mkdir .venv/bin && ln -s "$5" .venv/bin/python',
        )

    def set_free_disk(self, gib: int) -> None:
        self.add("df", f"echo header; echo disk 0 0 {gib * 1024**2} 0% /")

    def install(self, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.bin / "bash", self.project / "install.sh", *options],
            cwd="/",
            env={"PATH": str(self.bin), **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def plan(self, *options: str, **environment: str) -> dict[str, str]:
        result = self.install("--dry-run", *options, **environment)
        assert result.returncode == 0, result.stderr
        assert not (self.project / ".venv").exists() and not (self.project / ".uv").exists()
        return dict(line.split(": ", 1) for line in result.stdout.splitlines())

    def refusal(self, *options: str, **environment: str) -> str:
        result = self.install(*options, **environment)
        assert result.returncode == 1
        assert re.fullmatch(
            r"error: .+\n  expected: .+\n  found: .+\n  fix: .+\n", result.stderr
        ), result.stderr
        return result.stderr

    def uv_installs(self) -> list[str]:
        return [call for call in self.uv_calls.read_text().splitlines() if call.startswith("pip")]

    def venvs_made(self) -> int:
        return sum(call.startswith("venv") for call in self.uv_calls.read_text().splitlines())


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path)
    machine.add_python("python3.11", "3.11")
    return machine


def locked_versions() -> dict[str, str]:
    lines = (ROOT / "requirements/requirements.lock").read_text().splitlines()
    pins = [line.split(" ;")[0].split("==") for line in lines if not line.startswith("#")]
    return {name: version for name, version in pins}


def names_in(file_name: str) -> list[str]:
    lines = (ROOT / "requirements" / file_name).read_text().splitlines()
    return [
        re.split(r"[ =]", line)[0].replace("_", "-")
        for line in lines
        if line.strip("# ")[:1] and not line.startswith("#")
    ]


def test_script_parses():
    subprocess.run(["bash", "-n", ROOT / "install.sh"], check=True)


@pytest.mark.parametrize(
    ("driver", "build"),
    [
        ("610.43.02", "cu130"),
        ("580.65.06", "cu130"),
        ("579.99.99", "cu126"),
        ("570.124.06", "cu126"),
        ("535.54.03", "cu126"),
        ("530.30.02", "cu126"),
        # CUDA 12.0's driver: older than supported.
        ("525.60.13", None),
        ("470.256.02", None),
        # A string comparison would rank this above 580.
        ("90.5", None),
    ],
)
def test_driver_selects_torch_build(machine: Machine, driver: str, build: str | None):
    machine.add_gpus(driver)
    # A machine with a GPU must not pick the CPU build that find-links offers.
    machine.add_cpu_wheel("cp311")
    if build is None:
        message = machine.refusal("--dry-run")
        assert driver in message and "530.30" in message
    else:
        assert machine.plan()["torch"] == f"{locked_versions()['torch']} ({build} build)"


def test_broken_driver_is_not_mistaken_for_a_cpu_machine(machine: Machine):
    machine.add("nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9")
    assert "NVIDIA-SMI has failed" in machine.refusal("--dry-run")


def test_cpu_machine_uses_cpu_build_if_offered(machine: Machine):
    assert "default build" in machine.plan()["torch"]
    machine.add_cpu_wheel("cp311", version="2.1.0")
    machine.add_cpu_wheel("cp312")
    assert "default build" in machine.plan()["torch"]
    machine.add_cpu_wheel("cp311")
    assert "cpu build" in machine.plan()["torch"]


def test_find_links_page_counts_as_folder(machine: Machine, tmp_path: Path):
    machine.add_cpu_wheel("cp311")
    wheel = next(machine.links.iterdir()).name.replace("+", "%2B")
    page = tmp_path / "page.html"
    page.write_text(f'<a href="{wheel}">torch</a>')
    settings = f"global.find-links='/nowhere'\\ninstall.find-links='file://{page}'"
    machine.add("python3.11", f'[[ $1 == -c ]] && echo 3.11 || printf "{settings}\\n"')
    assert "cpu build" in machine.plan()["torch"]


def test_python_with_a_cpu_build_is_preferred(machine: Machine):
    machine.add_python("python3.12", "3.12")
    assert machine.plan()["python"].startswith("3.11 ")
    machine.add_cpu_wheel("cp312")
    assert machine.plan()["python"].startswith("3.12 ")
    machine.add_gpus("580.65.06")
    assert machine.plan()["python"].startswith("3.11 ")


def test_broken_python_is_skipped(machine: Machine):
    machine.add("python3.11", "echo 'pyenv: command not found' >&2; exit 127")
    machine.add_python("python3", "3.12")
    assert machine.plan()["python"] == f"3.12 ({machine.bin / 'python3'})"


def test_given_python_is_the_only_one_considered(machine: Machine):
    other = machine.add_python("my-python", "3.12")
    assert machine.plan(PYTHON=str(other))["python"] == f"3.12 ({other})"
    old = machine.add_python("old-python", "3.10")
    assert f"{old} is 3.10" in machine.refusal("--dry-run", PYTHON=str(old))


def test_no_python(machine: Machine):
    (machine.bin / "python3.11").unlink()
    assert "none of python3.11 python3.12 python3 runs" in machine.refusal("--dry-run")
    machine.add_python("python3", "3.13")
    assert "python3 is 3.13" in machine.refusal("--dry-run")


def test_too_little_disk(machine: Machine):
    machine.add_cpu_wheel("cp311")
    machine.set_free_disk(6)
    assert machine.plan()["disk"] == "6 GiB needed, 6 GiB free"
    machine.set_free_disk(5)
    message = machine.refusal("--dry-run")
    assert "6 GiB free" in message and "5 GiB free" in message
    machine.set_free_disk(11)
    machine.add_gpus("580.65.06")
    assert "12 GiB free" in machine.refusal()


def test_usage(machine: Machine):
    wrong = machine.install("--dry-run", "--with-flash")
    assert wrong.returncode == 2 and "--with-flash\nUsage:" in wrong.stderr
    asked = machine.install("--help")
    assert asked.returncode == 0 and "--with-flash-attn" in asked.stdout


def test_flash_attn_needs_gpu_and_matching_compiler(machine: Machine):
    assert "no nvidia-smi" in machine.refusal("--with-flash-attn")
    machine.add_gpus("570.124.06")
    assert "no nvcc" in machine.refusal("--with-flash-attn")
    machine.add("nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")
    assert "nvcc of CUDA 13.0" in machine.refusal("--with-flash-attn")
    machine.add_gpus("580.65.06")
    pins = machine.plan("--with-flash-attn")["extras"].split()
    assert [pin.split("==")[0] for pin in pins] == ["flash-attn", "ring-flash-attn"]


def test_flash_attn_4_needs_hopper_and_cuda_13(machine: Machine):
    assert "no nvidia-smi" in machine.refusal("--with-flash-attn-4")
    machine.add_gpus("580.65.06")
    assert "9.0" in (message := machine.refusal("--with-flash-attn-4")) and "8.6, 8.6" in message
    machine.add_gpus("570.124.06", "9.0")
    assert "driver 580 or newer" in machine.refusal("--with-flash-attn-4")
    machine.add_gpus("580.65.06", "9.0")
    pins = machine.plan("--with-flash-attn-4")["extras"].split()
    assert len(pins) == 8 and pins[0].startswith("flash-attn-4==")
    assert all("==" in pin for pin in pins) and not any("cu12" in pin for pin in pins)
    machine.add("nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")
    both = machine.plan("--with-flash-attn-4", "--with-flash-attn")["extras"].split()
    assert len(both) == 10 and both[2:] == pins


def test_second_run_does_nothing(machine: Machine):
    machine.add_uv()
    machine.add_cpu_wheel("cp311")
    first = machine.install()
    assert first.returncode == 0, first.stderr
    calls = machine.uv_installs()
    assert len(calls) == 2
    assert f"--find-links {machine.links}" in calls[0] and "requirements.lock" in calls[0]
    assert calls[1].endswith("--no-deps --no-build-isolation -e .")
    second = machine.install()
    assert second.returncode == 0 and "nothing to do" in second.stderr
    assert machine.uv_installs() == calls
    with (machine.project / "requirements/requirements.lock").open("a") as lock:
        lock.write("another==1.0\n")
    assert machine.install().returncode == 0
    assert len(machine.uv_installs()) == 4
    assert machine.venvs_made() == 1


def test_interrupted_run_is_repeated(machine: Machine):
    machine.add_uv(status_of_install=1)
    assert machine.install().returncode == 1
    machine.add_uv()
    assert machine.install().returncode == 0
    assert machine.venvs_made() == 2


def test_interrupted_upgrade_is_repeated(machine: Machine):
    """The previous version's stamp must not mark an unfinished upgrade as complete."""
    machine.add_uv()
    assert machine.install().returncode == 0
    lock = machine.project / "requirements/requirements.lock"
    before = lock.read_text()
    lock.write_text(before + "another==1.0\n")
    machine.add_uv(status_of_install=1)
    assert machine.install().returncode == 1
    lock.write_text(before)
    machine.add_uv()
    result = machine.install()
    assert result.returncode == 0 and "nothing to do" not in result.stderr
    assert machine.venvs_made() == 2


def test_two_runs_at_once(machine: Machine):
    machine.add_uv()
    uv = machine.bin / "uv"
    machine.add("slow-uv", uv.read_text())
    machine.add("uv", f'[[ $1 == pip ]] && {shutil.which("sleep")} 0.5; exec slow-uv "$@"')
    with ThreadPoolExecutor() as pool:
        results = [pool.submit(machine.install) for _ in range(2)]
    assert [result.result().returncode for result in results] == [0, 0]
    assert machine.venvs_made() == 1 and len(machine.uv_installs()) == 2


def test_broken_interpreter_is_replaced(machine: Machine):
    machine.add_uv()
    assert machine.install().returncode == 0
    (machine.project / ".venv/bin/python").unlink()
    assert machine.install().returncode == 0
    assert (machine.project / ".venv/bin/python").exists()


def test_foreign_venv_is_left_alone(machine: Machine):
    machine.add_uv()
    theirs = machine.project / ".venv/theirs"
    theirs.parent.mkdir()
    theirs.touch()
    assert "not made by install.sh" in machine.install().stderr
    assert theirs.exists()


def test_cuda_builds_are_requested(machine: Machine):
    machine.add_uv()
    machine.add_gpus("535.54.03")
    assert machine.install().returncode == 0
    assert "--torch-backend cu126" in machine.uv_installs()[0]
    machine.add_gpus("580.65.06")
    assert machine.install().returncode == 0
    assert machine.venvs_made() == 2, "packages of the other build must not remain"
    newer = machine.uv_installs()[2]
    assert "--torch-backend" not in newer and "-c .venv/.sparselong-constraints" in newer
    constraint = (machine.project / ".venv/.sparselong-constraints").read_text()
    assert constraint == f"torch!={locked_versions()['torch']}+cpu\n"


def test_flash_attn_is_added_to_an_installed_venv(machine: Machine):
    machine.add_uv()
    machine.add_gpus("580.65.06")
    machine.add("nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")
    assert machine.install().returncode == 0
    assert machine.install("--with-flash-attn").returncode == 0
    assert "--no-build-isolation flash-attn==" in machine.uv_installs()[-1]
    assert "nothing to do" in machine.install("--with-flash-attn").stderr
    assert "nothing to do" in machine.install().stderr


def test_flash_attn_4_survives_a_later_flash_attn(machine: Machine):
    """flash-attn has a folder flash_attn/cute of its own, with an older version of the package."""
    machine.add_uv()
    machine.add_gpus("580.65.06", "9.0")
    machine.add("nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")
    assert machine.install("--with-flash-attn-4").returncode == 0
    assert "--reinstall-package flash-attn-4 flash-attn-4==" in machine.uv_installs()[-1]
    assert "nothing to do" in machine.install("--with-flash-attn-4").stderr
    site = machine.project / ".venv/lib/python3.11/site-packages"
    (site / "flash_attn_4-4.0.0b36.dist-info").mkdir(parents=True)
    assert machine.install("--with-flash-attn").returncode == 0
    assert " flash-attn==" in machine.uv_installs()[-2]
    assert "--reinstall-package flash-attn-4 flash-attn-4==" in machine.uv_installs()[-1]


def test_missing_uv(machine: Machine):
    """The bootstrap itself fails: this interpreter cannot create a virtual environment."""
    result = machine.install()
    assert result.returncode == 1 and "error: uv cannot be installed" in result.stderr
    assert "python3.11-venv" in result.stderr


def test_lock_is_exact_and_names_no_location():
    lines = (ROOT / "requirements/requirements.lock").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [line for line in pins if not LOCK_LINE.fullmatch(line)] == []
    assert [line for line in lines if re.search(r"://|@|file:|/|\.whl|--", line)] == []
    assert len(pins) == len(locked_versions()), "a package is locked twice"


def test_lock_covers_requirements_and_overrides():
    versions = locked_versions()
    assert [name for name in names_in("requirements.in") if name not in versions] == []
    requirements = (ROOT / "requirements/requirements.in").read_text()
    for name, version in re.findall(r"^(\S+)==(\S+)$", requirements, re.MULTILINE):
        assert versions[name] == version
    overrides = (ROOT / "requirements/overrides.txt").read_text()
    removed = re.findall(r"^(\S+) ; sys_platform == 'never'$", overrides, re.MULTILINE)
    assert removed and not set(removed) & versions.keys()


def test_lock_leaves_the_torch_build_open():
    versions = locked_versions()
    assert "+" not in versions["torch"]
    libraries = [name for name in versions if name.startswith(("nvidia-", "cuda-"))]
    assert libraries == ["nvidia-ml-py"]


def test_ci_runs_the_makefile():
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert "make check test" in (ROOT / ".ci/run").read_text()
