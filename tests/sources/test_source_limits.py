"""What would never fit is refused from its declared size, before anything is made."""

import pytest
from PIL import Image

from rsm_probe.checks import brief
from rsm_probe.errors import ConfigError, ImageError
from rsm_probe.sources import EMBEDDED, ImageSet
from rsm_probe.sources.images.crops import crop_pairs
from rsm_probe.sources.images.limits import MOST_DRAWN, MOST_PIXELS, in_bytes, require_drawn, require_edge
from rsm_probe.sources.images.published import resized
from rsm_probe.sources.training.networks import NetworkConfig, build_network
from rsm_probe.sources.training.recipe import TrainingConfig


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ({"size": 10**6}, "size: size must be at most 8192 pixels: an image of 1000000 x 1000000 takes 12 TB"),
        ({"size": 8193}, "size must be at most 8192"),
        ({"size": 10**5000}, "size"),
        (
            {"count": 10**12, "images": "scenes"},
            "count: count must be at most 1000000 images: the layouts of 1000000000000 images take 2000 TB",
        ),
        ({"steps": 10**12}, "steps: must be at most 100000000"),
        ({"batch_size": 10**12}, "batch_size: 1000000000000 images of 32 x 32 take 12288 TB, above the limit"),
        ({"batch_size": 4096, "size": 8192}, "above the limit of 100 GB"),
        ({"network": {"blocks": [10**6, 1, 1, 1]}}, "blocks: 1000003 blocks in total, above the limit of 1000"),
        ({"network": {"blocks": [251, 250, 250, 250]}}, "1001 blocks in total"),
        ({"network": {"widths": [10**9, 1, 1, 1]}}, "weights, above the limit of 1000000000; training them would take"),
        ({"network": {"widths": [1, 1, 1, 10**9]}}, "weights, above the limit"),
        ({"network": {"widths": [64, 128, 256, 512], "blocks": [1, 1, 1, 900]}}, "weights, above the limit"),
        ({"network": {"architecture": "resnet101", "widths": [10**5] * 4}}, "weights, above the limit"),
        ({"network": {"widths": [10**4000] * 4}}, "weights"),
    ],
    ids=lambda value: brief(value, 40) if isinstance(value, dict) else "",
)
def test_recipes_that_nothing_holds_are_refused(recipe, named):
    with pytest.raises(ConfigError, match=named) as caught:
        TrainingConfig.parse(recipe)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    "recipe",
    [
        {"size": 512, "batch_size": 1024, "steps": 10**7},
        {"network": {"architecture": "resnet101", "widths": [64, 128, 256, 512]}},
        {"network": {"blocks": [83, 83, 84, 83], "widths": [16, 32, 64, 128]}},
    ],
)
def test_large_recipes_that_fit_are_taken(recipe):
    TrainingConfig.parse({"images": "cifar100", **recipe})


@pytest.mark.parametrize("options", [{"architecture": "resnet101"}, {"blocks": (2, 1, 1, 3)}, {"narrow_stem": True}])
def test_weights_are_counted_as_they_are_built(options):
    config = NetworkConfig(widths=(8, 16, 24, 32), **options)
    built = sum(tensor.numel() for tensor in build_network(config, 1).state_dict().values() if tensor.ndim == 4)
    assert config.weights == pytest.approx(built, rel=0.05)


OWN = ImageSet("own", ["a"], lambda index: Image.new("RGB", (8, 8)))


@pytest.mark.parametrize("size", [0, -1, 10**6, 10**5000, 2.5, "32", None, True], ids=brief)
def test_sizes_that_no_image_has_are_refused_when_they_are_said(size):
    for draw in EMBEDDED.values():
        with pytest.raises(ImageError, match="size must be"):
            draw(size=size)
    with pytest.raises(ImageError, match="size must be"):
        resized(OWN, size)
    with pytest.raises(ImageError, match="edge must be"):
        crop_pairs(OWN, size, 6)
    with pytest.raises(ImageError, match="crop must be"):
        crop_pairs(OWN, 8, size)


@pytest.mark.parametrize("count", [0, -1, 10**12, 10**5000, 2.5, "32", True], ids=brief)
@pytest.mark.parametrize("name", sorted(set(EMBEDDED) - {"digits"}))
def test_counts_that_nobody_draws_are_refused_before_any_is_drawn(name, count):
    with pytest.raises(ImageError, match="count must be"):
        EMBEDDED[name](size=48, count=count)


def test_a_sample_of_digits_larger_than_the_set_is_the_set():
    assert len(EMBEDDED["digits"](count=10**12)) == 1797


@pytest.mark.parametrize("seed", [-1, 2**63, 0.5, "0"])
def test_seeds_out_of_range_are_refused(seed):
    for name in sorted(EMBEDDED):
        with pytest.raises(ImageError, match="seed must be"):
            EMBEDDED[name](size=48, count=3, seed=seed)


def test_the_limits_themselves_are_allowed():
    require_edge(MOST_PIXELS)
    require_drawn(MOST_DRAWN)


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "0 kB"), (12_000, "12 kB"), (3 * 10**9, "3 GB"), (10**12, "1 TB"), (10**30, "more than all machines have")],
)
def test_bytes_are_written_as_people_do(count, text):
    assert in_bytes(count) == text
