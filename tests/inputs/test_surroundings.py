"""What surrounds a stage: encodings, closed streams, launchers, home directories, signals."""

import ast
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparselong import registration
from sparselong.errors import ConfigError
from sparselong.processes.launch import check_alone, is_joined, joined_rank
from tests.conftest import ROOT
from tests.structure import tree

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN = dict(zip(NAMES, ("2", "0", "0", "2", "127.0.0.1", "29500"), strict=True))
STAGE = r"""
import os, sys
from sparselong.run import run_stage
def execute(stage):
    stage.log("\u00e9 \u2192 \u6f22")
    print("\u00e9 from a library", file=sys.stderr)
    (stage.dir / "\u00f6.bin").write_bytes(b"x")
    stage.outputs = [stage.dir / "\u00f6.bin"]
    stage.metrics["name"] = "\u00e9"
    exec(code)
code = sys.argv.pop(1)
sys.exit(run_stage("02_compress", "", None, execute, lambda c, r, n: {"stage": n}, str))
"""


def start(tmp_path: Path, code: str, shell: str = '"$@"', **environment: str):
    """Start a stage that runs this code; the shell line redirects its output."""
    given = {name: value for name, value in os.environ.items() if name not in NAMES}
    arguments = ["--config", str(ROOT / "configs/tiny.yaml"), "--run-dir", str(tmp_path / "run é")]
    command = ["bash", "-c", shell, "bash", sys.executable, "-c", STAGE, code, *arguments]
    return subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**given, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
    )


ENCODINGS = [
    *({"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C"}),
    *({"PYTHONIOENCODING": "utf-16"}, {"PYTHONIOENCODING": "ascii:strict"}, {"LANG": ""}),
    {"PYTHONWARNINGS": "error", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONOPTIMIZE": "1"},
]


@pytest.mark.parametrize("environment", ENCODINGS, ids=str)
def test_any_encoding_and_flags(environment, tmp_path):
    child = "import sys; print(chr(233)); print(chr(233), file=sys.stderr)"
    code = f"""import os; os.system(f'"{{sys.executable}}" -c "{child}"')"""
    with start(tmp_path, code, **environment) as stage:
        out, err = stage.communicate(timeout=60)
    assert stage.returncode == 0, err
    assert "Traceback" not in err and "done" in out.replace("\0", "")
    assert "é → 漢" in (tmp_path / "run é/02_compress/log.txt").read_text(encoding="utf-8")
    assert (tmp_path / "run é/02_compress/manifest.json").exists()


def test_a_locale_without_utf_8_explains_names(tmp_path):
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    with start(tmp_path, "pass", **locale) as stage:
        _, err = stage.communicate(timeout=60)
    assert stage.returncode == 2 and len(err.splitlines()) == 4 and "PYTHONUTF8=1" in err


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "shell", ['"$@" | true', '"$@" 2>&1 | true', '"$@" >&-', '"$@" 2>&-', '"$@" <&- >&- 2>&-']
)
def test_output_that_nobody_reads_ends_nothing(shell, unbuffered, tmp_path):
    shell = f"set -o pipefail; {shell}"
    with start(
        tmp_path, "print('x' * 100_000, flush=True)", shell, PYTHONUNBUFFERED=unbuffered
    ) as stage:
        _, err = stage.communicate(timeout=60)
    assert stage.returncode == 0 and "Traceback" not in err and "Broken" not in err, err
    assert (tmp_path / "run é/02_compress/manifest.json").exists()
    assert (tmp_path / "run é/02_compress/ö.bin").read_bytes() == b"x"


