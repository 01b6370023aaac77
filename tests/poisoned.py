"""Output buffers prefilled with values that a correct kernel overwrites."""

import torch


class PoisonedTorch:
    """A stand-in for torch whose `empty` and `empty_like` return NaN (integers: 77).

    Patched into a launcher module, it exposes elements that the kernels do not write.
    """

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *args, **kwargs):
        return self._fill(torch.empty(*args, **kwargs))

    def empty_like(self, *args, **kwargs):
        return self._fill(torch.empty_like(*args, **kwargs))

    def _fill(self, tensor):
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)
