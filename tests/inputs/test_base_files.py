"""Which files of a folder are the checkpoint: one answer, or a refusal that names the file."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparselong.checkpoint import Checkpoint, derive, take_inventory, write_tensors
from sparselong.errors import StageError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
NORM, SINKS = "model.norm.weight", "model.layers.0.self_attn.sinks"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"


def shards(base: Path) -> list[Path]:
    return sorted(base.glob("model-*.safetensors"))


def make_single(base: Path) -> Path:
    """Write a sharded checkpoint again as one model.safetensors without an index."""
    tensors = {}
    for path in shards(base):
        tensors |= load_file(path)
        path.unlink()
    (base / INDEX).unlink()
    save_file(tensors, base / SINGLE, {"format": "pt"})
    return base


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def edit_header(path: Path, change: Callable[[dict], object] | str, tail: bytes = b"") -> None:
    """Change a safetensors file's header, or replace it by a text; the tensors' bytes stay."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    if isinstance(change, str):
        text = change
    else:
        header = json.loads(raw[8 : 8 + length])
        change(header)
        text = json.dumps(header)
    new = text.encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :] + tail)


def header_text(path: Path) -> str:
    raw = path.read_bytes()
    return raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]].decode()


def first_entry(path: Path) -> Callable[[dict], dict]:
    """Return a function from a header to the entry of the tensor that comes first in the file."""
    return lambda header: min(
        (entry for name, entry in header.items() if name != "__metadata__"),
        key=lambda entry: entry["data_offsets"],
    )


def put_twice(base: Path) -> None:
    """Store a tensor in a second shard too, with other values."""
    tensors = load_file(shards(base)[1])
    assert NORM not in tensors
    save_file({**tensors, NORM: torch.ones(128).bfloat16()}, shards(base)[1], {"format": "pt"})


def repeat_key(path: Path, key: str) -> None:
    """Write a JSON object's key a second time, with the same value."""
    document = json.loads(path.read_text())
    path.write_text(
        path.read_text().rstrip().rstrip("}") + f', "{key}": {json.dumps(document[key])}}}'
    )


def repeat_in_header(base: Path) -> None:
    path = shards(base)[0]
    text = header_text(path).rstrip()
    entry = json.loads(text)[NORM]
    edit_header(path, f'{text[:-1]}, "{NORM}": {json.dumps(entry)}}}')


def rename(base: Path, name: str) -> None:
    """Move the first shard and name its new place in the index."""
    old = shards(base)[0]
    (base / name).parent.mkdir(exist_ok=True)
    old.rename(base / name)
    edit_json(
        base / INDEX,
        lambda d: d["weight_map"].update(
            {k: name for k, v in d["weight_map"].items() if v == old.name}
        ),
    )


