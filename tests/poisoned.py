"""Memory that kernels are to fill, filled with what must not remain."""

import torch


class PoisonedTorch:
    """torch, but what torch.empty and torch.empty_like return is full of NaN, or of 77s.

    Put in torch's place in a module of launchers, it shows what its kernels leave unwritten.
    """

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *args, **kwargs):
        return self._fill(torch.empty(*args, **kwargs))

    def empty_like(self, *args, **kwargs):
        return self._fill(torch.empty_like(*args, **kwargs))

    def _fill(self, tensor):
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)
