"""A small model, its tokenizer, and lm-eval's own model over it, against which ours is measured."""

import pytest


@pytest.fixture(scope="session")
def tokenizer(untrained_base):
    from sparselong.model.tokenizer import load_tokenizer

    return load_tokenizer(untrained_base)


@pytest.fixture(scope="session")
def model(untrained_base):
    from sparselong.model.loading import load_model

    return load_model(untrained_base)


@pytest.fixture(scope="session")
def measure(model):
    """Measure the model on a suite's tasks."""
    from tests.measuring import measure_tasks

    return lambda suite: measure_tasks(model, suite)


@pytest.fixture(scope="session")
def run_lm_eval(model, tokenizer):
    """Measure the model with lm-eval alone; return its `results` and `samples`."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    def run(suite):
        lm = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=suite.config.evaluation.batch_size,
            add_bos_token=False,
            softmax_dtype="float32",
        )
        for task in suite.tasks.values():
            task.set_fewshot_seed(suite.config.seed)
        return lm_eval.evaluate(
            lm=lm, task_dict=suite.tree, limit=suite.config.evaluation.limit, bootstrap_iters=1000
        )

    return run
