"""Loading is sharded: each device gets its slice, and a process holds its shards and one tensor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import BIG, published_arrays, write_checkpoint
from flax import nnx
from runs import environment, script_output

from lora_exp.models.factory import abstract_model
from lora_exp.models.weights.safetensors_checkpoint import write_safetensors
from lora_exp.runtime.mesh import flatten

PLACES = """
import json, sys
from pathlib import Path
import numpy as np
from checkpoints import load_arrays, random_arrays
from lora_exp.config import MeshConfig
expected = random_arrays()
for sizes in ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)):
  found = load_arrays(Path(sys.argv[1]), mesh=MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes))))
  for path, x in found.items():
    assert len(x.addressable_shards) == 8
    for shard in x.addressable_shards:
      np.testing.assert_array_equal(np.asarray(shard.data), expected[path][shard.index], err_msg=path)
split = {path: list(x.sharding.spec) for path, x in found.items()}
print(json.dumps([split["layers.0.self_attn.q_proj.kernel"], split["layers.1.mlp.down_proj.kernel"]]))
"""


def test_every_device_gets_its_slice_on_every_mesh(tmp_path):
  split = json.loads(script_output(PLACES, str(write_checkpoint(tmp_path))))
  assert split == [["fsdp", "tensor"], ["tensor", "fsdp"]]


MEASURE = """
import json, sys
from dataclasses import replace
from pathlib import Path
import jax
from lora_exp.config import MeshConfig
from checkpoints import BIG, load_arrays
def rss(name="VmRSS"):
  return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
if len(sys.argv) > 4:
  jax.distributed.initialize(f"localhost:{sys.argv[4]}", num_processes=2, process_id=int(sys.argv[5]))
jax.device_put(1.0).block_until_ready()
mesh = MeshConfig(**json.loads(sys.argv[3]))
before = rss()
found = load_arrays(Path(sys.argv[1]), replace(BIG, param_dtype=sys.argv[2]), mesh)
own = sum({str(s.index): s.data.nbytes for s in x.addressable_shards}[i] for x in found.values()
          for i in {str(s.index) for s in x.addressable_shards})
largest = max(x.nbytes for x in found.values())
print(json.dumps({"grown": rss("VmHWM") - before, "own": own, "largest": largest,
                  "all": sum(x.nbytes for x in found.values())}))
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> dict[str, Path]:
  """A checkpoint of 143 MB in float32, and of half in bfloat16."""
  made = {code: tmp_path_factory.mktemp(code) for code in ("F32", "BF16")}
  shapes = flatten(nnx.to_pure_dict(nnx.state(abstract_model(BIG, 0), nnx.Param)))
  theirs = published_arrays({path: np.broadcast_to(np.float32(1), x.shape) for path, x in shapes.items()})
  for code, at in made.items():
    write_safetensors(at / "model.safetensors", [(name, x.shape, lambda x=x: x) for name, x in theirs.items()], code)
  return made


@pytest.mark.parametrize(("code", "param_dtype", "mesh"), [
  ("F32", "float32", {"data": 1, "fsdp": 4, "tensor": 2}),
  ("BF16", "float32", {"data": 8}),
])
def test_memory_grows_by_little_more_than_the_weights(big, code, param_dtype, mesh):
  """On eight devices, also where each of them needs every weight, and where the file's dtype is another."""
  found = json.loads(script_output(MEASURE, str(big[code]), param_dtype, json.dumps(mesh)))
  assert found["all"] == found["own"]
  assert found["grown"] <= 1.3 * found["all"], found


def test_a_process_holds_its_shards_and_one_tensor(big):
  """Two processes with four devices each."""
  import socket

  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = str(probe.getsockname()[1])
  env = environment(4) | {"PYTHONPATH": os.pathsep.join(sys.path)}
  mesh = json.dumps({"data": 1, "fsdp": 8})
  start = lambda i: subprocess.Popen([sys.executable, "-c", MEASURE, str(big["F32"]), "float32", mesh, port, str(i)],
                                     env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  for running in [start(0), start(1)]:
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err[-3000:]
    found = json.loads(out.splitlines()[-1])
    assert found["own"] < 0.51 * found["all"]
    assert found["grown"] <= found["own"] + found["largest"], found
