#!/usr/bin/env bash
# sentence-transformers 6.2.0 with torch 2.13.0: FSDP2 shards a whole model, and none of its Pooling, Normalize or Dense.
#
# fully_shard makes a module an instance of a new class, of FSDPModule and its own. Python refuses that for the modules
# of sentence-transformers, which descend from abc.ABC: "TypeError: __class__ assignment: 'FSDPNormalize' object layout
# differs from 'Normalize'". A Linear and the SentenceTransformer around them are sharded. A plan that shards such a
# module on its own ends there: name the trunk's layers alone, such as transformer_layer_cls_to_wrap=["BertLayer"].
# Exit status 0: it is so. 1: the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "sentence-transformers==6.2.0" "transformers==5.23.0"
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" - <<'PYTHON' 2>/dev/null
import os

import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from torch.distributed.fsdp import fully_shard

os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
dist.init_process_group("gloo", rank=0, world_size=1)
mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
found = {}
for module in (torch.nn.Linear(2, 2), SentenceTransformer(modules=[Dense(8, 4)], device="cpu"), Pooling(8), Normalize(), Dense(8, 4)):
    name = type(module).__name__
    try:
        fully_shard(module, mesh=mesh)
        found[name] = "sharded"
    except TypeError as error:
        found[name] = f"TypeError: {error}"
    print(f"{name}: {found[name]}")
refused = [name for name, what in found.items() if "object layout differs" in what]
assert refused == ["Pooling", "Normalize", "Dense"], "this has changed"
assert list(found.values()).count("sharded") == 2, "this has changed"
PYTHON
