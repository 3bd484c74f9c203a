"""A run on a tiny Llama that chats, and a server with OpenAI's interface that computes what a function says."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from checkpoints import random_arrays, write_checkpoint
from runs import QUIET, train
from tokenizer_files import CHATML, byte_level

from lora_exp.config import ArchConfig, ModelConfig

SIZES = ModelConfig(family="llama", layers=4, width=64, heads=4, ff=96, max_len=128, vocab_size=320, base="weights",
                    arch=ArchConfig(kv_heads=2, head_dim=16, tied=False))
CONFIG = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 4, "head_dim": 16,
          "intermediate_size": 96, "vocab_size": 320, "max_position_embeddings": 128, "attention_bias": False}
FEW = ["train.steps=6", "optim.lr=0.03", "optim.warmup=0", "train.eval_every=0", "train.save_every=0",
       "train.export=last", "train.batch_size=4", "data.seq_len=48", "train.eval_tokens=200"]
Logits = Callable[[Sequence[int]], np.ndarray]  # token ids -> logits (V,) of the next token


def base_arrays(seed: int = 0) -> dict[str, np.ndarray]:
  """Random arrays, by transformers' names, whose logits are a few nats apart."""
  from checkpoints import published_arrays

  rng = np.random.default_rng(seed)
  arrays = {path: (rng.normal(size=x.shape) * x.shape[0] ** -0.5).astype(np.float32) if x.ndim > 1 else
            np.ones_like(x) for path, x in random_arrays(SIZES).items()}
  arrays["lm_head.kernel"] *= 3
  return published_arrays(arrays)


def chat_base(at: Path, seed: int = 0) -> Path:
  """A checkpoint of the tiny Llama with a chat template."""
  base = write_checkpoint(at, base_arrays(seed), **CONFIG)
  byte_level(base, chat_template=CHATML)
  return base


def chat_run(at: Path, *settings: str) -> Path:
  """A run on `chat_base` in at/base, on questions and answers."""
  base, data = chat_base(at / "base"), at / "pairs.jsonl"
  lines = ({"prompt": f"the cat {n}", "response": f"a hat was {n}!"} for n in range(40))
  data.write_text("".join(json.dumps(line) + "\n" for line in lines))
  model = ["model=hf", f"model.weights={base}", *QUIET, "data=files", f"data.path={data}"]
  return train(at / "run", *model, *FEW, "lora.rank=4", *settings)


@contextmanager
def completions_server(adapted: Logits, base: Logits, encode: Callable[[str, bool], list[int]],
                       echoes: bool = False) -> Iterator[str]:
  """A server of the models `adapted` and `base`; yields its address.

  `encode(text, chat)` tokenises a prompt. With `echoes` it returns the log-probabilities of the prompt, as vLLM does.
  """

  class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
      asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
      chat = self.path.endswith("/chat/completions")
      given = asked["messages"][0]["content"] if chat else asked["prompt"]
      ids = given if isinstance(given, list) else encode(given, chat)
      model = base if asked.get("model") == "base" else adapted
      body = json.dumps({"choices": [self.choice(model, ids, asked, chat)]}).encode()
      self.send_response(200)
      self.send_header("Content-Length", str(len(body)))
      self.end_headers()
      self.wfile.write(body)

    def choice(self, model: Logits, ids: list[int], asked: dict, chat: bool) -> dict:
      z_V = log_softmax(model(ids))
      order = np.argsort(-z_V)[:20].tolist()
      if chat or not echoes:
        top = [{"id": i, "token": f"<{i}>", "logprob": float(z_V[i])} for i in order]
        return {"logprobs": {"content": [{**top[0], "top_logprobs": top}]}}
      tokens = [f"token_id:{i}" for i in [*ids, order[0]]]
      if not asked.get("echo"):
        return {"logprobs": {"tokens": tokens[-1:], "token_logprobs": [float(z_V[order[0]])],
                             "top_logprobs": [{f"token_id:{i}": float(z_V[i]) for i in order}]}}
      values = [None, *(float(log_softmax(model(ids[:n]))[ids[n]]) for n in range(1, len(ids)))]
      return {"logprobs": {"tokens": tokens, "token_logprobs": [*values, float(z_V[order[0]])]}}

    def log_message(self, *args: object) -> None:
      """Prints nothing."""

  server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    yield f"http://127.0.0.1:{server.server_port}"
  finally:
    server.shutdown()
    server.server_close()


def log_softmax(z_V: np.ndarray) -> np.ndarray:
  z_V = z_V.astype(np.float64) - z_V.max()
  return z_V - np.log(np.exp(z_V).sum())
