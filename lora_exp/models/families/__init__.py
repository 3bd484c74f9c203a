'''One file for each model family: `families/NAME.py` holds one object `FAMILY`, and `model.family=NAME` builds it.

The folder is read as it is: there is no list to extend. A family is a table and imports no jax. What it computes is an
nnx module in `models/modules/`, which several families may share; Mistral, Qwen, Gemma and OLMo-2 share Llama's.

# How to add a family

1. Write `families/NAME.py` with a `Family` (see `models/family.py`). Start from the nearest family and state what
   differs. This is all of Acme, a Llama that stores queries, keys and values as one tensor
   and has another name for a norm:

       from dataclasses import replace

       from lora_exp.models.config_rules import HEAD_GROUPS, ROTATION
       from lora_exp.models.config_table import Number, PublishedConfig
       from lora_exp.models.families import llama
       from lora_exp.models.tensor_names import NameRow

       FAMILY = replace(
         llama.FAMILY,
         name="acme",
         names=replace(
           llama.FAMILY.names,
           rows=(
             NameRow(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.W_pack",)),
             NameRow(("input_layernorm",), ("attention_norm",)),
           ),
         ),
         config=PublishedConfig(
           model_type="acme",
           architecture="AcmeForCausalLM",
           fields=(*llama.SIZE_FIELDS, *llama.ACTIVATION_FIELDS, Number("arch.logit_softcap", "logit_cap")),
           defaults={**llama.REQUIRED_SIZES, "hidden_act": "silu", "max_position_embeddings": 4096},
           rules=(HEAD_GROUPS, ROTATION),
         ),
       )

2. If no module computes it, write `models/modules/NAME_decoder.py` with a subclass of `LanguageModel`: its `head`,
   `hidden` and `empty_cache`, made by `Class(model_config, vocab_size, rngs=rngs)`. `phi3_decoder.py` shows how to
   replace parts of Llama. Module paths are those of transformers' code without the prefix, because PEFT's adapters
   are named by them. A setting that no other family has is `model.arch.options.NAME`: the module reads
   `arch.options["NAME"]`, and the table has a row `Number("arch.options.NAME", "their_name")`.

3. Write `conf/model/NAME_SIZE.yaml`, which inherits another model's file and states what differs: `family: NAME`,
   sizes, `weights`, `arch`.

Then `model=NAME_SIZE` trains, and `model=hf model.weights=DIR` reads published checkpoints. Merging, exporting,
sharding, packing and PEFT files work from the tables.

# The tables

    module    "package.module:Class" of the nnx module
    presets   lora.targets=PRESET -> patterns of module paths; all of attention, qv, mlp, all_linear, embeddings, head.
              The first of `embeddings` is the table of tokens, which is the head of a tied model
    axes      end of a parameter's path -> a logical axis for each dimension: vocab, heads, kv_heads and mlp are split
              over the mesh axis `tensor`, embed over `fsdp`, None over none
    units     logical axis -> equal pieces that are never cut, such as heads
    names     how checkpoints name tensors: a prefix, and a `NameRow` where a name differs, where one stored tensor
              holds several of our kernels, or where several stored tensors hold one
    config    how config.json names settings: a row for each field, transformers' defaults, settings that are fixed, and
              rules (pairs of functions, read and write) for what several fields say together
    check     problems with settings that the module cannot compute, a sentence each

A table is used in both directions. `config_table.py`, `config_rules.py` and `tensor_names.py` hold what its rows are.
'''
