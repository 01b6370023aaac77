"""Command lines that the benchmarks share, and the pages generated from their results.

Nothing is measured here."""

import argparse
import importlib
import os
import re
import sys
from unittest import mock

import pytest
import torch

from benchmarks import command_line, compress_rate, fit_120b, intervals, record
from benchmarks.record import RESULTS, row
from benchmarks.report import full_finetune
from sparselong import provenance
from tests.conftest import ROOT


@pytest.mark.parametrize("name", ["attention", "expert_gemm", "liger", "memory", "neighbours"])
def test_make_bench_continues_without_a_gpu(name, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    importlib.import_module(f"benchmarks.{name}").main()
    assert f"benchmarks/{name}.py needs a CUDA device" in capsys.readouterr().out


@pytest.mark.parametrize("asked, gpus, found", [
    (None, ["NVIDIA H200, 143771 MiB, 580.1"], "h200"),
    ("mine", ["NVIDIA H200, 143771 MiB, 580.1"], "mine"),
    ("mine", [], "mine"),
])  # fmt: skip
def test_a_result_is_named_after_the_gpu(asked, gpus, found, monkeypatch):
    monkeypatch.setattr(provenance, "describe_hardware", lambda: {"gpus": gpus})
    assert command_line.machine_of(argparse.Namespace(machine=asked)) == found


def test_an_unnamed_gpu_does_not_name_a_file_none(monkeypatch):
    monkeypatch.setattr(provenance, "describe_hardware", lambda: {"gpus": []})
    with pytest.raises(SystemExit, match="pass --machine"):
        command_line.machine_of(argparse.Namespace(machine=None))


def test_an_unnamed_gpu_is_refused_before_hours_are_spent(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "describe_hardware", lambda: {"gpus": []})
    work = tmp_path / "work"
    monkeypatch.setattr(sys, "argv", ["compress_rate.py", "--shape", "tiny", "--work", str(work)])
    with pytest.raises(SystemExit, match="pass --machine"):
        compress_rate.main()
    assert not work.exists()


def test_a_result_that_is_cut_off_leaves_the_one_before(tmp_path, monkeypatch):
    """What a run measured row by row must outlast a kill while it is written."""
    given = ("quality", "test", "command")
    path = record.write(*given, [record.row({}, "one", "seconds", 1.0, "s")], tmp_path)
    before = path.read_text()

    def cut_off(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", cut_off)
    with pytest.raises(KeyboardInterrupt):
        record.write(*given, [record.row({}, "one", "seconds", 2.0, "s")], tmp_path)
    assert path.read_text() == before


def test_the_recorded_command_omits_this_machines_folder(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["x", "--lengths", "4096", "--folder", "/tmp/a", "--rank", "8"]
    )
    for name in ("benchmarks/x.py", "benchmarks/proxy/measure.py"):
        command = command_line.command_of(str(ROOT / name), argparse.Namespace(folder="/tmp/a"))
        assert command == f"python3 {name} --lengths 4096 --rank 8"


def test_a_machine_name_with_a_separator_is_refused_before_measuring(capsys):
    parser = argparse.ArgumentParser()
    command_line.add_result(parser)
    assert parser.parse_args(["--machine", "h200x4"]).machine == "h200x4"
    with pytest.raises(SystemExit):
        parser.parse_args(["--machine", "h200-x4"])
    assert "letters and digits" in capsys.readouterr().err


def test_make_bench_runs_the_files_that_write_results():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = re.search(r"^BENCHMARKS := ((?:.*\\\n)*.*)$", makefile, re.MULTILINE)
    assert named
    writing = {
        path.stem
        for path in (ROOT / "benchmarks").glob("*.py")
        if re.search(r"^from benchmarks.record import .*\bwrite\b", path.read_text(), re.MULTILINE)
    }
    assert set(named[1].replace("\\", " ").split()) == writing


def test_benchmarks_md_is_up_to_date(monkeypatch, tmp_path):
    from benchmarks.report import __main__ as report
    from benchmarks.report import attention, train_step

    assert attention.RESULTS == train_step.RESULTS == record.RESULTS
    for module in (attention, train_step):  # modules that write plots
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    page = (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")
    assert report.write_page() == page, "run python -m benchmarks.report"
    drawn, kept = (sorted(p.name for p in place.glob("*.png")) for place in (tmp_path, RESULTS))
    assert drawn == kept, "commit the plots that python -m benchmarks.report draws"


def test_exchanges_kernels_are_told_apart_by_the_order_of_their_calls():
    kernels = [
        ("ncclDevKernel_AllGather_RING_LL", (5.0, 7.0)),
        ("ncclDevKernel_SendRecv", (2.0, 3.0)),
        ("ncclDevKernel_AllGather_RING_LL", (0.0, 1.0)),
    ]
    tags = {"SendRecv": ["keys"], "AllGather": ["expert rows", "loss"]}
    found = intervals.assign(kernels, tags)
    assert found == {"expert rows": [(0.0, 1.0)], "keys": [(2.0, 3.0)], "loss": [(5.0, 7.0)]}
    assert intervals.assign(kernels[:2], tags) == {}  # a call without a kernel


def test_transfers_are_measured_in_the_process_that_comes_last():
    """The first call waits 4 us for the other process, whose kernel takes 2, 1 of it hidden."""
    calls = {"b": [(10.0, 13.0)], "a": [(0.0, 6.0)]}
    profile = intervals.Profile([(0.0, 5.0), (12.0, 20.0)], calls, [(0.0, 6.0), (10.0, 13.0)], 9)
    assert profile.calls() == [(6.0, 5.0), (3.0, 1.0)]
    found = intervals.sum_transfers(torch.tensor([profile.calls(), [(2.0, 1.0), (7.0, 7.0)]]))
    assert found["transfer_seconds"] == pytest.approx(5e-6)
    assert found["hidden_transfer_share"] == pytest.approx(2 / 5)
    whole = profile.summarize(3)
    assert whole["hidden_share"] == pytest.approx(6 / 9) and whole["launches_per_layer"] == 3
    assert whole["hidden_seconds: a"] == pytest.approx(5e-6)


def test_collectives_of_gpu_tensors_are_recorded_by_tag(monkeypatch):
    given = []
    monkeypatch.setattr(torch.distributed, "all_gather", lambda *args: given.append(args))
    monkeypatch.setattr(intervals, "progress", lambda: (1, "gradient norm"))
    on_gpu, on_cpu = mock.Mock(is_cuda=True), mock.Mock(is_cuda=False)
    with intervals.recording_tags() as tags:
        for sent in (on_gpu, on_cpu):
            torch.distributed.all_gather([], sent)
    torch.distributed.all_gather([], on_gpu)
    assert tags == {"SendRecv": [], "AllGather": ["gradient norm"]} and len(given) == 3


def test_the_plan_decides_whether_120b_keeps_attention():
    case = {"shape": "whole", "arm": "masked", "tokens": 16_384, "degree": 4, "gpus": 4}
    case["layers"] = 36
    assert fit_120b.keeps_attention(case)
    assert not fit_120b.keeps_attention(case | {"arm": "experts"})  # it would not fit 24 GB cards
    assert fit_120b.keeps_attention(case | {"arm": "experts", "tokens": 4096})


def test_the_section_on_full_finetuning_prints_what_was_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert full_finetune.write_section() == ""
    case = {"tokens": 4096, "rows": 2, "attention": "ours", "layers": 4, "processes": 2}
    eager = case | {"attention": "eager"}
    rows = [
        row(case | {"step": 1}, "fsdp2", "loss", 12.25, "nats"),
        row({"layers": 4}, "fsdp2", "largest_difference", 3e-3, "1"),
        row(case, "fsdp2", "throughput", 12_345.6, "tokens/s"),
        row(case, "fsdp2", "peak_bytes", 3 * 2**29, "bytes"),
        row(eager, "fsdp2", "throughput", 0.0, "tokens/s"),
        row(eager, "fsdp2", "out_of_memory", 1, "1"),
    ]
    path = record.write("full_finetune", "made", "none", rows, tmp_path)
    text = full_finetune.write_section()
    assert "| FSDP2 | 4 | 2 | 4,096 | ours | 12,346 | 1.5 GiB | 3e-03 |\n" in text
    assert "| FSDP2 | 4 | 2 | 4,096 | eager | - | - | 3e-03 |\n" in text
    assert f"### made (torch {torch.__version__}" in text and path.name in text
    assert "12.25" not in text
