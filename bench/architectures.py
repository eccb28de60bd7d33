"""Which architectures can be trained and scored in packs: each is tried as a small random model.

    python -m bench.architectures > docs/architectures.md

The numbers are how far a pack is from each response alone, as transformers' eager attention computes it: nats
per token in training, reward in scoring. Everything else is refused before the first step, with
the line shown.
"""

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import clha
import reward

SIZES = {  # under the names that some architecture has for them; the others ignore them
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_ssm": 64}
ARCHITECTURES = (
    *("apertus", "arcee", "bamba", "bloom", "codegen", "cohere", "cohere2", "deepseek_v3", "ernie4_5"),
    *("exaone4", "falcon", "falcon_h1", "gemma", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_bigcode"),
    *("gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "helium", "jamba", "lfm2"),
    *("llama", "mamba", "mamba2", "minimax", "mistral", "mixtral", "mpt", "nemotron", "olmo", "olmo2"),
    *("olmo3", "olmoe", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_5_text"),
    *("qwen3_moe", "qwen3_next", "recurrent_gemma", "rwkv", "seed_oss", "smollm3", "stablelm"),
    *("starcoder2", "xglm"),
)
NEEDS: dict[str, dict[str, Any]] = {  # of some, besides SIZES
    "bamba": MAMBA | {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 4},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
    },
    "falcon_h1": MAMBA,
    "gemma2": {"query_pre_attn_scalar": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "opt": {"word_embed_proj_dim": 32},
    "recurrent_gemma": {"lru_width": 32},
    "rwkv": {"attention_hidden_size": 32},
}
PROMPT = list(range(3, 23))
RESPONSES = [list(range(30, 39)), list(range(40, 53)), list(range(60, 65))]
QUERY = reward.share_prefix([PROMPT + ids for ids in RESPONSES]) | {"longest": 33}


def build(kind: Any, name: str, **more: Any) -> PreTrainedModel:
    """A model with weights so large that each token matters to the next."""
    torch.manual_seed(0)
    settings = SIZES | NEEDS.get(name, {}) | more
    if name == "falcon":
        del settings["head_dim"]  # it works that out, and takes no other
    config = AutoConfig.for_model(name, **settings)
    model = kind.from_config(config, **clha.EAGER)
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.3)
    return model.eval()


def trained(name: str) -> str:
    """How far log-probs in a pack are from those alone; raises InputError as the start of a run does."""
    policy = clha.Policy(build(AutoModelForCausalLM, name))
    clha.check_policy(policy.train(), QUERY, QUERY["longest"], "float32")
    with torch.no_grad():
        packed = policy.eval()(clha.pack([QUERY]))[0]
        alone = torch.stack([policy.forward_alone(PROMPT, ids) for ids in RESPONSES])
    lengths = torch.tensor([len(ids) for ids in RESPONSES])
    return f"right, {((packed - alone) / lengths).abs().max():.0e}"


def scored(name: str) -> str:
    """How far rewards in a pack are from those alone; raises InputError as scoring does."""
    model = build(AutoModelForSequenceClassification, name, num_labels=1)
    judge = reward.RewardModel(model, None, list, max_length=128, pack_tokens=512)
    texts = [PROMPT + ids for ids in RESPONSES]
    packed = judge.score_ids(texts, [[0, 1, 2]])
    alone = [judge.score_ids([ids], [[0]])[0] for ids in texts]
    return f"right, {max(abs(a - b) for a, b in zip(packed, alone, strict=True)):.0e}"


def outcome(attempt: Callable[[str], str], name: str) -> str:
    """What came of an attempt, as a cell of a Markdown table."""
    try:
        return attempt(name)
    except clha.InputError as error:
        return f"refused: {error}".replace("|", "/")[:160]
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            return "transformers has no such model"
        raise


def main() -> None:
    """Prints the table."""
    warnings.simplefilter("ignore")
    rows = []
    for name in tqdm(ARCHITECTURES, file=sys.stderr, disable=None):
        rows.append(f"| {name} | {outcome(trained, name)} | {outcome(scored, name)} |")
    right = sum("right" in row.split("|")[2] for row in rows)
    print("# Architectures\n")
    print(__doc__.split("\n\n")[2])
    command = "`python -m bench.architectures > docs/architectures.md`"
    print(f"{command}, transformers {transformers.__version__}: {right} of {len(rows)} can be trained.\n")
    print("| architecture | training | scoring |\n| --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    clha.run(main)
