"""A method is one file: its instructions work, and no code outside the folder compares the name of a method or leaf."""

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_exp
from lora_exp import lora
from lora_exp.config import InputError
from lora_exp.lora import methods
from lora_exp.lora.kernels import shape as kernel_shape

PACKAGE = Path(lora_exp.__file__).parent
FOLDER = PACKAGE / "lora" / "methods"
COMMON = {"lora"}  # a group of the config as well
ENDS = ("endswith", "startswith")
LEAVES = {name for method in methods.every() for name in method.leaves}
NAMES = (LEAVES | set(methods.names())) - COMMON


def strings(node: ast.expr) -> set[str]:
  """The string constants in an expression."""
  return {x.value for x in ast.walk(node) if isinstance(x, ast.Constant) and isinstance(x.value, str)}


def compared_names(tree: ast.AST) -> set[str]:
  """Names of methods and leaves that code compares with, looks up, or takes for the end of a path."""
  found: set[str] = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Compare):
      found |= strings(node)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ENDS:
      found |= {x for argument in node.args for x in strings(argument)}
    elif isinstance(node, ast.MatchValue):
      found |= strings(node.value)
  return found & NAMES


ALLOWED = {"report/reading/method_facts.py"}  # names of version 0.1.0, whose runs wrote no facts


def test_no_code_outside_the_folder_compares_a_name():
  wrong = {}
  for file in PACKAGE.rglob("*.py"):
    if FOLDER in file.parents or str(file.relative_to(PACKAGE)) in ALLOWED:
      continue
    if found := compared_names(ast.parse(file.read_text(encoding="utf-8"))):
      wrong[str(file.relative_to(PACKAGE))] = found
  assert not wrong


COMPARISONS = ['x == "vera"', 'm in ("full", "lora")', 'p.endswith("lora_b")', '"magnitude" in leaves']


@pytest.mark.parametrize("code", COMPARISONS)
def test_the_search_finds_such_code(code):
  assert compared_names(ast.parse(code))


def test_an_unknown_method_is_refused_with_the_nearest_name():
  with pytest.raises(InputError, match=r"did you mean vera\?"):
    methods.get("vear")


@pytest.mark.parametrize("name", methods.names())
def test_every_method_has_its_facts(name):
  method = methods.get(name)
  assert method.name == name and method.title and method.cost and method.__doc__
  sizes = method.sizes(lora.AdaptedModule("layer", 6, 8, rank=2, alpha=2, scale=1))
  assert all(set(leaf.axes) <= (set("IOR") if leaf.shared else set(sizes)) for leaf in method.leaves.values())


ADAPTERS = [method.name for method in methods.every() if method.adapts_kernels]


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_computes_the_same_after_its_files(tmp_path, name):
  model = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 4, rngs=nnx.Rngs(1)))
  lora.inject(model, method=name, rank=3)
  state = nnx.state(model, nnx.LoRAParam)
  nnx.update(model, jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), state))
  x = jnp.ones((2, 6))
  trained, shapes = model(x), {path: kernel_shape(m) for path, m in lora.modules(model).items()}
  assert lora.save_adapter(tmp_path, lora.eject(model), None, {}) is False, "no naming, so not for PEFT"
  assert not np.allclose(model(x), trained)
  lora.attach(model, lora.load_adapter(tmp_path, None, shapes))
  np.testing.assert_allclose(model(x), trained, rtol=1e-5, atol=1e-6)


def example() -> tuple[str, str]:
  """The file and the YAML of the example in the folder's docstring."""
  blocks = re.findall(r"(?:^    .*\n|^\n)+", methods.__doc__ or "", re.M)
  code = [textwrap.dedent(block) for block in blocks if block.strip()]
  return next(x for x in code if "class " in x), next(x for x in code if "defaults:" in x)


ADDED = """
import sys, tempfile
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from lora_exp.lora import methods
methods.__path__.append(sys.argv[1])
methods.names.cache_clear()
from lora_exp import lora
model = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 4, rngs=nnx.Rngs(1)))
x = jnp.ones((2, 6))
before = model(x)
lora.inject(model, method="lorafa", rank=3)
np.testing.assert_array_equal(model(x), before)
for module in model.layers:
  module.fa_b[...] = jnp.ones(module.fa_b.shape)
after = model(x)
assert not np.allclose(after, before)
undo = lora.merge(model)
np.testing.assert_allclose(model(x), after, rtol=1e-5)
lora.unmerge(model, undo)
np.testing.assert_array_equal(model(x), after)
adapter = lora.eject(model)
np.testing.assert_array_equal(model(x), before)
with tempfile.TemporaryDirectory() as directory:
  assert lora.save_adapter(directory, adapter, lora.Naming("model."), {}) is True
print("ok")
"""


def test_the_example_of_the_docstring_is_a_method(tmp_path):
  file, yaml = example()
  assert len(file.splitlines()) < 50 and "method: lorafa" in yaml
  (tmp_path / "lorafa.py").write_text(file)
  done = subprocess.run([sys.executable, "-c", ADDED, str(tmp_path)], capture_output=True, text=True)
  assert done.stdout.strip() == "ok", done.stderr


HALVES = '''
"""One array for both halves of the inputs."""

import jax.numpy as jnp

from lora_exp.lora.methods.base import Leaf, Method, per_kernel


class Halves(Method):
  """ΔW = s·[C; C], where C is (M, O) and I = 2·M."""

  name = "halves"
  title = "Halves"
  uses_alpha = False
  leaves = {"half": Leaf("MO")}

  def sizes(self, module):
    return {**module.sizes(), "M": module.fan_in // 2}

  def init(self, key, kernel, module, settings):
    return {"half": jnp.zeros(self.shape("half", kernel, module))}

  def delta(self, kernel, leaves, scale):
    return per_kernel(scale) * jnp.concatenate([leaves["half"]] * 2, axis=-2)
'''
OWN_AXES = """
import sys, tempfile
import jax.numpy as jnp, numpy as np
from flax import nnx
from lora_exp.lora import methods
methods.__path__.append(sys.argv[1])
methods.names.cache_clear()
from lora_exp import lora
from lora_exp.lora.peft_format import PeftFormat
from lora_exp.lora.kernels import shape as kernel_shape
from lora_exp.train.compute.trial_padding import take_trial
method = methods.get("halves")
type(method).peft = PeftFormat("HALVES", keys={"half": "half"}, alpha_key=None)
model = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(0)))
table = lora.inject(model, method="halves", rank=2)
assert table[0].parameters == 3 * 8
model.layers[0].half[...] = jnp.ones((3, 8))
after, x = model(jnp.ones((2, 6))), jnp.ones((2, 6))
params = {"layers": {"0": {"half": jnp.ones((1, 3, 8))}}}
assert take_trial(params, table, [], "halves", 0).leaves["layers.0"]["half"].shape == (3, 8)
with tempfile.TemporaryDirectory() as directory:
  shapes = {path: kernel_shape(m) for path, m in lora.modules(model).items()}
  lora.save_adapter(directory, lora.eject(model), None, {})
  lora.attach(model, lora.load_adapter(directory, None, shapes))
np.testing.assert_allclose(model(x), after)
print("ok")
"""


def test_a_leaf_may_have_an_axis_of_the_method(tmp_path):
  (tmp_path / "halves.py").write_text(HALVES)
  done = subprocess.run([sys.executable, "-c", OWN_AXES, str(tmp_path)], capture_output=True, text=True)
  assert done.stdout.strip() == "ok", done.stderr
