"""What a run has finished, and what it was made with and from."""

import shutil

import pytest

from sparselong.errors import StageError
from sparselong.run import config_of, find_outdated, read_finished
from tests.report.made_run import read, rewrite, write_run, write_stage


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("finished") / "run")


def test_stages_and_parts_are_in_order_and_replaced_ones_left_out(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.copytree(copy / "05_export/gguf", copy / "05_export/gguf.replaced")
    shutil.copytree(copy / "03_finetune", copy / "03_finetune.replaced")
    (copy / "05_export/mxfp4").mkdir()
    names = ["01_health", "02_compress", "03_finetune", "04_eval", "05_export/gguf"]
    assert list(read_finished(copy)) == names
    assert read_finished(tmp_path / "none") == {}
    rewrite(copy / "05_export/gguf/manifest.json", part="mxfp4")
    with pytest.raises(StageError, match="is damaged"):
        read_finished(copy)


def test_each_section_is_that_of_the_stage_whose_result_it_affects(run):
    manifests = read_finished(run)
    for number, manifest in enumerate(manifests.values()):
        manifest["config"]["seed"] = manifest["config"]["sequence_len"] = number
        manifest["config"]["heads_k_stride"] = number
    found = config_of(manifests)
    assert (found["seed"], found["sequence_len"]) == (1, 2)  # of 02_compress, of 03_finetune
    assert found["heads_k_stride"] == 4  # of no stage: the last one's
    del manifests["03_finetune"]
    assert config_of(manifests)["sequence_len"] == 4 and config_of({}) == {}


def test_a_stage_is_outdated_if_what_it_was_made_from_has_other_bytes(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    metrics = read(copy, "02_compress")["metrics"]
    write_stage(copy, "02_compress", metrics, {"model.txt": "weights"})  # the same, later
    assert find_outdated(read_finished(copy)) == []
    write_stage(copy, "02_compress", metrics, {"model.txt": "others"})
    assert find_outdated(read_finished(copy)) == [("03_finetune", "02_compress")]
