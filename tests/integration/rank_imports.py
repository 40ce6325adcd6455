"""Everything that a rank imports on its way, for the process that ranks are forked from."""

import peft  # noqa: F401
import safetensors.torch  # noqa: F401
import torch.distributed  # noqa: F401
from transformers import (  # noqa: F401
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    OPTForCausalLM,
)

import runtime.engine.rank  # noqa: F401
