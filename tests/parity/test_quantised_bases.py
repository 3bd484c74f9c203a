"""Quantised checkpoints are dequantised as the formulas of the libraries, in PyTorch."""

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import load_arrays, published_arrays, random_arrays, write_checkpoint

from lora_exp.cli.command_line import check_command_line
from lora_exp.train.merging.model_directory import hf_config
from lora_exp.train.plan import make_plan

torch = pytest.importorskip("torch")
st = pytest.importorskip("safetensors.torch")

from lora_exp.models.weights.safetensors_checkpoint import open_safetensors  # noqa: E402
from lora_exp.models.weights.stored_tensor import read_whole  # noqa: E402

NAME, SHAPE = "model.layers.0.mlp.up_proj.weight", (259, 131)
NF4 = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803, 0.1609302,
       0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]  # fmt: skip


def dequantised(directory: Path, tensors: dict, **config: object) -> np.ndarray:
  (directory / "config.json").write_text(json.dumps({"quantization_config": config}))
  st.save_file(tensors, directory / "model.safetensors")
  checkpoint = open_safetensors(directory)
  assert set(checkpoint.tensors) == {NAME} and checkpoint.tensors[NAME].shape == SHAPE
  return read_whole(checkpoint, NAME, np.float32)


def values(seed: int = 0, shape: tuple[int, ...] = SHAPE):
  return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("scale", "counts", "config"), [
  ("weight_scale_inv", (3, 2), {"quant_method": "fp8"}),
  ("weight_scale_inv", (52, 19), {"quant_method": "fp8", "weight_block_size": [5, 7]}),
  ("weight_scale", (), {"quant_method": "modelopt"}),
  ("weight_scale", (1,), {"quant_method": "compressed-tensors", "kv_cache_scheme": None}),
  ("weight_scale", (259, 1), {"quant_method": "fbgemm_fp8"}),
  ("weight_scale", (259, 14), {"quant_method": "compressed-tensors",
                               "config_groups": {"group_0": {"weights": {"strategy": "group", "group_size": 10}}}}),
])  # fmt: skip
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
def test_scales_of_tensors_rows_and_blocks(tmp_path, scale, counts, config, dtype):
  stored = (values() * 40).round().to(getattr(torch, dtype))
  scales = values(1, counts).abs() + 0.1
  rows, columns = (-(-n // count) for n, count in zip(SHAPE, (*counts, 1, 1)[:2], strict=True))
  if scale == "weight_scale_inv" and "weight_block_size" not in config:
    rows, columns = 128, 128
  grid = scales.reshape((*counts, 1, 1)[:2]).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
  module = NAME.removesuffix("weight")
  tensors = {NAME: stored, f"{module}{scale}": scales, f"{module}input_scale": torch.ones(1)}
  expected = stored.float() * grid[: SHAPE[0], : SHAPE[1]]
  assert (dequantised(tmp_path, tensors, **config) == expected.numpy()).all()


def test_eight_bits_of_bitsandbytes(tmp_path):
  stored, scb = (values() * 50).round().to(torch.int8), values(1, (259,)).abs()
  module = NAME.removesuffix("weight")
  tensors = {NAME: stored, f"{module}SCB": scb, f"{module}weight_format": torch.tensor(0, dtype=torch.uint8)}
  expected = stored * scb[:, None] * 0.00787401574803149
  np.testing.assert_allclose(dequantised(tmp_path, tensors), expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("kind", "dtype", "storage"), [
  ("nf4", "float32", "uint8"), ("fp4", "bfloat16", "uint8"), ("nf4", "float16", "float16"),
])  # fmt: skip
def test_four_bits_of_bitsandbytes(tmp_path, kind, dtype, storage, nested):
  size, block = SHAPE[0] * SHAPE[1], 64
  numbers = torch.randint(0, 16, (size + 3,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
  numbers[size:] = 0
  packed = numbers[0::2] << 4 | numbers[1::2]  # one byte more than the values need, as in 16-bit storage
  packed = (packed[: -(-size // 2)] if storage == "uint8" else packed.view(torch.float16))[:, None]
  code, blocks = torch.tensor(NF4), -(-size // block)
  state = {"quant_type": kind, "blocksize": block, "dtype": dtype, "shape": list(SHAPE)}
  tensors = {f"{NAME}.quant_map": code, NAME: packed}
  absmax = values(1, (blocks,)).abs()
  if nested:
    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
    chosen = torch.randint(0, 256, (blocks,), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    inner, outer = values(3, (256,)), values(4, (-(-blocks // 256),)).abs()
    tensors |= {f"{NAME}.absmax": chosen, f"{NAME}.nested_quant_map": inner, f"{NAME}.nested_absmax": outer}
    absmax = inner[chosen.long()] * outer.repeat_interleave(256)[:blocks] + 0.5
  else:
    tensors[f"{NAME}.absmax"] = absmax
  content = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
  tensors[f"{NAME}.quant_state.bitsandbytes__{kind}"] = content
  expected = code[numbers[:size].long()] * absmax.repeat_interleave(block)[:size]
  found = dequantised(tmp_path, tensors)
  assert (found == expected.to(getattr(torch, dtype)).float().reshape(SHAPE).numpy()).all()


def test_a_model_with_float8_layers_is_loaded(tmp_path, capfd):
  """Embeddings and norms stay in floating point; the scales are of rows. An export says nothing of float8."""
  write_checkpoint(tmp_path, quantization_config={"quant_method": "fbgemm_fp8"})
  arrays = random_arrays()
  tensors = {name: torch.tensor(x) for name, x in published_arrays(arrays).items()}
  for name in [name for name in tensors if name.endswith("_proj.weight")]:
    scale = tensors[name].abs().amax(1, keepdim=True) / 448
    tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
    tensors[f"{name}_scale"] = scale
  st.save_file(tensors, tmp_path / "model.safetensors")
  for path, x in load_arrays(tmp_path).items():
    error = np.abs(np.asarray(x) - arrays[path]).max() / np.abs(arrays[path]).max()
    assert error < 0.04 if path.endswith("_proj.kernel") else error == 0, path
  assert "14 of 29 tensors are quantised; they are dequantised here" in capfd.readouterr().out
  [cfg] = check_command_line(["model=hf", f"model.weights={tmp_path}", "model.tokenizer=bytes"]).jobs
  config = hf_config(make_plan(cfg))
  assert config is not None and config["hidden_size"] == 32 and "quantization_config" not in config
