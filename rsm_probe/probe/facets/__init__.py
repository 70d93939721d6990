"""Facets of attention layers: the queries, keys and values that a projection makes of a layer's tokens.

Begin with `facet_names.py` (how users name them), then `attention_calls.py` (one call of an attention layer).
`channel_trace.py` follows the channels of every projection to the attention operation, which shows which of them are
queries, keys and values, and of which head; `channel_codes.py` encodes channels as numbers.
"""