def test_a_file_of_stderr_has_no_control_characters(tmp_path):
    code = """
from sparselong.run import progress
progress.LINE_SECONDS = 0.0
from tqdm.auto import tqdm
from huggingface_hub.utils import tqdm as of_the_hub
for bar in (tqdm, of_the_hub):
    for number in bar(range(3), desc="a library"):
        stage.report("layer", number + 1, 3, "loss 2.5")
"""
    with start(tmp_path, code) as stage:
        _, err = stage.communicate(timeout=60)
    assert stage.returncode == 0 and "layer 3/3, loss 2.5\n" in err
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", err), ascii(err)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_signals_end_a_stage_with_an_explanation(name, tmp_path):
    code = "import time; print('ready', flush=True); time.sleep(60)"
    # An ignored SIGHUP, as under nohup, would be inherited.
    with start(tmp_path, code, 'exec env --default-signal=HUP "$@"') as stage:
        assert stage.stdout
        assert any("ready" in line for line in stage.stdout)
        begun = time.monotonic()
        stage.send_signal(signal.Signals[name])
        _, err = stage.communicate(timeout=30)
    assert stage.returncode == 1 and "Traceback" not in err
    assert "was interrupted" in err and time.monotonic() - begun < 5


def test_nohup_is_respected(tmp_path):
    code = "import os, signal; os.kill(os.getpid(), signal.SIGHUP)"
    with start(tmp_path, code, "trap '' HUP; exec \"$@\"") as stage:
        stage.communicate(timeout=60)
    assert stage.returncode == 0


@pytest.fixture
def launcher(monkeypatch):
    for name in (*NAMES, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)

    def launch(**changes: str | None) -> None:
        for name, value in {**TORCHRUN, **changes}.items():
            if value is not None:
                monkeypatch.setenv(name, value)

    return launch


WRONG = [
    *[{name: None} for name in NAMES[1:]],
    *[{name: ""} for name in NAMES[1:]],
    *({"WORLD_SIZE": "two"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "-2"}, {"WORLD_SIZE": "2.0"}),
    *({"WORLD_SIZE": "²"}, {"WORLD_SIZE": " 2"}, {"WORLD_SIZE": "9" * 5000}),
    *({"RANK": "2"}, {"RANK": "-1"}, {"RANK": "x"}, {"LOCAL_RANK": "2"}, {"LOCAL_RANK": "-1"}),
    *({"LOCAL_WORLD_SIZE": "3"}, {"LOCAL_WORLD_SIZE": "0"}, {"MASTER_PORT": "x"}),
    *({"MASTER_PORT": "70000"}, {"MASTER_PORT": "0"}),
]


@pytest.mark.parametrize("changes", WRONG, ids=str)
def test_a_launcher_that_contradicts_itself_is_explained(changes, launcher):
    launcher(**changes)
    with pytest.raises(ConfigError, match=next(iter(changes))):
        joined_rank()
    assert not is_joined()


@pytest.mark.parametrize(
    "script", ["01_health", "02_compress", "03_finetune", "04_eval", "05_export"]
)
@pytest.mark.parametrize("changes", [{"RANK": None}, {"WORLD_SIZE": "two"}, {"MASTER_ADDR": None}])
def test_every_script_explains_it(script, changes, launcher, run_script, tmp_path):
    launcher(**changes)
    outcome = run_script(script)
    outcome.assert_explained(next(iter(changes)))
    assert outcome.code == 2 and not (tmp_path / "run").exists()


def test_stages_of_one_process_refuse_several(launcher, run_script):
    launcher(RANK="1", LOCAL_RANK="1")
    run_script("01_health").assert_explained("rank 1", "WORLD_SIZE=2")


def test_stage_02_refuses_processes_that_cannot_meet(launcher, run_script, tmp_path):
    launcher(RANK="1", LOCAL_RANK="1")
    run_script("02_compress").assert_explained("not by torchrun", "rank 1")
    assert not (tmp_path / "run/02_compress").exists()


