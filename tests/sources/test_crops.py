"""Two crops of one image that share most of their pixels."""

import numpy as np
import pytest

from rsm_probe.errors import ImageError
from rsm_probe.sources import photos
from rsm_probe.sources.images.crops import crop_pairs


def test_the_two_crops_share_44_by_64_pixels():
    patches = photos("test", size=84, count=3)
    crops = crop_pairs(patches, 84, 64)
    assert len(crops) == 6
    for k in range(3):
        upper, lower, whole = (np.asarray(image) for image in (crops[k], crops[k + 3], patches[k]))
        np.testing.assert_array_equal(upper, whole[:64, :64])
        np.testing.assert_array_equal(lower, whole[20:, :64])
        np.testing.assert_array_equal(upper[20:], lower[:44])
    assert crops.ids[0] == f"{patches.ids[0]}/upper"
    assert crops.ids[3] == f"{patches.ids[0]}/lower"
    assert crops.labels[1] == crops.labels[4] == patches.labels[1]


def test_crops_of_another_size_are_another_set():
    patches = photos("test", size=84, count=3)
    assert crop_pairs(patches, 84, 64).fingerprint() != crop_pairs(patches, 84, 60).fingerprint()
    # Images of any size become squares first.
    assert crop_pairs(patches, 50, 40)[0].size == (40, 40)


@pytest.mark.parametrize("crop", [42, 84, 100])
def test_crops_that_cannot_overlap_in_part_are_refused(crop):
    with pytest.raises(ImageError, match=f"two crops of {crop} pixels"):
        crop_pairs(photos("test", size=84, count=1), 84, crop)
