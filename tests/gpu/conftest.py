"""Which tests of this folder a machine can run, by its number of GPUs."""

import torch

collect_ignore = [] if torch.cuda.device_count() >= 2 else ["test_context_parallel.py"]
