#!/usr/bin/env bash
# torch 2.13.0 on a CPU: torch.aminmax over a dimension takes several times as long as amin and amax one after the other.
#
# It is meant to save a pass over the memory: one call for what quantisation needs of each row. But its reduction over a
# dimension is not vectorised, and amin's and amax's are: 14 ms against 2 for the rows of a contiguous float32 tensor
# of [4096, 1536], in one thread; without a dimension, over the whole tensor, aminmax is the faster way. The values are
# the same. Where rows are quantised as they come, call amin and amax.
# Exit status 0: it is so (more than twice as long). 1: the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5"
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import time

import torch

torch.set_num_threads(1)
rows = torch.randn(4096, 1536, generator=torch.Generator().manual_seed(0))


def milliseconds(call):
    call()
    times = []
    for _ in range(15):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return 1000 * min(times)


low, high = torch.aminmax(rows, dim=1)
assert torch.equal(low, rows.amin(1)) and torch.equal(high, rows.amax(1))
both = milliseconds(lambda: (rows.amin(1), rows.amax(1)))
fused = milliseconds(lambda: torch.aminmax(rows, dim=1))
whole = milliseconds(lambda: torch.aminmax(rows)), milliseconds(lambda: (rows.amin(), rows.amax()))
print(f"rows: aminmax {fused:.1f} ms, amin and amax {both:.1f} ms: {fused / both:.1f} times")
print(f"whole tensor: aminmax {whole[0]:.1f} ms, amin and amax {whole[1]:.1f} ms")
assert fused > 2 * both, "this has changed"
PYTHON
