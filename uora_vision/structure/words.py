"""The words by which this field calls the parts of attention and of an MLP."""

from __future__ import annotations

import re
from functools import cache

QUERIES = {
    "q": "q", "wq": "q", "query": "q", "q_proj": "q", "to_q": "q", "to_query": "q", "q_lin": "q", "query_proj": "q",
    "q_attn": "q", "q_a_proj": "q_a", "q_b_proj": "q_b", "query_key_value": "qkv", "qkv": "qkv", "qkvs": "qkv",
    "Wqkv": "qkv", "qkv_proj": "qkv", "c_attn": "qkv", "to_qkv": "qkv", "W_pack": "qkv", "pwise": "qkv", "qk": "qk",
    "k": "k", "wk": "k", "key": "k", "k_proj": "k", "to_k": "k", "to_key": "k", "k_lin": "k", "key_proj": "k",
    "v": "v", "wv": "v", "value": "v", "v_proj": "v", "to_v": "v", "to_value": "v", "v_lin": "v", "value_proj": "v",
    "v_gate": "v_gate", "kv": "kv", "kv_proj": "kv", "to_kv": "kv", "kv_a_proj_with_mqa": "kv_a", "kv_b_proj": "kv_b",
}  # fmt: skip

OUTPUTS = {
    "proj": "proj", "out_proj": "proj", "o_proj": "proj", "o": "proj", "wo": "proj", "out": "proj", "to_out": "proj",
    "out_lin": "proj", "output": "proj", "dense": "proj", "c_proj": "proj", "projection": "proj", "proj_out": "proj",
    "attn_out_proj": "proj", "post_attention": "proj",
}  # fmt: skip

BESIDE = {**OUTPUTS, "final": "final", "attn": "attn", "aggreg": "aggreg"}
"""What else is an attention's if q, k or v are beside it."""

STATE_SPACE = {"in_proj", "x_proj", "dt_proj", "BCdt_proj", "hz_proj", "out_proj"}

MLPS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("fc1", "fc1_g", "fc1_x"), "fc2"), (("c_fc",), "c_proj"), (("gate_proj", "up_proj", "gate_up_proj"), "down_proj"),
    (("up",), "down"), (("w1", "w3"), "w2"), (("w0", "w1"), "w2"), (("w12",), "w3"), (("wi", "wi_0", "wi_1"), "wo"),
    (("dense_h_to_4h",), "dense_4h_to_h"), (("fc_in",), "fc_out"), (("lin1",), "lin2"), (("linear1",), "linear2"),
    (("intermediate",), "output"), (("weights_in",), "weights_out"), (("pwconv1",), "pwconv2"), (("pw1",), "pw2"),
    (("ln1",), "ln2"), (("f1", "f2"), "g"),
    (("point_wise_conv1",), "point_wise_conv2"),
)  # fmt: skip
"""Names of the layers that lead into the hidden width of an MLP, and of the one that leads out of it."""

MLP_WORDS = re.compile(r"mlp|ffn|feed_?forward|channel_mixer|glu", re.IGNORECASE)

ATTENTION_WORDS = re.compile(r"attention|attn", re.IGNORECASE)

BESIDE_ATTENTION = re.compile(r"norm|_hc$|Connection$|_input$|residual|layer$", re.IGNORECASE)
"""What is called after the attention that it comes before or after."""

SQUEEZE = re.compile(r"^(se|SE|Effective)(Module|Layer|Block|Cl|With\w+)?$|SEModule|SqueezeEx|squeeze_?ex|^SplitAttn$")

POSITION = re.compile(r"rel_?pos|rel_logits|relative_[kqv]|cpb|meta_mlp|pos_|_pos\b|position|bias", re.IGNORECASE)

TIME = re.compile(r"time_?steps?_?(emb|proj)|time_?emb|(^|_)t_embed", re.IGNORECASE)

PATCHES = re.compile(r"^patch_?embed(ding|der|s)*$", re.IGNORECASE)

TALKING_HEADS = re.compile(r"talking|proj_[lw]$|head_(logits|weights)_proj$")

ROUTERS = re.compile(r"router|(^|[._])(gate|routing_fn)$", re.IGNORECASE)

NORMS = re.compile(r"norm\d*$|ada_?ln", re.IGNORECASE)

HEADS = re.compile(r"_heads?$", re.IGNORECASE)

INDEXERS = re.compile(r"indexer$")


def kind_of(name: str) -> str | None:
    """What of q, k and v a layer is by its name, however its words are put together: `linear_q`, `projection_query`,
    `Wqkv`, `add_k_proj`, `queries_keys_values`; None if it is none, or something about them (`q_norm`)."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
    if _ABOUT & set(words):
        return None
    found = "".join(dict.fromkeys("".join(_letters(word) for word in words)))
    return found if found in ("q", "k", "v", "qk", "kv", "qkv", "qkvz") else None


_ABOUT = {
    "gate", "norm", "norms", "layernorm", "ln", "bias", "pos", "position", "relative", "rel", "scale", "conv", "router",
    "message", "preact", "mask", "embedding", "embed", "rope", "drop", "token", "tokens", "sink",
}  # fmt: skip
"""With one of these words a name is not that of q, k or v, but of something about them."""


@cache
def _letters(word: str) -> str:
    whole = {"query": "q", "queries": "q", "key": "k", "keys": "k", "value": "v", "values": "v"}
    if word in whole:
        return whole[word]
    match = re.fullmatch(r"w?(qkvz?|qk|kv|q|k|v)", word)
    return match[1] if match else ""
