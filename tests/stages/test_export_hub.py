"""05_export --to hub: what a hub gets, what its card says, and what is said if it gets nothing."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants
from transformers import AutoConfig, AutoTokenizer

from sparselong.config import load
from sparselong.export.hub import card
from sparselong.figures import format_bytes
from sparselong.run.stages import stage_hash
from tests.stages.fake_hub import READER, WRITER, serve
from tests.stages.test_export import export, manifest_of
from tests.stages.trained import Trained

REPO = "me/small-one"
FORMS = ("mxfp4", "gguf")
HUB = ("--to", "hub", "--repo", REPO)


@pytest.fixture(scope="module")
def exported(trained_run, tmp_path_factory) -> Trained:
    run_dir = tmp_path_factory.mktemp("hub") / "größe [1] × 2"
    ignored = shutil.ignore_patterns("05_export")
    shutil.copytree(trained_run.run_dir, run_dir, symlinks=True, ignore=ignored)
    found = trained_run._replace(run_dir=run_dir)
    assert export(found, "--to", *FORMS) == 0
    return found


@pytest.fixture
def copied(exported, tmp_path) -> Trained:
    """The run with its exports, to be changed."""
    run_dir = shutil.copytree(exported.run_dir, tmp_path / "run é", symlinks=True)
    return exported._replace(run_dir=run_dir)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serve() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield found


def files_here(trained: Trained, forms=FORMS) -> dict[str, bytes]:
    """Return what a repository should hold, by path."""
    folder = trained.run_dir / "05_export"
    found = {"README.md": (folder / "hub/README.md").read_bytes()}
    for form in forms:
        for row in manifest_of(trained.run_dir, form)["outputs"]:
            name = Path(row["path"]).relative_to(Path("05_export", form)).as_posix()
            target = name if form == "mxfp4" else f"{form}/{name}"
            found[target] = (folder / form / name).read_bytes()
    return found


def without_own(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name != ".gitattributes"}


def test_a_hub_gets_the_exports_and_the_card(copied, hub, tmp_path, capsys):
    assert export(copied, *HUB) == 0
    files = without_own(hub.repos[REPO])
    assert files == files_here(copied) and {"config.json", "gguf/model.gguf"} < files.keys()
    assert not [name for name in files if "manifest" in name or "log" in name]
    assert hub.private[REPO]
    manifest = manifest_of(copied.run_dir, "hub")
    metrics = manifest["metrics"]
    assert (metrics["repository"], metrics["revision"]) == (REPO, hub.revision(REPO))
    assert metrics["files"] == len(files)
    assert metrics["uploaded_bytes"] == sum(map(len, files.values()))
    assert manifest["options"] == {"from": "finetuned", "to": "mxfp4 gguf hub", "repo": REPO}
    inputs = {Path(row["path"]).name for row in manifest["inputs"]}
    assert {"model.gguf", "config.json"} < inputs
    # What was uploaded opens under the repository's name alone.
    for name, content in files.items():
        (tmp_path / "opened" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "opened" / name).write_bytes(content)
    config = AutoConfig.from_pretrained(tmp_path / "opened")
    assert config.quantization_config["quant_method"] == "mxfp4"
    assert len(AutoTokenizer.from_pretrained(tmp_path / "opened")) > 1000
    asked = len(hub.asked)
    assert export(copied, *HUB) == 0
    assert "is up to date" in capsys.readouterr().err and len(hub.asked) == asked


def test_the_card_is_made_from_the_manifests(copied, hub, untrained_base, chat_file):
    assert export(copied, *HUB) == 0
    text = (copied.run_dir / "05_export/hub/README.md").read_text()
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["gpt-oss", "sparse-long", *FORMS]
    assert "license" not in data and "base_model" not in data  # a local base of unknown licence
    for path in untrained_base.glob("*.safetensors"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in text
    for form in FORMS:
        metrics = manifest_of(copied.run_dir, form)["metrics"]
        assert f"{metrics['bytes']:,}" in text and f"{metrics['tensors']} tensors" in text
    assert f'from_pretrained("{REPO}")' in text and f"--hf-repo {REPO}" in text
    for words in (
        "4 bits a kept weight, 2:4 sparse",
        "`mxfp4` and `gguf` hold these values.\n",
        "LoRA of rank 16, alpha 32, on q_proj",
        "trained through mask and rounding",
        "rank 2 on experts' gate_up_proj, down_proj; the sums are rounded to MXFP4 again, which",
        chat_file.name,
        "Not measured by stage 04",
        "not recorded; look it up",
    ):
        assert words in text, words
    for private in (str(untrained_base.parent), str(chat_file.parent), str(copied.run_dir)):
        assert private not in text


def test_every_form_is_uploaded_and_its_card_says_how_it_is_opened(
    plain_trained_run, hub, tmp_path, monkeypatch
):
    """As if the base were one of the hub."""
    monkeypatch.setattr(card, "_is_on_hub", lambda name: "base" in name)
    monkeypatch.setattr(card, "PUBLISHED", [card_base(plain_trained_run)])
    run_dir = shutil.copytree(plain_trained_run.run_dir, tmp_path / "run", symlinks=True)
    forms = ["hf-bf16", "adapter", "ollama"]
    more = ["--to", *forms, "hub", "--repo", REPO, "--dense-type", "q8_0"]
    assert export(plain_trained_run, *more, run_dir=run_dir) == 0
    assert {name.partition("/")[0] for name in hub.repos[REPO]} == {
        *(".gitattributes", "README.md", *forms)
    }
    here = str(Path(card_base(plain_trained_run)).parent).encode()
    telling = [name for name, content in hub.repos[REPO].items() if here in content]
    assert telling == ["README.md"]  # only because the base passes for one of the hub
    config = json.loads(hub.repos[REPO]["adapter/adapter_config.json"])
    assert config["base_model_name_or_path"] == config["sparselong_base"]["name"] == "base"
    own = json.loads((run_dir / "05_export/adapter/adapter_config.json").read_text())
    own["base_model_name_or_path"] = own["sparselong_base"]["name"] = "base"
    assert config == own
    text = hub.repos[REPO]["README.md"].decode()
    data = ModelCard(text).data.to_dict()
    assert data["license"] == "apache-2.0" and data["base_model_relation"] == "finetune"
    assert data["base_model"] == card_base(plain_trained_run)
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, "README.md", "exec")
    assert "there only if attention alone has adapters" in text
    assert f'"{REPO}", subfolder="adapter"' in text and f'"{REPO}", subfolder="hf-bf16"' in text
    assert "ollama create small-one -f ollama/Modelfile" in text and "{" not in text
    assert "through mask" not in text and "not sparse" in text
    assert "`hf-bf16` holds these values. `ollama` rounds them again, to Q8_0 (" in text
    assert "- `adapter` has the trained change alone" in text


def card_base(trained: Trained) -> str:
    return load(trained.arguments[1], trained.arguments[2:]).model.base


def write_evaluation(trained: Trained, **changes) -> None:
    """Write the manifest that stage 04 would, with these keys changed."""
    config = load(trained.arguments[1], trained.arguments[2:])
    accuracy = {"acc": 0.375, "stderr": 0.0242, "acc_norm": 0.5, "acc_norm_stderr": 0.025,
                "paired_flips": {"gained": 12, "lost": 7, "p": 0.4}}  # fmt: skip
    names = ("base", "compressed", "finetuned")
    document = {
        "format_version": 3,
        "stage": "04_eval",
        "status": "done",
        "config_hash": stage_hash(config, "04_eval"),
        "made_from": manifest_of(trained.run_dir, "mxfp4")["made_from"],
        **{"seconds": 1.0, "inputs": [], "outputs": []},
        "metrics": {
            "tasks": {"hellaswag": dict.fromkeys(names, accuracy)},
            "perplexity": dict.fromkeys(names, 31.516),
        },
        **changes,
    }
    (trained.run_dir / "04_eval").mkdir()
    (trained.run_dir / "04_eval/manifest.json").write_text(json.dumps(document))


@pytest.mark.parametrize("changes", [{}, {"config_hash": "0"}, {"made_from": {}}], ids=str)
def test_the_card_has_results_of_this_model_with_their_errors(copied, hub, changes):
    write_evaluation(copied, **changes)
    assert export(copied, *HUB) == 0
    text = hub.repos[REPO]["README.md"].decode()
    if changes:
        assert "Not measured by stage 04" in text and "37.5%" not in text
        return
    assert "| hellaswag, acc | 37.5% ± 2.4% | 37.5% ± 2.4% | 37.5% ± 2.4% |" in text
    assert "50.0% ± 2.5%" in text and "+12 -7" in text and "31.516" in text


def test_forms_are_made_first_and_named_ones_alone_are_uploaded(copied, hub, capsys):
    shutil.rmtree(copied.run_dir / "05_export/mxfp4")
    assert export(copied, "--to", "hub", "mxfp4", "--repo", REPO) == 0
    assert without_own(hub.repos[REPO]) == files_here(copied, ["mxfp4"])
    # More forms change the card in the repository, which only --force does.
    assert export(copied, *HUB) == 1
    assert f"{REPO} holds another export" in capsys.readouterr().err
    assert export(copied, *HUB, "--force") == 0
    assert without_own(hub.repos[REPO]) == files_here(copied)


def test_a_run_is_uploaded_to_several_repositories_without_force(copied, hub, capsys):
    assert export(copied, *HUB) == 0
    theirs = {".gitattributes": b"", "README.md": b"theirs"}
    hub.repos |= {"me/taken": dict(theirs), "me/other": {}}
    more = ["--to", "hub", "--repo"]
    assert export(copied, *more, "me/other", "--dry-run") == 0
    assert export(copied, *more, "me/other") == 0
    assert without_own(hub.repos["me/other"]) == files_here(copied)
    assert manifest_of(copied.run_dir, "hub")["metrics"]["repository"] == "me/other"
    # --force that was meant for the repository before does not replace files of another one.
    assert export(copied, *more, "me/taken", "--force") == 1
    assert "me/taken holds another export" in capsys.readouterr().err
    assert hub.repos["me/taken"] == theirs
    assert export(copied, *more, "me/taken", "--force") == 0
    assert without_own(hub.repos["me/taken"]) == files_here(copied)


def test_no_file_of_an_export_takes_the_cards_place(copied, hub, capsys):
    path = copied.run_dir / "05_export/mxfp4/README.md"
    path.write_text("of the base, or a person's")
    manifest = copied.run_dir / "05_export/mxfp4/manifest.json"
    document = json.loads(manifest.read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    row = {"path": "05_export/mxfp4/README.md", "bytes": path.stat().st_size, "sha256": digest}
    document["outputs"].append(row)
    manifest.write_text(json.dumps(document))
    assert export(copied, *HUB) == 0
    card_here = copied.run_dir / "05_export/hub/README.md"
    assert hub.repos[REPO]["README.md"] == card_here.read_bytes()
    assert f"{path} is not uploaded: the model card has that name" in capsys.readouterr().err


def test_a_corrected_repository_is_uploaded_to(copied, hub, capsys):
    assert export(copied, "--to", "hub", "--repo", "others/new") == 1
    assert "correct --repo" in capsys.readouterr().err
    assert export(copied, *HUB) == 0
    assert without_own(hub.repos[REPO]) == files_here(copied)


@pytest.mark.parametrize("to", [["gguf", "mxfp4", "hub"], ["hub", "mxfp4", "gguf"], ["hub"]])
def test_the_same_forms_are_the_same_upload_however_they_are_named(copied, hub, capsys, to):
    assert export(copied, "--to", *FORMS, "hub", "--repo", REPO) == 0
    asked = len(hub.asked)
    assert export(copied, "--to", *to, "--repo", REPO) == 0
    assert "05_export hub is up to date" in capsys.readouterr().err and len(hub.asked) == asked


def test_an_export_that_was_made_again_is_another_upload(copied, hub, capsys):
    assert export(copied, *HUB) == 0
    assert export(copied, "--to", "gguf", "--dense-type", "q8_0", "--force") == 0
    assert export(copied, *HUB) == 1
    assert f"{REPO} holds another export" in capsys.readouterr().err
    assert export(copied, *HUB, "--force") == 0
    assert without_own(hub.repos[REPO]) == files_here(copied)


def test_without_a_token_everything_but_the_upload_is_done(copied, hub, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    assert export(copied, *HUB) == 1
    told = capsys.readouterr().err
    assert f"nothing was uploaded to {REPO}; exports and model card are done" in told
    assert "no token" in told and "hf auth login" in told
    assert (copied.run_dir / "05_export/hub/README.md").exists() and not hub.asked
    assert not (copied.run_dir / "05_export/hub/manifest.json").exists()
    monkeypatch.setenv("HF_TOKEN", WRITER)
    assert export(copied, *HUB) == 0
    assert without_own(hub.repos[REPO]) == files_here(copied)


@pytest.mark.parametrize(
    ("token", "repo", "words"),
    [
        (READER, REPO, "required permissions"),  # may read; the repository is there
        (READER, "me/new", "rights to create"),
        (WRITER, "others/new", "rights to create"),
        ("hf_gone", REPO, "Invalid username or password"),
    ],
)
def test_a_token_without_rights_uploads_nothing(
    copied, hub, monkeypatch, capsys, token, repo, words
):
    hub.repos[REPO] = {".gitattributes": b""}
    monkeypatch.setenv("HF_TOKEN", token)
    assert export(copied, "--to", "hub", "--repo", repo) == 1
    told = capsys.readouterr().err
    assert f"nothing was uploaded to {repo}" in told and words in told, told
    assert "a token that may write there" in told and token not in told
    assert [*hub.repos] == [REPO] and [*hub.repos[REPO]] == [".gitattributes"] and not hub.objects
    assert not (copied.run_dir / "05_export/hub/manifest.json").exists()


def test_without_a_network_nothing_is_uploaded(copied, hub, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert export(copied, *HUB) == 1
    told = capsys.readouterr().err
    assert f"nothing was uploaded to {REPO}" in told and "check the network" in told
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert export(copied, *HUB) == 1
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


def test_an_interrupted_upload_is_not_seen_and_sends_nothing_twice(copied, hub, capsys):
    hub.broken = "/commit/"
    assert export(copied, *HUB) == 1
    assert "the hub is broken" in capsys.readouterr().err
    assert [*hub.repos[REPO]] == [".gitattributes"]
    sent = [one for one in hub.asked if one.startswith("PUT")]
    assert len(sent) == len(hub.objects) > 2
    hub.broken = ""
    assert export(copied, *HUB) == 0
    assert [one for one in hub.asked if one.startswith("PUT")] == sent
    assert without_own(hub.repos[REPO]) == files_here(copied)


@pytest.mark.parametrize("name", ["gguf/model.gguf", "config.json"])
def test_what_the_hub_has_is_compared_with_what_was_sent(copied, hub, capsys, name):
    hub.damage = name
    assert export(copied, *HUB) == 1
    told = capsys.readouterr().err
    assert "does not hold what was sent" in told and f"differences in {name}" in told
    assert not (copied.run_dir / "05_export/hub/manifest.json").exists()


def test_a_repository_of_something_else_is_left_alone(copied, hub, capsys):
    hub.repos[REPO] = {".gitattributes": b"", "README.md": b"theirs", "config.json": b"{}"}
    before = dict(hub.repos[REPO])
    assert export(copied, *HUB) == 1
    assert f"{REPO} holds another export" in capsys.readouterr().err
    hub.repos[REPO]["notes.txt"] = b"a person's"
    assert export(copied, *HUB, "--force") == 1
    assert "holds files of something else" in capsys.readouterr().err
    del hub.repos[REPO]["notes.txt"]
    assert hub.repos[REPO] == before
    assert export(copied, *HUB, "--force") == 0
    assert without_own(hub.repos[REPO]) == files_here(copied)


def test_an_export_that_was_edited_by_hand_is_not_uploaded(copied, hub, capsys):
    path = copied.run_dir / "05_export/gguf/model.gguf"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert export(copied, *HUB) == 1
    told = capsys.readouterr().err
    assert "has changed since 05_export/gguf recorded it" in told
    assert "--to gguf --from finetuned --dense-type bf16 --force" in told
    assert not hub.asked


def test_an_export_of_another_model_is_not_uploaded(copied, hub, capsys):
    path = copied.run_dir / "05_export/mxfp4/manifest.json"
    document = json.loads(path.read_text())
    document["made_from"]["03_finetune"] = "0"
    path.write_text(json.dumps(document))
    assert export(copied, *HUB) == 1
    assert "is not an export of the model" in capsys.readouterr().err and not hub.asked
    assert export(copied, *HUB, "--from", "compressed") == 2
    assert "there is nothing to upload" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--to", "hub"], "the repository is missing"),
        (["--to", "mxfp4", "--repo", REPO], f"--repo {REPO} has no effect"),
        (["--to", "hub", "--repo", "mine"], "no owner"),
        (["--to", "hub", "--repo", "me/größe"], "letters beyond ASCII"),
        (["--to", "hub", "--repo", "me/a b"], "is not the name of a repository"),
    ],
)
def test_a_repository_must_be_named(exported, capsys, more, words):
    assert export(exported, *more) == 2
    assert words in capsys.readouterr().err


def test_the_plan_counts_what_would_be_uploaded(exported, trained_run, capsys):
    assert export(exported, *HUB, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    size = sum(manifest_of(exported.run_dir, form)["metrics"]["bytes"] for form in FORMS)
    assert any(f"{format_bytes(size)} are uploaded" in note for note in plan["notes"])
    assert plan["bytes_on_disk"] == 0 and not (exported.run_dir / "05_export/hub").exists()
    more = ["--to", "hf-bf16", "hub", "--repo", REPO, "--dry-run", "--json"]
    assert export(exported, *more) == 0
    plan = json.loads(capsys.readouterr().out)
    assert any("B are uploaded" in note for note in plan["notes"])