def test_variables_of_a_single_process_are_hidden_from_libraries(launcher):
    launcher(WORLD_SIZE="1", RANK="0", LOCAL_WORLD_SIZE="1", TORCHELASTIC_RUN_ID="x")
    assert joined_rank() is None
    check_alone()
    assert not {*NAMES, "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    launcher(WORLD_SIZE=None, RANK="3", LOCAL_RANK="3")
    check_alone()
    assert not set(NAMES) & os.environ.keys()


CACHES = (*registration._CACHES, "HOME", "HF_TOKEN_PATH")


@pytest.fixture
def homes(monkeypatch, tmp_path) -> Path:
    for name in CACHES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "x")  # so that it is restored
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def move(tmp_path: Path, *names: str) -> dict[str, str]:
    """Move the caches, and return what was set."""
    before = {name: os.environ.get(name) for name in CACHES}
    moved = registration.move_caches(tmp_path / "cache", names)
    after = {name: os.environ.get(name) for name in CACHES}
    changed = {name: str(after[name]) for name in CACHES if after[name] != before[name]}
    assert moved == any(str(tmp_path / "cache") in value for value in changed.values())
    assert not (tmp_path / "cache").exists()
    return changed


def test_a_working_home_changes_nothing(homes, tmp_path):
    assert move(tmp_path) == {}
    os.environ["HF_HOME"] = str(tmp_path / "not made yet")
    assert move(tmp_path) == {} and list(homes.iterdir()) == []


@pytest.mark.parametrize("home", ["/nonexistent", "/proc/self", "/dev/null"])
def test_without_a_home_everything_goes_to_the_run(home, homes, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", home)
    assert move(tmp_path) == {"HOME": str(tmp_path / "cache")}
    assert registration._cache("HF_HUB_CACHE") == tmp_path / "cache/.cache/huggingface/hub"


@pytest.mark.parametrize("name", registration._CACHES)
def test_a_cache_that_cannot_be_written_goes_to_the_run(name, homes, tmp_path, monkeypatch):
    monkeypatch.setenv(name, "/proc/self/x")
    assert move(tmp_path) == {name: str(tmp_path / "cache" / name.lower())}


def test_a_file_in_the_place_of_a_cache(homes, tmp_path):
    (homes / ".cache").write_text("")
    assert move(tmp_path) == {"XDG_CACHE_HOME": str(tmp_path / "cache/xdg_cache_home")}


def test_a_shared_hub_cache_is_still_read(homes, tmp_path, monkeypatch):
    hub = tmp_path / "shared/hub/models--openai--gpt-oss-20b"
    hub.mkdir(parents=True)
    (tmp_path / "shared/token").write_text("secret")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "shared"))
    writable = registration._is_writable
    monkeypatch.setattr(
        registration,
        "_is_writable",
        lambda place: f"{tmp_path}/shared" not in str(place) and writable(place),
    )
    changed = move(tmp_path, "openai/gpt-oss-20b")
    assert changed == {
        "HF_HOME": str(tmp_path / "cache/hf_home"),
        "HF_HUB_CACHE": str(hub.parent),
        "HF_TOKEN_PATH": str(tmp_path / "shared/token"),
    }
    for name in ("HF_HUB_CACHE", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "shared"))
    assert "HF_HUB_CACHE" not in move(tmp_path, "another/model")


def test_a_stage_without_a_home_makes_its_cache(tmp_path):
    code = "assert os.environ['HOME'] == str((stage.run_dir / 'cache').resolve())"
    with start(tmp_path, code, HOME="/nonexistent") as stage:
        _, err = stage.communicate(timeout=60)
    assert stage.returncode == 0, err
    assert err.count("caches go to") == 1 and (tmp_path / "run é/cache").is_dir()


def test_the_default_config_is_found_from_any_directory(tmp_path, monkeypatch, capsys):
    from tests.conftest import load_script

    monkeypatch.chdir(tmp_path)
    assert load_script("02_compress").main(["--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_every_text_file_is_opened_as_utf_8():
    wrong = []
    for path in [*tree.sources(ROOT), *tree.scripts(ROOT)]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name, given = ast.unparse(node.func).rpartition(".")[2], ast.unparse(node)
                other = re.search(r"'[rwa]\+?b'|TrainingRun\.open|os\.open", given)
                opens = name in ("open", "read_text", "write_text", "fdopen")
                if opens and not other and "encoding=" not in given:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {given}")
    assert wrong == []
