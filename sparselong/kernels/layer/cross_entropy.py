"""Cross-entropy over a large vocabulary, with the logits of only a few rows in memory at a time.

The maths, for a row h with label y and the frozen weight W [vocab, width]:

    loss = logsumexp(W h) - (W h)_y            dh = W^T (softmax(W h) - e_y)

gpt-oss has 201,088 logits per token: at 16,384 tokens these, their fp32 copy and gradients take
tens of gigabytes. Here rows without a label are dropped before the first product, and the others
are processed in chunks. Each chunk's gradient with respect to h is computed in the forward pass:
one kernel reads the logits twice and overwrites them with softmax - e_y, and a second product turns
these into dh. The backward pass only scales dh, which has the size of the supervised rows, by the
upstream gradient. Without gradients the second product is skipped.

Logits are rounded to the inputs' dtype by the product, as in transformers; everything after is
fp32. dh is the gradient of the *sum* of losses. Dividing by the caller's count is left to the
backward pass, because in fp16 most of the divided values would underflow to zero. Deterministic.

On a CPU torch replaces the kernel. Source of the method: Wijmans et al. (2024), arXiv:2411.09009,
and Liger-Kernel (arXiv:2410.10989), whose chunks are 256 rows at this vocabulary and include
unsupervised rows; the code is ours, under this repository's licence. Not supported: a trained
lm_head (refused), label smoothing, soft caps, and second derivatives.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from sparselong.kernels.launch import launch
from sparselong.kernels.opaque import make_opaque

IGNORED = -100
CHUNK_ROWS = 512
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_rows: int = CHUNK_ROWS
) -> torch.Tensor:
    """Return the summed cross-entropy of `hidden @ weight.T` over the rows that have a label.

    Args:
        hidden: [rows, width], bf16, fp16 or fp32 (fp64 on a CPU); differentiable.
        weight: [vocab, width] in hidden's dtype, frozen.
        labels: int64 [rows]; -100 excludes a row.
        chunk_rows: rows whose logits exist at once, in chunk_rows * vocab * itemsize bytes.

    Returns:
        fp32 scalar (fp64 from fp64), in nats; 0 if no row has a label. Its error and that of the
        gradient against fp64 are at most twice plain torch's in the same dtype
        (tests/gpu/test_layer.py).

    Raises:
        ValueError: an argument is not as above, or weight requires a gradient; the message names
            it, its value and what is allowed.
    """
    check_loss_arguments(hidden, weight, labels, chunk_rows)
    if torch.compiler.is_compiling():
        trains = torch.is_grad_enabled() and hidden.requires_grad
        return _loss_operator(hidden, weight, labels, chunk_rows, trains)[0]
    kept = (labels != IGNORED).nonzero().flatten()
    targets = labels[kept]
    _check_labels(targets, len(weight))
    if len(kept) < len(hidden):
        hidden = hidden.index_select(0, kept)
    return _LinearCrossEntropy.apply(hidden, weight, targets, chunk_rows)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def token_losses(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_rows: int = CHUNK_ROWS
) -> torch.Tensor:
    """Return each row's cross-entropy, fp32 [rows] (fp64 from fp64), without gradients.

    Arguments and errors as for `linear_cross_entropy`; every row needs a label.
    """
    check_loss_arguments(hidden, weight, labels, chunk_rows)
    _check_labels(labels, len(weight))
    return _row_losses(hidden, weight, labels.contiguous(), chunk_rows, needs_gradient=False)[0]


def check_loss_arguments(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_rows: int
) -> None:
    """Raise ValueError unless the arguments are as for `linear_cross_entropy`.

    The labels' values are not looked at, nor is the number of weight's rows.
    """
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(
            f"hidden: {hidden.dtype} {list(hidden.shape)}; allowed: floating [rows, width]"
        )
    if hidden.is_cuda and hidden.dtype not in DTYPES:
        raise ValueError(f"hidden: {hidden.dtype}; allowed on a GPU: {', '.join(map(str, DTYPES))}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.dtype != hidden.dtype:
        raise ValueError(
            f"weight: {weight.dtype} {list(weight.shape)}; "
            f"allowed: {hidden.dtype} [vocab, {hidden.shape[1]}]"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight: requires a gradient; allowed: a frozen lm_head")
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels: {labels.dtype} {list(labels.shape)}; allowed: int64 [{len(hidden)}]"
        )
    for name, tensor in (("weight", weight), ("labels", labels)):
        if tensor.device != hidden.device:
            raise ValueError(f"{name}: on {tensor.device}; allowed: {hidden.device}, as hidden")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows: {chunk_rows}; allowed: at least 1")


def _check_labels(targets: torch.Tensor, vocab: int) -> None:
    """Raise if any supervised label is out of range."""
    if not len(targets):
        return
    least, most = torch.stack(targets.aminmax()).tolist()
    if not 0 <= least <= most < vocab:
        raise ValueError(
            f"labels: between {least} and {most}; "
            f"allowed: {IGNORED} in training, or 0 to {vocab - 1}"
        )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk_rows: int
    ) -> torch.Tensor:
        losses, dhidden = _row_losses(hidden, weight, targets, chunk_rows, ctx.needs_input_grad[0])
        ctx.save_for_backward(dhidden)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dhidden,) = ctx.saved_tensors
        return _scale(dhidden, dloss), None, None, None


def _scale(dhidden: torch.Tensor, dloss: torch.Tensor) -> torch.Tensor:
    # Not in bf16, which would round dloss itself by up to 0.2 %.
    return dhidden.to(dloss.dtype, copy=True).mul_(dloss).to(dhidden.dtype)


def _row_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    chunk_rows: int,
    needs_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return each row's loss, and the gradient of their sum with respect to hidden or None."""
    rows, vocab = len(hidden), len(weight)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    losses = torch.empty(rows, dtype=wide, device=hidden.device)
    dhidden = torch.empty_like(hidden) if needs_gradient else None
    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        buffer = hidden.new_empty(min(rows, chunk_rows), vocab)
        for start in range(0, rows, chunk_rows):
            chunk = slice(start, min(start + chunk_rows, rows))
            logits = buffer[: chunk.stop - chunk.start]
            torch.mm(hidden[chunk], weight.T, out=logits)
            turn_into_gradients(logits, targets[chunk], losses[chunk], needs_gradient)
            if dhidden is not None:
                torch.mm(logits, weight, out=dhidden[chunk])
    return losses, dhidden


