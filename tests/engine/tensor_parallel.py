"""One of the processes that share a model, for test_tensor_parallel.py; started by torchrun.

Arguments: the folder, and where the first process leaves the logits. Every process prints which
part of the parameters it holds, as JSON.
"""

import json
import sys

import numpy as np
import torch
from transformers.distributed import DistributedConfig

import support


def held_part(parameter: torch.Tensor) -> float:
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.numel() / parameter.numel()


def main(folder: str, out: str) -> None:
    torch.set_num_threads(1)
    shared = DistributedConfig(tp_plan="auto")
    model = support.load(folder, custom_code=True, distributed_config=shared)
    logits = support.logits_of(model, support.validation_ids(1))
    if torch.distributed.get_rank() == 0:
        np.save(out, logits.numpy())
    print(json.dumps({name: held_part(p) for name, p in model.named_parameters()}), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
