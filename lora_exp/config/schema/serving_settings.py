"""Settings of exported files, and of the check of a server."""

from dataclasses import dataclass


@dataclass
class ExportConfig:
  """What task=export writes besides the tensors, and how it converts them."""

  rank: int | None = None  # convert the update of any method to plain LoRA of this rank, by SVD; null: no conversion
  gguf_type: str = "f16"  # type of the matrices in format=gguf_merged and gguf_base: f32 | f16 | q8_0
  answers: bool = True  # with an adapter: write answers.json, which task=verify compares with a server


@dataclass
class VerifyConfig:
  """task=verify: compares what a server computes with answers.json of an exported adapter."""

  adapter: str | None = None  # directory that task=export wrote
  backend: str = "peft"  # peft | transformers (a merged model) | llama_cpp | url | file
  model: str | None = None  # peft, transformers, llama_cpp: the base or merged model (null: as in the directory);
  # url: the name of the adapted model on the server
  base: str | None = None  # url: the name of the base on the server, if it serves the base too
  url: str | None = None  # url: address of an OpenAI-style server, such as http://127.0.0.1:8080
  file: str | None = None  # file: JSON with {"adapted": [[…]], "base": [[…]]}, log-probabilities as in answers.json
  tolerance: float = 0.01  # largest allowed difference of a log-probability, in nats
