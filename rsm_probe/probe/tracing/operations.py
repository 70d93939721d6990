"""Groups ATen operations by what they do to locations."""

from __future__ import annotations

from typing import Any

from rsm_probe.probe.torch_internals import is_elementwise

# Views are recognised by their schema. Other operations are traced only if they are listed here or tagged elementwise.
MOVES = {
    *("cat", "stack", "roll", "flip", "rot90", "repeat", "repeat_interleave", "constant_pad_nd", "im2col", "col2im"),
    *("reflection_pad1d", "reflection_pad2d", "reflection_pad3d"),
    *("replication_pad1d", "replication_pad2d", "replication_pad3d"),
    *("pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "_unsafe_view", "slice_scatter"),
    *("select_scatter", "view_copy", "permute_copy", "split_with_sizes_copy", "view_as_complex", "view_as_real"),
}
INDEXES = {
    *("index", "_unsafe_index", "index_select", "gather", "take", "masked_select", "index_put", "index_copy"),
    *("scatter", "masked_scatter", "_index_put_impl"),
}
# The in-place variants create another view of the same values.
RESHAPES = {"transpose", "t", "squeeze", "unsqueeze", "as_strided"}
# Each step of a sequence keeps its location.
RECURRENT = {"mkldnn_rnn_layer", "_cudnn_rnn", "_thnn_fused_lstm_cell", "miopen_rnn"}
ATTENTION = {"_transformer_encoder_layer_fwd", "_native_multi_head_attention"}
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "linear", "matmul"}
GRIDS = (
    *("convolution", "_convolution", "max_pool", "avg_pool", "_adaptive_avg_pool", "adaptive_", "upsample_"),
    *("_upsample_", "pixel_shuffle", "max_unpool", "torchvision::deform_conv2d"),
)
REDUCTIONS = {
    *("mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "norm", "linalg_vector_norm"),
    *("argmax", "argmin", "any", "all", "logsumexp"),
}
# Elementwise operations that ATen does not tag as such, and cumulative sums, which keep their axis.
_KEEPS = {
    *("clone", "_to_copy", "lift_fresh", "hardswish", "gelu", "polar", "complex", "log_sigmoid_forward", "masked_fill"),
    *("fake_quantize_per_tensor_affine", "leaky_relu", "ldexp", "rrelu_with_noise", "cumsum", "tril", "triu"),
    *ATTENTION,
}
_KEEPING_KINDS = ("norm", "softmax", "dropout", "prelu")
FILLS = {"fill", "zero", "normal", "uniform"}
WRITES = {"copy", "index_put", "index_copy", "scatter", "masked_scatter", "_index_put_impl"}


def is_arithmetic(func: Any, name: str) -> bool:
    """Whether an operation keeps every element in place."""
    return is_elementwise(func) or name in _KEEPS or name in REDUCTIONS or any(kind in name for kind in _KEEPING_KINDS)


def uses_only_shape(name: str) -> bool:
    """Whether an operation makes a tensor in the shape of its operand, whatever its values."""
    return name.startswith("new_") or name.endswith("_like")


def is_move(name: str) -> bool:
    """Whether an operation only moves, copies or selects values."""
    return name in MOVES or name in INDEXES or (name in RESHAPES and name != "as_strided")


def factors(name: str, args: tuple[Any, ...]) -> tuple[Any, Any]:
    """The two factors of an operation of `PRODUCTS`."""
    left, right = args[1:3] if name in ("addmm", "baddbmm") else args[:2]
    return left, right


def reduced_axes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The axes over which an operation of `REDUCTIONS` runs: a number, a list, or None for all."""
    position = 2 if "norm" in name else 1  # norms have their order first
    return args[position] if len(args) > position else kwargs.get("dim")
