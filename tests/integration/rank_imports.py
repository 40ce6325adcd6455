"""Everything that a rank imports and prepares on its way, for the process that ranks are forked from."""

import safetensors.torch  # noqa: F401
import torch.distributed  # noqa: F401
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,  # noqa: F401
    AutoTokenizer,  # noqa: F401
    GPT2LMHeadModel,  # noqa: F401
    LlamaConfig,
    LlamaForCausalLM,
    OPTForCausalLM,  # noqa: F401
)

import runtime.engine.rank  # noqa: F401

# The first adapter of a process has transformers compile a thousand regular expressions.
_SMALLEST = LlamaConfig(
    vocab_size=4, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1
)
get_peft_model(LlamaForCausalLM(_SMALLEST), LoraConfig(r=1, target_modules=["q_proj"]))
