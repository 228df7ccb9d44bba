"""Keeping the quantizer in float32 where everything around it is sharded and computed in less."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from ett.tokenizers import Quantizer


def shard_quantizer(quantizer: Quantizer, mesh: DeviceMesh | None = None) -> None:
    """Make `quantizer` an FSDP2 unit of its own that gathers and computes in float32, in place.

    Call it before ``fully_shard`` wraps the model with a policy of ``param_dtype=bfloat16``: that policy then leaves the
    codebook alone. Without it the quantizer refuses to run rather than return other indices.
    """
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(quantizer, mesh=mesh, mp_policy=policy)
    # parameters are gathered around forward(); these read the codebook as well
    for method in ("nearest", "lookup", "softmax_statistics"):
        register_fsdp_forward_method(quantizer, method)
