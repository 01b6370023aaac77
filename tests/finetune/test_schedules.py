"""Learning rate schedules: each as Axolotl makes it from our YAML, against its formula."""

import json
import math
import subprocess
from collections.abc import Callable
from typing import get_args

import pytest

from sparselong.config.schema import load
from sparselong.config.training import Schedule
from sparselong.errors import ConfigError
from tests.conftest import ROOT

STEPS, WARM, PEAK = 40, 4, 1e-3
NO_WARM_UP = "training.warmup_ratio=0"
LEAST, PATIENCE = "training.min_lr_ratio=0.1", "training.lr_patience=2"


def fall(done: float) -> float:
    """A half cosine from 1 to 0."""
    return (1 + math.cos(math.pi * done)) / 2


def warmed(after: Callable[[float], float]) -> Callable[[int], float]:
    """A linear rise from 0, then `after` of the done fraction of the other steps."""
    return lambda t: t / WARM if t < WARM else after((t - WARM) / (STEPS - WARM))


def rex(t: int) -> float:
    left = 1 - (t + 1 - WARM) / (STEPS - WARM)
    return (t + 1) / WARM if t < WARM else 0.1 + 0.9 * left / (0.1 + 0.9 * left)


def one_cycle(t: int) -> float:
    """From 1/25 to 1 in a quarter of the steps, and down to 4e-6."""
    if t <= 9:
        return 1 - 0.96 * fall(t / 9)
    return 4e-6 + (1 - 4e-6) * fall((t - 9) / 30)


def stable(t: int) -> float:
    rising = 0.1 + 0.9 * t / WARM
    return rising if t < WARM else 1.0 if t < 30 else 0.1 + 0.9 * fall((t - 30) / 10)


CASES: dict[Schedule, tuple[list[str], Callable[[int], float]]] = {
    "cosine": ([], warmed(fall)),
    "cosine_with_min_lr": ([LEAST], warmed(lambda done: 0.1 + 0.9 * fall(done))),
    "cosine_warmup_with_min_lr": (
        [LEAST],
        lambda t: (t + 1) / WARM if t < WARM else 0.1 + 0.9 * fall((t + 1 - WARM) / 36),
    ),
    "cosine_with_restarts": (["training.lr_cycles=2"], warmed(lambda done: fall(2 * done % 1))),
    "linear": ([], warmed(lambda done: 1 - done)),
    "polynomial": ([LEAST], warmed(lambda done: 1 - 0.9 * done)),
    "rex": ([LEAST], rex),
    "one_cycle": (["training.warmup_ratio=0.25"], one_cycle),
    "inverse_sqrt": ([], lambda t: t / WARM if t < WARM else math.sqrt(WARM / t)),
    "warmup_stable_decay": ([LEAST, "training.lr_decay_ratio=0.25"], stable),
    "constant": ([NO_WARM_UP], lambda t: 1.0),
    "constant_with_warmup": ([], warmed(lambda done: 1.0)),
    # A third evaluation without improvement is that of step 20, a third improvement of step 32.
    "reduce_lr_on_plateau": ([NO_WARM_UP, PATIENCE], lambda t: 1.0 if t < 20 else 0.1),
    "greedy": ([NO_WARM_UP, PATIENCE, LEAST], lambda t: 0.95 if 20 <= t < 32 else 1.0),
}
"""What each schedule needs besides its name, and its factor at a step."""


@pytest.fixture(scope="module")
def made(forked_python) -> dict[str, list[list[float]]]:
    """Learning rates by schedule: of an uninterrupted run, and of a resumed one."""
    given = {name: ["training.warmup_ratio=0.1", *more] for name, (more, _) in CASES.items()}
    command = [forked_python, "-m", "tests.finetune.axolotl_schedules", json.dumps(given)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", get_args(Schedule))
def test_a_schedule_is_its_formula_also_if_resumed(name, made):
    straight, resumed = made[name]
    assert straight == pytest.approx([PEAK * CASES[name][1](t) for t in range(STEPS)], rel=1e-9)
    assert resumed == straight


def test_every_schedule_of_the_installed_packages_is_a_choice():
    from transformers.trainer_utils import SchedulerType

    assert {*get_args(Schedule)} == {each.value for each in SchedulerType} | {"rex", "one_cycle"}


@pytest.mark.parametrize(
    ("overrides", "key", "part"),
    [
        (["constant", "training.warmup_ratio=0.03"], "warmup_ratio", "constant_with_warmup"),
        (["greedy", LEAST], "warmup_ratio", "warmup_ratio: 0"),
        (["cosine", LEAST], "min_lr_ratio", "cosine_with_min_lr"),
        (["cosine_with_min_lr"], "min_lr_ratio", "needs training.min_lr_ratio"),
        (["cosine_with_restarts"], "lr_cycles", "needs training.lr_cycles"),
        (["linear", "training.lr_cycles=2"], "lr_cycles", "it is for cosine_with_restarts"),
        (["cosine", PATIENCE], "lr_patience", "reduce_lr_on_plateau, greedy"),
        (["warmup_stable_decay"], "lr_decay_ratio", "needs training.lr_decay_ratio"),
        (
            ["warmup_stable_decay", "training.lr_decay_ratio=0.99"],
            "lr_decay_ratio",
            "together at most 1",
        ),
        (["cosine_annealing"], "lr_scheduler", "warmup_stable_decay"),
    ],
)
def test_what_a_schedule_does_not_take_is_refused_by_name(overrides, key, part):
    name, *more = overrides
    with pytest.raises(ConfigError) as refusal:
        load(ROOT / "configs/tiny.yaml", [f"training.lr_scheduler={name}", *more])
    assert f"training.{key}" in refusal.value.what and part in refusal.value.expected