def turn_into_gradients(
    logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor, needs_gradient: bool
) -> None:
    """Write the rows' losses and, with gradients, replace logits by softmax - e_target.

    Args:
        logits: [rows, vocab], contiguous.
        targets: int64 [rows].
        losses: [rows], fp32 or fp64, written to.
        needs_gradient: whether to overwrite the logits with their gradients.
    """
    if logits.is_cuda:
        launch(
            _kernels().softmax_kernel,
            (len(logits),),
            *(logits, targets, losses, logits.shape[1]),
            NEEDS_GRADIENT=needs_gradient,
            BLOCK=4096,
            num_warps=8,
        )
        return
    wide = logits.to(losses.dtype)
    target_logits = wide.gather(1, targets[:, None])[:, 0]
    total = wide.logsumexp(1)
    torch.sub(total, target_logits, out=losses)
    if needs_gradient:
        gradient = torch.exp(wide - total[:, None])
        gradient[torch.arange(len(targets)), targets] -= 1
        logits.copy_(gradient)


@functools.cache
def _kernels() -> Any:
    """Return the kernel's module, imported on first use because a CPU does not need Triton."""
    from sparselong.kernels.layer import cross_entropy_triton as cross_entropy_kernels

    return cross_entropy_kernels


def _loss(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_rows: int, trains: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum and the gradient of hidden, for torch.compile.

    The gradient has all rows, zeros where there is no label: a graph knows how many rows there are,
    but not how many are supervised. Without gradients it is empty.
    """
    kept = (labels != IGNORED).nonzero().flatten()
    targets = labels[kept]
    _check_labels(targets, len(weight))
    rows = hidden.contiguous() if len(kept) == len(hidden) else hidden.index_select(0, kept)
    losses, drows = _row_losses(rows, weight, targets, chunk_rows, trains)
    if drows is None:
        return losses.sum(), hidden.new_empty(0)
    if len(kept) == len(hidden):
        return losses.sum(), drows
    dhidden = hidden.new_zeros(hidden.shape)
    return losses.sum(), dhidden.index_copy_(0, kept, drows)


def _like_loss(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_rows: int, trains: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty((), dtype=wide), hidden.new_empty(hidden.shape if trains else 0)


def _differentiate_loss(arguments: Any, results: Any, gradients: Any, needs: Any) -> tuple:
    dhidden, *_ = arguments  # in place of hidden
    return _scale(dhidden, gradients[0]), None, None


_loss_operator = make_opaque(
    _loss,
    like=_like_loss,
    differentiate=_differentiate_loss,
    stand_ins={0: 1},
    synchronizes=True,
)