def header_case(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda base: edit_header(shards(base)[0], lambda header: change(header))


def entry_case(key: str, value: object) -> Callable[[Path], None]:
    """Change one key of the entry of the tensor that comes first in the first shard."""

    def change(base: Path) -> None:
        find = first_entry(shards(base)[0])
        edit_header(shards(base)[0], lambda header: find(header).update({key: value}))

    return change


def swap_offsets(base: Path) -> None:
    """Let a tensor begin where another one does."""

    def change(header: dict) -> None:
        a = header["model.layers.0.input_layernorm.weight"]
        b = header["model.layers.0.post_attention_layernorm.weight"]
        a["data_offsets"] = b["data_offsets"]

    edit_header(shards(base)[0], change)


def drop_entry(base: Path) -> None:
    """Remove a tensor from header and index, so that its bytes belong to no tensor."""
    edit_header(shards(base)[0], lambda header: header.pop(SINKS))
    edit_json(base / INDEX, lambda d: d["weight_map"].pop(SINKS))


REFUSED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "single beside indexed shards": (
        lambda b: shutil.copy(shards(b)[0], b / SINGLE),
        ("two sets of weights", SINGLE, "remove the one"),
    ),
    "single named among others in the index": (
        lambda b: rename(b, SINGLE),
        ("two sets of weights", SINGLE),
    ),
    "single beside shards without index": (
        lambda b: (shutil.copy(shards(b)[0], b / SINGLE), (b / INDEX).unlink()),
        ("two sets of weights", "no index"),
    ),
    "shards without index": (lambda b: (b / INDEX).unlink(), ("the index of", "is missing")),
    "no weights but others": (
        lambda b: (
            [p.unlink() for p in [*shards(b), b / INDEX]],
            (b / "pytorch_model.bin").write_bytes(b"x"),
        ),
        ("other files: pytorch_model.bin",),
    ),
    "stray shard": (
        lambda b: shutil.copy(shards(b)[0], b / "model-00009-of-00009.safetensors"),
        ("does not name model-00009-of-00009.safetensors",),
    ),
    "index names a file outside": (
        lambda b: rename(b, "../outside.safetensors"),
        ("not a shard of this directory", "'../outside.safetensors'"),
    ),
    "index names a file in a folder": (
        lambda b: rename(b, "part/a.safetensors"),
        ("not a shard of this directory", "'part/a.safetensors'"),
    ),
    "tensor in two shards": (put_twice, (NORM, "it is there twice")),
    "tensor not in the index": (
        lambda b: edit_json(b / INDEX, lambda d: d["weight_map"].pop(NORM)),
        (NORM, "not in the index", "no such name"),
    ),
    "adapter config": (
        lambda b: (b / "adapter_config.json").write_text("{}"),
        ("contains an adapter", "adapter_config.json"),
    ),
    "dead adapter config": (
        lambda b: (b / "adapter_config.json").symlink_to("nowhere"),
        ("contains an adapter",),
    ),
    "transformers_weights": (
        lambda b: edit_json(b / "config.json", lambda d: d.update(transformers_weights="a.bin")),
        ("transformers_weights: 'a.bin'",),
    ),
    "key twice in config": (
        lambda b: repeat_key(b / "config.json", "hidden_size"),
        ("config.json cannot be read", "'hidden_size' occurs twice"),
    ),
    "key twice in index": (
        lambda b: repeat_key(b / INDEX, "weight_map"),
        (INDEX, "'weight_map' occurs twice"),
    ),
    "key twice in header": (repeat_in_header, ("model-00001", f"'{NORM}' occurs twice")),
    "nested config": (
        lambda b: (b / "config.json").write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"),
        ("config.json cannot be read", "nested too deeply"),
    ),
    "config not UTF-8": (
        lambda b: (b / "config.json").write_bytes('{"a": "é"}'.encode("latin-1")),
        ("config.json cannot be read", "utf-8"),
    ),
    "config a folder": (
        lambda b: ((b / "config.json").unlink(), (b / "config.json").mkdir()),
        ("config.json cannot be read", "a directory"),
    ),
    "config a pipe": (
        lambda b: ((b / "config.json").unlink(), os.mkfifo(b / "config.json")),
        ("config.json cannot be read", "not a regular file"),
    ),
    "shard a pipe": (
        lambda b: (shards(b)[0].unlink(), os.mkfifo(b / "model-00001-of-00004.safetensors")),
        ("model-00001", "is missing"),
    ),
    "config LFS pointer": (
        lambda b: (b / "config.json").write_text(LFS),
        ("config.json cannot be read", "Git LFS pointer", "git lfs pull"),
    ),
    "shard LFS pointer": (
        lambda b: shards(b)[1].write_text(LFS),
        ("model-00002", "Git LFS pointer", "git lfs pull"),
    ),
    "index LFS pointer": (lambda b: (b / INDEX).write_text(LFS), (INDEX, "Git LFS pointer")),
    "trailing bytes": (
        lambda b: edit_header(shards(b)[0], lambda h: h, tail=b"1234"),
        ("model-00001", "trailing bytes"),
    ),
    "header cut": (
        lambda b: os.truncate(shards(b)[0], 100),
        ("model-00001", "truncated"),
    ),
    "empty shard": (lambda b: os.truncate(shards(b)[0], 0), ("not in safetensors format",)),
    "size against shape": (entry_case("shape", [2048, 127]), ("bytes, but is BF16",)),
    "size against dtype": (entry_case("dtype", "F32"), ("bytes, but is F32",)),
    "unknown dtype": (entry_case("dtype", "BF61"), ("unknown dtype 'BF61'",)),
    "negative shape": (entry_case("shape", [-2048, -128]), ("shape [-2048, -128]",)),
    "shape of booleans": (entry_case("shape", [True]), ("shape [True]",)),
    "three offsets": (entry_case("data_offsets", [0, 1, 2]), ("data_offsets [0, 1, 2]",)),
    "offsets of text": (entry_case("data_offsets", ["0", "1"]), ("data_offsets",)),
    "huge offsets": (
        entry_case("data_offsets", [2**70, 2**70 + 2048 * 256]),
        ("leave a gap",),
    ),
    "overlap": (swap_offsets, ("follow one another", "a header in which")),
    "gap": (drop_entry, ("leave a gap",)),
    "metadata of numbers": (
        header_case(lambda h: h.update(__metadata__={"format": 1})),
        ("__metadata__",),
    ),
    "quantization_config a list": (
        lambda b: edit_json(b / "config.json", lambda d: d.update(quantization_config=["mxfp4"])),
        ("quantization_config: ['mxfp4']",),
    ),
    "index empty": (
        lambda b: (b / INDEX).write_text('{"weight_map": {}}'),
        ("is not an index", "empty"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_an_ambiguous_or_damaged_checkpoint_is_refused(base, case):
    change, words = REFUSED[case]
    change(base)
    with pytest.raises(StageError) as caught:
        Checkpoint(base)
    for word in words:
        assert word in str(caught.value), caught.value


def unrelated(base: Path) -> None:
    """Add what lies in people's folders and belongs to no checkpoint."""
    (base / "dead.json").symlink_to("nowhere")
    (base / "special_tokens_map.json").unlink(missing_ok=True)
    (base / "special_tokens_map.json").symlink_to("nowhere")
    (base / "LICENSE").symlink_to("nowhere")
    (base / "model-00007-of-00007.safetensors").symlink_to("nowhere")
    (base / "original").mkdir()
    (base / "original/model.safetensors").write_bytes(b"x")
    for name in ("notes.txt", "results.json", "pytorch_model.bin", "consolidated.safetensors"):
        (base / name).write_text("not a checkpoint")
    os.mkfifo(base / "fifo.json")


def test_files_that_do_not_belong_to_it_are_never_touched(base, tmp_path):
    before = take_inventory(base)
    unrelated(base)
    checkpoint = Checkpoint(base)
    assert checkpoint.tensors == before.tensors
    assert set(before.names) - set(checkpoint.inventory.names) <= {"special_tokens_map.json"}
    target = tmp_path / "made"
    target.mkdir()
    write_tensors(target / "new.safetensors", checkpoint.read([SINKS]))
    derive(checkpoint, target, {SINKS}, [target / "new.safetensors"], {})
    wanted = {*before.names, "new.safetensors"} - {"special_tokens_map.json"}
    assert {path.name for path in target.iterdir()} == wanted


@pytest.mark.parametrize("case", ["single beside indexed shards", "adapter config", "gap"])
def test_stage_02_explains_it(base, run_script, case):
    change, words = REFUSED[case]
    change(base)
    run_script("02_compress", f"model.base={base}").assert_explained(*words)


def test_stage_02_ends_well_beside_other_files(base, run_script, tmp_path):
    """A dead link to a file that nobody needs was a traceback at the very end, on every rerun."""
    unrelated(base)
    outcome = run_script("02_compress", f"model.base={base}")
    assert outcome.code == 0, outcome.err
    made = {path.name for path in (tmp_path / "run/02_compress/model").iterdir()}
    assert not made & {"notes.txt", "results.json", "dead.json", "pytorch_model.bin", "original"}


def test_what_belongs_to_it_is_copied(base, tmp_path):
    (base / "LICENSE").write_text("free")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/tools.jinja").write_text("{{ 1 }}")
    target = tmp_path / "made"
    target.mkdir()
    checkpoint = Checkpoint(base)
    write_tensors(target / "new.safetensors", checkpoint.read([SINKS]))
    derive(checkpoint, target, {SINKS}, [target / "new.safetensors"], {})
    assert (target / "LICENSE").read_text() == "free"
    assert (target / "additional_chat_templates/tools.jinja").read_text() == "{{ 1 }}"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (target / name).read_bytes() == (base / name).read_bytes()


def test_an_index_may_name_one_single_file(base):
    sharded = {name: tensor for path in shards(base) for name, tensor in load_file(path).items()}
    make_single(base)
    index = {"weight_map": dict.fromkeys(sharded, SINGLE)}
    (base / INDEX).write_text(json.dumps(index))
    assert Checkpoint(base).files == [SINGLE]


@pytest.mark.parametrize("name", ["dense-00000.safetensors", "weights.safetensors"])
def test_shards_may_have_any_name(base, tmp_path, name):
    """A shard named as one of stage 02's files must not overwrite it, nor be overwritten."""
    rename(base, name)
    checkpoint, target = Checkpoint(base), tmp_path / "made"
    target.mkdir()
    added = target / "dense-00000.safetensors"
    write_tensors(added, {SINKS: checkpoint.read([SINKS])[SINKS] + 1})
    made = derive(checkpoint, target, {SINKS}, [added], {})
    assert torch.equal(made.read([SINKS])[SINKS], checkpoint.read([SINKS])[SINKS] + 1)
    others = set(checkpoint.tensors) - {SINKS}
    stored = made.read(others)
    assert all(torch.equal(stored[n], t) for n, t in checkpoint.read(others).items())


def test_a_single_file_base_gives_the_same_model(untrained_base, base, run_script, tmp_path):
    """transformers writes one file up to 50 GB; its name beside an index would win over the index.

    Both forms are compressed and opened; every tensor is equal, bit for bit.
    """
    from sparselong.model import load_model

    outcome = run_script("02_compress", f"model.base={make_single(base)}")
    assert outcome.code == 0, outcome.err
    other = run_script("02_compress", f"model.base={untrained_base}", run_dir=tmp_path / "sharded")
    assert other.code == 0, other.err
    single, sharded = tmp_path / "run/02_compress", tmp_path / "sharded/02_compress"
    assert not (single / "model" / SINGLE).exists()
    assert (single / "model" / INDEX).exists()
    for left, right in ((base, untrained_base), (single / "model", sharded / "model")):
        ours, theirs = (load_model(path).state_dict() for path in (left, right))
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for path in (sharded / "masters").iterdir():
        assert path.read_bytes() == (single / "masters" / path.name).read_bytes()
    source, target = Checkpoint(single / "model"), tmp_path / "tuned"
    target.mkdir()
    write_tensors(target / "tuned-00000.safetensors", source.read([SINKS]))
    quantization = source.config["quantization_config"]
    derive(source, target, {SINKS}, [target / "tuned-00000.safetensors"], quantization)
    tuned = load_model(target).state_dict()
    assert all(torch.equal(tuned[name], theirs[name]) for name in theirs)


def test_a_folder_of_a_hub_cache_is_a_checkpoint(base, tmp_path):
    """A snapshot is a folder of links to blobs elsewhere, and one may lead nowhere."""
    snapshot = tmp_path / "snapshots/1"
    snapshot.mkdir(parents=True)
    for path in base.iterdir():
        (snapshot / path.name).symlink_to(path)
    (snapshot / "USAGE_POLICY").symlink_to("../../blobs/gone")
    assert Checkpoint(snapshot).tensors == Checkpoint(base).tensors
