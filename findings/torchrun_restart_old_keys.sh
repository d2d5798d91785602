#!/usr/bin/env bash
# torchrun: workers of a restarted group find in their store what the group before has left there.
#
# Versions: torch 2.13.0, numpy 2.3.5, Python 3.11; torchrun --standalone --max-restarts=1, one worker, gloo.
# A good guess: after a restart init_process_group begins with nothing. Environment variables say which restart it is,
#   and file:// stores have to be new for each group.
# Seen: the agent's TCPStore outlives the restart, and its keys are the same for each start: there is no prefix of the
#   restart's number. A key of the first start is there in the second. gloo keeps the addresses of its ranks there, so
#   one that comes up early can read the address of a rank that is gone; pytorch/pytorch#135712 reports it. A prefix of
#   one's own for each start is the way out.
# Exit status: 0 as long as that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check numpy==2.3.5
cat > "$folder/worker.py" <<'PYTHON'
import os
import sys
from datetime import timedelta

import torch.distributed as dist

store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=30)))
start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
print(f"start {start}: a key of an earlier start is there: {store.check(['left behind'])}", flush=True)
store.set("left behind", str(start))
sys.exit(0 if start else 1)
PYTHON
"$folder/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node=1 --max-restarts=1 \
  "$folder/worker.py" 2> "$folder/errors" | tee "$folder/said"
diff "$folder/said" - <<'SEEN'
start 0: a key of an earlier start is there: False
start 1: a key of an earlier start is there: True
SEEN
echo "as described"
