"""Models of timm with another output stride: more locations at the same depth, from the same weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from rsm_probe.errors import ModelError


def output_stride(title: str) -> tuple[str, dict[str, int]]:
    """Divide the name of a model of timm, such as "resnet18?output_stride=16", into name and options.

    Raises:
        ModelError: anything but an output stride of 8, 16 or 32 follows the question mark.
    """
    name, question, option = title.partition("?")
    if not question:
        return name, {}
    key, _, stride = option.partition("=")
    if key != "output_stride" or stride not in ("8", "16", "32"):
        raise ModelError(f"after ?, a model takes output_stride=8, 16 or 32, found {title!r}")
    return name, {"output_stride": int(stride)}


def with_strides(title: str, strides: Mapping[str, int], build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model of timm whose last stages may dilate their convolutions instead of striding.

    Raises:
        ModelError: the architecture cannot have another output stride than its own.
    """
    try:
        return build()
    except (TypeError, AssertionError, ValueError, NotImplementedError) as error:
        if not strides or not (isinstance(error, AssertionError) or "output_stride" in str(error)):
            raise
        raise ModelError(
            f"{title} has a fixed output stride ({error or 'timm refuses another one'}); leave out ?output_stride="
        ) from None
