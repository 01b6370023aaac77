"""gpt-oss's experts over packed MXFP4 weights, with and without adapters."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.kernels.experts.call import ExpertCall, ExpertOperands, Gradients
    from sparselong.kernels.experts.choice import choose_backend
    from sparselong.kernels.experts.held import choose_held, differentiate_held, run_held
    from sparselong.kernels.experts.lora import NO_ADAPTERS, Adapter, Adapters
    from sparselong.kernels.experts.op import ALPHA, LIMIT, expert_mlp, slices, split_evenly
    from sparselong.kernels.experts.parts import sum_parts

__getattr__ = expose(__name__)
