'''Model families, one file each: `families/NAME.py` defines `FAMILY`, which `model.family=NAME` builds.

Families are found by listing this folder. A family is a table and does not import jax. Its computation is an nnx module
in `models/modules/`, which several families may share: Mistral, Qwen, Gemma and OLMo-2 use Llama's.

# How to add a family

1. Write `families/NAME.py` with a `Family` (see `models/family.py`). Start from the most similar family and state the
   differences. The following is complete for Acme, a Llama that stores queries, keys and values as one tensor and has
   another name for a norm:

       from dataclasses import replace

       from lora_exp.models.config_rules import HEAD_GROUPS
       from lora_exp.models.config_table import Number, PublishedConfig
       from lora_exp.models.families import llama
       from lora_exp.models.rotation_rules import ROTATION
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

2. If no existing module computes it, write `models/modules/NAME_decoder.py` with a subclass of `LanguageModel`. It has
   `head`, `hidden` and `empty_cache`, and the constructor `Class(model_config, vocab_size, rngs=rngs)`.
   `phi3_decoder.py` shows how to replace parts of Llama. Module paths are those of transformers without the prefix,
   because PEFT's adapters use them. A setting that no other family has is `model.arch.options.NAME`: the module reads
   `arch.options["NAME"]`, and the table has a row `Number("arch.options.NAME", "their_name")`.

3. Write `conf/model/NAME_SIZE.yaml`, which inherits from another model's file and sets `family: NAME`, sizes,
   `weights` and `arch`.

Then `model=NAME_SIZE` trains, and `model=hf model.weights=DIR` reads published checkpoints. Merging, exporting,
sharding, packing and PEFT files work from the tables.

# The tables

    module    "package.module:Class" of the nnx module
    presets   lora.targets=PRESET -> patterns of module paths: attention, qv, mlp, all_linear, embeddings and head. The
              first of `embeddings` is the token embedding, which is also the head of a tied model
    axes      end of a parameter's path -> a logical axis for each dimension: vocab, heads, kv_heads and mlp are split
              over the mesh axis `tensor`, embed over `fsdp`; None is not split
    units     logical axis -> number of equal pieces that are never cut, such as heads
    names     tensor names in checkpoints: a prefix, and a `NameRow` for each name that differs, each stored tensor that
              contains several of our kernels, and each of our kernels that is stored as several tensors; an `ExpertRow`
              for the kernels of experts; and `computed`, the stored tensors whose values the model computes itself
    shapes    the shapes of all parameters by path, so that task=plan needs no jax; without it, the module is built
    config    fields of config.json: a row for each field, transformers' defaults, fixed settings, and rules (pairs of
              read and write functions) for settings that depend on several fields
    check     yields the problems of unsupported settings, one sentence each

The tables are used for reading and for writing. `config_table.py`, `config_rules.py`,
`rotation_rules.py` and `tensor_names.py` define their rows.
'''
