"""Each example of using the parts elsewhere can be read at a glance."""

from tests.conftest import ROOT


def test_an_example_has_at_most_80_lines():
    paths = {path for path in (ROOT / "examples").rglob("*.*") if path.suffix in (".py", ".yaml")}
    paths.remove(ROOT / "examples/train_in_one_file.py")  # stage 03 as one loop, with its own limit
    lengths = {path.name: len(path.read_text().splitlines()) for path in paths}
    assert {"transformers_trainer.py", "trl_sft.py"} <= lengths.keys()
    assert max(lengths.values()) <= 80, lengths
